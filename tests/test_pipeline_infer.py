"""`fusionsum.pipeline.infer`: the kinds of columns, what is left out and why, what a configuration says, splits and task.

What lives elsewhere: reading the items (``test_pipeline_preprocess.py``), sources of rows (``test_pipeline_sources.py``), a
configuration that is all inferred, and trained with (``test_main.py``).
"""

from __future__ import annotations

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import torch
    from PIL import Image

    from fusionsum.pipeline import ConfigError, ManifestError, infer, sources
    from fusionsum.pipeline.config import Config, Task, from_mapping
except ModuleNotFoundError as error:
    missing(str(error))

COUNT = 60
PICTURE = Image.new("RGB", (3, 2))
SOUND = np.zeros(100, dtype=np.float32)
COLUMNS = {  # by what is said of the column: a cell, or a function of the row's number
    "is image": {
        "files of pictures": lambda i: f"folder/{i}.{'JPG' if i % 2 else 'png'}",
        "pictures": PICTURE,
        "bytes of pictures": made_up.png(PICTURE),
        "pictures of a data set": {"bytes": made_up.png(PICTURE), "path": None},
        "pictures too large to open": b"P4 20000 20000\n",
        "arrays of pixels": np.zeros((2, 3, 3), dtype=np.uint8),
        "tensors of pixels": torch.zeros(3, 2, 4),
    },
    "is audio": {
        "files of sounds": lambda i: f"{i}.{'wav' if i % 2 else 'Flac'}",
        "bytes of sounds": made_up.wav(SOUND, 8000),
        "sounds of a data set": {"path": None, "array": SOUND, "sampling_rate": 8000},
        "sounds and rates": (SOUND, 8000),
    },
    "is vector": {
        "files of arrays": lambda i: f"{i}.npy",
        "arrays": np.arange(3.0),
        "tensors": torch.zeros(5),
        "lists": [1.0, 2.0],
        "lists in JSON": lambda i: f"[{i}, 2.5]",
    },
    "is text": {
        "sentences": lambda i: f"a sentence of number {i}",
        "different words": lambda i: f"word{i}",
        "long texts that are repeated": lambda i: "of more than three words" if i % 2 else "as many words as this",
        "files of both kinds": lambda i: f"{i}.{'png' if i % 2 else 'wav'}",
    },
    "is a number": {
        "numbers": lambda i: i / 7,
        "numbers with gaps": lambda i: None if i % 3 == 0 else i % 4,
        "numbers and mistakes": lambda i: "tall" if i % 3 == 0 else f"{i * i}",
    },
    "is a category": {"categories": lambda i: ["red", "green", "dark blue"][i % 3]},
    "is left out: it is empty": {"nothing": None, "gaps": lambda i: " "},
    "is left out: always 'same'": {"constants": "same"},
    "is left out: it numbers the rows": {"numbers of rows": lambda i: i + 1},
    "is left out: it holds neither pictures nor sounds": {"bytes": b"bytes"},
    "is left out: expected numbers, got dict of object": {"dicts": {"a": 1}},
}


def rows(columns):
    return [
        {"id": f"r{i}", "label": i % 2, "group": i, "split": "train"} | {c: made(f, i) for c, f in columns}
        for i in range(COUNT)
    ]


def made(cell, i):
    return cell(i) if callable(cell) else cell


def completed(columns, given=None):
    return infer.complete(from_mapping(given or {}), sources.read(rows(columns)))


CASES = [(said, column) for said, columns in COLUMNS.items() for column in columns]


@pytest.mark.parametrize(
    "said, column, gap",
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES if "left out" not in case[0]],
)
def test_the_kind_of_a_column(said, column, gap):
    """Whether or not the first rows have it."""
    cell = COLUMNS[said][column]
    given = [("other", lambda i: f"a text of number {i}"), (column, lambda i: None if gap and i < 5 else made(cell, i))]
    config, notes = completed(given)
    assert f"column {column!r} {said}" in notes and len(notes) == 2
    name, kind = column.replace(" ", "_"), said.removeprefix("is ")
    if kind in ("a number", "a category"):
        name, kind = "table", "table"
        assert config.modalities[name].categories == ((column,) if said == "is a category" else ())
    assert list(config.modalities) == ["other"] + [name] * (not said.startswith("is left out"))
    if name in config.modalities:
        assert config.modalities[name].kind == kind and config.columns[name] == (column,)


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_columns_of_a_frame(package):
    wanted = {
        "sentences": "is text",
        "numbers with gaps": "is a number",
        "categories": "is a category",
    }
    columns = [(column, COLUMNS[said][column]) for column, said in wanted.items()]
    frame = pytest.importorskip(package).DataFrame(rows(columns))
    config, notes = infer.complete(from_mapping({}), sources.read(frame))
    assert notes == [f"column {column!r} {said}" for column, said in wanted.items()]
    assert config.columns == {"sentences": ("sentences",), "table": ("numbers with gaps", "categories")}
    assert config.modalities["table"].categories == ("categories",)


def test_what_a_configuration_says_is_left_as_it_is():
    columns = [
        ("digits", lambda i: i * i),
        ("colour", COLUMNS["is a category"]["categories"]),
        ("size", lambda i: i / 7),
    ]
    modalities = {"digits": {"kind": "text", "length": 5}, "looks": {"kind": "table", "columns": ["colour", "size"]}}
    config, notes = completed(columns, {"modalities": modalities})
    assert config.modalities["digits"] == from_mapping({"modalities": modalities}).modalities["digits"]
    assert config.modalities["looks"].categories == ("colour",)
    assert notes == ["column 'colour' is a category (modalities.looks.categories)"]
    modalities["looks"]["categories"] = ["size"]
    config, notes = completed(columns, {"modalities": modalities})
    assert config.modalities["looks"].categories == ("size",) and not notes


def test_names_that_no_module_can_have():
    config, _ = completed(
        [("2 words", lambda i: f"text {i}"), ("table", lambda i: f"text {i}"), ("size", lambda i: i / 7)]
    )
    assert config.columns == {"_2_words": ("2 words",), "table": ("table",), "table_": ("size",)}


def test_no_column_can_be_a_modality():
    with pytest.raises(
        ConfigError, match="none is given, and no column can be one\ncolumn 'x' is left out: always 'same'"
    ):
        completed([("x", "same")])


TEXT = from_mapping({"modalities": {"text": {"kind": "text"}}})


@pytest.mark.parametrize(
    "column, split, note",
    [("split", "manifest", []), ("x", "by-seed", ["no column 'split': each seed draws its own (data.split: by-seed)"])],
)
def test_splits_are_the_columns_if_there_is_one(column, split, note):
    config, notes = infer.complete(TEXT, sources.read([{"text": "a", column: "train"}]))
    assert (config.data.split, notes) == (split, note)


def test_a_column_that_is_nearly_called_split_is_an_error():
    with pytest.raises(
        ManifestError, match=r"^list: has no column 'split', but 'splt': rename it, or set data\.split: "
    ):
        infer.complete(TEXT, sources.read([{"text": "a", "splt": "train"}]))


def inferred(rows):
    read = sources.read(rows)
    return infer.task(infer.complete(Config(), read)[0], read)


@pytest.mark.parametrize(
    "label, kind",
    [
        (lambda i: "ab"[i % 2], "classification"),
        (lambda i: i % 5, "classification"),  # few numbers, each of them often
        (lambda i: i / 7, "regression"),
        (lambda i: i % 30, "regression"),
        (lambda i: "" if i % 2 else i / 7, "regression"),  # some are missing, which training says
        (lambda i: "a|b" if i % 3 else "b", "multilabel"),
        (lambda i: ["a", "b"], "multilabel"),
        (lambda i: "", "classification"),
    ],
)
def test_the_task_that_labels_are_for(label, kind):
    task, note = inferred([{"words": f"some words {i}", "label": label(i)} for i in range(60)])
    assert task == Task(kind) and kind in note


def test_without_labels_text_is_to_be_found():
    rows = [{"a": f"some words {i}", "b": f"other words {i}", "size": i / 7} for i in range(60)]
    task, note = inferred(rows)
    assert task == Task("retrieval", ("b",)) and "no column 'label': b is to be found" in note
    assert inferred([{"x": f"{i}.png", "size": row["size"]} for i, row in enumerate(rows)])[0].target == ("table",)
    rows[7]["b"] = ""  # then it can be asked with only
    assert inferred(rows)[0].target == ("a",)
    with pytest.raises(ManifestError, match="unknown column 'label'; did you mean 'labels'"):
        inferred([{"labels": row["a"]} for row in rows])
