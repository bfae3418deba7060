"""`fusionsum.pipeline.prediction`: parts of the rows say what all say; a row for every row; tables that execute nothing."""

from __future__ import annotations

import csv
import functools

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import torch

    from fusionsum.pipeline import ConfigError, ManifestError, MultimodalPredictor, prediction
    from fusionsum.pipeline import predictor as predictor_module
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_up.folder(tmp_path_factory.mktemp("made-up"))


@pytest.fixture(scope="module")
def predictor(folder):
    given = made_up.config(folder, baselines=["mlp"], train={"epochs": 2})
    return MultimodalPredictor(given).fit(progress=False)


@pytest.fixture(scope="module")
def retrieval(folder):
    given = made_up.config(folder, **made_up.TASKS["retrieval"], baselines=[], train={"seeds": 1, "epochs": 1})
    return MultimodalPredictor(given).fit(folder / "retrieval.csv", progress=False)


def test_parts_say_what_all_say(folder, predictor, monkeypatch):
    path = folder / "classification.csv"
    whole, shares = predictor.predict(path, progress=False), predictor.predict_proba(path, progress=False)
    vectors = predictor.embed(path, progress=False)
    assert shares.shape == (made_up.ROWS, 3) and vectors.shape == (made_up.ROWS, 4 * 8)
    assert predictor.classes == ("blue", "green", "red")
    for row, share in zip(whole, shares, strict=True):
        assert [row[f"p({name})"] for name in predictor.classes] == pytest.approx(share, abs=1e-6)
        assert row["predicted"] == predictor.classes[share.argmax()]
    monkeypatch.setattr(predictor_module, "streamed", functools.partial(prediction.streamed, size=7))
    parts = predictor.predict(path, progress=False)
    assert [row["predicted"] for row in parts] == [row["predicted"] for row in whole]
    np.testing.assert_allclose(predictor.predict_proba(path, progress=False), shares, atol=1e-6)
    np.testing.assert_allclose(predictor.embed(path, progress=False), vectors, atol=1e-5)


@pytest.mark.parametrize("source", ["dicts", "pandas", "polars", "one row"])
def test_rows_in_memory_say_what_their_file_says(folder, predictor, source, monkeypatch):
    monkeypatch.chdir(folder)  # file names in memory are relative to the current folder
    rows = made_up.rows(folder)
    if source in ("pandas", "polars"):
        given = pytest.importorskip(source).DataFrame(rows)
    else:
        given = rows[:1] if source == "one row" else rows
    found = predictor.predict(given, progress=False)
    assert found == predictor.predict(folder / "classification.csv", progress=False)[: len(found)]
    assert len(found) == (1 if source == "one row" else made_up.ROWS)


def test_embeddings_of_retrieval_have_unit_length_and_two_sides(folder, retrieval):
    query = retrieval.embed(folder / "retrieval.csv", progress=False)
    only = [{"id": row["id"], "text": row["text"] or "thing"} for row in made_up.rows(folder)]
    target = retrieval.embed(only, "target", progress=False)
    for vectors in (query, target):
        assert vectors.shape == (made_up.ROWS, 8)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(ConfigError, match="unknown side 'tagret'; did you mean 'target'"):
        retrieval.embed(only, "tagret")
    with pytest.raises(ConfigError, match="retrieval has no classes"):
        retrieval.predict_proba(only)


def test_a_modality_without_a_column_is_missing_in_all_rows(folder, predictor, tmp_path, caplog):
    rows = made_up.rows(folder, 6)
    lacking = [{name: cell for name, cell in row.items() if name not in ("text", "height")} for row in rows]
    blank = made_up.write(folder / "blank.csv", [row | {"text": "", "height": ""} for row in rows])
    found = predictor.predict(made_up.write(folder / "lacking.csv", lacking), progress=False)
    assert found == predictor.predict(blank, progress=False) and len(found) == 6
    assert found != predictor.predict(made_up.write(folder / "whole.csv", rows), progress=False)
    slip = made_up.write(folder / "slip.csv", [row | {"txt": "a red thing"} for row in lacking])
    with pytest.raises(ManifestError, match=r"^slip\.csv: unknown column 'text'; did you mean 'txt'\?"):
        predictor.predict(slip, progress=False)
    nothing = made_up.write(folder / "nothing.csv", [{"id": row["id"], "value": row["value"]} for row in rows])
    with pytest.raises(ManifestError, match=r"^nothing\.csv: unknown column 'image'"):
        predictor.predict(nothing, progress=False)


@pytest.mark.parametrize("broken", [[0], [2, 3], list(range(6))])
@pytest.mark.parametrize("task, answer", [("classification", "predicted"), ("retrieval", "found_1")])
def test_a_row_that_cannot_be_read_keeps_its_place(request, tmp_path, task, answer, broken):
    predictor = request.getfixturevalue("predictor" if task == "classification" else "retrieval")
    rows = made_up.rows(tmp_path, 6)
    for i in broken:
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    path = made_up.write(tmp_path / "m.csv", [row | {"text": f"thing {row['id']}"} for row in rows])
    with pytest.raises(ManifestError, match=rf"m\.csv:{broken[0] + 2}, column 'image': '{broken[0]}\.png'"):
        predictor.predict(path, progress=False)
    out = tmp_path / "p.csv"
    assert predictor.write_predictions(path, out, on_error="skip", progress=False) == 6
    with out.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["id"], row["label"], row["split"]) for row in found] == [
        (row["id"], row["label"], row["split"]) for row in rows
    ]
    assert list(found[0])[-1] == "error"
    for i, row in enumerate(found):
        assert ("column 'image'" in row["error"], row.get(answer, "") == "") == (i in broken, i in broken)
        assert row.get(answer) not in [f"row{j}" for j in broken]


def test_no_cell_of_a_table_is_a_formula(folder, predictor, tmp_path):
    rows = made_up.rows(folder, 2)
    rows[0]["id"], rows[1]["id"] = "=cmd|' /C calc'!A0", "-1"
    made_up.write(folder / "formulas.csv", rows)
    predictor.write_predictions(folder / "formulas.csv", tmp_path / "p.csv", progress=False)
    with (tmp_path / "p.csv").open(encoding="utf-8") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["'=cmd|' /C calc'!A0", "-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_a_table_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "p.csv"
    out.write_text("old")

    def rows():
        yield {"id": "a"}
        raise ManifestError(["m.csv:3: bad"])

    with pytest.raises(ManifestError):
        prediction.write_table(out, rows(), ["id"])
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_model_is_chosen_by_its_validation_loss(predictor):
    histories = {("fused", 0): 0.5, ("fused", 1): 0.3, ("mlp", 0): 0.2, ("mlp", 1): 0.25}
    before = predictor.histories
    try:
        predictor.histories = {key: [{"validation_loss": v}, {"validation_loss": 9.0}] for key, v in histories.items()}
        model, seed, reason = predictor.chosen()
        assert (model, seed) == ("fused", 1)
        assert reason == "'mlp' has a lower validation loss, 0.225 against 0.4; the best of 2 seeds"
        assert predictor.chosen("best")[:2] == ("mlp", 0)
        assert predictor.chosen("mlp", 1)[:2] == ("mlp", 1)
        predictor.histories = {key: [{"train_loss": v}] for key, v in histories.items()}
        assert predictor.chosen() == ("fused", 0, "the first of 2 seeds")
    finally:
        predictor.histories = before
    with pytest.raises(ConfigError, match="unknown model 'mpl'; did you mean 'mlp'"):
        predictor.chosen("mpl")
    with pytest.raises(ConfigError, match="--seed: expected one of 0, 1, got 7"):
        predictor.chosen(seed=7)


def test_predicting_leaves_the_process_as_it_was(folder, predictor):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    predictor.predict_proba(folder / "classification.csv", progress=False)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
