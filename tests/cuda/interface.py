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
from ctypes import CFUNCTYPE, POINTER, c_bool, c_double, c_int, c_int64, c_uint8, c_uint32, c_void_p
from typing import Any

import numpy as np

__all__ = [
    "CudaLibrary",
    "Operand",
    "Problem",
    "beside",
    "error",
    "library_at",
    "make",
    "publish",
    "run",
    "sparse",
    "spread",
    "text_of",
]

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
    """``csrc/cuda/cuda.h`` says what is what. Errors are addresses, for :func:`text_of`."""

    _fields_ = (
        ("unavailable", CFUNCTYPE(c_void_p)),
        ("plan_bytes", c_int64),
        ("plan", CFUNCTYPE(c_void_p, c_void_p, c_void_p, POINTER(c_int64))),
        ("execute", CFUNCTYPE(c_void_p, c_void_p, c_int, c_void_p, c_void_p)),
        ("step_workspace", CFUNCTYPE(c_int64, c_void_p)),
        ("step", CFUNCTYPE(c_void_p, c_void_p, c_int, c_void_p, c_void_p)),
    )


_FUNCTION = CFUNCTYPE(c_void_p)  # fusionsum_cuda
_kept: list[Any] = []  # for as long as the process, as libraries are


def text_of(error: int | None) -> str:
    """Return what an error says; without one, nothing."""
    return ctypes.string_at(error).decode() if error else ""


def error(text: str) -> int:
    """Return the address of an error that says this."""
    _kept.append(ctypes.create_string_buffer(text.encode()))
    return ctypes.addressof(_kept[-1])


def library_at(address: int) -> CudaLibrary:
    """Return the library of a function ``fusionsum_cuda``."""
    return CudaLibrary.from_address(_FUNCTION(address)())


def make(
    plan_bytes: int,
    plan: Callable[..., int | None],
    execute: Callable[..., int | None],
    step_workspace: Callable[[int], int] = lambda chunk: 0,
    step: Callable[..., int | None] = lambda *arguments: error("a library that takes no steps"),
) -> CudaLibrary:
    """Make up a library that can always run."""
    kinds = dict(CudaLibrary._fields_)
    functions = {"plan": plan, "execute": execute, "step_workspace": step_workspace, "step": step}
    made = {name: kinds[name](function) for name, function in functions.items()}
    return CudaLibrary(kinds["unavailable"](lambda: None), plan_bytes, **made)


def publish(library: CudaLibrary) -> int:
    """Return the address of a function ``fusionsum_cuda`` that returns this library."""
    function = _FUNCTION(lambda: ctypes.addressof(library))
    _kept.extend((library, function))
    address = ctypes.cast(function, c_void_p).value
    assert address is not None
    return address


def run(library: CudaLibrary, problem: Problem) -> None:
    """Execute a problem on device 0 and the default stream; RuntimeError quotes the library."""
    plan, needed = ctypes.create_string_buffer(library.plan_bytes), c_int64()
    said = library.plan(ctypes.addressof(problem), ctypes.addressof(plan), ctypes.byref(needed))
    workspace = ctypes.create_string_buffer(max(1, needed.value))
    said = said or library.execute(ctypes.addressof(plan), 0, None, ctypes.addressof(workspace))
    if said:
        raise RuntimeError(text_of(said))


def beside(first: CudaLibrary, second: CudaLibrary) -> CudaLibrary:
    """Make a library that asks both, of one problem, device, stream and workspace, and answers as the first."""
    begin = (first.plan_bytes + 63) // 64 * 64

    def plan(problem: int, to: int, workspace_bytes: Any) -> int | None:
        wanted = c_int64()
        said = first.plan(problem, to, workspace_bytes)
        other = second.plan(problem, to + begin, ctypes.byref(wanted))
        answers = (text_of(said), workspace_bytes[0]), (text_of(other), wanted.value)
        return said if answers[0] == answers[1] else error(f"two plans, with their bytes of workspace: {answers}")

    def execute(plan: int, *where: Any) -> int | None:
        return first.execute(plan, *where) or second.execute(plan + begin, *where)

    def step(*arguments: Any) -> int | None:
        return first.step(*arguments) or second.step(*arguments)

    return make(begin + second.plan_bytes, plan, execute, first.step_workspace, step)


# ---- offsets of more than 32 bits ----------------------------------------------------------------------------------------


def sparse(size: int) -> np.ndarray:
    """Return so many zero bytes, of which those that are touched take memory."""
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE), np.uint8)


def spread(library: CudaLibrary, step: int = 2**32 + 64) -> CudaLibrary:
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

    def plan(problem: int, to: int, workspace_bytes: Any) -> int | None:
        del kept[:], fetched[:]
        copy = Problem.from_buffer_copy((ctypes.c_char * ctypes.sizeof(Problem)).from_address(problem))
        for operand in copy.operand[: copy.operands]:
            if any(stride < 0 for stride in operand.stride):
                return error("arrays of negative strides cannot be spread")
            for name in ("data", "mask", "grad"):
                move(copy, operand, name)
        return library.plan(ctypes.addressof(copy), to, workspace_bytes)

    def execute(*arguments: Any) -> int | None:
        said = library.execute(*arguments)
        for before, after in fetched:
            before[...] = after
        return said

    return make(library.plan_bytes, plan, execute, library.step_workspace, library.step)
