"""A call of plain tensors, which nothing watches: the native kernels, else the reference.

What lives here: all that hands tensors to the kernels and takes them back. What lives elsewhere: telling who evaluates a
call (``contraction.route``), the products of matrices made of it (``contraction.py``), all that watches calls and
differentiates them (``autograd/``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference
from .backend import adopt_torch, load_cuda, native
from .call import Call, check

adopt_torch(torch)

_BEYOND_CUDA = "the CUDA kernels take at most 11 dims of a size above 1"


def result_dtype(call: Call, batch_dims: int = 0) -> torch.dtype:
    """Return the dtype of the sum; the first `batch_dims` dims of the operands are not counted among their dims."""
    return getattr(torch, reference.promoted(call.arrays, batch_dims))


def fusion_sum(call: Call, *, checked: bool = True) -> Tensor:
    """Evaluate the sum of plain tensors."""
    output = NotImplemented if native is None else native.fusion_sum(*call, True)
    if output is not NotImplemented:
        return output
    call = call if checked else check(*call)
    return _tensor(reference.fusion_sum(*_arrays(call)), result_dtype(call))


def fusion_sum_grad(
    grad_output: Tensor, call: Call, needs: Sequence[bool], *, checked: bool = True
) -> Sequence[Tensor | None]:
    """Evaluate the gradients that are needed, of plain tensors; None for the others."""
    found: Any = NotImplemented
    if native is not None:
        found = native.fusion_sum_grad(grad_output, *call, needs, True)
    if found is not NotImplemented:
        return found
    call = call if checked else check(*call, grad_output=grad_output)
    found = reference.fusion_sum_grad(_array(grad_output), *_arrays(call), needs)
    return [d if d is None else _tensor(d, x.dtype) for d, x in zip(found, call.operands, strict=True)]


def _arrays(call: Call) -> Call:
    return call.with_operands([_array(x) for x in call.operands], [_array(mask) for mask in call.masks])


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
