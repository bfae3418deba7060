"""`fusionsum.pipeline.infer`: the task that labels are for.

What lives elsewhere: a configuration that is all inferred, and trained with (``test_main.py``).
"""

from __future__ import annotations

import pytest

from conftest import missing

try:
    from fusionsum.pipeline import ManifestError, infer, sources
    from fusionsum.pipeline.config import Config, Task
except ModuleNotFoundError as error:
    missing(str(error))


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
