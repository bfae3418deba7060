"""Calls that get no memory, natively and from Python on NumPy's arrays and torch's tensors; calls on little stack.

What lives elsewhere: the native scenes (``memory.cpp``), the allocator that fails when told (``allocator.cpp``), outputs
that do not fit into the process's limit (``tests/test_parallel.py``).
"""

from __future__ import annotations

import ctypes
import gc
import itertools
from typing import Any

import numpy as np
import pytest

import fusionsum as fs
from conftest import FORMS, require_native, run_python
from score_cases import draw
from tests.native import build


@pytest.mark.parametrize("scene", ["allocations", "first threads", "small stacks"])
def test_scenes(scene):
    done = build.run("memory", "plain", scene)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout == "done\n"


class Allocator:
    """The one that LD_PRELOAD put before the C library's."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(None)
        self._failing = library.allocator_call
        self._failing.restype = ctypes.py_object
        self._failing.argtypes = [ctypes.c_int64, ctypes.c_bool, ctypes.c_size_t, ctypes.c_void_p]
        self._failing.argtypes += [ctypes.py_object] * 2
        self._call = ctypes.cast(ctypes.pythonapi.PyObject_Call, ctypes.c_void_p)
        self.seen = library.allocator_seen  # how many allocations the last call asked for
        self.alive = library.allocator_alive  # how many of the process are not freed
        self.seen.restype = self.alive.restype = ctypes.c_int64

    def failing(self, k: int, and_later: bool, at_least: int, function: Any, arguments: tuple[Any, ...]) -> str:
        """Call while the k-th allocation of so many bytes fails, and with `and_later` all that follow; say the outcome."""
        wanted = bits(function(*arguments))
        try:
            found = self._failing(k, and_later, at_least, self._call, function, arguments)
        except (MemoryError, RuntimeError) as error:
            assert isinstance(error, MemoryError) or "memory" in str(error) or "alloc" in str(error), error
            return type(error).__name__
        if found is NotImplemented:
            return "declined"
        assert bits(found) == wanted
        return "right"


def bits(found: Any) -> list[bytes]:
    return [np.asarray(a).tobytes() for a in (found if isinstance(found, tuple) else (found,))]


def calls(arrays: str) -> Any:
    """Yield functions of the native module with arguments."""
    native, rng = require_native(), np.random.default_rng(0)
    if arrays == "arrays":
        s = draw(rng, 40, 60, 30, queries=(np.ones((40, 30), np.float32),), activations=(None,), present=(None,))
        coefs, needs = (np.ones((5, 40)), np.ones((5, 60))), (True,) * 4
        yield native.score_matrix, (*s.arguments(), True)
        yield native.softmax_stats, (*s.arguments(), True, True, True, True)
        yield native.softmax_grad, (*s.arguments(), True, *coefs, needs, True)
        yield native.sigmoid_grad, (*s.arguments(), np.ones(40), needs, True)
        yield native.top_k, (*s.arguments()[:9], None, None, None, 5, True)
        yield native.ranks, (*s.arguments()[:9], None, None, None, np.zeros(40, np.int64), True)
    for form in ("paired", "candidates", "weights per row"):
        case = FORMS[form].case(rng, "float32", B=40, K=5, n=300, activations="tanh").masked(rng, "rows", "one")
        values = [*case.operands, np.ones(case.output_shape, np.float32), *case.present]
        if arrays == "tensors":
            import torch

            values = list(map(torch.from_numpy, values))
        weights, *factors = values[: len(case.operands)]
        u, *present = values[len(case.operands) :]
        fs.fusion_sum(weights, *factors)  # or the module would not know of torch
        options = (weights, tuple(factors), "tanh", present, "one", -1)
        yield native.fusion_sum, (*options, True)
        yield native.fusion_sum_grad, (u, *options, [True] * (1 + len(factors)), True)


def fail_each(arrays: str) -> None:
    """Fail each allocation of some calls in turn; run it in a process of its own, with the allocator."""
    allocator, outcomes, chosen = Allocator(), [], list(calls(arrays))
    gc.freeze()  # or each collection would go through all of torch's modules
    # Where torch gets no memory for small objects of its own, it ends the process: c10's makeDataPtr is noexcept.
    at_least = 64 if arrays == "tensors" else 0
    for (function, arguments), and_later in itertools.product(chosen, (False, True)):
        for k in itertools.count():
            alive = np.zeros(4, np.int64)  # holds no objects, which would count
            for i in range(len(alive)):
                outcome = allocator.failing(k, and_later, at_least, function, arguments)
                reached = allocator.seen() > k
                gc.collect()
                alive[i] = allocator.alive()
            # Python itself may grow a table now and then; what a call leaves behind, it leaves behind each time.
            assert np.diff(alive).min() <= 0, f"{outcome} at allocation {k} leaves memory behind: {alive}"
            outcomes.append(outcome)
            if not reached:
                break
        assert outcome == "right"
        assert k > 0
    print({outcome: outcomes.count(outcome) for outcome in outcomes})


@pytest.mark.parametrize("arrays", ["arrays", "tensors"])
def test_each_allocation_fails_in_turn_under_python(arrays):
    """With Python's own objects on malloc too: those that the call makes are counted."""
    code = f"""
import sys
sys.path.append({str(build.ROOT)!r})
from tests.native import test_memory
test_memory.fail_each({arrays!r})
"""
    printed = run_python(code, LD_PRELOAD=str(build.library("allocator")), PYTHONMALLOC="malloc", timeout=120)
    assert "MemoryError" in printed
