"""`fusionsum.pipeline.evaluate`: every metric against its definition written out, combinations, withheld modalities."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import missing

try:
    import torch
    from torch import nn

    from fusionsum.pipeline import evaluate
    from fusionsum.pipeline.fuse import FusionModel
    from fusionsum.pipeline.preprocess import Column
    from fusionsum.pipeline.train import Rows
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_classification_metrics_are_those_of_their_definitions(rng):
    logits, labels = 2 * rng.normal(size=(500, 4)), rng.integers(3, size=500)  # the last class never occurs
    found = evaluate.classification_metrics(logits, labels)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    f1 = []
    for k in range(3):
        right = ((predicted == k) & (labels == k)).sum()
        f1.append(2 * right / ((predicted == k).sum() + (labels == k).sum()))
    gap = 0.0
    for b in range(evaluate.BINS):
        inside = (confidence >= b / evaluate.BINS) & (confidence < (b + 1) / evaluate.BINS)
        if inside.any():
            gap += inside.mean() * abs(confidence[inside].mean() - (predicted == labels)[inside].mean())
    expected = {"accuracy": (predicted == labels).mean(), "macro_f1": np.mean(f1), "ece": gap}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) <= 1e-12, name


def test_certainty_that_is_right_is_calibrated():
    assert evaluate.classification_metrics(1000 * np.eye(3), np.arange(3)) == {"accuracy": 1, "macro_f1": 1, "ece": 0}


def test_regression_metrics(rng):
    labels, noise = rng.normal(size=(2, 100))
    found = evaluate.regression_metrics(labels + noise, labels)
    assert abs(found["mae"] - np.abs(noise).mean()) <= 1e-12
    assert abs(found["pearson"] - np.corrcoef(labels + noise, labels)[0, 1]) <= 1e-12
    assert evaluate.regression_metrics(np.ones(100), labels)["pearson"] == 0


def test_ranks_are_those_of_a_sorted_list(rng):
    queries, keys = (rng.integers(-1, 2, size=(size, 3)).astype(float) for size in (200, 12))  # full of ties
    weights = np.array([2.0, 1, 1])
    key_labels = rng.integers(4, size=12) - 1
    labels = rng.choice(key_labels, size=200)
    found = evaluate.best_ranks(queries, keys, labels, key_labels, weights)
    for query, label, rank in zip(queries, labels, found, strict=True):
        # In a tie, keys of other labels come first.
        scores, relevant = keys @ (weights * query), key_labels == label
        ordered = sorted(range(12), key=lambda j, s=scores, r=relevant: (-s[j], r[j]))
        assert rank == 1 + next(place for place, j in enumerate(ordered) if relevant[j])


def test_retrieval_metrics_go_both_ways():
    scores, labels = np.array([[9.0, 1, 2], [3, 5, 4], [8, 2, 0], [1, 2, 3]]), np.array([10, 20, 20, 30])
    output = evaluate.Outputs(scores, np.ones(4, dtype=bool), np.eye(3))
    found = evaluate.retrieval_metrics(output, labels, np.array([10, 20, 30]), "sound", "text")
    assert found["sound_to_text_R@1"] == 0.75
    assert found["sound_to_text_R@5"] == 1
    assert found["sound_to_text_median_rank"] == 1
    assert found["text_to_sound_R@1"] == 2 / 3  # of the third text, row 1 scores more than its own
    assert list(found) == [
        f"{way}_{name}" for way in ("sound_to_text", "text_to_sound") for name in ("R@1", "R@5", "R@10", "median_rank")
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_have_no_metrics(bad):
    values = np.full((3, 3), bad)
    for measure in (
        lambda: evaluate.classification_metrics(values, np.arange(3)),
        lambda: evaluate.regression_metrics(values[0], np.arange(3.0)),
        lambda: evaluate.best_ranks(values, np.eye(3), np.arange(3), np.arange(3)),
        lambda: evaluate.best_ranks(np.eye(3), values, np.arange(3), np.arange(3)),
        lambda: evaluate.best_ranks(np.eye(3), np.eye(3), np.arange(3), np.arange(3), values[0]),
    ):
        with pytest.raises(ArithmeticError):
            measure()


def test_chance():
    labels = np.array([0, 0, 0, 1, 2])
    assert evaluate.chance("classification", labels, "accuracy") == 0.6
    assert evaluate.chance("classification", labels, "ece") is None
    assert evaluate.chance("retrieval", np.arange(50), "a_to_b_R@10") == 0.2
    assert evaluate.chance("retrieval", labels, "a_to_b_R@5") == 1
    assert evaluate.chance("regression", labels, "mae") is None


def test_intervals_hold_the_mean_of_95_of_100_samples(rng):
    inside = 0
    for _ in range(2000):
        found = evaluate.interval(rng.normal(3, 2, size=5).tolist())
        inside += abs(found.mean - 3) <= found.half
    assert 0.935 <= inside / 2000 <= 0.965
    assert evaluate.interval([0.25]) == evaluate.Interval(0.25, None)
    assert str(evaluate.interval([0.25])) == "0.250"


def test_combinations_are_products_and_sums_over_the_modalities_of_a_row():
    known = np.array([[True, True, False], [True, False, False]])
    logits = np.log([[[0.9, 0.1], [0.8, 0.2], [0.5, 0.5]], [[0.2, 0.8], [0.5, 0.5], [0.5, 0.5]]])
    galleries = [np.eye(2), np.eye(2) + 1]
    parts = [evaluate.Outputs(*part) for part in zip(logits, known, galleries, strict=True)]

    def probabilities(name):
        values = np.exp(evaluate.combine(name, "classification", parts).values)
        return values / values.sum(axis=1, keepdims=True)

    np.testing.assert_allclose(probabilities("late-product"), [[0.18 / 0.26, 0.08 / 0.26], [0.8, 0.2], [0.5, 0.5]])
    np.testing.assert_allclose(probabilities("score-sum"), [[0.55, 0.45], [0.8, 0.2], [0.5, 0.5]])
    summed = evaluate.combine("score-sum", "retrieval", parts)
    cosines = [part.values @ part.gallery.T for part in parts]
    np.testing.assert_allclose((summed.values @ summed.gallery.T)[:2], [cosines[0][0] + cosines[1][0], cosines[0][1]])
    assert summed.fusion_weights is None
    assert summed.known.tolist() == [True, True, False]
    mean = evaluate.combine("score-sum", "regression", parts).values
    np.testing.assert_allclose(mean[:2], [(logits[0, 0] + logits[1, 0]) / 2, logits[0, 1]])


class Told(nn.Module):
    """Adds the features of present modalities, and 100 for each modality that `present` says is missing."""

    def forward(self, *features, present=None):
        masks = present or [torch.ones(len(x), dtype=torch.bool) for x in features]
        return sum(torch.where(mask[:, None], x, 100.0) for x, mask in zip(features, masks, strict=True))


def test_a_withheld_modality_is_masked_or_zero():
    a, b = torch.arange(1.0, 7)[:, None], torch.arange(10.0, 70, 10)[:, None]
    index = torch.tensor([0, 1, 2, 3, 4, -1])
    rows = Rows({"a": Column(a, torch.arange(6)), "b": Column(b, index)}, torch.zeros(6))
    model = FusionModel({"a": nn.Identity(), "b": nn.Identity()}, Told())
    conditions = [evaluate.Condition(), evaluate.Condition("a"), evaluate.Condition("a", True), evaluate.Condition("c")]
    assert [str(c) for c in conditions[:3]] == ["all", "without a", "without a, zero-filled"]
    found = evaluate.outputs(model, rows, torch.tensor([5, 0, 1]), conditions=conditions)
    said = {str(c): (o.values[:, 0].tolist(), o.known.tolist()) for c, o in found.items()}
    assert said["all"] == ([106, 11, 22], [True, True, True])
    assert said["without a"] == ([200, 110, 120], [False, True, True])
    assert said["without a, zero-filled"] == ([0, 10, 20], [False, True, True])
    assert said["without c"] == said["all"]


def test_the_headline_and_which_way_is_better():
    assert evaluate.headline("classification", {}) == "accuracy"
    assert evaluate.headline("regression", {}) == "mae"
    names = {"a_to_b_R@1": 0, "a_to_b_R@10": 0, "b_to_a_R@10": 0}
    assert evaluate.headline("retrieval", names, "b") == "a_to_b_R@10"
    assert [evaluate.better(m) for m in ("accuracy", "mae", "ece", "a_to_b_median_rank", "pearson")] == [
        1,
        -1,
        -1,
        -1,
        1,
    ]
