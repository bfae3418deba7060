"""The cache of decoded items and of frozen encoders' features: one SQLite file, which heals itself.

What lives here: the file, its limit, what ``fusionsum cache`` shows and clears. What lives elsewhere: what is looked up and
stored (``preprocess.py``). SQLite makes it safe for two processes and against being killed. A cache that cannot be made,
written or read costs time, never a row: items are then decoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

NAME = "items.sqlite"
DAY = 86400
WAIT = 30  # seconds for another process's transaction; then the items are decoded again, or not stored
# Nothing waits for the disk: a power failure may cost the cache, as it is made anew when it turns out to be malformed.
OPEN = "PRAGMA auto_vacuum = INCREMENTAL; PRAGMA synchronous = OFF;"
TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, key BLOB UNIQUE, what TEXT, dtype TEXT, shape TEXT, checksum INTEGER, bytes INTEGER,
    used INTEGER
);
CREATE TABLE IF NOT EXISTS arrays (id INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, state TEXT, digest BLOB) WITHOUT ROWID;
"""


def digest(*parts: bytes) -> bytes:
    """Return the hash by which contents and items are known: 20 bytes."""
    hashed = hashlib.blake2b(digest_size=20)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()


class Cache:
    """Arrays by key, and the digests of files by their state.

    Parameters
    ----------
    folder : pathlib.Path
        Made when the first array is stored.
    limit : int, optional
        Bytes of the file, by and large; beyond it the arrays that were not used for the longest time are deleted.

    Attributes
    ----------
    trouble : str
        Why the cache could not be used, if it could not; "" otherwise.

    Examples
    --------
    >>> import tempfile
    >>> with Cache(Path(tempfile.mkdtemp())) as cache:
    ...     cache.store("image", {b"key": np.arange(3)})
    ...     cache.find([b"key", b"other"])
    {b'key': array([0, 1, 2])}
    """

    def __init__(self, folder: Path, limit: int = 10 << 30) -> None:
        self.path = folder / NAME
        self.limit = limit
        self.trouble = ""
        self._lock = threading.RLock()  # of the connection: workers look up keys
        self._connection: sqlite3.Connection | None = None
        self._healed = False
        self._read_only = False

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def holds(self, key: bytes) -> bool:
        """Return whether there is an array of a key."""
        with self._guarded() as database:
            return bool(database and database.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone())
        return False

    def find(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Return the arrays of those of some keys that have a sound one; an array whose checksum is wrong is deleted."""
        found: dict[bytes, np.ndarray] = {}
        for part in _parts(keys):
            with self._guarded() as database:
                if database is None:
                    return found
                rows = database.execute(
                    "SELECT id, key, dtype, shape, checksum, used, data FROM entries LEFT JOIN arrays USING (id)"
                    f" WHERE key IN ({_marks(part)})",
                    part,
                ).fetchall()
                for number, key, dtype, shape, checksum, _, data in rows:
                    if data is None or checksum != _checksum(key, dtype, shape, data):
                        database.execute("DELETE FROM entries WHERE id = ?", (number,))
                        continue
                    found[key] = np.frombuffer(data, dtype).reshape([int(n) for n in shape.split()])
                today = int(time.time()) // DAY
                if any(used < today for *_, used, _ in rows):
                    database.execute(f"UPDATE entries SET used = ? WHERE key IN ({_marks(part)})", (today, *part))
                database.commit()
        return found

    def store(self, what: str, arrays: Mapping[bytes, np.ndarray]) -> None:
        """Store arrays, all or none of them; `what` they are is for `summary`."""
        today = int(time.time()) // DAY
        with self._guarded(write=True) as database:
            if database is None:
                return
            for key, array in arrays.items():
                dtype, shape = array.dtype.str, " ".join(map(str, array.shape))
                data = np.ascontiguousarray(array).tobytes()
                database.execute("DELETE FROM arrays WHERE id = (SELECT id FROM entries WHERE key = ?)", (key,))
                cursor = database.execute(
                    "INSERT OR REPLACE INTO entries (key, what, dtype, shape, checksum, bytes, used)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (key, what, dtype, shape, _checksum(key, dtype, shape, data), len(data), today),
                )
                database.execute("INSERT OR REPLACE INTO arrays VALUES (?, ?)", (cursor.lastrowid, data))
            database.commit()

    def digests(self, states: Mapping[str, str]) -> dict[str, bytes]:
        """Return the digests of the contents of those files, by path, whose state is known."""
        known: dict[str, bytes] = {}
        for part in _parts(list(states)):
            with self._guarded() as database:
                if database is None:
                    return known
                rows = database.execute(f"SELECT path, state, digest FROM files WHERE path IN ({_marks(part)})", part)
                known |= {path: found for path, state, found in rows if state and states[path] == state}
        return known

    def remember(self, files: Iterable[tuple[str, str, bytes]]) -> None:
        """Store the path, state and digest of some files."""
        if not (files := [file for file in files if file[1]]):
            return
        with self._guarded(write=True) as database:
            if database is not None:
                database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", files)
                database.commit()

    def summary(self) -> list[tuple[str, int, int]]:
        """Return what is cached, how many arrays of it, and their bytes."""
        with self._guarded() as database:
            if database is not None:
                return database.execute(
                    "SELECT what, count(*), sum(bytes) FROM entries GROUP BY what ORDER BY what"
                ).fetchall()
        return []

    def clear(self) -> int:
        """Delete the file; return how many bytes that frees."""
        self.close()
        freed = 0
        for path in (self.path, self.path.with_name(NAME + "-journal")):
            if path.exists():
                freed += path.stat().st_size
                path.unlink()
        return freed

    def close(self) -> None:
        """Bring the file under its limit, and close it."""
        with self._lock:
            if self._connection is not None:
                self._trim()
                self._connection.close()
                self._connection = None

    def size(self) -> int:
        """Return the bytes of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def _trim(self) -> None:
        if self.size() <= self.limit:
            return
        with self._guarded() as database:
            if database is None:
                return
            kept, last = 0, None
            for used, number, bytes_ in database.execute(
                "SELECT used, id, bytes FROM entries ORDER BY used DESC, id DESC"
            ):
                kept += bytes_ + 256
                if kept > 0.8 * self.limit:
                    last = used, number
                    break
            if last is not None:
                old = "SELECT id FROM entries WHERE (used, id) <= (?, ?)"
                database.execute(f"DELETE FROM arrays WHERE id IN ({old})", last)
                database.execute(f"DELETE FROM entries WHERE id IN ({old})", last)
            database.commit()
            database.executescript("PRAGMA incremental_vacuum")  # which `execute` takes but one step of

    @contextlib.contextmanager
    def _guarded(self, write: bool = False) -> Iterator[sqlite3.Connection | None]:
        """Give the database, or None if there is none; what goes wrong inside ends there, and is healed or told."""
        with self._lock:
            database = None
            try:
                database = self._open(write)
            except (sqlite3.Error, OSError) as error:
                self._failed(error)
            try:
                yield database
            except (sqlite3.Error, OSError) as error:
                self._failed(error)

    def _open(self, write: bool) -> sqlite3.Connection | None:
        if write and (self._read_only or not self.limit):
            return None
        if self._connection is None and not self.trouble and (write or self.path.exists()):
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=WAIT, check_same_thread=False)
            self._connection.executescript(OPEN + TABLES)
        return self._connection

    def _failed(self, error: Exception) -> None:
        """Make a malformed file anew, once; give up a cache that cannot be used for another reason."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.rollback()
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return
        if "readonly" in str(error) and self._connection is not None:
            self._read_only = True
            return
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if type(error) is sqlite3.DatabaseError and not self._healed:
            self._healed = True
            with contextlib.suppress(OSError):
                self.clear()
            return
        self.trouble = f"{self.path}: {error}"


def _checksum(key: bytes, dtype: str, shape: str, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key + f"{dtype} {shape}".encode()))


def _parts(keys: Sequence[object]) -> Iterator[list[object]]:
    """Cut keys into as many as SQLite takes in one statement."""
    return (list(keys[k : k + 500]) for k in range(0, len(keys), 500))


def _marks(keys: Sequence[object]) -> str:
    return ", ".join("?" * len(keys))
