"""Step 1: the files and texts that a manifest names become uniform tensors.

What lives here: reading the items of every modality, the cache by content, and columns: the distinct items of a modality
and the item of each row. What lives elsewhere: decoding, by kind (``kinds.py``); the manifest and its checks
(``manifest.py``); encoders (``features.py``) and frozen encoders (``pretrained.py``).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .config import Config
from .errors import ManifestError
from .kinds import Modality
from .manifest import Manifest, check, read
from .pretrained import EXTRACTORS, Extractor, extractor

CHUNK = 64  # items that are decoded, encoded and stored at a time


@dataclass(frozen=True)
class Items:
    """The distinct items of a modality as arrays, and for each row of the manifest its item, or -1: ``(N,)`` int64."""

    distinct: list[np.ndarray]
    index: np.ndarray

    def of(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the distinct items of some rows."""
        return [self.distinct[k] for k in np.unique(self.index[rows]) if k >= 0]


@dataclass(frozen=True)
class Column:
    """The distinct items of a modality as a tensor ``(U, ...)``, and each row's item or -1: ``(N,)`` int64."""

    values: Tensor
    index: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows' items, and whether each is there; a missing item's values are another item's, or zeros."""
        index = self.index[rows]
        return self.values[index.clamp(min=0)], index >= 0


def fit(name: str, modality: Modality, items: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return the statistics of the training items that tensors and encoders need, their ``shape`` included.

    Raises
    ------
    ValueError
        If there are no items.
    """
    if not items:
        raise ValueError(f"modality {name!r}: no training row has it")
    fitted = modality.fit(items)
    return fitted | {"shape": list(modality.tensor(items[:1], fitted).shape[1:])}


def column(modality: Modality, items: Items, fitted: dict[str, Any]) -> Column:
    """Return the column of a modality's items; if no row has the modality, its only item is zeros."""
    if items.distinct:
        values = modality.tensor(items.distinct, fitted)
    else:
        values = torch.zeros(1, *fitted["shape"], dtype=modality.dtype)
    return Column(values, torch.from_numpy(items.index))


class Cache:
    """Arrays on disk, by the hash of the item's bytes and of the recipe: the options of decoding and encoding."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, recipe: str, content: bytes) -> Path:
        """Return the file of the array that a recipe makes of an item's bytes."""
        digest = hashlib.sha256(recipe.encode() + b"\0" + content).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.npy"

    def store(self, place: Path, array: np.ndarray) -> None:
        """Write the array so that no reader, and no interruption, ever sees a part of the file."""
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(place)


@dataclass(frozen=True)
class Problem:
    """A row's item that cannot be used, and the reason."""

    row: int
    column: str
    reason: str


def gather(
    manifest: Manifest,
    name: str,
    modality: Modality,
    cache: Cache,
    workers: int = 2,
    frozen: Extractor | None = None,
    progress: bool = True,
) -> tuple[Items, list[Problem]]:
    """Return one modality's items; each distinct item is decoded once, or read from the cache.

    Parameters
    ----------
    manifest, name, modality
        The rows, the modality's name and its options.
    cache : Cache
        Of decoded items; with `frozen`, of their features.
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
    """
    columns = modality.columns_of(name)
    cells = list(zip(*(manifest.column(c) for c in columns), strict=True))
    recipe = modality.recipe() if frozen is None else f"{frozen.recipe} {modality.recipe()}"
    decode: Callable[[bytes], Any] = modality.decode if frozen is None else frozen.reader(modality)
    folder = manifest.path.parent

    def read(cell: tuple[str, ...]) -> tuple[Path | None, Any, bool]:
        """Return the item's key, the item (or why there is none), and whether it came from the cache."""
        try:
            content = modality.content(folder, cell)
            place = cache.key(recipe, content)
            if place.exists():
                return place, np.load(place, allow_pickle=False), True
            return place, decode(content), False
        except (OSError, ValueError) as error:
            reason = f"no such file: {cell[0]}" if isinstance(error, FileNotFoundError) else f"{cell[0]!r}: {error}"
            return None, reason, False

    wanted = list(dict.fromkeys(cell for cell in cells if any(cell)))
    number_of: dict[tuple[str, ...], int] = {}
    number_at: dict[Path, int] = {}
    reasons: dict[tuple[str, ...], str] = {}
    distinct: list[np.ndarray] = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(wanted), desc=name, disable=not progress) as bar:
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            found = list(pool.map(read, chunk))
            fresh = [k for k, (place, _, cached) in enumerate(found) if place is not None and not cached]
            items: Iterable[np.ndarray] = [found[k][1] for k in fresh]
            made = dict(zip(fresh, frozen.encode(items) if frozen and fresh else items, strict=True))
            for k, (cell, (place, item, _)) in enumerate(zip(chunk, found, strict=True)):
                if place is None:
                    reasons[cell] = item
                    continue
                if k in made:
                    item = made[k]
                    cache.store(place, item)
                if place not in number_at:
                    number_at[place] = len(distinct)
                    distinct.append(item)
                number_of[cell] = number_at[place]
            bar.update(len(chunk))
    index = np.array([number_of.get(cell, -1) for cell in cells], dtype=np.int64)
    where = ", ".join(columns)
    return Items(distinct, index), [Problem(i, where, reasons[c]) for i, c in enumerate(cells) if c in reasons]


def without(manifest: Manifest, problems: Sequence[Problem], on_error: str) -> tuple[Manifest, np.ndarray, list[str]]:
    """Leave out the rows that have problems, or raise for them.

    Parameters
    ----------
    manifest, problems
    on_error : str
        ``raise`` or ``skip``, the configuration's ``data.on_error``.

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
    if messages and (on_error == "raise" or not len(kept)):
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
    """Step 1's result: the manifest's usable rows, their items by modality, and a line for each row left out."""

    manifest: Manifest
    items: dict[str, Items]
    messages: list[str]

    def target_numbers(self, target: Sequence[str]) -> np.ndarray:
        """Return a number for each row's items of the target modalities, equal for equal items; -1 if all are missing."""
        return item_numbers([self.items[name].index for name in target])


def gather_rows(
    config: Config, path: Path, labelled: bool = True, progress: bool = True, only: Sequence[str] | None = None
) -> Gathered:
    """Read and check a manifest and gather the items of every modality, or of those in `only`, one of which a row needs.

    Raises
    ------
    ManifestError
        If a row is bad and ``data.on_error`` is ``raise``, with a line for each.
    """
    manifest = read(path)
    columns, task = config.columns, config.task
    if only is not None:
        columns, task = {name: columns[name] for name in only}, replace(task, target=())
    check(manifest, columns, task, config.data.splits, labelled)
    items: dict[str, Items] = {}
    problems: list[Problem] = []
    for name in columns:
        modality = config.modalities[name]
        frozen = extractor(modality.kind, modality.encoder) if modality.encoder in EXTRACTORS[modality.kind] else None
        cache = Cache(Path(config.data.cache))
        items[name], bad = gather(manifest, name, modality, cache, config.data.workers, frozen, progress)
        problems += bad
    manifest, kept, messages = without(manifest, problems, config.data.on_error)
    for message in messages:
        print(f"skipped: {message}")
    return Gathered(manifest, {name: Items(i.distinct, i.index[kept]) for name, i in items.items()}, messages)
