"""Which way a call of tensors takes: it is routed once, forward and backward together.

1. Plain tensors, nothing records: the native kernels, or products of matrices (``contraction.py``), called directly.
2. Plain tensors, autograd records: `_Recorded`, a ctx-style autograd.Function around the same; its backward takes the
   way of its forward.
3. All else (functorch, forward AD, compilers, modes, subclasses, double backward, no native module): the registered
   operations, which all that watches can see (``derivatives.py``).

A call of small operands on the first two ways is not checked in Python: the native module parses it, and declines it
(NotImplemented) if it is not wholly valid or something watches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from .. import contraction
from ..backend import native
from ..call import Call, check, spread
from ..contraction import route
from . import derivatives, dtensor, operations  # noqa: F401  (the operations are registered when they are imported)
from .registration import older_vmap_level

_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_traces = torch._C._is_tracing
_any_requires_grad = torch._C._any_requires_grad


def _watched() -> bool:
    """Tell whether anything but autograd's recording watches calls; the native module asks the same of itself."""
    return _functorch_active() or forward_ad._current_level >= 0 or _dispatch_modes() or _jit_traces()


def is_plain(given: Sequence[Any]) -> bool:
    """Tell whether kernels may take these tensors as they are, and nothing watches but, maybe, autograd's recording."""
    return not is_dynamo_compiling() and not (_watched() or older_vmap_level()) and contraction.is_plain(*given)


def records(given: Sequence[Any]) -> bool:
    """Tell whether autograd records what is made of these tensors."""
    return torch.is_grad_enabled() and _any_requires_grad(*given)


def fusion_sum(
    fusion_weights: Any, factors: tuple[Any, ...], activations: Any, present: Any, absent: Any, dim: Any
) -> Tensor:
    """Evaluate `api.fusion_sum` for tensors; takes the caller's arguments, unchecked."""
    call = None
    if native is not None and not is_dynamo_compiling():
        if torch.is_grad_enabled() and _any_requires_grad(fusion_weights, *factors):
            if not _watched():
                return _record((activations, present, absent, dim), fusion_weights, *factors)
        else:
            call, split = route(fusion_weights, factors, activations, present, absent, dim)
            if split is None:
                output = native.fusion_sum(fusion_weights, factors, activations, present, absent, dim, False)
                if output is not NotImplemented:
                    return output
            elif not _watched():
                return contraction.fusion_sum(call, split)
    return _watched_sum(call or _checked(fusion_weights, factors, activations, present, absent, dim))


def fusion_sum_grad(
    grad_output: Any,
    fusion_weights: Any,
    factors: tuple[Any, ...],
    activations: Any,
    present: Any,
    absent: Any,
    dim: Any,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Evaluate `api.fusion_sum_grad` for tensors, only the gradients needed; differentiable itself."""
    if grad_output is None:
        raise TypeError("grad_output: expected a torch.Tensor of the output's shape, got None")
    call = None
    if (
        native is not None
        and not is_dynamo_compiling()
        and not (torch.is_grad_enabled() and _any_requires_grad(grad_output, fusion_weights, *factors))
    ):
        call, split = route(fusion_weights, factors, activations, present, absent, dim, grad_output=grad_output)
        if split is None:
            given = (grad_output, fusion_weights, factors, activations, present, absent, dim, needs)
            grads = native.fusion_sum_grad(*given, False)
            if grads is not NotImplemented:
                return grads
        elif not _watched():
            return contraction.fusion_sum_grad(grad_output, call, split, needs)
    if call is None:
        call = _checked(fusion_weights, factors, activations, present, absent, dim, grad_output)
    return _watched_sum_grad(grad_output, call, needs)


def _watched_sum(call: Call) -> Tensor:
    """Evaluate a checked call that is neither the kernels' nor that of matrices."""
    if dtensor.is_among((call.fusion_weights, *call.factors, *call.present)):
        return dtensor.fusion_sum(call, fusion_sum)
    return derivatives.fusion_sum(call)


def _watched_sum_grad(grad_output: Tensor, call: Call, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Evaluate the gradients of such a call."""
    if dtensor.is_among((grad_output, call.fusion_weights, *call.factors, *call.present)):
        return dtensor.fusion_sum_grad(grad_output, call, needs, fusion_sum_grad)
    return tuple(derivatives.fusion_sum_grad(grad_output, call, needs))


def _checked(
    fusion_weights: Any, factors: Any, activations: Any, present: Any, absent: Any, dim: Any, grad_output: Any = None
) -> Call:
    if is_compiling():  # sizes may be symbolic; the operations' fake implementations check the call if they are not
        return spread(fusion_weights, factors, activations, present, absent, dim)
    return check(fusion_weights, factors, activations, present, absent, dim, grad_output=grad_output)


class _Recorded(torch.autograd.Function):
    """The sum as plain autograd records it; saves its inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *operands: Any) -> Tensor:
        activations, present, absent, dim = options
        call, split = route(operands[0], operands[1:], activations, present, absent, dim)
        if split is not None:
            output = contraction.fusion_sum(call, split)
        else:
            output = native.fusion_sum(operands[0], operands[1:], activations, present, absent, dim, True)
            if output is NotImplemented:
                call = call or check(operands[0], operands[1:], activations, present, absent, dim)
                output = _watched_sum(call)
        if call is not None:
            _, _, activations, present, absent, dim = call
        ctx.save_for_backward(*operands, *(present or ()))
        ctx.options = tuple(activations) if type(activations) is list else activations, absent, dim
        ctx.split, ctx.checked = split, call is not None
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs, saved = ctx.needs_input_grad[1:], ctx.saved_tensors
        weights, factors, present = saved[0], saved[1 : len(needs)], saved[len(needs) :]
        activations, absent, dim = ctx.options
        call = Call(weights, factors, activations, present or (None,) * len(factors), absent, dim)
        if not (torch.is_grad_enabled() and _any_requires_grad(grad, weights, *factors)):
            if ctx.split is None:
                found = native.fusion_sum_grad(grad, *call, needs, False)
                if found is not NotImplemented:
                    return None, *found
            elif contraction.is_plain(grad, *call.operands, *call.masks) and not _watched():
                return None, *contraction.fusion_sum_grad(grad, call, ctx.split, needs)
        if not ctx.checked:
            call = check(*call)
        return None, *_watched_sum_grad(grad, call, needs)


# Past the Python of Function.apply, which asks about functorch once more and unwraps dead functorch wrappers.
_record = super(torch.autograd.Function, _Recorded).apply
