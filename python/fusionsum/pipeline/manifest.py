"""The manifest: one row an example, and every check that can be made before a file is opened.

What lives here: reading CSV and JSONL, writing CSV, the checks, the splits. What lives elsewhere: opening the files that
the cells name (``preprocess.py``); the configuration that asks for columns, labels and splits
(``config.py``).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import DRAWN, Data, Task
from .errors import ManifestError, unknown


@dataclass(frozen=True)
class Manifest:
    """Rows of text by column, and the line of the file that each came from."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int, column: str) -> str:
        """Return file, line and column, for messages."""
        return f"{self.path.name}:{self.lines[row]}, column {column!r}"

    def take(self, rows: Iterable[int]) -> Manifest:
        """Return a manifest of some of the rows."""
        rows = list(rows)
        return Manifest(self.path, self.columns, [self.rows[i] for i in rows], [self.lines[i] for i in rows])

    def column(self, name: str) -> list[str]:
        """Return the cells of a column, all empty if the manifest has none of this name."""
        return [row.get(name, "") for row in self.rows]

    def groups(self) -> np.ndarray:
        """Return the number of each row's group, (N,); a row without one is a group of its own."""
        names = [group or f"\0{i}" for i, group in enumerate(self.column("group"))]
        number = {group: k for k, group in enumerate(dict.fromkeys(names))}
        return np.array([number[group] for group in names])


def read(path: Path) -> Manifest:
    """Read a manifest: ``.jsonl``, one object a line, or CSV with a header.

    Raises
    ------
    ManifestError
        If it cannot be read, is empty, or a row has too many or too few cells.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError([f"{path}: {error}"]) from None
    manifest = _from_jsonl(path, text) if path.suffix == ".jsonl" else _from_csv(path, text)
    if not manifest.rows:
        raise ManifestError([f"{path}: has no rows"])
    return manifest


def _from_csv(path: Path, text: str) -> Manifest:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines, problems = [], [], []
    columns: list[str] = []
    try:
        columns = [name.strip() for name in next(reader, [])]
        if len(set(columns)) < len(columns):
            raise ManifestError([f"{path.name}:1: a column name occurs twice: {', '.join(columns)}"])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                problems.append(f"{path.name}:{reader.line_num}: expected {len(columns)} cells, got {len(cells)}")
                continue
            rows.append(dict(zip(columns, (cell.strip() for cell in cells), strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        problems.append(f"{path.name}:{reader.line_num}: {error}")
    if problems:
        raise ManifestError(problems)
    return Manifest(path, tuple(columns), rows, lines)


def _from_jsonl(path: Path, text: str) -> Manifest:
    rows, lines, problems = [], [], []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 and the like are no ends of lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path.name}:{number}: {error}")
            continue
        if not isinstance(row, dict) or any(isinstance(cell, dict | list) for cell in row.values()):
            problems.append(f"{path.name}:{number}: expected an object of strings and numbers")
            continue
        rows.append({key: "" if cell is None else str(cell).strip() for key, cell in row.items()})
        lines.append(number)
    if problems:
        raise ManifestError(problems)
    return Manifest(path, tuple(dict.fromkeys(key for row in rows for key in row)), rows, lines)


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
) -> None:
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
        Whether the rows are for training or evaluation; rows to predict need neither split nor label.

    Raises
    ------
    ManifestError
        Of all problems at once: missing columns, empty or duplicate ids, labels that are missing, NaN or not numbers,
        unknown or missing splits, groups that straddle splits, rows without any modality.
    """
    supervised = labelled and task.kind != "retrieval"
    divided = labelled and splits is not None
    needed = ["id", *(["label"] if supervised else []), *(["split"] if divided else [])]
    problems = [
        f"{manifest.path.name}: {unknown('column', column, manifest.columns)}"
        for column in [*needed, *(column for names in columns.values() for column in names)]
        if column not in manifest.columns
    ]
    if problems:
        raise ManifestError(problems)
    sides = {"all modalities are": [name for name in columns if name not in task.target]}
    if labelled and task.target:
        sides["the target is"] = list(task.target)
    first: dict[str, int] = {}
    for i, row in enumerate(manifest.rows):
        if not row.get("id"):
            problems.append(f"{manifest.where(i, 'id')}: is empty")
        elif first.setdefault(row["id"], i) != i:
            problems.append(
                f"{manifest.where(i, 'id')}: {row['id']!r} is that of line {manifest.lines[first[row['id']]]} too"
            )
        for side, names in sides.items():
            if not any(row.get(column) for name in names for column in columns[name]):
                problems.append(f"{manifest.where(i, ', '.join(names))}: {side} missing")
        if supervised:
            problems += _label_problem(manifest, i, task.kind)
    if labelled and splits is not None:
        problems += _split_problems(manifest, set(splits))
    if problems:
        raise ManifestError(problems)


def _label_problem(manifest: Manifest, i: int, kind: str) -> list[str]:
    label = manifest.rows[i].get("label", "")
    if not label or label.lower() == "nan":
        return [f"{manifest.where(i, 'label')}: {'is NaN' if label else 'is empty'}"]
    if kind == "regression":
        try:
            if math.isfinite(float(label)):
                return []
        except ValueError:
            pass
        return [f"{manifest.where(i, 'label')}: expected a finite number, got {label!r}"]
    return []


def _split_problems(manifest: Manifest, known: Collection[str]) -> list[str]:
    problems = []
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for i, row in enumerate(manifest.rows):
        split = row.get("split", "")
        if split not in known:
            problems.append(f"{manifest.where(i, 'split')}: {unknown('split', split, sorted(known))}")
        elif row.get("group"):
            places[row["group"]].setdefault(split, i)
    for group, held in places.items():
        if len(held) > 1:
            rows = ", ".join(f"{split} (line {manifest.lines[i]})" for split, i in held.items())
            problems.append(f"{manifest.path.name}, column 'group': {group!r} straddles splits: {rows}")
    if "train" not in manifest.column("split"):
        problems.append(f"{manifest.path.name}, column 'split': no row is 'train'")
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
