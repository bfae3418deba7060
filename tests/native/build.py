"""The code of csrc/cpu compiled without Python, with CMakeLists.txt's flags and a sanitizer's, into this folder's programs.

    build.run("pool", "thread", "callers")  # pool.cpp under ThreadSanitizer

What lives elsewhere: the compiling (``tests/compiled.py``), the programs (``*.cpp``), what they share (``problem.h``).
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import subprocess

from conftest import missing
from tests import compiled

__all__ = ["ROOT", "SANITIZER", "VARIANTS", "compiler", "library", "program", "run"]

_HERE = pathlib.Path(__file__).parent
ROOT = _HERE.parent.parent
_SOURCES = ROOT / "csrc"
_BUILD = ROOT / "build" / "native"
SANITIZER = 66  # the exit code of a program in which one found something
_SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
VARIANTS = {  # "plain" is the product's own; "fuzzer" is clang's, whose libFuzzer has the program's main()
    "plain": (),
    "address": (*_SANITIZED, "-fsanitize=address,undefined"),
    "thread": (*_SANITIZED, "-fsanitize=thread"),
    "fuzzer": (*_SANITIZED, "-fsanitize=fuzzer,address,undefined", "-DFUSIONSUM_LIBFUZZER"),
}


def compiler(variant: str) -> str | None:
    """Return the compiler that a variant takes, if it is here."""
    names = ["g++"] if variant != "fuzzer" else ["clang++", *(f"clang++-{version}" for version in range(22, 13, -1))]
    return next(filter(None, map(shutil.which, names)), None)


@functools.cache
def _flags(compiler: str) -> tuple[list[str], dict[str, list[str]]]:
    """Read CMakeLists.txt: the flags of all sources, and those of each instruction set that the compiler knows."""
    text = (ROOT / "CMakeLists.txt").read_text()
    standard = re.search(r"target_compile_features\(_core PRIVATE cxx_std_(\d+)\)", text)
    options = re.search(r"target_compile_options\(_core PRIVATE ([^$)]+)", text)
    rows = re.findall(r'^ +"(\w+)\|(-[^|]+)\|(.*?)"\)?$', text, re.MULTILINE)
    assert standard and options and rows, "CMakeLists.txt no longer says the flags as this function reads them"
    sets = {}
    for name, flags, code in rows:
        line = code.replace(r"\n", "\n").replace(r"\;", ";")
        command = [compiler, *flags.split(), "-O3", "-x", "c++", "-S", "-o", "/dev/null", "-"]
        if subprocess.run(command, input=line, text=True, capture_output=True).returncode == 0:
            sets[name] = flags.split()
    return [f"-std=c++{standard[1]}", *options[1].split()], sets


def program(name: str, variant: str) -> pathlib.Path:
    """
    Compile a program of this folder with all of csrc/cpu.

    Parameters
    ----------
    name
        Of its source, without ``.cpp``.
    variant
        One of ``VARIANTS``. The test is skipped where its compiler is missing.

    Returns
    -------
    pathlib.Path
        The program.

    Raises
    ------
    RuntimeError
        If the compiler fails; its message is quoted.
    """
    found = compiler(variant)
    if found is None:
        missing("clang++, with its libFuzzer" if variant == "fuzzer" else "g++")
        raise AssertionError
    common, sets = _flags(found)
    common = [*common, *VARIANTS[variant], "-pthread", "-I", str(_SOURCES)]
    sources = {}
    for source in sorted((_SOURCES / "cpu").rglob("*.cpp")):
        isa = source.stem.removeprefix("isa_")
        if isa == source.stem or isa == "scalar" or isa in sets:
            sources[source] = [*common, *sets.get(isa, ())]
    with compiled.locked(_BUILD / variant):
        return compiled.link(
            _BUILD / variant / name,
            sources | {_HERE / f"{name}.cpp": [*common, "-I", str(_HERE), "-I", str(_HERE.parent / "cuda")]},
            (*VARIANTS[variant], "-pthread", "-ldl", "-rdynamic"),
            found,
        )


def library(name: str) -> pathlib.Path:
    """Compile a source of this folder alone, into a shared library."""
    if compiler("plain") is None:
        missing("g++")
    with compiled.locked(_BUILD / "plain"):
        return compiled.link(
            _BUILD / "plain" / f"lib{name}.so",
            {_HERE / f"{name}.cpp": ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra")},
            ("-shared", "-ldl"),
        )


def run(name: str, variant: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a program; what a sanitizer finds ends it with exit code ``SANITIZER``."""
    # Each tool passes over what it does not know.
    options = f"exitcode={SANITIZER} halt_on_error=1 detect_leaks=1 die_after_fork=0"
    environment = {f"{tool}_OPTIONS": options for tool in ("ASAN", "TSAN", "LSAN", "UBSAN")}
    return subprocess.run(
        [str(program(name, variant)), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
