"""Where the tests of the kernels run: on this machine's CPU, or, as FUSIONSUM_TEST_DEVICE says, elsewhere.

``emulated``: the CUDA kernels, compiled by g++ into the library that FUSIONSUM_EMULATED names, behind bindings of their
own (``cuda/emulation.py``).
``cuda``: a GPU; every array travels there as a tensor and comes back. ``cpu``: the same road without a GPU, to test it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

DEVICE = os.environ.get("FUSIONSUM_TEST_DEVICE", "")
CUDA_KERNELS = DEVICE in ("emulated", "cuda")


class _Tensors:
    """The native module with arrays carried to a device as tensors, of the same strides unless those are negative."""

    def __init__(self, native: Any) -> None:
        importlib.import_module("fusionsum.tensors")  # by whose import the module can read tensors
        self._native, self._torch = native, importlib.import_module("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def _sent(self, array: Any) -> Any:
        if array is None:
            return None
        torch, narrow, shape = self._torch, array.dtype == ml_dtypes.bfloat16, array.shape
        array = array[tuple(slice(None if step else 1) for step in array.strides)]  # repeated entries are sent once
        values = torch.from_numpy(np.array(array.view(np.uint16) if narrow else array))
        values = (values.view(torch.bfloat16) if narrow else values).to(DEVICE)
        strides = [step // array.itemsize for step in array.strides]
        if min(strides, default=0) > 0:
            values = torch.empty_strided(values.shape, strides, dtype=values.dtype, device=DEVICE).copy_(values)
        return values.expand(shape)

    def _fetched(self, tensor: Any) -> Any:
        if tensor is None:
            return None
        tensor, narrow = tensor.cpu(), tensor.dtype == self._torch.bfloat16
        array = tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16) if narrow else tensor.numpy()
        return array if array.ndim else array[()]

    def _options(self, weights: Any, factors: Any, activations: Any, present: Any, *rest: Any) -> tuple[Any, ...]:
        masks = None if present is None else [self._sent(mask) for mask in present]
        return self._sent(weights), tuple(map(self._sent, factors)), activations, masks, *rest

    def fusion_sum(self, *arguments: Any) -> Any:
        return self._fetched(self._native.fusion_sum(*self._options(*arguments[:-1]), True))

    def fusion_sum_grad(self, grad_output: Any, *arguments: Any) -> Any:
        found = self._native.fusion_sum_grad(self._sent(grad_output), *self._options(*arguments[:-1]), True)
        return tuple(map(self._fetched, found))


def emulated(address: int | None) -> Any:
    """Return a native module whose NumPy arrays go to the emulated library with this address of ``fusionsum_cuda``."""
    native = importlib.import_module("tests.cuda.emulation").bindings()
    reason = native.use_cuda(address)
    assert reason is None, reason
    return native


def placed(native: Any) -> Any:
    """Return what stands for the native module in the tests of this run."""
    if DEVICE == "emulated":
        library = ctypes.CDLL(os.environ["FUSIONSUM_EMULATED"])
        return emulated(ctypes.cast(library.fusionsum_cuda, ctypes.c_void_p).value)
    return _Tensors(native) if DEVICE else native


@contextlib.contextmanager
def replaced(native: Any, other: Any) -> Iterator[None]:
    """Let every module of the package that holds this native module hold another."""
    package = [module for name, module in sys.modules.items() if name.partition(".")[0] == "fusionsum"]
    holders = [module for module in package if getattr(module, "native", None) is native]
    assert holders
    for module in holders:
        module.native = other
    try:
        yield
    finally:
        for module in holders:
            module.native = native
