"""An instruction becomes a function of a group of threads and of those among them that execute it.

What lives here: operands, and each opcode's meaning. What lives elsewhere: which threads run when (``ptx.py``), functions
of numbers (``ptx_arithmetic.py``), the checks of memory (``ptx_memory.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tests.cuda.ptx_arithmetic import (
    NUMPY,
    OPERATIONS,
    Array,
    as_float64,
    compare,
    convert,
    pack_float,
    rounded,
)
from tests.cuda.ptx_memory import WARP, Access
from tests.cuda.ptx_parse import BYTES, Instruction, Kernel, Operand, PtxError

if TYPE_CHECKING:
    from tests.cuda.ptx import Group

Lanes = slice | Array  # of a group: all, or these
Read = Callable[["Group", Lanes], Array]
Write = Callable[["Group", Lanes, Array], None]
Run = Callable[["Group", Lanes], None]
Control = Callable[["Group", Array], None]

_CACHE_HINTS = {"ca", "cg", "cs", "lu", "wb", "wt"}


# ---- operands --------------------------------------------------------------------------------------------------------


def _read(kernel: Kernel, operand: Operand, kind: str) -> Read:
    """Compile the reading of an operand as a type: an array of that type, of one element for what all threads share."""
    dtype = NUMPY[kind]
    name = operand.name
    if operand.kind == "register":
        if kind == "pred":
            if operand.negated:
                return lambda g, lanes: ~g.registers[name][lanes]
            return lambda g, lanes: g.registers[name][lanes]
        if kernel.registers[name] == dtype.itemsize:
            return lambda g, lanes: g.registers[name][lanes].view(dtype)
        narrow = f"u{dtype.itemsize}"
        return lambda g, lanes: g.registers[name][lanes].astype(narrow).view(dtype)
    if operand.kind == "special":
        return lambda g, lanes: g.special[name][lanes].astype(dtype)
    if operand.kind == "immediate":
        value = operand.value & (1 << 8 * dtype.itemsize) - 1
        constant = np.array([value], f"u{dtype.itemsize}").view(dtype) if kind != "pred" else np.array([value != 0])
        if operand.float_bits and operand.float_bits != 8 * dtype.itemsize:
            raise PtxError(f"a {operand.float_bits}-bit constant as .{kind}")
        return lambda g, lanes: constant
    for space in (kernel.parameters, kernel.shared, kernel.local):
        if operand.kind == "symbol" and name in space.variables:
            offset = np.array([space.variables[name].offset]).astype(dtype)
            return lambda g, lanes: offset
    raise PtxError(f"{operand.kind} {name} as .{kind}")


def _write(kernel: Kernel, operand: Operand, kind: str) -> Write:
    """Compile the writing of a register: wider ones are extended, by the sign where the type has one."""
    if operand.kind == "sink":
        return lambda g, lanes, value: None
    if operand.kind != "register":
        raise PtxError(f"{operand.kind} as a destination")
    name, dtype = operand.name, NUMPY[kind]
    size = kernel.registers[name]
    if kind == "pred":
        return lambda g, lanes, value: g.registers[name].__setitem__(lanes, value)
    if size == dtype.itemsize:
        raw = np.dtype(f"u{size}")
        return lambda g, lanes, value: g.registers[name].__setitem__(lanes, np.asarray(value, dtype).view(raw))
    wide = f"{'i' if dtype.kind == 'i' else 'u'}{size}"
    bits = dtype if dtype.kind in "iu" else np.dtype(f"u{dtype.itemsize}")
    return lambda g, lanes, value: g.registers[name].__setitem__(
        lanes, np.asarray(value, dtype).view(bits).astype(wide).view(f"u{size}")
    )


# ---- instructions ----------------------------------------------------------------------------------------------------


def decode(kernel: Kernel, pc: int, instruction: Instruction) -> tuple[Control | None, Run]:
    """Compile an instruction; what moves threads about is a control, the rest runs and goes on to the next."""
    try:
        guard = _read(kernel, instruction.guard, "pred") if instruction.guard else None
        if control := _control(kernel, pc, instruction, guard):
            return control, lambda g, lanes: None
        run = _plain(kernel, pc, instruction)
    except (PtxError, KeyError, IndexError, ValueError) as error:
        raise PtxError(
            f"not supported: {instruction.text} (line {instruction.line} of {kernel.name}): {error}"
        ) from error
    if guard is None:
        return None, run

    def guarded(g: Group, lanes: Lanes) -> None:
        chosen = np.arange(g.pc.size)[lanes][guard(g, lanes)]
        if chosen.size:
            run(g, chosen)

    return None, guarded


def _control(kernel: Kernel, pc: int, instruction: Instruction, guard: Read | None) -> Control | None:
    opcode, operands = instruction.opcode, instruction.operands

    def split(g: Group, at: Array) -> Array:
        """Send those threads on for which the guard does not hold; return the others."""
        if guard is None:
            return at
        holds = guard(g, at)
        g.pc[at[~holds]] = pc + 1
        return at[holds]

    if opcode in (("bra",), ("bra", "uni")):
        target = kernel.labels[operands[0].name]

        def branch(g: Group, at: Array) -> None:
            g.pc[split(g, at)] = target

        return branch
    if opcode[:2] == ("brx", "idx"):
        table = np.array([kernel.labels[label] for label in kernel.targets[operands[1].name]])
        index = _read(kernel, operands[0], "u32")

        def branch_by_index(g: Group, at: Array) -> None:
            at = split(g, at)
            g.pc[at] = table[index(g, at)]

        return branch_by_index
    if opcode in (("ret",), ("exit",)):

        def leave(g: Group, at: Array) -> None:
            at = split(g, at)
            if at.size:
                g.end(at)

        return leave
    if opcode in (("bar", "sync"), ("barrier", "sync"), ("barrier", "sync", "aligned")) and len(operands) == 1:

        def barrier(g: Group, at: Array) -> None:
            at = split(g, at)
            g.wait_at_barrier(at)

        return barrier
    if opcode == ("bar", "warp", "sync"):
        mask = _read(kernel, operands[0], "u32")

        def warp_barrier(g: Group, at: Array) -> None:
            at = split(g, at)
            masks = mask(g, at)
            if at.size and (masks != 0xFFFFFFFF).any():
                raise PtxError(f"bar.warp.sync of a part of a warp (line {instruction.line} of {kernel.name})")
            go = g.together(at, masks) if at.size else at
            g.pc[go] = pc + 1
            g.launch.clocks.warp_epoch[np.unique(g.thread[go] // WARP)] += 1

        return warp_barrier
    if opcode[:2] == ("shfl", "sync") and opcode[2] in ("bfly", "idx", "up", "down") and opcode[3:] == ("b32",):
        return _shuffle(kernel, pc, instruction, split)
    if opcode == ("vote", "sync", "ballot", "b32"):
        return _ballot(kernel, pc, instruction, split)
    return None


def _shuffle(kernel: Kernel, pc: int, instruction: Instruction, split: Callable[[Group, Array], Array]) -> Control:
    mode = instruction.opcode[2]
    target, value, lane, clamp, mask = instruction.operands
    targets = target.parts or (target,)
    writes = [_write(kernel, part, kind) for part, kind in zip(targets, ("b32", "pred"), strict=False)]
    reads = [_read(kernel, operand, "b32") for operand in (value, lane, clamp, mask)]

    def shuffle(g: Group, at: Array) -> None:
        at = split(g, at)
        at = g.together(at, reads[3](g, at)) if at.size else at
        if not at.size:
            return
        values, by, bounds = (np.broadcast_to(read(g, at), at.shape).astype(np.int64) for read in reads[:3])
        own, segment, inner = at % WARP, bounds >> 8 & 31, bounds & 31
        last, first = own & segment | inner & ~segment, own & segment
        source = {"up": own - by, "down": own + by, "bfly": own ^ by, "idx": first | by & ~segment & 31}[mode]
        inside = source >= last if mode == "up" else source <= last
        source = at - own + np.where(inside, source, own)
        if not np.isin(source, at).all():
            g.launch.report(pc, "sync mask", "reads the register of a thread that does not take part")
        everyone = np.full(g.pc.size, 0xFFFFFFFF)
        everyone[at] = values
        for write, result in zip(writes, (everyone[source].astype(np.uint32), inside), strict=False):
            write(g, at, result)
        g.pc[at] = pc + 1

    return shuffle


def _ballot(kernel: Kernel, pc: int, instruction: Instruction, split: Callable[[Group, Array], Array]) -> Control:
    target, vote, mask = instruction.operands
    write, read, masks = _write(kernel, target, "b32"), _read(kernel, vote, "pred"), _read(kernel, mask, "b32")

    def ballot(g: Group, at: Array) -> None:
        at = split(g, at)
        at = g.together(at, masks(g, at)) if at.size else at
        if not at.size:
            return
        votes = np.zeros(g.pc.size, np.uint64)
        votes[at] = np.where(np.broadcast_to(read(g, at), at.shape), np.uint64(1) << (at % WARP).astype(np.uint64), 0)
        words = votes.reshape(-1, WARP).sum(axis=1, dtype=np.uint64)
        write(g, at, words[at // WARP].astype(np.uint32))
        g.pc[at] = pc + 1

    return ballot


def _plain(kernel: Kernel, pc: int, instruction: Instruction) -> Run:
    opcode, operands = instruction.opcode, instruction.operands
    name, kind = opcode[0], opcode[-1]
    if name in ("ld", "st"):
        return _memory(kernel, pc, instruction)
    if name == "mov":
        return _move(kernel, operands, kind)
    if opcode == ("cvta", "to", "global", "u64"):
        return _move(kernel, operands, "u64")  # generic addresses of global memory are the global ones
    if name == "cvt":
        return _conversion(kernel, opcode, operands)
    if name == "setp":
        return _comparison(kernel, opcode, operands)
    if name == "selp":
        write, condition = _write(kernel, operands[0], kind), _read(kernel, operands[3], "pred")
        yes, no = _read(kernel, operands[1], kind), _read(kernel, operands[2], kind)
        return lambda g, lanes: write(g, lanes, np.where(condition(g, lanes), yes(g, lanes), no(g, lanes)))
    modified = ".".join(opcode[:-1])
    group = "f" if kind in ("f32", "f64") else "i" if kind[0] in "us" else "b"
    operation = OPERATIONS[modified, group]
    kinds = [kind] * (len(operands) - 1)
    result = kind
    if opcode[1] == "wide":
        result = f"{kind[0]}{16 * BYTES[kind]}"
        kinds[2:] = [result] * len(kinds[2:])
    if name in ("shl", "shr", "bfi"):
        kinds[2 if name == "bfi" else 1 :] = ["u32"] * (2 if name == "bfi" else 1)
    write = _write(kernel, operands[0], result)
    reads = [_read(kernel, operand, one) for operand, one in zip(operands[1:], kinds, strict=True)]

    def run(g: Group, lanes: Lanes) -> None:
        arguments = [read(g, lanes) for read in reads]
        if group == "i" and name in ("div", "rem") and (arguments[1] == 0).any():
            g.launch.report(pc, "division by zero", "an integer divisor is 0")
        write(g, lanes, operation(*arguments))

    return run


def _move(kernel: Kernel, operands: tuple[Operand, ...], kind: str) -> Run:
    to, source = operands
    if to.kind == "vector":  # one register into several, the lowest bits first
        part = f"u{BYTES[kind] * 8 // len(to.parts)}"
        writes, read = [_write(kernel, one, part) for one in to.parts], _read(kernel, source, f"u{8 * BYTES[kind]}")

        def unpack(g: Group, lanes: Lanes) -> None:
            bits = read(g, lanes)
            for i, write in enumerate(writes):
                write(g, lanes, (bits >> bits.dtype.type(i * 8 * BYTES[part])).astype(NUMPY[part]))

        return unpack
    if source.kind == "vector":
        part = f"u{BYTES[kind] * 8 // len(source.parts)}"
        reads, whole = [_read(kernel, one, part) for one in source.parts], np.dtype(f"u{BYTES[kind]}")
        write = _write(kernel, to, whole.name.replace("uint", "u"))

        def pack(g: Group, lanes: Lanes) -> None:
            bits = np.zeros(1, whole)
            for i, read in enumerate(reads):
                bits = bits | read(g, lanes).astype(whole) << whole.type(i * 8 * BYTES[part])
            write(g, lanes, bits)

        return pack
    write, read = _write(kernel, to, kind), _read(kernel, source, kind)
    return lambda g, lanes: write(g, lanes, read(g, lanes))


def _conversion(kernel: Kernel, opcode: tuple[str, ...], operands: tuple[Operand, ...]) -> Run:
    to, source, modes = opcode[-2], opcode[-1], opcode[1:-2]
    mode = modes[0] if modes else ""
    floats = ("f16", "bf16", "f32", "f64")
    integral = {"rni", "rzi", "rmi", "rpi"}
    plain = {"rn", "rz", "rm", "rp"}
    if to in ("f16x2", "bf16x2"):
        allowed = {"rn", "rz"}
    elif source in floats:
        allowed = integral | (plain if BYTES[to] < BYTES[source] else {""}) if to in floats else integral
    else:
        allowed = {"rn"} if to in floats else {""}
    if len(modes) > 1 or mode not in allowed:
        raise PtxError(f"a rounding among {sorted(allowed)} is known")
    if to in ("f16x2", "bf16x2"):  # the first source goes to the upper half
        write = _write(kernel, operands[0], to)
        high, low = (_read(kernel, operand, source) for operand in operands[1:])

        def two(g: Group, lanes: Lanes) -> None:
            halves = [
                pack_float(rounded(as_float64(read(g, lanes), source), to[:-2], mode[1]), to[:-2]).view(np.uint16)
                for read in (high, low)
            ]
            write(g, lanes, halves[0].astype(np.uint32) << np.uint32(16) | halves[1])

        return two
    write, read = _write(kernel, operands[0], to), _read(kernel, operands[1], source)
    return lambda g, lanes: write(g, lanes, convert(read(g, lanes), source, to, mode))


def _comparison(kernel: Kernel, opcode: tuple[str, ...], operands: tuple[Operand, ...]) -> Run:
    kind, name, combine = opcode[-1], opcode[1], opcode[2:-1]
    targets = operands[0].parts or operands[:1]
    writes = [_write(kernel, target, "pred") for target in targets]
    left, right = (_read(kernel, operand, kind) for operand in operands[1:3])
    other = _read(kernel, operands[3], "pred") if combine else None
    join = OPERATIONS[combine[0], "b"] if combine else None
    if kind in ("f16", "bf16") or len(combine) > 1:
        raise PtxError("no such comparison")

    def run(g: Group, lanes: Lanes) -> None:
        holds = compare(name, left(g, lanes), right(g, lanes))
        for write, value in zip(writes, (holds, ~holds), strict=False):
            write(g, lanes, join(value, other(g, lanes)) if join and other else value)

    return run


def _memory(kernel: Kernel, pc: int, instruction: Instruction) -> Run:
    opcode = instruction.opcode
    store, space, kind = opcode[0] == "st", opcode[1], opcode[-1]
    modifiers = set(opcode[2:-1])
    count = next((int(m[1:]) for m in modifiers if m in ("v2", "v4", "v8")), 1)
    nc = "nc" in modifiers
    hints = {m for m in modifiers if m.startswith(("L1::", "L2::"))} | _CACHE_HINTS
    if space not in ("global", "shared", "local", "param") or modifiers - hints - {f"v{count}", "nc"}:
        raise PtxError("no such access")
    if (store and space == "param") or (nc and (store or space != "global")):
        raise PtxError("no such access")
    address, value = instruction.operands if store else reversed(instruction.operands)
    base = address.parts[0]
    base_kind = f"u{8 * kernel.registers[base.name]}" if base.kind == "register" else "u64"
    read_base = _read(kernel, base, base_kind)
    values = value.parts or (value,)
    if len(values) != count:
        raise PtxError(f"{len(values)} registers for a vector of {count}")
    reads = [_read(kernel, one, kind) for one in values] if store else []
    writes = [] if store else [_write(kernel, one, kind) for one in values]
    dtype = NUMPY["u8"] if kind == "pred" else NUMPY[kind]
    size = dtype.itemsize * count
    span = np.arange(size)

    def run(g: Group, lanes: Lanes) -> None:
        report = partial(g.launch.report, pc)
        threads = g.thread[lanes]
        at = np.broadcast_to(read_base(g, lanes).astype(np.int64) + address.value, threads.shape)
        aligned = at % size == 0
        if not aligned.all():
            report("misaligned", f"{size} bytes at {int(at[~aligned][0]):#x}")
        memory = g.launch.memory if space == "global" else g.shared if space == "shared" else None
        if memory:
            place = np.where(aligned, memory.locate(at, size, threads, store, report), -1)
        else:
            extent = g.local.shape[1] if space == "local" else g.launch.parameters.size
            inside = (at >= 0) & (at + size <= extent)
            if not inside.all():
                report("out of bounds", f"{size} bytes at offset {at[~inside][0]} of {extent} bytes of {space} memory")
            place = np.where(aligned & inside, at, -1)
        good = place >= 0
        place, threads = place[good][:, None] + span, threads[good]
        if memory:
            access = g.launch.accesses.setdefault(pc, Access(instruction.text, space, store))
            access.count(threads // WARP, threads, at[good], size)
        if store:
            columns = [np.broadcast_to(read(g, lanes), good.shape)[good] for read in reads]
            data = np.ascontiguousarray(np.stack(columns, axis=1)).view(np.uint8)
            if memory:
                memory.store(place, data, threads, report)
            else:
                g.local[np.arange(g.pc.size)[lanes][good][:, None], place] = data
            return
        result = np.full((good.size, size), 0xFF, np.uint8)  # what a bad access returns: NaN, an absurd address
        if memory:
            result[good] = memory.load(place, threads, nc, report)
        elif space == "local":
            result[good] = g.local[np.arange(g.pc.size)[lanes][good][:, None], place]
        else:
            result[good] = g.launch.parameters[place]
        for write, column in zip(writes, result.view(dtype).T, strict=True):
            write(g, lanes, np.ascontiguousarray(column))

    return run
