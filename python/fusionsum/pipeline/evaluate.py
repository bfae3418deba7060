"""Step 5: the models' outputs on rows, and their metrics.

What lives here: outputs with modalities withheld, the combination of unimodal models, metrics and their intervals, and
the record of an evaluation. What lives elsewhere: plots and the report (``report.py``), the names of the models
(``fuse.py``), the splits and seeds that are evaluated (``predictor.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from ..api import fusion_sum
from ..search import ranks
from .config import Config
from .fuse import ALONE, FUSED, FusionModel, TwoTowers, combined_models, input_modalities, sides
from .run import History
from .train import EVALUATED, Rows

# [split][model][condition][metric]: one value per seed
Results = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
GIVEN = "given"  # the split of rows that are not the run's own
BINS = 15  # of confidence, for the calibration error
RECALLED = (1, 5, 10)


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on N rows.

    `values`: logits (N, C); predictions (N, 1); or retrieval's queries (N, dim), whose scores are their products with the
    targets of the `gallery` (G, dim), weighted by `fusion_weights` (dim,), None for cosines. `known` (N,): whether a row
    has any of the modalities that the model encodes.
    """

    values: np.ndarray
    known: np.ndarray
    gallery: np.ndarray | None = None
    fusion_weights: np.ndarray | None = None


@dataclass(frozen=True)
class Condition:
    """All modalities, or one of them withheld: through ``present``, or with `zero_fill` as features of 0."""

    withheld: str | None = None
    zero_fill: bool = False

    def __str__(self) -> str:
        if self.withheld is None:
            return "all"
        return f"without {self.withheld}{', zero-filled' if self.zero_fill else ''}"


@torch.no_grad()
def outputs(
    model: nn.Module,
    rows: Rows,
    chosen: Tensor,
    gallery: tuple[Rows, Tensor] | None = None,
    conditions: Sequence[Condition] = (Condition(),),
) -> dict[Condition, Outputs]:
    """Return a model's outputs on some rows under some conditions; its encoders are applied once.

    Parameters
    ----------
    model : FusionModel or TwoTowers
    rows, chosen
        The data, and the numbers of the rows.
    gallery : tuple of Rows and Tensor, optional
        Retrieval: the rows among whose targets is searched, and their numbers.
    conditions : sequence of Condition, optional
        Withholding a modality that the model does not encode changes nothing.

    Returns
    -------
    dict of Condition to Outputs
    """
    model.eval()
    tower = model.query if isinstance(model, TwoTowers) else model
    assert isinstance(tower, FusionModel)
    encoded = [tower.encode(rows.batch(part)[0]) for part in chosen.split(EVALUATED)]
    features, masks = ([torch.cat(parts) for parts in zip(*side, strict=True)] for side in zip(*encoded, strict=True))
    target = weights = None
    if isinstance(model, TwoTowers):
        assert gallery is not None
        others, numbers = gallery
        parts = [model.target(others.batch(part)[0]) for part in numbers.split(EVALUATED)]
        target = nn.functional.normalize(torch.cat(parts), dim=-1).numpy()
        weights = model.fusion_weights.detach().numpy()
    found = {}
    for condition in conditions:
        there = [
            torch.zeros_like(mask) if name == condition.withheld else mask
            for name, mask in zip(tower.encoders, masks, strict=True)
        ]
        values, known = tower.fuse(features, there, condition.zero_fill), torch.stack(there).any(dim=0).numpy()
        if target is not None:
            values = nn.functional.normalize(values, dim=-1)
        found[condition] = Outputs(values.numpy(), known, target, weights)
    return found


def combine(name: str, kind: str, parts: Sequence[Outputs]) -> Outputs:
    """Combine the outputs of unimodal models; each row is combined of the models whose modality it has.

    ``late-product`` multiplies the classes' probabilities; ``score-sum`` adds probabilities or cosines, or takes the mean
    of predicted numbers.
    """
    scored = {
        ("late-product", "classification"): lambda part: log_softmax(part.values, axis=1),
        ("score-sum", "classification"): lambda part: softmax(part.values, axis=1),
        ("score-sum", "retrieval"): lambda part: part.values,
        ("score-sum", "regression"): lambda part: part.values,
    }[name, kind]
    known = np.array([part.known for part in parts])
    terms = [np.where(part.known[:, None], scored(part), 0) for part in parts]
    if kind == "retrieval":  # a sum of cosines is the scalar product of the vectors joined
        gallery = np.concatenate([part.gallery for part in parts if part.gallery is not None], axis=1)
        return Outputs(np.concatenate(terms, axis=1), np.any(known, axis=0), gallery)
    total = np.sum(terms, axis=0)
    if kind == "regression":
        total = total / known.sum(axis=0).clip(min=1)[:, None]
    elif kind == "classification" and name == "score-sum":
        total = np.log(total.clip(min=1e-12))  # back to logits: all equal for a row without any modality
    return Outputs(total, np.any(known, axis=0))


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows, the mean confidence and the accuracy of each of `BINS` equal bins of confidence (NaN if empty)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights=v, minlength=BINS) / count for v in (confidence, right)]
    return count, means[0], means[1]


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return accuracy, macro-F1 over the classes that occur, and the expected calibration error.

    References
    ----------
    C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.

    Examples
    --------
    >>> classification_metrics(np.array([[9.0, 0.0], [9.0, 0.0]]), np.array([0, 1]))["accuracy"]
    0.5
    """
    _finite(logits)
    probabilities = softmax(logits, axis=1)
    predicted = probabilities.argmax(axis=1)
    count, confidence, accuracy = calibration(probabilities, labels)
    gap = np.nansum(count * np.abs(confidence - accuracy)) / len(labels)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", labels=np.unique(labels), zero_division=0)),
        "ece": float(gap),
    }


def regression_metrics(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean absolute error and Pearson's correlation (0 where one side does not vary).

    Examples
    --------
    >>> regression_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["mae"]
    0.3333333333333333
    """
    _finite(predicted)
    a, b = predicted - predicted.mean(), labels - labels.mean()
    spread = float(np.linalg.norm(a) * np.linalg.norm(b))
    return {
        "mae": float(np.abs(predicted - labels).mean()),
        "pearson": float(a @ b) / spread if spread > 1e-12 else 0.0,
    }


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
            _finite(values)
    # The numbers of the keys of query b's label: own[offsets[b] : offsets[b + 1]].
    order = np.argsort(key_labels, kind="stable")
    first, end = (np.searchsorted(key_labels[order], labels, side) for side in ("left", "right"))
    offsets = np.concatenate([[0], np.cumsum(end - first)])
    rows = np.repeat(np.arange(len(labels)), end - first)
    own = order[np.arange(offsets[-1]) + (first - offsets[:-1])[rows]]
    scores = fusion_sum(fusion_weights, queries[rows], keys[own])
    best = own[np.lexsort((scores, rows))[offsets[1:] - 1]]
    return ranks(queries, keys, best, fusion_weights=fusion_weights, exclude=(offsets, own), ties="pessimistic")


def _finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ArithmeticError("the model's output is not finite")


def retrieval_metrics(
    found: Outputs, labels: np.ndarray, gallery_labels: np.ndarray, query: str, target: str
) -> dict[str, float]:
    """Return recall at 1, 5 and 10 and the median rank, of targets by queries and of queries by targets.

    Parameters
    ----------
    found : Outputs
        Of retrieval.
    labels, gallery_labels : ndarray
        The numbers of the queries' own targets, ``(N,)``, and of the gallery's, ``(G,)``.
    query, target : str
        The names of the two sides in the metrics' names.
    """
    assert found.gallery is not None
    one, other = (found.values, labels), (found.gallery, gallery_labels)
    metrics: dict[str, float] = {}
    for a, b, (queries, of_queries), (keys, of_keys) in ((query, target, one, other), (target, query, other, one)):
        rank = best_ranks(queries, keys, of_queries, of_keys, found.fusion_weights)
        metrics |= {f"{a}_to_{b}_R@{k}": float((rank <= k).mean()) for k in RECALLED}
        metrics[f"{a}_to_{b}_median_rank"] = float(np.median(rank))
    return metrics


def chance(kind: str, labels: np.ndarray, metric: str) -> float | None:
    """Return the metric of always the commonest class, or of a random order of the gallery; None for other metrics."""
    if kind == "classification" and metric == "accuracy":
        return float(np.bincount(labels).max() / len(labels))
    if kind == "retrieval" and "_R@" in metric:
        k, size = int(metric.rpartition("@")[2]), len(np.unique(labels))
        return min(1.0, k / size)
    return None


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its 95% interval by Student's t; None for one seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of one value per seed, with its interval.

    Examples
    --------
    >>> str(interval([0.5, 0.6, 0.7]))
    '0.600 ± 0.248'
    """
    if len(values) < 2:
        return Interval(float(values[0]), None)
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Interval(float(np.mean(values)), float(student.ppf(0.975, len(values) - 1)) * spread)


def headline(kind: str, metrics: Mapping[str, object], target: str = "") -> str:
    """Return the metric that models are compared by: accuracy, MAE, or recall at 10 of the targets."""
    if kind == "retrieval":
        return next(name for name in metrics if name.endswith(f"_to_{target}_R@10"))
    return "accuracy" if kind == "classification" else "mae"


def better(metric: str) -> int:
    """Return 1 if more of a metric is better, else -1."""
    return -1 if metric in ("mae", "ece") or metric.endswith("median_rank") else 1


@dataclass(frozen=True, eq=False)
class Measured:
    """One seed's models on one split: their metrics ``[model][condition][metric]``, and the arrays that plots need.

    `labels` (N,) are the rows' labels; `probabilities` (N, C) the fused model's, None where the task has no classes.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    labels: np.ndarray
    probabilities: np.ndarray | None


def measure(
    config: Config, models: Mapping[str, nn.Module], rows: Rows, chosen: Tensor, scale: float = 1.0
) -> Measured:
    """Measure the models of one seed on some rows, with all modalities and with each withheld.

    Parameters
    ----------
    config : Config
    models : mapping of str to FusionModel or TwoTowers
    rows, chosen
        The data, and the numbers of the rows.
    scale : float, optional
        Regression: the labels' unit, by which this seed's training divided them.
    """
    kind = config.task.kind
    labels = rows.labels[chosen].numpy()
    gallery = None
    if kind == "retrieval":
        _, first = np.unique(labels, return_index=True)
        gallery = rows, chosen[torch.from_numpy(first)]

    def metrics(output: Outputs) -> dict[str, float]:
        if kind == "classification":
            return classification_metrics(output.values, labels)
        if kind == "regression":
            found = regression_metrics(output.values[:, 0].astype(np.float64), labels.astype(np.float64))
            return found | {"mae": found["mae"] * scale}
        assert gallery is not None
        return retrieval_metrics(output, labels, rows.labels[gallery[1]].numpy(), *sides(config))

    inputs = input_modalities(config)
    withheld = inputs if len(inputs) > 1 else []
    conditions = [Condition(), *(Condition(name, zero_fill) for name in withheld for zero_fill in (False, True))]
    every = {name: outputs(model, rows, chosen, gallery, conditions) for name, model in models.items()}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for condition in conditions:
        of_model = {name: made[condition] for name, made in every.items()}
        # A unimodal model is measured on all modalities only. A combination leaves the withheld modality's model out,
        # which has no zero-filled counterpart.
        alone = [of_model[name] for name in of_model if name.endswith(ALONE) and name != f"{condition.withheld}{ALONE}"]
        if alone and not condition.zero_fill:
            of_model |= {name: combine(name, kind, alone) for name in combined_models(config)}
        for name, output in of_model.items():
            if not (condition.withheld and name.endswith(ALONE)):
                found.setdefault(name, {})[str(condition)] = metrics(output)
    fused = every[FUSED][Condition()].values
    return Measured(found, labels, softmax(fused, axis=1) if kind == "classification" else None)


def over_seeds(measured: Sequence[Measured]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return ``[model][condition][metric]``: a list of the seeds' values."""
    return {
        model: {
            condition: {metric: [m.metrics[model][condition][metric] for m in measured] for metric in values}
            for condition, values in conditions.items()
        }
        for model, conditions in measured[0].metrics.items()
    }


@dataclass(frozen=True)
class Coverage:
    """The rows that have a modality, and all rows, of each split; the items that training and test rows share."""

    rows: dict[str, tuple[int, int]]
    shared: int | None


def coverage(items: np.ndarray, parts: Mapping[str, np.ndarray], tests: Sequence[str]) -> Coverage:
    """Count a modality's rows and shared items.

    Parameters
    ----------
    items : ndarray
        ``(N,)``: the number of each row's item, or -1.
    parts : mapping of str to ndarray
        By split, the numbers of its rows.
    tests : sequence of str
        The splits for testing. Without a split ``train`` there are no shared items to count.

    Examples
    --------
    >>> coverage(np.array([7, -1, 7, 8]), {"train": np.array([0, 1]), "test": np.array([2, 3])}, ["test"])
    Coverage(rows={'train': (1, 2), 'test': (2, 2)}, shared=1)
    """
    rows = {split: (int((items[part] >= 0).sum()), len(part)) for split, part in parts.items()}
    if "train" not in parts:
        return Coverage(rows, None)
    common = np.intersect1d(items[parts["train"]], items[np.concatenate([parts[name] for name in tests])])
    return Coverage(rows, int((common >= 0).sum()))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `MultimodalPredictor.evaluate`, with all that ``report.write_report`` shows.

    Attributes
    ----------
    config : Config
    results : dict
        ``[split][model][condition][metric]``: one value per seed.
    split : str
        How the rows came by their splits: ``manifest`` and ``by-seed`` as the configuration says, or ``given``: rows of
        another manifest, all of them evaluated.
    manifest : str
        The file name of the rows' manifest.
    rows : int
        How many of them are used.
    messages : list of str
        A line for each row that was left out.
    parameters : dict
        The number of trainable parameters of each trained model.
    histories : dict
        By model and seed, the epochs of its training.
    classes : tuple of str
        Classification's labels, in the order of the outputs.
    labels, probabilities : dict
        By split, an array per seed: the rows' labels as numbers (N,), and the fused model's probabilities (N, C), no
        arrays where the task has no classes.
    coverage : dict
        By modality, of the first seed's splits.
    """

    config: Config
    results: Results
    split: str
    manifest: str
    rows: int
    messages: list[str]
    parameters: dict[str, int]
    histories: dict[tuple[str, int], History]
    classes: tuple[str, ...]
    labels: dict[str, list[np.ndarray]]
    probabilities: dict[str, list[np.ndarray]]
    coverage: dict[str, Coverage]

    @property
    def metric(self) -> str:
        """The metric that models are compared by."""
        metrics = next(iter(self.results.values()))[FUSED]["all"]
        return headline(self.config.task.kind, metrics, sides(self.config)[1])
