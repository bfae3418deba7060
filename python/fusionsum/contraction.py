"""Sums that are products of matrices: all pairs, mixing, and all others that split in two.

    F[l, r] = sum_i P[l, i] * Q[r, i],    dP = U @ Q,    dQ = U.T @ P

where P is the product of the operands that vary with l, Q that of the operands that vary with r, and U the gradient of F.

What lives here: the one decision whether a call of tensors splits (`route`); on the CPU, handing the two sides to the
native scores, which form P and Q as they pack them; on CUDA, torch's products of matrices and the tiles in which they are
taken. What lives elsewhere: the kernels of scores (``csrc/cpu/scores``); forming a tile of P or Q, and the gradients of its
operands from dP or dQ: these are a fusion sum over a single term and its gradient, which ``tensors.py`` evaluates.

A product is never kept: backward forms it again. All is accumulated in float32 or float64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, tensors
from .backend import native
from .call import Call, check

LEAST_WORK = 2**22  # multiply-adds: below, the sum's kernels take less time than the preparations here, some 0.1 ms
TILE_BYTES = 2**25  # on CUDA, of a tile of P or Q, and of a block of U or F: a call holds a few of each at a time
# Rows of a tile, if a side has several: with fewer, BLAS is bound by memory, and tiles are formed too often.
LEAST_ROWS = 512

LEAST_EXTENT = 16  # rows of either side, and terms: with few terms, forming P costs as much as multiplying by it

Tile = tuple[slice, ...]
_PLAIN = Tensor, torch.nn.Parameter


class Side(NamedTuple):
    """One of the two products: the axes that are its rows, its operands, and the tiles in which its rows are taken."""

    axes: list[int]  # of the broadcast shape, counted from its end
    members: list[int]  # places among `Call.operands`; 0: the weights
    tiles: list[Tile]


class Split(NamedTuple):
    """How a call splits in two. It holds no tensor: backward takes the split that forward has found."""

    shape: tuple[int, ...]  # the broadcast shape of all operands
    wide: torch.dtype  # of all arithmetic
    sides: tuple[Side, Side]  # in the order of the output's axes


def route(
    fusion_weights: Any,
    factors: Sequence[Any],
    activations: Any,
    present: Any,
    absent: Any,
    dim: Any,
    *,
    grad_output: Any = None,
) -> tuple[Any, Split | None]:
    """Decide, once a call, who evaluates a call of tensors: matrix products if there is a split, else the kernels.

    The arguments may be invalid. Those of a call that may split are checked, and the checked call is returned; for others,
    None is. Where no operand has three dims, the decision takes 0.3 us and no check.
    """
    if not _is_large(fusion_weights, factors):
        return None, None
    call = check(fusion_weights, factors, activations, present, absent, dim, grad_output=grad_output)
    return call, _split(call, grad_output)


def fusion_sum(call: Call, split: Split) -> Tensor:
    """Evaluate the sum as a product of matrices."""
    if _by_scores(call):
        output = native.score_matrix(*_scores(call, split), True)
        return output.to(tensors.result_dtype(call)).view(call.output_shape)
    with torch._C._DisableAutocast():  # else torch would round its operands
        return _forward(call, split)


def fusion_sum_grad(grad_output: Tensor, call: Call, split: Split, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Evaluate the gradients that are needed as products of matrices; None for the others."""
    with torch._C._DisableAutocast():
        return _backward(grad_output, call, split, needs)


def _by_scores(call: Call) -> bool:
    """Tell whether the native scores evaluate a call that splits; elsewhere torch's products of matrices do."""
    return native is not None and call.factors[0].device.type == "cpu"


def _scores(call: Call, split: Split) -> tuple[Any, ...]:
    """Return the arguments of the native scores: the factors of both sides, as matrices of rows by terms."""
    left, right = (_product(call, split, side) for side in split.sides)
    sides = []
    for product in (left, right):
        rows = [split.shape[axis] for axis in product.side.axes]
        factors = [x.squeeze(-1).expand(*rows, product.terms).reshape(-1, product.terms) for x in product.operands]
        if reference.accumulator(factors) != _name(split.wide):
            factors[0] = factors[0].to(split.wide)
        masks = [mask if mask is None else mask[..., 0, 0].expand(rows).reshape(-1) for mask in product.masks]
        sides.append((tuple(factors), tuple(product.activations), tuple(masks)))
    factors, activations, masks = zip(*sides, strict=True)
    return *factors, *activations, *masks, call.absent, None, None, 1.0, 0.0, None, None, None, None, None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- which calls split -----------------------------------------------------------------------------------------------


def _is_large(fusion_weights: Any, factors: Sequence[Any]) -> bool:
    """Tell whether a call, which may be invalid, has operands that may split, and at least `LEAST_WORK`."""
    try:
        deepest = 0 if fusion_weights is None else fusion_weights.ndim
        for z in factors:
            if z.ndim > deepest:
                deepest = z.ndim
        if deepest < 3:  # the terms, and one dim per side
            return False
        given = factors if fusion_weights is None else (fusion_weights, *factors)
        # An operand that varies with both sides; or fake tensors, whose symbolic sizes comparisons would fix.
        if any((x.ndim == deepest and 1 not in x.shape) or type(x) not in _PLAIN for x in given):
            return False
        sizes = itertools.zip_longest(*(reversed(x.shape) for x in given), fillvalue=1)
        return math.prod(map(max, sizes)) >= LEAST_WORK
    except AttributeError:
        return False  # an operand is no array: the checks, which come later, say which


def is_plain(*given: Any) -> bool:
    """Tell whether kernels may read the memory of these tensors as theirs: no subclass, no lazy sign, no lazy zero."""
    return all(
        type(x) in _PLAIN
        and x.layout is torch.strided
        and x.device.type in ("cpu", "cuda")
        and not (x.is_neg() or x._is_zerotensor())
        for x in given
        if x is not None
    )


def _split(call: Call, grad_output: Any) -> Split | None:
    operands = call.operands
    if not is_plain(*operands, *call.masks, grad_output):
        return None
    masks = [m if m is None else reference.align_mask(m, z) for m, z in zip(call.masks, operands, strict=True)]
    shape = call.shape
    halves = _halves(operands, masks, shape, call.dim)
    if halves is None:
        return None

    arrays = call.arrays if grad_output is None else (*call.arrays, grad_output)
    wide = getattr(torch, reference.accumulator(arrays))
    terms, entries = shape[call.dim], TILE_BYTES // wide.itemsize
    most = entries // max(terms, LEAST_ROWS)
    extents = [min(most, _extent(shape, axes)) for axes, _ in halves]
    if extents[0] < extents[1] == most:  # the left side in one tile, the right side in several
        limits = [most, entries // max(terms, extents[0])]
    else:  # the left side may be in several tiles: they are rows of the output, which are contiguous
        limits = [entries // max(terms, extents[1]), most]
    sides = []
    for (axes, members), limit in zip(halves, limits, strict=True):
        sizes = [shape[axis] for axis in axes]
        if _by_scores(call):
            limit = math.prod(sizes)
        tiles = list(_tiles(sizes, limit))
        if len(tiles) > 1 and limit < LEAST_ROWS:
            return None
        sides.append(Side(axes, members, tiles))
    return Split(shape, wide, (sides[0], sides[1]))


def _halves(
    operands: Sequence[Any], masks: Sequence[Any], shape: tuple[int, ...], dim: int
) -> list[tuple[list[int], list[int]]] | None:
    """Split the axes but `dim`, and the operands, so that no operand varies with axes of both halves, or return None.

    The axes of the first half come before those of the second, which makes the output a matrix as it lies.
    """
    groups: list[tuple[set[int], list[int]]] = []  # axes, operands: those with an axis in common are in one group
    of_terms = []  # operands that vary with the terms only, or with nothing
    for k, (x, mask) in enumerate(zip(operands, masks, strict=True)):
        if x is None:
            continue
        axes, members = _varying(x) | (set() if mask is None else _varying(mask)), [k]
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
        extents = [_extent(shape, axes) for axes in outer]
        if (
            outer[0][-1] < outer[1][0]
            and all(dim in axes for axes, _ in halves)
            and min(*extents, shape[dim]) >= LEAST_EXTENT
            and (best is None or sum(extents) < best[0])
        ):
            smaller = extents[1] < extents[0]  # the half with fewer rows: to multiply it by `of_terms` is less work
            of_halves = [sorted(half + of_terms * (i == smaller)) for i, (_, half) in enumerate(halves)]
            best = sum(extents), list(zip(outer, of_halves, strict=True))
    return None if best is None else best[1]


def _varying(x: Tensor) -> set[int]:
    return {axis for axis in range(-x.ndim, 0) if x.shape[axis] != 1}


def _extent(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _tiles(sizes: Sequence[int], limit: int) -> Iterator[Tile]:
    """Cut a box along its first axes: the entries of a contiguous tensor in one tile then form a matrix."""
    first, *others = sizes
    inner = math.prod(others)
    if inner > limit:
        for i in range(first):
            for tile in _tiles(others, limit):
                yield slice(i, i + 1), *tile
        return
    step = math.ceil(first / math.ceil(first / max(1, limit // inner)))  # tiles of about one size
    for i in range(0, first, step):
        yield slice(i, min(i + step, first)), *(slice(0, n) for n in others)


# ---- tile by tile ----------------------------------------------------------------------------------------------------


class _Product(NamedTuple):
    """The product of a side's operands. Operands and masks are views: the side's axes, the terms, a dim of 1 to sum."""

    side: Side
    operands: list[Tensor]
    activations: list[str | None]
    masks: list[Tensor | None]
    absent: str
    terms: int
    wide: torch.dtype

    @property
    def is_an_operand(self) -> bool:
        """Tell whether the product is its only operand, as it lies."""
        return len(self.operands) == 1 and self.activations[0] is None and self.masks[0] is None

    def call(self, tile: Tile) -> Call:
        """Make the call whose sum, over a single term, is a tile of the product, of dtype `wide`."""
        blocks: list[Any] = [_within(x, tile) for x in self.operands]
        masks = [None if mask is None else _within(mask, tile) for mask in self.masks]
        weighted = self.side.members[0] == 0 and len(blocks) > 1
        weights = blocks[0] if weighted else None
        if (
            functools.reduce(torch.promote_types, [x.dtype for x in blocks]) != self.wide
        ):  # weights of that dtype widen it
            weights = blocks[0].to(self.wide) if weighted else blocks[0].new_ones(1, dtype=self.wide)
        names = tuple(self.activations[weighted:])
        return Call(weights, tuple(blocks[weighted:]), names, tuple(masks[weighted:]), self.absent, -1)

    def formed(self, tile: Tile) -> Tensor:
        """Form a tile of the product: a matrix of rows by terms."""
        block = _within(self.operands[0], tile) if self.is_an_operand else tensors.fusion_sum(self.call(tile))
        return block.reshape(-1, self.terms).to(self.wide)


def _product(call: Call, split: Split, side: Side) -> _Product:
    def view(x: Tensor) -> Tensor:
        return _view(x, len(split.shape), side.axes, call.dim)

    operands = [view(call.operands[k]) for k in side.members]
    if len(side.tiles) > 1:  # the gradient of an operand that tiles share is summed over them before it is rounded
        rows = set(range(-2 - len(side.axes), -2))
        operands = [x if _varying(x) >= rows else x.to(split.wide) for x in operands]
    masks = [(call.masks[k], call.operands[k]) for k in side.members]
    views = [None if mask is None else view(reference.align_mask(mask, x)) for mask, x in masks]
    names = [(None, *call.activations)[k] for k in side.members]
    return _Product(side, operands, names, views, call.absent, split.shape[call.dim], split.wide)


def _view(x: Tensor, ndim: int, axes: list[int], dim: int) -> Tensor:
    """View an operand, its mask or its gradient as its side has it; its other dims are of size 1."""
    rest = [axis for axis in range(-ndim, 0) if axis != dim and axis not in axes]
    return x[(None,) * (ndim - x.ndim)].permute(*axes, dim, *rest).flatten(len(axes) + 1)


def _within(x: Tensor, tile: Tile) -> Tensor:
    """Take a tile of a view; along the axes where the view has size 1, all tiles share its entries."""
    return x[tuple(slice(None) if n == 1 else part for n, part in zip(x.shape, tile, strict=False))]


def _forward(call: Call, split: Split) -> Tensor:
    dtype = tensors.result_dtype(call)
    output = call.factors[0].new_empty(call.output_shape, dtype=dtype)
    matrix = output.squeeze()  # to the axes of both sides
    left, right = (_product(call, split, side) for side in split.sides)
    for column_tile in right.side.tiles:
        columns = right.formed(column_tile)
        for row_tile in left.side.tiles:
            rows = left.formed(row_tile)
            block = matrix[row_tile + column_tile].view(len(rows), len(columns))
            direct = dtype == split.wide and block.is_contiguous()
            result = block if direct else rows.new_empty(block.shape)
            _multiply(rows, columns.T, result)
            if not direct:
                block.copy_(result)
    return output


def _backward(grad_output: Tensor, call: Call, split: Split, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    matrix, operands = grad_output.squeeze(), call.operands
    grads: list[Any] = [None] * len(operands)
    left, right = (_product(call, split, side) for side in split.sides)
    of_sides: Any = None
    if _by_scores(call):
        of_left, of_right = ([k for k in side.members if needs[k]] != [] for side in split.sides)
        rows = _extent(split.shape, left.side.axes)
        of_sides = native.score_matrix_grad(matrix.reshape(rows, -1), *_scores(call, split), (of_left, of_right), True)
    for i, (product, other) in enumerate(((left, right), (right, left))):
        side = product.side
        wanted = [needs[k] for k in side.members]
        if not any(wanted):
            continue
        as_found = len(side.tiles) == 1 and call.dim == -1  # then a tile's gradients are the operands', as they lie
        for k, x, want in zip(side.members, product.operands, wanted, strict=True):
            if want and not as_found:
                grads[k] = torch.empty(operands[k].shape, dtype=x.dtype, device=x.device)
        seen = set()
        tiles = _d_product(matrix, product, other, product is left) if of_sides is None else [(side.tiles[0], of_sides[i])]
        for tile, d_matrix in tiles:
            d_product = d_matrix.view(*(part.stop - part.start for part in tile), product.terms)
            if product.is_an_operand:
                found: Sequence[Any] = [d_product]
            else:
                of_tile = product.call(tile)
                lacking = (
                    1 + len(of_tile.factors) - len(wanted)
                )  # 1 if the call has no weights, or only ones that widen
                found = tensors.fusion_sum_grad(d_product, of_tile, [False] * lacking + wanted)[lacking:]
            for k, d in zip(side.members, found, strict=True):
                if as_found and d is not None:
                    grads[k] = d.view(operands[k].shape)
                if as_found or d is None:
                    continue
                to = _view(grads[k], len(split.shape), side.axes, call.dim)
                key = k, tuple(part.start for part, n in zip(tile, to.shape, strict=False) if n != 1)
                to = _within(to, tile)
                to.add_(d.view(to.shape)) if key in seen else to.copy_(d.view(to.shape))
                seen.add(key)
    return tuple(d if d is None else d.to(x.dtype) for d, x in zip(grads, operands, strict=True))


def _d_product(matrix: Tensor, product: _Product, other: _Product, is_left: bool) -> Iterator[tuple[Tile, Tensor]]:
    """Yield the tiles of a side's gradient, each a matrix of rows by terms; torch multiplies."""
    kept = other.formed(other.side.tiles[0]) if len(other.side.tiles) == 1 else None
    for tile in product.side.tiles:
        rows = math.prod(part.stop - part.start for part in tile)
        found = matrix.new_empty((rows, product.terms), dtype=product.wide)
        for i, other_tile in enumerate(other.side.tiles):
            factor = other.formed(other_tile) if kept is None else kept
            if is_left:
                block = matrix[tile + other_tile].reshape(-1, len(factor))
            else:
                block = matrix[other_tile + tile].reshape(len(factor), -1).T
            _multiply(block.to(product.wide), factor, found, add=i > 0)
        yield tile, found


def _multiply(a: Tensor, b: Tensor, to: Tensor, add: bool = False) -> None:
    """Put the product of two matrices into a contiguous one, or add it.

    cuBLAS gives the same bits in every run; TF32 is off unless torch is told otherwise.
    """
    to.addmm_(a, b, beta=int(add))
