"""The sum and its derivatives, whatever watches the call.

The sum is linear in every operand, so all its derivatives are again sums, or gradients of sums, with operands replaced
by directions (`along`, `across`). Activations break that. The first gradient has them in the kernel; beyond it, and under
functorch and forward AD always, torch's own operations apply them before a sum without any (`_activated`): right at every
order, but slower, and phi(z) is stored.

What lives elsewhere: the formulas of the activations (``reference.py``), telling torch of these derivatives
(``operations.py``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference, tensors
from ..call import Call
from . import schema
from .registration import apply, layered


def fusion_sum(call: Call) -> Tensor:
    """Evaluate the sum, seen by all that watches."""
    if not layered():
        return apply("fusion_sum", *schema.arguments(call))
    return apply("fusion_sum", *schema.arguments(_activated(call))).to(tensors.result_dtype(call))


def fusion_sum_grad(grad_output: Tensor, call: Call, needs: Sequence[bool]) -> list[Any]:
    """Gradients of the sum with respect to each operand, seen by all that watches; None for those not needed."""
    operands = (call.fusion_weights, *call.factors)  # torch.compile of torch 2.10 knows no property of a NamedTuple
    needs = [need and x is not None for need, x in zip(needs, operands, strict=True)]
    if not any(needs):
        return [None] * len(needs)
    if any(call.activations) and (layered() or _records(grad_output, *operands)):
        grads = fusion_sum_grad(grad_output, _activated(call), needs)
        for k, (z, mask, name) in enumerate(zip(call.factors, call.present, call.activations, strict=True), 1):
            if name and needs[k]:
                slope = reference.derivative(torch, _widened(z), name, mask)
                grads[k] = (grads[k] * slope).sum_to_size(z.shape).to(z.dtype)
        return grads
    found = iter(apply("fusion_sum_grad", grad_output, *schema.arguments(call), needs))
    return [next(found) if need else None for need in needs]


def _records(*given: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in given if x is not None)


def _widened(z: Tensor) -> Tensor:
    """Widen as the kernels do before an activation."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _activated(call: Call) -> Call:
    """Apply the activations; the masks stay with the sum."""
    factors = [
        reference.ACTIVATIONS[name][0](torch, reference.present_or_zero(torch, _widened(z), mask)) if name else z
        for z, name, mask in zip(call.factors, call.activations, call.present, strict=True)
    ]
    return call._replace(factors=tuple(factors), activations=(None,) * len(factors))


def _replaced(call: Call, k: int, direction: Tensor) -> Call:
    """Put a direction in the place of operand k: it counts as present, and as 0 wherever operand k is absent."""
    operands, masks = list(call.operands), list(call.masks)
    if masks[k] is not None:
        direction = torch.where(reference.align_mask(masks[k], operands[k]), direction, 0)
    operands[k], masks[k] = direction, None
    return call.with_operands(operands, masks)


def along(directions: Sequence[Any], call: Call) -> Tensor | None:
    """Differentiate a sum without activations along directions, one or None per operand."""
    terms = [fusion_sum(_replaced(call, k, v)) for k, v in enumerate(directions) if v is not None]
    return functools.reduce(operator.add, terms) if terms else None


def across(directions: Sequence[Any], grad_output: Tensor, call: Call, needs: Sequence[bool]) -> list[Any]:
    """Differentiate the gradients of a sum without activations along directions: the Hessian times directions.

    It is the gradient of operand j where operand k is replaced by its direction, summed over every k but j.
    """
    total: list[Any] = [None] * len(needs)
    for k, v in enumerate(directions):
        if v is not None:
            others = [need and j != k for j, need in enumerate(needs)]
            total = added(total, fusion_sum_grad(grad_output, _replaced(call, k, v), others))
    return total


def added(these: Sequence[Any], those: Sequence[Any]) -> list[Any]:
    """Add gradients, of which some are None."""
    return [b if a is None else a if b is None else a + b for a, b in zip(these, those, strict=True)]


def second(
    cotangents: Sequence[Any], wanted: Sequence[bool], grad_output: Tensor, call: Call, needs: Sequence[bool]
) -> list[Any]:
    """Gradients of `fusion_sum_grad` with respect to `grad_output` and each operand, as wanted.

    There is one cotangent per gradient needed.
    """
    if any(call.activations):
        return _second_by_autograd(cotangents, wanted, grad_output, call, needs)
    given = iter(cotangents)
    directions = [next(given) if need else None for need in needs]
    of_output = along(directions, call) if wanted[0] else None
    of_operands = across(directions, grad_output, call, wanted[1:])
    return [of_output if of_output is None else of_output.to(grad_output.dtype), *of_operands]


def _second_by_autograd(
    cotangents: Sequence[Any], wanted: Sequence[bool], grad_output: Tensor, call: Call, needs: Sequence[bool]
) -> list[Any]:
    """Differentiate the gradients as composed when recorded: for the operation called by hand, with activations."""
    create_graph, inputs = torch.is_grad_enabled(), [grad_output, *call.operands]
    with torch.enable_grad():
        if not create_graph:
            inputs = [x if x is None else x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
        recorded = call.with_operands(inputs[1:], call.masks)
        outputs = [d for d in fusion_sum_grad(inputs[0], recorded, needs) if d is not None]
        pairs = [(d, v) for d, v in zip(outputs, cotangents, strict=True) if d.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        of = [x for x, w in zip(inputs, wanted, strict=True) if w]
        differentiable, their_cotangents = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(differentiable, of, their_cotangents, create_graph=create_graph, allow_unused=True)
        )
    return [next(found) if w else None for w in wanted]
