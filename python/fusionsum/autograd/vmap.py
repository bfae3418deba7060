"""Operations under vmap: the sum with a batch axis in front of every operand, and any other one item at a time.

What lives elsewhere: telling torch of these rules (``operations.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .. import reference, tensors
from ..call import Call
from . import derivatives
from .registration import apply, registered


def _batch_first(size: int, given: Sequence[Any], axes: Sequence[Any]) -> list[Any]:
    return [
        x if x is None else x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
        for x, axis in zip(given, axes, strict=True)
    ]


def _batched(size: int, axes: Call, call: Call) -> tuple[Call, Call]:
    """Move the batch first; then insert axes of 1 after it, so that the others still line up on the right."""
    operands = _batch_first(size, call.operands, axes.operands)
    masks = [
        mask if mask is None else reference.align_mask(mask, x)
        for mask, x in zip(_batch_first(size, call.masks, axes.masks), operands, strict=True)
    ]
    ndim = max(x.ndim for x in operands if x is not None)
    padded, padded_masks = (
        [x if x is None else x.reshape(size, *(1,) * (ndim - x.ndim), *x.shape[1:]) for x in group]
        for group in (operands, masks)
    )
    dim = call.dim if call.dim < 0 else call.dim - (ndim - 1)
    return call.with_operands(operands, masks), call.with_operands(padded, padded_masks)._replace(dim=dim)


def fusion_sum(size: int, axes: Call, call: Call) -> tuple[Tensor, int]:
    """Evaluate a batch of sums; `axes` has the batch axis, or None, in the place of every operand and mask."""
    unpadded, batched = _batched(size, axes, call)
    return derivatives.fusion_sum(batched).to(tensors.result_dtype(unpadded, batch_dims=1)), 0


def fusion_sum_grad(
    size: int, grad_axis: Any, axes: Call, grad_output: Tensor, call: Call, needs: Sequence[bool]
) -> tuple[list[Tensor], list[int]]:
    """Evaluate the gradients of a batch of sums."""
    unpadded, batched = _batched(size, axes, call)
    grads = derivatives.fusion_sum_grad(_batch_first(size, [grad_output], [grad_axis])[0], batched, needs)
    found = [d.reshape(x.shape) for d, x in zip(grads, unpadded.operands, strict=True) if d is not None]
    return found, [0] * len(found)


def one_by_one(name: str, size: int, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
    """Apply an operation to each item of a batch: a call for those that fill the processor by themselves."""
    leaves, spec = _pytree.tree_flatten(inputs)
    batched = [
        x if axis is None else x.movedim(axis, 0) for x, axis in zip(leaves, _pytree.tree_leaves(in_dims), strict=True)
    ]
    is_batched = [axis is not None for axis in _pytree.tree_leaves(in_dims)]

    def item(take: Any) -> Any:
        items = [take(x) if mapped else x for x, mapped in zip(batched, is_batched, strict=True)]
        return _pytree.tree_unflatten(items, spec)

    found = [apply(name, *item(lambda x, i=i: x[i])) for i in range(size)]
    if not found:  # the shapes of the outputs are those of an item
        found = [registered[name].fake(*item(lambda x: x.new_empty(x.shape[1:])))]
    if isinstance(found[0], Tensor):
        return torch.stack(found)[:size], 0
    return [torch.stack(outputs)[:size] for outputs in zip(*found, strict=True)], [0] * len(found[0])
