"""`fusionsum.pipeline.preprocess`: messages for bad files and cells, the cache by content, columns.

What lives elsewhere: how each kind decodes (``test_pipeline_kinds.py``); the checks that open no file
(``test_pipeline_manifest.py``).
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import soundfile
    import torch
    from PIL import Image

    from fusionsum.pipeline import ManifestError, files, kinds, preprocess, sources
    from fusionsum.pipeline.cache import Cache
    from fusionsum.pipeline.config import from_mapping
    from fusionsum.pipeline.kinds import KINDS
except ModuleNotFoundError as error:
    missing(str(error))


BAD = {
    "image": [
        (b"", "is no picture"),
        (b"P4 20000 20000\n", "400000000 pixels) exceeds limit of 178956970"),
        (b"no picture", "is no picture"),
        ("cut", "truncated"),
    ],
    "audio": [
        (b"", "is no sound that libsndfile reads: "),
        (b"no sound", "is no sound that libsndfile reads: "),
        ("silence", "holds no sound"),
        ("nan", "not finite"),
        ("half", "is cut short: 156 of 400 bytes of sound"),
        ("half a flac", "is no sound that libsndfile reads: "),
    ],
}


@pytest.mark.parametrize("kind, content, message", [(k, c, m) for k, cases in BAD.items() for c, m in cases])
def test_a_bad_file_is_named_with_its_row_and_column(tmp_path, kind, content, message):
    noise = np.random.default_rng(0).integers(255, size=(50, 50, 3), dtype=np.uint8)
    made = {
        "cut": lambda: made_up.png(Image.fromarray(noise))[:3000],
        "silence": lambda: made_up.wav(np.zeros(0), 8000),
        "nan": lambda: made_up.wav(np.full(100, np.nan), 8000),
        "half": lambda: made_up.wav(np.ones(100), 8000)[:-244],
        "half a flac": lambda: made_up.flac(np.random.default_rng(0).uniform(-1, 1, 9000), 8000)[:9000],
    }
    (tmp_path / "bad").write_bytes(made[content]() if isinstance(content, str) else content)
    problem, message_of = gathered(tmp_path, kind, "bad")
    assert problem.row == 1
    assert message in problem.reason
    assert message_of.startswith("m.csv:3, column 'x': 'bad': ") and "object at" not in message_of


@pytest.mark.parametrize(
    "kind, cell, message",
    [
        ("image", "none.png", "no such file: none.png"),
        ("audio", "none.wav", "no such file: none.wav"),
        ("image", "../", "irectory"),
        ("text", "\u200b", "is empty once normalised"),
        ("table", "tall", "column 'x': expected a finite number, got 'tall'"),
        ("table", "nan", "expected a finite number, got 'nan'"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, kind, cell, message):
    problem, _ = gathered(tmp_path, kind, cell)
    assert message in problem.reason


@pytest.mark.parametrize("kind", ["image", "audio", "vector"])
@pytest.mark.parametrize(
    "name, message",
    [
        ("fifo", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("folder", "irectory"),
        ("large", "is larger than 512 MiB"),
        ("\0", "embedded null byte"),
    ],
)
def test_only_regular_files_of_some_size_are_read(tmp_path, kind, name, message):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(files.MOST + 1)
    problem, _ = gathered(tmp_path, kind, name)
    assert message in problem.reason and repr(name) in problem.reason


def gathered(tmp_path, kind, cell):
    """Gather a row of nothing and a row of one bad cell; return the one problem and its message."""
    made_up.write(tmp_path / "m.csv", [{"id": "a", "x": ""}, {"id": "b", "x": cell}])
    read = sources.read(tmp_path / "m.csv")
    modality = from_mapping({"modalities": {"x": {"kind": kind}}}).modalities["x"]
    items, (problem,) = preprocess.gather(read, "x", modality, Cache(tmp_path / "cache"), progress=False)
    assert items.index.tolist() == [-1, -1] and not len(items.distinct)
    left, kept, messages = preprocess.without(read, [problem], "skip")
    assert kept.tolist() == [0] and left.lines == [2]
    with pytest.raises(ManifestError) as raised:
        preprocess.without(read, [problem], "raise")
    assert str(raised.value) == messages[0]
    return problem, messages[0]


def test_skipping_every_row_is_an_error_all_the_same(tmp_path):
    made_up.write(tmp_path / "m.csv", [{"id": "a", "x": "none.png"}])
    read = sources.read(tmp_path / "m.csv")
    with pytest.raises(ManifestError):
        preprocess.without(read, [preprocess.Problem(0, "x", "why")], "skip")


def test_each_content_is_decoded_once_and_never_again(tmp_path, monkeypatch):
    rows = made_up.rows(tmp_path, 6)
    (tmp_path / "5.png").write_bytes((tmp_path / "2.png").read_bytes())
    rows.append(rows[0] | {"id": "twin"})
    read = sources.read(made_up.write(tmp_path / "m.csv", rows))
    decoded = []
    real = kinds.Image.decode
    monkeypatch.setattr(kinds.Image, "decode", lambda self, content: decoded.append(1) or real(self, content))

    def gather(size):
        cache = Cache(tmp_path / "cache")
        items, problems = preprocess.gather(read, "image", kinds.Image(size=size), cache, workers=3, progress=False)
        assert not problems
        return items

    first = gather(8)
    assert first.index.tolist() == [0, 1, 2, 3, 4, 2, 0]
    assert len(decoded) == 5
    second = gather(8)
    assert len(decoded) == 5
    assert all(np.array_equal(a, b) for a, b in zip(first.distinct, second.distinct, strict=True))
    gather(16)
    assert len(decoded) == 10
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert gather(8).index.tolist() == [0, 0, 1, 2, 3, 1, 0]
    assert len(decoded) == 10
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_rows_as_hugging_face_holds_them_are_those_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # file names in memory are relative to the current folder
    row = made_up.rows(tmp_path, 2)[1]
    picture, sound = ((tmp_path / row[name]).read_bytes() for name in ("image", "sound"))
    samples, rate = soundfile.read(tmp_path / row["sound"], dtype="float32")
    array = {"path": None, "array": samples, "sampling_rate": rate}
    columns = {
        "image": [row["image"], {"bytes": picture, "path": None}, {"bytes": None, "path": row["image"]}, None],
        "sound": [row["sound"], {"bytes": sound, "path": "elsewhere.wav"}, array, None],
    }
    for name, cells in columns.items():
        read, modality = sources.read([{name: cell} for cell in cells]), config(name).modalities[name]
        items, problems = preprocess.gather(read, name, modality, Cache(tmp_path / "cache"), progress=False)
        assert not problems and [k >= 0 for k in items.index] == [True, True, True, False]
        assert all(np.array_equal(items.distinct[k], items.distinct[0]) for k in items.index[:3])


def config(*names, **data):
    return from_mapping({"modalities": {name: made_up.MODALITIES[name] for name in names}, "data": data})


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("size", [1, 5, 6, 12, 13])
def test_parts_of_the_rows_hold_what_all_hold(tmp_path, suffix, size):
    """A row that cannot be read included; a line of JSONL has only what its row has."""
    rows, path = made_up.rows(tmp_path, 12), tmp_path / f"m.{suffix}"
    (tmp_path / "7.png").write_bytes(b"broken")
    made_up.write(tmp_path / "m.csv", rows)
    lines = [json.dumps({name: cell for name, cell in row.items() if cell}) for row in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    given = config(*made_up.MODALITIES, cache=str(tmp_path / "cache"), on_error="skip")
    whole = preprocess.gather_rows(given, path, labelled=False, training=False, progress=False)
    parts = list(preprocess.stream_rows(given, path, size=size))
    assert [len(part.every) for part in parts] == [min(size, 12 - k) for k in range(0, 12, size)]
    assert [row for part in parts for row in by_row(part)] == by_row(whole) and len(by_row(whole)) == 11
    assert [message for part in parts for message in part.messages] == whole.messages and len(whole.messages) == 1


def test_items_that_memory_has_no_room_for_are_on_disk(tmp_path, monkeypatch):
    """The same items, and the same statistics of some of them; in a file that nobody sees."""
    path = made_up.write(tmp_path / "m.csv", made_up.rows(tmp_path, 12))
    given = config("image", "sound", cache=str(tmp_path / "cache"))
    whole = preprocess.gather_rows(given, path, labelled=False, training=False, progress=False)
    monkeypatch.setattr(preprocess.os, "sysconf", lambda name: 1)
    mapped = preprocess.gather_rows(given, path, labelled=False, training=False, progress=False)
    assert by_row(mapped) == by_row(whole)
    rows = np.arange(1, 9)
    for name, items in mapped.items.items():
        modality = given.modalities[name]
        wanted = preprocess.fit(name, modality, whole.items[name].of(rows))
        assert preprocess.fit(name, modality, items.of(rows)) == wanted
    assert os.listdir(tmp_path / "cache") == ["items.sqlite"]
    with pytest.raises(OSError):  # nor has the disk
        preprocess.ALONE.array((1 << 60,), np.uint8, tmp_path)
    assert not list(tmp_path.glob("items-*"))


def by_row(part):
    """Return the line, the id and the items of each usable row."""
    items = [[None if k < 0 else of.distinct[k].tolist() for k in of.index] for of in part.items.values()]
    return list(zip(part.manifest.lines, part.manifest.column("id"), *items, strict=True))


def test_columns_mark_missing_items():
    table = kinds.Vector()
    items = preprocess.Items(np.array([[1.0], [3.0]], dtype=np.float32), np.array([1, -1, 0]))
    assert [item.item() for item in items.of(np.array([0, 1]))] == [3.0]
    fitted = preprocess.fit("t", table, items.distinct)
    values, present = preprocess.column("t", table, items, fitted).batch(torch.tensor([2, 1, 0]))
    assert present.tolist() == [True, False, True]
    assert values[present].flatten().tolist() == [-1.0, 1.0]
    with pytest.raises(ManifestError, match="modality 't': no training row has it"):
        preprocess.fit("t", table, [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_without_any_item_has_the_shape_all_the_same(kind):
    modality = KINDS[kind]()
    none = preprocess.Items([], np.array([-1, -1]))
    values, present = preprocess.column("t", modality, none, {"shape": [3, 2]}).batch(torch.tensor([0, 1]))
    assert values.shape == (2, 3, 2) and values.dtype == modality.dtype
    assert not present.any()
