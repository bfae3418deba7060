"""Reading files that others name: regular files only, and no more of them than fits into memory.

What lives elsewhere: what the bytes mean (``sources.py``, ``kinds.py``).
"""

from __future__ import annotations

import io
import os
import stat
import time
from pathlib import Path

MOST = 1 << 29  # bytes of an item's file


def opened(path: Path) -> io.BufferedReader:
    """Open a regular file to read its bytes; a pipe, a device or a folder is an OSError, before anything is waited for."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("is not a regular file")
    return file


def content(path: Path) -> bytes:
    """Return the bytes of a regular file; more than `MOST` are a ValueError."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size <= MOST and len(read := file.read(MOST + 1)) <= MOST:
            return read
    raise ValueError(f"is larger than {MOST >> 20} MiB")


def state(path: Path) -> str:
    """Return what changes whenever a file does: its size, times and inode; "" if there is none, or it changed just now.

    A second change within the clock's tick of the first leaves no trace, hence the two seconds.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):  # the latter for a name that holds the character 0
        return ""
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    if not stat.S_ISREG(found.st_mode) or time.time_ns() - changed < 2_000_000_000:
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
