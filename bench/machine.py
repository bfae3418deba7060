"""What this machine is, what it can do, and how much memory a call takes at its peak.

The limits are what torch and NumPy reach here, in the same process and with the same threads: the faster of two ways to
read and of two ways to copy, and ``torch.mm`` for the rate of fused multiply-adds. They are
proxies: a kernel may pass 100%.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fusionsum as fs


def describe() -> dict[str, Any]:
    """CPU, caches, versions and load, as JSON."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    caches = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind}"] = size
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "caches": caches,
        "backend": fs.backends()["cpu"],
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


def _fastest(ways: list[Callable[[], Any]]) -> tuple[float, Callable[[], Any]]:
    """Return the seconds of the fastest way, by the best of 5 after a warm-up, and the way."""
    best = []
    for way in ways:
        way()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
        best.append((min(seconds), way))
    return min(best, key=lambda pair: pair[0])


def reader(arrays: list[torch.Tensor]) -> tuple[float, Callable[[], Any]]:
    """Find the fastest way to read these arrays once: a sum or a maximum of their bits as float32."""
    flat = [x.detach().reshape(-1).view(torch.float32) for x in arrays]
    return _fastest([lambda: [x.sum() for x in flat], lambda: [x.amax() for x in flat]])


def copier(arrays: list[torch.Tensor], threads: int) -> tuple[float, Callable[[], Any]]:
    """Find the fastest way to copy these arrays: torch's, or libc's memcpy (streaming stores) in NumPy threads."""
    flat = [x.detach().reshape(-1).view(torch.float32) for x in arrays]
    targets = [torch.empty_like(x) for x in flat]
    pool = ThreadPoolExecutor(threads)
    parts = [
        (to.numpy(), x.numpy())
        for whole_to, whole in zip(targets, flat, strict=True)
        for to, x in zip(whole_to.chunk(threads), whole.chunk(threads), strict=True)
    ]
    return _fastest(
        [
            lambda: [to.copy_(x) for to, x in zip(targets, flat, strict=True)],
            lambda: list(pool.map(lambda pair: np.copyto(*pair), parts)),
        ]
    )


def limits(threads: int) -> dict[str, float]:
    """Read and copy bandwidth over 256 MiB, the rate of multiply-adds by ``torch.mm``, and of exp within the cache."""
    big, square, small = torch.ones(2**26), torch.randn(2048, 2048), torch.randn(2**16)
    read, copy = reader([big])[0], copier([big], threads)[0]
    product = _fastest([partial(torch.mm, square, square, out=torch.empty_like(square))])[0]
    exp = _fastest([partial(torch.exp, small, out=torch.empty_like(small))])[0]
    return {
        "read_gb_per_s": big.nbytes / read / 1e9,
        "copy_gb_per_s": 2 * big.nbytes / copy / 1e9,
        "gflop_per_s": 2 * 2048**3 / product / 1e9,
        "exp_per_s": small.numel() / exp,
    }


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def peak_extra(call: Callable[[], Any], given_back: int) -> int | None:
    """Return the bytes a call takes at its peak beyond what it gives back, by the resident set; None if not on Linux.

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
