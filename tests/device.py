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

    def __init__(self, native: Any, to: str = DEVICE) -> None:
        importlib.import_module("fusionsum.tensors")  # by whose import the module can read tensors
        self._native, self._torch, self._to = native, importlib.import_module("torch"), to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def _sent(self, array: Any) -> Any:
        if array is None:
            return None
        torch, narrow, shape = self._torch, array.dtype == ml_dtypes.bfloat16, array.shape
        array = array[tuple(slice(None if step else 1) for step in array.strides)]  # repeated entries are sent once
        values = torch.from_numpy(np.array(array.view(np.uint16) if narrow else array))
        values = (values.view(torch.bfloat16) if narrow else values).to(self._to)
        strides = [step // array.itemsize for step in array.strides]
        if min(strides, default=0) > 0:
            values = torch.empty_strided(values.shape, strides, dtype=values.dtype, device=self._to).copy_(values)
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


class _Chunks(_Tensors):
    """The functions of scores as a GPU evaluates them (``fusionsum/chunks.py``), with NumPy's arguments and results."""

    score_matrix = score_matrix_grad = None  # torch's products of matrices give them

    def __init__(self, native: Any, to: str) -> None:
        super().__init__(native, to)
        self._chunks = importlib.import_module("fusionsum.chunks")
        self._calls = importlib.import_module("fusionsum.scores")

    def _call(self, kind: Any, given: Any) -> Any:
        def sent(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(sent, x))
            if isinstance(x, np.ndarray):
                return self._sent(x.astype(np.int64) if x.dtype == np.int32 else x)
            return x

        return kind._make(map(sent, given))

    def _search(self, given: Any) -> Any:
        search = self._call(self._calls.Search, given)
        return search if search.excluded_offsets is None else search._replace(**search._places())

    def _all(self, found: Any) -> tuple[Any, ...]:
        return tuple(self._fetched(x) for x in found)

    def softmax_stats(self, *arguments: Any) -> Any:
        *scores, any_, symmetric, totals, _ = arguments
        return self._all(self._chunks.softmax_stats(self._call(self._calls.Scores, scores), any_, symmetric, totals))

    def softmax_grad(self, *arguments: Any) -> Any:
        *scores, any_, of_queries, of_keys, needs, _ = arguments
        call = self._call(self._calls.Scores, scores)
        found = self._chunks.softmax_grad(self._sent(of_queries), self._sent(of_keys), any_, call, needs)
        return (*self._all(found[:2]), 0.0 if found[2] is None else float(found[2]), self._fetched(found[3]))

    def sigmoid_stats(self, *arguments: Any) -> Any:
        return self._fetched(self._chunks.sigmoid_stats(self._call(self._calls.Scores, arguments[:-1])))

    def sigmoid_grad(self, *arguments: Any) -> Any:
        *scores, coefs, needs, _ = arguments
        found = self._chunks.sigmoid_grad(self._sent(coefs), self._call(self._calls.Scores, scores), needs)
        return (*self._all(found[:3]), *(0.0 if x is None else float(x) for x in found[3:]))

    def top_k(self, *arguments: Any) -> Any:
        *search, k, _ = arguments
        return self._all(self._chunks.top_k(self._search(search), k))

    def ranks(self, *arguments: Any) -> Any:
        *search, targets, _ = arguments[:14]
        return self._all(self._chunks.ranks(self._search(search), self._sent(targets)))


class _WithScores:
    """An emulated native module; the CPU's scores, which it lacks, are those of the real one."""

    def __init__(self, native: Any, real: Any) -> None:
        self._native, self._real = native, real

    def __getattr__(self, name: str) -> Any:
        of_scores = name.startswith(("score_", "softmax_", "sigmoid_", "top_k", "ranks", "target_scores"))
        return getattr(self._real if of_scores else self._native, name)


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
        return _WithScores(emulated(ctypes.cast(library.fusionsum_cuda, ctypes.c_void_p).value), native)
    return _Tensors(native) if DEVICE else native


def scores(native: Any) -> Any:
    """Return what stands for the native module in the tests of the kernels of scores."""
    if DEVICE == "emulated":
        return _Chunks(native, "cpu")
    return _Chunks(native, "cuda") if DEVICE == "cuda" else native


def _multiply(a: Any, b: Any, to: Any, *, add: bool = False) -> None:
    """Multiply matrices as a GPU does: not by BLAS, which rounds equal rows differently, by where they are."""
    assert a.dtype == b.dtype  # as torch asserts
    left, right = (x.to(to.dtype).numpy() for x in (a, b))
    found = sys.modules["torch"].from_numpy(np.einsum("ij,kj->ik", left, right.T))
    to.copy_(to + found if add else found)


@contextlib.contextmanager
def pretending(native: Any, multiply: Any = _multiply) -> Iterator[None]:
    """Let scores of tensors go where those on a GPU do, by the steps of this module."""
    torch, chunks = importlib.import_module("torch"), importlib.import_module("fusionsum.chunks")
    native.use_torch(torch, None, None, None)
    package = [module for name, module in sys.modules.items() if name.partition(".")[0] == "fusionsum"]
    places = [
        (module, "on_gpu", lambda x: isinstance(x, torch.Tensor)) for module in package if hasattr(module, "on_gpu")
    ]
    places += [(chunks, "native", native), (chunks, "load_cuda", lambda: ""), (chunks, "_multiply", multiply)]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


def enter() -> None:
    """Let this process test the package where FUSIONSUM_TEST_DEVICE says."""
    backend, api = (importlib.import_module(f"fusionsum.{name}") for name in ("backend", "api"))
    if backend.native is not None:
        backend.native = api.native = placed(backend.native)
    if DEVICE == "emulated":
        _entered.enter_context(pretending(backend.native))


_entered = contextlib.ExitStack()  # for all of the process


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
