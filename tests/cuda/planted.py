"""Bugs planted into copies of the CUDA sources, to test the tests: what each changes, and which stages must notice.

The product's sources know nothing of them. ``emulation.build`` and the PTX stage take a bug by name.
"""

from __future__ import annotations

import pathlib
import shutil
from dataclasses import dataclass

__all__ = ["BUGS", "Bug", "plant"]


@dataclass(frozen=True)
class Bug:
    """One replacement in one file; `stages` are those that catch it."""

    name: str
    file: str  # relative to csrc
    old: str  # found exactly once
    new: str
    stages: tuple[str, ...]


BUGS: tuple[Bug, ...] = ()


def plant(bug: Bug, sources: pathlib.Path, copy: pathlib.Path) -> None:
    """
    Copy the sources, with the bug.

    Parameters
    ----------
    bug
        What to replace.
    sources
        The folder ``csrc``.
    copy
        The folder to write; what was there is removed.

    Raises
    ------
    ValueError
        If the file does not contain the old text exactly once.
    """
    text = (sources / bug.file).read_text()
    if (found := text.count(bug.old)) != 1:
        raise ValueError(f"planted bug {bug.name!r}: {bug.file} contains its old text {found} times, expected once")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sources, copy)
    (copy / bug.file).write_text(text.replace(bug.old, bug.new))
