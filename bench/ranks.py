"""The contrastive loss over rows on several processes of this machine: ``python -m bench --ranks 2``.

What lives here: the sizes, the timing of ranks against one process that does the same work on as many cores, bytes and
memory against the formulas (``scale.py``). What lives elsewhere: the rows of one process (``scores.py``), sizes that this
machine cannot hold (``scale.py``).

Ranks are processes of one thread each over gloo, and one process has as many threads as there are ranks. All of them wait
while one is timed; a time of the ranks is that of the slowest.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fusionsum as fs
from fusionsum.distributed import Exchange

from .measure import set_threads

SIZES = ((512, 64), (4096, 512), (16384, 512), (32768, 256))  # queries and keys of all ranks, terms
QUICK_SIZES = SIZES[:2]
METHODS = ("gather", "ring")


def _batch(rows: int, terms: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, terms, generator=generator).div_(terms**0.5).requires_grad_() for _ in range(2)]


def _step(sides: list[torch.Tensor], group: Any) -> None:
    for x in sides:
        x.grad = None
    fs.contrastive_loss(*sides, logit_scale=20.0, group=group).backward()


def _peak(step: Callable[[], None]) -> int:
    """Return by how many bytes the process grew at most during a step."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    status = Path("/proc/self/status").read_text
    before = _field(status(), "VmRSS")
    step()
    return _field(status(), "VmHWM") - before


def _field(status: str, name: str) -> int:
    (line,) = (line for line in status.splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def _timed(step: Callable[[], None] | None) -> float:
    """Return the seconds until all ranks have taken a step, those that take none waiting."""
    dist.barrier()
    start = time.perf_counter()
    if step is not None:
        step()
    dist.barrier()
    return time.perf_counter() - start


def _serve(rank: int, world: int, sizes: list[tuple[int, int]], pairs: int, folder: str) -> None:
    """Measure, as one of the ranks; the first writes what it found."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    found = []
    for rows, terms in sizes:
        set_threads(1)
        own, whole = _batch(rows // world, terms, rank), _batch(rows, terms, world)
        exchanges = {method: Exchange(method=method) for method in METHODS}
        row: dict[str, Any] = {"rows": rows, "terms": terms, "one": [], **{method: [] for method in METHODS}}
        for method, exchange in exchanges.items():
            _step(own, exchange)
            sent = exchange.bytes_sent
            row[f"{method} memory"] = _peak(lambda exchange=exchange: _step(own, exchange))  # type: ignore[misc]
            row[f"{method} bytes"] = exchange.bytes_sent - sent
        for _ in range(pairs):
            set_threads(world)
            row["one"].append(_timed((lambda: _step(whole, None)) if rank == 0 else None))  # noqa: B023
            set_threads(1)
            for method, exchange in exchanges.items():
                row[method].append(_timed(lambda exchange=exchange: _step(own, exchange)))  # type: ignore[misc]
        found.append(row)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(world: int, pairs: int, quick: bool) -> list[dict[str, Any]]:
    """Start the ranks, measure, and return a row for each size."""
    sizes = QUICK_SIZES if quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, (world, sizes, pairs, folder), nprocs=world)
        return list(json.loads((Path(folder) / "found.json").read_text()))


def table(world: int, rows: list[dict[str, Any]]) -> str:
    """Return what was measured as a table in Markdown."""
    lines = [
        f"| B | n | one process, {world} threads | "
        + " | ".join(f"{m} | of one | MiB sent | MiB more" for m in METHODS)
        + " |",
        "|" + "---|" * (3 + 4 * len(METHODS)),
    ]
    for row in rows:
        cells = [str(row["rows"]), str(row["terms"]), f"{1e3 * statistics.median(row['one']):.1f} ms"]
        for method in METHODS:
            ratios = [ours / one for ours, one in zip(row[method], row["one"], strict=True)]
            cells += [f"{1e3 * statistics.median(row[method]):.1f} ms", f"{statistics.median(ratios):.2f}"]
            cells += [f"{row[f'{method} {of}'] / 2**20:.2f}" for of in ("bytes", "memory")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
