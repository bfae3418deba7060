"""Any problem at all: random bytes become one, and every instruction set and number of threads must get it right.

What lives elsewhere: problems and scores from bytes, their memory, the plain loops they are held to (``problem.h``,
``scores.h``), the fuzzers' entry (``fuzz.h``), the same from Python (``tests/test_layouts.py``, ``tests/score_cases.py``).

The inputs are the same in every run. For a long search, ``FUSIONSUM_FUZZ_SECONDS=600 python -m pytest tests/native -k
search``: libFuzzer, where clang++ is, else g++'s build on inputs not seen before. What it finds stays in build/native.
"""

from __future__ import annotations

import os
import time

import pytest

from tests.native import build

SECONDS = int(os.environ.get("FUSIONSUM_FUZZ_SECONDS", "0"))


@pytest.mark.parametrize(
    ("program", "variant", "inputs"),
    [
        ("fuzz", "plain", 4000),
        ("fuzz", "address", 1000),
        ("fuzz", "thread", 300),
        ("fuzz_scores", "plain", 400),
        ("fuzz_scores", "address", 100),
        ("fuzz_scores", "thread", 60),
    ],
)
def test_inputs_that_stay_the_same(program, variant, inputs):
    done = build.run(program, variant, str(inputs), "0")
    assert done.returncode == 0, (done.stdout[-20:] + done.stderr)[-4000:]
    assert done.stdout.split()[-1] == str(inputs - 1)


@pytest.mark.skipif(not SECONDS, reason="missing: FUSIONSUM_FUZZ_SECONDS, how long to search")
@pytest.mark.parametrize("program", ["fuzz", "fuzz_scores"])
def test_search(program):
    variant = "fuzzer" if build.compiler("fuzzer") else "address"
    start = time.time()
    if variant == "fuzzer":
        folder = build.program(program, variant).parent
        corpus = folder / f"corpus_{program}"
        corpus.mkdir(exist_ok=True)
        options = ["-max_len=256", "-len_control=0", "-print_final_stats=1"]
        options += [f"-max_total_time={SECONDS}", f"-artifact_prefix={folder}/"]
        done = build.run(program, variant, *options, str(corpus), timeout=SECONDS + 300)
        assert done.returncode == 0, done.stderr[-4000:]
        print(done.stderr[-1000:])
    while variant == "address" and time.time() < start + SECONDS:
        done = build.run(program, variant, "100", str(time.time_ns()))
        assert done.returncode == 0, (done.stdout[-20:] + done.stderr)[-4000:]
