"""What only long use shows: Ctrl-C in calls of hours, memory over 100,000 calls, and where results of megabytes lie.

What lives elsewhere: threads, forks and other signals (``test_parallel.py``). All of this runs in processes of its own.
"""

from __future__ import annotations

import itertools
import re
import resource
from pathlib import Path

import numpy as np
import pytest

import fusionsum as fs
from conftest import ACTIVATIONS, DTYPES, FORMS, Case, random, require_native, run_python, widened
from fusionsum import reference

native = require_native()

# Ctrl-C

LIBRARIES = {
    "numpy": """
import numpy as np
def far(*shape, of=0.5): return np.broadcast_to(np.array(of, bool if of is True else np.float32), shape)
def ones(*shape): return np.ones(shape, np.float32)
def grad_of_weights(u, weights, f):
    native.fusion_sum_grad(u, weights, (f,), None, None, "one", -1, [True, False], False)
""",
    "torch": """
import torch
def far(*shape, of=0.5): return torch.tensor(of).expand(shape)
def ones(*shape, **options): return torch.ones(shape, **options)
def grad_of_weights(u, weights, f):
    torch.ops.fusionsum.fusion_sum_grad(u, weights, [f], [""], [None], "one", -1, [True, False])
def backward(weights, *factors, **options):
    # Again and again, for a second or two each: a backward pass takes as long as its forward pass.
    total = fs.fusion_sum(weights, *factors, **options).sum()
    def again():
        while True:
            torch.autograd.grad(total, weights, retain_graph=True)
    return again
""",
}
INTERRUPTED = """
import os, signal, threading, time
import fusionsum as fs
from fusionsum.backend import native
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
sent = []
def interrupt():
    time.sleep(0.3)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
def seconds_after(call):
    threading.Thread(target=interrupt).start()
    try:
        call()
    except KeyboardInterrupt:
        return time.monotonic() - sent.pop()
    raise SystemExit("not interrupted")
def check_next_call():
    z = ones(3000, 257)
    assert fs.fusion_sum(None, z).tolist() == [257] * 3000
    assert (fs.fusion_sum_grad(z[:, 0], None, z, z)[1] == 1).all()
"""
LONG_CALLS = {  # hours each, of views that take no memory
    "many rows": "lambda: fs.fusion_sum(None, far(2**22, 2**22))",
    "one row": "lambda: fs.fusion_sum(None, far(1, 2**44))",
    "terms first": "lambda: fs.fusion_sum(None, far(2**22, 2**22), dim=0)",
    "all pairs": "lambda: fs.fusion_sum(None, far(2**12, 1, 2**22), far(2**12, 2**22))",
    "mixing": "lambda: fs.fusion_sum(far(2**11, 2**22), far(2**11, 1, 2**22), far(2**11, 1, 2**22))",
    "activation": "lambda: fs.fusion_sum(None, far(2**10, 2**32), activations='gelu')",
    "mask": "lambda: fs.fusion_sum(None, far(2**22, 2**22), present=[far(2**22, 1, of=True)])",
    "gradient": "lambda: grad_of_weights(far(2**22), ones(2**22), far(2**22, 2**22))",
    "gradient, one weight": "lambda: grad_of_weights(far(2**22), ones(1), far(2**22, 2**22))",
    "gradient, scalar output": "lambda: grad_of_weights(far(1), ones(1), far(1, 2**44))",
}
SCORES = """
import numpy as np
from score_cases import Scores
def far(*shape): return np.broadcast_to(np.float32(0.5), shape)
def ones(*shape): return np.ones(shape, np.float32)
def scores(rows, cols, n, count=1, activation=None):
    queries, keys = (far(size, n) if count > 1 else np.broadcast_to(ones(1, n), (size, n)) for size in (rows, cols))
    names, nothing = (activation,) * count, (None,) * count
    return Scores((queries,) * count, (keys,) * count, names, names, nothing, nothing).arguments()
def search(*sizes): return (*scores(*sizes)[:9], None, None, None)
coefs = np.full((5, 2**17), 0.1)
"""
LONG_SCORES = {  # minutes each, of views that take no memory; one term, or tiles of many, or much to form
    "sigmoid": "lambda: native.sigmoid_stats(*scores(2**17, 2**22, 1), False)",
    "sigmoid, formed": "lambda: native.sigmoid_stats(*scores(2**18, 2**18, 512, 8, 'gelu'), False)",
    "softmax": "lambda: native.softmax_stats(*scores(2**20, 2**20, 16), True, True, True, False)",
    "softmax's gradient": "lambda: native.softmax_grad(*scores(2**17, 2**17, 512), True, coefs, coefs, (True,) * 4, False)",
    "gradient": "lambda: native.score_matrix_grad(far(2**17, 2**22), *scores(2**17, 2**22, 1), (True, True), False)",
    "top_k": "lambda: native.top_k(*search(2**17, 2**22, 64), 10, False)",
    "ranks": "lambda: native.ranks(*search(2**17, 2**22, 4), np.zeros(2**17, np.int64), False)",
}
LONG_CALLS_OF = {
    "numpy": {  # 25 s, of arrays of 64 MiB each; a sum of partial sums after each pass
        "gradient, all pairs": "lambda: fs.fusion_sum_grad(far(256, 256), None, ones(256, 1, 65536), ones(256, 65536))",
    },
    "torch": {
        "recorded": "lambda: fs.fusion_sum(ones(1, requires_grad=True), far(2**22, 2**22))",
        "backward": "backward(ones(1, requires_grad=True), far(2**17, 2**17), activations='tanh')",
        "backward, one row": "backward(ones(1, requires_grad=True), far(1, 2**32))",
        "backward, all pairs": """backward(
            ones(2**16, requires_grad=True), far(2**9, 1, 2**16), far(2**8, 2**16), activations="tanh")""",
    },
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_ctrl_c_ends_a_long_call_within_a_second(library):
    """One process for all: it lives on, and its next call is right."""
    calls = LONG_CALLS | LONG_CALLS_OF[library]
    lines = [f"print(seconds_after({call}))\ncheck_next_call()" for call in calls.values()]
    seconds = run_python("\n".join([LIBRARIES[library], INTERRUPTED, *lines]), timeout=120).split()
    late = {name: after for name, after in zip(calls, seconds, strict=True) if not float(after) < 1}
    assert not late, f"seconds until Ctrl-C took effect: {late}"


@pytest.mark.parametrize("isa", ["", "scalar"], ids=["the best", "scalar"])
def test_ctrl_c_ends_long_calls_of_scores_within_a_second(isa):
    lines = [f"print(seconds_after({call}))\ncheck_next_call()" for call in LONG_SCORES.values()]
    seconds = run_python("\n".join([SCORES, INTERRUPTED, *lines]), FUSIONSUM_ISA=isa).split()
    late = {name: after for name, after in zip(LONG_SCORES, seconds, strict=True) if not float(after) < 1}
    assert not late, f"seconds until Ctrl-C took effect: {late}"


# Memory

WRONG = [
    {"dim": 7},
    {"dim": 1.0},
    {"activations": "none"},
    {"activations": ["tanh"] * 9},
    {"present": [1]},
    {"present": ()},
    {"absent": "two"},
]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def uses(case, u, change):
    """Return calls without arguments: those that work, and those that raise, one of them for its changed options."""
    weights, factors, options = case.weights, case.factors, case.options()
    wrong = options | change
    right = [
        lambda: fs.fusion_sum(weights, *factors, **options),
        lambda: fs.fusion_sum_grad(u, weights, *factors, **options),
    ]
    if not isinstance(u, np.ndarray):
        recorded = [None if z is None else z.clone().requires_grad_() for z in (weights, *factors)]
        right.append(lambda: fs.fusion_sum(*recorded, **options).backward(u))
    return right, [
        lambda: fs.fusion_sum(weights, *factors, **wrong),
        lambda: fs.fusion_sum_grad(u, weights, *factors, **wrong),
        lambda: fs.fusion_sum(weights, *(z > 0 for z in factors), **options),
        lambda: fs.fusion_sum_grad(u[None, None], weights, *factors, **options),
    ]


def as_tensors(case, u):
    import torch  # not where the library is NumPy

    def tensor(array):
        return None if array is None else torch.tensor(widened(array)).to(getattr(torch, array.dtype.name))

    masks = None if case.present is None else [torch.from_numpy(mask) for mask in case.present]
    factors = [tensor(z) for z in case.factors]
    return Case(tensor(case.weights), factors, case.activations, masks, case.absent, case.dim), tensor(u)


def growth(library, calls=100_000):
    """Call with right and wrong arguments of every kind; return MiB, by a line through the last two thirds."""
    rng = np.random.default_rng(0)
    right, wrong = [], []
    for number, (form, dtype) in enumerate(itertools.product(FORMS.values(), DTYPES)):
        case = form.case(rng, dtype)
        case.activations = ACTIVATIONS[number % len(ACTIVATIONS)]
        case = case.masked(rng, "rows", "one") if number % 2 else case
        u = random(rng, case.output_shape, reference.result_dtype(*case.operands).name)
        if library == "torch":
            case, u = as_tensors(case, u)
        works, raises = uses(case, u, WRONG[number % len(WRONG)])
        right += works
        wrong += raises
    samples = []
    for i in range(calls):
        if i % 5 == 0:
            with pytest.raises((ValueError, TypeError)):
                wrong[i // 5 % len(wrong)]()
        else:
            right[i % len(right)]()
        if i % 500 == 0 and i >= calls // 3:
            samples.append((i, resident()))
    return np.polyfit(*np.transpose(samples).astype(float), 1)[0] * calls / 2**20


@pytest.mark.parametrize("library", LIBRARIES)
def test_memory_stays_flat_over_100_000_calls(library):
    assert float(run_python(f"import test_endurance as t; print(t.growth({library!r}))", timeout=120)) < 0.5


def advice(address: int) -> list[str]:
    """Return the flags of the mapping in which an address lies."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="missing: a system that has huge pages"
)
def test_large_results_ask_for_huge_pages():
    torch = pytest.importorskip("torch")
    factors = torch.randn(2, 4096, 2048, requires_grad=True).unbind()  # of 32 MiB
    output = fs.fusion_sum(None, *factors)
    for grad in torch.autograd.grad(output, factors, torch.ones_like(output)):
        assert "hg" in advice(grad.data_ptr() + grad.nbytes // 2)
