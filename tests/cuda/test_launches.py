"""What the library asks of CUDA's runtime: each launch on the caller's stream and device, none that is unchecked.

What lives here: `complaints`, of the emulated build and of nvcc's, which planted bugs go through too
(``test_planted.py``). What lives elsewhere: the runtimes (``emulator.h``, ``runtime.cpp``), what kernels compute
(``test_emulated.py``), the bindings' side (``test_bindings.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import device
from conftest import Case, Form, require_native, run_python
from tests.cuda import cases, emulation, interface, runtime, step_cases

SUMS = ("combine", "columns", "rows")
NAMES = (*SUMS, "log_sum_exp", "pair_sums", "gamma", "select", "leave_out", "rank", "merge")
# Where the sizes of dims lie in the parameters, and where their reciprocals, of how many dims: pass.h.
RECIPROCALS = {"combine": (32, 208, 11), "columns": (8, 88, 10), "rows": (8, 88, 10)}
PADDING = {"merge": slice(29, 32)}  # between fields, where anything may lie: scores/merge.cuh


def sums() -> Iterator[tuple[str, Case]]:
    """Yield calls that take several launches: sums in parts, which are combined, and derivatives of several reaches."""
    rng = np.random.default_rng(0)
    yield "weights", Form("n", ("Bn", "Bn")).case(rng, "float32", B=600, n=20)
    yield "candidates", Form("n", ("B1n", "B1n", "BKn")).case(rng, "float32", B=40, K=9, n=13)
    yield "long rows", Form("B1", ("Bn", "Bn")).case(rng, "float32", B=2, n=8200)
    yield "any operands", Form("n", ("Bn",) * 5).case(rng, "float32", B=300, n=13)
    yield "five dims of rows", dict(cases.sizes())["five dims of rows"]


Calls = Iterator[tuple[str, Callable[[], object]]]


def of_sums() -> Calls:
    """Yield what makes those calls."""
    for label, case in sums():
        yield label, functools.partial(cases.both, case)


def of_scores() -> Calls:
    """Yield calls of each step of scores."""
    for call in step_cases.FEW:
        yield f"scores, {call}", functools.partial(step_cases.results, *call)


def many_blocks() -> Any:
    """Call with more blocks than a grid's second and third dims take: not to be run, for memory it has none."""
    return cases.both(Case(None, [np.zeros((2**22, 128), np.float32) for _ in range(2)]))


def kernel_of(launch: emulation.Launch) -> str:
    return next(name for name in NAMES if re.search(rf"\d{name}[IE]", launch.kernel))


def complaints(path: pathlib.Path, calls: Callable[[], Calls]) -> Iterator[str]:
    """Yield what is wrong with an emulated build's launches."""
    with cases.emulated(path) as library, step_cases.emulated(path):
        for label, call in calls():
            with library.recording() as runs:
                said = error_of(call)
            if said:
                yield f"{said}: {label}"
                continue
            launches = [launch for run in runs for launch in run.launches]
            for launch in launches:
                if launch.stream != emulation.STREAM:
                    yield f"another stream: {kernel_of(launch)}, {label}"
                sizes, inverses, dims = RECIPROCALS.get(kernel_of(launch), (0, 0, 0))
                for size, inverse in zip(
                    struct.unpack_from(f"{dims}q", launch.parameters, sizes),
                    struct.unpack_from(f"{dims}d", launch.parameters, inverses),
                    strict=True,
                ):
                    if size and inverse != 1 / size:
                        yield f"the reciprocal of {size} is {inverse!r}: {label}"
            for k, launch in enumerate(launches):
                with library.failing_after(k):
                    said = error_of(call)
                wanted = f"kernel {kernel_of(launch)}: cudaErrorLaunchOutOfResources, a failure that was asked for"
                if not said.startswith(wanted):
                    yield f"a failure of launch {k}, {kernel_of(launch)}, is told as {said or 'success'}: {label}"
            library.reports()
            with library.on_device(1):
                said = error_of(call)
            if said != "device 1 is current, and the arrays are on device 0":
                yield f"another device is told as {said or 'success'}: {label}"
            if said := error_of(call):
                yield f"an earlier error is told again, {said}: {label}"
        if library.capture_mode:
            yield f"the mode of capture is left at {library.capture_mode}"
        with library.running_last(0):
            if said := error_of(many_blocks):
                yield f"{said}: many blocks"


def complaints_of_nvcc(path: pathlib.Path, emulated: pathlib.Path) -> Iterator[str]:
    """Yield what is wrong with the launches of a build by nvcc, and where they are not an emulated build's."""
    built, library = runtime.Runtime(path), emulation.Library(emulated)
    native = emulation.bindings()
    both = interface.beside(interface.library_at(built.address), interface.library_at(library.address))
    with device.replaced(require_native(), device.emulated(interface.publish(both))), device.pretending(native):
        for label, call in (*of_sums(), *of_scores(), ("many blocks", many_blocks)):
            built.clear()
            with library.recording() as runs, library.running_last(0 if call is many_blocks else -1):
                said = error_of(call)
            if said:
                yield f"{said}: {label}"
            expected = [launch for run in runs for launch in run.launches]
            if len(built.launches) != len(expected):
                yield f"{len(built.launches)} launches by nvcc's code, {len(expected)} by the emulator's: {label}"
            for launch in built.launches:
                if launch.stream != emulation.STREAM:
                    yield f"another stream: {kernel_of(launch)}, {label}"
                yield from (f"{wrong}: {kernel_of(launch)}, {label}" for wrong in unlawful(launch, built))
            for launch, wanted in zip(built.launches, expected, strict=False):
                found, right = (dataclasses.asdict(unpadded(each)) for each in (launch, wanted))
                for field in (name for name in found if found[name] != right[name]):
                    yield f"another {field} than in the emulator: {kernel_of(launch)}, {label}"
    yield from unsaid(built)


def unpadded(launch: emulation.Launch) -> emulation.Launch:
    parameters = bytearray(launch.parameters)
    place = PADDING.get(kernel_of(launch), slice(0))
    parameters[place] = bytes(len(parameters[place]))
    return dataclasses.replace(launch, parameters=bytes(parameters))


def unlawful(launch: emulation.Launch, built: runtime.Runtime) -> Iterator[str]:
    """Yield what CUDA would not accept of a launch, on any GPU, by the Programming Guide's table of limits."""
    kernel = built.kernels[launch.kernel]
    threads = math.prod(launch.block)
    if threads > min(1024, kernel.most_threads or 1024) or launch.block[2] > 64:
        yield f"launch bounds, a block of {launch.block} for {kernel.most_threads} threads"
    if launch.grid[0] >= 2**31 or max(launch.grid[1:]) > 65535:
        yield f"a grid of an impossible size, {launch.grid}"
    if launch.shared + kernel.shared.size > 48 * 1024:
        yield f"more shared memory than 48 KiB, {launch.shared} bytes beside {kernel.shared.size}"


def unsaid(built: runtime.Runtime) -> Iterator[str]:
    """Yield errors of the runtime that are not told as they should be, and what a call leaves behind. Loads the kernels."""
    library = interface.library_at(built.address)

    def on_device(plan: int, _: int, *rest: object) -> int | None:
        return library.execute(plan, 1, *rest)

    placed = interface.make(library.plan_bytes, library.plan, on_device)
    call = dict(of_sums())["weights"]
    resources = "cudaErrorLaunchOutOfResources, too many resources requested for launch"
    image = "cudaErrorNoKernelImageForDevice, no kernel image is available for execution on the device"
    broken = "cudaErrorIllegalAddress, an illegal memory access was encountered (left behind by earlier work, "
    other = "device 1, of compute capability 9.0, does not take the kernels of this build, which are for 80: "
    with built.failing(0, 35):
        said = interface.text_of(library.unavailable())
    if not said.startswith("CUDA finds no usable GPU: cudaErrorInsufficientDriver, "):
        yield f"no usable GPU is told as {said or 'success'}"
    built.on_device(1)
    with device.replaced(require_native(), device.emulated(interface.publish(placed))):

        def failing(k: int, error: int, wanted: str, launched: list[str]) -> Iterator[str]:
            with built.failing(k, error):
                said = error_of(call)
            if not said.startswith(wanted):
                yield f"error {error} of call {k}, {built.calls[-1]}, is told as {said or 'success'}"
            if list(map(kernel_of, built.launches)) != launched:
                yield f"after error {error} of call {k} the launches are {list(map(kernel_of, built.launches))}"
            if built.left != (0, 0):
                yield f"after error {error} of call {k}, the mode of capture and the last error are {built.left}"

        yield from failing(1, 209, other + image, [])  # as long as the device is not known to take the kernels
        yield from failing(1, 700, f"the device: {broken}", [])
        for _ in range(2):  # the second time knowing that
            built.clear()
            if said := error_of(call):
                yield f"an earlier error is told again, {said}"
        calls, kernels = list(built.calls), list(map(kernel_of, built.launches))
        for k, function in enumerate(calls):
            before = calls[:k].count("cudaLaunchKernel")
            of = f"kernel {kernels[before]}" if function == "cudaLaunchKernel" else "the current device"
            yield from failing(k, 701, f"{of}: {resources}", kernels[:before])
            yield from failing(k, 700, f"{of}: {broken}", kernels[:before])
        built.clear()
        if said := error_of(call):
            yield f"an earlier error is told again, {said}"
        if {launch.device for launch in built.launches} != {1}:
            yield "launches on another device than the arrays'"
        built.on_device(0)
        if (said := error_of(call)) != "device 0 is current, and the arrays are on device 1":
            yield f"another device is told as {said or 'success'}"
    if built.left != (0, 0):
        yield f"the mode of capture and the last error are left at {built.left}"


def error_of(call: Callable[[], object]) -> str:
    """Return the message of the error that a call raises, or nothing."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("calls", [of_sums, of_scores])
def test_launches(calls):
    assert list(complaints(emulation.build("plain"), calls)) == []


def test_launches_by_nvcc():
    """In a process of its own, in which no kernel is loaded yet."""
    sources = cases.TWO_FACTORS
    paths = runtime.build(sources), emulation.build("plain", name="two_factors", sources=sources)
    code = (
        f"from tests.cuda import test_launches as t; print(*t.complaints_of_nvcc(*{list(map(str, paths))}), sep='\\n')"
    )
    assert run_python(code).split("\n") == ["", ""]


@pytest.fixture(scope="module")
def launched():
    path = emulation.build("plain")
    with cases.emulated(path) as library, step_cases.emulated(path), library.recording() as runs:
        for _, call in (*of_sums(), *of_scores()):
            call()
        with library.running_last(0):
            many_blocks()
    return [launch for run in runs for launch in run.launches]


@pytest.mark.parametrize("name", NAMES)
def test_all_kernels_were_among_them(name, launched):
    assert name in set(map(kernel_of, launched))


def test_a_grid_among_them_would_not_fit_the_second_dim(launched):
    assert max(launch.grid[0] for launch in launched) > 65535
