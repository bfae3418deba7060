"""The memory that a launch sees: bytes at real addresses, who touched each of them and when, and what each access cost.

What lives here: bounds, initialisation, write permission, races, and the counters of traffic. What lives elsewhere: which
instruction accesses what (``ptx.py``).

Two accesses of one byte, one of them a write, are ordered if one thread made both, if a block barrier lies between them or,
within a warp, a ``bar.warp.sync``; shuffles order nothing (PTX ISA 9.0, shfl.sync). Blocks are never ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.cuda.ptx_arithmetic import Array

WARP = 32
SECTOR = 32  # bytes: the unit of traffic between L2 and the multiprocessors, and of DRAM
BANKS = 32  # of shared memory, four bytes wide
_NONE, _MANY = -1, -2

Report = Callable[[str, str], None]  # kind, message


@dataclass
class Segment:
    """Consecutive bytes of global memory at an address; `data` and `initialised` are updated in place by launches.

    Parameters
    ----------
    address : int
        Of the first byte. Give the alignment that a GPU allocation would have (256 bytes) where sectors are to be counted.
    data : ndarray of uint8, (size,)
    writable : bool
    initialised : bool or ndarray of bool, (size,)
        Bytes that a kernel may read before it has written them.
    name : str
        What findings call it.

    Examples
    --------
    >>> x = np.arange(4, dtype=np.float32)
    >>> Segment.of(x).data.size
    16
    """

    address: int
    data: Array
    writable: bool = False
    initialised: bool | Array = True
    name: str = ""

    def __post_init__(self) -> None:
        """Check the bytes and give every one its flag."""
        if self.data.dtype != np.uint8 or self.data.ndim != 1:
            raise ValueError(f"a segment's data is one row of uint8, got {self.data.dtype} of shape {self.data.shape}")
        self.initialised = np.array(np.broadcast_to(self.initialised, self.data.shape))

    @classmethod
    def of(cls, array: Array, writable: bool = False, initialised: bool = True, name: str = "") -> Segment:
        """Return the memory of a C-contiguous array, shared with it, at its own address."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if not np.shares_memory(data, array) and array.size:
            raise ValueError("a segment shares the memory of a C-contiguous array; this one is not")
        return cls(array.ctypes.data, data, writable, initialised, name)


@dataclass
class Access:
    """What one memory instruction did, summed over its requests; a request is one execution by one warp.

    ``transactions`` are sectors of 32 bytes for global memory, wavefronts for shared memory: passes over the 32 banks, of
    which a full warp takes one for accesses of up to 4 bytes, two for 8 and four for 16 where nothing conflicts.
    """

    instruction: str
    space: str
    store: bool
    requests: int = 0
    transactions: int = 0
    bytes_asked: int = 0
    bytes_unique: int = 0

    def count(self, warps: Array, lanes: Array, address: Array, size: int) -> None:
        """Add the requests of some warps for `size` bytes at an aligned address per lane."""
        warps = warps - warps.min(initial=0)
        keys = np.unique(warps << 48 | address)  # sorted by warp, then by address; a sector lies within one warp's keys
        self.requests += int(np.unique(warps).size)
        self.bytes_asked += address.size * size
        self.bytes_unique += keys.size * size
        if self.space == "global":
            self.transactions += int(np.unique(keys // SECTOR).size)
        else:
            parts = max(1, size // 4)  # 8-byte accesses go by half warps, 16-byte ones by quarters
            part = warps * parts + lanes % WARP // (WARP // parts)
            words = np.unique((part << 32 | address // 4)[:, None] + np.arange(parts))
            rows, row = np.unique(words >> 32, return_inverse=True)
            per_bank = np.bincount(row * BANKS + words % BANKS, minlength=rows.size * BANKS)
            self.transactions += int(per_bank.reshape(-1, BANKS).max(axis=1, initial=0).sum())


@dataclass
class Clocks:
    """How far each block and warp of a launch has come: what orders the accesses of its threads.

    A thread's number counts through the launch, each block filled up to whole warps.
    """

    threads_per_block: int  # whole warps
    blocks: int
    block_epoch: Array = field(init=False)
    warp_epoch: Array = field(init=False)

    def __post_init__(self) -> None:
        """Start at zero."""
        self.block_epoch = np.zeros(self.blocks, np.int64)
        self.warp_epoch = np.zeros(self.blocks * self.threads_per_block // WARP, np.int64)

    def now(self, threads: Array) -> Array:
        """Return each thread's clock: its block's epoch in the upper half, its warp's in the lower."""
        return self.block_epoch[threads // self.threads_per_block] << 32 | self.warp_epoch[threads // WARP]


class Shadow:
    """The last writer and the last readers of each byte; what came before is ordered before them, or was reported.

    Readers that are not ordered among themselves are kept as "several threads" of a warp, "several warps" of a block or
    "several blocks", which is all that a later write needs to know.
    """

    def __init__(self, size: int, clocks: Clocks) -> None:
        self.clocks = clocks
        self.writer, self.reader, self.reader_warp, self.reader_block = np.full((4, size), _NONE, np.int64)
        self.write_clock, self.read_clock = np.zeros((2, size), np.int64)
        self.read_through_nc = np.zeros(size, bool)

    def _ordered(self, before: tuple[Array, ...], clock_before: Array, now: tuple[Array, ...], clock: Array) -> Array:
        """Tell whether the accesses before, by (thread, warp, block), are ordered before those now."""
        thread, warp, block = (a == b for a, b in zip(before, now, strict=True))
        return (
            (before[2] == _NONE) | thread | warp & (clock_before < clock) | block & (clock_before >> 32 < clock >> 32)
        )

    def _who(self, thread: Array) -> tuple[Array, Array, Array]:
        none = thread == _NONE
        per_block = self.clocks.threads_per_block
        return thread, np.where(none, _NONE, thread // WARP), np.where(none, _NONE, thread // per_block)

    def read(self, at: Array, threads: Array) -> tuple[Array, Array]:
        """Record reads of the bytes `at` (n, size) by n threads; return where they race within and between blocks."""
        now, clock = self._who(threads[:, None]), self.clocks.now(threads)[:, None]
        writer = self._who(self.writer[at])
        races = ~self._ordered(writer, self.write_clock[at], now, clock)
        before = self.reader[at], self.reader_warp[at], self.reader_block[at]
        replaced = self._ordered(before, self.read_clock[at], now, clock)
        for readers, old, new in zip((self.reader, self.reader_warp, self.reader_block), before, now, strict=True):
            new = np.broadcast_to(new, at.shape)
            readers[at] = np.where(replaced | (old == new), new, _MANY)
            readers[at[readers[at] != new]] = _MANY  # several threads in this one instruction
        self.read_clock[at] = clock
        return races & (writer[2] == now[2]), races & (writer[2] != now[2])

    def write(self, at: Array, threads: Array) -> tuple[Array, Array]:
        """Record writes, as :meth:`read` does reads."""
        now, clock = self._who(threads[:, None]), self.clocks.now(threads)[:, None]
        writer = self._who(self.writer[at])
        readers = self.reader[at], self.reader_warp[at], self.reader_block[at]
        after_write = ~self._ordered(writer, self.write_clock[at], now, clock)
        after_read = ~self._ordered(readers, self.read_clock[at], now, clock)
        between = after_write & (writer[2] != now[2]) | after_read & (readers[2] != now[2])
        self.writer[at] = threads[:, None]
        self.write_clock[at] = clock
        winner = self.writer[at]  # of several threads in this one instruction
        between |= winner // self.clocks.threads_per_block != now[2]
        return (after_write | after_read | (winner != now[0])) & ~between, between


class Bytes:
    """A stretch of memory that threads share, checked: the base of global and shared memory."""

    space = ""

    def __init__(self, size: int, tracked: int, clocks: Clocks) -> None:
        self.data = np.zeros(size, np.uint8)
        self.initialised = np.zeros(size, bool)
        self.shadow = Shadow(tracked, clocks)
        self.tracked = tracked

    def _checked(self, at: Array, threads: Array, store: bool, nc: bool, report: Report) -> None:
        """Report uninitialised reads and races at the bytes `at` (n, size); those from `tracked` on are never written."""
        if not store and not self.initialised[at].all():
            report("uninitialised", f"read of {self.space} memory that nothing has written")
        inside = at[:, 0] < self.tracked
        if not inside.any():
            return
        at, threads = at[inside], threads[inside]
        shadow = self.shadow
        if nc:
            shadow.read_through_nc[at] = True
        if (shadow.writer[at] != _NONE).any() if nc else store and shadow.read_through_nc[at].any():
            report("nc", "ld.global.nc of memory that the same launch writes")
        within, between = shadow.write(at, threads) if store else shadow.read(at, threads)
        if within.any():
            which = threads[within.any(axis=1)][0] % shadow.clocks.threads_per_block
            report("race", f"{self.space} memory that another thread of the block writes or reads, thread {which}")
        if between.any():
            which = threads[between.any(axis=1)][0] // shadow.clocks.threads_per_block
            report("block race", f"{self.space} memory that another block writes or reads, block {which}")

    def load(self, at: Array, threads: Array, nc: bool, report: Report) -> Array:
        """Return the bytes (n, size) at indices that are known to exist."""
        self._checked(at, threads, False, nc, report)
        return self.data[at]

    def store(self, at: Array, values: Array, threads: Array, report: Report) -> None:
        """Write bytes (n, size)."""
        self._checked(at, threads, True, False, report)
        self.data[at] = values
        self.initialised[at] = True


class Shared(Bytes):
    """The static shared memory of some blocks of a launch; addresses are offsets within a block's."""

    space = "shared"

    def __init__(self, size: int, blocks: Array, clocks: Clocks) -> None:
        super().__init__(size * len(blocks), size * len(blocks), clocks)
        self.size, self.place = size, {int(block): i for i, block in enumerate(blocks)}

    def locate(self, address: Array, size: int, threads: Array, store: bool, report: Report) -> Array:
        """Return the indices of the accesses' first bytes, -1 where an access is out of bounds."""
        outside = (address < 0) | (address + size > self.size)
        if outside.any():
            report(
                "out of bounds", f"{size} bytes at offset {address[outside][0]} of {self.size} bytes of shared memory"
            )
        block = np.array([self.place[b] for b in (threads // self.shadow.clocks.threads_per_block).tolist()], np.int64)
        return np.where(outside, -1, block * self.size + address)


class Global(Bytes):
    """The segments of global memory, the writable ones first, since only these are tracked."""

    space = "global"

    def __init__(self, segments: Sequence[Segment], clocks: Clocks) -> None:
        self.segments = sorted((s for s in segments if s.data.size), key=lambda s: s.address)
        self.start = np.array([s.address for s in self.segments], np.int64)
        self.end = np.array([s.address + s.data.size for s in self.segments], np.int64)
        if (self.start[1:] < self.end[:-1]).any():
            raise ValueError("segments of memory overlap")
        self.writable = np.array([s.writable for s in self.segments], bool)
        self.place = np.zeros(len(self.segments), np.int64)
        size = tracked = 0
        for i in np.argsort(~self.writable, kind="stable"):
            self.place[i] = (
                -(-size // SECTOR) * SECTOR + self.start[i] % SECTOR
            )  # so that indices share sectors as addresses do
            size = int(self.place[i]) + self.segments[i].data.size
            tracked = size if self.writable[i] else tracked
        super().__init__(size, tracked, clocks)
        for i, s in zip(self.place, self.segments, strict=True):
            self.data[i : i + s.data.size] = s.data
            self.initialised[i : i + s.data.size] = s.initialised
        self.touched = np.zeros((2, -(-size // SECTOR)), bool)  # sectors, by loads and by stores

    def locate(self, address: Array, size: int, threads: Array, store: bool, report: Report) -> Array:
        """Return the indices of the accesses' first bytes, -1 where an access may not be."""
        if not self.segments:
            report("out of bounds", "global memory, of which the launch has none")
            return np.full(address.shape, -1)
        which = np.searchsorted(self.start, address, side="right") - 1
        outside = (which < 0) | (address + size > self.end[which])
        if outside.any():
            first = int(address[outside][0])
            near = min(self.segments, key=lambda s: min(abs(first - s.address), abs(first - s.address - s.data.size)))
            where = f"{first - near.address} of the {near.data.size} bytes of {near.name or hex(near.address)}"
            report("out of bounds", f"{size} bytes at {where}, thread {threads[outside][0]} of the launch")
        forbidden = ~outside & ~self.writable[which] & store
        if forbidden.any():
            report(
                "read-only", f"write to {self.segments[which[forbidden][0]].name or 'a segment'}, which is read-only"
            )
        at = np.where(outside | forbidden, -1, address - self.start[which] + self.place[which])
        self.touched[int(store), at[at >= 0] // SECTOR] = True
        return at

    def distinct_sectors(self, store: bool) -> int:
        """Count the sectors that loads or stores have touched: what must come from DRAM or go there at least."""
        touched = [
            s.address // SECTOR
            + np.flatnonzero(self.touched[int(store), i // SECTOR : -(-(i + s.data.size) // SECTOR)])
            for i, s in zip(self.place, self.segments, strict=True)
        ]
        return int(np.unique(np.concatenate(touched)).size) if touched else 0

    def write_back(self) -> None:
        """Hand what the launch has written to the segments."""
        for i, s in zip(self.place, self.segments, strict=True):
            s.data[:] = self.data[i : i + s.data.size]
            s.initialised = self.initialised[i : i + s.data.size].copy()
