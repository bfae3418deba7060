"""What ptxas made of kernels: registers, stack, occupancy and the width of memory accesses, per architecture.

    python -m tests.cuda.sass [library]             the table, in Markdown
    python -m tests.cuda.sass --budgets [library]   write budgets.json anew, to be read as a diff before it is committed

The library is libfusionsum_cuda.so, or a fatbin. What lives here: finding the CUDA tools, reading ``cuobjdump``'s output,
occupancy. What lives elsewhere: what the numbers may be (``budgets.json``), the tests that hold them to it
(``test_static.py``). Spills are errors of the build already (``CMakeLists.txt``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("budgets.json")
THREADS = 256  # of every block: csrc/cuda/sum/pass.h

# Per multiprocessor: warps, blocks, bytes of shared memory, and of these what the system takes from each block. All have
# 65536 registers, given out by 256 to a warp, in four equal parts. CUDA Programming Guide 13.0, "Compute Capabilities".
_LIMITS = {
    75: (32, 16, 65536, 0),
    80: (64, 32, 167936, 1024),
    86: (48, 16, 102400, 1024),
    89: (48, 24, 102400, 1024),
    90: (64, 32, 233472, 1024),
    100: (64, 32, 233472, 1024),
    110: (48, 24, 233472, 1024),
    120: (48, 24, 102400, 1024),
}
ARCHITECTURES = tuple(_LIMITS)


def find_tool(name: str) -> str | None:
    """Return the path of ``nvcc``, ``cuobjdump`` or ``nvdisasm``: on the PATH, in CUDA_HOME, or in NVIDIA's wheels."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    places = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", *map(str, wheels)]
    return shutil.which(name, path=os.pathsep.join(places))


def require_tool(name: str) -> str:
    """Return a tool's path; without it skip the test, or fail where FUSIONSUM_REQUIRE_CUDA=1."""
    path = find_tool(name)
    if path is None:
        if os.environ.get("FUSIONSUM_REQUIRE_CUDA") == "1":
            pytest.fail(f"{name} is missing and FUSIONSUM_REQUIRE_CUDA=1")
        pytest.skip(f"needs {name}")
    return path


def find_library() -> Path | None:
    """Return the CUDA library of FUSIONSUM_CUDA_LIBRARY, else of the installed package, else of build/cuda, if any."""
    if named := os.environ.get("FUSIONSUM_CUDA_LIBRARY"):
        return Path(named)
    package = importlib.util.find_spec("fusionsum")
    folders = [*((package and package.submodule_search_locations) or ()), str(ROOT / "build" / "cuda")]
    return next((path for folder in folders if (path := Path(folder, "libfusionsum_cuda.so")).exists()), None)


def require_library() -> Path:
    """Return the CUDA library's path; without it skip the test, or fail where FUSIONSUM_REQUIRE_CUDA=1."""
    require_tool("cuobjdump")
    path = find_library()
    if path is None:
        what = "libfusionsum_cuda.so: build with -DFUSIONSUM_CUDA=ON, or name it in FUSIONSUM_CUDA_LIBRARY"
        if os.environ.get("FUSIONSUM_REQUIRE_CUDA") == "1":
            pytest.fail(f"{what} is missing and FUSIONSUM_REQUIRE_CUDA=1")
        pytest.skip(f"needs {what}")
    return path


def ptx_of(library: Path) -> list[str]:
    """Take the PTX out of a library: one text per source file, of the newest architecture, for which it is embedded."""
    command = [require_tool("cuobjdump"), "-ptx", str(library)]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"^\.version.*?(?=^Fatbin|\Z)", dump, re.S | re.M)


@dataclass
class Kernel:
    """One compiled kernel; sizes in bytes, global accesses counted by their width: `loads` and `stores` inside loops."""

    name: str  # demangled, without namespaces and parameters
    architecture: int
    registers: int
    stack: int  # where what does not fit the registers goes, and arrays indexed at run time
    shared: int
    local: int
    loads: Counter[int]
    stores: Counter[int]

    @property
    def blocks(self) -> int:
        """Count the blocks that fit one multiprocessor."""
        warps, blocks, shared, reserved = _LIMITS[self.architecture]
        per_block = THREADS // 32
        per_warp = -(-self.registers * 32 // 256) * 256
        # From sm_90 on cuobjdump's figure for shared memory includes what the system takes.
        own = self.shared if self.architecture >= 90 else self.shared + reserved
        by_registers = 65536 // 4 // per_warp * 4 // per_block
        return min(warps // per_block, blocks, by_registers, shared // own if own else blocks)

    @property
    def occupancy(self) -> float:
        """Return the part of the multiprocessor's warps that those blocks have."""
        return self.blocks * THREADS / 32 / _LIMITS[self.architecture][0]


def read(library: Path) -> list[Kernel]:
    """Read the kernels of a library or fatbin, of every architecture it holds code for.

    Parameters
    ----------
    library : Path

    Returns
    -------
    list of Kernel
        By architecture, then by name.
    """

    def dump(what: str) -> list[tuple[int, str]]:
        command = [str(find_tool("cuobjdump")), what, str(library)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        _, *parts = re.split(r"Fatbin elf code:\n=+\narch = sm_(\d+)\w*\n", text)
        return [(int(architecture), part) for architecture, part in zip(parts[::2], parts[1::2], strict=True)]

    code = {
        (architecture, function.split("\n", 1)[0].strip()): function
        for architecture, part in dump("-sass")
        for function in re.split(r"\n\s*Function : ", part)[1:]
    }
    pattern = r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = {(a, name): sizes for a, part in dump("-res-usage") for name, *sizes in re.findall(pattern, part)}
    names = _demangled([name for _, name in usage])
    kernels = []
    for (architecture, name), sizes in usage.items():
        registers, stack, shared, local = map(int, sizes)
        loads, stores = (_in_loops(code[architecture, name], kind) for kind in ("LDG", "STG"))
        kernels.append(Kernel(names[name], architecture, registers, stack, shared, local, loads, stores))
    return sorted(kernels, key=lambda kernel: (kernel.architecture, kernel.name))


def _in_loops(text: str, kind: str) -> Counter[int]:
    """Count a function's accesses inside loops by their width in bytes; a loop is what a branch backwards spans."""
    instructions = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", text)
    code = [(int(m[1], 16), m[2]) for m in instructions]
    branches = [(int(m[1], 16), at) for at, what in code if (m := re.match(r"BRA.*?0x([0-9a-f]+)", what))]
    loops = [(start, end) for start, end in branches if start < end]  # the branch to itself after the last exit is none
    widths: Counter[int] = Counter()
    for at, what in code:
        opcode, *modifiers = what.split()[0].split(".")
        if opcode == kind and any(start <= at <= end for start, end in loops):
            narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
            widths[next((narrow[m] for m in modifiers if m in narrow), 4)] += 1
    return widths


def _demangled(names: list[str]) -> dict[str, str]:
    """Return "rows<float, 2, true, false>" for each mangled name."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    short = [re.sub(r"\w+::|^void |\(\w+\)(?=\d)|\([^()]*\)$", "", line) for line in plain.splitlines()]
    return dict(zip(names, short, strict=True))


def main(arguments: list[str]) -> None:
    """Print the table of a library, or write the budgets."""
    write = "--budgets" in arguments
    named = [a for a in arguments if a != "--budgets"]
    library = Path(named[0]) if named else find_library()
    if library is None or not find_tool("cuobjdump"):
        sys.exit(
            f"needs {'cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)' if library else 'a library'}"
        )
    table: dict[str, dict[int, Kernel]] = {}
    for kernel in read(library):
        table.setdefault(kernel.name, {})[kernel.architecture] = kernel
    if write:
        known = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
        for name, row in table.items():
            known[name] = known.get(name, {}) | {str(a): [k.registers, k.blocks] for a, k in row.items()}
        rows = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known) if name in table]
        BUDGETS.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        return
    architectures = sorted({a for row in table.values() for a in row})
    print(f"Registers, and occupancy with blocks of {THREADS} threads; bytes of stack where there is any.\n")
    print("| kernel |", " | ".join(f"sm_{a}" for a in architectures), "|")
    print("|---" * (1 + len(architectures)) + "|")
    for name, row in sorted(table.items()):
        cells = [
            f"{k.registers}, {k.occupancy:.0%}{f', {k.stack} B' if k.stack else ''}" for _, k in sorted(row.items())
        ]
        print(f"| `{name}` |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
