"""Why the fused model answered as it did: its output taken apart, over many rows and for the rows that a report shows.

What lives here: which rows are shown, what each part of the output and each of its terms contributed to an answer, and what
the metric is without them. What lives elsewhere: the parts, `contributions` of a fusion layer (``nn/layer.py``); the rows'
pictures, texts and sounds (``items.py``), the page (``report.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor, nn

from .fuse import FusionModel, TwoTowers
from .train import Rows

EXPLAINED = 2000  # rows over which the contributions are averaged
AT_ONCE = 64  # rows whose contributions are held: each has up to terms * outputs * 2**modalities numbers
WORST, JOINT = 6, 3  # rows shown: the worst, and those that only an interaction gets right
FOUND = 3  # of a search

Modalities = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a part of the output did over many rows: its mean size, and the metric where it is replaced by its mean.

    `names`: the modalities on whose features it depends, none if only on what is missing. A term of an interaction has its
    number too, and its weight.
    """

    names: tuple[str, ...]
    size: float
    without: float | None
    term: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Example:
    """A row that is shown, one of the worst or (`joint`) one that is right by an interaction only.

    `row`: its number among all rows. Classification: the class that was `predicted`, its `confidence`, and the `rival`, the
    label if that is another class, else the second best; of several labels the one with the greatest loss, and the
    `confidence` that the row has it. Regression: the `error`, in the labels' unit. Retrieval: the `rank`
    of the first target that is right, and the rows of those `found` first. `parts`: what each part adds to the answer; of
    `terms`, by number, each whole interaction's.
    """

    row: int
    joint: bool = False
    predicted: int | None = None
    rival: int | None = None
    confidence: float | None = None
    error: float | None = None
    rank: int | None = None
    found: tuple[int, ...] = ()
    parts: tuple[tuple[tuple[str, ...], float], ...] = ()
    terms: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Explained:
    """What `explain` found: of `rows` rows the parts and the terms, the larger first, and the rows to show."""

    rows: int
    parts: tuple[Part, ...]
    terms: tuple[Part, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answered on N rows, by task.

    `directions` (N, C): the combination of the outputs that is explained: of two classes' logits their difference; a
    label's logit; the number itself; of a search, by how much the score of the own target passes the best other's.
    `losses` (N,): more is worse, 0 is right. `values` (N, C), `labels` and `scale`: for `metric`.
    """

    kind: str
    directions: np.ndarray
    losses: np.ndarray
    values: np.ndarray
    labels: np.ndarray
    scale: float
    examples: list[Example]

    def metric(self, values: np.ndarray, some: np.ndarray) -> np.ndarray | None:
        """Return of outputs (..., n, C) of n rows whether each is right, or its error: (..., n); None for a search."""
        if self.kind == "retrieval":
            return None
        if self.kind == "multilabel":
            return ((values > 0) == (self.labels[some] > 0.5)).all(axis=-1).astype(float)
        if self.kind == "regression":
            return np.abs(values[..., 0] - self.labels[some]) * self.scale
        return (values.argmax(axis=-1) == self.labels[some]).astype(float)


def answers(
    kind: str,
    rows: np.ndarray,
    values: np.ndarray,
    labels: np.ndarray,
    scale: float = 1.0,
    target: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None] | None = None,
) -> Answers:
    """Say of each row what was answered, and what about it is to be explained.

    Parameters
    ----------
    kind : str
        The task.
    rows : ndarray
        ``(N,)``: the rows' numbers among all rows.
    values, labels : ndarray
        ``(N, C)`` and ``(N,)``, or ``(N, C)`` of several labels; the model's outputs, in a search of unit length.
    scale : float, optional
        Of regression: the labels' unit.
    target : tuple, optional
        Of a search: the targets ``(G, C)``, their labels, their rows, and the weights of a score's terms.
    """
    every = np.arange(len(values))
    if kind == "classification":
        probabilities = softmax(values, axis=1)
        predicted, second = np.argsort(-values, axis=1, kind="stable")[:, :2].T
        rival = np.where(predicted == labels, second, labels)
        directions = np.zeros(values.shape)
        directions[every, predicted], directions[every, rival] = 1, -1
        examples = [
            Example(int(row), predicted=int(p), rival=int(r), confidence=float(c))
            for row, p, r, c in zip(rows, predicted, rival, probabilities[every, predicted], strict=True)
        ]
        losses = np.where(predicted == labels, 0, probabilities[every, predicted])
    elif kind == "multilabel":
        yes = labels > 0.5
        losses = np.logaddexp(0, np.where(yes, -values, values))
        worst = losses.argmax(axis=1)
        directions = np.zeros(values.shape)
        directions[every, worst] = 1
        examples = [
            Example(int(row), predicted=int(k), confidence=float(p))
            for row, k, p in zip(rows, worst, expit(values[every, worst]), strict=True)
        ]
        losses = np.where(((values > 0) == yes).all(axis=1), 0, losses.max(axis=1))
    elif kind == "regression":
        errors = (values[:, 0] - labels) * scale
        directions, losses = np.full(values.shape, scale), np.abs(errors)
        examples = [Example(int(row), error=float(error)) for row, error in zip(rows, errors, strict=True)]
    else:
        assert target is not None
        directions, examples = _searched(rows, values, labels, *target)
        losses = np.array([float((e.rank or 1) - 1) for e in examples])
    return Answers(kind, directions, losses, values, labels, scale, examples)


def _searched(
    rows: np.ndarray,
    values: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    target_labels: np.ndarray,
    target_rows: np.ndarray,
    fusion_weights: np.ndarray | None,
) -> tuple[np.ndarray, list[Example]]:
    weighted = targets if fusion_weights is None else targets * fusion_weights
    directions, examples = np.zeros(values.shape), []
    for i, row in enumerate(rows):
        scores = weighted @ values[i]
        own = target_labels == labels[i]
        order = np.lexsort((own, -scores))  # in a tie, others come first
        best = order[np.argmax(own[order])]
        other = order[np.argmin(own[order])]
        directions[i] = weighted[best] - weighted[other]
        found = tuple(int(target_rows[j]) for j in order[:FOUND])
        examples.append(Example(int(row), rank=1 + int(np.argmax(own[order])), found=found))
    return directions, examples


@torch.no_grad()
def explain(model: nn.Module, rows: Rows, chosen: Tensor, answered: Answers) -> Explained:
    """Take the answers apart.

    Each contribution is against its mean over the rows: a part that is the same for every row explains none.

    Parameters
    ----------
    model : FusionModel or TwoTowers
        If its head has no `contributions`, there are only the examples.
    rows, chosen
        The data, and the numbers of the N rows.
    answered : Answers
        Of these rows.
    """
    tower = model.query if isinstance(model, TwoTowers) else model
    assert isinstance(tower, FusionModel)
    worst = np.argsort(-answered.losses, kind="stable")[:WORST]
    worst = worst[answered.losses[worst] > 0]
    if not hasattr(tower.head, "contributions"):
        return Explained(0, (), (), tuple(answered.examples[i] for i in worst))
    some = np.union1d(worst, np.arange(min(EXPLAINED, len(chosen))))
    names = list(tower.encoders)
    means: dict[Modalities, np.ndarray] = {}
    for _, parts in _contributions(tower, rows, chosen, some):
        for key, part in parts.items():
            means[key] = means.get(key, 0) + part.sum(axis=0) / len(some)
    keys = list(means)
    joint = [key for key in keys if len(key) > 1]
    count = max((means[key].shape[0] for key in joint), default=0)
    added = np.zeros((len(keys), len(some)))  # what each part, and each term's interactions, add to the answer
    of_term = np.zeros((count, len(some)))
    without = np.zeros((len(keys) + count + 1, len(some)))  # the metric without it; the last, without any interaction
    done = 0
    for numbers, parts in _contributions(tower, rows, chosen, some):
        place = slice(done, done + len(numbers))
        done += len(numbers)
        direction, values = answered.directions[numbers], answered.values[numbers].astype(np.float64)
        if answered.kind == "retrieval":  # where outputs are brought to unit length
            whole = sum(part.sum(axis=1) for part in parts.values())
            direction = direction / np.linalg.norm(whole, axis=1, keepdims=True).clip(min=1e-12)
        terms = np.zeros((len(numbers), count, values.shape[1]))
        for key in joint:
            terms[:, : len(means[key])] += parts[key] - means[key]
        wholes = np.stack([(parts[key] - means[key]).sum(axis=1) for key in keys])
        added[:, place] = np.einsum("kbc,bc->kb", wholes, direction)
        of_term[:, place] = np.einsum("btc,bc->tb", terms, direction)
        removed = np.concatenate([wholes, terms.swapaxes(0, 1), terms.sum(axis=1)[None]])
        found = answered.metric(values - removed, numbers)
        if found is not None:
            without[:, place] = found
    levels = without.mean(axis=1).tolist() if answered.kind != "retrieval" else [None] * len(without)
    weights = getattr(tower.head, "fusion_weights", None)
    alphas = [None] * count if weights is None or weights.numel() != count else weights.flatten().tolist()
    sizes, term_sizes = np.abs(added).mean(axis=1), np.abs(of_term).mean(axis=1)
    # The constant varies only where something is missing.
    kept = [k for k, key in enumerate(keys) if key or sizes[k] > 1e-6]
    summary = [Part(_names(names, keys[k]), float(sizes[k]), levels[k]) for k in kept]
    moving = np.flatnonzero(term_sizes).tolist()  # none where products were dropped
    each = [Part((), float(term_sizes[t]), levels[len(keys) + t], t, alphas[t]) for t in moving]
    only = added[[len(key) > 1 for key in keys]].sum(axis=0)
    turned = (answered.losses[some] == 0) & (without[-1] == 0) & (answered.kind == "classification")
    decided = sorted(np.flatnonzero(turned), key=lambda i: -only[i])[:JOINT]

    def shown(place: int, by_interaction: bool) -> Example:
        parts = sorted(((_names(names, keys[k]), float(added[k, place])) for k in kept), key=_size)
        terms = sorted(((t, float(of_term[t, place])) for t in moving), key=_size)
        example = answered.examples[some[place]]
        return replace(example, joint=by_interaction, parts=tuple(parts), terms=tuple(terms))

    places = np.searchsorted(some, worst)
    examples = [*(shown(int(i), False) for i in places), *(shown(int(i), True) for i in decided)]
    by_size = [tuple(sorted(found, key=lambda part: -part.size)) for found in (summary, each if count > 1 else [])]
    return Explained(len(some), by_size[0], by_size[1], tuple(examples))


def _size(pair: tuple[object, float]) -> float:
    return -abs(pair[1])


def _names(names: list[str], key: Modalities) -> tuple[str, ...]:
    return tuple(names[m] for m in key)


def _contributions(
    tower: FusionModel, rows: Rows, chosen: Tensor, some: np.ndarray
) -> Iterator[tuple[np.ndarray, dict[Modalities, np.ndarray]]]:
    """Yield the places of some rows in `chosen`, and the contributions of the head, (rows, terms, C) each."""
    for start in range(0, len(some), AT_ONCE):
        numbers = some[start : start + AT_ONCE]
        features, masks = tower.encode(rows.batch(chosen[torch.from_numpy(numbers)])[0])
        parts = tower.head.contributions(*features, present=masks)
        yield numbers, {key: part.detach().numpy().astype(np.float64) for key, part in parts.items()}
