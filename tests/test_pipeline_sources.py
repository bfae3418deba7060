"""`fusionsum.pipeline.sources`: DataFrames, data sets and dicts hold what a file holds; batches; what is refused.

What lives elsewhere: the lines of CSV and JSONL files (``test_pipeline_manifest.py``).
"""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest

from conftest import missing

try:
    from fusionsum.pipeline import ManifestError, sources
except ModuleNotFoundError as error:
    missing(str(error))

ROWS = [{"id": f"r{i}", "word": f"word {i}", "size": None if i == 2 else i + 0.5} for i in range(5)]
CELLS = {
    "id": [f"r{i}" for i in range(5)],
    "word": [f"word {i}" for i in range(5)],
    "size": ["0.5", "1.5", "", "3.5", "4.5"],
}


def made(kind, tmp_path):
    if kind in ("list", "iterator"):
        return ROWS if kind == "list" else iter(ROWS)
    if kind == "csv":
        path = tmp_path / "m.csv"
        path.write_text("\n".join(map(",".join, [CELLS, *zip(*CELLS.values(), strict=True)])), encoding="utf-8")
        return path
    if kind == "jsonl":
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
        return tmp_path / "m.jsonl"
    package = pytest.importorskip(kind)
    return package.Dataset.from_list(ROWS) if kind == "datasets" else package.DataFrame(ROWS)


KINDS = ["csv", "jsonl", "list", "iterator", "pandas", "polars", "datasets"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_holds_the_same(kind, tmp_path):
    read = sources.read(made(kind, tmp_path))
    assert {name: list(cells) for name, cells in read.cells.items()} == CELLS
    parts = list(sources.batches(made(kind, tmp_path), 2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [cell for part in parts for cell in part.column("size")] == CELLS["size"]
    assert [line for part in parts for line in part.lines] == list(read.lines)


def test_columns_of_other_names_and_rows_without_an_id():
    read = sources.read([{"price": 1, "word": "a"}, {"word": "b"}], {"label": "price"})
    assert read.column("label") == ["1", ""] and read.column("id") == ["0", "1"]
    assert read.where(1, "label") == "list, row 1, column 'price'"


@pytest.mark.parametrize("kind", ["jsonl", "iterator"])
def test_a_column_that_was_there_once_is_there_in_all_later_parts(kind, tmp_path, monkeypatch):
    rows = [{"id": "a", "word": "x"}, {"id": "b"}, {"size": 1}, {"id": "d"}]
    monkeypatch.setitem(globals(), "ROWS", rows)
    parts = list(sources.batches(made(kind, tmp_path), 1))
    assert [part.columns for part in parts] == [("id", "word")] * 2 + [("id", "word", "size")] * 2
    assert [cell for part in parts for cell in part.column("word")] == ["x", "", "", ""]


def test_objects_in_memory_stay(tmp_path):
    array = np.zeros((2, 3))
    (cell,) = sources.read([{"x": array}]).column("x")
    assert cell is array


def test_long_texts_are_read_and_the_process_keeps_its_limit(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "m.csv").write_text(f"id,x\na,{'y' * 200_000}\n")
    assert len(sources.read(tmp_path / "m.csv").column("x")[0]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("source", [3, {"a": [1]}, b"m.csv", [], [3]])
def test_what_holds_no_rows_is_refused(source):
    with pytest.raises(ManifestError):
        sources.read(source)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = {"fifo": tmp_path / "f.csv", "device": "/dev/zero", "folder": tmp_path}[kind]
    if kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(ManifestError, match=r"regular file|irectory"):
        sources.read(path)
