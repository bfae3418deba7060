"""The current GPU, the machine of ``--device cuda``: its clock, limits and memory, and CUDA graphs.

What lives elsewhere: the methods that a GPU shares with a processor (``machine.py``); the rows (``rows.py``), of which a
machine knows nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import cuda

import fusionsum as fs

from .machine import Cpu, Thunk


def captured(make: Callable[[], Thunk], stream: cuda.Stream) -> Thunk:
    """Capture a call in a CUDA graph; return the graph's replay.

    `make` returns the call. It is called on `stream`, like the warm-up and the capture: a gradient that is captured has to
    come from a forward pass on the same stream. Calls whose tensors share a leaf need the same stream for this reason.
    """
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        call = make()
        for _ in range(3):  # in their first calls compilers, libraries and allocators do things that no capture allows
            call()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, stream=stream):
        call()
    return graph.replay


class Gpu(Cpu):
    """The GPU, timed by its own events; raises SystemExit where the kernels cannot use one."""

    device = "cuda"
    compiler = os.environ.get("CC", "gcc")  # triton's
    limit = "one `copy_` on the GPU moves as many bytes, half of them read,"
    multiplied = "multiply-adds by `torch.mm` of square matrices of the factors' dtype"
    memory = "torch's allocator"

    def __init__(self) -> None:
        state = fs.backends()["cuda"]
        if state != "usable" or not cuda.is_available():
            raise SystemExit(f"--device cuda: {state}" if state != "usable" else "--device cuda: torch finds no GPU")
        self._stream = cuda.Stream()

    def describe(self) -> dict[str, Any]:
        """Add the GPU, its driver and the CUDA of torch."""
        properties = cuda.get_device_properties()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "bytes": properties.total_memory,
            "driver": driver,
            "cuda": torch.version.cuda,
        }
        return super().describe() | {"gpu": gpu}

    def seconds(self, call: Thunk, calls: int = 1) -> float:
        """Time a call, `calls` times in a row, between two events on the current stream; return the seconds per call."""
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        for _ in repeat(None, calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def limits(self) -> dict[str, float]:
        """Read and copy bandwidth over 1 GiB, and the rate of multiply-adds."""
        return self.rates(2**28, 4096)

    def transfers(self, arrays: list[torch.Tensor]) -> tuple[Thunk, Thunk]:
        """Return copies of half the bytes, and of all, in one block: a second launch takes as long as megabytes."""
        flat = torch.cat([x.detach().reshape(-1) for x in arrays])
        return self.copier([flat[: flat.numel() // 2]])[1], self.copier([flat])[1]

    def multiplier(self, flop: int, dtype: torch.dtype = torch.float32) -> Thunk:
        """Return a product of square matrices that takes about as many operations, within 2% from 2 GFLOP on."""
        side = max(8, 8 * round((flop / 2) ** (1 / 3) / 8))
        a, b, to = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(3))  # zeros take less power
        return lambda: torch.mm(a, b, out=to)

    def peak_extra(self, call: Thunk, given_back: int) -> int:
        """Return the bytes that torch's allocator gives a call at its peak beyond the call's results."""
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        kept = call()
        peak = cuda.max_memory_allocated()
        del kept
        return max(0, peak - before - given_back)

    def prepared(self, make: Callable[[], Thunk], graphed: bool) -> Thunk:
        """Make the call that is timed, with `graphed` the replay of its CUDA graph."""
        return captured(make, self._stream) if graphed else make()
