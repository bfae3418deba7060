"""Command line of the benchmark: options, the re-execution in another environment, the loop over rows."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# glibc returns large blocks to the system, which clears them again page by page at every call: that costs more than what is
# compared, and most where much is allocated. glibc reads these variables once, at the start of a process.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
HELD_BACK = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # set, they give OpenBLAS another processor's kernels
PAIRS, QUICK_PAIRS = 11, 3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options; `pairs` is added to them."""
    parser = argparse.ArgumentParser("bench", description="Measure fusion_sum against torch, NumPy and the machine.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_PAIRS} pairs, no torch.compile, rows C in small: a few minutes",
    )
    parser.add_argument("--rows", default="", metavar="P1,P5", help="only these rows (default: all)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as torch uses")
    parser.add_argument("--ranks", type=int, default=0, metavar="N", help="instead: losses over so many processes")
    parser.add_argument("--fresh", action="store_true", help="let malloc return its memory, as it does by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the current GPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results, or results/cuda, beside the code")
    options = parser.parse_args(argv)
    results = Path(__file__).parent / "results"
    options.out = options.out or (results if options.device == "cpu" else results / "cuda")
    options.pairs = QUICK_PAIRS if options.quick else PAIRS
    if options.ranks < 0 or options.ranks == 1:
        parser.error(f"--ranks: expected at least 2, got {options.ranks}")
    if options.threads < 0:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    return options


def benchmark(options: argparse.Namespace) -> Path:
    """Measure what is asked for and write the report; return the path of the Markdown file."""
    # Imported here, for torch must not be loaded before the re-execution.
    import torch
    from tqdm import tqdm

    from . import gpu, layers, machine, measure, ranks, report, rows, scores

    if options.ranks:
        return ranks.write(options.ranks, options.pairs, options.quick, options.out)
    where = machine.Cpu() if options.device == "cpu" else gpu.Gpu()
    scored = scores.QUICK_SCORES if options.quick else scores.SCORES
    of_cpu, of_gpu = (*rows.ROWS, *layers.LAYERS, *scored), (*rows.CUDA_ROWS, *scores.on_gpu(scored))
    chosen = rows.select(options.rows, of_cpu if options.device == "cpu" else of_gpu)
    threads = options.threads or torch.get_num_threads()
    measure.set_threads(threads)
    settings = {
        "quick": options.quick,
        "pairs": options.pairs,
        "limit": where.limit,
        "multiplied": where.multiplied,
        "memory": where.memory,
        "threads": threads,
        "environment": {name: os.environ[name] for name in KEEP_MEMORY if name in os.environ},
    }
    result: dict[str, Any] = {
        "machine": where.describe(),
        "settings": settings,
        "limits": where.limits(),
        "rows": [],
    }
    try:
        with tqdm(total=sum(len(row.phases) for row in chosen), unit="phase", mininterval=1.0) as bar:
            for row in chosen:
                result["rows"].append(measure.measure(row, where, options.pairs, threads, not options.quick, bar))
    finally:  # what is measured outlives a row that fails
        result["machine"]["load_after"] = os.getloadavg()
        if result["rows"]:
            path = report.write(result, options.out)
    return path


def main(argv: list[str] | None = None) -> int:
    """Start the benchmark; the exit code is 0 however slow anything was."""
    options = parse(argv)
    wanted = {name: value for name, value in os.environ.items() if name not in (*HELD_BACK, *KEEP_MEMORY)}
    if not options.fresh:
        wanted |= KEEP_MEMORY
    if options.threads:
        wanted["OPENBLAS_NUM_THREADS"] = str(options.threads)
    if wanted != dict(os.environ):
        changes = [f"{name}={value}" for name, value in wanted.items() if os.environ.get(name) != value]
        changes += [f"no {name}" for name in os.environ if name not in wanted]
        print(f"re-executing with {', '.join(changes)}", file=sys.stderr, flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
    path = benchmark(options)
    print(path.read_text())
    print(f"written to {path.parent}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
