"""`fusionsum.pipeline.predictor`: the five steps on made-up data, all tasks, bad input, save and load.

What lives elsewhere: each step by itself; a kill at any step of one training (``test_pipeline_train.py``); the report
(``test_pipeline_report.py``).
"""

from __future__ import annotations

import csv

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import torch

    from fusionsum.pipeline import (
        ERRORS,
        CheckpointError,
        ConfigError,
        ManifestError,
        MultimodalPredictor,
        evaluate,
        manifest,
        write_report,
    )
    from fusionsum.pipeline import predictor as predictor_module
    from fusionsum.pipeline import train as step4
    from fusionsum.pipeline.preprocess import gather_rows
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the made-up rows, and a manifest for each task."""
    return made_up.folder(tmp_path_factory.mktemp("made-up"))


def fitted(folder, task="classification", out=None, resume=False, **sections):
    given = made_up.config(folder, **made_up.TASKS[task], **sections)
    return MultimodalPredictor(given).fit(folder / f"{task}.csv", out, resume=resume, progress=False)


def weights(predictor):
    return {key: state["model"] for key, state in predictor.states.items()}


def same(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key][name], b[key][name]) for key in a for name in a[key])


@pytest.mark.parametrize("task", made_up.TASKS)
def test_from_files_to_predictions(folder, tmp_path, task):
    run = tmp_path / "run"
    predictor = fitted(folder, task, run)
    results = predictor.evaluate(progress=False).results
    models = results["test"]
    inputs = [name for name in made_up.MODALITIES if not (task == "retrieval" and name == "text")]
    combined = ["late-product", "score-sum"] if task == "classification" else ["score-sum"]
    assert list(models) == ["fused", *(f"{name} alone" for name in inputs), "concat-linear", "mlp", *combined]
    withheld = [f"without {name}{how}" for name in inputs for how in ("", ", zero-filled")]
    assert list(models["fused"]) == ["all", *withheld]
    assert list(models["image alone"]) == ["all"]
    assert list(models["score-sum"]) == ["all", *withheld[::2]]
    for found in models.values():
        for metrics in found.values():
            for values in metrics.values():
                assert len(values) == 2 and np.isfinite(values).all()
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"fused-0.safetensors", "fused-0.csv", "image-alone-1.safetensors", "0.json"} <= names
    with (run / "log.csv").open(encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    assert {(row["model"], row["seed"]) for row in log} == {(m, str(s)) for m in predictor.models for s in range(2)}

    predictions = predictor.predict(folder / f"{task}.csv", progress=False)
    assert predictor.write_predictions(folder / f"{task}.csv", run / "predictions.csv", progress=False) == made_up.ROWS
    again = MultimodalPredictor.load(run)
    assert same(predictor, again)
    assert again.evaluate(progress=False).results == results
    assert again.predict(folder / f"{task}.csv", progress=False) == predictions
    with (run / "predictions.csv").open(encoding="utf-8") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [f"row{i}" for i in range(made_up.ROWS)]


@pytest.mark.parametrize("task", ["classification", "retrieval"])
@pytest.mark.parametrize("helped", [False, True])
def test_products_that_do_not_help_are_dropped(folder, tmp_path, monkeypatch, task, helped):
    """In the predictor that is trained and in the one that is loaded; the training itself can be continued."""
    asked = []

    def clearly_less(fused, summed, groups):
        asked.append((len(fused), len(summed), len(groups)))
        return helped

    monkeypatch.setattr(predictor_module, "clearly_less", clearly_less)
    options = {"fusion": {"layer": "ResidualFusion", "rank": 2}, "baselines": [], "train": {"seeds": 1, "patience": 3}}
    predictor = fitted(folder, task, out=tmp_path / "run", **options)
    assert predictor.models == ["fused", "concat-linear"]  # it is a candidate, and so is always shown
    (found,) = set(asked)
    assert found[0] == found[1] == found[2] > 0
    for made in (predictor, MultimodalPredictor.load(tmp_path / "run")):
        evaluation = made.evaluate(progress=False)
        models = evaluation.results["test"]
        assert (models["fused"]["all"] == models["concat-linear"]["all"]) == (not helped)
        write_report(tmp_path / "report", evaluation)
        said = f"its products helped in {int(helped)} of 1 seeds"
        assert said in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
        assert made.chosen()[:2] == ("fused", 0)
    again = fitted(folder, task, out=tmp_path / "run", resume=True, **options)
    assert same(predictor, again)


def test_the_made_up_task_is_learned_and_predicted(folder, tmp_path):
    train = {"seeds": 1, "epochs": 40, "patience": 0}
    options = {"fusion": {"layer": "LateFusion"}, "train": train, "baselines": []}
    predictor = fitted(folder, **options)
    assert predictor.evaluate(progress=False).results["test"]["fused"]["all"]["accuracy"] == [1.0]
    rows = made_up.rows(tmp_path, 9)
    unlabelled = [{k: v for k, v in row.items() if k not in ("label", "split", "group")} for row in rows]
    found = predictor.predict(made_up.write(tmp_path / "new.csv", unlabelled), progress=False)
    assert [row["predicted"] for row in found] == [row["label"] for row in rows]
    for row in found:
        assert abs(sum(row[f"p({colour})"] for colour in made_up.COLOURS) - 1) <= 1e-5
    blind = [row | {"image": "", "sound": ""} for row in unlabelled]
    assert len(predictor.predict(made_up.write(tmp_path / "new.csv", blind), progress=False)) == 9
    values = fitted(folder, "regression", **options).predict(folder / "classification.csv", progress=False)
    errors = [abs(v["predicted"] - float(r["value"])) for v, r in zip(values, made_up.rows(tmp_path), strict=True)]
    assert np.median(errors) <= 3


def test_retrieval_finds_targets_of_the_same_text(folder):
    predictor = fitted(folder, "retrieval", train={"seeds": 1}, baselines=[])
    found = predictor.predict(folder / "retrieval.csv", progress=False)
    assert [row["id"] for row in found] == [f"row{i}" for i in range(made_up.ROWS)]
    for row in found:
        scores = [row[f"score_{k}"] for k in range(1, 11)]
        assert scores == sorted(scores, reverse=True)
        assert len({row[f"found_{k}"] for k in range(1, 11)}) == 10
    numbers = gather_rows(predictor.config, folder / "retrieval.csv", progress=False).target_numbers(["text"])
    texts = [row["text"] for row in made_up.rows(folder)]
    for i in range(made_up.ROWS):
        for j in range(made_up.ROWS):
            if texts[i] and texts[j]:
                assert (numbers[i] == numbers[j]) == (texts[i] == texts[j])


@pytest.mark.parametrize("killed_after", [2, 30, 75])
def test_a_killed_run_resumes_to_the_same_bits(folder, tmp_path, monkeypatch, killed_after):
    whole = fitted(folder, baselines=["mlp"])
    run = tmp_path / "run"
    given = made_up.config(folder, baselines=["mlp"])
    if killed_after < 36:  # of 2 seeds of 2 models of 3 epochs of 3 steps
        with made_up.interrupted(monkeypatch, step4, killed_after), pytest.raises(KeyboardInterrupt):
            MultimodalPredictor(given).fit(out=run, progress=False)
        with pytest.raises(CheckpointError):
            MultimodalPredictor.load(run)
    else:
        with made_up.interrupted(monkeypatch, step4, killed_after):
            MultimodalPredictor(given).fit(out=run, progress=False)
    if killed_after > 2:  # in the first epoch nothing is lost
        with pytest.raises(CheckpointError, match="is a run already"):
            MultimodalPredictor(given).fit(out=run, progress=False)
    assert same(MultimodalPredictor(given).fit(out=run, resume=True, progress=False), whole)
    other = made_up.config(folder, baselines=["mlp"], train={"learning_rate": 0.5})
    with pytest.raises(CheckpointError, match=r"another configuration .*train\.learning_rate: 0\.01 and 0\.5"):
        MultimodalPredictor(other).fit(out=run, resume=True, progress=False)


def test_training_leaves_the_process_as_it_was(folder):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    one, other = (fitted(folder, train={"seeds": 1}, baselines=[]) for _ in range(2))
    assert same(one, other)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_items_stop_before_training_or_are_skipped_and_said(folder, tmp_path, monkeypatch, capsys):
    rows = made_up.rows(tmp_path)
    (tmp_path / "0.png").write_bytes(b"broken")
    (tmp_path / "1.wav").unlink()
    path = made_up.write(tmp_path / "m.csv", rows)
    monkeypatch.setattr(step4, "step", lambda *a: pytest.fail("training started"))
    with pytest.raises(ManifestError) as raised:
        MultimodalPredictor(made_up.config(tmp_path)).fit(path, progress=False)
    one, other = str(raised.value).splitlines()
    assert one.startswith("m.csv:2, column 'image': '0.png'")
    assert other == "m.csv:3, column 'sound': no such file: 1.wav"
    monkeypatch.undo()
    given = made_up.config(tmp_path, train={"seeds": 1, "epochs": 1}, baselines=[])
    predictor = MultimodalPredictor(given | {"data": given["data"] | {"on_error": "skip"}})
    evaluation = predictor.fit(path, progress=False).evaluate(progress=False)
    assert evaluation.rows == made_up.ROWS - 2
    assert evaluation.messages[1] == other and len(evaluation.messages) == 2
    assert f"skipped: {other}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"fusion": {"layer": "MUTANN"}}, "fusion.layer: unknown layer 'MUTANN'; did you mean 'MUTAN'?"),
        ({"fusion": {"layer": "LowRankFusion", "rnk": 3}}, "did you mean 'rank'?"),
        ({"fusion": "MLB"}, "fusion: expected a mapping"),
        ({"train": {"weight_decay": -1}}, "train.weight_decay: expected at least 0"),
        ({"data": {"split": "by-seed", "test": ["unseen"]}}, "data.test: expected [test]"),
        ({"modalities": {"image": {"kind": "image", "encoder": "cn"}}}, "modalities.image: unknown image encoder 'cn'"),
        ({"modalities": {"img": {"kind": "image"}}}, "unknown column 'img'; did you mean 'image'?"),
        ({"data": {"test": ["tset"]}}, "unknown split 'test'; did you mean 'tset'?"),
        ({"data": {"split": "by-seed", "test_share": 0.01}}, "no row is in the split 'test'"),
        ({"data": {"split": "by-seed", "validation_share": 0.0}}, "there are no rows of the split 'validation'"),
    ],
)
def test_an_unknown_name_is_an_error_that_suggests_the_name(folder, monkeypatch, sections, message):
    monkeypatch.setattr(step4, "step", lambda *a: pytest.fail("training started"))
    with pytest.raises(ERRORS) as raised:
        fitted(folder, **sections)
    assert message in str(raised.value)


def test_all_targets_of_a_label_are_right(folder, tmp_path):
    """Each row's picture looks for the texts of its colour: other rows' are as right as its own."""
    rows = [row | {"text": f"{row['label']} {row['id']}"} for row in made_up.rows(tmp_path)]
    path = made_up.write(tmp_path / "m.csv", rows)
    task = {"kind": "retrieval", "target": ["text"], "dim": 8}
    found = {}
    for positives in ("item", "label"):
        given = made_up.config(
            tmp_path,
            task=task | {"positives": positives},
            train={"seeds": 1, "epochs": 30, "patience": 0},
            baselines=[],
        )
        predictor = MultimodalPredictor(given).fit(path, progress=False)
        found[positives] = predictor.evaluate(progress=False).results["test"]["fused"]["all"]
    name = "image+sound+size_to_text"
    assert f"{name}_P@1" not in found["item"]
    assert found["label"][f"{name}_P@1"] == found["label"][f"{name}_R@1"]
    assert found["label"][f"{name}_mAP"][0] >= 0.7 > 0.6 >= found["item"][f"{name}_mAP"][0]
    with pytest.raises(ManifestError, match="column 'label': is empty"):
        blank = made_up.write(tmp_path / "blank.csv", [row | {"label": ""} for row in rows])
        MultimodalPredictor(given).fit(blank, progress=False)


def test_labels_that_training_does_not_have(folder, tmp_path):
    rows = made_up.rows(tmp_path)
    for row in rows[-3:]:
        row["label"] = "white"
    path = made_up.write(tmp_path / "m.csv", rows)
    with pytest.raises(ManifestError, match=r"m\.csv:35, column 'label': no training row is 'white'"):
        MultimodalPredictor(made_up.config(tmp_path)).fit(path, progress=False)
    for row in rows:
        row["label"] = "white"
    with pytest.raises(ConfigError, match="two classes or more"):
        MultimodalPredictor(made_up.config(tmp_path)).fit(made_up.write(path, rows), progress=False)


def test_evaluation_on_another_manifest(folder, tmp_path):
    predictor = fitted(folder, train={"seeds": 1}, baselines=[])
    path = made_up.write(tmp_path / "m.csv", made_up.rows(tmp_path, 6))
    evaluation = predictor.evaluate(path, progress=False)
    assert list(evaluation.results) == ["given"]
    assert (evaluation.split, evaluation.manifest.path.name, evaluation.rows) == ("given", "m.csv", 6)
    rows = made_up.rows(tmp_path, 6)
    rows[2]["label"] = "white"
    with pytest.raises(ManifestError, match=r"m\.csv:4, column 'label': no training row is 'white'"):
        predictor.evaluate(made_up.write(path, rows), progress=False)


@pytest.mark.parametrize("numbered", [False, True])
def test_rows_that_were_trained_on_are_no_test(tmp_path, caplog, numbered):
    """Ids that only number the rows are said of the training's own manifest alone."""
    rows = made_up.rows(tmp_path)
    given = [{k: v for k, v in row.items() if not (numbered and k == "id")} for row in rows]
    sections = {"train": {"seeds": 1, "epochs": 1}, "baselines": []}
    path = made_up.write(tmp_path / "m.csv", given)
    predictor = MultimodalPredictor(made_up.config(tmp_path, **sections)).fit(path, progress=False)
    renamed = [row | {"id": f"new{i}"} for i, row in enumerate(rows)]
    for others, count in ((given, 18), (given[:9], 0 if numbered else 6), (renamed, 0)):
        caplog.clear()
        evaluation = predictor.evaluate(made_up.write(tmp_path / "others.csv", others), progress=False)
        said = f"Beware: {count} of {len(others)} rows were trained on"
        assert [note.startswith(said) for note in evaluation.notes] == [True] * (count > 0)
        assert [record.message for record in caplog.records if "trained on" in record.message] == evaluation.notes
        write_report(tmp_path / "report", evaluation)
        assert (said in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")) == (count > 0)
    assert not predictor.evaluate(progress=False).notes


BY_SEED = {"split": "by-seed", "test_share": 0.3, "validation_share": 0.2}


def test_splits_by_seed(folder):
    evaluation = fitted(folder, data=BY_SEED, baselines=[]).evaluate(progress=False)
    assert len(evaluation.results["test"]["fused"]["all"]["accuracy"]) == 2
    assert evaluation.split == "by-seed"


def test_the_error_of_regression_has_the_labels_unit_with_every_seed(folder):
    """Each seed divides the labels by the spread of its own training rows."""
    predictor = fitted(folder, "regression", data=BY_SEED, baselines=[])
    found = predictor.evaluate(progress=False).results["test"]["fused"]["all"]["mae"]
    gathered = predictor.gathered
    labels = np.array(gathered.manifest.column("label"), dtype=np.float64)
    scales = []
    for seed, mae in enumerate(found):
        state = predictor.states["fused", seed]
        test = manifest.splits(gathered.manifest, predictor.config.data, seed)["test"]
        rows, model = predictor.rows(gathered, state), predictor.model("fused", state)
        output = evaluate.outputs(model, rows, torch.from_numpy(test))[evaluate.Condition()].values[:, 0]
        predicted = output * state["task"]["scale"] + state["task"]["mean"]
        assert abs(mae - np.abs(predicted - labels[test]).mean()) <= 1e-5
        scales.append(state["task"]["scale"])
    assert abs(scales[0] / scales[1] - 1) > 0.001


def test_without_a_test_split_there_is_nothing_to_evaluate(folder, tmp_path):
    rows = [row for row in made_up.rows(tmp_path) if row["split"] != "test"]
    path = made_up.write(tmp_path / "m.csv", rows)
    predictor = MultimodalPredictor(made_up.config(tmp_path, data={"test": []}, train={"seeds": 1}, baselines=[]))
    predictor.fit(path, progress=False)
    with pytest.raises(ConfigError, match=r"data\.test: expected the name of a split"):
        predictor.evaluate(progress=False)
    assert len(predictor.predict(path, progress=False)) == len(rows)


def test_save_without_a_folder(folder, tmp_path):
    predictor = fitted(folder, train={"seeds": 1}, baselines=["mlp"])
    predictor.save(tmp_path / "saved")
    again = MultimodalPredictor.load(tmp_path / "saved")
    assert same(predictor, again)
    assert again.evaluate(progress=False).results == predictor.evaluate(progress=False).results
    with pytest.raises(RuntimeError, match="call fit or load first"):
        MultimodalPredictor(made_up.config(folder)).predict(folder / "classification.csv")


@pytest.mark.parametrize("saved", ["fitted", "loaded"])
def test_a_saved_predictor_is_a_run_that_resumes(folder, tmp_path, monkeypatch, saved):
    """It is complete: with more seeds only those are trained, and another configuration is refused."""
    sections = {"train": {"seeds": 1}, "baselines": ["mlp"]}
    predictor = fitted(folder, **sections)
    predictor.save(tmp_path / "saved")
    if saved == "loaded":
        MultimodalPredictor.load(tmp_path / "saved").save(tmp_path / "again")
    run = tmp_path / ("again" if saved == "loaded" else "saved")

    def resumed(**train):
        given = made_up.config(folder, **sections | {"train": sections["train"] | train})
        return MultimodalPredictor(given).fit(folder / "classification.csv", run, resume=True, progress=False)

    with pytest.raises(CheckpointError, match=r"another configuration .*train\.patience: 2 and 3"):
        resumed(patience=3)
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        resumed(epochs=4)
    with monkeypatch.context() as context:
        context.setattr(step4, "step", lambda *a: pytest.fail("training started"))
        assert same(predictor, resumed())
    two = resumed(seeds=2)
    assert same(two, fitted(folder, baselines=["mlp"]))
    assert same(two, MultimodalPredictor.load(run))


def test_one_modality_has_nothing_to_fuse(folder, tmp_path):
    given = made_up.config(folder) | {"modalities": {"image": made_up.MODALITIES["image"]}}
    evaluation = MultimodalPredictor(given).fit(progress=False).evaluate(progress=False)
    assert list(evaluation.results["test"]) == ["fused"]
    assert list(evaluation.results["test"]["fused"]) == ["all"]
    write_report(tmp_path, evaluation)
    assert "none: one modality" in (tmp_path / "report.html").read_text(encoding="utf-8")


class Constant(torch.nn.Module):
    """An encoder of one's own."""

    def __init__(self, fitted, features):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(features))

    def forward(self, items):
        return self.value.expand(len(items), -1)


def test_an_encoder_of_ones_own(folder):
    modalities = made_up.MODALITIES | {"image": {"kind": "image", "encoder": "test_pipeline_predictor:Constant"}}
    predictor = fitted(folder, modalities=modalities, train={"seeds": 1}, baselines=[])
    assert "encoders.image.value" in predictor.states["fused", 0]["model"]


class Halves:
    """A frozen encoder: the means of an image's upper and lower half."""

    recipe = "halves 1"
    calls = 0

    def reader(self, modality):
        return modality.decode

    def encode(self, items):
        for item in items:
            Halves.calls += 1
            yield item.reshape(3, 2, -1).mean(axis=2).reshape(-1).astype(np.float32)


def test_features_of_a_frozen_encoder_are_made_once(folder, tmp_path, monkeypatch):
    from fusionsum.pipeline import pretrained

    monkeypatch.setitem(pretrained.EXTRACTORS["image"], "halves", Halves)
    modalities = made_up.MODALITIES | {"image": {"kind": "image", "encoder": "halves", "size": 8, "features": 8}}
    run = tmp_path / "run"
    predictor = fitted(folder, out=run, modalities=modalities, train={"seeds": 1}, baselines=[])
    assert Halves.calls == made_up.ROWS
    assert predictor.states["fused", 0]["fitted"]["image"]["shape"] == [6]
    results = predictor.evaluate(progress=False).results
    assert MultimodalPredictor.load(run).evaluate(progress=False).results == results
    assert Halves.calls == made_up.ROWS
