"""`fusionsum.pipeline.items`: what a page shows of a row; as part of pages in ``test_pipeline_retrieve.py``."""

from __future__ import annotations

import made_up
from conftest import missing

try:
    from fusionsum.pipeline import items
    from fusionsum.pipeline.config import from_mapping
    from fusionsum.pipeline.sources import read
except ModuleNotFoundError as error:
    missing(str(error))


def test_every_kind_that_a_row_has_is_shown(tmp_path):
    manifest = read(made_up.folder(tmp_path) / "classification.csv")
    config = from_mapping(made_up.config(tmp_path))
    shown = items.shown(config, manifest, 1, list(config.modalities))
    assert shown["id"] == "row1"
    assert [(kind, name) for kind, name, _ in shown["parts"]] == [
        ("image", "image"),
        ("text", "text"),
        ("audio", "sound"),
        ("table", "size"),
    ]
    assert [name for _, name, _ in items.shown(config, manifest, 0, list(config.modalities))["parts"]] == [
        "image",
        "size",
    ]


def test_a_long_text_is_cut(tmp_path):
    rows = [row | {"text": "x" * 5000} for row in made_up.rows(tmp_path, 2)]
    manifest = read(made_up.write(tmp_path / "m.csv", rows))
    ((_, _, text),) = items.shown(from_mapping(made_up.config(tmp_path)), manifest, 0, ["text"])["parts"]
    assert len(text) == items.LONGEST + 1 and text.endswith("…")
