"""The CUDA kernels without a GPU: compiled by g++ and emulated, replayed under sanitizers, and as PTX in the interpreter.

What lives elsewhere: the calls (``cases.py``), the tests of the emulator, of the interpreter and of the tests themselves
(``test_emulator.py``, ``test_ptx.py``, ``test_planted.py``), what ptxas made of the kernels (``test_static.py``), tests on
a GPU (``test_on_gpu.py``).
"""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest

import conftest
from tests.cuda import cases, emulation, sass, step_cases, traffic

CALLS = dict([*cases.cases(), *cases.large_cases()])
FEW = {name: case for i, (name, case) in enumerate(CALLS.items()) if i % 5 == 0 or i >= len(CALLS) - 7}


@pytest.fixture(scope="module")
def plain():
    return emulation.build("plain")


def passes(file, chosen, **environment):
    """Run the chosen tests of a file in a process of their own."""
    arguments = ["-q", "-p", "no:cacheprovider", "-k", chosen, str(conftest.TESTS / f"test_{file}.py")]
    conftest.run_python(f"import pytest; raise SystemExit(pytest.main({arguments!r}))", timeout=600, **environment)


AGAIN = {  # test files, and what is left out of each: what takes minutes, or is about the CPU
    "kernel": "not counts_beyond and not 1000000 and not instruction",
    "formula": "",
    "layouts": "",
    "score_kernels": "",
    "losses": "contrastive or sigmoid or reduction or extreme",
    "search": "",
    # How often the CPU's kernels are called; and integers, which it reads once, may change before backward.
    "autograd_losses": "not only_what and not one_pass and not of_the_graph",
    "autograd_losses_watched": "opcheck or compile",
    "autograd_search": "",
    "distributed_losses": "3-float32 or scale",
    "distributed_search": "one_process and 3",
}


@pytest.mark.parametrize("file", AGAIN)
def test_what_the_kernels_of_the_cpu_are_tested_for(file, plain):
    """Those test files again, in a process whose arrays go to the emulated library, and its tensors where a GPU's do."""
    passes(file, AGAIN[file], FUSIONSUM_TEST_DEVICE="emulated", FUSIONSUM_EMULATED=str(plain))


def test_tensors_take_the_same_road(plain):
    """What the tests on a GPU go through, with tensors of the CPU."""
    passes("kernel", "test_exact", FUSIONSUM_TEST_DEVICE="cpu")


def test_every_kernel_is_right_to_the_bit_under_every_schedule(plain):
    """All kernels there are, against the oracle; schedules of threads and blocks must not tell in the bits."""
    launched, first = set(), {}
    with cases.emulated(plain) as library:
        for schedule in (*emulation.SCHEDULES, "random:2"):
            library.schedule(schedule)
            for name, case in CALLS.items():
                with library.recording() as runs:
                    results = cases.both(case)
                if name not in first:
                    conftest.check_forward(case, results[0])
                    conftest.check_backward(case, results[1], results[2:])
                launched |= {launch.kernel for run in runs for launch in run.launches}
                expected = first.setdefault(name, results)
                assert all(map(conftest.same_bits, results, expected)), f"{name}, {schedule}"
        library.schedule("forward")
        assert library.reports() == []
    symbols = subprocess.run(["nm", "-D", "--defined-only", plain], check=True, capture_output=True, text=True).stdout
    kernels = set(re.findall(r"_ZN9fusionsum4cuda(?:4rows|7columns)I\w+", symbols))
    # Of packed operands, four dtypes; 1, 2, 3, 4 operands, with and without derivatives and activations. Of loose ones
    # 1, 2, 3, 4 in float32, of which activations come with derivatives, and in float64 with derivatives; and any number.
    assert len(kernels) == 4 * 32 + 2 * 4 * (3 + 1) + 4
    assert kernels <= launched


def test_offsets_of_more_than_32_bits(plain):
    with cases.emulated(plain) as library, cases.spread(library):
        for _, case in cases.cases():
            conftest.check_both(case, np.random.default_rng(2))


@pytest.mark.parametrize("multiple", [1, 8])
def test_sums_are_rounded_once(multiple, plain):
    with cases.emulated(plain):
        for label, case, wanted in cases.rounded_once(multiple):
            assert (case.forward() == wanted).all(), label


@pytest.mark.parametrize("variant", ["address", "thread"])
def test_sanitizers_have_nothing_to_say(variant, plain, tmp_path):
    """Every operand a heap block of its own, of its exact size."""
    chosen = CALLS if variant == "address" else FEW
    with cases.emulated(plain) as library:
        files = cases.write(library, tmp_path, chosen.items())
    assert len(files) >= 2 * len(chosen)
    driver = emulation.build(variant)
    done = emulation.replay(driver, files, emulation.SCHEDULES if variant == "address" else ("forward", "random:1"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize("schedule", ["lockstep", "adversarial"])
def test_the_ptx_that_nvcc_emitted(schedule, plain):
    """Once through every kernel, and partial sums: no finding, and the emulation's bits."""
    parsed, executed = cases.modules(), set()
    chosen = CALLS if schedule == "lockstep" else FEW
    with cases.emulated(plain) as library:
        for name, case in chosen.items():
            with library.recording() as runs:
                alive = cases.both(case)
            for run in runs:
                kernels = {launch.kernel for launch in run.launches}
                blocks = sum(launch.grid[0] for launch in run.launches)
                if kernels <= executed or blocks > 64:
                    continue
                reports, different = cases.replayed(run, parsed, schedule)
                assert not different, f"{name}: {different}"
                findings = [str(finding) for report in reports for finding in report.findings]
                assert not findings, f"{name}: {findings}"
                executed |= kernels
            del alive
    if schedule == "lockstep":
        kernels = {kernel for module in parsed for kernel in module.entries}
        assert executed == {kernel for kernel in kernels if not step_cases.KERNELS.fullmatch(kernel)}


@pytest.mark.parametrize("row", traffic.rows(), ids=lambda row: row.name)
def test_bytes_for_each_entry_are_the_bound(row, plain):
    """What DRAM must deliver and take: the operands once, the results once, and nothing else but partial sums."""
    sass.require_library()
    with cases.emulated(plain) as library:
        for moved, reports in traffic.count(row, library, cases.modules(), batch=16):
            assert not [finding for report in reports for finding in report.findings]
            spans = 8  # each may begin and end within a sector
            assert moved.must <= moved.distinct - moved.workspace + 64 * spans
            assert moved.distinct - moved.workspace <= moved.must + 64 * spans
