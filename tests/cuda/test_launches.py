"""What the library asks of CUDA's runtime: each launch on the caller's stream and device, none that is unchecked.

What lives here: `complaints`, which planted bugs go through too (``test_planted.py``). What lives elsewhere: the runtime
that is emulated (``emulator.h``), what kernels compute (``test_emulated.py``), the bindings' side (``test_bindings.py``).
"""

from __future__ import annotations

import pathlib
import re
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from conftest import Case, Form
from tests.cuda import cases, emulation

NAMES = ("combine", "columns", "rows")
# Where the sizes of dims lie in the parameters, and where their reciprocals, of how many dims: pass.h.
RECIPROCALS = {"combine": (32, 208, 11), "columns": (8, 88, 10), "rows": (8, 88, 10)}


def several() -> Iterator[tuple[str, Case]]:
    """Yield calls that take several launches: sums in parts, which are combined, and derivatives of several reaches."""
    rng = np.random.default_rng(0)
    yield "weights", Form("n", ("Bn", "Bn")).case(rng, "float32", B=600, n=20)
    yield "candidates", Form("n", ("B1n", "B1n", "BKn")).case(rng, "float32", B=40, K=9, n=13)
    yield "long rows", Form("B1", ("Bn", "Bn")).case(rng, "float32", B=2, n=8200)
    yield "any operands", Form("n", ("Bn",) * 5).case(rng, "float32", B=300, n=13)
    yield "five dims of rows", dict(cases.sizes())["five dims of rows"]


def kernel_of(launch: emulation.Launch) -> str:
    return next(name for name in NAMES if re.search(rf"\d{name}[IE]", launch.kernel))


def complaints(path: pathlib.Path) -> Iterator[str]:
    """Yield what is wrong with a build's launches."""
    with cases.emulated(path) as library:
        for label, case in several():
            with library.recording() as runs:
                said = error_of(case)
            if said:
                yield f"{said}: {label}"
                continue
            launches = [launch for run in runs for launch in run.launches]
            for launch in launches:
                if launch.stream != emulation.STREAM:
                    yield f"another stream: {kernel_of(launch)}, {label}"
                sizes, inverses, dims = RECIPROCALS[kernel_of(launch)]
                for size, inverse in zip(
                    struct.unpack_from(f"{dims}q", launch.parameters, sizes),
                    struct.unpack_from(f"{dims}d", launch.parameters, inverses),
                    strict=True,
                ):
                    if size and inverse != 1 / size:
                        yield f"the reciprocal of {size} is {inverse!r}: {label}"
            for k, launch in enumerate(launches):
                with library.failing_after(k):
                    said = error_of(case)
                wanted = f"kernel {kernel_of(launch)}: cudaErrorLaunchOutOfResources, a failure that was asked for"
                if not said.startswith(wanted):
                    yield f"a failure of launch {k}, {kernel_of(launch)}, is told as {said or 'success'}: {label}"
            library.reports()
            with library.on_device(1):
                said = error_of(case)
            if said != "device 1 is current, and the arrays are on device 0":
                yield f"another device is told as {said or 'success'}: {label}"
            if said := error_of(case):
                yield f"an earlier error is told again, {said}: {label}"


def error_of(case: Case) -> str:
    """Return the message of the error that a call raises, or nothing."""
    try:
        cases.both(case)
    except RuntimeError as error:
        return str(error)
    return ""


def test_launches():
    assert list(complaints(emulation.build("plain"))) == []


@pytest.mark.parametrize("name", NAMES)
def test_all_kernels_were_among_them(name):
    with cases.emulated(emulation.build("plain")) as library, library.recording() as runs:
        for _, case in several():
            cases.both(case)
    assert name in {kernel_of(launch) for run in runs for launch in run.launches}
