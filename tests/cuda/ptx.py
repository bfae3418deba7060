"""Run the PTX that nvcc emitted, on NumPy: exact results, findings of what a GPU would not report, counters of traffic.

    module = ptx.parse(text)
    report = ptx.launch(module, name, grid, block, parameters, segments)

Threads are columns of arrays: an instruction runs for all threads of a group of blocks that stand at it. Two schedules,
both of which the PTX ISA allows: "lockstep", the lowest instruction first; "adversarial", blocks in random order, and one
random warp at a time until it can go no further, now its hindmost threads first, now its foremost. The interpreter executes
what nvcc emits for this project's kernels and raises :class:`PtxError` at any other instruction, by name, before it runs.

What lives here: launches, scheduling, synchronisation. What lives elsewhere: syntax (``ptx_parse.py``), instructions
(``ptx_decode.py``), arithmetic (``ptx_arithmetic.py``), memory and its counters (``ptx_memory.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tests.cuda.ptx_arithmetic import Array
from tests.cuda.ptx_decode import Lanes, decode
from tests.cuda.ptx_memory import WARP, Access, Clocks, Global, Segment, Shared
from tests.cuda.ptx_parse import Kernel, Module, PtxError, parse

__all__ = ["Access", "Counters", "Finding", "Module", "PtxError", "Report", "Segment", "launch", "parse"]

_GROUP = 4096  # threads that run together; more cost memory, fewer cost calls of NumPy
_BITS = np.uint64(1) << np.arange(WARP, dtype=np.uint64)
_READY, _AT_BARRIER, _AT_WARP_SYNC, _ENDED = range(4)


@dataclass
class Finding:
    """Something that a kernel must not do, where it was first seen; `kind` is one of :func:`launch`'s list."""

    kind: str
    message: str
    kernel: str
    instruction: str
    line: int
    count: int = 1

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.kind}: {self.message}, at `{self.instruction}` (line {self.line}, {self.count}x) of {self.kernel}"
        )


@dataclass
class Counters:
    """What a launch executed and moved; `accesses` has one entry for each memory instruction that ran."""

    instructions: Counter[str]  # executions by a warp, by opcode
    accesses: list[Access]
    distinct_loaded: int  # sectors of 32 bytes of global memory: what must come from DRAM at least
    distinct_stored: int

    def sectors(self, store: bool) -> int:
        """Count the sectors that all requests to global memory move: what goes over L1's wires."""
        return sum(a.transactions for a in self.accesses if a.space == "global" and a.store == store)


@dataclass
class Report:
    """The outcome of a launch: clean if there are no findings."""

    findings: list[Finding]
    counters: Counters


def launch(
    module: Module,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    parameters: bytes,
    segments: Sequence[Segment],
    schedule: Literal["lockstep", "adversarial"] = "lockstep",
    seed: int = 0,
    most_steps: int = 10**7,
) -> Report:
    """Run one kernel over a grid.

    Parameters
    ----------
    module : Module
        From :func:`parse`.
    name : str
        Of the kernel, as the PTX spells it.
    grid, block : tuple of int
        One to three extents each.
    parameters : bytes
        The kernel's parameters one after the other, aligned, with the addresses of the segments.
    segments : sequence of Segment
        All the global memory there is. What the launch writes is written to them.
    schedule : {"lockstep", "adversarial"}
    seed : int
        Of the adversarial schedule.
    most_steps : int
        Instructions, each run for however many threads stand at it, after which a launch is given up as endless.

    Returns
    -------
    Report
        Findings are of these kinds: "out of bounds", "misaligned", "uninitialised", "read-only", "nc" (a non-coherent
        load of what the launch writes), "race" (within a block), "block race", "sync mask", "barrier",
        "division by zero", "endless", "launch bounds" (a block larger than the kernel was compiled for: nothing runs).

    Raises
    ------
    PtxError
        For an instruction that the interpreter does not know, and parameters of the wrong size.

    Examples
    --------
    >>> text = '''.visible .entry k(.param .u64 to) {
    ...   .reg .b32 %r<1>; .reg .b64 %rd<3>;
    ...   mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [to]; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1;
    ...   st.global.u32 [%rd2], %r0; ret;
    ... }'''
    >>> x = np.zeros(33, np.uint32)
    >>> report = launch(parse(text), "k", (1,), (34,), x.ctypes.data.to_bytes(8, "little"), [Segment.of(x, writable=True)])
    >>> x[-1].item(), [finding.kind for finding in report.findings]
    (32, ['out of bounds'])
    """
    if schedule not in ("lockstep", "adversarial"):
        raise ValueError(f"schedule is 'lockstep' or 'adversarial', got {schedule!r}")
    kernel = module.kernel(name)
    if len(parameters) != kernel.parameters.size:
        raise PtxError(f"{name} takes {kernel.parameters.size} bytes of parameters, got {len(parameters)}")
    random = np.random.default_rng(seed) if schedule == "adversarial" else None
    run = Launch(kernel, _three(grid), _three(block), parameters, segments, random, most_steps)
    if kernel.most_threads is not None and run.threads > kernel.most_threads:
        run.report(0, "launch bounds", f"a block of {run.threads} threads, of a kernel for {kernel.most_threads}")
    else:
        with np.errstate(all="ignore"):
            run.run()
    run.memory.write_back()
    instructions: Counter[str] = Counter()
    for instruction, times in zip(kernel.code, run.executed, strict=True):
        instructions[".".join(instruction.opcode)] += int(times)
    accesses = [run.accesses[pc] for pc in sorted(run.accesses)]
    distinct = run.memory.distinct_sectors(False), run.memory.distinct_sectors(True)
    return Report(list(run.findings.values()), Counters(+instructions, accesses, *distinct))


def _three(extents: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*extents, 1, 1)[:3]
    return x, y, z


class Launch:
    """What all groups of blocks of a launch share: memory, clocks, findings, counters, the decoded kernel."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        segments: Sequence[Segment],
        random: np.random.Generator | None,
        most_steps: int,
    ) -> None:
        self.kernel, self.grid, self.block = kernel, grid, block
        self.random = random  # the adversarial schedule's; None: lockstep
        self.threads = int(np.prod(block))
        self.columns = -(-self.threads // WARP) * WARP  # per block
        self.clocks = Clocks(self.columns, int(np.prod(grid)))
        self.memory = Global(segments, self.clocks)
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.findings: dict[tuple[str, int], Finding] = {}
        self.accesses: dict[int, Access] = {}
        self.executed = np.zeros(len(kernel.code), np.int64)
        self.steps, self.most_steps = 0, most_steps
        if not kernel.compiled:
            kernel.compiled = [decode(kernel, pc, instruction) for pc, instruction in enumerate(kernel.code)]
        self.code = kernel.compiled

    def run(self) -> None:
        order = np.arange(self.clocks.blocks)
        if self.random:
            self.random.shuffle(order)
        per_group = max(1, _GROUP // self.columns)
        for first in range(0, order.size, per_group):
            if not Group(self, order[first : first + per_group]).run():
                return

    def report(self, pc: int, kind: str, message: str) -> None:
        if (kind, pc) in self.findings:
            self.findings[kind, pc].count += 1
        else:
            at = self.kernel.code[pc]
            self.findings[kind, pc] = Finding(kind, message, self.kernel.name, at.text, at.line)


class Group:
    """Some blocks that are resident together: registers, shared and local memory, and where each thread stands."""

    def __init__(self, owner: Launch, blocks: Array) -> None:
        self.launch, self.blocks = owner, blocks
        columns, n = owner.columns, owner.columns * blocks.size
        index = np.tile(np.arange(columns), blocks.size)
        self.block_of = np.repeat(np.arange(blocks.size), columns)
        self.thread = np.repeat(blocks, columns) * columns + index  # counted through the launch
        self.state = np.where(index < owner.threads, _READY, _ENDED)
        self.exists = index < owner.threads
        self.pc = np.zeros(n, np.int64)
        self.masks = np.zeros(n, np.uint64)  # with which a thread waits for others of its warp
        self.barriers = np.zeros(n, np.int64)  # that each thread has passed
        kernel = owner.kernel
        self.shared = Shared(kernel.shared.size, blocks, owner.clocks)
        self.local = np.zeros((n, kernel.local.size), np.uint8)
        # Registers nothing has written read as NaN and as absurd addresses.
        self.registers = {
            name: np.full(n, ~np.uint64(0)).astype(bool if size == 1 else f"u{size}")
            for name, size in kernel.registers.items()
        }
        self.special = {"%laneid": index % WARP}
        for axis, extent, count in zip("xyz", owner.block, owner.grid, strict=True):
            self.special |= {f"%ntid.{axis}": np.full(n, extent), f"%nctaid.{axis}": np.full(n, count)}
        place = np.repeat(blocks, columns)
        for axis, extent, count in zip("xyz", owner.block, owner.grid, strict=True):
            self.special |= {f"%tid.{axis}": index % extent, f"%ctaid.{axis}": place % count}
            index, place = index // extent, place // count
        self.special = {name: values.astype(np.uint32) for name, values in self.special.items()}

    # ---- scheduling --------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Run all threads to their end; return False where they cannot reach it."""
        warp, foremost = -1, False
        while (ready := np.flatnonzero(self.state == _READY)).size:
            if random := self.launch.random:
                warps = np.unique(ready // WARP)
                if warp not in warps:
                    warp, foremost = random.choice(warps), random.random() < 0.5
                ready = ready[ready // WARP == warp]
            standing = self.pc[ready]
            pc = standing.max() if foremost else standing.min()
            at, ahead = ready[standing == pc], standing[standing > pc]
            self._straight(int(pc), at, int(ahead.min(initial=len(self.launch.code))))
            if self.launch.steps > self.launch.most_steps:
                self.launch.report(int(pc), "endless", f"more than {self.launch.most_steps} steps")
                return False
        stuck = self.pc[self.state == _AT_WARP_SYNC]  # others may wait for these at a barrier
        for pc, count in zip(*np.unique(stuck, return_counts=True), strict=True):
            self.launch.report(int(pc), "sync mask", f"{count} threads wait for others, which never come")
        return not stuck.size

    def _straight(self, pc: int, at: Array, limit: int) -> None:
        """Run the threads `at` from pc on, up to where others stand, or a branch or a synchronisation."""
        owner = self.launch
        lanes: Lanes = slice(None) if at.size == self.pc.size else at
        warps = np.unique(at // WARP).size
        while pc < limit:
            control, run = owner.code[pc]
            owner.executed[pc] += warps
            owner.steps += 1
            if control:
                self.pc[at] = pc
                control(self, at)
                return
            run(self, lanes)
            pc += 1
        self.pc[at] = pc
        if pc == len(owner.code):
            self.end(at)

    def end(self, at: Array) -> None:
        """Let threads exit, and the rest of their blocks pass the barrier at which they may be waiting."""
        self.state[at] = _ENDED
        self.release(np.unique(self.block_of[at]))
        for block in np.unique(self.block_of[at]):
            mine = (self.block_of == block) & self.exists
            passed = self.barriers[mine]
            if (self.state[mine] == _ENDED).all() and passed.min() != passed.max():
                counts = f"{passed.min()} to {passed.max()}"
                self.launch.report(int(self.pc[at[0]]), "barrier", f"the threads of a block passed {counts} barriers")

    def release(self, blocks: Array) -> None:
        """Let those blocks pass their barrier whose threads all stand at one; those that have exited do not count."""
        for block in blocks:
            mine = np.flatnonzero((self.block_of == block) & (self.state != _ENDED))
            if not mine.size or (self.state[mine] != _AT_BARRIER).any():
                continue
            where = np.unique(self.pc[mine])
            if where.size > 1:
                texts = " and ".join(f"line {self.launch.kernel.code[pc].line}" for pc in where)
                self.launch.report(
                    int(where[0]), "barrier", f"threads of one block wait at different barriers, {texts}"
                )
            self.state[mine] = _READY
            self.pc[mine] += 1
            self.barriers[mine] += 1
            self.launch.clocks.block_epoch[self.blocks[block]] += 1

    def wait_at_barrier(self, at: Array) -> None:
        """Make threads wait for the rest of their blocks."""
        self.state[at] = _AT_BARRIER
        self.release(np.unique(self.block_of[at]))

    def together(self, at: Array, masks: Array) -> Array:
        """Make threads at a synchronisation of their warp wait for those that it names; return those that may go on."""
        pc = int(self.pc[at[0]])
        self.masks[at] = masks
        self.state[at] = _AT_WARP_SYNC
        rows = np.unique(at // WARP)

        def by_warp(which: Array) -> Array:
            return which.reshape(-1, WARP)[rows]

        def word(which: Array) -> Array:
            return np.where(by_warp(which), _BITS, np.uint64(0)).sum(axis=1)

        standing = (self.state == _AT_WARP_SYNC) & (self.pc == pc)
        here, alive = word(standing), word(self.state != _ENDED)
        named = np.where(by_warp(standing), by_warp(self.masks), np.uint64(0)).max(axis=1)
        if (by_warp(standing) & (by_warp(self.masks) != named[:, None])).any():
            self.launch.report(pc, "sync mask", "threads of one warp name different masks")
        for wrong, what in ((here & ~named, "does not name all that execute it"), (named & ~alive, "names the exited")):
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                self.launch.report(pc, "sync mask", f"mask {int(named[row]):#x} {what}: {int(wrong[row]):#x}")
        complete = rows[named & alive & ~here == 0]
        go = np.flatnonzero(standing)
        go = go[np.isin(go // WARP, complete)]
        self.state[go] = _READY
        return go
