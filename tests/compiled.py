"""Programs and libraries that tests compile for themselves: what is up to date is kept, two compilers run at a time.

What lives elsewhere: what is compiled, and with which flags (``cuda/emulation.py``, ``native/build.py``).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import pathlib
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["link", "locked", "run"]

_OBJECTS = pathlib.Path(__file__).parent.parent / "build" / "objects"  # of all programs and libraries


def run(command: Sequence[str]) -> None:
    """Run a compiler; RuntimeError quotes what it says where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


_INCLUDE = re.compile(rb'^#include "([^"]+)"', re.M)


def _texts(source: pathlib.Path, folders: Sequence[pathlib.Path]) -> dict[pathlib.Path, bytes]:
    """Read a source and all that it includes, its own folder and these being where that is."""
    texts: dict[pathlib.Path, bytes] = {}
    todo = [source.resolve()]
    while todo:
        file = todo.pop()
        if file in texts:
            continue
        texts[file] = file.read_bytes()
        for name in _INCLUDE.findall(texts[file]):
            places = (folder / name.decode() for folder in (file.parent, *folders))
            todo += [place.resolve() for place in places if place.exists()][:1]
    return texts


def _digest(command: Sequence[str], source: pathlib.Path) -> str:
    """Hash what an object depends on, but not where that lies: copies of sources make the same one."""
    flags, folders = [], []
    for before, flag in itertools.pairwise(["", *command]):
        if before == "-I":
            folders.append(pathlib.Path(flag))
        else:
            flags.append(flag)
    parts = [repr(flags).encode(), *_texts(source, folders).values()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Let no other process be here with the same path, beside whose place the lock lies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link(
    result: pathlib.Path,
    sources: Mapping[pathlib.Path, Sequence[str]],
    flags: Sequence[str],
    compiler: str = "g++",
) -> pathlib.Path:
    """
    Compile and link what has changed; what it makes is to be :func:`locked`.

    Parameters
    ----------
    result
        The program or library. Objects are kept for others: the sources with a planted bug (``cuda/planted.py``)
        are the product's but for one file.
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

    def compiled(source: pathlib.Path) -> str:
        command = [compiler, *sources[source]]
        to = _OBJECTS / f"{source.stem}-{_digest(command, source)[:32]}.o"
        with locked(to):
            if not to.exists():
                new = to.with_suffix(".new")
                run([*command, "-c", str(source), "-o", str(new)])
                new.replace(to)
        return str(to)

    result.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    record = result.with_name(result.name + ".linked")  # after the link: what it is a link of
    given = repr((compiler, objects, flags))
    if not (result.exists() and record.exists() and record.read_text() == given):
        new = result.with_name(result.name + ".new")
        run([compiler, *objects, *flags, "-o", str(new)])
        new.replace(result)  # whoever has the old one loaded keeps it
        record.write_text(given)
    return result
