"""Any problem at all: random bytes become one, and every instruction set and number of threads must get it right.

What lives elsewhere: problems from bytes, their memory, the plain loop they are held to (``problem.h``), the fuzzer's entry
(``fuzz.cpp``), the same from Python, with hypothesis (``tests/test_layouts.py``).

The inputs are the same in every run. For a long search, ``FUSIONSUM_FUZZ_SECONDS=600 python -m pytest tests/native -k
search``: libFuzzer, where clang++ is, else g++'s build on inputs not seen before. What it finds stays in build/native.
"""

from __future__ import annotations

import os
import time

import pytest

from tests.native import build

SECONDS = int(os.environ.get("FUSIONSUM_FUZZ_SECONDS", "0"))


@pytest.mark.parametrize(("variant", "inputs"), [("plain", 4000), ("address", 1000), ("thread", 300)])
def test_inputs_that_stay_the_same(variant, inputs):
    done = build.run("fuzz", variant, str(inputs), "0")
    assert done.returncode == 0, (done.stdout[-20:] + done.stderr)[-4000:]
    assert done.stdout.split()[-1] == str(inputs - 1)


@pytest.mark.skipif(not SECONDS, reason="missing: FUSIONSUM_FUZZ_SECONDS, how long to search")
def test_search():
    variant = "fuzzer" if build.compiler("fuzzer") else "address"
    start = time.time()
    if variant == "fuzzer":
        folder = build.program("fuzz", variant).parent
        corpus = folder / "corpus"
        corpus.mkdir(exist_ok=True)
        options = ["-max_len=256", "-len_control=0", "-print_final_stats=1"]
        options += [f"-max_total_time={SECONDS}", f"-artifact_prefix={folder}/"]
        done = build.run("fuzz", variant, *options, str(corpus), timeout=SECONDS + 300)
        assert done.returncode == 0, done.stderr[-4000:]
        print(done.stderr[-1000:])
    while variant == "address" and time.time() < start + SECONDS:
        done = build.run("fuzz", variant, "1000", str(time.time_ns()))
        assert done.returncode == 0, (done.stdout[-20:] + done.stderr)[-4000:]
