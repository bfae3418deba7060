"""Step 1: the items that a manifest's cells name or hold become uniform tensors.

What lives here: reading the items of every modality, whole or in a stream, and columns: the distinct items of a modality
and the item of each row. What lives elsewhere: decoding, by kind (``kinds.py``); the cache (``cache.py``); the rows
(``sources.py``) and their checks (``manifest.py``); encoders (``features.py``) and frozen encoders (``pretrained.py``).
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from tqdm import tqdm

from . import sources
from .cache import Cache, digest
from .config import Config
from .errors import ManifestError
from .files import state
from .kinds import Modality
from .manifest import Manifest, check
from .pretrained import EXTRACTORS, Extractor, extractor
from .processes import ALONE, Ranks, here

CHUNK = 64  # items that are decoded, encoded and stored at a time, at most
IN_FLIGHT = 1 << 26  # bytes of them, by and large
STREAMED = 1024  # rows of a stream that are held at a time
LOG = logging.getLogger("fusionsum")
Cells = tuple[Any, ...]


@dataclass(frozen=True)
class Items:
    """The distinct items of a modality, U arrays or one array (U, ...), and for each row its item, or -1: (N,) int64."""

    distinct: Sequence[np.ndarray]
    index: np.ndarray

    def of(self, rows: np.ndarray) -> Sequence[np.ndarray]:
        """Return the distinct items of some rows."""
        numbers = np.unique(self.index[rows])
        numbers = numbers[numbers >= 0]
        if isinstance(self.distinct, np.ndarray):
            return self.distinct if len(numbers) == len(self.distinct) else _Some(self.distinct, numbers)
        return [self.distinct[k] for k in numbers]


class _Some(Sequence[np.ndarray]):
    """Some of an array's items, which is not copied: they may be more than fit into memory."""

    def __init__(self, items: np.ndarray, numbers: np.ndarray) -> None:
        self.items = items
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return self.items[self.numbers[place]]


@dataclass(frozen=True)
class Column:
    """The distinct items of a modality as a tensor ``(U, ...)``, and each row's item or -1: ``(N,)`` int64.

    Or, where scaling them is cheap and a second copy is large, the items themselves and the function that scales them.
    """

    values: Any
    index: Tensor
    scaled: Callable[[Any], Tensor] | None = None

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows' items, and whether each is there; a missing item's values are another item's, or zeros."""
        index = self.index[rows]
        found = index.clamp(min=0)
        values = self.values[found] if self.scaled is None else self.scaled(self.values[found.numpy()])
        return values, index >= 0

    def present(self, rows: Tensor) -> Tensor:
        """Return for each row whether its item is there, (B,) bool."""
        return self.index[rows] >= 0


def fit(name: str, modality: Modality, items: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return the statistics of the training items that tensors and encoders need, their ``shape`` and ``dtype`` included.

    Raises
    ------
    ManifestError
        If there are no items.
    """
    if not len(items):
        raise ManifestError([f"modality {name!r}: no training row has it"])
    fitted = modality.fit(items)
    made = modality.tensor(items[:1], fitted)
    return fitted | {"shape": list(made.shape[1:]), "dtype": str(made.dtype).removeprefix("torch.")}


def column(name: str, modality: Modality, items: Items, fitted: dict[str, Any]) -> Column:
    """Return the column of a modality's items; if no row has the modality, its only item is zeros.

    Raises
    ------
    ManifestError
        If the items are of another shape than those of training.
    """
    index = torch.from_numpy(items.index)
    if not len(items.distinct):
        return Column(torch.zeros(1, *fitted["shape"], dtype=modality.dtype), index)
    shape = list(modality.tensor(items.distinct[:1], fitted).shape[1:])
    if shape != fitted["shape"]:
        raise ManifestError(
            [f"modality {name!r}: items of shape {shape}, but those of training have {fitted['shape']}"]
        )
    if modality.scaled:
        return Column(items.distinct, index, lambda chosen: modality.tensor(chosen, fitted))
    return Column(modality.tensor(items.distinct, fitted), index)


@dataclass(frozen=True)
class Problem:
    """A row's item that cannot be used, and the reason."""

    row: int
    column: str
    reason: str


Made = tuple[bytes, bytes, Any]  # an item's key, its content's digest, and the item
Done = tuple[int, np.ndarray | None, bytes | str]  # a row, its item and its key, or the reason why it has none


class _Reader:
    """Reads, decodes and encodes the items of one modality; workers call `read`, and nothing else of it."""

    def __init__(self, manifest: Manifest, modality: Modality, cache: Cache, frozen: Extractor | None) -> None:
        self.modality = modality
        self.folder = manifest.folder
        self.frozen = frozen
        self.cache = cache if frozen is not None or modality.slow else None
        self.what = modality.kind if frozen is None else frozen.recipe
        self.recipe = f"{'' if frozen is None else frozen.recipe} {modality.recipe()}".encode()
        self.decode: Callable[[bytes], Any] = modality.decode if frozen is None else frozen.reader(modality)
        self.claimed: set[bytes] = set()  # the keys of items that a worker decodes, or has decoded
        self.lock = threading.Lock()

    def file(self, cells: Cells) -> str | None:
        """Return the file that the cells name, if it is one."""
        slow = self.modality.slow and isinstance(cells[0], str)
        return os.path.abspath(self.folder / cells[0]) if slow else None

    def read(self, cells: Cells, known: bytes | None = None) -> Made:
        """Return the item's key and content; the item is None if the cache has it, or another worker makes it.

        Parameters
        ----------
        cells : tuple
        known : bytes, optional
            The content's digest: an item that is cached is then not read.
        """
        if known is not None and not self._wanted(key := digest(self.recipe, known)):
            return key, known, None
        content = self.modality.content(self.folder, cells)
        found = digest(content)
        key = digest(self.recipe, found)
        return key, found, self.decode(content) if found == known or self._wanted(key) else None

    def _wanted(self, key: bytes) -> bool:
        with self.lock:
            if key in self.claimed or (self.cache is not None and self.cache.holds(key)):
                return False
            self.claimed.add(key)
            return True

    def finished(
        self, chunk: Sequence[tuple[int, Cells]], results: Sequence[Made | Exception], kept: _Kept
    ) -> Iterator[Done]:
        """Give each row's item and key, or no item and the reason; encode and store those that are fresh.

        An item that `kept` has is None, too.
        """
        made = [(k, r) for k, r in enumerate(results) if not isinstance(r, Exception)]
        fresh = {key: item for _, (key, _, item) in made if item is not None}
        if self.frozen is not None and fresh:
            fresh = dict(zip(fresh, self.frozen.encode(list(fresh.values())), strict=True))
        items = dict(fresh)
        if self.cache is not None:
            self.cache.store(self.what, fresh)
            items |= self.cache.find([key for _, (key, *_) in made if key not in fresh and key not in kept.numbers])
        for (row, cells), result in zip(chunk, results, strict=True):
            if isinstance(result, Exception):
                yield row, None, _reason(result, cells[0])
                continue
            key = result[0]
            try:
                if key not in items and key not in kept.numbers:  # the cache's was corrupt, or another worker failed
                    items[key] = self._again(cells)
                    if self.cache is not None:
                        self.cache.store(self.what, {key: items[key]})
                yield row, items.get(key), key
            except (OSError, ValueError) as error:
                yield row, None, _reason(error, cells[0])

    def _again(self, cells: Cells) -> np.ndarray:
        item = self.decode(self.modality.content(self.folder, cells))
        return item if self.frozen is None else next(iter(self.frozen.encode([item])))


class _Kept:
    """The distinct items so far: a list, or one array where all are of one shape, which spares a copy."""

    def __init__(self, fixed: bool, most: int, ranks: Ranks, folder: Path) -> None:
        self.fixed = fixed
        self.most = most
        self.ranks = ranks
        self.folder = folder
        self.numbers: dict[bytes, int] = {}
        self.items: Any = []

    def add(self, key: bytes, item: np.ndarray | None) -> int:
        """Return the number of an item; raise ValueError for another shape than the first's."""
        if key in self.numbers:
            return self.numbers[key]
        assert item is not None
        number = len(self.numbers)
        if not self.fixed:
            self.items.append(item)
        else:
            if not number:
                self._reserve(item)
            if item.shape != self.items.shape[1:]:
                raise ValueError(f"is of shape {item.shape}, but the first is of {self.items.shape[1:]}")
            if self.ranks.leads:
                self.items[number] = item
        self.numbers[key] = number
        return number

    def _reserve(self, item: np.ndarray) -> None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
        shape = self.most, *item.shape
        if self.ranks.count == 1 and self.most * item.nbytes <= memory // 2:
            self.items = np.empty(shape, item.dtype)  # pages that nothing is written to take no memory
        else:
            self.items = self.ranks.array(shape, item.dtype, self.folder)

    def distinct(self) -> Sequence[np.ndarray]:
        """Return the items in the order of their numbers."""
        return self.items[: len(self.numbers)]


def gather(
    manifest: Manifest,
    name: str,
    modality: Modality,
    cache: Cache,
    workers: int = 2,
    frozen: Extractor | None = None,
    progress: bool = True,
) -> tuple[Items, list[Problem]]:
    """Return one modality's items; each distinct item is decoded once, by one rank, or read from the cache.

    Parameters
    ----------
    manifest, name, modality
        The rows, the modality's name and its options.
    cache : Cache
        Of decoded items; with `frozen`, of their features. Items that are decoded faster than read are not cached.
    workers : int, optional
        Threads that read and decode; Pillow, libsndfile and NumPy let go of the interpreter.
    frozen : pretrained.Extractor, optional
        A frozen encoder: the items returned are then the features that it computes.
    progress : bool, optional
        Whether to show a bar.

    Returns
    -------
    Items
    list of Problem
        One for each row whose item is missing from disk, corrupt or empty; its index is -1.

    Raises
    ------
    OSError
        If the items of all rows take more than half of the machine's memory, and the disk of the cache has no room either.
    """
    columns = modality.columns_of(name)
    cells = [manifest.column(c) for c in columns]
    present = np.flatnonzero(np.any([manifest.present(c) for c in columns], axis=0)).tolist()
    same = _first(cells, present)
    wanted = [row for row in present if same[row] == row]
    reader = _Reader(manifest, modality, cache, frozen)
    fixed = frozen is not None or modality.fixed
    ranks = here() if fixed else ALONE  # texts and tables are decoded sooner than exchanged
    kept = _Kept(fixed, len(wanted), ranks, cache.path.parent)
    number = np.full(len(manifest), -1, dtype=np.int64)
    reasons: dict[int, str] = {}
    size = max(1, min(CHUNK, IN_FLIGHT // modality.nbytes()))
    chunks = (
        [(row, tuple(column[row] for column in cells)) for row in wanted[k : k + size]]
        for k in range(0, len(wanted), size)
    )
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(wanted), desc=name, disable=not progress) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)  # `Image.decode` keeps their memory small
        mine = itertools.islice(chunks, ranks.rank, None, ranks.count)
        made = (list(reader.finished(*read, kept)) for read in _ahead(mine, reader, pool))
        for done in ranks.merged(made):
            for row, item, key in done:
                try:
                    if isinstance(key, str):
                        reasons[row] = key
                    else:
                        number[row] = kept.add(key, item)
                except ValueError as error:
                    reasons[row] = _reason(error, cells[0][row])
            bar.update(len(done))
    ranks.wait()  # until the items are written
    where = ", ".join(columns)
    problems = [Problem(i, where, reasons[k]) for i, k in enumerate(same.tolist()) if k in reasons]
    return Items(kept.distinct(), np.where(same >= 0, number[same], -1)), problems


def _first(cells: Sequence[Sequence[Any]], present: Sequence[int]) -> np.ndarray:
    """Return for each row the first with the same texts in its cells, itself for objects in memory, -1 if it has none."""
    same = np.full(len(cells[0]), -1, dtype=np.int64)
    same[present] = present
    if not any(isinstance(column, sources.Lazy) for column in cells):
        first: dict[Cells, int] = {}
        for row in present:
            of_row = tuple(column[row] for column in cells)
            if all(isinstance(cell, str) for cell in of_row):
                same[row] = first.setdefault(of_row, row)
    return same


def _ahead(
    chunks: Iterable[list[tuple[int, Cells]]], reader: _Reader, pool: Executor
) -> Iterator[tuple[list[tuple[int, Cells]], list[Made | Exception]]]:
    """Give each chunk with what was read of it, while the next is being read."""
    waiting: deque[tuple[list[tuple[int, Cells]], list[Future[Made | Exception]], dict[str, str], list[str | None]]]
    waiting = deque()

    def taken() -> tuple[list[tuple[int, Cells]], list[Made | Exception]]:
        chunk, futures, states, files = waiting.popleft()
        results = [future.result() for future in futures]
        if reader.cache is not None:
            of_file = [(f, r) for f, r in zip(files, results, strict=True) if f and not isinstance(r, Exception)]
            reader.cache.remember((f, states[f], r[1]) for f, r in of_file if f not in known or known[f] != r[1])
        return chunk, results

    def attempt(cells: Cells, digest_: bytes | None) -> Made | Exception:
        try:
            return reader.read(cells, digest_)
        except (OSError, ValueError) as error:
            return error

    known: dict[str, bytes] = {}
    for chunk in chunks:
        if reader.cache is None:  # too quick for a thread to pay
            yield chunk, [attempt(cells, None) for _, cells in chunk]
            continue
        files = [reader.file(cells) for _, cells in chunk]
        states = {path: state(Path(path)) for path in files if path}
        known |= reader.cache.digests(states)
        futures = [pool.submit(attempt, cells, known.get(f or "")) for (_, cells), f in zip(chunk, files, strict=True)]
        waiting.append((chunk, futures, states, files))
        if len(waiting) > 1:
            yield taken()
    while waiting:
        yield taken()


def _reason(error: Exception, cell: Any) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no such file: {cell}"
    shown = repr(cell if len(cell) <= 60 else f"{cell[:57]}...") if isinstance(cell, str) else type(cell).__name__
    return f"{shown}: {(isinstance(error, OSError) and error.strerror) or error}"


def without(
    manifest: Manifest, problems: Sequence[Problem], on_error: str, some: bool = True
) -> tuple[Manifest, np.ndarray, list[str]]:
    """Leave out the rows that have problems, or raise for them.

    Parameters
    ----------
    manifest, problems
    on_error : str
        ``raise`` or ``skip``, the configuration's ``data.on_error``.
    some : bool, optional
        Whether rows must be left.

    Returns
    -------
    manifest : Manifest
        Without the rows that have problems.
    kept : ndarray
        The numbers of the remaining rows.
    messages : list of str
        A line for each problem, with file, line and column.

    Raises
    ------
    ManifestError
        If `on_error` is ``raise`` and there are problems, or if no row is left.
    """
    messages = [f"{manifest.where(p.row, p.column)}: {p.reason}" for p in problems]
    bad = {p.row for p in problems}
    kept = np.array([i for i in range(len(manifest)) if i not in bad], dtype=np.int64)
    if messages and (on_error == "raise" or (some and not len(kept))):
        raise ManifestError(messages)
    return manifest.take(kept), kept, messages


def item_numbers(indices: Sequence[np.ndarray]) -> np.ndarray:
    """Return a number for each row of several modalities' items, equal for equal items; -1 if all are missing.

    Examples
    --------
    >>> item_numbers([np.array([5, 5, 7, -1]), np.array([1, 1, -1, -1])]).tolist()
    [1, 1, 2, -1]
    """
    rows = np.stack(indices, axis=1)
    _, numbers = np.unique(rows, axis=0, return_inverse=True)
    return np.where((rows < 0).all(axis=1), -1, numbers.reshape(-1))


@dataclass(frozen=True)
class Gathered:
    """Step 1's result.

    Attributes
    ----------
    manifest : Manifest
        The usable rows.
    items : dict of str to Items
        By modality.
    messages : list of str
        A line for each row that was left out.
    notes : list of str
        What else is worth saying.
    kept : ndarray
        The numbers of the usable rows among all rows of the source: (N,) int64.
    every : Manifest
        All rows.
    problems : list of Problem
        Why some of these are not usable.
    """

    manifest: Manifest
    items: dict[str, Items]
    messages: list[str]
    notes: list[str]
    kept: np.ndarray
    every: Manifest
    problems: list[Problem]

    def target_numbers(self, target: Sequence[str]) -> np.ndarray:
        """Return a number for each row's items of the target modalities, equal for equal items; -1 if all are missing."""
        return item_numbers([self.items[name].index for name in target])


def gather_rows(
    config: Config,
    source: Any,
    labelled: bool = True,
    training: bool = True,
    only: Sequence[str] | None = None,
    on_error: str | None = None,
    progress: bool = True,
) -> Gathered:
    """Read and check the rows of a source and gather the items of every modality.

    Parameters
    ----------
    config : Config
        With all modalities (``infer.complete``).
    source
        As in `sources.read`.
    labelled : bool, optional
        Whether the rows need labels.
    training : bool, optional
        Whether the rows are to train on, and need splits if the configuration does. Others may lack a modality's column.
    only : sequence of str, optional
        The modalities that matter, one of which a row needs; all by default.
    on_error : str, optional
        ``raise`` or ``skip``, instead of the configuration's ``data.on_error``.
    progress : bool, optional
        Whether to show bars.

    Raises
    ------
    ManifestError
        If a row is bad and ``data.on_error`` is ``raise``, with a line for each.
    """
    manifest = sources.read(source, config.data.names)
    with Cache(Path(config.data.cache), round(config.data.cache_limit * 2**30)) as cache:
        gathered = _gather(config, manifest, cache, labelled, training, only, on_error, progress)
    if not here().rank:
        for message in gathered.messages:
            print(f"skipped: {message}")
    for note in gathered.notes:
        LOG.warning(note)
    return gathered


def stream_rows(
    config: Config,
    source: Any,
    on_error: str | None = None,
    size: int | None = STREAMED,
    only: Sequence[str] | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Gathered]:
    """Read, check and gather rows to predict, `size` at a time: memory does not grow with their number.

    Unlike `gather_rows`, it gives parts of which no row is usable, and leaves it to the caller to tell why, and to say the
    notes.

    Parameters
    ----------
    config, source, on_error, only, progress
        As in `gather_rows`.
    size : int or None, optional
        Rows at a time; None for all, whose ids are then checked to be different.
    ranks : Ranks, optional
        Those that share the parts: this one gets its own.

    Raises
    ------
    ManifestError
        If a row is bad and ``data.on_error`` is ``raise``, when its turn comes.
    """
    with Cache(Path(config.data.cache), round(config.data.cache_limit * 2**30)) as cache:
        parts = sources.batches(source, size, config.data.names)
        for manifest in itertools.islice(parts, ranks.rank, None, ranks.count):
            yield _gather(
                config, manifest, cache, False, False, only, on_error, progress, whole=size is None, some=False
            )


def _gather(
    config: Config,
    manifest: Manifest,
    cache: Cache,
    labelled: bool,
    training: bool,
    only: Sequence[str] | None,
    on_error: str | None,
    progress: bool,
    whole: bool = True,
    some: bool = True,
) -> Gathered:
    columns, task = config.columns, config.task
    if only is not None:
        columns, task = {name: columns[name] for name in only}, replace(task, target=())
    notes = check(manifest, columns, task, config.data.splits if training else None, labelled, training, unique=whole)
    items: dict[str, Items] = {}
    problems: list[Problem] = []
    for name in columns:
        modality = config.modalities[name]
        frozen = extractor(modality.kind, modality.encoder) if modality.encoder in EXTRACTORS[modality.kind] else None
        items[name], bad = gather(manifest, name, modality, cache, config.data.workers, frozen, progress)
        problems += bad
        if frozen is None and whole:
            notes += [f"modality {name!r}: {note}" for note in modality.notes(items[name].distinct)]
    if cache.trouble:
        notes.append(f"the cache cannot be used, so everything is decoded again: {cache.trouble}")
    left, kept, messages = without(manifest, problems, on_error or config.data.on_error, some)
    return Gathered(
        left,
        {name: Items(i.distinct, i.index[kept]) for name, i in items.items()},
        messages,
        notes,
        kept,
        manifest,
        problems,
    )
