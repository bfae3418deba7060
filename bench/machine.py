"""The machine: its description, its limits, its clock, and the memory that a call takes at its peak.

The limits of bandwidth are the rates of torch and NumPy in the same process and with the same threads: the faster of two
ways to read and of two ways to copy. They are proxies: a kernel may pass 100%. That of fused multiply-adds is a loop in
registers (``fma.cpp``), compiled when it is first asked for; ``torch.mm`` stands beside it, as what BLAS makes of it.
What lives elsewhere: the same of a GPU, where it differs (``gpu.py``); the rows (``rows.py``, ``layers.py``,
``scores.py``), of which a machine knows nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fusionsum as fs

Thunk = Callable[[], Any]  # a call to time, its arguments bound


def _flat(arrays: list[torch.Tensor]) -> list[torch.Tensor]:
    """View the arrays' bytes as float32, whatever their dtypes."""
    return [x.detach().reshape(-1).view(torch.float32) for x in arrays]


def _cpuinfo(field: str) -> str:
    """Return a field of the first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*: (.*)", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else ""


@cache
def _traits() -> tuple[str, ...]:
    flags = _cpuinfo("flags").split()
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else platform.machine()
    # AMD's models are called "AMD EPYC" in virtual machines; the family tells the architecture.
    zen = {"23": "Zen 2", "25": "Zen 4" if vectors == "AVX-512" else "Zen 3", "26": "Zen 5"}
    make = {"AuthenticAMD": zen.get(_cpuinfo("cpu family"), "AMD"), "GenuineIntel": "Intel"}.get(_cpuinfo("vendor_id"))
    # Intel's execute pairs of bfloat16 at half the rate of float32: there they are not used (csrc/cpu/dispatch.cpp).
    pairs = "AVX512_BF16" if "avx512_bf16" in flags and make != "Intel" else None
    return tuple(filter(None, (make, vectors, pairs)))


@cache
def _multiplier(compiler: str) -> Any:
    """Compile the loop of multiply-adds for this machine; return the library."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        source = Path(__file__).with_name("fma.cpp")
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.flop_per_round.restype = ctypes.c_int64
    loaded.multiply.argtypes, loaded.multiply.restype = [ctypes.c_int64, *[ctypes.c_float] * 2], ctypes.c_float
    return loaded


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


class Cpu:
    """The processor, with as many threads as torch has."""

    device = "cpu"
    compiler = os.environ.get("CXX", "g++")  # torch.compile's
    limit = "torch or NumPy reads (forward), copies (backward) or does both with the same bytes"
    multiplied = "multiply-adds in registers"
    memory = "the resident set"

    @property
    def traits(self) -> tuple[str, ...]:
        """The machine's kind as floors tell kinds apart: architecture or make, vectors, AVX512_BF16 where it is used."""
        return _traits()

    def describe(self) -> dict[str, Any]:
        """Return CPU, caches, versions and load, as JSON."""
        caches = {}
        for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            caches[f"L{level} {kind}"] = size
        return {
            "cpu": _cpuinfo("model name") or platform.processor(),
            "traits": self.traits,
            "cores": os.cpu_count(),
            "caches": caches,
            "backend": fs.backends()[self.device],
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "versions": {
                "fusionsum": fs.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
                "system": platform.platform(),
            },
            "load_before": os.getloadavg(),
        }

    def seconds(self, call: Thunk, calls: int = 1) -> float:
        """Time a call, `calls` times in a row; return the seconds per call."""
        start = time.perf_counter()
        for _ in repeat(None, calls):
            call()
        return (time.perf_counter() - start) / calls

    def prepared(self, make: Callable[[], Thunk], graphed: bool) -> Thunk:
        """Make the call that is timed; only a GPU has graphs."""
        return make()

    def fastest(self, ways: list[Thunk]) -> tuple[float, Thunk]:
        """Return the seconds of the fastest of these calls, by the best of 5 after a warm-up, and the call."""
        best = []
        for way in ways:
            way()
            best.append((min(self.seconds(way) for _ in range(5)), way))
        return min(best, key=lambda pair: pair[0])

    def reader(self, arrays: list[torch.Tensor]) -> tuple[float, Thunk]:
        """Return the fastest way to read these arrays once, a sum or a maximum of their bytes as float32."""
        flat = _flat(arrays)
        return self.fastest([lambda: [x.sum() for x in flat], lambda: [x.amax() for x in flat]])

    def copier(self, arrays: list[torch.Tensor]) -> tuple[float, Thunk]:
        """Return the fastest way to copy these arrays, torch's or libc's memcpy (streaming stores) in NumPy threads."""
        pairs, threads = [(torch.empty_like(x), x) for x in _flat(arrays)], torch.get_num_threads()
        ways: list[Thunk] = [lambda: [to.copy_(x) for to, x in pairs]]
        if self.device == "cpu":
            pool = ThreadPoolExecutor(threads)
            parts = [
                (to.numpy(), x.numpy())
                for pair in pairs
                for to, x in zip(*(whole.chunk(threads) for whole in pair), strict=True)
            ]
            ways.append(lambda: list(pool.map(lambda pair: np.copyto(*pair), parts)))
        return self.fastest(ways)

    def limits(self) -> dict[str, float]:
        """Return the rates of `rates`, that of exp within the cache, and with a compiler that of multiply-adds."""
        small = torch.randn(2**16)
        exp = self.fastest([partial(torch.exp, small, out=torch.empty_like(small))])[0]
        limits = self.rates(2**26, 2048) | {"exp_per_s": small.numel() / exp}
        if shutil.which(self.compiler):
            flop = 10**10
            limits["fma_gflop_per_s"] = flop / self.fastest([self.multiplier(flop)])[0] / 1e9
        return limits

    def rates(self, count: int, side: int) -> dict[str, float]:
        """Return the bandwidths over `count` floats, and the rate of multiply-adds of square matrices of that side."""
        big, square = torch.ones(count, device=self.device), torch.randn(side, side, device=self.device)
        read, copy = self.reader([big])[0], self.copier([big])[0]
        product = self.fastest([partial(torch.mm, square, square, out=torch.empty_like(square))])[0]
        return {
            "bytes": big.nbytes,
            "read_gb_per_s": big.nbytes / read / 1e9,
            "copy_gb_per_s": 2 * big.nbytes / copy / 1e9,
            "gflop_per_s": 2 * side**3 / product / 1e9,
        }

    def transfers(self, arrays: list[torch.Tensor]) -> tuple[Thunk, Thunk]:
        """Return a call that moves as many bytes as these arrays have, and one that moves twice as many."""
        return self.reader(arrays)[1], self.copier(arrays)[1]

    def multiplier(self, flop: int, dtype: torch.dtype = torch.float32) -> Thunk:
        """Return a call that does as many operations, fused multiply-adds of float32 in registers of each thread."""
        threads, loop = torch.get_num_threads(), _multiplier(self.compiler)
        pool, rounds = ThreadPoolExecutor(threads), -(-flop // (threads * loop.flop_per_round()))
        return lambda: list(pool.map(lambda factor: loop.multiply(rounds, factor, 0.5), [0.5] * threads))

    def peak_extra(self, call: Thunk, given_back: int) -> int | None:
        """Return the bytes a call takes at its peak beyond its results, by the resident set; None if not on Linux.

        Freed memory is returned to the system first (``malloc_trim``), so that taking it again shows; then the kernel's
        record of the peak is reset (``clear_refs``) and read after the call. Resolution: some hundred KiB.
        """
        if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        kept = call()
        peak = _status("VmHWM")
        del kept
        return max(0, peak - before - given_back)
