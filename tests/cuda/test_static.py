"""What ptxas made of the kernels, against what it may: registers, occupancy, stack and the width of accesses.

The library is a build with -DFUSIONSUM_CUDA=ON (``sass.find_library``); without one its tests are skipped. For each kernel
and architecture ``budgets.json`` holds the registers and the blocks per multiprocessor: no change may worsen them
unnoticed, and ``python -m tests.cuda.sass --budgets`` writes them anew. What lives elsewhere: what is executed
(``test_ptx.py``).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter

import pytest

from tests.cuda import sass


@pytest.fixture(scope="module")
def kernels():
    return sass.read(sass.require_library())


def judge(kernels, wrong):
    """Fail with every kernel for which `wrong` has something to say."""
    said = [f"{kernel.name} on sm_{kernel.architecture}: {text}" for kernel in kernels if (text := wrong(kernel))]
    assert kernels and not said, "\n".join(said)


def test_nothing_spills(kernels):
    judge(kernels, lambda k: k.stack + k.local and f"{k.stack} bytes of stack, {k.local} of local memory")


def test_budgets(kernels):
    budgets = json.loads(sass.BUDGETS.read_text())

    def wrong(kernel):
        budget = budgets.get(kernel.name, {}).get(str(kernel.architecture))
        if budget is None:
            return "has no budget"
        registers, blocks = budget
        if kernel.registers > registers or kernel.blocks < blocks:
            return f"{kernel.registers} registers for {registers}, {kernel.blocks} blocks for {blocks}"
        return None

    judge(kernels, wrong)
    assert budgets.keys() == {kernel.name for kernel in kernels}, "budgets of kernels that are no more"


def test_rows_move_by_sixteen_bytes(kernels):
    """A counted kernel loads each varying operand, and stores its derivative, a packet at a time in its loops."""

    def wrong(kernel):
        counted = re.fullmatch(r"(?:rows|columns)<\w+, ([1-4]), (true|false), (?:true|false)>", kernel.name)
        if not counted:
            return None
        operands, gradients = int(counted[1]), int(counted[1]) * (counted[2] == "true")
        loads, stores = kernel.loads[16], kernel.stores[16]
        return (loads < operands or stores < gradients) and f"{loads} loads and {stores} stores of 16 bytes"

    judge(kernels, wrong)
    assert any(kernel.name.startswith("rows<float, 2,") for kernel in kernels)  # or the pattern has lost its kernels


# ---- the reader itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    nvcc, _ = sass.require_tool("nvcc"), sass.require_tool("cuobjdump")
    to = tmp_path_factory.mktemp("static") / "probe.fatbin"
    codes = [flag for a in (80, 90) for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    source = sass.BUDGETS.with_name("ptx_probe.cu")
    subprocess.run([nvcc, "-std=c++17", "-O3", "--fatbin", *codes, str(source), "-o", str(to)], check=True)
    return {(kernel.name, kernel.architecture): kernel for kernel in sass.read(to)}


@pytest.mark.parametrize("architecture", [80, 90])
def test_reads_what_is_known(probe, architecture):
    loop = probe["copy_in_a_loop", architecture]
    assert (loop.loads, loop.stores) == (Counter({1: 1, 16: 1}), Counter({16: 1}))
    assert not probe["copy_packets", architecture].loads  # sixteen bytes, but in no loop
    assert probe["block_sum", architecture].loads.keys() == {4}
    assert probe["local_rotate", architecture].stack >= 256  # an array indexed at run time
    own = probe["transpose_padded", architecture].shared
    assert own == 32 * 33 * 4 + (1024 if architecture >= 90 else 0)


# By the limits of the CUDA Programming Guide, reckoned by hand: architecture, registers, shared memory in bytes, blocks.
@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "blocks"),
    [
        (75, 32, 0, 4),
        (75, 64, 0, 4),
        (75, 72, 0, 3),
        (80, 32, 0, 8),
        (80, 40, 0, 6),
        (80, 64, 0, 4),
        (80, 128, 0, 2),
        (80, 255, 0, 1),
        (80, 32, 40 * 1024, 4),
        (86, 32, 0, 6),
        (90, 64, 0, 4),
        (90, 32, 41 * 1024, 5),
        (120, 32, 0, 6),
    ],
)
def test_occupancy(architecture, registers, shared, blocks):
    kernel = sass.Kernel("k", architecture, registers, 0, shared, 0, Counter(), Counter())
    warps = {75: 32, 86: 48, 120: 48}.get(architecture, 64)
    assert (kernel.blocks, kernel.occupancy) == (blocks, blocks * 8 / warps)


def test_demangled_names_are_short(kernels):
    assert all(re.fullmatch(r"[a-z_]+(<[\w<>, ]+>)?", kernel.name) for kernel in kernels)
