"""Sums that are products of matrices, evaluated by BLAS: all pairs, mixing, and whatever else splits in two.

    F[l, r] = sum_i P[l, i] * Q[r, i],    dP = U @ Q,    dQ = U.T @ P

where P and Q are the products of the operands that vary with l and of those that vary with r.

What lives here: telling which calls split so, and the tiles in which they are evaluated. What lives elsewhere: forming P,
and the gradients of its operands from dP, which are a fusion sum over a single term and its gradient (``torch_op.py``
hands the functions over; it also evaluates what is declined here).

A product is never whole, unless it fits a tile, and never kept: backward forms it again. All is accumulated in float32 or
float64. 16-bit products are widened: the 16-bit matrix product would round P, and differ with the number of threads.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import api, reference

LEAST_WORK = 2**22  # multiply-adds: below, the kernels take less time than the preparations here, some 0.2 ms
TILE_BYTES = 2**25  # of a product, and of a block of U or F: a call takes a few of these; at half the size, C1 loses 7%
LEAST_ROWS = 512  # in a tile where there are several: below, BLAS is bound by memory, and too much is formed again

# MKL cuts a product of matrices as the number of threads suggests, along the terms too, and the bits follow. In a batch it
# gives each item to one thread if there are at least as many items as threads. So products go to it as batches of 8 items,
# of two rows or more (of one, it takes other ways): the same bits for up to 8 threads, in random products with its AVX-512
# and its AVX2 code. Beyond 8 threads they may differ. With 2 threads it costs 0 to 12%, where 4 items cost 0 to 6%.
BATCH = 8
LEAST_EXTENT = 2 * BATCH  # of either side; and of the terms, since with few, forming P costs as much as multiplying it

Tile = tuple[slice, ...]


def likely(fusion_weights: Any, factors: Sequence[Any]) -> bool:
    """Tell whether a call, which may be invalid, is worth a closer look; 0.2 us where no operand has three dims."""
    try:
        deepest = 0 if fusion_weights is None else fusion_weights.ndim
        for z in factors:
            if z.ndim > deepest:
                deepest = z.ndim
        if deepest < 3:  # the terms, and one dim per side
            return False
        given = factors if fusion_weights is None else (fusion_weights, *factors)
        if any(x.ndim == deepest and 1 not in x.shape for x in given):  # it varies with both sides
            return False
        sizes = itertools.zip_longest(*(reversed(x.shape) for x in given), fillvalue=1)
        return math.prod(map(max, sizes)) >= LEAST_WORK
    except AttributeError:
        return False  # not an array: who evaluates the call says so


def fusion_sum(kernel: Callable[..., Any], dtype: torch.dtype, *arguments: Any) -> Any:
    """Evaluate the sum, of the given dtype, or return NotImplemented where it does not split.

    `kernel` takes the arguments of ``torch_op.fusion_sum``, as does this, unchecked, after the first two.
    """
    call = _recognised(*arguments)
    return NotImplemented if call is None else _forward(kernel, call, dtype)


def fusion_sum_grad(kernel: Callable[..., Any], kernel_grad: Callable[..., Any], *arguments: Any) -> Any:
    """Evaluate the gradients that are needed, None for the others, or return NotImplemented where it does not split.

    `kernel_grad` takes the arguments of ``torch_op.fusion_sum_grad``, as does this, unchecked, after the first two.
    """
    grad_output, *rest, needs = arguments
    call = _recognised(*rest, grad_output)
    return NotImplemented if call is None else _backward(kernel, kernel_grad, call, grad_output, needs)


# ---- which calls split -----------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """One of the two products: its rows, its operands, and the tiles in which its rows are taken.

    Operands and masks are views: the side's axes, then the terms, then a dim of 1, to be summed.
    """

    axes: list[int]  # of the broadcast shape, counted from its end
    members: list[int]  # 0: the weights
    operands: list[Tensor]
    names: list[str | None]
    masks: list[Tensor | None]
    tiles: list[Tile]


class _Call(NamedTuple):
    operands: list[Any]  # as given
    shape: tuple[int, ...]  # of them, broadcast
    dim: int
    absent: str
    wide: torch.dtype  # of all arithmetic
    sides: list[_Side]  # in the order of the output's axes


def _recognised(
    weights: Any, factors: Any, activations: Any, present: Any, absent: Any, dim: Any, *grad: Any
) -> _Call | None:
    names, masks, dim = api.check(weights, factors, activations, present, absent, dim, *grad)
    operands, names = [weights, *factors], [None, *names]
    masks = [m if m is None else reference.align_mask(m, z) for m, z in zip([None, *masks], operands, strict=True)]
    tensors = [x for x in (*operands, *masks, *grad) if x is not None]
    shape = reference.broadcast_shape(*(x.shape for x in operands if x is not None))
    halves = _halves(operands, masks, shape, dim) if all(x.layout is torch.strided for x in tensors) else None
    if halves is None:
        return None

    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    terms, entries = shape[dim], TILE_BYTES // wide.itemsize
    most = entries // max(terms, LEAST_ROWS)
    extents = [min(most, _extent(shape, axes)) for axes, _ in halves]
    if extents[0] < extents[1] == most:  # left as it is, right in tiles
        limits = [most, entries // max(terms, extents[0])]
    else:  # where there is a choice, rows of the output: they are contiguous
        limits = [entries // max(terms, extents[1]), most]
    sides = []
    for (axes, members), limit in zip(halves, limits, strict=True):
        tiles = list(_tiles([shape[axis] for axis in axes], limit))
        if len(tiles) > 1 and limit < LEAST_ROWS:
            return None
        views = [_view(operands[k], len(shape), axes, dim) for k in members]
        if len(tiles) > 1:  # gradients of what tiles share are summed over them, before they are rounded
            views = [x if _varying(x) >= set(range(-2 - len(axes), -2)) else x.to(wide) for x in views]
        their_masks = [None if masks[k] is None else _view(masks[k], len(shape), axes, dim) for k in members]
        sides.append(_Side(axes, members, views, [names[k] for k in members], their_masks, tiles))
    return _Call(operands, shape, dim, absent, wide, sides)


def _halves(
    operands: list[Any], masks: list[Any], shape: tuple[int, ...], dim: int
) -> list[tuple[list[int], list[int]]] | None:
    """Split the axes but `dim`, and the operands, so that no operand varies with axes of both halves, or return None.

    The axes of the first half come before those of the second, which makes the output a matrix as it lies.
    """
    groups: list[tuple[set[int], list[int]]] = []  # axes, operands: those with an axis in common are in one group
    shared = []
    for k, (x, mask) in enumerate(zip(operands, masks, strict=True)):
        if x is None:
            continue
        axes, members = _varying(x) | (set() if mask is None else _varying(mask)), [k]
        if axes <= {dim}:
            shared.append(k)
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
            smaller = extents[1] < extents[0]  # has fewer rows for what has none of its own
            of_both = [sorted(half + shared * (i == smaller)) for i, (_, half) in enumerate(halves)]
            best = sum(extents), list(zip(outer, of_both, strict=True))
    return None if best is None else best[1]


def _varying(x: Tensor) -> set[int]:
    return {axis for axis in range(-x.ndim, 0) if x.shape[axis] != 1}


def _extent(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _view(x: Tensor, ndim: int, axes: list[int], dim: int) -> Tensor:
    """View an operand, its mask or its gradient as its side has it; its other dims are of size 1."""
    rest = [axis for axis in range(-ndim, 0) if axis != dim and axis not in axes]
    return x[(None,) * (ndim - x.ndim)].permute(*axes, dim, *rest).flatten(len(axes) + 1)


def _tiles(sizes: Sequence[int], limit: int) -> Iterator[Tile]:
    """Cut a box along its first axes, so that what a tile takes of a contiguous tensor is a matrix of its entries."""
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


def _within(x: Tensor, tile: Tile) -> Tensor:
    """Take a tile of a side's view, whose axes of size 1 all tiles share."""
    return x[tuple(slice(None) if n == 1 else part for n, part in zip(x.shape, tile, strict=False))]


def _arguments(call: _Call, side: _Side, tile: Tile) -> tuple[Any, ...]:
    """Make the arguments of the kernel that forms a tile of a side's product, of dtype `wide`."""
    blocks: list[Any] = [_within(x, tile) for x in side.operands]
    masks = [None if mask is None else _within(mask, tile) for mask in side.masks]
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in blocks])
    weighted = side.members[0] == 0 and len(blocks) > 1
    weights = blocks[0] if weighted else None
    if dtype != call.wide:  # the weights make it so
        weights = blocks[0].to(call.wide) if weighted else blocks[0].new_ones(1, dtype=call.wide)
    return weights, tuple(blocks[weighted:]), side.names[weighted:], masks[weighted:], call.absent, -1


def _is_product(side: _Side) -> bool:
    return len(side.members) > 1 or side.names[0] is not None or side.masks[0] is not None


def _product(kernel: Callable[..., Any], call: _Call, side: _Side, tile: Tile) -> Tensor:
    """Form a tile of a side's product: a matrix of rows by terms."""
    product = kernel(*_arguments(call, side, tile)) if _is_product(side) else _within(side.operands[0], tile)
    return product.reshape(-1, call.shape[call.dim]).to(call.wide)


def _forward(kernel: Callable[..., Any], call: _Call, dtype: torch.dtype) -> Tensor:
    shape = list(call.shape)
    del shape[call.dim]
    output = call.operands[1].new_empty(shape, dtype=dtype)
    whole = output.squeeze()  # to the axes of both sides
    left, right = call.sides
    for those in right.tiles:
        other = _product(kernel, call, right, those)
        for these in left.tiles:
            rows = _product(kernel, call, left, these)
            block = whole[these + those].view(len(rows), len(other))
            direct = dtype == call.wide and block.is_contiguous()
            result = block if direct else rows.new_empty(block.shape)
            _multiply(rows, other.T, result)
            if not direct:
                block.copy_(result)
    return output


def _backward(
    kernel: Callable[..., Any], kernel_grad: Callable[..., Any], call: _Call, grad_output: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    terms, whole = call.shape[call.dim], grad_output.squeeze()
    grads: list[Any] = [None] * len(call.operands)
    for side, other in (call.sides, call.sides[::-1]):
        wanted = [needs[k] for k in side.members]
        if not any(wanted):
            continue
        as_found = len(side.tiles) == 1 and call.dim == -1
        for k, x, want in zip(side.members, side.operands, wanted, strict=True):
            if want and not as_found:
                grads[k] = torch.empty(call.operands[k].shape, dtype=x.dtype, device=x.device)
        kept = _product(kernel, call, other, other.tiles[0]) if len(other.tiles) == 1 else None
        seen = set()
        for these in side.tiles:
            d_product = whole.new_empty([part.stop - part.start for part in these] + [terms], dtype=call.wide)
            for i, those in enumerate(other.tiles):
                factor = _product(kernel, call, other, those) if kept is None else kept
                if side is call.sides[0]:
                    block = whole[these + those].reshape(-1, len(factor))
                else:
                    block = whole[those + these].reshape(len(factor), -1).T
                _multiply(block.to(call.wide), factor, d_product.view(-1, terms), add=i > 0)
            if _is_product(side):
                arguments = _arguments(call, side, these)
                lacking = 1 + len(arguments[1]) - len(wanted)  # weights, which are not among the members
                found = kernel_grad(d_product, *arguments, [False] * lacking + wanted)[lacking:]
            else:
                found = [d_product]
            for k, d in zip(side.members, found, strict=True):
                if as_found and d is not None:
                    grads[k] = d.view(call.operands[k].shape)
                if as_found or d is None:
                    continue
                to = _view(grads[k], len(call.shape), side.axes, call.dim)
                key = k, tuple(part.start for part, n in zip(these, to.shape, strict=False) if n != 1)
                to = _within(to, these)
                to.add_(d.view(to.shape)) if key in seen else to.copy_(d.view(to.shape))
                seen.add(key)
    return tuple(d if d is None else d.to(x.dtype) for d, x in zip(grads, call.operands, strict=True))


def _multiply(a: Tensor, b: Tensor, to: Tensor, add: bool = False) -> None:
    """Put the product of two matrices into a contiguous one, or add it."""
    if a.device.type != "cpu":  # cuBLAS repeats itself; torch leaves TF32 off, unless told otherwise for all products
        to.addmm_(a, b, beta=int(add))
        return
    a, b = (x if _for_blas(x) else x.contiguous() for x in (a, b))
    rows = len(a) // BATCH
    whole, beta = BATCH * rows, int(add)
    if rows:
        items = a[:whole].unflatten(0, (BATCH, rows))
        to[:whole].view(BATCH, rows, -1).baddbmm_(items, b.expand(BATCH, -1, -1), beta=beta)
    if whole < len(a):  # the last rows, and one more: as a batch of copies
        start = max(0, whole - 1)
        last = torch.bmm(a[start:].expand(BATCH, -1, -1), b.expand(BATCH, -1, -1))[0, whole - start :]
        to[whole:] = to[whole:] + last if add else last


def _for_blas(x: Tensor) -> bool:
    """Tell whether BLAS takes a matrix as it lies; torch.bmm takes another one item by item."""
    inner, outer = sorted(zip(x.stride(), x.shape, strict=True))
    return inner[0] == 1 and outer[0] >= inner[1]
