"""What the CUDA kernels move, counted by the interpreter of PTX, against what they must.

    PYTHONPATH=tests python -m tests.cuda.traffic     the table, in Markdown; takes minutes

The bench's rows, at a batch that the interpreter can run: bytes for each entry of the product hardly depend on it.

What lives elsewhere: the time that predicts (``predictions.py``), the rows (``bench/rows.py``), recording and replaying
(``cases.py``), counters (``ptx_memory.py``).
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


def rows() -> list[SumRow]:
    """Return the rows of the bench that are counted."""
    return [row for row in ROWS if row.name in NAMES]


def main() -> None:
    """Print the table."""
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


if __name__ == "__main__":
    main()
