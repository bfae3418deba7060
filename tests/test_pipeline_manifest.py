"""`fusionsum.pipeline.manifest`: CSV and JSONL, every check with its line and column, splits by group.

What lives elsewhere: files that cannot be read (``test_pipeline_preprocess.py``).
"""

from __future__ import annotations

import json

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    from fusionsum.pipeline import ManifestError, manifest, sources
    from fusionsum.pipeline.config import from_mapping
except ModuleNotFoundError as error:
    missing(str(error))

HEADER = "id,split,label,group,words\n"
WORDS = {"modalities": {"words": {"kind": "text"}}, "data": {"split": "manifest"}}


def check(read, given=WORDS, labelled=True):
    config = from_mapping(given)
    splits = config.data.splits if labelled else None
    return manifest.check(read, config.columns, config.task, splits, labelled, training=labelled)


def checked(tmp_path, text, given=WORDS, name="m.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    read = sources.read(path)
    check(read, given)
    return read


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no rows"),
        (HEADER, "has no rows"),
        ("id,id\n1,2\n", "m.csv:1: a column name occurs twice"),
        (HEADER + "a,train,x,,w,extra\n", "m.csv:2: expected 5 cells, got 6"),
        (HEADER + 'a,train,x,,"w\n', "m.csv:2: "),
        ("id,splt,label,words\na,train,x,w\n", "m.csv: unknown column 'split'; did you mean 'splt'?"),
        ("id,split,label,word\na,train,x,w\n", "m.csv: unknown column 'words'; did you mean 'word'?"),
        (HEADER + ",train,x,,w\n", "m.csv:2, column 'id': is empty"),
        (HEADER + "a,train,x,,w\n\na,train,x,,w\n", "m.csv:4, column 'id': 'a' is that of line 2 too"),
        (HEADER + "a,train,x,,\n", "m.csv:2, column 'words': all modalities are missing"),
        (HEADER + "a,train,,,w\n", "m.csv:2, column 'label': is empty"),
        (HEADER + "a,train,NaN,,w\n", "m.csv:2, column 'label': is NaN"),
        (HEADER + "a,trian,x,,w\n", "m.csv:2, column 'split': unknown split 'trian'; did you mean 'train'?"),
        (HEADER + "a,test,x,,w\n", "m.csv, column 'split': no row is 'train'"),
        (
            HEADER + "a,train,x,g,w\nb,train,x,g,w\nc,test,x,g,w\n",
            "m.csv, column 'group': 'g' straddles splits: train (line 2), test (line 4)",
        ),
    ],
)
def test_a_bad_row_is_named_by_line_and_column(tmp_path, text, message):
    with pytest.raises(ManifestError) as raised:
        checked(tmp_path, text)
    assert message in str(raised.value)


@pytest.mark.parametrize("label", ["nan", "inf", "-inf", "1e39", "-1e300", "1e400", "tall"])
def test_regression_needs_finite_numbers(tmp_path, label):
    given = WORDS | {"task": {"kind": "regression"}}
    with pytest.raises(ManifestError, match=r"^m\.csv:3, column 'label': (is NaN|expected a finite number)") as raised:
        checked(tmp_path, f"{HEADER}a,train,1e-3,,w\nb,train,{label},,w\nc,train,-3e38,,w\n", given)
    assert len(raised.value.problems) == 1
    if label == "tall":
        return
    rows = [{"split": "train", "label": value, "words": "w"} for value in (1e-3, float(label), -3e38)]
    with pytest.raises(ManifestError, match=r"^list, row 1, column 'label': (is empty|expected a finite number)"):
        check(sources.read(rows), given)


def test_retrieval_needs_both_sides_but_no_label(tmp_path):
    given = {
        "modalities": {"words": {"kind": "text"}, "others": {"kind": "text"}},
        "task": {"kind": "retrieval", "target": ["others"]},
        "data": {"split": "manifest"},
    }
    header = "id,split,words,others\n"
    checked(tmp_path, f"{header}a,train,w,o\n", given)
    with pytest.raises(ManifestError, match=r"m\.csv:2, column 'others': the target is missing"):
        checked(tmp_path, f"{header}a,train,w,\n", given)
    with pytest.raises(ManifestError, match=r"m\.csv:2, column 'words': all modalities are missing"):
        checked(tmp_path, f"{header}a,train,,o\n", given)


def test_all_problems_are_counted_and_the_first_shown(tmp_path):
    with pytest.raises(ManifestError) as raised:
        checked(tmp_path, HEADER + "".join(f"{i},train,,,w\n" for i in range(100)))
    assert len(raised.value.problems) == 100
    assert str(raised.value).endswith("... and 80 more")


def test_rows_to_predict_need_neither_label_nor_split(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("id,words\na,w\n", encoding="utf-8")
    check(sources.read(path), labelled=False)
    with pytest.raises(ManifestError):
        check(sources.read(path))


def test_jsonl_and_csv_hold_the_same(tmp_path):
    given = made_up.rows(tmp_path, 6)
    made_up.write(tmp_path / "m.csv", given)
    lines = [json.dumps({k: float(v) if k == "width" else v or None for k, v in row.items()}) for row in given]
    (tmp_path / "m.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    one, other = sources.read(tmp_path / "m.csv"), sources.read(tmp_path / "m.jsonl")
    assert one.cells == other.cells
    assert (one.lines, other.lines) == ([2, 3, 4, 5, 6, 7], [1, 3, 5, 7, 9, 11])


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_only_ends_of_lines_end_a_row(tmp_path, name):
    words = "one\u2028two\x85three\x1cfour"
    row = {"id": "a", "split": "train", "label": "x", "words": words}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    if name == "m.csv":
        text = ",".join(row) + "\n" + ",".join(row.values()) + "\n"
    assert checked(tmp_path, text, name=name).column("words") == [words]


@pytest.mark.parametrize("line", ["{", "[1]", '{"id": ["a"]}', '{"id": {"a": 1}}', '{"id": []}', "[" * 100000])
def test_bad_lines_of_jsonl(tmp_path, line):
    with pytest.raises(ManifestError, match=r"m\.jsonl:2: "):
        checked(tmp_path, '{"id": "a"}\n' + line, name="m.jsonl")


def test_a_line_of_jsonl_without_a_split_is_named(tmp_path):
    lines = ['{"id": "a", "split": "train", "label": "x", "words": "w"}', '{"id": "b", "label": "x", "words": "w"}']
    with pytest.raises(ManifestError, match=r"m\.jsonl:2, column 'split': unknown split ''"):
        checked(tmp_path, "\n".join(lines), name="m.jsonl")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"none\.csv"):
        sources.read(tmp_path / "none.csv")


def test_splits_of_the_manifest(tmp_path):
    text = HEADER + "a,train,x,,w\nb,test,x,,w\nc,train,x,,w\nd,validation,x,,w\n"
    parts = manifest.splits(checked(tmp_path, text), from_mapping(WORDS).data, seed=0)
    assert {name: part.tolist() for name, part in parts.items()} == {"train": [0, 2], "validation": [3], "test": [1]}


def test_splits_by_seed_keep_groups_together_and_have_their_shares(tmp_path):
    groups = np.random.default_rng(0).integers(60, size=400)
    rows = [f"{i},,x,{'' if g < 5 else g},w\n" for i, g in enumerate(groups)]
    given = WORDS | {"data": {"split": "by-seed", "test_share": 0.25, "validation_share": 0.1}}
    read, data = checked(tmp_path, HEADER + "".join(rows), given), from_mapping(given).data
    parts = manifest.splits(read, data, seed=0)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(400))
    assert abs(len(parts["test"]) - 100) <= 2
    assert abs(len(parts["validation"]) - 40) <= 2
    held = [{g for g in groups[part] if g >= 5} for part in parts.values()]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    again, other = manifest.splits(read, data, seed=0), manifest.splits(read, data, seed=1)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)
    assert not np.array_equal(parts["test"], other["test"])
