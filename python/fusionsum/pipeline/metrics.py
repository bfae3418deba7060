"""The metrics of a model's outputs, by task: their definitions, which way is better, the range they stay in.

What lives here: numbers of one model on some rows, and each row's share in the metric that models are compared by. What
lives elsewhere: the outputs (``evaluate.py``), intervals and tests between models (``compare.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax
from sklearn.metrics import average_precision_score, f1_score, recall_score

from ..api import fusion_sum
from ..search import ranks

BINS = 15  # of confidence, for the calibration error
RECALLED = (1, 5, 10)
SORTED = 1 << 22  # scores that are sorted at a time


def finite(values: np.ndarray) -> None:
    """Raise ArithmeticError unless all values are finite."""
    if not np.isfinite(values).all():
        raise ArithmeticError("the model's output is not finite")


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows, the mean confidence and the accuracy of each of `BINS` equal bins of confidence (NaN if empty)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights=v, minlength=BINS) / count for v in (confidence, right)]
    return count, means[0], means[1]


def average_precisions(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return for each class the average precision of its rows against all others: (C,), NaN for a class without rows.

    Examples
    --------
    >>> average_precisions(np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]]), np.array([0, 1, 1])).tolist()
    [1.0, 1.0]
    """
    own = labels.astype(bool) if labels.ndim > 1 else labels[:, None] == np.arange(probabilities.shape[1])
    pairs = zip(own.T, probabilities.T, strict=True)
    return np.array([average_precision_score(rows, scores) if rows.any() else np.nan for rows, scores in pairs])


def classification_metrics(
    logits: np.ndarray, labels: np.ndarray, offsets: Sequence[float] | None = None
) -> dict[str, float]:
    """Return the metrics of classification; means over classes are over those that occur.

    `offsets` (C,) are added to the logits where a class is decided on, and not where a probability is meant.

    ``accuracy``; ``balanced_accuracy``, the mean of the classes' recalls; ``macro_f1``; ``average_precision``, the mean of
    the classes', each against all others; ``ece``, the expected calibration error.

    References
    ----------
    C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.

    Examples
    --------
    >>> logits = np.array([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    >>> found = classification_metrics(logits, np.array([0, 0, 0, 1]))
    >>> found["accuracy"], found["balanced_accuracy"]
    (0.75, 0.5)
    """
    finite(logits)
    probabilities, occurring = softmax(logits, axis=1), np.unique(labels)
    predicted = (logits + (0 if offsets is None else np.asarray(offsets))).argmax(axis=1)
    count, confidence, accuracy = calibration(probabilities, labels)
    macro = {"labels": occurring, "average": "macro", "zero_division": 0}
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(recall_score(labels, predicted, **macro)),
        "macro_f1": float(f1_score(labels, predicted, **macro)),
        "average_precision": float(np.nanmean(average_precisions(probabilities, labels))),
        "ece": float(np.nansum(count * np.abs(confidence - accuracy)) / len(labels)),
    }


def multilabel_metrics(
    logits: np.ndarray, labels: np.ndarray, offsets: Sequence[float] | None = None
) -> dict[str, float]:
    """Return the metrics of multi-label classification, of labels (N, C) that are 0 or 1; a logit above 0 says yes.

    `offsets` (C,) are added to the logits where it is decided, which does not change the order of the rows.

    ``macro_f1`` and ``average_precision``, means over the labels that occur; ``micro_f1``, of all decisions on all labels;
    ``subset_accuracy``, the share of the rows with all labels right.

    Examples
    --------
    >>> found = multilabel_metrics(np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([[1, 0], [1, 0]]))
    >>> found["macro_f1"], round(found["micro_f1"], 9), found["subset_accuracy"]
    (1.0, 0.8, 0.5)
    """
    finite(logits)
    shifted = logits + (0 if offsets is None else np.asarray(offsets))
    metrics = ("macro_f1", "micro_f1", "average_precision", "subset_accuracy")
    return {metric: float(row_scores(metric, shifted, labels).mean()) for metric in metrics}


def regression_metrics(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean absolute error and Pearson's correlation (0 where one side does not vary), of values of any size.

    Examples
    --------
    >>> regression_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["mae"]
    0.3333333333333333
    >>> round(regression_metrics(np.array([1e300, 2e300]), np.array([1e300, 3e300]))["pearson"], 9)
    1.0
    """
    finite(predicted)
    return {
        "mae": float((np.abs(predicted - labels) / len(labels)).sum()),
        "pearson": float(_unit(predicted) @ _unit(labels)),
    }


def _unit(values: np.ndarray) -> np.ndarray:
    """Centre, and divide by the greatest and then by the norm, so that no square overflows; 0 if values do not vary."""
    centred = values - (values / len(values)).sum()
    greatest = np.abs(centred).max()
    if greatest <= 1e-12 * np.abs(values).max():
        return np.zeros_like(centred)
    return centred / greatest / np.linalg.norm(centred / greatest)


def _positives(labels: np.ndarray, key_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the keys of query b's label: ``own[offsets[b] : offsets[b + 1]]``."""
    order = np.argsort(key_labels, kind="stable")
    first, end = (np.searchsorted(key_labels[order], labels, side) for side in ("left", "right"))
    offsets = np.concatenate([[0], np.cumsum(end - first)])
    rows = np.repeat(np.arange(len(labels)), end - first)
    return offsets, order[np.arange(offsets[-1]) + (first - offsets[:-1])[rows]]


def best_ranks(
    queries: np.ndarray,
    keys: np.ndarray,
    labels: np.ndarray,
    key_labels: np.ndarray,
    fusion_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return the rank, from 1, of each query's best key of its own label; a tie goes to the keys of other labels.

    Parameters
    ----------
    queries, keys : ndarray
        ``(Q, n)`` and ``(G, n)``; their products, weighted, are the scores.
    labels, key_labels : ndarray
        ``(Q,)`` and ``(G,)``, integers: for each query there is a key of its label.
    fusion_weights : ndarray, optional
        ``(n,)``.

    Examples
    --------
    >>> queries, keys = np.array([[1.0], [-1.0]]), np.array([[0.9], [0.5], [0.5]])
    >>> best_ranks(queries, keys, np.array([0, 1]), np.array([0, 1, 2])).tolist()
    [1, 2]
    """
    for values in (queries, keys, fusion_weights):
        if values is not None:
            finite(values)
    offsets, own = _positives(labels, key_labels)
    rows = np.repeat(np.arange(len(labels)), np.diff(offsets))
    scores = fusion_sum(fusion_weights, queries[rows], keys[own])
    best = own[np.lexsort((scores, rows))[offsets[1:] - 1]]
    return ranks(queries, keys, best, fusion_weights=fusion_weights, exclude=(offsets, own), ties="pessimistic")


def precisions(
    queries: np.ndarray,
    keys: np.ndarray,
    labels: np.ndarray,
    key_labels: np.ndarray,
    fusion_weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return each query's average precision, (Q,), and its precision among the first k of `RECALLED`, (Q, 3).

    Every key of a query's label is right; a tie goes to the others. Parameters are those of `best_ranks`.

    Examples
    --------
    >>> queries, keys = np.array([[1.0]]), np.array([[3.0], [2.0], [1.0]])
    >>> average, first = precisions(queries, keys, np.array([7]), np.array([7, 8, 7]))
    >>> average.tolist(), first.tolist()
    ([0.8333333333333333], [[1.0, 0.4, 0.2]])
    """
    average, first = np.zeros(len(labels)), np.zeros((len(labels), len(RECALLED)))
    size = max(1, SORTED // len(keys))
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        scores = fusion_sum(fusion_weights, queries[part, None], keys)
        relevant = key_labels == labels[part, None]
        relevant = np.take_along_axis(relevant, np.lexsort((relevant, -scores)), axis=1)
        hits = relevant.cumsum(axis=1)
        average[part] = (relevant * hits / np.arange(1, len(keys) + 1)).sum(axis=1) / hits[:, -1]
        for column, k in enumerate(RECALLED):
            first[part, column] = hits[:, min(k, len(keys)) - 1] / k
    return average, first


def retrieval_metrics(
    query: np.ndarray,
    target: np.ndarray,
    labels: np.ndarray,
    target_labels: np.ndarray,
    names: tuple[str, str],
    fusion_weights: np.ndarray | None = None,
    several: bool = False,
) -> tuple[dict[str, float], np.ndarray]:
    """Return the metrics of a search both ways, and the rank of each query's best target, (Q,).

    ``R@k``: the share of the queries that find one of their own among the first k; ``median_rank`` of the first that is
    theirs; ``mAP``, the mean over queries of the average precision, which is the mean reciprocal rank where each has one of
    its own; with `several`, ``P@k``: the share of its own among the first k.

    Parameters
    ----------
    query, target : ndarray
        ``(Q, n)`` and ``(G, n)``, whose products, weighted by `fusion_weights` ``(n,)``, are the scores.
    labels, target_labels : ndarray
        ``(Q,)`` and ``(G,)``, integers: what is equal belongs together.
    names : tuple of str
        Of the two sides, in the metrics' names.
    several : bool, optional
        Whether a query may have several targets of its own by intent, and not only by chance.
    """
    metrics: dict[str, float] = {}
    one, other = (query, labels), (target, target_labels)
    found = []
    for (a, b), (queries, own), (keys, theirs) in ((names, one, other), (names[::-1], other, one)):
        rank = best_ranks(queries, keys, own, theirs, fusion_weights)
        found.append(rank)
        metrics |= {f"{a}_to_{b}_R@{k}": float((rank <= k).mean()) for k in RECALLED}
        average, first = precisions(queries, keys, own, theirs, fusion_weights)
        if several:
            metrics |= {f"{a}_to_{b}_P@{k}": float(first[:, column].mean()) for column, k in enumerate(RECALLED)}
        metrics |= {f"{a}_to_{b}_mAP": float(average.mean()), f"{a}_to_{b}_median_rank": float(np.median(rank))}
    return metrics, found[0]


def expected_hits(labels: np.ndarray, key_labels: np.ndarray, k: int) -> np.ndarray:
    """Return for each query the probability that a random order has a key of its label among the first k.

    Examples
    --------
    >>> expected_hits(np.array([0, 1]), np.array([0, 1, 1, 2]), 1).tolist()
    [0.25, 0.5]
    """
    own, size = np.diff(_positives(labels, key_labels)[0]), len(key_labels)
    drawn = np.arange(min(k, size))  # the places, one after the other, each of which misses
    return 1 - np.prod(np.clip((size - own[:, None] - drawn) / (size - drawn), 0, 1), axis=1)


def chance(metric: str, labels: np.ndarray, key_labels: np.ndarray | None = None) -> float | None:
    """Return a metric of always the commonest class, or of a random order of the keys; None for other metrics.

    Examples
    --------
    >>> chance("accuracy", np.array([0, 0, 0, 1])), chance("balanced_accuracy", np.array([0, 0, 0, 1]))
    (0.75, 0.5)
    """
    if key_labels is not None:
        kind, _, k = metric.rpartition("_")[2].partition("@")
        if kind == "R":
            return float(expected_hits(labels, key_labels, int(k)).mean())
        if kind == "P":
            own = np.diff(_positives(labels, key_labels)[0])
            return float((own * min(int(k), len(key_labels)) / len(key_labels) / int(k)).mean())
        return None
    if labels.ndim > 1:
        held = labels.mean(axis=0)
        return float(held[held > 0].mean()) if metric == "average_precision" else None
    held = np.bincount(labels)
    held = held[held > 0]
    share = held.max() / len(labels)
    levels = {
        "accuracy": share,
        "balanced_accuracy": 1 / len(held),
        "macro_f1": 2 * share / (1 + share) / len(held),
        "average_precision": 1 / len(held),
    }
    return float(levels[metric]) if metric in levels else None


def row_scores(metric: str, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each row's share in a metric of classes or numbers, (N,), whose mean is the metric.

    Parameters
    ----------
    metric : str
        One that models can be compared by.
    values : ndarray
        ``(N, C)``: logits, or predicted numbers in the first column.
    labels : ndarray
        ``(N,)`` classes or numbers, or ``(N, C)`` of multi-label classification.

    Notes
    -----
    Where the metric is no mean over rows, shares are linear in the rows about their mean (the metric's influence function),
    which is what an interval over rows needs.

    Examples
    --------
    >>> logits = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    >>> row_scores("balanced_accuracy", logits, np.array([0, 1, 1])).tolist()
    [0.75, 0.375, 1.125]
    """
    count = len(values)
    if metric == "mae":
        return np.abs(values[:, 0] - labels)
    if metric == "pearson":
        a, b = _unit(values[:, 0]) * count**0.5, _unit(labels) * count**0.5
        return a * b + (a @ b / count) * (1 - (a**2 + b**2) / 2) * bool(a.any() and b.any())
    wanted = labels.astype(bool) if labels.ndim > 1 else labels[:, None] == np.arange(values.shape[1])
    given = values > 0 if labels.ndim > 1 else values.argmax(axis=1)[:, None] == np.arange(values.shape[1])
    if metric in ("accuracy", "subset_accuracy"):
        return (given == wanted).all(axis=1).astype(float)
    both, either = (given & wanted).astype(float), given.astype(float) + wanted
    if metric == "micro_f1":
        return _of_ratio(2 * both.sum(axis=1, keepdims=True), either.sum(axis=1, keepdims=True))
    occurring = wanted.any(axis=0)
    if metric == "macro_f1":
        return _of_ratio(2 * both[:, occurring], either[:, occurring])
    if metric == "balanced_accuracy":
        return _of_ratio(both[:, occurring], wanted[:, occurring])
    scores = values if labels.ndim > 1 else softmax(values, axis=1)
    pairs = zip(scores.T[occurring], wanted.T[occurring], strict=True)
    return np.mean([_of_precisions(scores, own) for scores, own in pairs], axis=0)


def _of_precisions(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the rows' shares, (N,), in a class's average precision: in the precision at own rows and at lower ones."""
    count, held = len(scores), own.sum()
    places, order = np.sort(scores[own]), np.sort(scores)
    reached = 1 - np.searchsorted(order, places) / count  # the share of all rows that score as much or more
    precision = (held - np.searchsorted(places, places)) / count / reached
    average = precision.mean()
    lower = np.searchsorted(places, scores, side="right")  # own rows that score as much or less
    ones, precisions = (np.concatenate([[0], np.cumsum(x / reached)]) for x in (np.ones(held), precision))
    shares = average + (own * ones[lower] - precisions[lower]) / held
    shares[own] += count / held * (precision[np.searchsorted(places, scores[own])] - average)
    return shares


def _of_ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the rows' shares, (N,), in the mean over columns of ``sum(above) / sum(below)``, 0 where that is 0 / 0."""
    total = below.sum(axis=0).clip(min=1e-300)
    ratio = above.sum(axis=0) / total
    return (ratio + len(above) * (above - ratio * below) / total).mean(axis=1)


def better(metric: str) -> int:
    """Return 1 if more of a metric is better, else -1."""
    return -1 if metric in ("mae", "ece") or metric.endswith("median_rank") else 1


def bounds(metric: str) -> tuple[float, float]:
    """Return the range that a metric never leaves."""
    if metric.endswith("median_rank"):
        return 1, np.inf
    return {"mae": (0, np.inf), "pearson": (-1, 1)}.get(metric, (0, 1))
