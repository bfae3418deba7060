"""`fusionsum.pipeline.retrieve`: what is found, against all scores written out; the table and the page.

What lives elsewhere: metrics of retrieval (``test_pipeline_evaluate.py``), the command (``test_main.py``).
"""

from __future__ import annotations

import base64
import csv
import io
import re

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import soundfile
    import torch
    from PIL import Image

    from fusionsum.pipeline import ConfigError, ManifestError, MultimodalPredictor, retrieve
except ModuleNotFoundError as error:
    missing(str(error))

SENSES = {"task": {"kind": "retrieval", "target": ["image", "sound"], "dim": 8}}  # text and size find these


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the made-up rows, and a manifest for each task."""
    return made_up.folder(tmp_path_factory.mktemp("made-up"))


@pytest.fixture(scope="module", params=["text", "image and sound"])
def predictor(request, folder):
    """Train a model that finds text, and one that finds pictures and sounds."""
    task = made_up.TASKS["retrieval"] if request.param == "text" else SENSES
    given = made_up.config(folder, **task, baselines=[], train={"seeds": 1, "epochs": 20, "patience": 0})
    return MultimodalPredictor(given).fit(folder / "retrieval.csv", progress=False)


def written(predictor, folder, place, k=4, **others):
    manifests = {"queries": folder / "retrieval.csv", "gallery": folder / "retrieval.csv"} | others
    found = predictor.retrieve(**manifests, k=k, progress=False)
    retrieve.write_retrieved(place, found)
    page, html = made_up.Page(), (place / "retrieved.html").read_text(encoding="utf-8")
    page.feed(html)
    with (place / "retrieved.csv").open(encoding="utf-8") as file:
        return found, list(csv.DictReader(file)), page, html


@torch.no_grad()
def test_what_is_found_are_the_best_of_all_scores(predictor, folder):
    """By the towers and a matrix of scores: no search."""
    found = predictor.retrieve(folder / "retrieval.csv", folder / "retrieval.csv", 4, progress=False)
    state = predictor.states["fused", 0]
    rows, towers = predictor.rows(predictor.gathered, state), predictor.model("fused", state).eval()
    query, target = towers(rows.batch(torch.arange(made_up.ROWS))[0])
    numbers, first = np.unique(rows.labels.numpy(), return_index=True)
    scores = (query * towers.fusion_weights) @ target[first].T
    np.testing.assert_allclose(found.scores, scores.topk(4).values, rtol=1e-4)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores.numpy(), found.found, 1), rtol=1e-4)
    ids = np.array([f"row{i}" for i in range(made_up.ROWS)])
    assert found.gallery.column("id") == ids[first].tolist()
    assert (found.own == np.searchsorted(numbers, rows.labels.numpy())).all()
    assert found.rows == made_up.ROWS


def test_predictions_are_what_is_found_in_the_same_manifest(predictor, folder):
    found = predictor.retrieve(folder / "retrieval.csv", folder / "retrieval.csv", progress=False)
    ids = found.gallery.column("id")
    predicted = predictor.predict(folder / "retrieval.csv", progress=False)
    for name in ("id", "label", "split"):
        assert [row.pop(name) for row in predicted] == found.queries.column(name)
    assert predicted == retrieve.listed(ids, found.scores, found.found)


def test_the_table_and_the_page(predictor, folder, tmp_path):
    found, table, page, html = written(predictor, folder, tmp_path)
    ids = found.gallery.column("id")
    assert list(table[0]) == ["id", *(f"{name}_{k}" for k in range(1, 5) for name in ("found", "score"))]
    for row, of_query, scores in zip(table, found.found, found.scores, strict=True):
        assert [row[f"found_{k}"] for k in range(1, 5)] == [ids[j] for j in of_query]
        np.testing.assert_allclose([float(row[f"score_{k}"]) for k in range(1, 5)], scores, atol=1e-6)
    assert not page.open and not page.loads
    hits = int((found.found == found.own[:, None]).any(axis=1).sum())
    assert html.count('class="item own"') == hits > 0
    assert f"own item among the first 4{hits} of {made_up.ROWS} queries" in page.text
    for row in cells(found.queries):
        assert row["id"] in page.text
        assert row["text"] in page.text or predictor.config.task.target == ("text",)
        assert f"{float(row['width']):.4g}" in page.text


def cells(rows):
    return [dict(zip(rows.cells, row, strict=True)) for row in zip(*rows.cells.values(), strict=True)]


def test_pictures_are_pictures_and_sounds_play(predictor, folder, tmp_path):
    found, *_, html = written(predictor, folder, tmp_path)
    for data, name in re.findall(r'<img [^>]*src="data:image/webp;base64,([^"]*)" alt="image of (row\d+)">', html):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=float)
        given = np.asarray(Image.open(folder / f"{name.removeprefix('row')}.png"), dtype=float)
        assert shown.shape == given.shape
        assert np.abs(shown - given).mean() <= 25
    sounds = r'<audio controls [^>]*src="data:audio/flac;base64,([^"]*)" aria-label="sound of (row\d+)">'
    for data, name in re.findall(sounds, html):
        heard, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
        given, _ = soundfile.read(folder / f"{name.removeprefix('row')}.wav")
        assert rate == 8000
        np.testing.assert_allclose(heard, (given / np.abs(given).max())[:1600], atol=1e-3)
    rows = cells(found.queries)
    if predictor.config.task.target != ("text",):
        rows = [cells(found.gallery)[j] for j in found.found.ravel()]
    for tag, column in (("img", "image"), ("audio", "sound")):
        assert html.count(f"<{tag} ") == sum(row[column] != "" for row in rows)


def test_what_is_found_again_is_in_the_page_once(predictor, folder, tmp_path):
    found, *_, html = written(predictor, folder, tmp_path)
    tags = re.findall(r'<(?:img|audio) [^>]*data-item="([^"]*)"( src="data:[^"]*")?', html)
    assert len(tags) == sum(
        found.gallery.cells[name][j] != "" for j in found.found.ravel() for name in ("image", "sound")
    ) * (predictor.config.task.target != ("text",))
    held = [place for place, source in tags if source]
    assert sorted(held) == sorted({place for place, _ in tags})
    for place, _ in tags:
        assert [p for p, _ in tags].index(place) == next(
            k for k, (p, source) in enumerate(tags) if p == place and source
        )


def test_queries_and_gallery_of_their_own_need_only_their_columns(predictor, folder, tmp_path):
    given = made_up.rows(tmp_path)
    target = predictor.config.task.target
    columns = {"text": ["text"], "image": ["image"], "sound": ["sound"], "size": ["width", "height"]}
    asked = ["id", *(c for name in columns if name not in target for c in columns[name])]
    gallery = [{"id": f"new{row['id']}", **{name: row[name] for name in target}} for row in given[10:13]]
    others = {
        "queries": made_up.write(tmp_path / "asked.csv", [{name: row[name] for name in asked} for row in given[:5]]),
        "gallery": made_up.write(tmp_path / "gallery.csv", gallery),
    }
    found, table, page, _ = written(predictor, folder, tmp_path, k=10, **others)
    assert found.found.shape == (5, len(found.gallery)) and len(found.gallery) <= 3
    assert (found.own == -1).all() and "own item" not in page.text
    assert {row["found_1"] for row in table} <= {row["id"] for row in gallery}


def test_a_long_page_says_what_it_does_not_show(predictor, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieve, "SHOWN", 5)
    _, table, page, html = written(predictor, folder, tmp_path)
    assert html.count('<section class="result">') == 5
    assert f"{made_up.ROWS - 5} more queries are in retrieved.csv" in page.text
    assert len(table) == made_up.ROWS


def test_bad_input(predictor, folder, tmp_path):
    path, rows = folder / "retrieval.csv", made_up.rows(tmp_path, 3)
    lacking = made_up.write(tmp_path / "lacking.csv", [{"id": row["id"]} for row in rows])
    for manifests in ((lacking, path), (path, lacking)):
        with pytest.raises(ManifestError, match="unknown column"):
            predictor.retrieve(*manifests, progress=False)
    name = predictor.config.task.target[0]
    empty = made_up.write(tmp_path / "empty.csv", [row | {"image": "", "sound": "", "text": ""} for row in rows])
    with pytest.raises(ManifestError, match=f"empty.csv:2, column '{name}.*': all modalities are missing"):
        predictor.retrieve(path, empty, progress=False)
    classifier = MultimodalPredictor(made_up.config(folder, train={"seeds": 1, "epochs": 1}, baselines=[]))
    classifier.fit(folder / "classification.csv", progress=False)
    with pytest.raises(ConfigError, match=r"task.kind: expected 'retrieval', got 'classification'"):
        classifier.retrieve(path, path, progress=False)
