"""The emulator tested by itself: right programs are right under every schedule, and each kind of misuse is caught.

The programs are ``emulator_probe.cu``; ``driver.cpp`` replays them under sanitizers as it does the library's.
"""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.cuda import emulation, planted

PROBE = pathlib.Path(__file__).with_name("emulator_probe.cu")
SCHEDULES = (*emulation.SCHEDULES, "random:2", "random:3")
N, OUTPUTS = 960, 64
INPUT = (np.arange(N) % 13).astype(np.float32)  # sums of which are exact in any order

LANES = np.arange(OUTPUTS) % 32
ZEROS = np.zeros(OUTPUTS, np.float32)
RIGHT = {
    "tree": np.array([INPUT.sum()]),
    "two_stages": np.array([INPUT.sum()]),
    "shuffles": np.repeat(INPUT.reshape(-1, 2, 32).sum((0, 2)), 32) - (LANES < 31) + LANES,
    "packets": INPUT,
}
# Reported whatever the schedule and build: a part of the report.
MISUSE = {
    "uneven_barrier": "threads of a block wait at different __syncthreads",
    "early_exit": "exit",
    "stuck": "deadlock",
    "divergent_shuffle": "exit",
    "outside_mask": "the calling lane is not in the mask",
    "masked_source": "a shuffle reads from a lane that is not in its mask",
    "mixed_shuffles": "lanes of one mask meet in different warp collectives",
    "partial_warp": "names a lane the block does not have",
    "misaligned_load": "a misaligned access",
    "misaligned_store": "a misaligned access",
    "much_shared": "more shared memory than 48 KiB",
    "small": "a grid of an impossible size",
    "large_block": "a block of an impossible size",
    "long_second_dim": "a grid of an impossible size",
    "much_dynamic": "shared memory of an impossible size",
    "much_in_all": "more shared memory than 48 KiB",
}
# Silent under one schedule, visible under another: what is right, and under which schedules it must not come out.
VISIBLE = {
    "missing_barrier": (INPUT[: OUTPUTS // 2].repeat(2), ("reverse", "random:1")),
    "missing_second_barrier": (INPUT[:OUTPUTS][::-1], ("forward", "reverse", "random:1")),
    "uninitialised": (INPUT[:OUTPUTS], SCHEDULES),
}
# What the plain build may take for right: the variant that does not, and a part of its report.
SANITIZED = {
    "missing_barrier": ("thread", "data race"),
    "missing_syncwarp": ("thread", "data race"),
    "missing_second_barrier": ("thread", "data race"),
    "block_race": ("thread", "data race"),
    "block_race_packet": ("thread", "data race"),
    "block_race_read": ("thread", "data race"),
    "read_past_global": ("address", "heap-buffer-overflow"),
    "write_past_global": ("address", "heap-buffer-overflow"),
    "write_before_global": ("address", "ERROR: AddressSanitizer"),
    "write_past_workspace": ("address", "heap-buffer-overflow"),
    "read_past_shared": ("address", "heap-buffer-overflow"),
    "write_past_shared": ("address", "heap-buffer-overflow"),
    "index_past_shared": ("address", "index 33 out of bounds"),
}


@pytest.fixture(scope="module")
def library() -> emulation.Library:
    library = emulation.Library(emulation.build("plain", name="probe", sources=[PROBE]))
    library.native.probe_run.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def drivers() -> dict[str, pathlib.Path]:
    return {variant: emulation.build(variant, name="probe", sources=[PROBE]) for variant in ("address", "thread")}


def run(library: emulation.Library, program: str, size: int = OUTPUTS) -> tuple[str, np.ndarray]:
    """Error text, or "", and the output; both arrays have room beyond what the program is told of."""
    data = np.zeros(N + 64, np.float32)
    data[:N] = INPUT
    out = np.full(N + 64, -1, np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (data, out[16:])]
    error = library.native.probe_run(program.encode(), pointers[0], N, pointers[1], size)
    return (error or b"").decode(), out[16 : 16 + size]


def case(library: emulation.Library, program: str, folder: pathlib.Path, size: int = OUTPUTS) -> pathlib.Path:
    """Record a run that the plain build takes for right."""
    folder.mkdir(exist_ok=True)
    library.schedule("forward")
    with library.writing_cases(folder):
        assert run(library, program, size)[0] == ""
    return folder / "0.case"


def replay(drivers: Any, variant: str, path: pathlib.Path, schedules: Sequence[str] = ("forward",)) -> Any:
    return emulation.replay(drivers[variant], [path], schedules)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("program", RIGHT)
def test_right_programs(library: emulation.Library, program: str, schedule: str) -> None:
    library.schedule(schedule)
    expected = RIGHT[program]
    error, out = run(library, program, expected.size)
    assert error == ""
    np.testing.assert_array_equal(out, expected)
    assert library.reports() == []


@pytest.mark.parametrize("variant", ["address", "thread"])
@pytest.mark.parametrize("program", RIGHT)
def test_sanitizers_accept_right_programs(
    library: emulation.Library, drivers: Any, program: str, variant: str, tmp_path: pathlib.Path
) -> None:
    path = case(library, program, tmp_path, RIGHT[program].size)
    done = replay(drivers, variant, path, SCHEDULES)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{path} {schedule} ok" for schedule in SCHEDULES]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("program", MISUSE)
def test_misuse_is_reported(library: emulation.Library, program: str, schedule: str) -> None:
    library.schedule(schedule)
    error, _ = run(library, program)
    assert MISUSE[program] in error
    if "impossible" not in error:
        assert "emulator_probe.cu:" in error and "block (" in error and "thread (" in error
    assert "kernel " in error and "Probe" in error
    assert library.reports() == [error]
    test_right_programs(library, "tree", schedule)  # the emulator is as good as new


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_report_says_where(library: emulation.Library, schedule: str) -> None:
    library.schedule(schedule)
    lines = PROBE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "void stuck(" in line)
    error, _ = run(library, "stuck")
    assert f"emulator_probe.cu:{start + 2}: thread (0, 0, 0) waits in a warp collective" in error
    assert f"emulator_probe.cu:{start + 3}: thread (31, 0, 0) waits at __syncthreads" in error
    assert error.endswith("kernel stuck(Probe)")


@pytest.mark.parametrize(("program", "schedule"), [(p, s) for p, (_, schedules) in VISIBLE.items() for s in schedules])
def test_schedules_show(library: emulation.Library, program: str, schedule: str) -> None:
    library.schedule(schedule)
    error, out = run(library, program)
    assert error == "" and not np.array_equal(out, VISIBLE[program][0])


@pytest.mark.parametrize("program", SANITIZED)
def test_sanitizers_catch(library: emulation.Library, drivers: Any, program: str, tmp_path: pathlib.Path) -> None:
    variant, report = SANITIZED[program]
    right = case(library, "two_stages", tmp_path / "right", 1)  # what went before hides nothing
    done = emulation.replay(drivers[variant], [right, case(library, program, tmp_path / "wrong")], ["forward"])
    assert done.stdout.startswith(f"{right} forward ok\n")
    assert done.returncode == 66, done.stdout
    assert report in done.stderr and f"{program}(Probe)" in done.stderr and "emulator_probe.cu:" in done.stderr


def test_replay_compares(library: emulation.Library, drivers: Any, tmp_path: pathlib.Path) -> None:
    path = case(library, "packets", tmp_path, N)
    contents = bytearray(path.read_bytes())
    contents[-5] ^= 1
    path.write_bytes(contents)
    done = replay(drivers, "address", path)
    assert done.returncode == 1
    assert done.stdout == f"{path} forward gradient of operand 0 differs at byte {4 * N - 5} of {4 * N}\n"
    unwritten = replay(drivers, "address", case(library, "tree", tmp_path, 2))  # it writes one number
    assert unwritten.returncode == 1 and "differs at byte 4 of 8" in unwritten.stdout
    path.write_bytes(contents[:-1])
    with_error = replay(drivers, "address", path)
    assert with_error.returncode not in (0, 1) and "has not the length it should" in with_error.stderr


def test_recording(library: emulation.Library) -> None:
    library.schedule("forward")
    with library.recording() as runs:
        run(library, "two_stages", 1)
        run(library, "packets", N)
    run(library, "tree", 1)
    assert [[launch.kernel for launch in run.launches] for run in runs] == [["_Z4tree5Probe"] * 2, ["_Z7packets5Probe"]]
    first, second = runs[0].launches
    assert (first.grid, first.block, second.grid) == ((8, 1, 1), (64, 1, 1), (1, 1, 1))
    assert [(s.operand, s.role, s.bytes) for s in runs[0].spans] == [
        (0, "grad", 4),
        (1, "data", 4 * N),
        (-1, "workspace", 256),
    ]
    out, data, workspace = (span.begin for span in runs[0].spans)
    words = np.frombuffer(first.parameters, np.uint64, 3)
    np.testing.assert_array_equal(words, [data, workspace, out])
    np.testing.assert_array_equal(np.frombuffer(second.parameters, np.uint64, 2), [workspace, out])


def test_names_of_schedules(library: emulation.Library) -> None:
    for name in ("", "Forward", "random", "random:", "random:x", "random:1 "):
        with pytest.raises(ValueError, match="expected 'forward', 'reverse' or"):
            library.schedule(name)


def test_planting(tmp_path: pathlib.Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("one two two")
    bug = planted.Bug("a bug", "a.cu", "one", "three", ())
    planted.plant(bug, tmp_path / "csrc", tmp_path / "copy")
    assert (tmp_path / "copy" / "a.cu").read_text() == "three two two"
    for old, found in (("two", 2), ("four", 0)):
        with pytest.raises(ValueError, match=f"its old text {found} times"):
            planted.plant(planted.Bug("a bug", "a.cu", old, "", ()), tmp_path / "csrc", tmp_path / "copy")


def test_builds_are_kept(tmp_path: pathlib.Path) -> None:
    first = emulation.build("plain", name="probe", sources=[PROBE]).stat().st_mtime_ns
    assert emulation.build("plain", name="probe", sources=[PROBE]).stat().st_mtime_ns == first
    broken = tmp_path / "broken.cu"
    broken.write_text("broken")
    with pytest.raises(RuntimeError, match="broken"):
        emulation.build("plain", name="broken", sources=[broken])


def test_environment_names_the_schedule(drivers: Any) -> None:
    command = [str(drivers["address"])]
    done = subprocess.run(command, env={"FUSIONSUM_EMULATOR_SCHEDULE": "sideways"}, capture_output=True, text=True)
    assert done.returncode == 2 and "expected forward, reverse or random:<seed>" in done.stderr
