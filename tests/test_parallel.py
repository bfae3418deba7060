"""Threads, processes, signals, memory: the same bits for any number of threads, and nothing that hangs or leaks.

What lives elsewhere: what the threads compute (``test_kernel.py``), their settings (``test_backend.py``), Ctrl-C and leaks
(``test_endurance.py``). Most of these tests run in processes of their own, with and without torch, for pools and forks are
process-wide.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

import fusionsum as fs
import score_cases
from conftest import ACTIVATIONS, DTYPES, FORMS, MIXED, random, require_native, run_python, same_bits

native = require_native()

SIZES = {  # large enough to be cut into chunks, in rows, in columns and in both
    "paired": {"B": 3000, "n": 257},
    "M=3": {"B": 3, "n": 70_001},
    "vector output": {"B": 500, "n": 16, "O": 129},
    "mixing": {"B": 301, "O": 37, "n": 65},
    "all pairs": {"B": 201, "C": 203, "n": 33},
    "candidates": {"B": 50, "K": 60, "n": 129},
    "one weight per row": {"B": 3000, "n": 129},
    "one weight": {"B": 3000, "n": 129},
    "terms first": {"n": 3000, "B": 257},
    "terms in one factor only": {"B": 3000, "n": 129},
    "three dims": {"A": 7, "B": 301, "n": 257},
    "one dim": {"n": 1_000_003},
}
WITH_OR_WITHOUT_TORCH = pytest.mark.parametrize("torch", [False, True], ids=["own pool", "torch's pool"])
USE_TORCH = """
import torch, fusionsum as fs
torch.set_num_threads(2)
m = torch.ones(512, 512); m @ m  # starts its pool
fs.fusion_sum(None, torch.ones(2, 2))
"""


def digest(form, dtypes, seed=0):
    """Hash the output and every gradient of one call."""
    rng = np.random.default_rng(seed)
    case = FORMS[form].case(rng, dtypes[1], dtypes[0], **SIZES[form])
    case.activations = [ACTIVATIONS[m % 3] for m in range(len(case.factors))]
    case = case.masked(rng, "rows", "one") if seed % 2 else case
    u = random(rng, case.output_shape, dtypes[1])
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in [case.forward(), *case.backward(u)])).hexdigest()


def check_thread_counts_of_sums():
    pairs = [*((d, d) for d in DTYPES), *MIXED]
    for f, form in enumerate(SIZES):
        for i, dtypes in enumerate((pairs[f % len(pairs)], pairs[(f + 3) % len(pairs)])):
            found = set()
            for count in (1, 2, 3, 8):
                fs.set_num_threads(count)
                assert fs.get_num_threads() == count
                found.add(digest(form, dtypes, i))
            assert len(found) == 1, (form, dtypes)


def check_thread_counts_of_scores():
    """Few queries, many, few keys; each dtype; with masks, labels, ids, exclusions, as it comes."""
    for i, (rows, cols, n) in enumerate(((3, 5000, 40), (300, 301, 33), (900, 40, 65), (40, 900, 16))):
        for dtype in DTYPES:
            found = set()
            for count in (1, 2, 3, 8):
                fs.set_num_threads(count)
                found.add(score_cases.digest(score_cases.draw(np.random.default_rng(i), rows, cols, n, dtype)))
            assert len(found) == 1, (rows, cols, n, dtype)


@WITH_OR_WITHOUT_TORCH
@pytest.mark.parametrize("of", ["sums", "scores"])
def test_same_bits_for_any_number_of_threads(of, torch):
    code = f"import test_parallel as t; t.check_thread_counts_of_{of}(); print(t.native.thread_backend())"
    assert run_python((USE_TORCH if torch else "") + code, timeout=120).strip() == ("torch" if torch else "own")


def shifted(array, elements):
    return np.concatenate([np.zeros(elements, array.dtype), array.ravel()])[elements:].reshape(array.shape)


@pytest.mark.parametrize("form", SIZES)
def test_same_bits_in_100_repeats(form, rng):
    """Smaller arrays than above, but still in chunks; memory between the calls varies."""
    sizes = {letter: max(1, n // 4) if n > 300 else n for letter, n in SIZES[form].items()}
    case = FORMS[form].case(rng, "float32", **sizes)
    u = random(rng, case.output_shape, "float32")
    first = [case.forward(), *case.backward(u)]
    for i in range(100):
        moved = case.mapped(
            lambda a, i=i: np.concatenate([np.zeros(i % 7, a.dtype), a.ravel()])[i % 7 :].reshape(a.shape)
        )
        again = [moved.forward(), *moved.backward(u)] if i % 10 == 0 else [moved.forward()]
        assert all(same_bits(np.asarray(a), np.asarray(b)) for a, b in zip(again, first, strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_of_scores_in_100_repeats(dtype):
    """Of every function of scores, forward and backward; memory between the calls varies."""
    scores = score_cases.draw(np.random.default_rng(1), 60, 130, 33, dtype)
    first, held = score_cases.digest(scores), []
    for i in range(100):
        held = [*held[-3:], np.ones(1 + 977 * i)]
        assert score_cases.digest(scores) == first


def check_concurrent_callers():
    """Eight Python threads, 250 calls each, large and small, forward and backward, some of them wrong."""
    rng = np.random.default_rng(0)
    cases = [FORMS[form].case(rng, "float32", B=300, n=67, O=5, C=30, K=3) for form in list(SIZES)[:8]]
    us = [random(rng, case.output_shape, "float32") for case in cases]
    wanted = [[case.forward(), *case.backward(u)] for case, u in zip(cases, us, strict=True)]
    failures = []

    def work(offset):
        try:
            for i in range(250):
                k = (i + offset) % len(cases)
                got = [cases[k].forward(), *(cases[k].backward(us[k]) if i % 3 == 0 else [])]
                assert all(same_bits(np.asarray(a), np.asarray(b)) for a, b in zip(got, wanted[k], strict=False))
                with pytest.raises(ValueError, match="dim"):
                    fs.fusion_sum(None, us[k], dim=9)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures


@WITH_OR_WITHOUT_TORCH
def test_concurrent_callers(torch):
    run_python((USE_TORCH if torch else "") + "import test_parallel as t; t.check_concurrent_callers()", timeout=120)


def check_concurrent_callers_of_scores():
    calls = [score_cases.draw(np.random.default_rng(i), 60 + i, 300, 33, DTYPES[i % 4]) for i in range(8)]
    wanted = [score_cases.digest(s) for s in calls]
    failures = []

    def work(offset):
        for i in range(24):
            k = (i + offset) % len(calls)
            if score_cases.digest(calls[k]) != wanted[k]:
                failures.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures


@WITH_OR_WITHOUT_TORCH
def test_concurrent_callers_of_scores(torch):
    run_python((USE_TORCH if torch else "") + "import test_parallel as t; t.check_concurrent_callers_of_scores()")


# Processes


def threaded_digest():
    fs.set_num_threads(2)
    scores = score_cases.draw(np.random.default_rng(0), 200, 201, 33)
    return digest("paired", ("float32", "float32")) + score_cases.digest(scores)


def check_fork(generations=2):
    """Use the threads, fork, and use them in the child and in the child's child; each has ten seconds."""
    want = threaded_digest()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            assert threaded_digest() == want
            if generations > 1:
                check_fork(generations - 1)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert threaded_digest() == want


FORK_WITH_TENSORS = """
import os, signal
z = torch.ones(3000, 257, requires_grad=True)
fs.fusion_sum(None, z, z).sum().backward()
child = os.fork()
if child == 0:
    signal.alarm(10)
    fs.fusion_sum(None, z, z)
    with torch.no_grad():
        ok = fs.fusion_sum(None, z, z)[0].item() == 257
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@WITH_OR_WITHOUT_TORCH
def test_fork_after_threaded_use(torch):
    run_python((USE_TORCH if torch else "") + "import test_parallel as t; t.check_fork()" + FORK_WITH_TENSORS * torch)


def test_fork_while_another_thread_computes():
    """The child gets a pool whose locks were held when it was born."""
    code = """
import threading, test_parallel as t
stop = threading.Event()
def work():
    while not stop.is_set():
        t.threaded_digest()
thread = threading.Thread(target=work); thread.start()
for _ in range(5):
    t.check_fork(1)
stop.set(); thread.join()
"""
    run_python(code)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_of_multiprocessing(method):
    want = threaded_digest()
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.apply_async(threaded_digest).get(60) == want


def tasks():
    return len(os.listdir("/proc/self/task"))


def test_no_thread_of_ours_beside_torch_s_pool():
    code = """
import test_parallel as t
before = t.tasks()
t.threaded_digest()
print(t.tasks() - before, t.native.thread_backend())
"""
    assert run_python(USE_TORCH + code).split() == ["0", "torch"]


def test_no_thread_before_it_is_needed():
    code = """
import test_parallel as t, fusionsum as fs, numpy as np
before = t.tasks()
fs.fusion_sum(None, np.ones((3, 5)))
fs.set_num_threads(1)
t.digest("paired", ("float32", "float32"))
one = t.tasks() - before
t.threaded_digest()
print(one, t.tasks() - before)
"""
    assert run_python(code, OMP_NUM_THREADS="1").split() == ["0", "1"]


# Signals


def test_other_signals_are_handled_during_a_call():
    """A Python handler runs, and the call goes on."""
    ran = []
    before = signal.signal(signal.SIGALRM, lambda *_: ran.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        total = fs.fusion_sum(None, np.broadcast_to(np.float64(0.5), (1, 2**31)))
        finished = time.monotonic()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert total.tolist() == [2.0**30]
    assert ran
    assert ran[0] < finished


# Memory


def test_no_memory_is_an_exception():
    """Outputs and gradients that do not fit, at a limit just above what the process has; afterwards all is well."""
    code = """
import resource
import numpy as np, fusionsum as fs
fs.fusion_sum(None, np.ones((3000, 257)))
far = lambda *shape: np.broadcast_to(np.float32(0.5), shape)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
for call in (
    lambda: fs.fusion_sum(None, far(2**28, 2)),
    lambda: fs.fusion_sum_grad(far(2**27), None, far(2**27, 4)),
    lambda: fs.fusion_sum_grad(far(4), far(2**27), far(4, 2**27)),
    lambda: fs.fusion_sum_grad(far(2**26), far(1), far(1, 1), far(2**26, 1)),
) * 20:
    try:
        call()
    except MemoryError:
        continue
    raise AssertionError("it fitted")
assert fs.fusion_sum(None, np.ones((3000, 257))).tolist() == [257] * 3000
"""
    run_python(code)


def test_a_thread_of_little_stack():
    """256 KiB; where the C library is musl, threads have half of that."""
    code = """
import threading
import numpy as np, fusionsum as fs
rng = np.random.default_rng(0)
weights, f, g = rng.standard_normal(600), rng.standard_normal((4096, 600)), rng.standard_normal((4096, 600))
options = {"activations": ["tanh", "gelu"], "present": [rng.random(4096) > 0.4, None]}
u = rng.standard_normal(4096)
results = []
def call():
    results.append([fs.fusion_sum(weights, f, g, **options), *fs.fusion_sum_grad(u, weights, f, g, **options)])
call()
threading.stack_size(256 * 1024)
thread = threading.Thread(target=call)
thread.start()
thread.join()
assert all(map(np.array_equal, *results))
print(len(results))
"""
    assert run_python(code) == "2\n"
