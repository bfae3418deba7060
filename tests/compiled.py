"""Programs and libraries that tests compile for themselves: what is up to date is kept, two compilers run at a time.

What lives elsewhere: what is compiled, and with which flags (``cuda/emulation.py``, ``native/build.py``).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import pathlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["link", "locked", "run"]


def run(command: Sequence[str]) -> None:
    """Run a compiler; RuntimeError quotes what it says where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def _headers(flags: Sequence[str]) -> bytes:
    """Join the headers in the folders after each -I: what may include them is made anew when one changes."""
    folders = (pathlib.Path(folder) for flag, folder in itertools.pairwise(flags) if flag == "-I")
    return b"".join(
        file.read_bytes()
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".h", ".cuh", ".inl")
    )


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Make the folder, and let no other process build in it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _up_to_date(to: pathlib.Path, digest: str, make: Callable[[], None]) -> None:
    record = to.with_name(to.name + ".digest")
    if not (to.exists() and record.exists() and record.read_text() == digest):
        record.unlink(missing_ok=True)
        make()
        record.write_text(digest)


def link(
    result: pathlib.Path,
    sources: Mapping[pathlib.Path, Sequence[str]],
    flags: Sequence[str],
    compiler: str = "g++",
) -> pathlib.Path:
    """
    Compile and link what has changed, in a folder that is :func:`locked`.

    Parameters
    ----------
    result
        The program or library. Objects lie beside it, for other results there to share.
    sources
        Each with the flags it is compiled with.
    flags
        To link with.
    compiler
        The command.

    Returns
    -------
    pathlib.Path
        The result.

    Raises
    ------
    RuntimeError
        If the compiler fails; its message is quoted.
    """

    def compiled(source: pathlib.Path) -> tuple[str, str]:
        to = result.with_name(f"{source.parent.name}_{source.stem}.o")
        command = [compiler, *sources[source]]
        digest = hashlib.sha256(
            "\0".join(command).encode() + _headers(sources[source]) + source.read_bytes()
        ).hexdigest()
        _up_to_date(to, digest, lambda: run([*command, "-c", str(source), "-o", str(to)]))
        return str(to), digest

    def linked() -> None:
        new = result.with_name(result.name + ".new")
        run([compiler, *(name for name, _ in objects), *flags, "-o", str(new)])
        new.replace(result)  # whoever has the old one loaded keeps it

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    _up_to_date(result, hashlib.sha256(repr((objects, flags)).encode()).hexdigest(), linked)
    return result
