"""The sum of DTensors: each rank evaluates the sum of its shards, and placements say what part of the whole that is.

    rows        an axis that the output has is sharded, and so is the output; operands that lack it are replicated, and
                their gradients are partial sums
    terms       the axis that is summed is sharded, and the output is a partial sum; each operand's gradient is sharded as
                it is, or a partial sum where it lacks the axis
    replicated  all operands are, and so are the output and the gradients

One of the three is chosen for each dim of the mesh: that which moves the fewest bytes, among the axes along which an
argument is sharded already. Arguments that are placed otherwise are redistributed first, and their gradients back. Masks
and `grad_output` go with the axes that they have.

What lives elsewhere: which calls come here (``routing.py``: those that the native module declined, so that a call of plain
tensors pays nothing for it). Only public functions of ``torch.distributed.tensor`` are used, not its registry of sharding
strategies: that is private, has changed with every release, and its public part, ``register_sharding``, knows no operation
that returns a list of tensors. The module is not imported here: who has a DTensor has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..call import Call
from ..reference import broadcast_shape
from .registration import layered

Dims = dict[
    int, int
]  # of a tensor whose size is not 1: its dim by the axis of the broadcast shape, counted from the last


def is_among(given: Sequence[Any]) -> bool:
    """Tell whether a DTensor is among these."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in given)


def refuse(function: str, given: Sequence[Any]) -> None:
    """Raise an error if a DTensor is among the arguments of a function of scores."""
    if is_among(given):
        raise NotImplementedError(
            f"{function}: expected plain tensors, got a DTensor; give each rank's rows, `x.to_local()`, with "
            "`group=x.device_mesh`"
        )


def fusion_sum(call: Call, evaluate: Callable[..., Tensor]) -> Any:
    """Evaluate the sum of a call of DTensors; `evaluate` takes the fields of a call of plain tensors."""
    plan = _Plan(call)
    return plan.whole(evaluate(*plan.shards()), plan.of_output, plan.output_shape)


def fusion_sum_grad(
    grad_output: Any, call: Call, needs: Sequence[bool], evaluate: Callable[..., Sequence[Any]]
) -> tuple[Any, ...]:
    """Evaluate the gradients that are needed; `evaluate` takes `grad_output`, the fields of such a call and `needs`."""
    plan = _Plan(call, grad_output)
    found = evaluate(plan.shard(grad_output, plan.of_output), *plan.shards(), needs)
    return tuple(
        d if d is None else _like(x, plan.whole(d, dims, tuple(x.shape)))
        for d, x, dims in zip(found, plan.operands, plan.of_operands, strict=True)
    )


def _like(x: Any, grad: Any) -> Any:
    """Place a gradient as its operand is, but leave a partial sum for a replicated one."""
    shard = sys.modules["torch.distributed.tensor"].Shard
    wanted = [
        own if type(own) is shard or (own.is_replicate() and not found.is_partial()) else found
        for own, found in zip(x.placements, grad.placements, strict=True)
    ]
    return grad if tuple(wanted) == tuple(grad.placements) else grad.redistribute(placements=wanted)


class _Plan:
    """How a call is spread over the ranks: for each dim of the mesh, the axis that is sharded, or None."""

    def __init__(self, call: Call, grad_output: Any = None) -> None:
        if layered():
            raise NotImplementedError(
                "fusion_sum: DTensors have gradients in reverse mode only, got a call under torch.func or forward mode"
            )
        self.call = call
        self.operands = (call.fusion_weights, *call.factors)  # torch.compile of torch 2.10 knows no property of a Call
        self.masks = (None, *call.present)
        self.mesh = _mesh(self.operands, self.masks, grad_output)
        shape = broadcast_shape(*(tuple(x.shape) for x in self.operands if x is not None))
        dim = call.dim % len(shape)
        self.output_shape = shape[:dim] + shape[dim + 1 :]
        left = [axis for axis in range(-len(shape), 0) if axis != dim - len(shape)]
        self.of_output = {axis: d for d, axis in enumerate(left) if shape[axis] != 1}
        self.of_operands = [_dims(x, x) for x in self.operands]
        self.of_masks = [_dims(mask, x) for mask, x in zip(self.masks, self.operands, strict=True)]
        tensors = [*self.operands, *self.masks, grad_output]
        dims = [*self.of_operands, *self.of_masks, self.of_output]
        arguments = [(x, of) for x, of in zip(tensors, dims, strict=True) if x is not None]
        self.axes = [_chosen(arguments, i, self.mesh.size(i)) for i in range(self.mesh.ndim)]

    def shards(self) -> tuple[Any, ...]:
        """Return the fields of the call of this rank's shards."""
        weights, *factors = [self.shard(x, dims) for x, dims in zip(self.operands, self.of_operands, strict=True)]
        _, *masks = [self.shard(x, dims) for x, dims in zip(self.masks, self.of_masks, strict=True)]
        _, _, activations, _, absent, dim = self.call
        return weights, tuple(factors), activations, tuple(masks), absent, dim

    def shard(self, x: Any, dims: Dims) -> Any:
        """Redistribute an argument and return this rank's shard."""
        if x is None:
            return None
        wanted = tuple(_placement(axis, dims) for axis in self.axes)
        if tuple(x.placements) != wanted:
            x = x.redistribute(placements=wanted)
        return x.to_local(grad_placements=self.of_result(dims))

    def of_result(self, dims: Dims) -> tuple[Any, ...]:
        """Return the placements of the output, or of a gradient, of a tensor of these dims."""
        partial = sys.modules["torch.distributed.tensor"].Partial
        return tuple(
            partial() if axis is not None and axis not in dims else _placement(axis, dims) for axis in self.axes
        )

    def whole(self, shard: Tensor, dims: Dims, shape: tuple[int, ...]) -> Any:
        """Return the DTensor of which this rank has evaluated a shard, or a part of the sum."""
        strides = [1]
        for n in shape[:0:-1]:
            strides.insert(0, strides[0] * max(1, n))
        make = sys.modules["torch.distributed.tensor"].DTensor.from_local
        return make(
            shard, self.mesh, self.of_result(dims), run_check=False, shape=shape, stride=tuple(strides[: len(shape)])
        )


def _mesh(operands: Sequence[Any], masks: Sequence[Any], grad_output: Any) -> Any:
    """Return the mesh of all tensors; raise an error that names the one that is not on it."""
    named = [("grad_output", grad_output), ("fusion_weights", operands[0])]
    named += [(f"factors[{m}]", x) for m, x in enumerate(operands[1:])]
    named += [(f"present[{m}]", x) for m, x in enumerate(masks[1:])]
    first = next((name, x.device_mesh) for name, x in named if is_among([x]))
    for name, x in named:
        if x is not None and not is_among([x]):
            raise TypeError(
                f"{name}: expected a DTensor like {first[0]}, got a plain tensor; "
                "torch.distributed.tensor.distribute_tensor makes one of it"
            )
        if x is not None and x.device_mesh != first[1]:
            raise ValueError(f"{name}: is on {x.device_mesh}, expected {first[1]}, where {first[0]} is")
    return first[1]


def _dims(x: Any, operand: Any) -> Dims:
    """Return the dims of an operand, or of its mask, which lies along its leading dims."""
    return {} if x is None else {d - operand.ndim: d for d, n in enumerate(x.shape) if n != 1}


def _placement(axis: int | None, dims: Dims) -> Any:
    """Place an argument along one dim of the mesh, where this axis is sharded."""
    module = sys.modules["torch.distributed.tensor"]
    return module.Shard(dims[axis]) if axis in dims else module.Replicate()


def _chosen(arguments: Sequence[tuple[Any, Dims]], i: int, ranks: int) -> int | None:
    """Choose the axis to shard along dim i of the mesh: the one, or none, for which the fewest bytes move."""
    sharded = {axis for x, dims in arguments for axis, d in dims.items() if _is_shard(x.placements[i], d)}
    candidates = [*sorted(sharded), None]
    costs = [sum(_moved(x, dims, i, axis, ranks) for x, dims in arguments) for axis in candidates]
    return candidates[costs.index(min(costs))]  # a compiler knows no `key` of min


def _is_shard(placement: Any, d: int) -> bool:
    """Tell whether a placement shards dim d, and not in the strides that views and FSDP2 make."""
    return type(placement) is sys.modules["torch.distributed.tensor"].Shard and placement.dim == d


def _moved(x: Any, dims: Dims, i: int, axis: int | None, ranks: int) -> float:
    """Count the bytes, up to a common factor, that move for an argument to be placed for this axis."""
    placement, size = x.placements[i], x.numel() * x.element_size()
    if axis in dims:
        if _is_shard(placement, dims[axis]) or placement.is_replicate():
            return 0
        return size if placement.is_partial() else size / ranks
    return 0 if placement.is_replicate() else 2 * size if placement.is_partial() else size
