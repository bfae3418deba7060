"""What the tests on a GPU share (``test_on_gpu.py``, ``test_on_gpu_scores.py``)."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

import fusionsum as fs
from conftest import missing

ONE_SECOND = 2_000_000_000  # cycles, about


def require() -> None:
    """Skip the file where there is no GPU; fail where there is one and no kernels, if they are required."""
    if not torch.cuda.is_available():
        pytest.skip("missing: a GPU that torch can use", allow_module_level=True)
    if fs.backends()["cuda"] != "usable":
        missing(f"the CUDA kernels, {fs.backends()['cuda']}")


def leave_dirt() -> None:
    """Free memory of every size that holds NaN: the next to allocate gets it."""
    _ = [torch.full((2**size,), torch.nan, device="cuda") for size in range(6, 23)]


def same_bits(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    """Tell whether tensors are equal to the bit, NaN too."""
    return all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )
