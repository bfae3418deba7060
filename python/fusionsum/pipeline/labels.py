"""Labels: from a manifest's cells to numbers that a loss takes, and from a model's outputs back to cells.

What lives here: classes and their weights, sets of labels, the unit of regression, decision thresholds, rows of
predictions. What lives elsewhere: the losses (``train.py``), the metrics (``evaluate.py``), retrieval's targets
(``preprocess.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor

from .config import Task
from .errors import ConfigError, ManifestError
from .manifest import Manifest

SAFE = "'"  # what a cell of a table begins with that a spreadsheet would execute


def label_set(cell: Any, separator: str) -> tuple[str, ...]:
    """Return the labels of a cell of multi-label classification, a text or a list.

    Examples
    --------
    >>> label_set("cat| dog |", "|"), label_set(["cat", 7], "|"), label_set("", "|")
    (('cat', 'dog'), ('cat', '7'), ())
    """
    items = cell.split(separator) if isinstance(cell, str) else cell
    return tuple(dict.fromkeys(name for item in items if (name := str(item).strip())))


def learn(task: Task, trained: Sequence[Any], every: Sequence[Any]) -> dict[str, Any]:
    """Return what the labels of the training rows say: plain values, kept with the model.

    Parameters
    ----------
    task : Task
    trained : sequence
        The cells of the training rows.
    every : sequence
        The cells whose classes count: a drawn split may lack a rare class in training.

    Returns
    -------
    dict
        ``classes`` and ``weights``, one a class or None; or ``mean`` and ``scale``; or nothing.
    """
    if task.kind == "regression":
        values = np.array(trained, dtype=np.float64)
        return {"mean": float(values.mean()), "scale": float(values.std()) or 1.0}
    if task.kind == "retrieval":
        return {}
    several = task.kind == "multilabel"
    sets = [label_set(cell, task.separator) if several else (cell,) for cell in every]
    classes = sorted({name for names in sets for name in names})
    if len(classes) < (1 if several else 2):
        raise ConfigError(f"task: {task.kind} needs {'a label' if several else 'two classes'} or more, got {classes}")
    found: dict[str, Any] = {"classes": classes, "weights": None}
    if task.class_weights != "none":
        numbers = encode(task, found, trained)
        held = numbers.sum(dim=0) if several else torch.bincount(numbers, minlength=len(classes))
        found["weights"] = _weights(task, classes, held.double().numpy(), len(trained))
    return found


def _weights(task: Task, classes: Sequence[str], held: np.ndarray, rows: int) -> list[float]:
    """Return a weight for each class, of which `held` rows are: of a label, for the rows that have it.

    References
    ----------
    G. King and L. Zeng, "Logistic Regression in Rare Events Data", Political Analysis 9, 2001, section 4.2.
    """
    if isinstance(task.class_weights, dict):
        for name in task.class_weights:
            if name not in classes:
                raise ConfigError(f"task.class_weights: no row is {name!r}; there are: {', '.join(classes)}")
        return [task.class_weights.get(name, 1.0) for name in classes]
    if task.kind == "multilabel":
        return ((rows - held).clip(min=1) / held.clip(min=1)).tolist()
    return (rows / len(classes) / held.clip(min=1)).tolist()


def check_classes(task: Task, manifest: Manifest, classes: Sequence[str]) -> None:
    """Raise ManifestError, with a line for each, if labels are none of the classes."""
    known, problems = set(classes), []
    for i, cell in enumerate(manifest.column("label")):
        for name in label_set(cell, task.separator) if task.kind == "multilabel" else (cell,):
            if name not in known:
                problems.append(f"{manifest.where(i, 'label')}: no training row is {name!r}")
    if problems:
        raise ManifestError(problems)


def encode(task: Task, learnt: dict[str, Any], cells: Sequence[Any]) -> Tensor:
    """Return labels as numbers: classes (N,) int64; sets (N, C) float32, 0 or 1; standardised values (N,) float32."""
    if task.kind == "regression":
        values = np.array(cells, dtype=np.float64)
        return torch.from_numpy((values - learnt["mean"]) / learnt["scale"]).float()
    number = {name: k for k, name in enumerate(learnt["classes"])}
    if task.kind == "classification":
        return torch.tensor([number[cell] for cell in cells])
    sets = torch.zeros(len(cells), len(number))
    for row, cell in zip(sets, cells, strict=True):
        row[[number[name] for name in label_set(cell, task.separator)]] = 1
    return sets


def best_cut(scores: np.ndarray, positive: np.ndarray, metric: str) -> float:
    """Return the score above which rows are best called positive; of equally good ones that nearest to 0.

    Parameters
    ----------
    scores : ndarray
        ``(N,)``.
    positive : ndarray
        ``(N,)`` bool.
    metric : str
        ``f1`` of the positive rows, ``macro_f1`` of both classes, or ``balanced_accuracy``.

    Examples
    --------
    >>> best_cut(np.array([-3.0, -2.0, -1.0, 2.0]), np.array([False, False, True, True]), "macro_f1")
    -1.5
    """
    if positive.all() or not positive.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ranked, called = scores[order], np.arange(len(scores) + 1)
    right = np.concatenate([[0], np.cumsum(positive[order])])  # of the first k rows, called positive
    held, others = positive.sum(), (~positive).sum()
    rejected = others - (called - right)  # negative rows that are called negative
    first = 2 * right / (called + held)
    values = {
        "f1": first,
        "macro_f1": (first + 2 * rejected / (len(scores) - called + others)) / 2,
        "balanced_accuracy": (right / held + rejected / others) / 2,
    }[metric]
    cuts = np.concatenate([[ranked[0] + 1], (ranked[:-1] + ranked[1:]) / 2, [ranked[-1] - 1]])
    possible = np.concatenate([[True], ranked[:-1] > ranked[1:], [True]])
    best = possible & (values >= values[possible].max() - 1e-12)
    return float(cuts[best][np.abs(cuts[best]).argmin()])


def tuned_offsets(task: Task, logits: np.ndarray, labels: np.ndarray) -> list[float] | None:
    """Return what to add to logits (C,) before `decide`, so that the task's metric is best on these rows.

    Of two classes, the second is chosen where its probability exceeds the tuned threshold ``1 / (1 + exp(offset))``; of
    labels, each has its own threshold, by its F1. None where nothing is tuned, and of three classes or more.
    """
    if not task.tuned or not len(labels):
        return None
    if task.kind == "multilabel":
        return [-best_cut(logits[:, k], labels[:, k] > 0.5, "f1") for k in range(logits.shape[1])]
    if logits.shape[1] != 2:
        return None
    return [0.0, -best_cut(logits[:, 1] - logits[:, 0], labels == 1, task.compared_by)]


def decide(task: Task, logits: np.ndarray, offsets: Sequence[float] | None = None) -> np.ndarray:
    """Return the decisions: the number of each row's class (N,), or which labels it has, (N, C) bool."""
    shifted = logits if offsets is None else logits + np.asarray(offsets)
    return shifted > 0 if task.kind == "multilabel" else shifted.argmax(axis=1)


def probabilities(task: Task, logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of classes, or of each label by itself: (N, C)."""
    return expit(logits) if task.kind == "multilabel" else softmax(logits, axis=1)


def predicted(
    task: Task, learnt: dict[str, Any], values: np.ndarray, offsets: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """Return for each row of outputs what is ``predicted``, and ``p(...)`` for each class."""
    if task.kind == "regression":
        return [{"predicted": value * learnt["scale"] + learnt["mean"]} for value in values[:, 0].tolist()]
    classes = learnt["classes"]
    shares = probabilities(task, values).round(6).tolist()
    if task.kind == "multilabel":
        sets = decide(task, values, offsets)
        names = [task.separator.join(name for name, has in zip(classes, row, strict=True) if has) for row in sets]
    else:
        names = [classes[k] for k in decide(task, values, offsets)]
    columns = [f"p({name})" for name in classes]
    return [{"predicted": name} | dict(zip(columns, row, strict=True)) for name, row in zip(names, shares, strict=True)]


def safe(cell: Any) -> Any:
    """Return a cell of a table so that no spreadsheet takes it for a formula: such a text gets a `'` before it.

    References
    ----------
    OWASP, "CSV Injection", https://owasp.org/www-community/attacks/CSV_Injection

    Examples
    --------
    >>> safe("=cmd|' /C calc'!A0"), safe("-1.5"), safe("@home"), safe("a-b"), safe(-1.5)
    ("'=cmd|' /C calc'!A0", '-1.5', "'@home", 'a-b', -1.5)
    """
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return SAFE + cell
    return cell
