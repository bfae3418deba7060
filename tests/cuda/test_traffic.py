"""What the CUDA kernels would take on a GPU, as far as it can be counted: blocks that fill it, instructions, bytes.

What lives elsewhere: the counting (``traffic.py``), registers and widths of accesses (``test_static.py``), results
(``test_emulated.py``).
"""

from __future__ import annotations

import pytest

from tests.cuda import cases, emulation, sass, traffic
from tests.cuda.traffic import BATCHES, Bulk

MULTIPROCESSORS = 132  # of an H100


@pytest.fixture(scope="module")
def library():
    with cases.emulated(emulation.build("plain")) as library:
        yield library


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [64, 128, 512, 513, 1024, 4096])
def test_blocks_fill_a_gpu(n, dtype, library):
    """Two blocks a multiprocessor, where every one of them finds work for a warp, or two to write partial sums."""
    bulk = Bulk(n, dtype)
    width = 4 if n == 513 or dtype == "float32" else 8
    for batch in BATCHES:
        forward, backward, _ = traffic.planned(bulk.case(batch), library)
        warps = batch * -(-n // width) // 32
        few = min(2 * MULTIPROCESSORS, warps)
        assert forward.launches[0].grid[0] >= min(few, batch), (batch, "forward")
        if batch >= 300:
            assert backward.launches[0].grid[0] >= min(2 * MULTIPROCESSORS, warps // 2), (batch, "backward")


@pytest.mark.parametrize("n", [512, 513, 4096])
def test_partial_sums_are_small(n, library):
    """What the second launch reads, at any batch: two megabytes at most."""
    for dtype in ("float32", "bfloat16"):
        for batch in BATCHES:
            *runs, _ = traffic.planned(Bulk(n, dtype).case(batch), library)
            for run in runs:
                assert sum(span.bytes for span in run.spans if span.role == "workspace") <= 2 << 20, (dtype, batch)


@pytest.fixture(scope="module")
def of_aligned(library):
    sass.require_library()
    return {bulk: traffic.instructions(bulk, library, cases.modules()) for bulk in traffic.ALIGNED}


@pytest.mark.parametrize("bulk", [*traffic.LOOSE, *traffic.BOTH], ids=str)
def test_other_operands_take_twice_the_instructions_at_most(bulk, library, of_aligned):
    """Odd rows, unaligned arrays, mixed dtypes; and L2 is asked for little more: sectors at the ends of a warp's run."""
    most = 2.5 if bulk in traffic.BOTH else 2
    found, best = traffic.instructions(bulk, library, cases.modules()), of_aligned[bulk.aligned]
    item = {"float32": 4, "bfloat16": 2}
    bytes_of_a_pass = 2 * item[bulk.dtype] + bulk.varying * item[bulk.weights]
    for phase, ((executed, moved), (fewest, least)) in enumerate(zip(found, best, strict=True), 1):
        assert executed <= most * fewest
        assert moved <= 1.5 * max(least, phase * bytes_of_a_pass)
