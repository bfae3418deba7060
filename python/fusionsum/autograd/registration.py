"""Operations as torch knows them: one record each, and the machinery that takes it.

What lives here: registering a record with the dispatcher, autograd, vmap and the ONNX exporter, and the
``autograd.Function`` in which functorch and forward AD meet an operation. What lives elsewhere: the records
(``operations.py``).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils import _pytree

_functorch_active = torch._C._are_functorch_transforms_active
_library = torch.library.Library("fusionsum", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
registered: dict[str, Operation] = {}


class Operation(NamedTuple):
    """All that torch is told of an operation. Its functions take the arguments of the schema, `inputs`, in their order.

    An output is a tensor or a list of tensors, and so are its gradient and its tangent. In the gradient of a list, zeros
    stand for a tensor that nothing depends on; where `keeps` is given, None does.
    """

    name: str
    schema: str
    kernel: Callable[..., Any]  # (*inputs): the output, of plain tensors on any device
    fake: Callable[..., Any]  # (*inputs): an empty output
    backward: Callable[..., tuple[Any, ...]]  # (grad, needs, *inputs): per input a gradient, a list of them or None
    jvp: Callable[..., Any]  # (tangents, *inputs): the output's tangent
    vmap: Callable[..., tuple[Any, Any]]  # (size, in_dims, *inputs): the output and its batch axes
    decomposition: Callable[..., Any] | None = None  # (*inputs): the output by torch's own operations, for ONNX
    # (*inputs): how many of the last tensors of the output are there for `backward`, which takes them after the inputs;
    # they have no gradient.
    keeps: Callable[..., int] | None = None


def apply(name: str, *inputs: Any) -> Any:
    """Call a registered operation so that all that watches sees it."""
    if layered():
        leaves, spec = _pytree.tree_flatten(inputs)
        return _Layered.apply(name, spec, *leaves)
    return _overload(name)(*inputs)


def layered() -> bool:
    """Tell whether a functorch transform or forward AD watches. A compiler traces functorch itself, and no jvp rules.

    torch 2.10 calls the operations' vmap rules, on fake tensors, while a compiler traces and `is_compiling` is false.
    """
    watched = _functorch_active() or forward_ad._current_level >= 0
    return watched and not is_compiling() and TracingContext.try_get() is None


def _overload(name: str) -> Any:
    return getattr(torch.ops.fusionsum, name).default


class _Layered(torch.autograd.Function):
    """An operation under functorch or forward AD: apply(name, spec, *leaves), the leaves being those of its inputs.

    It has setup_context, jvp and vmap, for which plain recording must not pay (65 us a call).
    """

    @staticmethod
    def forward(name: str, spec: Any, *leaves: Any) -> Any:
        output = _overload(name)(*_pytree.tree_unflatten(leaves, spec))
        return output if isinstance(output, Tensor) else tuple(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, spec, *leaves = inputs
        _keep(ctx, leaves, spec, ctx.save_for_backward, ctx.save_for_forward, output=output)
        ctx.is_list = not isinstance(output, Tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needs = _pytree.tree_unflatten(ctx.needs_input_grad[2:], ctx.spec)
        inputs, found = _gradients(ctx, grads if ctx.is_list else grads[0], needs)
        return None, None, *_flat(found, inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return registered[ctx.name].jvp(_pytree.tree_unflatten(tangents[2:], ctx.spec), *_kept(ctx)[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, spec: Any, *leaves: Any) -> Any:
        axes, inputs = (_pytree.tree_unflatten(flat, spec) for flat in (in_dims[2:], leaves))
        output, out_dims = registered[name].vmap(info.batch_size, axes, *inputs)
        return (output, out_dims) if isinstance(output, Tensor) else (tuple(output), tuple(out_dims))


def _keep(ctx: Any, leaves: Sequence[Any], spec: Any, *save: Callable[..., None], output: Any) -> None:
    kept: Sequence[Tensor] = ()
    keeps = registered[ctx.name].keeps
    if keeps is not None:
        count = keeps(*_pytree.tree_unflatten(leaves, spec))
        kept = output[len(output) - count :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
    for save_tensors in save:
        save_tensors(*(x if isinstance(x, Tensor) else None for x in leaves), *kept)
    ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
    ctx.spec = spec


def _kept(ctx: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the inputs, and what is kept of the output."""
    saved = ctx.saved_tensors
    leaves = [other if x is None else x for x, other in zip(saved, ctx.others, strict=False)]
    return _pytree.tree_unflatten(leaves, ctx.spec), saved[len(leaves) :]


def _gradients(ctx: Any, grad: Any, needs: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the inputs and their gradients."""
    operation, (inputs, kept) = registered[ctx.name], _kept(ctx)
    if operation.keeps is None:
        return inputs, operation.backward(grad, needs, *inputs)
    if all(d is None for d in grad):
        return inputs, (None,) * len(inputs)
    return inputs, operation.backward(grad, needs, *inputs, kept)


def _flat(grads: Sequence[Any], inputs: Sequence[Any]) -> Iterator[Any]:
    for d, x in zip(grads, inputs, strict=True):
        if isinstance(x, list):
            yield from [None] * len(x) if d is None else d
        else:
            yield d


def register(operation: Operation) -> None:
    """Register an operation as ``torch.ops.fusionsum.<name>``."""
    name, qualified = operation.name, f"fusionsum::{operation.name}"
    registered[name] = operation
    _library.define(name + operation.schema, tags=_TAGS)
    _library.impl(name, operation.kernel, "CompositeExplicitAutograd")  # for every device: the kernel names its own
    _library.impl(name, functools.partial(_under_older_vmap, operation.vmap), "Batched")
    torch.library.register_fake(qualified, operation.fake, lib=_library)
    torch.library.register_autograd(qualified, _backward, setup_context=functools.partial(_setup, name), lib=_library)

    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return operation.vmap(info.batch_size, in_dims, *inputs)

    torch.library.register_vmap(qualified, vmap, lib=_library)
    if operation.decomposition is not None:
        # The ONNX exporter decomposes every operation in the table it finds under this name; compilers and torch.export
        # only those on lists of their own. The table itself stays as it is: where CI is set, Inductor refuses an operation
        # that is in it. On fake tensors of symbolic sizes torch would decompose too, if `meta_table` had no entry.
        torch._decomp.decomposition_table = collections.ChainMap(
            {_overload(name): operation.decomposition}, torch._decomp.decomposition_table
        )
        torch._decomp.meta_table[_overload(name)] = operation.fake


def _setup(name: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.name = name
    leaves, spec = _pytree.tree_flatten(inputs)
    _keep(ctx, leaves, spec, ctx.save_for_backward, output=output)


def _backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
    inputs, found = _gradients(ctx, grad, ctx.needs_input_grad)
    return tuple(
        [None] * len(x) if d is None and isinstance(x, list) and all(isinstance(entry, Tensor) for entry in x) else d
        for d, x in zip(found, inputs, strict=True)  # torch wants a list for a list that holds tensors only
    )


def older_vmap_level() -> int:
    """Return how deep the call is in torch's older vmap; 0: not at all."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _under_older_vmap(rule: Callable[..., Any], *inputs: Any) -> Any:
    """Map under torch's older vmap, which is_grads_batched and gradcheck still use and which has no public rules."""
    level = older_vmap_level()
    tensors = [x for x in _pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    size = max(torch._remove_batch_dim(x, level, 1, 0).shape[0] for x in tensors)
    unwrapped = _pytree.tree_map_only(Tensor, lambda x: torch._remove_batch_dim(x, level, size, 0), inputs)
    in_dims = _pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, inputs)
    found, _ = rule(size, in_dims, *unwrapped)
    return _pytree.tree_map(lambda x: torch._add_batch_dim(x, 0, level), found)
