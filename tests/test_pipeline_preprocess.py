"""`fusionsum.pipeline.preprocess`: messages for bad files and cells, the cache by content, columns.

What lives elsewhere: how each kind decodes (``test_pipeline_kinds.py``); the checks that open no file
(``test_pipeline_manifest.py``).
"""

from __future__ import annotations

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import torch
    from PIL import Image

    from fusionsum.pipeline import ManifestError, kinds, manifest, preprocess
    from fusionsum.pipeline.kinds import KINDS
except ModuleNotFoundError as error:
    missing(str(error))


BAD = {
    "image": [(b"", "cannot identify"), (b"no picture", "cannot identify"), ("cut", "truncated")],
    "audio": [(b"", "rror"), (b"no sound", "rror"), ("silence", "holds no sound"), ("nan", "not finite")],
}


@pytest.mark.parametrize("kind, content, message", [(k, c, m) for k, cases in BAD.items() for c, m in cases])
def test_a_bad_file_is_named_with_its_row_and_column(tmp_path, kind, content, message):
    noise = np.random.default_rng(0).integers(255, size=(50, 50, 3), dtype=np.uint8)
    made = {
        "cut": lambda: made_up.png(Image.fromarray(noise))[:3000],
        "silence": lambda: made_up.wav(np.zeros(0), 8000),
        "nan": lambda: made_up.wav(np.full(100, np.nan), 8000),
    }
    (tmp_path / "bad").write_bytes(made[content]() if isinstance(content, str) else content)
    problem, message_of = gathered(tmp_path, kind, "bad")
    assert problem.row == 1
    assert message in problem.reason
    assert message_of.startswith("m.csv:3, column 'x': 'bad': ")


@pytest.mark.parametrize(
    "kind, cell, message",
    [
        ("image", "none.png", "no such file: none.png"),
        ("audio", "none.wav", "no such file: none.wav"),
        ("image", "../", "directory"),
        ("text", "\u200b", "is empty once normalised"),
        ("table", "tall", "could not convert"),
        ("table", "nan", "expected finite numbers"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, kind, cell, message):
    problem, _ = gathered(tmp_path, kind, cell)
    assert message in problem.reason


def gathered(tmp_path, kind, cell):
    """Gather a row of nothing and a row of one bad cell; return the one problem and its message."""
    made_up.write(tmp_path / "m.csv", [{"id": "a", "x": ""}, {"id": "b", "x": cell}])
    read = manifest.read(tmp_path / "m.csv")
    cache = preprocess.Cache(tmp_path / "cache")
    items, (problem,) = preprocess.gather(read, "x", KINDS[kind](), cache, progress=False)
    assert items.index.tolist() == [-1, -1] and not items.distinct
    left, kept, messages = preprocess.without(read, [problem], "skip")
    assert kept.tolist() == [0] and left.lines == [2]
    with pytest.raises(ManifestError) as raised:
        preprocess.without(read, [problem], "raise")
    assert str(raised.value) == messages[0]
    return problem, messages[0]


def test_numbers_of_which_some_are_missing(tmp_path):
    made_up.write(tmp_path / "m.csv", [{"id": "a", "x": "1", "y": ""}, {"id": "b", "x": "", "y": ""}])
    table = kinds.Table(columns=("x", "y"))
    cache = preprocess.Cache(tmp_path / "cache")
    _, (problem,) = preprocess.gather(manifest.read(tmp_path / "m.csv"), "t", table, cache, progress=False)
    assert (problem.row, problem.column) == (0, "x, y")
    assert "some are missing" in problem.reason


def test_skipping_every_row_is_an_error_all_the_same(tmp_path):
    made_up.write(tmp_path / "m.csv", [{"id": "a", "x": "none.png"}])
    read = manifest.read(tmp_path / "m.csv")
    with pytest.raises(ManifestError):
        preprocess.without(read, [preprocess.Problem(0, "x", "why")], "skip")


def test_each_content_is_decoded_once_and_never_again(tmp_path, monkeypatch):
    rows = made_up.rows(tmp_path, 6)
    (tmp_path / "5.png").write_bytes((tmp_path / "2.png").read_bytes())
    rows.append(rows[0] | {"id": "twin"})
    read = manifest.read(made_up.write(tmp_path / "m.csv", rows))
    decoded = []
    real = kinds.Image.decode
    monkeypatch.setattr(kinds.Image, "decode", lambda self, content: decoded.append(1) or real(self, content))

    def gather(size):
        cache = preprocess.Cache(tmp_path / "cache")
        items, problems = preprocess.gather(read, "image", kinds.Image(size=size), cache, workers=3, progress=False)
        assert not problems
        return items

    first = gather(8)
    assert first.index.tolist() == [0, 1, 2, 3, 4, 2, 0]
    assert len(decoded) == 6  # the twins of a chunk are decoded, and kept once
    second = gather(8)
    assert len(decoded) == 6
    assert all(np.array_equal(a, b) for a, b in zip(first.distinct, second.distinct, strict=True))
    gather(16)
    assert len(decoded) == 12
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert gather(8).index.tolist() == [0, 0, 1, 2, 3, 1, 0]
    assert len(decoded) == 12
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_columns_mark_missing_items():
    table = kinds.Table()
    items = preprocess.Items([np.array([1.0]), np.array([3.0])], np.array([1, -1, 0]))
    assert [item.item() for item in items.of(np.array([0, 1]))] == [3.0]
    fitted = preprocess.fit("t", table, items.distinct)
    values, present = preprocess.column(table, items, fitted).batch(torch.tensor([2, 1, 0]))
    assert present.tolist() == [True, False, True]
    assert values[present].flatten().tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="modality 't': no training row has it"):
        preprocess.fit("t", table, [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_without_any_item_has_the_shape_all_the_same(kind):
    modality = KINDS[kind]()
    none = preprocess.Items([], np.array([-1, -1]))
    values, present = preprocess.column(modality, none, {"shape": [3, 2]}).batch(torch.tensor([0, 1]))
    assert values.shape == (2, 3, 2) and values.dtype == modality.dtype
    assert not present.any()
