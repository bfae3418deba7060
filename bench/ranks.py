"""The contrastive loss over rows on several processes of this machine: ``python -m bench --ranks 2``.

What lives here: the sizes, the timing of ranks against one process that does the same work on as many cores, the bytes
sent and the memory. What lives elsewhere: the rows of one process (``scores.py``), sizes that this machine cannot hold
(``scale.py``).

Ranks are processes of one thread each over gloo, and one process has as many threads as there are ranks. The ranks wait
while the one is timed; their time is that of the slowest. A step is the loss and its gradients of both sides.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fusionsum as fs
from fusionsum.distributed import Exchange

from . import machine
from .measure import set_threads
from .scale import METHODS

SIZES = ((512, 64), (4096, 512), (16384, 256))  # queries and keys of all ranks, terms
QUICK_SIZES = SIZES[:2]


def _batch(rows: int, terms: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, terms, generator=generator).div_(terms**0.5).requires_grad_() for _ in range(2)]


def _step(sides: list[torch.Tensor], group: Any) -> None:
    for x in sides:
        x.grad = None
    fs.contrastive_loss(*sides, logit_scale=20.0, group=group).backward()


def _timed(step: Callable[[], None] | None) -> float:
    """Return the seconds until all ranks have taken a step, those that take none waiting."""
    dist.barrier()
    start = time.perf_counter()
    if step is not None:
        step()
    dist.barrier()
    return time.perf_counter() - start


def _join(rank: int, world: int, folder: str) -> None:
    set_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=600))


def _leave(rank: int, folder: str, found: Any) -> None:
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _grown(rank: int, world: int, folder: str, rows: int, terms: int, method: str) -> None:
    """Take one step as one of the ranks, in a process that has taken none of this size; count bytes."""
    _join(rank, world, folder)
    _step(_batch(2 * world, terms, rank), Exchange())  # what the first step of any size sets up
    own, exchange = _batch(rows // world, terms, rank), Exchange(method=method)
    memory = machine.Cpu().peak_extra(partial(_step, own, exchange), given_back=0)  # the gradients included
    _leave(rank, folder, {"memory": memory, "bytes": exchange.bytes_sent})


def _timings(rank: int, world: int, folder: str, rows: int, terms: int, pairs: int) -> None:
    """Take steps as one of the ranks, by turns with one process, which is the first."""
    _join(rank, world, folder)
    own, whole = _batch(rows // world, terms, rank), _batch(rows, terms, world)
    exchanges = {method: Exchange(method=method) for method in METHODS}
    found: dict[str, list[float]] = {"one": [], **{method: [] for method in METHODS}}
    for _ in range(1 + pairs):
        set_threads(world)
        found["one"].append(_timed((lambda: _step(whole, None)) if rank == 0 else None))
        set_threads(1)
        for method, exchange in exchanges.items():
            found[method].append(_timed(partial(_step, own, exchange)))
    _leave(rank, folder, {name: times[1:] for name, times in found.items()})


def _spawned(function: Callable[..., None], world: int, *given: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(function, (world, folder, *given), nprocs=world)
        return json.loads((Path(folder) / "found.json").read_text())


@contextlib.contextmanager
def _giving_back() -> Iterator[None]:
    """Let processes that are started meanwhile give back what they free, which the benchmark's own settings keep."""
    name, threshold = "MALLOC_MMAP_THRESHOLD_", "65536"
    before = os.environ.get(name)
    os.environ[name] = threshold
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def measure(world: int, pairs: int, quick: bool) -> list[dict[str, Any]]:
    """Start the ranks, measure, and return a row for each size."""
    found = []
    for rows, terms in QUICK_SIZES if quick else SIZES:
        size = {"rows": rows, "terms": terms}
        with _giving_back():
            of_methods = {method: _spawned(_grown, world, rows, terms, method) for method in METHODS}
        found.append({**size, "seconds": _spawned(_timings, world, rows, terms, pairs), "methods": of_methods})
    return found


def table(world: int, rows: list[dict[str, Any]]) -> str:
    """Return what was measured as a table in Markdown."""
    of_methods = " | ".join(f"{method} | of one | MiB sent | MiB more" for method in METHODS)
    lines = [f"| B | n | one process, {world} threads | {of_methods} |", "|" + "---|" * (3 + 4 * len(METHODS))]
    for row in rows:
        seconds = row["seconds"]
        cells = [str(row["rows"]), str(row["terms"]), _milliseconds(seconds["one"])]
        for method in METHODS:
            ratios = [ours / one for ours, one in zip(seconds[method], seconds["one"], strict=True)]
            cells += [_milliseconds(seconds[method]), f"{statistics.median(ratios):.2f}"]
            cells += [f"{row['methods'][method][of] / 2**20:.1f}" for of in ("bytes", "memory")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ms"


def write(world: int, pairs: int, quick: bool, out: Path) -> Path:
    """Measure, and write the table and its numbers; return the table's path."""
    rows, where = measure(world, pairs, quick), machine.Cpu().describe()
    out.mkdir(parents=True, exist_ok=True)
    (out / "ranks.json").write_text(
        json.dumps({"machine": where, "ranks": world, "pairs": pairs, "rows": rows}, indent=1)
    )
    path = out / "ranks.md"
    path.write_text(
        f"# The contrastive loss over {world} ranks\n\n{where['cpu']}, {where['cores']} cores. Medians of {pairs} "
        "interleaved rounds; forward and backward, float32. MiB are those of a rank; memory is that of the process above "
        f"what it was before the step, the gradients included.\n\n{table(world, rows)}\n"
    )
    return path
