"""Sums of tensors that are products of matrices: all pairs, mixing, and all others that split in two.

    F[l, r] = sum_i P[l, i] * Q[r, i],    dP = U @ Q,    dQ = U.T @ P

where P is the product of the operands that vary with l, Q that of the operands that vary with r, and U the gradient of F.

What lives here: the one decision whether a call of tensors splits (`route`); on CUDA, torch's products of matrices and the
tiles in which they are taken. What lives elsewhere: how a call splits, and the road by the native scores, which form P and
Q as they pack them and which tensors on the CPU take (``split.py``); forming a tile of P or Q, and the gradients of its
operands from dP or dQ: these are a fusion sum over a single term and its gradient, which ``tensors.py`` evaluates.

A product is never kept: backward forms it again. All is accumulated in float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, split, tensors
from .backend import native
from .call import Call, check
from .split import Product, Side, Sides

TILE_BYTES = 2**25  # on CUDA, of a tile of P or Q, and of a block of U or F: a call holds a few of each at a time
# Rows of a tile, if a side has several: with fewer, BLAS is bound by memory, and tiles are formed too often.
LEAST_ROWS = 512

Tile = tuple[slice, ...]
_PLAIN = Tensor, torch.nn.Parameter


class Split(NamedTuple):
    """How a call splits in two. It holds no tensor: backward takes the split that forward has found."""

    shape: tuple[int, ...]  # the broadcast shape of all operands
    wide: torch.dtype  # of all arithmetic
    sides: Sides
    tiles: tuple[list[Tile], list[Tile]]  # in which each side's rows are taken


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
    if not split.is_large(fusion_weights, factors, _PLAIN):
        return None, None
    call = check(fusion_weights, factors, activations, present, absent, dim, grad_output=grad_output)
    return call, _split(call, grad_output)


def fusion_sum(call: Call, found: Split) -> Tensor:
    """Evaluate the sum as a product of matrices."""
    if _by_scores(call):
        output = split.fusion_sum(torch, native.score_matrix, call, found.sides, tensors.result_dtype(call))
        if output is not NotImplemented:
            return output
    with torch._C._DisableAutocast():  # else torch would round its operands
        return _forward(call, found)


def fusion_sum_grad(grad_output: Tensor, call: Call, found: Split, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Evaluate the gradients that are needed as products of matrices; None for the others."""
    with torch._C._DisableAutocast():
        if _by_scores(call):
            kernels = native.score_matrix_grad, tensors.fusion_sum_grad
            grads = split.fusion_sum_grad(torch, *kernels, grad_output, call, found.sides, needs)
            if grads is not NotImplemented:
                return grads
        return _backward(grad_output, call, found, needs)


def _by_scores(call: Call) -> bool:
    """Tell whether the native scores evaluate a call that splits; elsewhere torch's products of matrices do."""
    return native is not None and call.factors[0].device.type == "cpu" and split.by_scores(call)


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
    if not is_plain(*call.operands, *call.masks, grad_output):
        return None
    sides = split.find_sides(call)
    if sides is None:
        return None

    shape, arrays = call.shape, call.arrays if grad_output is None else (*call.arrays, grad_output)
    wide = getattr(torch, reference.accumulator(arrays))
    terms, entries = shape[call.dim], TILE_BYTES // wide.itemsize
    most = entries // max(terms, LEAST_ROWS)
    extents = [min(most, split.extent(shape, axes)) for axes, _ in sides]
    if extents[0] < extents[1] == most:  # the left side in one tile, the right side in several
        limits = [most, entries // max(terms, extents[0])]
    else:  # the left side may be in several tiles: they are rows of the output, which are contiguous
        limits = [entries // max(terms, extents[1]), most]
    tiles = []
    for (axes, _), limit in zip(sides, limits, strict=True):
        sizes = [shape[axis] for axis in axes]
        if _by_scores(call):
            limit = math.prod(sizes)
        tiles.append(list(_tiles(sizes, limit)))
        if len(tiles[-1]) > 1 and limit < LEAST_ROWS:
            return None
    return Split(shape, wide, sides, (tiles[0], tiles[1]))


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


def _products(call: Call, found: Split) -> tuple[Product, Product]:
    left, right = (_product(call, found, side, tiles) for side, tiles in zip(found.sides, found.tiles, strict=True))
    return left, right


def _product(call: Call, found: Split, side: Side, tiles: list[Tile]) -> Product:
    product = split.product(torch, call, side)
    if len(tiles) == 1:
        return product
    # The gradient of an operand that tiles share is summed over them before it is rounded.
    rows = set(range(-2 - len(side.axes), -2))
    return product._replace(operands=[x if split.varying(x) >= rows else x.to(found.wide) for x in product.operands])


def _call(product: Product, tile: Tile, wide: torch.dtype) -> Call:
    """Make the call whose sum, over a single term, is a tile of the product, of dtype `wide`."""
    masks = [None if mask is None else _within(mask, tile) for mask in product.masks]
    call = product._replace(operands=[_within(x, tile) for x in product.operands], masks=masks).call()
    if tensors.result_dtype(call) == wide:
        return call
    weights, (first, *_) = call.fusion_weights, call.factors  # weights of that dtype widen it
    return call._replace(fusion_weights=first.new_ones(1, dtype=wide) if weights is None else weights.to(wide))


def _formed(product: Product, tile: Tile, wide: torch.dtype) -> Tensor:
    """Form a tile of the product: a matrix of rows by terms."""
    if product.is_an_operand:
        block = _within(product.operands[0], tile)
    else:
        block = tensors.fusion_sum(_call(product, tile, wide))
    return block.reshape(-1, product.terms).to(wide)


def _within(x: Tensor, tile: Tile) -> Tensor:
    """Take a tile of a view; along the axes where the view has size 1, all tiles share its entries."""
    return x[tuple(slice(None) if n == 1 else part for n, part in zip(x.shape, tile, strict=False))]


def _forward(call: Call, found: Split) -> Tensor:
    dtype = tensors.result_dtype(call)
    output = call.factors[0].new_empty(call.output_shape, dtype=dtype)
    matrix = output.squeeze()  # to the axes of both sides
    left, right = _products(call, found)
    for column_tile in found.tiles[1]:
        columns = _formed(right, column_tile, found.wide)
        for row_tile in found.tiles[0]:
            rows = _formed(left, row_tile, found.wide)
            block = matrix[row_tile + column_tile].view(len(rows), len(columns))
            direct = dtype == found.wide and block.is_contiguous()
            result = block if direct else rows.new_empty(block.shape)
            _multiply(rows, columns.T, result)
            if not direct:
                block.copy_(result)
    return output


def _backward(grad_output: Tensor, call: Call, found: Split, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    matrix, operands = grad_output.squeeze(), call.operands
    grads: list[Any] = [None] * len(operands)
    products = _products(call, found)
    for i, (product, tiles) in enumerate(zip(products, found.tiles, strict=True)):
        side = product.side
        wanted = [needs[k] for k in side.members]
        if not any(wanted):
            continue
        as_found = len(tiles) == 1 and call.dim == -1  # then a tile's gradients are the operands', as they lie
        for k, x, want in zip(side.members, product.operands, wanted, strict=True):
            if want and not as_found:
                grads[k] = torch.empty(operands[k].shape, dtype=x.dtype, device=x.device)
        seen = set()
        for tile, d_matrix in _d_product(matrix, products, i, found):
            d_product = d_matrix.view(*(part.stop - part.start for part in tile), product.terms)
            if product.is_an_operand:
                of_members: Sequence[Any] = [d_product]
            else:
                of_tile = _call(product, tile, found.wide)
                # 1 if the call has no weights, or only ones that widen
                lacking = 1 + len(of_tile.factors) - len(wanted)
                of_members = tensors.fusion_sum_grad(d_product, of_tile, [False] * lacking + wanted)[lacking:]
            for k, d in zip(side.members, of_members, strict=True):
                if as_found and d is not None:
                    grads[k] = d.view(operands[k].shape)
                if as_found or d is None:
                    continue
                to = split.side_view(torch, grads[k], len(found.shape), side.axes, call.dim)
                key = k, tuple(part.start for part, n in zip(tile, to.shape, strict=False) if n != 1)
                to = _within(to, tile)
                to.add_(d.view(to.shape)) if key in seen else to.copy_(d.view(to.shape))
                seen.add(key)
    return tuple(d if d is None else d.to(x.dtype) for d, x in zip(grads, operands, strict=True))


def _d_product(
    matrix: Tensor, products: tuple[Product, Product], i: int, found: Split
) -> Iterator[tuple[Tile, Tensor]]:
    """Yield the tiles of the gradient of side i, each a matrix of rows by terms."""
    terms, other, other_tiles = products[i].terms, products[1 - i], found.tiles[1 - i]
    kept = _formed(other, other_tiles[0], found.wide) if len(other_tiles) == 1 else None
    for tile in found.tiles[i]:
        d_matrix = matrix.new_empty((math.prod(part.stop - part.start for part in tile), terms), dtype=found.wide)
        for j, other_tile in enumerate(other_tiles):
            factor = _formed(other, other_tile, found.wide) if kept is None else kept
            if i == 0:
                block = matrix[tile + other_tile].reshape(-1, len(factor))
            else:
                block = matrix[other_tile + tile].reshape(len(factor), -1).T
            _multiply(block.to(found.wide), factor, d_matrix, add=j > 0)
        yield tile, d_matrix


def _multiply(a: Tensor, b: Tensor, to: Tensor, add: bool = False) -> None:
    """Put the product of two matrices into a contiguous one, or add it.

    cuBLAS gives the same bits in every run; TF32 is off unless torch is told otherwise.
    """
    to.addmm_(a, b, beta=int(add))
