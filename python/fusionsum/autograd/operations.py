"""The operations ``fusionsum::fusion_sum`` and ``fusionsum::fusion_sum_grad``: what torch is told of each, one record each.

What lives elsewhere: the machinery that takes a record (``registration.py``), the derivatives and the rules of vmap that
the records name (``derivatives.py``, ``vmap.py``).
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from .. import contraction, reference, tensors
from ..call import Call, check
from . import derivatives, schema, vmap
from .registration import Operation, register


def _plain(given: tuple[Any, ...]) -> Call:
    """Return the call, unchecked, with subclasses of tensors as the tensors they are."""
    call = schema.call_of(given)
    operands, masks = (
        [x if x is None or type(x) is Tensor else x.as_subclass(Tensor) for x in group]
        for group in (call.operands, call.masks)
    )
    return call.with_operands(operands, masks)


def _output_shape(call: Call, grad_output: Any = None) -> tuple[Any, ...]:
    """Return the output's shape; check the call unless its sizes are symbolic: the checks would fix them."""
    given = [x for x in (*call.arrays, *call.masks, grad_output) if x is not None]
    if all(isinstance(n, int) for x in given for n in x.shape):
        return check(*call, grad_output=grad_output).output_shape
    shape = list(torch.broadcast_shapes(*(x.shape for x in call.arrays)))
    del shape[call.dim]
    return tuple(shape)


# ---- fusion_sum ------------------------------------------------------------------------------------------------------


def _sum_kernel(*given: Any) -> Tensor:
    unchecked = _plain(given)
    call, split = contraction.route(*unchecked)
    if split is not None:
        return contraction.fusion_sum(call, split)
    return tensors.fusion_sum(call or unchecked, checked=call is not None)


def _sum_fake(*given: Any) -> Tensor:
    call = schema.call_of(given)
    return call.factors[0].new_empty(_output_shape(call), dtype=tensors.result_dtype(call))


def _sum_backward(grad: Tensor, needs: Any, *given: Any) -> tuple[Any, ...]:
    of_weights, of_factors, *_ = needs
    d_weights, *d_factors = derivatives.fusion_sum_grad(grad, schema.call_of(given), [of_weights, *of_factors])
    return d_weights, d_factors, None, None, None, None


def _sum_jvp(tangents: Any, *given: Any) -> Tensor | None:
    of_weights, of_factors, *_ = tangents
    return derivatives.along([of_weights, *of_factors], schema.call_of(given))


def _sum_vmap(size: int, in_dims: Any, *given: Any) -> tuple[Tensor, int]:
    return vmap.fusion_sum(size, schema.call_of(in_dims), schema.call_of(given))


def _sum_decomposition(*given: Any) -> Tensor:
    """Evaluate the formula at the top of ``reference.py`` by torch's own operations, which store the whole product."""
    call = schema.call_of(given)
    wide = getattr(torch, reference.accumulator(call.arrays))
    values = [] if call.fusion_weights is None else [call.fusion_weights.to(wide)]
    for z, activation, mask in zip(call.factors, call.activations, call.present, strict=True):
        values.append(reference.value(torch, z.to(wide), activation, mask, call.absent))
    return functools.reduce(operator.mul, values).sum(call.dim).to(tensors.result_dtype(call))


register(
    Operation(
        name="fusion_sum",
        schema=f"({schema.CALL}) -> Tensor",
        kernel=_sum_kernel,
        fake=_sum_fake,
        backward=_sum_backward,
        jvp=_sum_jvp,
        vmap=_sum_vmap,
        decomposition=_sum_decomposition,
    )
)


# ---- fusion_sum_grad: the gradients that are needed ------------------------------------------------------------------


def _grad_kernel(grad_output: Tensor, *rest: Any) -> list[Tensor]:
    *given, needs = rest
    unchecked = _plain(tuple(given))
    call, split = contraction.route(*unchecked, grad_output=grad_output)
    if split is not None:
        found: Any = contraction.fusion_sum_grad(grad_output, call, split, needs)
    else:
        found = tensors.fusion_sum_grad(grad_output, call or unchecked, needs, checked=call is not None)
    return [d for d in found if d is not None]


def _grad_fake(grad_output: Tensor, *rest: Any) -> list[Tensor]:
    *given, needs = rest
    call = schema.call_of(given)
    _output_shape(call, grad_output)
    return [x.new_empty(x.shape) for x, need in zip(call.operands, needs, strict=True) if need]


def _grad_backward(cotangents: Any, wanted: Any, grad_output: Tensor, *rest: Any) -> tuple[Any, ...]:
    *given, needs = rest
    of_grad, of_weights, of_factors, *_ = wanted
    wanted = [of_grad, of_weights, *of_factors]
    found = derivatives.second(cotangents, wanted, grad_output, schema.call_of(given), needs)
    d_grad, d_weights, *d_factors = found
    return d_grad, d_weights, d_factors, None, None, None, None, None


def _grad_jvp(tangents: Any, grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *given, needs = rest
    call = schema.call_of(given)
    of_grad, of_weights, of_factors, *_ = tangents
    found = derivatives.across([of_weights, *of_factors], grad_output, call, needs)
    if of_grad is not None:
        found = derivatives.added(found, derivatives.fusion_sum_grad(of_grad, call, needs))
    needed = [(d, x) for d, x, need in zip(found, call.operands, needs, strict=True) if need]
    return tuple(torch.zeros_like(x) if d is None else d for d, x in needed)


def _grad_vmap(size: int, in_dims: Any, grad_output: Tensor, *rest: Any) -> tuple[list[Tensor], list[int]]:
    *given, needs = rest
    grad_axis, *axes, _ = in_dims
    return vmap.fusion_sum_grad(size, grad_axis, schema.call_of(axes), grad_output, schema.call_of(given), needs)


register(
    Operation(
        name="fusion_sum_grad",
        schema=f"(Tensor grad_output, {schema.CALL}, bool[] needs) -> Tensor[]",
        kernel=_grad_kernel,
        fake=_grad_fake,
        backward=_grad_backward,
        jvp=_grad_jvp,
        vmap=_grad_vmap,
    )
)
