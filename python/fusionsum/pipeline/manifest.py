"""The manifest: one row an example, and every check that can be made before an item is opened.

What lives here: the rows, writing CSV, the checks, the splits. What lives elsewhere: the files and tables that rows are
read from (``sources.py``); the items that the cells hold or name (``preprocess.py``); the configuration that asks for
columns, labels and splits (``config.py``).
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .config import DRAWN, Data, Task
from .errors import ManifestError, near, unknown

LARGEST = float(np.finfo(np.float32).max)  # of a label of regression


@dataclass(frozen=True, eq=False)
class Manifest:
    """Rows by column: what files, DataFrames, data sets and dicts become (``sources.read``).

    Attributes
    ----------
    name : str
        Of the file, or of the type of the table, for messages.
    folder : pathlib.Path
        What file names in cells are relative to: the file's folder, or the current one.
    cells : mapping of str to sequence
        By column, N cells: text, "" where it is missing, or an object in memory (bytes, a picture, an array).
    lines : sequence of int
        Of the file, or the numbers of the rows from 0.
    path : pathlib.Path, optional
        The file.
    aliases : mapping of str to str
        The file's names of columns that are called otherwise here, for messages.
    numbered : bool
        Whether ids are the numbers of the rows, for the source has none.
    """

    name: str
    folder: Path
    cells: Mapping[str, Sequence[Any]]
    lines: Sequence[int]
    path: Path | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    numbered: bool = False

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.cells)

    def line(self, row: int) -> str:
        """Return the place of a row in a few words: ``line 2``, ``row 0``."""
        return f"{'row' if self.path is None else 'line'} {self.lines[row]}"

    def where(self, row: int, column: str) -> str:
        """Return file, line and column, for messages."""
        place = f"{self.name}, {self.line(row)}" if self.path is None else f"{self.name}:{self.lines[row]}"
        return f"{place}, column {self.aliases.get(column, column)!r}"

    def take(self, rows: Iterable[int]) -> Manifest:
        """Return a manifest of some of the rows."""
        rows = np.fromiter(rows, dtype=np.int64)
        cells = {
            name: column.take(rows) if hasattr(column, "take") else [column[i] for i in rows.tolist()]
            for name, column in self.cells.items()
        }
        return replace(self, cells=cells, lines=[self.lines[i] for i in rows.tolist()])

    def column(self, name: str) -> Sequence[Any]:
        """Return the cells of a column, all missing if the manifest has none of this name."""
        return self.cells.get(name) or [""] * len(self)

    def present(self, name: str) -> np.ndarray:
        """Return for each row whether a column's cell is there, (N,) bool."""
        column = self.column(name)
        lazy = getattr(column, "present", None)
        return np.array([not (isinstance(x, str) and not x) for x in column], dtype=bool) if lazy is None else lazy

    def digest(self) -> str:
        """Return a hash of the file, or of all cells: the same for the same rows."""
        digest = hashlib.sha256()
        if self.path is not None:
            with self.path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            for name, column in self.cells.items():
                digest.update(repr(name).encode())
                for value in column:
                    _hash(digest, value)
        return digest.hexdigest()

    def groups(self) -> np.ndarray:
        """Return the number of each row's group, (N,); a row without one is a group of its own."""
        names = [group or f"\0{i}" for i, group in enumerate(self.column("group"))]
        number = {group: k for k, group in enumerate(dict.fromkeys(names))}
        return np.array([number[group] for group in names])


def _hash(digest: Any, value: Any) -> None:
    """Add a cell to a hash: of objects in memory their type, shape and content."""
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, list | tuple):
        digest.update(f"{len(value)}[".encode())
        for part in value:
            _hash(digest, part)
    elif hasattr(value, "tobytes") and not isinstance(value, bytes):  # arrays and pictures
        kind = getattr(value, "dtype", getattr(value, "mode", ""))
        digest.update(f"{kind} {getattr(value, 'shape', getattr(value, 'size', ''))} ".encode())
        digest.update(value.tobytes())
    elif hasattr(value, "numpy"):
        _hash(digest, value.detach().cpu().numpy())
    else:
        digest.update(repr(value).encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; the columns are the first row's, and a cell that a row lacks is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)


def check(
    manifest: Manifest,
    columns: Mapping[str, Collection[str]],
    task: Task,
    splits: Collection[str] | None = None,
    labelled: bool = True,
    training: bool = True,
    unique: bool = True,
) -> list[str]:
    """Check all that can be known without opening the files.

    Parameters
    ----------
    manifest : Manifest
    columns : mapping of str to collection of str
        The columns of each modality.
    task : Task
        Its kind says whether rows have labels, of which type; `target` are retrieval's modalities to find.
    splits : collection of str, optional
        The names that the column ``split`` may hold; None if the column is not needed.
    labelled : bool, optional
        Whether the rows need labels, and retrieval's its targets.
    training : bool, optional
        Whether the rows are to train on. Others need not have the columns of all modalities.
    unique : bool, optional
        Whether two rows may not have the same id; not so for parts of a stream.

    Returns
    -------
    list of str
        What is worth saying: the columns that are missing and need not be there.

    Raises
    ------
    ManifestError
        Of all problems at once: missing columns, empty or duplicate ids, labels that are missing, NaN or not numbers,
        unknown or missing splits, groups that straddle splits, rows without any modality.
    """
    supervised = labelled and (task.kind != "retrieval" or task.positives == "label")
    notes = _check_columns(manifest, columns, task, supervised, splits is not None, training)
    problems: list[str] = []
    first: dict[str, int] = {}
    for i, name in enumerate(manifest.column("id")):
        if not name:
            problems.append(f"{manifest.where(i, 'id')}: is empty")
        elif unique and first.setdefault(name, i) != i:
            problems.append(f"{manifest.where(i, 'id')}: {name!r} is that of {manifest.line(first[name])} too")
    sides = {"all modalities are": [name for name in columns if name not in task.target]}
    if labelled and task.target:
        sides["the target is"] = list(task.target)
    for side, names in sides.items():
        there = np.any([manifest.present(column) for name in names for column in columns[name]], axis=0)
        problems += [f"{manifest.where(i, ', '.join(names))}: {side} missing" for i in np.flatnonzero(~there).tolist()]
    if supervised:
        problems += _label_problems(manifest, task.kind)
    if splits is not None:
        problems += _split_problems(manifest, set(splits))
    if problems:
        raise ManifestError(problems)
    return notes


def _check_columns(
    manifest: Manifest,
    columns: Mapping[str, Collection[str]],
    task: Task,
    supervised: bool,
    divided: bool,
    training: bool,
) -> list[str]:
    """Raise for columns that are missing; return a note for each that need not be there."""
    known = {manifest.aliases.get(name, name): name for name in manifest.columns}
    needed = [*(["label"] if supervised else []), *(["split"] if divided else [])]
    asked = dict.fromkeys(column for names in columns.values() for column in names)
    absent = [column for column in asked if column not in known.values()]
    free = [name for name, role in known.items() if role not in asked]
    if not training and len(absent) < len(asked):
        # A name that is nearly that of a column which nothing else asks for is a slip of the pen.
        slips = [column for column in absent if near(column, free)]
        notes = [f"{manifest.name}: has no column {c!r}: it is missing in all rows" for c in absent if c not in slips]
        absent = slips
    else:
        notes = []
    missing = [column for column in needed if column not in manifest.columns] + absent
    if missing:
        raise ManifestError([f"{manifest.name}: {unknown('column', column, known)}" for column in missing])
    return notes


def _label_problems(manifest: Manifest, kind: str) -> list[str]:
    problems = []
    for i, label in enumerate(manifest.column("label")):
        wrong = ""
        if kind == "multilabel" and isinstance(label, str | list | tuple):
            pass  # a row may have no label
        elif not isinstance(label, str):
            wrong = f"expected text or a number, got {type(label).__name__}"
        elif not label or label.lower() == "nan":
            wrong = "is NaN" if label else "is empty"
        elif kind == "regression" and not _magnitude(label) <= LARGEST:
            wrong = f"expected a finite number of at most {LARGEST:.2g}, got {label!r}"
        if wrong:
            problems.append(f"{manifest.where(i, 'label')}: {wrong}")
    return problems


def _magnitude(text: str) -> float:
    """Return the magnitude of the number that a text holds, or NaN."""
    try:
        return abs(float(text))
    except ValueError:
        return math.nan


def _split_problems(manifest: Manifest, known: Collection[str]) -> list[str]:
    problems = []
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for i, (split, group) in enumerate(zip(manifest.column("split"), manifest.column("group"), strict=True)):
        if split not in known:
            problems.append(f"{manifest.where(i, 'split')}: {unknown('split', str(split), sorted(known))}")
        elif group:
            places[group].setdefault(split, i)
    for group, held in places.items():
        if len(held) > 1:
            rows = ", ".join(f"{split} ({manifest.line(i)})" for split, i in held.items())
            problems.append(f"{manifest.name}, column 'group': {group!r} straddles splits: {rows}")
    if "train" not in manifest.column("split"):
        problems.append(f"{manifest.name}, column 'split': no row is 'train'")
    return problems


def splits(manifest: Manifest, data: Data, seed: int) -> dict[str, np.ndarray]:
    """Return the rows of each split, in the manifest's order.

    With ``data.split: by-seed`` the groups are shuffled; each goes whole to ``test`` if it fits into what is left of the
    test share, else to ``validation`` if it fits there, else to ``train``. A row without a group is a group of its own.

    Returns
    -------
    dict of str to ndarray
        ``train``, ``validation`` (maybe empty) and the test splits: int64 row numbers.
    """
    if data.splits is not None:
        column = np.array(manifest.column("split"))
        return {name: np.flatnonzero(column == name) for name in data.splits}
    of_row = manifest.groups()
    sizes = np.bincount(of_row)
    room = {2: data.test_share * len(manifest), 1: data.validation_share * len(manifest)}
    place = np.zeros(len(sizes), dtype=np.int64)
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        for part in room:
            if sizes[group] <= room[part]:
                room[part] -= sizes[group]
                place[group] = part
                break
    return {name: np.flatnonzero(place[of_row] == k) for k, name in enumerate(DRAWN)}
