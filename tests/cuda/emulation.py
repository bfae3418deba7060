"""The CUDA library compiled by g++ for the emulator: builds, records, cases, and their replay under sanitizers.

    library = emulation.Library(emulation.build("plain"))
    native = emulation.bindings()  # the native module, but for who executes a problem
    native.use_cuda(library.address)  # from now on its NumPy arrays go to the emulated library
    with library.recording() as runs: ...
    with library.writing_cases(folder): ...
    emulation.replay(emulation.build("address"), folder.glob("*.case"))

What lives elsewhere: CUDA's execution model (``fibers.h``, ``emulator.h``), the records (``recorder.cpp``), the
replay's program (``driver.cpp``), the bindings' way to the library (``execute_emulated.cpp``), planted bugs
(``planted.py``). ``FUSIONSUM_EMULATOR_SCHEDULE`` sets the first schedule.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import pathlib
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pybind11

from tests import compiled
from tests.cuda.planted import Bug, plant

__all__ = [
    "SCHEDULES",
    "STREAM",
    "VARIANTS",
    "Launch",
    "Library",
    "Run",
    "Span",
    "bindings",
    "build",
    "build_bindings",
    "replay",
]

_HERE = pathlib.Path(__file__).parent
_SOURCES = _HERE.parent.parent / "csrc"
_BUILD = _HERE.parent.parent / "build" / "cuda-emulation"
STREAM = 0x57  # where calls of `bindings` go
_ROLES = ("data", "mask", "grad", "workspace", "state")
SCHEDULES = ("forward", "reverse", "random:1")

# Contracted products would differ between variants; unique symbols would be shared between libraries in one process.
_FLAGS = ("-x", "c++", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas")
_DEFINES = ("-Dfusionsum_cuda=fusionsum_cuda_product", '-DFUSIONSUM_CUDA_ARCHITECTURES="the emulator"')
VARIANTS = {  # "plain" is a shared library, the others programs that replay cases
    "plain": ("-O2",),
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}


def build(
    variant: str,
    bug: Bug | None = None,
    *,
    name: str = "product",
    sources: Sequence[pathlib.Path] | None = None,
) -> pathlib.Path:
    """
    Compile a variant of the CUDA library, where its sources have changed.

    Parameters
    ----------
    variant
        One of ``VARIANTS``.
    bug
        Planted into the sources; it makes a folder of its own.
    name
        The folder to build in.
    sources
        What to compile instead of all of csrc/cuda; it defines ``fusionsum_cuda``. Relative paths are from csrc, or
        from its copy with the bug.

    Returns
    -------
    pathlib.Path
        The shared library, or the program for :func:`replay`.

    Raises
    ------
    RuntimeError
        If the compiler fails; its message is quoted.
    ValueError
        If the bug's text is not found exactly once.
    """
    folder = _BUILD / (bug.name if bug else name) / variant
    with compiled.locked(folder):
        root = _SOURCES
        if bug:
            root = folder / "csrc"
            plant(bug, _SOURCES, root)
        if sources is None:
            sources = sorted([*(root / "cuda").rglob("*.cu"), *(root / "cuda").rglob("*.cpp")])
        plain = variant == "plain"
        harness = [_HERE / "recorder.cpp", *([] if plain else [_HERE / "driver.cpp"])]
        flags = (*_FLAGS, *VARIANTS[variant], "-I", str(_HERE), "-I", str(root))
        return compiled.link(
            folder / ("libfusionsum_cuda.so" if plain else "driver"),
            {root / source: (*flags, *_DEFINES) for source in sources} | dict.fromkeys(harness, flags),
            (*VARIANTS[variant], *(["-shared", "-Wl,-z,defs"] if plain else ["-rdynamic"]), "-ldl"),
        )


def build_bindings(bug: Bug | None = None, *, emulated: bool = False) -> pathlib.Path:
    """
    Compile a native module without kernels of the CPU.

    Parameters
    ----------
    bug
        Planted into the sources.
    emulated
        Arrays, which are the CPU's, go to the library that ``use_cuda`` was given. Without it, only those of a GPU do.

    Returns
    -------
    pathlib.Path
        The module; its sources are those of csrc/bindings, but for the one that chooses who executes a problem.

    Raises
    ------
    RuntimeError
        If the compiler fails; its message is quoted.
    """
    folder = _BUILD / (bug.name if bug else "product") / ("bindings-emulated" if emulated else "bindings")
    with compiled.locked(folder):
        root = _SOURCES
        if bug:
            root = folder / "csrc"
            plant(bug, _SOURCES, root)
        sources = {path for path in (root / "bindings").glob("*.cpp") if not (emulated and path.name == "execute.cpp")}
        names = ("dispatch.cpp", "parallel.cpp", "work.cpp", "scores/plan.cpp", "sum/plan.cpp")
        ours = [_HERE / "no_kernels.cpp", *([_HERE / "execute_emulated.cpp"] if emulated else [])]
        headers = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))
        flags = (*_FLAGS, "-O1", "-fvisibility=hidden", "-I", str(_HERE), "-I", str(root), *headers)
        return compiled.link(
            folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}",
            dict.fromkeys((*sorted(sources), *(root / "cpu" / name for name in names), *ours), flags),
            ("-shared", "-pthread"),
        )


@functools.cache
def bindings() -> Any:
    """Compile and import a native module, one for the process, whose arrays go to an emulated library."""
    spec = importlib.util.spec_from_file_location("tests.cuda._core", build_bindings(emulated=True))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replay(
    driver: pathlib.Path, cases: Iterable[pathlib.Path], schedules: Sequence[str] = SCHEDULES
) -> subprocess.CompletedProcess[str]:
    """
    Run cases through a sanitized build.

    The return code is 0 if all was well, 1 if bits differ or the emulator complains, 66 if a sanitizer does.

    Parameters
    ----------
    driver
        Of :func:`build`.
    cases
        Files of :meth:`Library.writing_cases`, of a build of the same sources.
    schedules
        Each is a replay of each case.

    Returns
    -------
    subprocess.CompletedProcess
        With a line per case and schedule in ``stdout``, and what sanitizers report in ``stderr``.
    """
    options = {
        "ASAN_OPTIONS": "exitcode=66:detect_leaks=0",  # leaks: it cannot look into fibers' stacks
        "UBSAN_OPTIONS": "exitcode=66:print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    }
    asked = [word for schedule in schedules for word in ("--schedule", schedule)]
    command = [str(driver), *asked, *map(str, cases)]
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True)


class _LaunchRecord(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("parameters", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("shared", ctypes.c_int64),
        ("device", ctypes.c_int32),
    )


class _SpanRecord(ctypes.Structure):
    _fields_ = (
        ("operand", ctypes.c_int32),
        ("role", ctypes.c_int32),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("before", ctypes.c_void_p),
        ("after", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Launch:
    """A kernel by its mangled name, which is the entry's in nvcc's PTX, and what it was launched with."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes
    stream: int
    shared: int  # bytes asked for at the launch
    device: int  # that was current


@dataclass(frozen=True)
class Span:
    """Memory that a run may touch: an operand's "data", "mask" or "grad", the "workspace" (operand -1), or a "state".

    A step of scores adds to its states. Its arrays do not live on: what was in them is in `before`, what is, in `after`.
    """

    operand: int
    role: str
    begin: int
    bytes: int
    before: bytes | None = None
    after: bytes | None = None


@dataclass(frozen=True)
class Run:
    """One call of the library."""

    launches: tuple[Launch, ...]
    spans: tuple[Span, ...]


class Library:
    """
    The plain build, loaded. Its records are of the process; one user at a time.

    Parameters
    ----------
    path
        Of :func:`build`.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._library = library = ctypes.CDLL(str(path))
        library.emulator_schedule.restype = ctypes.c_bool
        library.emulator_schedule.argtypes = library.emulator_write_cases.argtypes = [ctypes.c_char_p]
        library.emulator_reports.restype = ctypes.c_char_p
        library.emulator_record.argtypes = [ctypes.c_bool]
        library.emulator_fail_after.argtypes = [ctypes.c_int64]
        library.emulator_set_device.argtypes = [ctypes.c_int]
        library.emulator_run_last.argtypes = [ctypes.c_int64]
        library.emulator_runs.restype = ctypes.c_int64
        library.emulator_launches.argtypes = library.emulator_spans.argtypes = [
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_int64),
        ]
        library.emulator_launches.restype = ctypes.POINTER(_LaunchRecord)
        library.emulator_spans.restype = ctypes.POINTER(_SpanRecord)

    @property
    def native(self) -> ctypes.CDLL:
        """The library itself."""
        return self._library

    @property
    def address(self) -> int:
        """Where ``fusionsum_cuda`` is, for ``use_cuda`` of :func:`bindings`."""
        address = ctypes.cast(self._library.fusionsum_cuda, ctypes.c_void_p).value
        assert address is not None
        return address

    def schedule(self, name: str) -> None:
        """Order threads and blocks "forward", "reverse" or "random:<seed>" from now on; else ValueError."""
        if not self._library.emulator_schedule(name.encode()):
            raise ValueError(f"schedule: expected 'forward', 'reverse' or 'random:<seed>', got {name!r}")

    @contextlib.contextmanager
    def failing_after(self, launches: int) -> Iterator[None]:
        """Let a launch fail after so many that succeed, once."""
        self._library.emulator_fail_after(launches)
        try:
            yield
        finally:
            self._library.emulator_fail_after(-1)

    @contextlib.contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        """Make another device than the first current."""
        self._library.emulator_set_device(device)
        try:
            yield
        finally:
            self._library.emulator_set_device(0)

    @contextlib.contextmanager
    def running_last(self, blocks: int) -> Iterator[None]:
        """Run the last blocks of each grid alone, or none: what is launched is checked and recorded all the same."""
        self._library.emulator_run_last(blocks)
        try:
            yield
        finally:
            self._library.emulator_run_last(-1)

    @property
    def capture_mode(self) -> int:
        """What this thread may do while a graph is captured: 0, unless a call has not put back what it found."""
        return self._library.emulator_capture_mode()

    def reports(self) -> list[str]:
        """Take what the emulator reported since the last call."""
        return self._library.emulator_reports().decode().splitlines()

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Run]]:
        """Fill the list, at the end, with the runs within."""
        runs: list[Run] = []
        self._library.emulator_record(True)
        try:
            yield runs
            runs += [self._recorded(i) for i in range(self._library.emulator_runs())]
        finally:
            self._library.emulator_record(False)

    def _recorded(self, run: int) -> Run:
        count = ctypes.c_int64()
        launches = self._library.emulator_launches(run, ctypes.byref(count))[: count.value]
        spans = self._library.emulator_spans(run, ctypes.byref(count))[: count.value]
        return Run(
            tuple(
                Launch(
                    l.kernel.decode(),
                    tuple(l.grid),
                    tuple(l.block),
                    ctypes.string_at(l.parameters, l.bytes),
                    l.stream or 0,
                    l.shared,
                    l.device,
                )
                for l in launches
            ),
            tuple(
                Span(
                    s.operand,
                    _ROLES[s.role],
                    s.begin or 0,
                    s.bytes,
                    ctypes.string_at(s.before, s.bytes) if s.before else None,
                    ctypes.string_at(s.after, s.bytes) if s.after else None,
                )
                for s in spans
            ),
        )

    @contextlib.contextmanager
    def writing_cases(self, folder: pathlib.Path) -> Iterator[None]:
        """Write each run within that succeeds to the folder, as 0.case, 1.case, ... for :func:`replay`."""
        self._library.emulator_write_cases(str(folder).encode())
        try:
            yield
        finally:
            self._library.emulator_write_cases(b"")
