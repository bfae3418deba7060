"""The fusion sum for torch: four ways to the same kernels, chosen by what is watching the call.

What lives here: all that needs torch's machinery. What lives elsewhere: the checks and their messages (``api.py``),
the formulas and the fallback (``reference.py``), the kernels (``csrc/``).

1. Plain tensors, nothing records: the native module, called directly.
2. Plain tensors, autograd records: `_Recorded`, a ctx-style autograd.Function around the same call.
3. A functorch transform or forward AD: `_Sum` and `_Grad`, Functions with setup_context, jvp and vmap, which plain
   recording must not pay for (65 us a call more).
4. All else (compile, export, modes, subclasses, double backward, no native module): the registered ops
   ``fusionsum::fusion_sum`` and ``fusionsum::fusion_sum_grad``, which compilers and modes can see.

The sum is linear in every operand, so all its derivatives are again sums, or gradients of sums, with operands replaced
by directions (`_along`, `_across`). Activations break that. The first gradient has them in the kernel; beyond it, and
in way 3 always, torch's own operations apply them before a sum without any (`_activated`): right at every order, but
slower, and phi(z) is stored.

Autocast changes nothing: operands are taken as they come and promote, as in ``torch.mul``, compiled or not. Limits of
torch's, each an error: ``torch.compile`` has no double backward and no ``torch.func.grad`` of a registered op, and
``torch.jit.trace`` no lists of optional tensors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils import _pytree

from . import api, contraction, reference
from .backend import adopt_torch, load_cuda, native

adopt_torch(torch)

_BEYOND_CUDA = "the CUDA kernels take at most 11 dims of a size above 1, and torch 2.10 or newer"
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_traces = torch._C._is_tracing
_any_requires_grad = torch._C._any_requires_grad


def _layered() -> bool:
    """Tell whether way 3 is needed. A compiler traces functorch itself, and cannot trace jvp rules.

    torch 2.10 calls the ops' vmap rules, on fake tensors, while a compiler traces and `is_compiling` is false.
    """
    layered = _functorch_active() or forward_ad._current_level >= 0
    return layered and not is_compiling() and TracingContext.try_get() is None


def fusion_sum(
    fusion_weights: Any, factors: tuple[Any, ...], activations: Any, present: Any, absent: Any, dim: Any
) -> Tensor:
    """Evaluate `api.fusion_sum` for torch tensors; takes the caller's arguments, unchecked."""
    if native is not None and not is_dynamo_compiling():
        if torch.is_grad_enabled() and _any_requires_grad(fusion_weights, *factors):
            if not (_functorch_active() or forward_ad._current_level >= 0 or _dispatch_modes() or _jit_traces()):
                return _record((activations, present, absent, dim), fusion_weights, *factors)
        elif not contraction.likely(fusion_weights, factors):
            output = native.fusion_sum(fusion_weights, factors, activations, present, absent, dim, False)
            if output is not NotImplemented:  # it declines where anything watches
                return output
    return _sum(_checked(fusion_weights, factors, activations, present, absent, dim))


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
    """Evaluate `api.fusion_sum_grad` for torch tensors, only the gradients needed; differentiable itself."""
    if (
        native is not None
        and not is_dynamo_compiling()
        and not (torch.is_grad_enabled() and _any_requires_grad(grad_output, fusion_weights, *factors))
        and not contraction.likely(fusion_weights, factors)
    ):
        given = (grad_output, fusion_weights, factors, activations, present, absent, dim, needs)
        grads = native.fusion_sum_grad(*given, False)
        if grads is not NotImplemented:
            return grads
    if grad_output is None:
        raise TypeError("grad_output: expected a torch.Tensor of the output's shape, got None")
    call = _checked(fusion_weights, factors, activations, present, absent, dim, grad_output)
    return tuple(_grad(grad_output, needs, call))


class _Recorded(torch.autograd.Function):
    """The sum as plain autograd records it; saves its inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *operands: Any) -> Tensor:
        activations, present, absent, dim = options
        output = NotImplemented
        if not contraction.likely(operands[0], operands[1:]):
            output = native.fusion_sum(operands[0], operands[1:], activations, present, absent, dim, True)
        if output is NotImplemented:
            output = _sum(_checked(operands[0], operands[1:], activations, present, absent, dim))
        ctx.save_for_backward(*operands, *(present or ()))
        ctx.options = tuple(activations) if type(activations) is list else activations, absent, dim
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        activations, absent, dim = ctx.options
        needs, saved = ctx.needs_input_grad[1:], ctx.saved_tensors
        factors, present = saved[1 : len(needs)], saved[len(needs) :] or None
        return None, *fusion_sum_grad(grad, saved[0], factors, activations, present, absent, dim, needs)


# Past the Python of Function.apply, which asks about functorch once more and looks for dead wrappers.
_record = super(torch.autograd.Function, _Recorded).apply


# ---- the sum and its derivatives, whatever watches -------------------------------------------------------------------


class _Call(NamedTuple):
    """A sum: weights (or None) and factors, None and one mask (or None) per factor, and activations, "" for none."""

    operands: list[Any]
    masks: list[Any]
    absent: str
    dim: int
    names: Sequence[str] = ()

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the registered op."""
        names = self.names or [""] * (len(self.operands) - 1)
        return self.operands[0], self.operands[1:], self.masks[1:], names, self.absent, self.dim


def _checked(weights: Any, factors: Any, activations: Any, present: Any, absent: Any, dim: Any, *grad: Any) -> _Call:
    if is_compiling():  # sizes may be symbols; the fake implementations check what they can
        names = api._per_factor("activations", activations, len(factors), (str,))
        masks = api._per_factor("present", present, len(factors), ())
    else:
        names, masks, dim = api.check(weights, factors, activations, present, absent, dim, *grad)
    return _Call([weights, *factors], [None, *masks], absent, dim, [name or "" for name in names])


def _sum(call: _Call) -> Tensor:
    if not _layered():
        return _sum_op(*call.arguments())
    return _Sum.apply(call.absent, call.dim, *_activated(call), *call.masks).to(_result_dtype(call.operands))


def _grad(grad: Tensor, needs: Sequence[bool], call: _Call) -> list[Any]:
    """Gradients of `_sum` with respect to each operand; None for what is not needed."""
    needs = [need and x is not None for need, x in zip(needs, call.operands, strict=True)]
    if not any(needs):
        return [None] * len(needs)
    layered = _layered()
    if any(call.names) and (layered or _records(grad, *call.operands)):
        grads = _grad(grad, needs, call._replace(operands=_activated(call), names=()))
        for k, (z, mask, name) in enumerate(zip(call.operands[1:], call.masks[1:], call.names, strict=True), 1):
            if name and needs[k]:
                derivative = reference.ACTIVATIONS[name][1](torch, _before_activation(z, mask))
                grads[k] = (grads[k] * derivative).sum_to_size(z.shape).to(z.dtype)
        return grads
    if layered:
        found = iter(_Grad.apply(needs, call.absent, call.dim, grad, *call.operands, *call.masks))
    else:
        found = iter(_grad_op(grad, *call.arguments(), needs))
    return [next(found) if need else None for need in needs]


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)


def _before_activation(z: Tensor, mask: Tensor | None) -> Tensor:
    """Widen as the kernels do, and put 0 for what is absent, which may be NaN."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if mask is None else torch.where(reference.align_mask(mask, z), z, 0)


def _activated(call: _Call) -> list[Any]:
    operands = list(call.operands)
    for k, name in enumerate(call.names, 1):
        if name:
            operands[k] = reference.ACTIVATIONS[name][0](torch, _before_activation(operands[k], call.masks[k]))
    return operands


def _replaced(call: _Call, k: int, direction: Tensor) -> _Call:
    """Put a direction in the place of operand k: it counts as present, and as 0 wherever operand k is absent."""
    operands, masks = list(call.operands), list(call.masks)
    if masks[k] is not None:
        direction = torch.where(reference.align_mask(masks[k], operands[k]), direction, 0)
    operands[k], masks[k] = direction, None
    return call._replace(operands=operands, masks=masks)


def _along(directions: Sequence[Any], call: _Call) -> Tensor | None:
    """Differentiate a sum without activations along directions, one or None per operand."""
    terms = [_sum(_replaced(call, k, v)) for k, v in enumerate(directions) if v is not None]
    return functools.reduce(operator.add, terms) if terms else None


def _across(directions: Sequence[Any], grad: Tensor, needs: Sequence[bool], call: _Call) -> list[Any]:
    """Differentiate the gradients of a sum without activations along directions: the Hessian times directions.

    It is the gradient of operand j where operand k is replaced by its direction, summed over every k but j.
    """
    total: list[Any] = [None] * len(needs)
    for k, v in enumerate(directions):
        if v is not None:
            others = [need and j != k for j, need in enumerate(needs)]
            total = _added(total, _grad(grad, others, _replaced(call, k, v)))
    return total


def _added(these: Sequence[Any], those: Sequence[Any]) -> list[Any]:
    return [b if a is None else a if b is None else a + b for a, b in zip(these, those, strict=True)]


def _second(
    cotangents: Sequence[Any], wanted: Sequence[bool], grad: Tensor, needs: Sequence[bool], call: _Call
) -> list[Any]:
    """Gradients of `_grad` with respect to `grad` and each operand, as wanted; one cotangent per gradient needed."""
    if any(call.names):
        return _second_by_autograd(cotangents, wanted, grad, needs, call)
    given = iter(cotangents)
    directions = [next(given) if need else None for need in needs]
    along = _along(directions, call) if wanted[0] else None
    return [along if along is None else along.to(grad.dtype), *_across(directions, grad, wanted[1:], call)]


def _second_by_autograd(
    cotangents: Sequence[Any], wanted: Sequence[bool], grad: Tensor, needs: Sequence[bool], call: _Call
) -> list[Any]:
    """Differentiate `_grad` as it is composed when recorded; for the op called with activations and grad by hand."""
    create_graph, inputs = torch.is_grad_enabled(), [grad, *call.operands]
    with torch.enable_grad():
        if not create_graph:
            inputs = [x if x is None else x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
        outputs = [d for d in _grad(inputs[0], needs, call._replace(operands=inputs[1:])) if d is not None]
        pairs = [(d, v) for d, v in zip(outputs, cotangents, strict=True) if d.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        of = [x for x, w in zip(inputs, wanted, strict=True) if w]
        differentiable, their_cotangents = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(differentiable, of, their_cotangents, create_graph=create_graph, allow_unused=True)
        )
    return [next(found) if w else None for w in wanted]


# ---- vmap: a batch axis in front of every operand --------------------------------------------------------------------


def _batch_first(size: int, tensors: Sequence[Any], axes: Sequence[Any]) -> list[Any]:
    return [
        x if x is None else x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
        for x, axis in zip(tensors, axes, strict=True)
    ]


def _batched(size: int, axes: Any, call: _Call) -> tuple[list[Any], _Call]:
    """Move the batch first, then insert axes of 1 after it, so that the others still line up on the right."""
    operands, masks = (_batch_first(size, *group) for group in zip((call.operands, call.masks), axes, strict=True))
    masks = [mask if mask is None else reference.align_mask(mask, x) for mask, x in zip(masks, operands, strict=True)]
    ndim = max(x.ndim for x in operands if x is not None)
    padded, padded_masks = (
        [x if x is None else x.reshape(size, *(1,) * (ndim - x.ndim), *x.shape[1:]) for x in group]
        for group in (operands, masks)
    )
    dim = call.dim if call.dim < 0 else call.dim - (ndim - 1)
    return operands, call._replace(operands=padded, masks=padded_masks, dim=dim)


def _vmap_sum(size: int, axes: Any, call: _Call) -> Any:
    operands, batched = _batched(size, axes, call)
    return _sum(batched).to(_result_dtype(operands, batch_dims=1)), 0


def _vmap_grad(size: int, grad_axis: Any, axes: Any, grad: Tensor, needs: Sequence[bool], call: _Call) -> Any:
    operands, batched = _batched(size, axes, call)
    grads = _grad(_batch_first(size, [grad], [grad_axis])[0], needs, batched)
    found = [d.reshape(x.shape) for d, x in zip(grads, operands, strict=True) if d is not None]
    return found, [0] * len(found)


def _result_dtype(tensors: Sequence[Tensor | None], batch_dims: int = 0) -> torch.dtype:
    """Promote as `reference.result_dtype` does, not counting the first `batch_dims` dims of the tensors."""
    given = [x for x in tensors if x is not None]
    voters = [x for x in given if x.ndim > batch_dims] or given
    return functools.reduce(torch.promote_types, [x.dtype for x in voters])


# ---- way 3: functorch and forward AD, without activations ------------------------------------------------------------


def _halves(tensors: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Split operands from masks, of which there are as many."""
    return list(tensors[: len(tensors) // 2]), list(tensors[len(tensors) // 2 :])


class _Sum(torch.autograd.Function):
    """apply(absent, dim, *operands, *masks)."""

    @staticmethod
    def forward(absent: str, dim: int, *tensors: Any) -> Tensor:
        return _sum_op(*_Call(*_halves(tensors), absent, dim).arguments())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        (*ctx.options,) = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call = _Call(*_halves(ctx.saved_tensors), *ctx.options)
        needs = _halves(ctx.needs_input_grad[2:])[0]
        return None, None, *_grad(grad, needs, call), *[None] * len(needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        return _along(_halves(tangents[2:])[0], _Call(*_halves(ctx.saved_tensors), *ctx.options))

    @staticmethod
    def vmap(info: Any, in_dims: Any, absent: str, dim: int, *tensors: Any) -> Any:
        return _vmap_sum(info.batch_size, _halves(in_dims[2:]), _Call(*_halves(tensors), absent, dim))


class _Grad(torch.autograd.Function):
    """apply(needs, absent, dim, grad, *operands, *masks); returns the gradients needed."""

    @staticmethod
    def forward(needs: Any, absent: str, dim: int, grad: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(_grad_op(grad, *_Call(*_halves(tensors), absent, dim).arguments(), needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.needs, *ctx.options = inputs[:3]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        grad, *tensors = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[3], *_halves(ctx.needs_input_grad[4:])[0]]
        found = _second(cotangents, wanted, grad, ctx.needs, _Call(*_halves(tensors), *ctx.options))
        return None, None, None, *found, *[None] * len(ctx.needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        grad, *tensors = ctx.saved_tensors
        call = _Call(*_halves(tensors), *ctx.options)
        found = _across(_halves(tangents[4:])[0], grad, ctx.needs, call)
        if tangents[3] is not None:
            found = _added(found, _grad(tangents[3], ctx.needs, call))
        needed = [(d, x) for d, x, need in zip(found, call.operands, ctx.needs, strict=True) if need]
        return tuple(torch.zeros_like(x) if d is None else d for d, x in needed)

    @staticmethod
    def vmap(info: Any, in_dims: Any, needs: Any, absent: str, dim: int, grad: Tensor, *tensors: Any) -> Any:
        call = _Call(*_halves(tensors), absent, dim)
        found, axes = _vmap_grad(info.batch_size, in_dims[3], _halves(in_dims[4:]), grad, needs, call)
        return tuple(found), tuple(axes)


# ---- way 4: the registered ops ---------------------------------------------------------------------------------------

_library = torch.library.Library("fusionsum", "DEF")
_ARGUMENTS = "Tensor? fusion_weights, Tensor[] factors, Tensor?[] present, str[] activations, str absent, int dim"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define(f"fusion_sum({_ARGUMENTS}) -> Tensor", tags=_TAGS)
_library.define(f"fusion_sum_grad(Tensor grad_output, {_ARGUMENTS}, bool[] needs) -> Tensor[]", tags=_TAGS)
_sum_op = torch.ops.fusionsum.fusion_sum.default
_grad_op = torch.ops.fusionsum.fusion_sum_grad.default


def _call(weights: Any, factors: Any, present: Any, names: Any, absent: str, dim: int) -> _Call:
    """Undo `_Call.arguments`."""
    return _Call([weights, *factors], [None, *present], absent, dim, names)


def _for_api(weights: Any, factors: Any, present: Any, names: Any, absent: str, dim: int) -> Any:
    plain = (x if x is None or type(x) is Tensor else x.as_subclass(Tensor) for x in (weights, *factors))
    return next(plain), tuple(plain), [name or None for name in names], present, absent, dim


def _sum_kernel(*arguments: Any) -> Tensor:
    given = _for_api(*arguments)
    if contraction.likely(*given[:2]):
        output = contraction.fusion_sum(_direct_sum, _result_dtype(given[:1] + given[1]), *given)
        if output is not NotImplemented:
            return output
    return _direct_sum(*given)


def _direct_sum(*given: Any) -> Tensor:
    output = NotImplemented if native is None else native.fusion_sum(*given, True)
    if output is not NotImplemented:
        return output
    names, masks, dim = api.check(*given)
    weights, factors, *_ = given
    arrays = (_array(weights), [_array(z) for z in factors], names, [_array(mask) for mask in masks])
    return _tensor(reference.fusion_sum(*arrays, given[4], dim), _result_dtype([weights, *factors]))


def _grad_kernel(grad: Tensor, *rest: Any) -> list[Tensor]:
    *arguments, needs = rest
    given: Any = (grad, *_for_api(*arguments), needs)
    found: Any = NotImplemented
    if contraction.likely(*given[1:3]):
        found = contraction.fusion_sum_grad(_direct_sum, _direct_grad, *given)
    if found is NotImplemented:
        found = _direct_grad(*given)
    return [d for d in found if d is not None]


def _direct_grad(grad: Tensor, *rest: Any) -> Sequence[Tensor | None]:
    *given, needs = rest
    found: Any = NotImplemented if native is None else native.fusion_sum_grad(grad, *rest, True)
    if found is not NotImplemented:
        return found
    names, masks, dim = api.check(*[*given, grad])
    weights, factors, *_ = given
    arrays = (_array(grad), _array(weights), [_array(z) for z in factors], names, [_array(mask) for mask in masks])
    found = reference.fusion_sum_grad(*arrays, given[4], dim, needs)
    return [d if d is None else _tensor(d, x.dtype) for d, x in zip(found, [weights, *factors], strict=True)]


def _array(x: Tensor | None) -> np.ndarray | None:
    """View a checked tensor as an array; bfloat16, which NumPy lacks, is widened, which is exact."""
    if x is None:
        return None
    if x.layout is not torch.strided:
        raise TypeError(f"factors, fusion_weights, present: expected dense tensors, got one of layout {x.layout}")
    if x.device.type == "cuda":
        raise ValueError(f"factors: are on {x.device}, but {load_cuda() or _BEYOND_CUDA}; or move them to the CPU")
    if x.device.type != "cpu":
        raise ValueError(f"factors: are on {x.device}, expected cpu or cuda, the devices with kernels")
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _tensor(array: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(array)).to(dtype).contiguous()


def _fake_shape(arguments: Sequence[Any], *grad: Any) -> list[Any]:
    operands, masks, _, dim, _ = _call(*arguments)
    given = [x for x in operands if x is not None]
    if all(isinstance(n, int) for x in (*given, *masks, *grad) if x is not None for n in x.shape):
        api.check(*_for_api(*arguments), *grad)  # else NumPy's broadcasting would fix the sizes, and the kernel checks
    shape = list(torch.broadcast_shapes(*(x.shape for x in given)))
    del shape[dim]
    return shape


def _fake_sum(*arguments: Any) -> Tensor:
    operands = _call(*arguments).operands
    return operands[1].new_empty(_fake_shape(arguments), dtype=_result_dtype(operands))


def _fake_grad(grad: Tensor, *rest: Any) -> list[Tensor]:
    *arguments, needs = rest
    _fake_shape(arguments, grad)
    return [x.new_empty(x.shape) for x, need in zip(_call(*arguments).operands, needs, strict=True) if need]


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    call = _call(*inputs)
    ctx.save_for_backward(*call.operands, *call.masks)
    ctx.options, ctx.no_gradient = call[2:], _no_gradient(inputs[2])


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    weights, *factors = _grad(grad, needs, _Call(*_halves(ctx.saved_tensors), *ctx.options))
    return weights, factors, *ctx.no_gradient


def _grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, *arguments, ctx.needs = inputs
    call = _call(*arguments)
    ctx.save_for_backward(grad, *call.operands, *call.masks)
    ctx.options, ctx.no_gradient = call[2:], _no_gradient(inputs[3])


def _grad_backward(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    grad, *tensors = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[2]]
    call = _Call(*_halves(tensors), *ctx.options)
    found = _second(cotangents, wanted, grad, ctx.needs, call)
    return found[0], found[1], found[2:], *ctx.no_gradient, None


def _no_gradient(present: list[Any]) -> tuple[Any, ...]:
    """Return what torch wants for present, activations, absent, dim: a list for a list that holds tensors only."""
    return [None] * len(present) if all(isinstance(mask, Tensor) for mask in present) else None, None, None, None


def _sum_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    return _vmap_sum(info.batch_size, _call(*in_dims)[:2], _call(*arguments))


def _grad_vmap(info: Any, in_dims: Any, grad: Tensor, *rest: Any) -> Any:
    *arguments, needs = rest
    return _vmap_grad(info.batch_size, in_dims[0], _call(*in_dims[1:-1])[:2], grad, needs, _call(*arguments))


def _grads_batched(rule: Any, *arguments: Any) -> Any:
    """Vmap under torch's older vmap, which is_grads_batched and gradcheck still use and which has no public rules."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    tensors = [x for x in _pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    size = max(torch._remove_batch_dim(x, level, 1, 0).shape[0] for x in tensors)
    unwrapped = _pytree.tree_map_only(Tensor, lambda x: torch._remove_batch_dim(x, level, size, 0), arguments)
    in_dims = _pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, arguments)
    found, _ = rule(SimpleNamespace(batch_size=size), in_dims, *unwrapped)
    return _pytree.tree_map(lambda x: torch._add_batch_dim(x, 0, level), found)


for _name, _kernel, _fake, _setup, _backward, _vmap in (
    ("fusion_sum", _sum_kernel, _fake_sum, _sum_setup, _sum_backward, _sum_vmap),
    ("fusion_sum_grad", _grad_kernel, _fake_grad, _grad_setup, _grad_backward, _grad_vmap),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # on every device: where it has no kernels, it says so
    _library.impl(_name, functools.partial(_grads_batched, _vmap), "Batched")
    torch.library.register_fake(f"fusionsum::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"fusionsum::{_name}", _backward, setup_context=_setup, lib=_library)
    torch.library.register_vmap(f"fusionsum::{_name}", _vmap, lib=_library)
