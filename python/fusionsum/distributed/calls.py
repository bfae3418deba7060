"""What the calls of losses and of searches on several ranks share: arrays as tensors, a side that travels, what must agree.

What lives elsewhere: messages (``exchange.py``), the calls (``losses.py``, ``search.py``).
"""

from __future__ import annotations

import functools
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from ..autograd import routing
from ..autograd.sides import Side, arrays, wide
from ..scores import Scores, Search
from .exchange import Exchange, Meeting


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a compiler break its graph at a function, and trace nothing below.

    The first call of what torch disables imports the compiler, which takes 1 s: where nobody has, none can be tracing.
    """
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def routed(*given: Any) -> Any:
        return (disabled if "torch._dynamo" in sys.modules else function)(*given)

    return routed


def exchange_of(group: Any) -> Exchange:
    """Return what the argument `group` stands for; messages are plain tensors, which transforms would wrap."""
    if not routing.is_plain([]):
        raise NotImplementedError("group: expected None under torch.func, forward mode and modes that watch calls")
    return group if isinstance(group, Exchange) else Exchange(group)


def from_arrays(call: Any, exchange: Exchange) -> Any:
    """Return a checked call with tensors in the places of NumPy's arrays, whose memory they share."""
    device = call.queries[0].device.type if isinstance(call.queries[0], Tensor) else "cpu"
    backend = exchange.backends.get(device)
    if backend is None or (backend == "gloo" and device != "cpu"):  # which sends from rank to rank what is on the CPU
        own = "gloo" if device == "cpu" else "nccl"
        got = ", ".join(f"{name} for {of}" for of, name in exchange.backends.items())
        raise ValueError(
            f"group: expected a backend that sends tensors on {device}, where queries are, got {got}; "
            f"torch.distributed.new_group(backend='{own}') makes one"
        )
    if isinstance(call.queries[0], Tensor):
        found = [x for x in arrays(call) if isinstance(x, Tensor)]
        if not routing.is_plain(found):
            names = ", ".join(sorted({type(x).__name__ for x in found}))
            raise NotImplementedError(f"group: expected plain tensors, got {names}; of a DTensor, give to_local()")
        return call
    return type(call)._make(_pytree.tree_map_only(np.ndarray, _tensor, list(call)))


def to_arrays(found: Any, first: Any) -> Any:
    """Return results as the caller's first array is: tensors, or NumPy's arrays and scalars."""
    if isinstance(first, Tensor):
        return found
    return _pytree.tree_map_only(Tensor, lambda x: _array(x, first), found)


def _array(x: Tensor, first: np.ndarray) -> Any:
    if x.dtype == torch.bfloat16:  # which is not NumPy's own
        return x.view(torch.int16).numpy().view(first.dtype)[()]
    return x.numpy()[()]


def _tensor(array: np.ndarray) -> Tensor:
    """View an array as a tensor; copy what torch does not take."""
    if array.dtype.name == "bfloat16":
        return _tensor(array.view(np.int16)).view(torch.bfloat16)
    if any(step < 0 for step in array.strides) or not array.dtype.isnative:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(array.view(np.ndarray))


def travelling(side: Side, dtype: torch.dtype) -> Tensor:
    """Return the product that travels of a side: a single plain factor as it is, any other in the scores' dtype."""
    with torch.no_grad():
        return side.factors[0] if side.is_a_factor() else side.product(dtype)


def travelling_dtype(side: Side, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what travels of a side."""
    return side.factors[0].dtype if side.is_a_factor() else dtype


def shared_arguments(call: Scores | Search, exchange: Exchange) -> dict[str, Any]:
    """Return what every rank must give alike, by its name: all but the rows."""
    weights = call.fusion_weights
    if weights is not None:
        weights = f"{len(weights)} of checksum {checksum(weights):08x}"
    factors = {
        name: [f"{x.dtype} {activation} {'present' if mask is None else 'masked'}" for x, activation, mask in given]
        for name, given in (
            ("queries", zip(call.queries, call.activations, call.present, strict=True)),
            ("keys", zip(call.keys, call.key_activations, call.key_present, strict=True)),
        )
    }
    return {
        "n": call.queries[0].shape[1],
        "dtype": str(wide(call)),
        **{name: ", ".join(of_side) for name, of_side in factors.items()},
        "absent": call.absent,
        "fusion_weights": weights,
        "key_bias": None if call.key_bias is None else str(call.key_bias.dtype),
        "method": exchange.method,
    }


def check_widths(ranks: Meeting, widths: Sequence[int]) -> None:
    """Raise an error, on all ranks, unless each rank's boolean `exclude`, of so many columns or -1, has all ranks' keys."""
    total = ranks.offsets[-1]
    for rank, width in enumerate(widths):
        if width not in (-1, total):
            raise ValueError(
                f"exclude: expected {total} columns, the keys of all ranks in their order, got {width} on rank {rank}"
            )


def checksum(x: Tensor) -> int:
    """Return a checksum of a tensor's entries."""
    plain = x.detach().cpu().contiguous()
    return zlib.crc32(plain.view(-1).view(torch.uint8).numpy())


def added(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
    """Add tensors, in the place of the former."""
    return [a.add_(b) for a, b in zip(ours, theirs, strict=True)]
