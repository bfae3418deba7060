"""Exact search of keys larger than the memory: ``python -m bench.memory_map`` writes 4 GiB of keys and searches them in 1.

What lives here: the file, the search in a process of its own under a limit, the check against float64. What lives
elsewhere: the speed of a search in memory (rows C5 and C6, ``scores.py``).

The limit is that of ``ulimit -d``: all memory of the process but files mapped for reading, whose pages the system drops
when it needs them. ``ulimit -v`` would refuse the map itself, which takes addresses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import fusionsum as fs

N, QUERIES, K = 128, 64, 10
BLOCK = 2**17  # keys, 64 MiB


def _queries() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((QUERIES, N), np.float32)


def write(path: Path, blocks: int) -> np.ndarray:
    """Write the keys, flushed from the system's cache; return each query's greatest scores, in float64."""
    queries, best = _queries(), np.full((QUERIES, K), -np.inf)
    with path.open("wb") as file:
        for block in range(blocks):
            keys = np.random.default_rng(1 + block).standard_normal((BLOCK, N), np.float32)
            keys.tofile(file)
            # Twice as many as can be needed are chosen in float32, for it may swap neighbours.
            likely = np.argpartition(queries @ keys.T, -2 * K, axis=1)[:, -2 * K :]
            scores = np.einsum("bn,bkn->bk", queries.astype(float), keys[likely].astype(float))
            best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :K]
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return best


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


def search(path: Path, limit: int) -> dict[str, Any]:
    """Search the file under the limit, in this process; return the result and what it took, as JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.fromfile(path, np.float32)
        fits = True
    except MemoryError:
        fits = False
    keys = np.memmap(path, np.float32, mode="r").reshape(-1, N)
    before, peak, done = _status("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    _, indices = fs.top_k(_queries(), keys, K)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "extra_bytes": max(0, peak - before),
        "private_bytes": peak,
        "fits_as_array": fits,
        "indices": indices.tolist(),
    }


def main(argv: list[str] | None = None) -> int:
    """Write, search, check and print; the exit code is 1 if a key is not among the greatest."""
    parser = argparse.ArgumentParser("bench.memory_map", description="Search keys larger than the memory.")
    parser.add_argument("--mib", type=int, default=4096, help="of keys, a multiple of 64 (default: 4096)")
    parser.add_argument("--limit-mib", type=int, default=1024, help="of memory (default: 1024)")
    parser.add_argument("--folder", type=Path, help="of the file, which is removed (default: the temporary folder)")
    parser.add_argument("--search", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.search:
        print(json.dumps(search(options.search, options.limit_mib << 20)))
        return 0
    if options.mib < 64 or options.mib % 64:
        parser.error(f"--mib: expected a multiple of 64, got {options.mib}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "keys.f32"
        best = write(path, options.mib // 64)
        command = [
            sys.executable,
            "-m",
            "bench.memory_map",
            "--search",
            str(path),
            "--limit-mib",
            str(options.limit_mib),
        ]
        root = Path(__file__).parents[1]
        child = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(child.stdout)
        keys = np.memmap(path, np.float32, mode="r").reshape(-1, N)
        chosen = keys[np.array(found["indices"])].astype(float)
        error = np.abs(np.einsum("bn,bkn->bk", _queries().astype(float), chosen) - best).max() / best.max()
    right = bool(error <= 64 * np.finfo(np.float32).eps)
    fit = "fit" if found["fits_as_array"] else "do not fit"
    print(
        f"top {K} of {options.mib << 20 >> 9} keys, {QUERIES} queries, n={N}, float32: {options.mib} MiB mapped, limit "
        f"{options.limit_mib} MiB of memory (ulimit -d); as an array the keys {fit}"
    )
    print(
        f"{found['seconds']:.2f} s, {(options.mib << 20) / found['seconds'] / 1e9:.2f} GB/s; private memory at its peak "
        f"{found['private_bytes'] / 2**20:.0f} MiB, of it {found['extra_bytes'] / 2**20:.1f} by the search; "
        f"distance from the greatest scores in float64 {error:.1e}: {'right' if right else 'WRONG'}"
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
