"""The manifest: one row an example, and every check that can be made before a file is opened.

What lives here: reading CSV and JSONL, the checks, the splits. What lives elsewhere: opening the files that the cells
name (``preprocess.py``).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .config import Config

SHOWN = 20  # of the problems; the rest is counted


class ManifestError(ValueError):
    """Bad rows: the message has a line for each, with file, line number and column."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n".join([*problems[:SHOWN], *more]))
        self.problems = list(problems)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown, which one is nearest, and which there are.

    Examples
    --------
    >>> unknown("layer", "LowRankFusin", ["LowRankFusion", "MLB"])
    "unknown layer 'LowRankFusin'; did you mean 'LowRankFusion'? There are: LowRankFusion, MLB"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {guess}There are: {', '.join(known) or 'none'}"


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


def check(manifest: Manifest, config: Config, labelled: bool = True) -> None:
    """Check all that can be known without opening the files.

    Parameters
    ----------
    manifest : Manifest
    config : Config
        Says which columns there must be and what a label is.
    labelled : bool, optional
        Whether the rows are for training or evaluation; those to predict need neither split nor label.

    Raises
    ------
    ManifestError
        Of all problems at once: missing columns, empty or duplicate ids, labels that are missing, NaN or not numbers,
        unknown or missing splits, groups that straddle splits, rows without any modality.
    """
    supervised = labelled and config.task.kind != "retrieval"
    drawn = config.data.split == "by-seed"
    cells = {name: modality.columns_of(name) for name, modality in config.modalities.items()}
    needed = ["id", *(["label"] if supervised else []), *(["split"] if labelled and not drawn else [])]
    problems = [
        f"{manifest.path.name}: {unknown('column', column, manifest.columns)}"
        for column in [*needed, *(column for columns in cells.values() for column in columns)]
        if column not in manifest.columns
    ]
    if problems:
        raise ManifestError(problems)
    sides = {"all modalities are": [name for name in cells if name not in config.task.target]}
    if labelled and config.task.target:
        sides["the target is"] = list(config.task.target)
    first: dict[str, int] = {}
    for i, row in enumerate(manifest.rows):
        if not row.get("id"):
            problems.append(f"{manifest.where(i, 'id')}: is empty")
        elif first.setdefault(row["id"], i) != i:
            problems.append(
                f"{manifest.where(i, 'id')}: {row['id']!r} is that of line {manifest.lines[first[row['id']]]} too"
            )
        for side, names in sides.items():
            if not any(row.get(column) for name in names for column in cells[name]):
                problems.append(f"{manifest.where(i, ', '.join(names))}: {side} missing")
        if supervised:
            problems += _label_problem(manifest, i, config.task.kind)
    if labelled and not drawn:
        problems += _split_problems(manifest, {"train", "validation", *config.data.test})
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
        if row["split"] not in known:
            problems.append(f"{manifest.where(i, 'split')}: {unknown('split', row['split'], sorted(known))}")
        elif row.get("group"):
            places[row["group"]].setdefault(row["split"], i)
    for group, splits in places.items():
        if len(splits) > 1:
            rows = ", ".join(f"{split} (line {manifest.lines[i]})" for split, i in splits.items())
            problems.append(f"{manifest.path.name}, column 'group': {group!r} straddles splits: {rows}")
    if "train" not in manifest.column("split"):
        problems.append(f"{manifest.path.name}, column 'split': no row is 'train'")
    return problems


def splits(manifest: Manifest, config: Config, seed: int) -> dict[str, np.ndarray]:
    """Return the rows of each split, in the manifest's order.

    With ``data.split: by-seed`` whole groups, in random order, go to ``test`` as long as they fit into its share of the
    rows, then to ``validation``, then to ``train``; a row without a group is a group of its own.

    Returns
    -------
    dict of str to ndarray
        ``train``, ``validation`` (maybe empty) and the test splits: int64 row numbers.
    """
    if config.data.split == "manifest":
        column = np.array(manifest.column("split"))
        names = ["train", "validation", *config.data.test]
        return {name: np.flatnonzero(column == name) for name in names}
    groups = [group or f"\0{i}" for i, group in enumerate(manifest.column("group"))]
    number = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    of_row = np.array([number[group] for group in groups])
    sizes = np.bincount(of_row, minlength=len(number))
    room = {2: config.data.test_share * len(manifest), 1: config.data.validation_share * len(manifest)}
    place = np.zeros(len(number), dtype=np.int64)
    for group in np.random.default_rng(seed).permutation(len(number)):
        for part in room:
            if sizes[group] <= room[part]:
                room[part] -= sizes[group]
                place[group] = part
                break
    return {name: np.flatnonzero(place[of_row] == k) for k, name in enumerate(["train", "validation", "test"])}
