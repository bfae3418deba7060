"""The steps of scores (csrc/cuda/scores) without a GPU: emulated, replayed under sanitizers, and as PTX in the interpreter.

What lives elsewhere: the calls (``step_cases.py``), the CPU's tests of scores, which go through all of it too
(``test_emulated.py``), sums (there), a GPU (``test_on_gpu.py``).
"""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch

import score_cases
from fusionsum import chunks
from tests.cuda import cases, emulation, step_cases


@pytest.fixture(scope="module")
def plain():
    return emulation.build("plain")


def bits(found):
    return [None if x is None else x.numpy().tobytes() for x in found]


def test_every_kernel_gives_the_same_bits_under_every_schedule(plain):
    launched, first = set(), {}
    with step_cases.emulated(plain) as library:
        for schedule in (*emulation.SCHEDULES, "random:2"):
            library.schedule(schedule)
            for call in step_cases.CALLS:
                with library.recording() as runs:
                    found = bits(step_cases.results(*call))
                launched |= {launch.kernel for run in runs for launch in run.launches}
                assert first.setdefault(call, found) == found, f"{call}, {schedule}"
        library.schedule("forward")
        assert library.reports() == []
    symbols = subprocess.run(["nm", "-D", "--defined-only", plain], check=True, capture_output=True, text=True).stdout
    kernels = set(step_cases.KERNELS.findall(symbols))
    assert len(kernels) == 4 + 2 + 2 + 8 + 4 + 2 + 1  # float32 and float64; with pairs and without, or of two sizes
    assert kernels <= launched


@pytest.mark.parametrize("variant", ["address", "thread"])
def test_sanitizers_have_nothing_to_say(variant, plain, tmp_path):
    """Every array a heap block of its own, of its exact size."""
    with step_cases.emulated(plain) as library, library.writing_cases(tmp_path):
        for call in step_cases.CALLS if variant == "address" else step_cases.FEW:
            step_cases.results(*call)
    files = sorted(tmp_path.glob("*.case"))
    schedules = emulation.SCHEDULES if variant == "address" else ("forward", "random:1")
    done = emulation.replay(emulation.build(variant), files, schedules)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize("schedule", ["lockstep", "adversarial"])
def test_the_ptx_that_nvcc_emitted(schedule, plain):
    """Once through every kernel, for each kind of pairs: no finding, and the emulation's bits."""
    parsed, executed, seen = cases.modules(), set(), set()
    with step_cases.emulated(plain) as library:
        for call in step_cases.CALLS if schedule == "lockstep" else step_cases.FEW:
            with library.recording() as runs:
                step_cases.results(*call)
            for run in runs:
                kernels = tuple(launch.kernel for launch in run.launches)
                blocks = sum(launch.grid[0] for launch in run.launches)
                if (kernels, call[1]) in seen or blocks > 64:
                    continue
                seen.add((kernels, call[1]))
                reports, different = cases.replayed(run, parsed, schedule)
                assert not different, f"{call}: {kernels}, {different}"
                findings = [str(finding) for report in reports for finding in report.findings]
                assert not findings, f"{call}: {findings}"
                executed |= set(kernels)
    if schedule == "lockstep":
        ours = {kernel for module in parsed for kernel in module.entries if step_cases.KERNELS.fullmatch(kernel)}
        assert len(ours) == 23
        assert ours <= executed


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_chunks_of_any_size(dtype, plain, monkeypatch, rng):
    """All that is checked of scores, in chunks of few rows and columns."""
    with step_cases.emulated(plain):
        monkeypatch.setattr(score_cases, "native", score_cases.device._Chunks(None, "cpu"))
        monkeypatch.setattr(score_cases.device, "CUDA_KERNELS", True)
        for most, (rows, cols) in ((2**9, (40, 70)), (2**12, (33, 150)), (2**11, (3, 900)), (2**10, (150, 6))):
            monkeypatch.setattr(chunks, "CHUNK_BYTES", most)
            for kind in ("uniform", "integers"):
                s = score_cases.draw(rng, rows, cols, 9, dtype, kind)
                for name, check in score_cases.CALLS.items():
                    if name != "matrix":
                        check(s, rng)


def test_less_memory_makes_smaller_chunks_and_too_little_an_error(monkeypatch, plain):
    wanted, most = [], [2**20]
    real = torch.Tensor.new_empty

    def new_empty(self, shape, **options):
        wanted.append(np.prod(shape) * 4)
        if wanted[-1] > most[0]:
            raise torch.cuda.OutOfMemoryError("no more")
        return real(self, shape, **options)

    queries = torch.randn(1000, 2)
    with step_cases.emulated(plain):
        call = step_cases.scores.check(queries, queries).read()
        want = chunks.sigmoid_stats(call)
        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        torch.testing.assert_close(chunks.sigmoid_stats(call), want)
        assert len(wanted) > 1
        assert wanted[-1] <= most[0]
        most[0] = 2**10
        said = r"1000 queries and 1000 keys: no memory for a chunk of \d+ bytes, .* no more"
        with pytest.raises(torch.cuda.OutOfMemoryError, match=said):
            chunks.sigmoid_stats(call)
