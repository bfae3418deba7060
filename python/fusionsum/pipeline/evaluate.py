"""Step 5: the models' outputs on rows, what is measured on them, and how the models compare.

What lives here: outputs with modalities withheld, combined, and with decisions tuned; the record of an evaluation. What
lives elsewhere: the metrics (``metrics.py``), intervals and tests (``compare.py``), an answer taken apart
(``explain.py``), the report (``report.py``), the names of the models (``fuse.py``), the splits and seeds that are
evaluated (``predictor.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from scipy.special import expit, log_softmax, logit, softmax
from torch import Tensor, nn

from .compare import Difference, Interval, difference
from .config import Config
from .explain import Explained, answers, explain
from .fuse import ALONE, FUSED, FusionModel, TwoTowers, combined_models, input_modalities, sides
from .labels import tuned_offsets
from .manifest import Manifest
from .metrics import (
    better,
    chance,
    classification_metrics,
    expected_hits,
    multilabel_metrics,
    regression_metrics,
    retrieval_metrics,
    row_scores,
)
from .preprocess import item_numbers
from .processes import here
from .run import History
from .train import EVALUATED, Rows

# [split][model][condition][metric]: one value per seed
Results = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
GIVEN = "given"  # the split of rows that are not the run's own
CHANCE = "chance"  # among the models: always the commonest class, a random order, the training labels' mean


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
    encoded = here().mapped(lambda part: tower.encode(rows.batch(part)[0]), chosen.split(EVALUATED))
    features, masks = ([torch.cat(parts) for parts in zip(*side, strict=True)] for side in zip(*encoded, strict=True))
    target = weights = None
    if isinstance(model, TwoTowers):
        assert gallery is not None
        others, numbers = gallery
        parts = here().mapped(lambda part: model.target(others.batch(part)[0]), numbers.split(EVALUATED))
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
        ("late-product", "multilabel"): lambda part: part.values,
        ("score-sum", "multilabel"): lambda part: expit(part.values),
        ("score-sum", "retrieval"): lambda part: part.values,
        ("score-sum", "regression"): lambda part: part.values,
    }[name, kind]
    known = np.array([part.known for part in parts])
    terms = [np.where(part.known[:, None], scored(part), 0) for part in parts]
    if kind == "retrieval":  # a sum of cosines is the scalar product of the vectors joined
        gallery = np.concatenate([part.gallery for part in parts if part.gallery is not None], axis=1)
        return Outputs(np.concatenate(terms, axis=1), np.any(known, axis=0), gallery)
    total = np.sum(terms, axis=0)
    if kind == "regression" or (kind, name) == ("multilabel", "score-sum"):
        total = total / known.sum(axis=0).clip(min=1)[:, None]
        if kind == "multilabel":  # back to logits
            total = logit(total.clip(1e-12, 1 - 1e-12))
    elif kind == "classification" and name == "score-sum":
        total = np.log(total.clip(min=1e-12))  # back to logits: all equal for a row without any modality
    return Outputs(total, np.any(known, axis=0))


def _with_combined(config: Config, made: dict[str, Outputs], withheld: str | None = None) -> dict[str, Outputs]:
    """Add the combinations of the unimodal models' outputs, without the model of the modality that is withheld."""
    alone = [output for name, output in made.items() if name.endswith(ALONE) and name != f"{withheld}{ALONE}"]
    return made | {name: combine(name, config.task.kind, alone) for name in combined_models(config) if alone}


def tuned(config: Config, models: Mapping[str, nn.Module], rows: Rows, chosen: Tensor) -> dict[str, list[float] | None]:
    """Return by model, combinations too, the offsets of its decisions that are best on some rows (`tuned_offsets`)."""
    if not config.task.tuned or not len(chosen):
        return {}
    made = _with_combined(config, {name: outputs(model, rows, chosen)[Condition()] for name, model in models.items()})
    labels = rows.labels[chosen].numpy()
    return {name: tuned_offsets(config.task, output.values, labels) for name, output in made.items()}


@dataclass(frozen=True, eq=False)
class Measured:
    """One seed's models on one split: their metrics ``[model][condition][metric]``, and what comparisons and plots need.

    `rows` (N,) are the rows' numbers in the manifest, `labels` (N,) their labels, (N, C) if they are several. `scores` (N,)
    of each model and, where it is known, of `CHANCE`: each row's share in the metric that models are compared by, of which
    more is better; their mean is the metric, or its negative. `levels`: the metrics of chance that are known.
    `probabilities` (N, C) and `predicted`, like the labels, are the fused model's; None where the task has no classes.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    rows: np.ndarray
    labels: np.ndarray
    scores: dict[str, np.ndarray]
    levels: dict[str, float]
    probabilities: np.ndarray | None = None
    predicted: np.ndarray | None = None
    explained: Explained | None = None


def measure(
    config: Config,
    models: Mapping[str, nn.Module],
    rows: Rows,
    chosen: Tensor,
    scale: float = 1.0,
    offsets: Mapping[str, Sequence[float] | None] = MappingProxyType({}),
    explained: bool = False,
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
    offsets : mapping of str to sequence of float, optional
        By model, what is added to its logits before a class is decided on.
    explained : bool, optional
        Whether to take the fused model's answers apart.
    """
    kind = config.task.kind
    labels = rows.labels[chosen].numpy()
    gallery, gallery_labels = None, None
    several = config.task.positives == "label"
    if kind == "retrieval":
        targets = item_numbers([rows.columns[name].index.numpy() for name in config.task.target])[chosen.numpy()]
        _, first = np.unique(np.stack([targets, labels]), axis=1, return_index=True)
        gallery = rows, chosen[torch.from_numpy(first)]
        gallery_labels = labels[first]

    def metrics(output: Outputs, offset: Sequence[float] | None) -> tuple[dict[str, float], np.ndarray]:
        """Return the metrics, and each row's share in the one that models are compared by."""
        if kind == "retrieval":
            assert output.gallery is not None and gallery_labels is not None
            found, rank = retrieval_metrics(
                output.values, output.gallery, labels, gallery_labels, sides(config), output.fusion_weights, several
            )
            return found, rank <= 10
        values, wanted = output.values.astype(np.float64), labels
        if kind == "classification":
            found = classification_metrics(values, labels, offset)
        elif kind == "multilabel":
            found = multilabel_metrics(values, labels, offset)
        else:
            values, wanted = values * scale, labels.astype(np.float64) * scale
            found = regression_metrics(values[:, 0], wanted)
        metric = headline(config)
        decided = offset is not None and metric != "average_precision"
        return found, row_scores(metric, values + np.asarray(offset) if decided else values, wanted)

    inputs = input_modalities(config)
    withheld = inputs if len(inputs) > 1 else []
    conditions = [Condition(), *(Condition(name, zero_fill) for name in withheld for zero_fill in (False, True))]
    every = {name: outputs(model, rows, chosen, gallery, conditions) for name, model in models.items()}
    found: dict[str, dict[str, dict[str, float]]] = {}
    scores: dict[str, np.ndarray] = {}
    for condition in conditions:
        of_model = {name: made[condition] for name, made in every.items()}
        # A unimodal model is measured on all modalities only, and has no zero-filled counterpart.
        if not condition.zero_fill:
            of_model = _with_combined(config, of_model, condition.withheld)
        for name, output in of_model.items():
            if not (condition.withheld and name.endswith(ALONE)):
                values, of_rows = metrics(output, offsets.get(name))
                found.setdefault(name, {})[str(condition)] = values
                scores.setdefault(name, of_rows.astype(np.float64))  # with all modalities, which come first
    fused = every[FUSED][Condition()]
    metric = headline(config)
    scores = {name: better(metric) * of_rows for name, of_rows in scores.items()}
    nothing = _of_chance(config, labels, gallery_labels, scale)
    if nothing is not None:
        scores[CHANCE] = better(metric) * nothing
    apart = None
    if explained:
        target = None
        if gallery is not None and fused.gallery is not None and gallery_labels is not None:
            target = fused.gallery, gallery_labels, gallery[1].numpy(), fused.fusion_weights
        shift = offsets.get(FUSED)
        values = fused.values if shift is None else fused.values + np.asarray(shift)
        answered = answers(kind, chosen.numpy(), values, labels, scale, target)
        apart = explain(models[FUSED], rows, chosen, answered)
    return Measured(
        metrics=found,
        rows=chosen.numpy(),
        labels=labels,
        scores=scores,
        levels=_levels(found[FUSED]["all"], labels, gallery_labels, sides(config)),
        probabilities=_probabilities(kind, fused.values),
        predicted=_decided(kind, fused.values, offsets.get(FUSED)),
        explained=apart,
    )


def _probabilities(kind: str, values: np.ndarray) -> np.ndarray | None:
    if kind == "multilabel":
        return expit(values)
    return softmax(values, axis=1) if kind == "classification" else None


def _decided(kind: str, values: np.ndarray, offset: Sequence[float] | None) -> np.ndarray | None:
    shifted = values if offset is None else values + np.asarray(offset)
    if kind == "multilabel":
        return shifted > 0
    return shifted.argmax(axis=1) if kind == "classification" else None


def headline(config: Config) -> str:
    """Return the metric that models are compared by: the task's, or recall at 10 of the targets."""
    query, target = sides(config)
    return config.task.compared_by or f"{query}_to_{target}_R@10"


def _of_chance(
    config: Config, labels: np.ndarray, gallery_labels: np.ndarray | None, scale: float
) -> np.ndarray | None:
    """Return the rows' scores of what needs no model; the training labels' mean is the labels' 0."""
    if gallery_labels is not None:
        return expected_hits(labels, gallery_labels, 10)
    metric = headline(config)
    if config.task.kind == "classification":
        commonest = np.zeros((len(labels), labels.max() + 1))
        commonest[:, np.bincount(labels).argmax()] = 1
        return row_scores(metric, commonest, labels)
    if metric == "mae":
        return np.abs(labels.astype(np.float64)) * scale
    return None


def _levels(
    metrics: Mapping[str, float], labels: np.ndarray, gallery_labels: np.ndarray | None, names: tuple[str, str]
) -> dict[str, float]:
    """Return the metrics of chance that are known; a search by target goes over all rows, not over distinct targets."""
    if not np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1:
        return {}
    found = {}
    for metric in metrics:
        there = (labels, gallery_labels)
        if gallery_labels is not None and not metric.startswith(f"{names[0]}_to_"):
            there = (gallery_labels, labels)
        found[metric] = chance(metric, *there)
    return {metric: level for metric, level in found.items() if level is not None}


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
    measured : dict
        By split, what was measured with each seed.
    split : str
        How the rows came by their splits: ``manifest`` and ``by-seed`` as the configuration says, or ``given``: rows of
        another manifest, all of them evaluated.
    manifest : Manifest
        All rows that are used.
    messages : list of str
        A line for each row that was left out.
    parameters : dict
        The number of trainable parameters of each trained model.
    histories : dict
        By model and seed, the epochs of its training.
    classes : tuple of str
        Classification's labels, in the order of the outputs.
    coverage : dict
        By modality, of the first seed's splits.
    notes : sequence of str
        What else is worth saying of the rows.
    """

    config: Config
    measured: dict[str, list[Measured]]
    split: str
    manifest: Manifest
    messages: list[str]
    parameters: dict[str, int]
    histories: dict[tuple[str, int], History]
    classes: tuple[str, ...]
    coverage: dict[str, Coverage]
    notes: Sequence[str] = ()

    @cached_property
    def results(self) -> Results:
        """One value per seed, as ``results[split][model][condition][metric]``."""
        return {split: over_seeds(of_seeds) for split, of_seeds in self.measured.items()}

    @property
    def rows(self) -> int:
        """How many rows are used."""
        return len(self.manifest)

    @property
    def metric(self) -> str:
        """The metric that models are compared by."""
        return headline(self.config)

    def differences(self, split: str, model: str = FUSED) -> dict[str, Difference]:
        """Return how much better a model is than each other and than `CHANCE`, in the metric that they are compared by.

        Rows of one group are drawn together. Where each seed draws its splits, the seeds' interval allows for their
        overlap.
        """
        if (split, model) in self._compared:
            return self._compared[split, model]
        of_seeds, unit = self.measured[split], self._units
        overlap = None
        if self.split == "by-seed":
            counts = next(iter(self.coverage.values())).rows
            overlap = counts[split][1] / counts["train"][1]
        units = [unit[m.rows] for m in of_seeds]
        ours = [m.scores[model] for m in of_seeds]
        others = [name for name in of_seeds[0].scores if name != model]
        found = {name: difference(ours, [m.scores[name] for m in of_seeds], units, overlap) for name in others}
        return self._compared.setdefault((split, model), found)

    def over_rows(self, split: str, model: str) -> Interval:
        """Return the metric that models are compared by, with the interval of what other rows would give."""
        of_seeds, sign = self.measured[split], better(self.metric)
        ours = [sign * m.scores[model] for m in of_seeds]
        units = [self._units[m.rows] for m in of_seeds]
        return difference(ours, [np.zeros(len(scores)) for scores in ours], units).rows.interval

    @cached_property
    def contenders(self) -> dict[str, list[str]]:
        """The model with the best mean, then those that it is not certainly better than, best first; by split."""
        metric, found = self.metric, {}
        for split, models in self.results.items():
            means = {name: better(metric) * float(np.mean(models[name]["all"][metric])) for name in models}
            order = sorted(models, key=lambda name: -means[name])
            against = self.differences(split, order[0])
            found[split] = [order[0], *(name for name in order[1:] if not against[name].certain)]
        return found

    @cached_property
    def _compared(self) -> dict[tuple[str, str], dict[str, Difference]]:
        """The differences that were asked for."""
        return {}

    @cached_property
    def _units(self) -> np.ndarray:
        return self.manifest.groups()
