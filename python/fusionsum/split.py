"""Sums that split in two, all pairs and mixing among them, whatever framework their arrays are of.

    F[l, r] = sum_i P[l, i] * Q[r, i]

where P is the product of the operands that vary with l, Q that of the operands that vary with r.

What lives here: which calls split; their sides as matrices of rows by terms, which the native scores take, and back from a
side's gradient to those of its operands, which is the gradient of a fusion sum over a single term. `xp` is numpy or torch,
used where both have a function of the same name and meaning. What lives elsewhere: who asks and whose kernels they are
(``api.py`` for NumPy, ``contraction.py`` for torch, which on CUDA multiplies by itself), the kernels of scores
(``csrc/cpu/scores``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import reference
from .call import Call

LEAST_WORK = 2**22  # multiply-adds: below, the sum's kernels take less time than the preparations here, some 0.1 ms
MOST_TERMS = (
    2**15
)  # beyond, a block of keys and of queries of the scores' kernels, some 200 rows each, is hundreds of MiB
LEAST_EXTENT = 16  # rows of either side, and terms: with few terms, forming P costs as much as multiplying by it


class Side(NamedTuple):
    """One of the two products: the axes that are its rows, and its operands."""

    axes: list[int]  # of the broadcast shape, counted from its end
    members: list[int]  # places among `Call.operands`; 0: the weights


Sides = tuple[Side, Side]  # in the order of the output's axes


# ---- which calls split -----------------------------------------------------------------------------------------------


def is_large(fusion_weights: Any, factors: Sequence[Any], plain: tuple[type, ...]) -> bool:
    """Tell whether a call, which may be invalid, has operands that may split, and at least `LEAST_WORK`.

    Operands must be of the types `plain`. Where none has three dims, the answer takes 0.3 us.
    """
    try:
        deepest = 0 if fusion_weights is None else fusion_weights.ndim
        for z in factors:
            if z.ndim > deepest:
                deepest = z.ndim
        if deepest < 3:  # the terms, and one dim per side
            return False
        given = factors if fusion_weights is None else (fusion_weights, *factors)
        most = 1  # bounds the work from above, in a third of the time that the sizes below take
        for x in given:
            if type(x) not in plain:  # fake tensors, among others, whose symbolic sizes comparisons would fix
                return False
            most *= math.prod(x.shape)
        if most < LEAST_WORK or any(x.ndim == deepest and 1 not in x.shape for x in given):
            return False  # the latter varies with both sides
        sizes = itertools.zip_longest(*(reversed(x.shape) for x in given), fillvalue=1)
        return math.prod(map(max, sizes)) >= LEAST_WORK
    except (AttributeError, TypeError):
        return False  # an operand is no array: the checks, which come later, say which


def find_sides(call: Call) -> Sides | None:
    """Split the axes but `dim`, and the operands, so that no operand varies with axes of both sides, or return None.

    The axes of the first side come before those of the second, which makes the output a matrix as it lies.
    """
    shape, dim = call.shape, call.dim
    groups: list[tuple[set[int], list[int]]] = []  # axes, operands: those with an axis in common are in one group
    of_terms = []  # operands that vary with the terms only, or with nothing
    for k, (x, mask) in enumerate(zip(call.operands, call.masks, strict=True)):
        if x is None:
            continue
        axes, members = varying(x) | (set() if mask is None else varying(reference.align_mask(mask, x))), [k]
        if axes <= {dim}:
            of_terms.append(k)
            continue
        for group in [g for g in groups if g[0] & axes - {dim}]:
            groups.remove(group)
            axes, members = axes | group[0], members + group[1]
        groups.append((axes, members))
    groups.sort(key=lambda group: min(group[0] - {dim}))

    best = None
    for cut in range(1, len(groups)):
        halves = [
            (set().union(*(axes for axes, _ in part)), [k for _, members in part for k in members])
            for part in (groups[:cut], groups[cut:])
        ]
        outer = [sorted(axes - {dim}) for axes, _ in halves]
        extents = [extent(shape, axes) for axes in outer]
        if (
            outer[0][-1] < outer[1][0]
            and all(dim in axes for axes, _ in halves)
            and min(*extents, shape[dim]) >= LEAST_EXTENT
            and (best is None or sum(extents) < best[0])
        ):
            smaller = extents[1] < extents[0]  # the half with fewer rows: to multiply it by `of_terms` is less work
            left, right = (
                Side(rows, sorted(half[1] + of_terms * (i == smaller)))
                for i, (rows, half) in enumerate(zip(outer, halves, strict=True))
            )
            best = sum(extents), (left, right)
    return None if best is None else best[1]


def by_scores(call: Call) -> bool:
    """Tell whether the kernels of scores may evaluate a call that splits."""
    return call.shape[call.dim] <= MOST_TERMS


def varying(x: Any) -> set[int]:
    """List the axes, counted from the end, along which an array has other than one entry."""
    return {axis for axis in range(-x.ndim, 0) if x.shape[axis] != 1}


def extent(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Count the entries along these axes."""
    return math.prod(shape[axis] for axis in axes)


# ---- sides -----------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """The product of a side's operands. Operands and masks are views: the side's axes, the terms, a dim of 1 to sum."""

    side: Side
    sizes: tuple[int, ...]  # of the axes
    terms: int
    operands: list[Any]
    activations: list[str | None]
    masks: list[Any]
    absent: str

    @property
    def is_an_operand(self) -> bool:
        """Tell whether the product is its only operand, as it lies."""
        return len(self.operands) == 1 and self.activations[0] is None and self.masks[0] is None

    def call(self) -> Call:
        """Make the call whose sum, over a single term, is the product."""
        weighted = self.side.members[0] == 0 and len(self.operands) > 1
        names, masks = tuple(self.activations[weighted:]), tuple(self.masks[weighted:])
        return Call(
            self.operands[0] if weighted else None, tuple(self.operands[weighted:]), names, masks, self.absent, -1
        )


def product(xp: Any, call: Call, side: Side) -> Product:
    """View a side of a call."""
    shape = call.shape

    def view(x: Any) -> Any:
        return side_view(xp, x, len(shape), side.axes, call.dim)

    masks = [(call.masks[k], call.operands[k]) for k in side.members]
    return Product(
        side,
        tuple(shape[axis] for axis in side.axes),
        shape[call.dim],
        [view(call.operands[k]) for k in side.members],
        [(None, *call.activations)[k] for k in side.members],
        [None if mask is None else view(reference.align_mask(mask, x)) for mask, x in masks],
        call.absent,
    )


def side_view(xp: Any, x: Any, ndim: int, axes: Sequence[int], dim: int) -> Any:
    """View an operand, its mask or its gradient as its side has it; its other dims are of size 1."""
    x = xp.moveaxis(x[(None,) * (ndim - x.ndim)], (*axes, dim), tuple(range(len(axes) + 1)))
    return x.reshape(*x.shape[: len(axes) + 1], 1)


# ---- by the scores ---------------------------------------------------------------------------------------------------


def fusion_sum(xp: Any, score_matrix: Any, call: Call, sides: Sides, dtype: Any) -> Any:
    """Evaluate the sum, of this dtype, as a matrix of scores; NotImplemented where their kernel declines."""
    products = [product(xp, call, side) for side in sides]
    output = score_matrix(*_scores(xp, products, reference.accumulator(call.arrays)), True)
    return output if output is NotImplemented else xp.asarray(output, dtype=dtype).reshape(call.output_shape)


def fusion_sum_grad(
    xp: Any,
    score_matrix_grad: Any,
    sum_grad: Callable[[Any, Call, Sequence[bool]], Sequence[Any]],
    grad_output: Any,
    call: Call,
    sides: Sides,
    needs: Sequence[bool],
) -> Any:
    """Evaluate the gradients that are needed, through those of the sides; NotImplemented where the kernel declines.

    `sum_grad` evaluates the gradients of a call of the sum.
    """
    products = [product(xp, call, side) for side in sides]
    wanted = [[needs[k] for k in side.members] for side in sides]
    matrix = grad_output.reshape(math.prod(products[0].sizes), -1)
    scores = _scores(xp, products, reference.accumulator([*call.arrays, grad_output]))
    of_sides = score_matrix_grad(matrix, *scores, tuple(map(any, wanted)), True)
    if of_sides is NotImplemented:
        return NotImplemented
    grads: list[Any] = [None] * len(call.operands)
    for p, needed, d_matrix in zip(products, wanted, of_sides, strict=True):
        if d_matrix is None:
            continue
        found: Sequence[Any] = [d_matrix]
        if not p.is_an_operand:
            of_side = p.call()
            unweighted = of_side.fusion_weights is None
            d_product = d_matrix.reshape(*p.sizes, p.terms)
            found = sum_grad(d_product, of_side, [False] * unweighted + needed)[unweighted:]
        for k, d in zip(p.side.members, found, strict=True):
            if d is not None:
                grads[k] = _as_operand(xp, d, call.operands[k], p.side, call)
    return tuple(grads)


def _scores(xp: Any, products: Sequence[Product], wide: str) -> tuple[Any, ...]:
    """Make the arguments of the native scores: the factors of both sides, as matrices of rows by terms."""
    sides = []
    for p in products:
        factors = [xp.broadcast_to(x[..., 0], (*p.sizes, p.terms)).reshape(-1, p.terms) for x in p.operands]
        if reference.accumulator(factors) != wide:
            factors[0] = xp.asarray(factors[0], dtype=getattr(xp, wide))
        masks = [None if mask is None else xp.broadcast_to(mask[..., 0, 0], p.sizes).reshape(-1) for mask in p.masks]
        sides.append((tuple(factors), tuple(p.activations), tuple(masks)))
    factors, activations, masks = zip(*sides, strict=True)
    return *factors, *activations, *masks, products[0].absent, None, None, 1.0, 0.0, None, None, None, None, None


def _as_operand(xp: Any, d: Any, x: Any, side: Side, call: Call) -> Any:
    """Give a gradient that lies as a side's view does the shape, order and dtype of its operand."""
    if call.dim == -1 and d.dtype == x.dtype:  # it lies as the operand does
        return d.reshape(x.shape)
    grad = xp.empty(x.shape, dtype=x.dtype)
    to = side_view(xp, grad, len(call.shape), side.axes, call.dim)
    to[...] = d.reshape(to.shape)
    return grad
