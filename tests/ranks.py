"""Ranks of torch.distributed for the tests: processes over gloo, kept for many tests, and a time limit on all they do.

    ranks(3).run(function, *given)  # function(rank, *given) in each of three processes; their results, by rank

What lives elsewhere: what the ranks run, functions at the top of the test files, which the processes import by name.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import multiprocessing
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 60.0  # seconds for a function; within which torch.distributed gives up on a rank, too
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch.distributed", "numpy"])


class Failed(Exception):
    """What a function raised in another process; its text is the type's name, the message and, further down, where."""


class Ranks:
    """So many processes in one process group, the default group of each; with NCCL, each with a GPU of its own."""

    def __init__(self, world: int, timeout: float = LIMIT, backend: str = "gloo") -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.pipes = [], []
        for rank in range(world):
            here, there = _server.Pipe()
            given = there, rank, world, os.path.join(self.folder.name, "store"), timeout, backend
            process = _server.Process(target=_serve, args=given, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], *given: Any, limit: float = LIMIT, errors: bool = False) -> list[Any]:
        """Call ``function(rank, *given)`` in each process; return the results, by rank.

        With `errors` a rank's `Failed` is its result, and None that of a rank that died; otherwise they are raised.
        """
        self.start(function, *given)
        return self.results(limit, errors)

    def start(self, function: Callable[..., Any], *given: Any) -> None:
        """Let the processes call a function, whose results `results` waits for."""
        for pipe in self.pipes:
            pipe.send((function, given))

    def results(self, limit: float = LIMIT, errors: bool = False) -> list[Any]:
        """Wait for the results of all ranks."""
        end, found = time.monotonic() + limit, []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                self.close()
                raise AssertionError(f"rank {rank} has not ended after {limit:g} s")
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append(None)
                if not errors:
                    raise AssertionError(f"rank {rank} died") from None
        if not errors:
            for rank, result in enumerate(found):
                if isinstance(result, Failed):
                    raise AssertionError(f"rank {rank}: {result}")
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()
        atexit.unregister(self.close)
        ranks.cache_clear()


@functools.cache
def ranks(world: int) -> Ranks:
    """Return so many ranks, the same for all tests."""
    return Ranks(world)


def samples(file: str) -> list[str]:
    """Return the code in docs/distributed.md that a test file runs: none where the source tree is not, beside a wheel."""
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    if not page.exists():
        return []
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"<!-- runs: {Path(file).name} -->\n```python\n(.*?)```", text, re.DOTALL)
    if not found:
        raise AssertionError(f"no code of docs/distributed.md is run by {file}")
    return found


def sample(rank: int, code: str) -> None:
    """Run code, as a rank."""
    exec(code, {})


def _serve(pipe: Any, rank: int, world: int, store: str, timeout: float, backend: str) -> None:
    import torch

    import device

    device.enter()
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout)
    )
    with contextlib.suppress(EOFError):  # the tests have ended
        while True:
            function, given = pipe.recv()
            try:
                result = function(rank, *given)
            except Exception as error:
                result = Failed(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
            pipe.send(result)
