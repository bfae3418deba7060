"""What the CUDA kernels move, counted by the interpreter of PTX, against what they must.

    PYTHONPATH=tests python -m tests.cuda.traffic     the tables, in Markdown; takes minutes

The bench's rows, at a batch that the interpreter can run: bytes for each entry of the product hardly depend on it. Then
operands of other alignments and dtypes: the first blocks of a batch that fills a GPU, for the cut into blocks depends on
the batch, and with it the instructions; and the blocks of more batches.

What lives elsewhere: the time that predicts (``predictions.py``), the rows (``bench/rows.py``), recording and replaying
(``cases.py``), counters (``ptx_memory.py``), the bounds on all this (``test_traffic.py``, ``test_emulated.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from bench.rows import ROWS, SumRow
from conftest import Case
from tests.cuda import cases, emulation, ptx

NAMES = ("P1", "P5 bf16", "P5 f16", "P6", "P8", "P9")
FULL = 16_896  # rows, 64 of them for each of 264 blocks
BATCHES = (1, 64, 300, 2200, 4096, 65_536)
BATCH = 64  # instead of the row's
PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Traffic:
    """Bytes by the launch's counters; `must` are the operands read once and the results written once."""

    row: SumRow
    phase: str
    entries: int  # of the product
    must: int
    distinct: int  # sectors of 32 bytes that were touched, times 32
    workspace: int  # of these, written by one stage of a sum and read by the next
    sectors: int  # of all requests, times 32: what L2 serves
    instructions: int  # by warps

    @property
    def per_entry(self) -> float:
        """Bytes of DRAM for each entry of the product, without the partial sums, whose share falls with the batch."""
        return (self.distinct - self.workspace) / self.entries

    @property
    def must_per_entry(self) -> float:
        """The same, as it must be."""
        return self.must / self.entries


def case_of(row: SumRow, batch: int) -> Case:
    """Make NumPy operands for a row of the bench with another batch."""
    rng = np.random.default_rng(0)
    dtype = ml_dtypes.bfloat16 if row.name == "P5 bf16" else np.float16 if row.name == "P5 f16" else np.float32
    shapes = [(batch, *shape[1:]) for shape in row.shapes]
    factors = [rng.uniform(-1, 1, shape).astype(dtype) for shape in shapes]
    weights = rng.uniform(-1, 1, row.weights).astype(np.float32)
    present = [rng.random(batch) >= 0.3 for _ in factors] if row.masked else None
    return Case(weights, factors, row.activations and list(row.activations), present, dim=row.dim)


def count(
    row: SumRow, library: emulation.Library, parsed: tuple[ptx.Module, ...], batch: int = BATCH
) -> list[tuple[Traffic, list[ptx.Report]]]:
    """Replay a row, forward and backward, in the interpreter."""
    case = case_of(row, batch)
    with library.recording() as runs:
        alive = cases.both(case)
    found = []
    for phase, run in zip(PHASES, runs, strict=True):
        reports, different = cases.replayed(run, parsed)
        assert not different, different
        spans = cases.merged(run.spans)
        workspace = sum(end - begin for begin, end, role in spans if role == "workspace")
        counters = [report.counters for report in reports]
        traffic = Traffic(
            row,
            phase,
            math.prod(case.shape),
            sum(end - begin for begin, end, role in spans if role != "workspace"),
            32 * sum(c.distinct_loaded + c.distinct_stored for c in counters),
            2 * workspace,
            32 * sum(c.sectors(store) for c in counters for store in (False, True)),
            sum(sum(c.instructions.values()) for c in counters),
        )
        found.append((traffic, reports))
    del alive  # the runs pointed to it
    return found


@dataclass(frozen=True)
class Bulk:
    """A paired sum of two factors (B, n), `off` values later than aligned; weights (n) or, if `varying`, (B, n)."""

    n: int
    dtype: str = "float32"
    weights: str = "float32"
    off: int = 0
    varying: bool = False

    def __str__(self) -> str:
        """Name it as the tables do."""
        shape = "(B, n)" if self.varying else "(n)"
        return f"{self.dtype}, n={self.n}{', unaligned by one' * self.off}, {self.weights} weights {shape}"

    @property
    def aligned(self) -> Bulk:
        """The nearest for which the kernels have accesses of 16 bytes: the bound is twice its instructions."""
        return Bulk(512, self.dtype, self.dtype if self.varying else self.weights, 0, self.varying)

    def case(self, batch: int) -> Case:
        """Make operands of zeros, which cost no memory until they are read."""

        def zeros(shape: tuple[int, ...], dtype: str, off: int = 0) -> np.ndarray:
            kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
            raw = np.zeros((math.prod(shape) + off) * kind.itemsize + 256, np.uint8)
            start = -raw.ctypes.data % 256 + off * kind.itemsize
            return raw[start : start + math.prod(shape) * kind.itemsize].view(kind).reshape(shape)

        weights = zeros((batch, self.n) if self.varying else (self.n,), self.weights)
        return Case(weights, [zeros((batch, self.n), self.dtype, self.off) for _ in range(2)])


ALIGNED = (Bulk(512), Bulk(512, "bfloat16"), Bulk(512, varying=True), Bulk(512, "bfloat16", "bfloat16", varying=True))
LOOSE = (
    *(Bulk(n, dtype) for dtype in ("float32", "bfloat16") for n in (513, 511)),
    *(Bulk(512, dtype, off=1) for dtype in ("float32", "bfloat16")),
    Bulk(512, "bfloat16", varying=True),
)
BOTH = (Bulk(513, "bfloat16", varying=True), Bulk(513, varying=True))  # three that vary, and odd: what costs most


def planned(case: Case, library: emulation.Library) -> tuple[emulation.Run, emulation.Run, list[np.ndarray]]:
    """Plan forward and backward and run nothing; return the launches of both, and arrays to which they point."""
    with library.running_last(0), library.recording() as runs:
        alive = cases.both(case)
    forward, backward = runs
    return forward, backward, alive


def instructions(
    bulk: Bulk, library: emulation.Library, parsed: tuple[ptx.Module, ...], blocks: int = 20
) -> list[tuple[float, float]]:
    """Execute the first blocks of the pass, forward and backward; return instructions and bytes of L2 for each entry."""
    case, found = bulk.case(FULL), []
    *runs, alive = planned(case, library)
    for run in runs:
        launch, share = run.launches[0], blocks / run.launches[0].grid[0]
        segments = []
        for begin, end, role in cases.merged(run.spans):
            size = end - begin
            if role != "workspace" and size > 1 << 20:  # has a row for each of the batch
                size = int(size * 1.05 * share)
            data, written = np.zeros(size, np.uint8), role in ("grad", "workspace")
            segments.append(ptx.Segment(begin, data, written, not written, role))
        module = next(m for m in parsed if launch.kernel in m.entries)
        report = ptx.launch(module, launch.kernel, (blocks,), launch.block, launch.parameters, segments)
        assert not report.findings, [str(finding) for finding in report.findings]
        entries, counters = math.prod(case.shape) * share, report.counters
        sectors = counters.sectors(False) + counters.sectors(True)
        found.append((32 * sum(counters.instructions.values()) / entries, 32 * sectors / entries))
    del alive
    return found


def rows() -> list[SumRow]:
    """Return the rows of the bench that are counted."""
    return [row for row in ROWS if row.name in NAMES]


def tables_of_bulk(library: emulation.Library, parsed: tuple[ptx.Module, ...]) -> None:
    """Print instructions for each entry by alignment and dtype, and blocks by batch."""
    print(
        "\n| operands | forward: instructions | L2 bytes | backward: instructions | L2 bytes |\n|---|---|---|---|---|"
    )
    of_aligned = {}
    for bulk in (*ALIGNED, *LOOSE, *BOTH):
        cells = []
        of_aligned[bulk] = of = instructions(bulk, library, parsed)
        for (executed, moved), (at_best, _) in zip(of, of_aligned[bulk.aligned], strict=True):
            ratio = f" ({executed / at_best:.2f} of the aligned)" if bulk not in ALIGNED else ""
            cells += [f"{executed:.1f}{ratio}", f"{moved:.1f}"]
        print("|", " | ".join([str(bulk), *cells]), "|", flush=True)
    print(f"\n| operands, phase | {' | '.join(f'B={b}' for b in BATCHES)} |\n|---{'|---' * len(BATCHES)}|")
    for n in (64, 128, 512, 513, 1024, 4096):
        for dtype in ("float32", "bfloat16"):
            plans = [planned(Bulk(n, dtype).case(batch), library) for batch in BATCHES]
            for i, phase in enumerate(PHASES):
                blocks = (" + ".join(str(launch.grid[0]) for launch in plan[i].launches) for plan in plans)
                print(f"| {dtype}, n={n}, {phase} |", " | ".join(blocks), "|", flush=True)


def main() -> None:
    """Print the tables."""
    parsed = cases.modules()
    print(f"Batch {BATCH}; bytes for each entry of the product.\n")
    print("| row | phase | DRAM | bound | L2 | instructions of a thread |")
    print("|---|---|---|---|---|---|")
    with cases.emulated(emulation.build("plain")) as library:
        for row in rows():
            for t, _ in count(row, library, parsed):
                cells = [row.name, t.phase, f"{t.per_entry:.2f}", f"{t.must_per_entry:.2f}"]
                cells += [f"{t.sectors / t.entries:.2f}", f"{32 * t.instructions / t.entries:.0f}"]
                print("|", " | ".join(cells), "|", flush=True)
        tables_of_bulk(library, parsed)


if __name__ == "__main__":
    main()
