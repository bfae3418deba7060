"""The CUDA library's C interface in ctypes, and libraries that Python makes up: of which each call is a function here.

    address = interface.publish(interface.beside(one, other))       both are asked, and the first's word is taken
    address = interface.publish(interface.spread(library))          with arrays whose offsets need more than 32 bits

What lives elsewhere: the structs that are mirrored (``csrc/sum.h``, ``csrc/cuda/cuda.h``), the libraries (``emulation.py``,
``runtime.py``).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_double, c_int, c_int64, c_uint8, c_uint32, c_void_p
from typing import Any

import numpy as np

__all__ = ["CudaLibrary", "Operand", "Problem", "beside", "library_at", "make", "publish", "sparse", "spread"]

_MOST_DIMS, _MOST_OPERANDS = 12, 10
_BYTES = (8, 4, 2, 2)  # of the dtypes, in the order of csrc/lists.h
_MAP_NORESERVE = 0x4000  # Linux's; Python has the name from 3.13 on


class Operand(ctypes.Structure):
    """``csrc/sum.h`` says what is what."""

    _fields_ = (
        *((name, c_void_p) for name in ("data", "mask", "grad")),
        ("dtype", c_uint8),
        ("activation", c_uint8),
        ("dims", c_uint32),
        *((name, c_int64 * _MOST_DIMS) for name in ("stride", "mask_stride", "grad_stride")),
    )


class Problem(ctypes.Structure):
    """``csrc/sum.h`` says what is what."""

    _fields_ = (
        *((name, c_int) for name in ("ndim", "sum_dim", "operands")),
        ("size", c_int64 * _MOST_DIMS),
        ("operand", Operand * _MOST_OPERANDS),
        ("wide", c_bool),
        ("absent", c_double),
    )


class CudaLibrary(ctypes.Structure):
    """``csrc/cuda/cuda.h`` says what is what."""

    _fields_ = (
        ("unavailable", CFUNCTYPE(c_char_p)),
        ("plan_bytes", c_int64),
        ("plan", CFUNCTYPE(c_char_p, c_void_p, c_void_p, POINTER(c_int64))),
        ("execute", CFUNCTYPE(c_char_p, c_void_p, c_int, c_void_p, c_void_p)),
    )


_FUNCTION = CFUNCTYPE(c_void_p)  # fusionsum_cuda
_published: list[Any] = []  # for as long as the process, as libraries are


def library_at(address: int) -> CudaLibrary:
    """Return the library of a function ``fusionsum_cuda``."""
    return CudaLibrary.from_address(_FUNCTION(address)())


def make(plan_bytes: int, plan: Callable[..., bytes | None], execute: Callable[..., bytes | None]) -> CudaLibrary:
    """Make up a library that can always run."""
    kinds = dict(CudaLibrary._fields_)
    return CudaLibrary(kinds["unavailable"](lambda: None), plan_bytes, kinds["plan"](plan), kinds["execute"](execute))


def publish(library: CudaLibrary) -> int:
    """Return the address of a function ``fusionsum_cuda`` that returns this library."""
    function = _FUNCTION(lambda: ctypes.addressof(library))
    _published.extend((library, function))
    address = ctypes.cast(function, c_void_p).value
    assert address is not None
    return address


def beside(first: CudaLibrary, second: CudaLibrary) -> CudaLibrary:
    """Make a library that asks both, of one problem, device, stream and workspace, and answers as the first."""
    begin = (first.plan_bytes + 63) // 64 * 64

    def plan(problem: int, to: int, workspace_bytes: Any) -> bytes | None:
        error = first.plan(problem, to, workspace_bytes)
        wanted = c_int64()
        other = second.plan(problem, to + begin, ctypes.byref(wanted))
        if (error, workspace_bytes[0]) != (other, wanted.value):
            return f"two plans differ: {error!r}, {workspace_bytes[0]} bytes; {other!r}, {wanted.value} bytes".encode()
        return error

    def execute(plan: int, *where: Any) -> bytes | None:
        error = first.execute(plan, *where)
        return error or second.execute(plan + begin, *where)

    return make(begin + second.plan_bytes, plan, execute)


# ---- offsets of more than 32 bits ----------------------------------------------------------------------------------------


def sparse(size: int) -> np.ndarray:
    """Return so many zero bytes, of which those that are touched take memory."""
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE), np.uint8)


def spread(library: CudaLibrary, step: int = 2**31 + 64) -> CudaLibrary:
    """
    Make a library that hands problems on with each array spread over memory, and brings back what is written.

    The outermost dim of an array gets a stride of `step` elements: where that is the columns, they are packed no longer.
    """
    kept: list[np.ndarray] = []
    fetched: list[tuple[np.ndarray, np.ndarray]] = []  # where gradients belong, and where they are

    def move(problem: Problem, operand: Operand, name: str) -> None:
        address, item = getattr(operand, name), 1 if name == "mask" else _BYTES[operand.dtype]
        strides = getattr(operand, "stride" if name == "data" else f"{name}_stride")
        dims = [d for d in range(problem.ndim) if (strides[d] if name == "mask" else operand.dims >> d & 1)]
        outermost = next((d for d in dims if problem.size[d] > 1), None)
        if not address or outermost is None:
            return

        def view(where: int) -> np.ndarray:
            entry = np.frombuffer((ctypes.c_char * item).from_address(where), f"u{item}")
            shape, steps = ([of[d] for d in dims] for of in (problem.size, strides))
            return np.lib.stride_tricks.as_strided(entry, shape, [step * item for step in steps])

        before = view(address)
        strides[outermost] = step
        kept.append(sparse(item * (1 + sum((problem.size[d] - 1) * abs(strides[d]) for d in dims))))
        after = view(kept[-1].ctypes.data)
        after[...] = before
        setattr(operand, name, kept[-1].ctypes.data)
        if name == "grad":
            fetched.append((before, after))

    def plan(problem: int, to: int, workspace_bytes: Any) -> bytes | None:
        del kept[:], fetched[:]
        copy = Problem.from_buffer_copy((ctypes.c_char * ctypes.sizeof(Problem)).from_address(problem))
        for operand in copy.operand[: copy.operands]:
            if any(stride < 0 for stride in operand.stride):
                return b"arrays of negative strides cannot be spread"
            for name in ("data", "mask", "grad"):
                move(copy, operand, name)
        return library.plan(ctypes.addressof(copy), to, workspace_bytes)

    def execute(*arguments: Any) -> bytes | None:
        error = library.execute(*arguments)
        for before, after in fetched:
            before[...] = after
        return error

    return make(library.plan_bytes, plan, execute)
