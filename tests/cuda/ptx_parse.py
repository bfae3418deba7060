"""PTX text becomes kernels: registers, shared and local variables, labels, and a list of instructions.

What lives here: syntax, and only what nvcc emits for kernels without calls, dynamic shared memory, module-scope variables
and textures; anything else is a :class:`PtxError` that names it. What lives elsewhere: arithmetic (``ptx_arithmetic.py``),
memory (``ptx_memory.py``), execution (``ptx.py``).
"""

from __future__ import annotations

import math
import re
from collections import ChainMap
from dataclasses import dataclass, field
from typing import Any, Literal

BYTES = {"pred": 1} | {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
BYTES |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8}


class PtxError(Exception):
    """The text uses something that the interpreter does not know, or a launch does not fit its kernel."""


@dataclass(frozen=True)
class Operand:
    """One operand; ``value`` is the bits of an immediate or the offset of an address."""

    kind: Literal["register", "special", "immediate", "symbol", "address", "vector", "pair", "sink"]
    name: str = ""
    value: int = 0
    float_bits: int = 0  # an immediate's format: 32 or 64, 0 for integers
    negated: bool = False
    parts: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction, its opcode split at the dots."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Operand | None
    text: str
    line: int


@dataclass
class Variable:
    """A ``.param``, ``.shared`` or ``.local`` variable: its place in its space."""

    offset: int
    size: int


@dataclass
class Space:
    """The variables of one state space of a kernel, laid out one after the other."""

    variables: dict[str, Variable] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, align: int, size: int) -> None:
        """Place a variable at the next address that its alignment allows."""
        offset = -(-self.size // align) * align
        self.variables[name] = Variable(offset, size)
        self.size = offset + size


@dataclass
class Kernel:
    """One ``.entry``."""

    name: str
    parameters: Space = field(default_factory=Space)
    shared: Space = field(default_factory=Space)
    local: Space = field(default_factory=Space)
    registers: dict[str, int] = field(default_factory=dict)  # name: bytes, 1 for predicates
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # .branchtargets: the labels of a brx.idx
    compiled: list[Any] = field(default_factory=list)  # what ptx_decode.py makes of the code, once for all launches
    most_threads: int | None = None  # in a block, by .maxntid or .reqntid


@dataclass
class Module:
    """The kernels of one PTX file: by name, parameters, directives, the body and the line on which the body begins."""

    entries: dict[str, tuple[str, str, str, int]]
    parsed: dict[str, Kernel] = field(default_factory=dict)

    def kernel(self, name: str) -> Kernel:
        """Parse a kernel at its first use: a file of every instance has 10^5 lines."""
        if name not in self.parsed:
            if name not in self.entries:
                raise PtxError(f"no kernel {name}; there are {', '.join(self.entries)}")
            self.parsed[name] = _parse_kernel(name, *self.entries[name])
        return self.parsed[name]


_VARIABLE = re.compile(r"\.(param|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)(?:\[(\d+)\])?")
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)", re.S)
_BOUND = re.compile(r"\.(?:max|req)ntid\s+(\d+(?:\s*,\s*\d+)*)")
_SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]|%laneid")
_CHUNK = re.compile(r"\s*([^{;]+)([{;])")
_BRACE = re.compile(r"[{}]")
_TOKEN = re.compile(r"[{};:]|[^{};:]+")
_LABEL = re.compile(r"[\w$]+\s*")
_IGNORED = (".pragma", ".loc", ".file")


def parse(text: str) -> Module:
    """Parse a PTX file.

    Parameters
    ----------
    text : str
        What ``nvcc --ptx`` wrote.

    Returns
    -------
    Module

    Raises
    ------
    PtxError
        For text that is no PTX or uses what the interpreter leaves out.

    Examples
    --------
    >>> [i.text for i in parse(".visible .entry k() { bar.sync 0; ret; }").kernel("k").code]
    ['bar.sync 0', 'ret']
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    text = re.sub(r"^[ \t]*\.(?:version|target|address_size)\b[^\n]*", "", text, flags=re.M)
    entries, position, line = {}, 0, 1
    while chunk := _CHUNK.match(text, position):
        head = chunk[1].strip()
        line += chunk[0].count("\n")
        position = chunk.end()
        if head.startswith(_IGNORED) and chunk[2] == ";":
            continue
        entry = _ENTRY.fullmatch(head)
        if not entry or chunk[2] != "{":
            raise PtxError(f"not supported at module scope: {' '.join(head.split())[:100]}")
        depth = 1
        for brace in _BRACE.finditer(text, position):
            depth += 1 if brace[0] == "{" else -1
            if not depth:
                break
        if depth:
            raise PtxError(f"{entry[1]} has no end")
        entries[entry[1]] = entry[2], entry[3], text[position : brace.start()], line
        line += text.count("\n", position, brace.end())
        position = brace.end()
    if text[position:].strip():
        raise PtxError(f"not supported at module scope: {text[position:].strip()[:100]}")
    return Module(entries)


def _parse_kernel(name: str, parameters: str, directives: str, body: str, line: int) -> Kernel:
    kernel = Kernel(name)
    if bound := _BOUND.search(directives):
        kernel.most_threads = math.prod(int(extent) for extent in bound[1].split(","))
    for parameter in filter(None, (" ".join(p.split()) for p in parameters.split(","))):
        variable = _VARIABLE.fullmatch(re.sub(r"\.ptr (?:\.\w+ )?\.align \d+ ", "", parameter))
        if not variable:
            raise PtxError(f"not a parameter: {parameter}")
        _declare(kernel.parameters, variable)
    scopes: ChainMap[str, str] = (
        ChainMap()
    )  # inline assembly declares registers in scopes of its own: name -> unique name
    scope_count, statement, start = 0, "", line
    for token in _TOKEN.finditer(body):
        mark = token[0]
        if not statement:
            start = line + mark.count("\n", 0, len(mark) - len(mark.lstrip()))
            mark = mark.lstrip()
        line += token[0].count("\n")
        if not statement and mark in ("{", "}"):
            scopes = scopes.new_child() if mark == "{" else scopes.parents
            scope_count += mark == "{"
        elif mark == ":" and _LABEL.fullmatch(statement):
            kernel.labels[statement.strip()] = len(kernel.code)
            statement = ""
        elif mark == ";":
            _parse_statement(kernel, " ".join(statement.split()), scopes, scope_count, start)
            statement = ""
        else:
            statement += mark
    return kernel


def _declare(space: Space, match: re.Match[str]) -> None:
    element = BYTES[match[3]]
    space.add(match[4], int(match[2] or element), element * int(match[5] or 1))


def _parse_statement(kernel: Kernel, text: str, names: ChainMap[str, str], scope: int, line: int) -> None:
    if text.startswith(".reg "):
        _, kind, registers = text.split(None, 2)
        suffix = f"@{scope}" if len(names.maps) > 1 else ""
        for register in registers.replace(" ", "").split(","):
            name, _, count = register.rstrip(">").partition("<")
            for one in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                names[one] = one + suffix
                kernel.registers[one + suffix] = BYTES[kind[1:]]
    elif variable := _VARIABLE.fullmatch(text):
        _declare({"shared": kernel.shared, "local": kernel.local}[variable[1]], variable)
    elif text.startswith(".branchtargets "):
        kernel.targets[next(reversed(kernel.labels))] = tuple(
            text.removeprefix(".branchtargets ").replace(" ", "").split(",")
        )
    elif text.startswith("."):
        if not text.startswith(_IGNORED):
            raise PtxError(f"not supported: {text}")
    elif text:
        guard, body = None, text
        if guarded := re.match(r"@(!?)(\S+) (.*)", text):
            guard, body = _operand(guarded[1] + guarded[2], names), guarded[3]
        opcode, _, operands = body.partition(" ")
        parts = tuple(_operand(operand, names) for operand in _split(operands))
        kernel.code.append(Instruction(tuple(opcode.split(".")), parts, guard, text, line))


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def _operand(text: str, names: ChainMap[str, str]) -> Operand:
    text = text.strip()
    if text.startswith("!"):
        inner = _operand(text[1:], names)
        return Operand(inner.kind, inner.name, negated=True)
    if text.startswith("{"):
        return Operand("vector", parts=tuple(_operand(part, names) for part in text.strip("{}").split(",")))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Operand("address", value=int(offset or "0", 0), parts=(_operand(base, names),))
    if "|" in text:
        return Operand("pair", parts=tuple(_operand(part, names) for part in text.split("|")))
    if text == "_":
        return Operand("sink")
    if hexadecimal := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        width = 32 if hexadecimal[1] in "fF" else 64
        if len(hexadecimal[2]) == width // 4:
            return Operand("immediate", value=int(hexadecimal[2], 16), float_bits=width)
    if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Operand("immediate", value=int(text.rstrip("U"), 0))
    if _SPECIAL.fullmatch(text):
        return Operand("special", text)
    return Operand("register" if text in names else "symbol", names.get(text, text))
