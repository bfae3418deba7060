"""Whatever holds rows becomes a `Manifest`: CSV and JSONL files, DataFrames, Hugging Face data sets, dicts.

What lives here: recognising a source, by what it is and without importing its package; reading it whole or in batches;
what a cell is. What lives elsewhere: the rows and their checks (``manifest.py``); what the cells hold (``kinds.py``).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ManifestError
from .files import opened
from .manifest import Manifest

LONGEST = 1 << 24  # characters of a cell of a CSV file: Python's own limit of 131,072 is shorter than some articles
BLOCK = 4096  # rows that are taken from a table at a time
EXPECTED = "a CSV or JSONL file, a pandas or polars DataFrame, a datasets.Dataset, or dicts"


def read(source: Any, columns: Mapping[str, str] | None = None) -> Manifest:
    """Read all rows of a source.

    Parameters
    ----------
    source : str, pathlib.Path, Manifest, DataFrame, datasets.Dataset, datasets.DatasetDict or iterable of dict
        A file whose name ends in ``.jsonl`` (one object a line), or a CSV file with a header; a pandas or polars
        DataFrame; a Hugging Face data set, or a dict of them, whose keys are then the column ``split``; rows as dicts.
    columns : mapping of str to str, optional
        The source's names of the columns ``id``, ``label``, ``group`` and ``split``, where it has others. Without a
        column ``id`` a row's id is its line or, in memory, its number.

    Raises
    ------
    ManifestError
        If it cannot be read, has no rows, or a row has too many or too few cells; all such rows are named.

    Examples
    --------
    >>> read([{"word": "one", "price": 1.5}, {"word": "two", "price": None}], {"label": "price"}).cells
    {'word': ['one', 'two'], 'label': ['1.5', ''], 'id': ['0', '1']}
    """
    return next(batches(source, None, columns))


def batches(source: Any, size: int | None, columns: Mapping[str, str] | None = None) -> Iterator[Manifest]:
    """Read `size` rows of a source at a time, as `read` does all; only that many are held in memory.

    Parameters
    ----------
    source, columns
        As in `read`; an iterator of dicts is consumed.
    size : int or None
        Rows of a batch; None for all in one.
    """
    empty = True
    for manifest in _open(source, size):
        empty = False
        yield _named(manifest, columns or {})
    if empty:
        raise ManifestError([f"{_name(source)}: has no rows"])


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else type(source).__name__


def _open(source: Any, size: int | None) -> Iterator[Manifest]:
    if isinstance(source, Manifest):
        step = size or max(1, len(source))
        return (source.take(range(k, min(k + step, len(source)))) for k in range(0, len(source), step))
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return _from_jsonl(path, size) if path.suffix == ".jsonl" else _from_csv(path, size)
    family = type(source).__module__.partition(".")[0]
    if family == "datasets" and isinstance(source, Mapping):
        parts = [part.add_column("split", [name] * len(part)) for name, part in source.items()]
        source = sys.modules["datasets"].concatenate_datasets(parts)
    if family == "datasets" and hasattr(source, "features") and hasattr(source, "select"):
        return _from_dataset(source, size)
    if family == "pandas" and hasattr(source, "iloc") and hasattr(source, "columns"):
        if not source.columns.is_unique:
            raise ManifestError([f"DataFrame: a column name occurs twice: {', '.join(map(str, source.columns))}"])
        return _from_table("DataFrame", list(source.columns), len(source), _pandas(source), size)
    if family == "polars" and hasattr(source, "collect"):
        source = source.collect()
    if family == "polars" and hasattr(source, "get_column"):
        return _from_table("DataFrame", source.columns, source.height, _polars(source), size)
    if isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        return _from_dicts(source, size)
    raise ManifestError([f"expected {EXPECTED}; got {type(source).__name__}"])


def cell(value: Any) -> Any:
    """Return a value as a cell: text as it is, numbers and dates as text, "" for what is missing; other objects stay.

    Examples
    --------
    >>> [cell(value) for value in (" a ", 1, np.float32(0.5), float("nan"), None, b"bytes")]
    ['a', '1', '0.5', '', '', b'bytes']
    """
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, np.generic) or (getattr(value, "shape", None) == () and hasattr(value, "item")):
        value = value.item()
    if isinstance(value, float):
        return repr(value) if value == value else ""
    if isinstance(value, bool | int | os.PathLike) or type(value).__module__ in ("datetime", "decimal", "uuid"):
        return str(value)
    if type(value).__name__ in ("NAType", "NaTType"):
        return ""
    return str(value) if hasattr(value, "isoformat") else value


def _named(manifest: Manifest, columns: Mapping[str, str]) -> Manifest:
    """Give the columns of ids, labels, groups and splits their names, and rows without an id one."""
    cells = dict(manifest.cells)
    aliases = dict(manifest.aliases)
    for role, column in columns.items():
        if column != role and column in cells:
            cells[role] = cells.pop(column)
            aliases[role] = column
    if numbered := "id" not in cells:
        cells["id"] = list(map(str, manifest.lines))
    return dataclasses.replace(manifest, cells=cells, aliases=aliases, numbered=numbered or manifest.numbered)


# Files ---------------------------------------------------------------------------------------------------------------


def _from_csv(path: Path, size: int | None) -> Iterator[Manifest]:
    try:
        with io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = [name.strip() for name in _next(reader, path) or []]
            if len(set(columns)) < len(columns):
                raise ManifestError([f"{path.name}:1: a column name occurs twice: {', '.join(columns)}"])
            while True:
                rows, lines, problems = _csv_rows(reader, path, len(columns), size)
                if problems:
                    raise ManifestError(problems)
                if not rows:
                    return
                cells = {name: [row[k] for row in rows] for k, name in enumerate(columns)}
                yield Manifest(path.name, path.parent, cells, lines, path)
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError([f"{path}: {error}"]) from None


def _csv_rows(reader: Any, path: Path, width: int, size: int | None) -> tuple[list[list[str]], list[int], list[str]]:
    """Return up to `size` rows with their lines, and a problem for each that has another width."""
    rows: list[list[str]] = []
    lines: list[int] = []
    problems: list[str] = []
    while size is None or len(rows) < size:
        try:
            cells = _next(reader, path)
        except ManifestError as error:
            problems += error.problems
            break
        if cells is None:
            break
        if len(cells) == width:
            rows.append([text.strip() for text in cells])
            lines.append(reader.line_num)
        elif cells:
            problems.append(f"{path.name}:{reader.line_num}: expected {width} cells, got {len(cells)}")
    return rows, lines, problems


def _next(reader: Any, path: Path) -> list[str] | None:
    """Return the next line's cells, or None; the limit of a cell's length is the process's, and put back."""
    before = csv.field_size_limit(LONGEST)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ManifestError([f"{path.name}:{reader.line_num}: {error}"]) from None
    finally:
        csv.field_size_limit(before)


def _from_jsonl(path: Path, size: int | None) -> Iterator[Manifest]:
    def rows(problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        # Only "\n" ends a line: U+2028 and the like are part of a text.
        with io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    problems.append(f"{path.name}:{number}: {error}")
                    continue
                if not isinstance(row, dict) or not all(map(_plain, row.values())):
                    problems.append(
                        f"{path.name}:{number}: expected an object of strings, numbers and lists of numbers"
                    )
                    continue
                yield number, row

    problems: list[str] = []
    names: dict[Any, None] = {}
    try:
        found = rows(problems)
        while chunk := list(itertools.islice(found, size)):
            if problems:
                break
            lines, given = zip(*chunk, strict=True)
            yield Manifest(path.name, path.parent, _transposed(given, names), list(lines), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError([f"{path}: {error}"]) from None
    if problems:
        raise ManifestError(problems)


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, int | float) for v in value)
    return not isinstance(value, dict)


def _transposed(rows: Sequence[Mapping[Any, Any]], names: dict[Any, None]) -> dict[str, list[Any]]:
    """Return the cells of rows by column; what a row lacks is missing. `names` collects the columns of all parts so far."""
    names |= dict.fromkeys(key for row in rows for key in row)
    return {str(name): [cell(row.get(name)) for row in rows] for name in names}


# Tables in memory ----------------------------------------------------------------------------------------------------

Take = Callable[[Any, int, int], list[Any]]  # the values of a column from a row to a row


def _from_table(name: str, columns: Sequence[Any], count: int, take: Take, size: int | None) -> Iterator[Manifest]:
    step = size or max(1, count)
    for start in range(0, count, step):
        stop = min(start + step, count)
        cells = {str(c): [cell(value) for value in take(c, start, stop)] for c in columns}
        yield Manifest(name, Path(), cells, range(start, stop))


def _pandas(frame: Any) -> Take:
    def take(name: Any, start: int, stop: int) -> list[Any]:
        series = frame[name].iloc[start:stop]
        missing = series.isna().tolist()
        return [None if gone else value for value, gone in zip(series.tolist(), missing, strict=True)]

    return take


def _polars(frame: Any) -> Take:
    return lambda name, start, stop: frame.get_column(name).slice(start, stop - start).to_list()


def _from_dicts(rows: Iterable[Any], size: int | None) -> Iterator[Manifest]:
    name, start, left = _name(rows), 0, iter(rows)
    names: dict[Any, None] = {}
    while chunk := list(itertools.islice(left, size)):
        for number, row in enumerate(chunk, start):
            if not isinstance(row, Mapping):
                raise ManifestError([f"{name}, row {number}: expected a dict, got {type(row).__name__}"])
        yield Manifest(name, Path(), _transposed(chunk, names), range(start, start + len(chunk)))
        start += len(chunk)


# Hugging Face --------------------------------------------------------------------------------------------------------


class Lazy(Sequence[Any]):
    """A column of a `datasets.Dataset` whose cells are read when they are asked for: files, bytes, arrays."""

    def __init__(self, table: Any, name: str, rows: np.ndarray, present: np.ndarray) -> None:
        self.table = table
        self.name = name
        self.rows = rows
        self.present = present  # of each row, whether it has the item

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        return cell(self.table[int(self.rows[row])][self.name]) if self.present[row] else ""

    def take(self, rows: Any) -> Lazy:
        """Return some of the cells, as lazy as all."""
        return Lazy(self.table, self.name, self.rows[rows], self.present[rows])


def _from_dataset(dataset: Any, size: int | None) -> Iterator[Manifest]:
    """Leave files undecoded, name the classes, and read all columns but plain values when they are asked for."""
    features = dict(dataset.features)
    dataset = dataset.with_format(None)
    for name, feature in features.items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(name, dataclasses.replace(feature, decode=False))
    step = size or max(1, len(dataset))
    for start in range(0, len(dataset), step):
        rows = range(start, min(start + step, len(dataset)))
        cells: dict[str, Sequence[Any]] = {}
        for name, feature in features.items():
            column = dataset.select_columns([name])
            names = getattr(feature, "names", None)
            if type(feature).__name__ not in ("Value", "ClassLabel") or feature.dtype == "binary":
                arrow = column.with_format("arrow")[rows.start : rows.stop].column(name)
                cells[name] = Lazy(column, name, np.arange(rows.start, rows.stop), np.array(arrow.is_valid()))
            else:
                values = column[rows.start : rows.stop][name]
                if names is not None:  # -1 is a label that is not known
                    values = [None if v is None or v < 0 else names[v] for v in values]
                cells[name] = list(map(cell, values))
        yield Manifest(type(dataset).__name__, Path(), cells, rows)
