"""What the library asks of CUDA's runtime: each launch on the caller's stream and device, none that is unchecked.

What lives elsewhere: the runtime that is emulated (``emulator.h``), what the kernels compute (``test_emulated.py``), the
bindings' side (``test_bindings.py``).
"""

from __future__ import annotations

import numpy as np
import pytest

from conftest import Case, Form, check_both
from tests.cuda import cases, emulation


@pytest.fixture(scope="module")
def plain():
    return emulation.build("plain")


def several() -> dict[str, Case]:
    """Calls that take several launches: sums in parts, which are combined, and derivatives of several reaches."""
    rng = np.random.default_rng(0)
    return {
        "weights": Form("n", ("Bn", "Bn")).case(rng, "float32", B=600, n=20),
        "candidates": Form("n", ("B1n", "B1n", "BKn")).case(rng, "float32", B=40, K=9, n=16),
        "long rows": Form("B1", ("Bn", "Bn")).case(rng, "float32", B=2, n=8200),
        "any operands": Form("n", ("Bn",) * 5).case(rng, "float32", B=300, n=13),
    }


@pytest.mark.parametrize("name", several())
def test_launches_go_to_the_callers_stream_and_device(name, plain):
    with cases.emulated(plain) as library, library.recording() as runs:
        cases.both(several()[name])
    launches = [launch for run in runs for launch in run.launches]
    assert len(launches) > 2 and any("combine" in launch.kernel for launch in launches)
    assert {(launch.stream, launch.device) for launch in launches} == {(emulation.STREAM, 0)}


@pytest.mark.parametrize("name", several())
def test_every_launch_is_checked(name, plain):
    """Whichever launch fails, the call raises an error that names the kernel; and the next call knows nothing of it."""
    case = several()[name]
    with cases.emulated(plain) as library:
        with library.recording() as runs:
            cases.both(case)
        kernels = [launch.kernel for run in runs for launch in run.launches]
        for k, kernel in enumerate(kernels):
            named = next(word for word in ("combine", "columns", "rows") if word in kernel)
            with library.failing_after(k), pytest.raises(RuntimeError) as raised:
                cases.both(case)
            assert str(raised.value).startswith(f"kernel {named}: cudaErrorLaunchOutOfResources, a failure that was as")
            assert library.native.cudaGetLastError() == 0 if hasattr(library.native, "cudaGetLastError") else True
        library.reports()
        check_both(case, np.random.default_rng(2))


def test_another_device_that_is_current_is_an_error(plain):
    case = several()["weights"]
    with cases.emulated(plain) as library:
        with library.on_device(1), pytest.raises(RuntimeError, match="device 1 is current, and the arrays are on device 0"):
            cases.both(case)
        cases.both(case)
