"""How statistics of scores become losses and ranks, and gradients of losses the coefficients of gradients of scores.

What lives here is shared by both frameworks, each formula once, over float64 vectors:

* `combine(xp, query_stats, key_stats, options)`: statistics, as `softmax_stats` gives them, to losses;
* `coefficients(xp, query_stats, key_stats, options, upstream)`: statistics and the losses' gradients to the coefficients
  that `softmax_grad` takes;
* `combine_sigmoid(losses, reduction)` and `coefficients_sigmoid(xp, upstream, rows, reduction)`: the same between
  `sigmoid_stats` and `sigmoid_grad`;
* `merge_stats(xp, ours, theirs, any)`: the statistics of some pairs and of others to those of both;
* `combine_ranks(greater, equal, ties)`.

`xp` is NumPy or torch: on a GPU statistics are tensors, and torch's operations have gradients of tensors. A small step
spends its time here: a function of NumPy takes 1 us, and the kernels take 25 us for 64 x 64 pairs.

What lives elsewhere: the public functions (``losses.py``, ``search.py``), tensors (``autograd/losses.py``), statistics and
gradients in NumPy (``reference.py``), the kernels (``csrc/``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

REDUCTIONS = ("mean", "sum", "none")
TIES = ("mean", "optimistic", "pessimistic")


class Options(NamedTuple):
    """The checked options of `contrastive_loss`."""

    any: bool  # the positives' summed probability counts, rather than the mean of their logarithms
    symmetric: bool
    label_smoothing: float
    reduction: str
    return_lse: bool

    @property
    def totals(self) -> bool:
        """Tell whether `softmax_stats` must sum the scores."""
        return self.label_smoothing > 0

    @property
    def plain(self) -> bool:
        """Tell whether the output is one number, of log-sum-exps and of means over positives alone."""
        return not (self.any or self.label_smoothing or self.return_lse or self.reduction == "none")


@np.errstate(all="ignore")  # infinities and NaN give no warnings, as in torch
def combine(
    xp: Any, query_stats: Any, key_stats: Any, options: Options, diagonal: bool = False, counts: Any = None
) -> tuple[Any, ...]:
    """Combine the statistics, (5, B) and, if symmetric, (5, C), into losses and, if they are asked for, log-sum-exps.

    Returns ``(loss,)``; with reduction "none" ``(query_losses,)`` or, if symmetric, ``(query_losses, key_losses)``. Then
    follow, with `return_lse`, ``query_lse`` and, if symmetric, ``key_lse``. `arrange` gives them the user's structure.

    Infinite scores follow the formulas. A log-sum-exp with a score of +inf is +inf: the loss of a positive of finite score
    is +inf, that of a positive of +inf is inf - inf, NaN. A positive of -inf has the loss +inf.

    `diagonal` says that key b is the one positive of query b, and that nothing is excluded: then two vectors suffice.
    `counts`, of queries and of keys, are what means divide by, where that is not how many of these have a positive: where
    other processes have rows too.
    """
    sides = [query_stats, key_stats] if options.symmetric else [query_stats]
    if diagonal and options.plain:
        rows = query_stats.shape[1]
        total = sum(_sum(xp, stats[0, :rows] - stats[1, :rows]) for stats in sides)
        return (total / _divisor(rows, options, counts and counts[0]),)
    losses = []
    for side, stats in enumerate(sides):
        lse, positive, positives, total, valid = stats
        loss = lse - positive
        if options.label_smoothing > 0:
            smooth = lse - total / xp.clip(valid, 1, None)
            loss = (1 - options.label_smoothing) * loss + options.label_smoothing * smooth
        counted = positives > 0
        loss = xp.where(counted, loss, 0.0)  # elsewhere it may be -inf less -inf
        if options.reduction != "none":
            loss = _sum(xp, loss) / _divisor(_sum(xp, counted), options, counts and counts[side])
        losses.append(loss)
    if options.reduction != "none":
        losses = [sum(losses)]
    return (*losses, *(stats[0] for stats in sides if options.return_lse))


@np.errstate(all="ignore")
def coefficients(
    xp: Any,
    query_stats: Any,
    key_stats: Any,
    options: Options,
    upstream: Any,
    diagonal: bool = False,
    counts: Any = None,
) -> tuple[Any, Any]:
    """Make the coefficients that `softmax_grad` takes, (5, B) and, if symmetric, (5, C), else None.

    `upstream` has the gradient of each output of `combine`, in its order, or None where nothing depends on the output;
    `diagonal` and `counts` are those of `combine`.
    """
    sides = [query_stats, key_stats] if options.symmetric else [query_stats]
    if diagonal and options.plain and xp is np and not any((stats[0] == -np.inf).any() for stats in sides):
        rows = query_stats.shape[1]
        found = [np.zeros(stats.shape) for stats in sides]
        for coefs, stats in zip(found, sides, strict=True):
            coefs[0] = stats[0]
            coefs[1, :rows] = coefs[3, :rows] = upstream[0] / _divisor(rows, options, counts and counts[0])
        return found[0], found[1] if options.symmetric else None
    of_losses = upstream[: len(sides)] if options.reduction == "none" else [upstream[0]] * len(sides)
    of_lses = upstream[-len(sides) :] if options.return_lse else [None] * len(sides)
    found = []
    for side, (stats, of_loss, of_lse) in enumerate(zip(sides, of_losses, of_lses, strict=True)):
        lse, positive, positives, _, valid = stats
        zero, counted = xp.zeros_like(lse), positives > 0
        by = 0.0 if of_loss is None else of_loss / _divisor(counted.sum(), options, counts and counts[side])
        u = xp.where(counted, by, zero)
        of_softmax = u if of_lse is None else u + of_lse
        of_positives = u / xp.clip(positives, 1, None)
        # A log-sum-exp of nothing is -inf. With 0 in its place exp(S - lse) is no NaN, and its coefficient is 0.
        nothing = lse == -np.inf
        rows = [xp.where(nothing, zero, lse), xp.where(nothing, zero, of_softmax), zero, of_positives, zero]
        if options.any:
            impossible = positive == -np.inf
            rows[2:4] = xp.where(impossible, zero, positive), xp.where(impossible, zero, u)
        if options.label_smoothing > 0:
            rows[3] = (1 - options.label_smoothing) * rows[3]
            rows[4] = options.label_smoothing * u / xp.clip(valid, 1, None)
        found.append(np.array(rows) if xp is np else xp.stack(rows))
    return found[0], found[1] if options.symmetric else None


def _sum(xp: Any, x: Any) -> Any:
    return np.add.reduce(x) if xp is np else x.sum()  # which in NumPy takes a microsecond more


def _divisor(counted: Any, options: Options, count: float | None) -> Any:
    """By how much to divide the sum of a side's losses, of which so many are counted: those of rows with a positive."""
    if options.reduction == "none":
        return 1
    sides = 2 if options.symmetric else 1
    if options.reduction == "sum":
        return sides
    if count is not None:
        return sides * count
    return sides * (max(counted, 1) if isinstance(counted, (int, np.integer)) else counted.clip(min=1))


def arrange(outputs: Any, options: Options) -> Any:
    """Give the outputs of `combine` the structure in which `contrastive_loss` returns them."""
    losses = 2 if options.reduction == "none" and options.symmetric else 1
    loss = outputs[0] if losses == 1 else tuple(outputs[:losses])
    return (loss, *outputs[losses:]) if options.return_lse else loss


def combine_sigmoid(losses: Any, reduction: str, count: float | None = None) -> Any:
    """Reduce the losses of the queries, (B,), as `sigmoid_stats` gives them; a mean divides by `count`, or by B."""
    if reduction == "none":
        return losses
    return losses.sum() / _divisor_sigmoid(len(losses), reduction, count)


def coefficients_sigmoid(xp: Any, upstream: Any, rows: int, reduction: str, count: float | None = None) -> Any:
    """Make the coefficients that `sigmoid_grad` takes, (B,), from the gradient of the output of `combine_sigmoid`."""
    if reduction == "none":
        return upstream
    return xp.tile(upstream / _divisor_sigmoid(rows, reduction, count), (rows,))


def _divisor_sigmoid(rows: int, reduction: str, count: float | None) -> Any:
    return 1 if reduction == "sum" else max(rows, 1) if count is None else count


@np.errstate(all="ignore")
def merge_stats(xp: Any, ours: Any, theirs: Any, any: bool) -> Any:
    """Merge the statistics of the same rows, as `softmax_stats` gives them, over two parts of their pairs."""
    lse, positive, positives, total, valid = (xp.stack(pair) for pair in zip(ours, theirs, strict=True))
    if any:
        positive = xp.logaddexp(*positive)
    else:  # the means' sums are made of them again, where there are positives: a mean may be infinite
        sums = xp.where(positives > 0, positive * positives, 0.0)
        positive = sums.sum(axis=0) / xp.clip(positives.sum(axis=0), 1, None)
    return xp.stack([xp.logaddexp(*lse), positive, *(x.sum(axis=0) for x in (positives, total, valid))])


def combine_ranks(greater: Any, equal: Any, ties: str) -> Any:
    """Make ranks, from 1, of how many other keys score above and as the target; those of "mean" are float64."""
    return 1 + greater + {"optimistic": 0, "mean": equal / 2, "pessimistic": equal}[ties]
