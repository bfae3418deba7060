"""`fusionsum.pipeline.labels`: classes, weights, sets of labels, decision thresholds; trainings that use them."""

from __future__ import annotations

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import torch
    from sklearn.metrics import balanced_accuracy_score, f1_score

    from fusionsum.pipeline import ConfigError, ManifestError, MultimodalPredictor, labels
    from fusionsum.pipeline.config import Task
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.mark.parametrize("metric", ["f1", "macro_f1", "balanced_accuracy"])
@pytest.mark.parametrize("ties", [False, True])
def test_no_cut_is_better_than_the_best(metric, ties, rng):
    scores = rng.normal(size=40)
    positive = scores + rng.normal(size=40) > 1
    scores = scores.round(1) if ties else scores

    def value(cut):
        called = scores > cut
        if metric == "balanced_accuracy":
            return balanced_accuracy_score(positive, called)
        average = "binary" if metric == "f1" else "macro"
        return f1_score(positive, called, average=average, labels=[False, True], zero_division=0)

    cuts = np.unique(scores)
    best = max(value(cut) for cut in [cuts[0] - 1, *(cuts + 1e-9)])
    assert value(labels.best_cut(scores, positive, metric)) >= best - 1e-12
    assert labels.best_cut(scores, np.ones(40, bool), metric) == 0.0


def test_a_threshold_is_tuned_for_the_metrics_that_it_matters_to():
    logits = np.array([[0.0, -3.0], [0.0, -2.0], [0.0, -1.0], [0.0, -1.2]])
    wanted = np.array([0, 0, 1, 1])
    assert labels.tuned_offsets(Task(), logits, wanted) is None  # accuracy
    assert labels.tuned_offsets(Task(metric="macro_f1", threshold="half"), logits, wanted) is None
    assert labels.tuned_offsets(Task(metric="macro_f1"), np.zeros((2, 3)), wanted[:2]) is None
    task = Task(metric="macro_f1")
    offsets = labels.tuned_offsets(task, logits, wanted)
    assert offsets == pytest.approx([0.0, 1.6])
    assert labels.decide(task, logits).tolist() == [0, 0, 0, 0]
    assert labels.decide(task, logits, offsets).tolist() == [0, 0, 1, 1]


def test_class_weights():
    cells = ["a"] * 6 + ["b"] * 3 + ["c"] * 3
    found = labels.learn(Task(class_weights="balanced"), cells, cells)
    assert found == {"classes": ["a", "b", "c"], "weights": pytest.approx([2 / 3, 4 / 3, 4 / 3])}
    assert labels.learn(Task(class_weights={"b": 5.0}), cells, cells)["weights"] == [1.0, 5.0, 1.0]
    with pytest.raises(ConfigError, match=r"task\.class_weights: no row is 'd'; there are: a, b, c"):
        labels.learn(Task(class_weights={"d": 5.0}), cells, cells)
    several = Task(kind="multilabel", class_weights="balanced")
    assert labels.learn(several, ["a|b", "a", "a", "b"], ["a|b", "a", "a", "b"])["weights"] == [1 / 3, 1.0]


def test_sets_of_labels_come_back():
    task = Task(kind="multilabel")
    learnt = labels.learn(task, ["a|b", "", "b"], ["a|b", "", "b"])
    numbers = labels.encode(task, learnt, ["b|a", "", ["b"]])
    assert numbers.tolist() == [[1, 1], [0, 0], [0, 1]]
    rows = labels.predicted(task, learnt, np.array([[2.0, 1.0], [-2.0, 0.5]]), [0.0, -0.7])
    assert [row["predicted"] for row in rows] == ["a|b", ""]
    assert rows[0]["p(a)"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)


@pytest.fixture
def folder(tmp_path):
    return made_up.folder(tmp_path)


def test_several_labels_are_learned(folder):
    """The colour, and whether the row's number is even, which the first number of the table says."""
    rows = made_up.rows(folder)
    for i, row in enumerate(rows):
        row["label"] = "|".join(
            [*([row["label"]] if row["label"] != "blue" else []), *(["even"] if i % 2 == 0 else [])]
        )
        row["height"] = str(i % 2)
    path = made_up.write(folder / "several.csv", rows)
    train = {"seeds": 1, "epochs": 40, "patience": 0}
    given = made_up.config(
        folder,
        task={"kind": "multilabel"},
        fusion={"layer": "LateFusion"},
        train=train,
        baselines=["alone", "score-sum"],
    )
    predictor = MultimodalPredictor(given).fit(path, progress=False)
    found = predictor.evaluate(progress=False).results["test"]["fused"]["all"]
    assert found["macro_f1"] == [1.0] and found["subset_accuracy"] == [1.0]
    assert predictor.classes == ("even", "green", "red")
    said = predictor.predict(path, progress=False)
    right = [set(s["predicted"].split("|")) == set(row["label"].split("|")) for s, row in zip(said, rows, strict=True)]
    assert np.mean(right) >= 0.9
    rows[0]["label"] = "red|purple"
    with pytest.raises(ManifestError, match="no training row is 'purple'"):
        predictor.evaluate(made_up.write(folder / "other.csv", rows), progress=False)


def test_rare_classes_are_found_with_weights_or_a_threshold(folder, tmp_path):
    """At two rows in nine, an untrained model that always says the common class has the higher accuracy."""
    rows = made_up.rows(folder)
    for i, row in enumerate(rows):
        row["label"] = "rare" if i % 9 in (0, 4) else "common"
    path = made_up.write(folder / "rare.csv", rows)

    def rare(**task):
        train = {"seeds": 1, "epochs": 2, "learning_rate": 1e-4}
        given = made_up.config(folder, task=task, fusion={"layer": "LateFusion"}, train=train, baselines=["mlp"])
        predictor = MultimodalPredictor(given).fit(path, tmp_path / "run", overwrite=True, progress=False)
        again = MultimodalPredictor.load(tmp_path / "run").predict(path, progress=False)
        assert again == predictor.predict(path, progress=False)
        return predictor, sum(row["predicted"] == "rare" for row in again)

    predictor, plain = rare()
    weighted, by_weights = rare(class_weights={"rare": 50.0})
    tuned, by_threshold = rare(metric="macro_f1")
    assert by_weights > plain
    offsets = tuned.states["fused", 0]["offsets"]
    assert offsets.keys() >= {"fused", "mlp"} and by_threshold > 0
    evaluation = tuned.evaluate(progress=False)
    assert evaluation.metric == "macro_f1"
    same = [
        torch.equal(a, b)
        for a, b in zip(*(p.states["fused", 0]["model"].values() for p in (predictor, tuned)), strict=True)
    ]
    assert all(same)  # a threshold changes decisions, not weights
    assert weighted.states["fused", 0]["task"]["weights"] == [1.0, 50.0]
