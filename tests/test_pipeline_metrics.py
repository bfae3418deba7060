"""`fusionsum.pipeline.metrics`: every metric against its definition written out; chance; bounds."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import missing

try:
    from sklearn.metrics import average_precision_score, f1_score

    from fusionsum.pipeline import metrics
except ModuleNotFoundError as error:
    missing(str(error))


def test_classification_metrics_are_those_of_their_definitions(rng):
    logits, labels = 2 * rng.normal(size=(500, 4)), rng.integers(3, size=500)  # the last class never occurs
    found = metrics.classification_metrics(logits, labels)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    f1 = []
    for k in range(3):
        right = ((predicted == k) & (labels == k)).sum()
        f1.append(2 * right / ((predicted == k).sum() + (labels == k).sum()))
    gap = 0.0
    for b in range(metrics.BINS):
        inside = (confidence >= b / metrics.BINS) & (confidence < (b + 1) / metrics.BINS)
        if inside.any():
            gap += inside.mean() * abs(confidence[inside].mean() - (predicted == labels)[inside].mean())
    recall = [(predicted == labels)[labels == k].mean() for k in range(3)]
    precisions = []
    for k in range(3):
        order = np.argsort(-probabilities[:, k])
        own = labels[order] == k
        precisions.append((own.cumsum() / np.arange(1, 501))[own].mean())
    expected = {
        "accuracy": (predicted == labels).mean(),
        "balanced_accuracy": np.mean(recall),
        "macro_f1": np.mean(f1),
        "average_precision": np.mean(precisions),
        "ece": gap,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) <= 1e-12, name


def test_offsets_move_decisions_and_no_probability(rng):
    logits, labels, offsets = rng.normal(size=(200, 3)), rng.integers(3, size=200), np.array([0.5, 0, -1])
    plain, moved, all_moved = (
        metrics.classification_metrics(*given)
        for given in ((logits, labels), (logits, labels, offsets), (logits + offsets, labels))
    )
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert moved[name] == all_moved[name] != plain[name]
    assert moved["average_precision"] == plain["average_precision"]


def test_certainty_that_is_right_is_calibrated():
    found = metrics.classification_metrics(1000 * np.eye(3), np.arange(3))
    assert found == {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "average_precision": 1, "ece": 0}


def test_multilabel_metrics_are_scikit_learns(rng):
    logits, labels = np.round(rng.normal(size=(300, 4)), 1), (rng.random((300, 4)) < 0.3).astype(float)
    labels[:, 3] = 0  # never occurs
    found, own = metrics.multilabel_metrics(logits, labels), labels[:, :3]
    assert abs(found["macro_f1"] - f1_score(own, logits[:, :3] > 0, average="macro")) <= 1e-12
    assert abs(found["micro_f1"] - f1_score(labels, logits > 0, average="micro")) <= 1e-12
    assert abs(found["average_precision"] - average_precision_score(own, logits[:, :3], average="macro")) <= 1e-12
    assert found["subset_accuracy"] == ((logits > 0) == (labels > 0)).all(axis=1).mean()
    assert metrics.multilabel_metrics(logits, labels, [5.0] * 4)["macro_f1"] != found["macro_f1"]


SHARED = {
    "classification": ("accuracy", "balanced_accuracy", "macro_f1", "average_precision"),
    "multilabel": ("macro_f1", "micro_f1", "average_precision", "subset_accuracy"),
    "regression": ("mae", "pearson"),
}


@pytest.mark.parametrize("kind, metric", [(kind, metric) for kind, names in SHARED.items() for metric in names])
def test_the_mean_of_the_rows_shares_is_the_metric_and_their_spread_its_error(kind, metric, rng):
    """By the spread of the metric itself over resamples."""

    def whole(values, labels):
        if kind == "regression":
            return metrics.regression_metrics(values[:, 0], labels)[metric]
        return getattr(metrics, f"{kind}_metrics")(values, labels)[metric]

    labels = {
        "classification": rng.choice(3, p=[0.6, 0.3, 0.1], size=800),
        "multilabel": (rng.random((800, 3)) < 0.3).astype(float),
        "regression": rng.normal(size=800),
    }[kind]
    signal = (
        labels[:, None] if kind == "regression" else np.eye(3)[labels] if kind == "classification" else labels - 0.5
    )
    values = 1.5 * signal + rng.normal(size=signal.shape)
    shares = metrics.row_scores(metric, values, labels)
    assert abs(shares.mean() - whole(values, labels)) <= 1e-9
    drawn = [whole(values[rows], labels[rows]) for rows in rng.integers(800, size=(200, 800))]
    assert 0.75 <= shares.std() / 800**0.5 / np.std(drawn) <= 1.3


def test_regression_metrics(rng):
    labels, noise = rng.normal(size=(2, 100))
    found = metrics.regression_metrics(labels + noise, labels)
    assert abs(found["mae"] - np.abs(noise).mean()) <= 1e-12
    assert abs(found["pearson"] - np.corrcoef(labels + noise, labels)[0, 1]) <= 1e-12
    assert metrics.regression_metrics(np.ones(100), labels)["pearson"] == 0
    large = metrics.regression_metrics(1e300 * (labels + noise), 1e300 * labels)
    assert abs(large["pearson"] - found["pearson"]) <= 1e-12
    assert abs(large["mae"] / 1e300 - found["mae"]) <= 1e-12


def test_ranks_are_those_of_a_sorted_list(rng):
    queries, keys = (rng.integers(-1, 2, size=(size, 3)).astype(float) for size in (200, 12))  # full of ties
    weights = np.array([2.0, 1, 1])
    key_labels = rng.integers(4, size=12) - 1
    labels = rng.choice(key_labels, size=200)
    found = metrics.best_ranks(queries, keys, labels, key_labels, weights)
    for query, label, rank in zip(queries, labels, found, strict=True):
        # In a tie, keys of other labels come first.
        scores, relevant = keys @ (weights * query), key_labels == label
        ordered = sorted(range(12), key=lambda j, s=scores, r=relevant: (-s[j], r[j]))
        assert rank == 1 + next(place for place, j in enumerate(ordered) if relevant[j])


def test_precisions_are_those_of_a_sorted_list(rng, monkeypatch):
    monkeypatch.setattr(metrics, "SORTED", 30)  # in pieces
    queries, keys = (rng.integers(-1, 2, size=(size, 3)).astype(float) for size in (50, 12))
    key_labels, weights = rng.integers(4, size=12), np.array([2.0, 1, 1])
    labels = rng.choice(key_labels, size=50)
    average, first = metrics.precisions(queries, keys, labels, key_labels, weights)
    for b in range(50):
        scores, relevant = keys @ (weights * queries[b]), key_labels == labels[b]
        ordered = sorted(range(12), key=lambda j, s=scores, r=relevant: (-s[j], r[j]))
        hits = np.array([relevant[j] for j in ordered])
        expected = np.mean([hits[: place + 1].mean() for place in np.flatnonzero(hits)])
        assert abs(average[b] - expected) <= 1e-12
        for column, k in enumerate(metrics.RECALLED):
            assert abs(first[b, column] - hits[:k].sum() / k) <= 1e-12


def test_retrieval_metrics_go_both_ways():
    scores, labels = np.array([[9.0, 1, 2], [3, 5, 4], [8, 2, 0], [1, 2, 3]]), np.array([10, 20, 20, 30])
    given = (scores, np.eye(3), labels, np.array([10, 20, 30]), ("sound", "text"))
    found, rank = metrics.retrieval_metrics(*given)
    assert rank.tolist() == [1, 1, 2, 1]
    assert found["sound_to_text_R@1"] == 0.75
    assert found["sound_to_text_R@5"] == 1
    assert found["sound_to_text_median_rank"] == 1
    assert found["sound_to_text_mAP"] == (3 + 1 / 2) / 4  # of one target each: the mean reciprocal rank
    assert found["text_to_sound_R@1"] == 2 / 3  # of the third text, row 1 scores more than its own
    names = ["R@1", "R@5", "R@10", "mAP", "median_rank"]
    assert list(found) == [f"{way}_{name}" for way in ("sound_to_text", "text_to_sound") for name in names]
    several, _ = metrics.retrieval_metrics(*given, several=True)
    assert several["text_to_sound_P@1"] == 2 / 3
    assert several["text_to_sound_P@5"] == (1 + 2 + 1) / 3 / 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_have_no_metrics(bad):
    values = np.full((3, 3), bad)
    for measure in (
        lambda: metrics.classification_metrics(values, np.arange(3)),
        lambda: metrics.regression_metrics(values[0], np.arange(3.0)),
        lambda: metrics.best_ranks(values, np.eye(3), np.arange(3), np.arange(3)),
        lambda: metrics.best_ranks(np.eye(3), values, np.arange(3), np.arange(3)),
        lambda: metrics.best_ranks(np.eye(3), np.eye(3), np.arange(3), np.arange(3), values[0]),
    ):
        with pytest.raises(ArithmeticError):
            measure()


def test_chance(rng):
    labels = np.array([0, 0, 0, 1, 2])
    always = np.eye(3)[np.zeros(5, dtype=int)]
    found = metrics.classification_metrics(always, labels)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "average_precision"):
        assert abs(metrics.chance(name, labels) - found[name]) <= 1e-12
    assert metrics.chance("ece", labels) is None
    assert abs(metrics.chance("a_to_b_R@10", np.arange(50), np.arange(50)) - 0.2) <= 1e-12
    keys = rng.integers(3, size=20)
    hits = [[keys[order] == k for k in range(3)] for order in (rng.permutation(20) for _ in range(4000))]
    for k in (1, 5, 10):
        expected = np.mean([[own[:k].any() for own in drawn] for drawn in hits])
        assert abs(metrics.chance(f"a_to_b_R@{k}", np.arange(3), keys) - expected) <= 0.02
        expected = np.mean([[own[:k].mean() for own in drawn] for drawn in hits])
        assert abs(metrics.chance(f"a_to_b_P@{k}", np.arange(3), keys) - expected) <= 0.02
    assert metrics.chance("a_to_b_mAP", labels, labels) is None


def test_which_way_is_better():
    assert [metrics.better(m) for m in ("accuracy", "mae", "ece", "a_to_b_median_rank", "pearson")] == [
        1,
        -1,
        -1,
        -1,
        1,
    ]
