"""Sums that are products of matrices, evaluated by BLAS: all pairs, mixing, and what else splits in two.

    F[l, r] = sum_i P[l, i] * Q[r, i],    dP = U @ Q,    dQ = U.T @ P

where P and Q are the products of the operands that vary with l and of those that vary with r.

What lives here: telling which calls split so, and the tiles in which they are evaluated. What lives elsewhere: weights,
activations, masks and their gradients, which are those of a sum over one term, P = fusion_sum over a trailing dim of 1
(the kernels, by way of ``torch_op.py``, which also does all that declines here).

Neither P nor Q is ever whole unless it fits a tile; backward forms them again. Everything is accumulated in float32 or
better, 16-bit operands too: the 16-bit products of BLAS would round P, and differ with the number of threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import api, reference

LEAST_WORK = 2**21  # multiply-adds: below, the kernels take less time than finding out that BLAS could do it
LEAST_EXTENT = 8  # of either side and of the terms: below, forming P costs more than multiplying it
TILE_BYTES = 2**22  # of a product, of a block of U: in cache from when it is formed until it is used
LEAST_ROWS = 64  # of a tile: below, what BLAS reads per multiply-add, and what is formed again, counts

# MKL cuts one product among its threads along the terms, too, and the bits follow. It gives each product of a batch to one
# thread, or cuts along rows and columns where the batch is smaller than the threads; with the right matrix transposed it
# does so up to some depth only (768 and 192 were seen). tests/test_contraction.py watches this.
BATCH = 4
DEPTH = {torch.float32: 512, torch.float64: 128}

Tile = tuple[slice, ...]


def likely(fusion_weights: Any, factors: Sequence[Any]) -> bool:
    """Tell, for 0.2 us in the common cases that are none, whether a call is worth a closer look; it may be invalid."""
    try:
        deepest = 0 if fusion_weights is None else fusion_weights.ndim
        for z in factors:
            if z.ndim > deepest:
                deepest = z.ndim
        if deepest < 3:  # the terms, the left and the right
            return False
        given = factors if fusion_weights is None else (fusion_weights, *factors)
        if any(x.ndim == deepest and 1 not in x.shape for x in given):  # it varies with both
            return False
        sizes = itertools.zip_longest(*(reversed(x.shape) for x in given), fillvalue=1)
        return math.prod(map(max, sizes)) >= LEAST_WORK
    except AttributeError:
        return False  # not arrays, which others will say


def fusion_sum(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Evaluate `api.fusion_sum` of tensors, with `kernel` doing the same for the sides, or return NotImplemented."""
    call = _recognised(*arguments)
    return NotImplemented if call is None else _forward(kernel, call)


def fusion_sum_grad(kernel: Callable[..., Any], kernel_grad: Callable[..., Any], grad_output: Any, *rest: Any) -> Any:
    """Evaluate `api.fusion_sum_grad` of tensors, only the gradients needed, or return NotImplemented."""
    *arguments, needs = rest
    call = _recognised(*arguments, grad_output)
    return NotImplemented if call is None else _backward(kernel, kernel_grad, call, grad_output, needs)


# ---- which calls split -----------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """What varies with the rows of one matrix. Operands, names and masks are of these members, the weights, if one, first.

    Operands and masks are views with the axes of the side, then the terms, then a dim of 1.
    """

    axes: tuple[int, ...]  # of the broadcast shape, counted from its end
    sizes: tuple[int, ...]
    members: tuple[int, ...]  # 0: the weights
    operands: list[Tensor]
    names: list[str | None]
    masks: list[Tensor | None]
    tiles: list[Tile]

    @property
    def plain(self) -> bool:
        """Whether P is its only operand."""
        return len(self.members) == 1 and self.names[0] is None and self.masks[0] is None


class _Call(NamedTuple):
    sides: tuple[_Side, _Side]
    terms: int
    shape: tuple[int, ...]  # of the output
    operands: list[Any]  # as given
    dtype: torch.dtype  # of the output
    wide: torch.dtype  # of all arithmetic
    absent: str
    dim: int


def _recognised(
    weights: Any, factors: Any, activations: Any, present: Any, absent: Any, dim: Any, *grad: Any
) -> _Call | None:
    """Check the arguments of what is likely a contraction and split it; None if it does not split well."""
    if not likely(weights, factors):
        return None
    names, masks, dim = api.check(weights, factors, activations, present, absent, dim, *grad)
    operands, names = [weights, *factors], [None, *names]
    masks = [m if m is None else reference.align_mask(m, z) for m, z in zip([None, *masks], operands, strict=True)]
    given = [k for k, x in enumerate(operands) if x is not None]
    if any(x.layout is not torch.strided for x in (*operands, *masks, *grad) if x is not None):
        return None
    shape = reference.broadcast_shape(*(operands[k].shape for k in given))
    axes = {k: _axes(operands[k]) | (set() if masks[k] is None else _axes(masks[k])) for k in given}
    halves = _halves(axes, shape, dim)
    if halves is None:
        return None
    wide = torch.float64 if any(operands[k].dtype == torch.float64 for k in given) else torch.float32
    if grad and grad[0].dtype == torch.float64:
        wide = torch.float64

    terms, entries = shape[dim], TILE_BYTES // wide.itemsize
    sizes = [tuple(shape[a] for a in side) for side, _ in halves]
    rows = entries // terms
    limits = [rows, entries // max(terms, min(rows, *map(math.prod, sizes)))]
    if math.prod(sizes[0]) > math.prod(sizes[1]):
        limits.reverse()
    tiles = [list(_tiles(n, limit)) for n, limit in zip(sizes, limits, strict=True)]
    if rows < LEAST_ROWS and any(len(t) > 1 for t in tiles):
        return None
    sides = [
        _Side(
            side,
            n,
            members,
            [_view(operands[k], len(shape), side, dim) for k in members],
            [names[k] for k in members],
            [None if masks[k] is None else _view(masks[k], len(shape), side, dim) for k in members],
            t,
        )
        for (side, members), n, t in zip(halves, sizes, tiles, strict=True)
    ]
    voters = [operands[k].dtype for k in given if operands[k].ndim]
    dtype = voters[0] if len(set(voters)) == 1 else torch.float64 if torch.float64 in voters else torch.float32
    output_shape = shape[: len(shape) + dim] + shape[len(shape) + dim + 1 :]
    return _Call((sides[0], sides[1]), terms, output_shape, operands, dtype, wide, absent, dim)
