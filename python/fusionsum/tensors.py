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

from . import chunks, reference
from .backend import adopt_torch, load_cuda, native
from .call import Call, check, on_gpu
from .scores import Scores, Search, read_targets

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


# ---- scores ----------------------------------------------------------------------------------------------------------

Needs = Sequence[bool]  # of the queries' side, the keys' side, logit_scale, and key_bias or logit_bias


def softmax_stats(scores: Scores, any: bool, symmetric: bool, totals: bool) -> Any:
    """Evaluate the statistics of scores that are read: (5, B) and, if symmetric, (5, C), else None.

    Arrays or, on a GPU, tensors; so are the coefficients that gradients take.
    """
    if on_gpu(scores.queries[0]):
        return chunks.softmax_stats(scores, any, symmetric, totals)
    return _evaluated("softmax_stats", scores, any, symmetric, totals)


def softmax_grad(query_coefs: Any, key_coefs: Any, any: bool, scores: Scores, needs: Needs) -> list[Tensor]:
    """Evaluate the gradients that are needed: of the two sides, in the dtype of the scores, and float64 ones."""
    if on_gpu(scores.queries[0]):
        found = chunks.softmax_grad(query_coefs, key_coefs, any, scores, needs)
    else:
        found = _evaluated("softmax_grad", scores, any, query_coefs, key_coefs, tuple(needs))
    return _needed(found, scores.logit_scale, needs)


def sigmoid_stats(scores: Scores) -> Any:
    """Evaluate the sigmoid losses of the queries, an array (B,) of float64, for scores that are read; a tensor on a GPU."""
    if on_gpu(scores.queries[0]):
        return chunks.sigmoid_stats(scores)
    return np.asarray(_evaluated("sigmoid_stats", scores))


def sigmoid_stats_and_grad(coefs: Any, scores: Scores, needs: Needs) -> tuple[Any, list[Tensor]]:
    """Evaluate those losses and, in the same pass, the gradients that are needed; takes an array (B,) of coefficients."""
    if on_gpu(scores.queries[0]):
        losses, *found = chunks.sigmoid_grad(coefs, scores, needs)
        return losses, _needed(found, scores.logit_scale, needs)
    losses, *found = _evaluated("sigmoid_grad", scores, np.ascontiguousarray(coefs), tuple(needs))
    return np.asarray(losses), _needed(found, scores.logit_scale, needs)


def sigmoid_grad(coefs: Any, scores: Scores, needs: Needs) -> list[Tensor]:
    """Evaluate the gradients that are needed."""
    return sigmoid_stats_and_grad(coefs, scores, needs)[1]


def top_k(search: Search, k: int) -> list[Tensor]:
    """Evaluate the values and indices (B, k), for a search that is not read yet."""
    read = search.read()
    if on_gpu(search.queries[0]):
        return chunks.top_k(read, k)
    return [torch.as_tensor(x) for x in _evaluated("top_k", read, k)]


def ranks(search: Search, targets: Tensor) -> Tensor:
    """Count the greater and the equal scores (2, B) of int64."""
    read, targets = search.read(), read_targets(targets, len(search.keys[0]))
    if on_gpu(search.queries[0]):
        return chunks.ranks(read, targets)
    return torch.from_numpy(np.stack(_evaluated("ranks", read, targets)))


def ranks_of_scores(search: Search, targets: Tensor, scores: Tensor) -> Tensor:
    """Count as `ranks` does, for targets of these scores (B,); one that is negative is no key here."""
    if on_gpu(search.queries[0]):
        return chunks.ranks(search.read(), targets, scores)
    return torch.from_numpy(np.stack(_evaluated("ranks", search.read(), targets.numpy(), scores.numpy())))


def target_scores(search: Search, targets: Tensor) -> Tensor:
    """Evaluate the targets' scores (B,), as `ranks` compares them; on a GPU NaN for a target that is negative."""
    if on_gpu(search.queries[0]):
        return chunks.target_scores(search.read(), targets)
    return torch.from_numpy(_evaluated("target_scores", search.read(), targets.numpy()))


def best(ours: Sequence[Tensor], theirs: Sequence[Tensor], k: int) -> list[Tensor]:
    """Choose the best k of two sets of values and keys' numbers, each (B, some), as `top_k` orders them."""
    if on_gpu(ours[0]):
        return chunks.best(ours, theirs, k)
    return [torch.from_numpy(x) for x in reference.best([x.numpy() for x in ours], [x.numpy() for x in theirs], k)]


def _evaluated(name: str, given: Scores | Search, *rest: Any) -> Any:
    """Evaluate an internal function of scores; it takes what is read."""
    device = given.queries[0].device
    if device.type != "cpu":
        raise ValueError(f"queries: are on {device}, expected cpu or cuda, the devices with kernels")
    kernel = getattr(native, name, None)
    found = NotImplemented if kernel is None else kernel(*given, *rest, True)
    return getattr(reference, name)(*map(_viewed, given), *rest) if found is NotImplemented else found


def _viewed(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_viewed, x))
    return _array(x) if isinstance(x, Tensor) else x


def _needed(found: Sequence[Any], logit_scale: float | Tensor, needs: Needs) -> list[Tensor]:
    """Keep what is needed. The sides' gradients come as those through S0, of which S is logit_scale times as much."""
    d_queries, d_keys, *others = found
    sides = [d if d is None else torch.as_tensor(d) for d in (d_queries, d_keys)]
    if isinstance(logit_scale, Tensor) or logit_scale != 1:
        sides = [d if d is None else d.mul_(logit_scale) for d in sides]
    wanted = [d for d, need in zip([*sides, *others], needs, strict=True) if need]
    return [torch.scalar_tensor(d, dtype=torch.float64) if isinstance(d, float) else torch.as_tensor(d) for d in wanted]
