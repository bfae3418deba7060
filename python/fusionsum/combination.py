"""How statistics of scores become losses and ranks, and gradients of losses the coefficients of gradients of scores.

What lives here is shared by both frameworks, each formula once, over float64 vectors of `xp`, NumPy or torch:

* `combine(xp, query_stats, key_stats, options)`: statistics, as `softmax_stats` gives them, to losses;
* `coefficients(xp, query_stats, key_stats, options, upstream)`: statistics and the losses' gradients to the coefficients
  that `softmax_grad` takes;
* `combine_sigmoid(losses, reduction)` and `coefficients_sigmoid(xp, upstream, rows, reduction)`: the same between
  `sigmoid_stats` and `sigmoid_grad`;
* `combine_ranks(greater, equal, ties)`.

What lives elsewhere: the public functions (``losses.py``, ``search.py``), tensors (``autograd/losses.py``), statistics and
gradients in NumPy (``reference.py``), the kernels (``csrc/``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


def combine(xp: Any, query_stats: Any, key_stats: Any, options: Options) -> tuple[Any, ...]:
    """Combine the statistics, (5, B) and, if symmetric, (5, C), into losses and, if they are asked for, log-sum-exps.

    Returns ``(loss,)``; with reduction "none" ``(query_losses,)`` or, if symmetric, ``(query_losses, key_losses)``. Then
    follow, with `return_lse`, ``query_lse`` and, if symmetric, ``key_lse``. `arrange` gives them the user's structure.
    """
    sides = [query_stats, key_stats] if options.symmetric else [query_stats]
    losses = []
    for lse, positive, positives, total, valid in sides:
        # Rows that are not counted are zeroed before they are subtracted: -inf less -inf is NaN, and so its derivative.
        held, positive, total = (xp.where(positives > 0, x, xp.zeros_like(x)) for x in (lse, positive, total))
        loss = held - positive
        if options.label_smoothing > 0:
            smooth = held - total / xp.clip(valid, 1, None)
            loss = (1 - options.label_smoothing) * loss + options.label_smoothing * smooth
        losses.append(loss)
    if options.reduction != "none":
        divisors = _divisors(xp, sides, options)
        losses = [sum(loss.sum() / divisor for loss, divisor in zip(losses, divisors, strict=True))]
    return (*losses, *(stats[0] for stats in sides if options.return_lse))


def coefficients(xp: Any, query_stats: Any, key_stats: Any, options: Options, upstream: Any) -> tuple[Any, Any]:
    """Make the coefficients that `softmax_grad` takes, (5, B) and, if symmetric, (5, C), else None.

    `upstream` has the gradient of each output of `combine`, in its order, or None where nothing depends on the output.
    """
    sides = [query_stats, key_stats] if options.symmetric else [query_stats]
    divisors = _divisors(xp, sides, options)
    of_losses = upstream[: len(sides)] if options.reduction == "none" else [upstream[0]] * len(sides)
    of_lses = upstream[-len(sides) :] if options.return_lse else [None] * len(sides)
    found = []
    for stats, divisor, of_loss, of_lse in zip(sides, divisors, of_losses, of_lses, strict=True):
        lse, positive, positives, _, valid = stats
        zero = xp.zeros_like(lse)
        u = zero if of_loss is None else xp.where(positives > 0, zero + of_loss / divisor, zero)
        of_softmax = xp.where(lse == -xp.inf, zero, u if of_lse is None else u + of_lse)
        of_positives = (1 - options.label_smoothing) * u
        positive_lse = zero
        if options.any:
            of_positives = xp.where(positive == -xp.inf, zero, of_positives)
            positive_lse = _finite_or_zero(xp, positive)
        else:
            of_positives = of_positives / xp.clip(positives, 1, None)
        of_all = options.label_smoothing * u / xp.clip(valid, 1, None)
        found.append(xp.stack([_finite_or_zero(xp, lse), of_softmax, positive_lse, of_positives, of_all]))
    return found[0], found[1] if options.symmetric else None


def _divisors(xp: Any, sides: Any, options: Options) -> list[Any]:
    """By how much to divide the sum of each side's losses; rows without a positive are not counted."""
    if options.reduction == "none":
        return [1] * len(sides)
    counts = [xp.clip((stats[2] > 0).sum(), 1, None) if options.reduction == "mean" else 1 for stats in sides]
    return [len(sides) * count for count in counts]


def _finite_or_zero(xp: Any, lse: Any) -> Any:
    """Put 0 for the log-sum-exp of nothing, so that exp(S - lse) is no NaN; its coefficient is 0."""
    return xp.where(lse == -xp.inf, xp.zeros_like(lse), lse)


def arrange(outputs: Any, options: Options) -> Any:
    """Give the outputs of `combine` the structure in which `contrastive_loss` returns them."""
    losses = 2 if options.reduction == "none" and options.symmetric else 1
    loss = outputs[0] if losses == 1 else tuple(outputs[:losses])
    return (loss, *outputs[losses:]) if options.return_lse else loss


def combine_sigmoid(losses: Any, reduction: str) -> Any:
    """Reduce the losses of the queries, (B,), as `sigmoid_stats` gives them."""
    if reduction == "none":
        return losses
    return losses.sum() / (max(len(losses), 1) if reduction == "mean" else 1)


def coefficients_sigmoid(xp: Any, upstream: Any, rows: int, reduction: str) -> Any:
    """Make the coefficients that `sigmoid_grad` takes, (B,), from the gradient of the output of `combine_sigmoid`."""
    if reduction == "none":
        return upstream
    return xp.tile(upstream / (max(rows, 1) if reduction == "mean" else 1), (rows,))


def combine_ranks(greater: Any, equal: Any, ties: str) -> Any:
    """Make ranks, from 1, of how many other keys score above and as the target; those of "mean" are float64."""
    return 1 + greater + {"optimistic": 0, "mean": equal / 2, "pessimistic": equal}[ties]
