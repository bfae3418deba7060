"""Planted bugs must be caught, and the sources without them must pass: the same stages, the same calls.

Each bug goes through the first stage that its row names; with FUSIONSUM_ALL_PLANTED=1 through all, which must
catch it where the row says so and nowhere else. What lives elsewhere: the bugs and the table in the docs
(``planted.py``), the kernels they are planted into (``two_factors.cu``), the stages (``emulation.py``, ``cases.py``).
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import TESTS, Case, Form, check_both, run_python
from tests.cuda import cases, emulation, planted, ptx, runtime, sass, test_launches

# What a sanitizer says in a line. Of ThreadSanitizer only races in kernels: it stumbles over memory too, depending on
# what lies beside an array, and takes what is freed after a failed launch for a race with threads that did not end.
SUMMARY = {
    "address": re.compile(r"SUMMARY: AddressSanitizer: .*|.*runtime error: .*"),
    "thread": re.compile(r"SUMMARY: ThreadSanitizer: data race .* in (?:void )?fusionsum::cuda::.*"),
}
EVERY = os.environ.get("FUSIONSUM_ALL_PLANTED") == "1"
CHOSEN = [
    (bug, stage)
    for bug in planted.BUGS
    for stage in (planted.STAGES if EVERY else [bug.stages[0][0]])
    if bug.reaches(stage)
]


def calls() -> Iterator[tuple[str, Case]]:
    """Yield the calls that every bug is looked for with: two packed factors, or operands that are not packed."""
    rng = np.random.default_rng(0)
    paired, rows, candidates = (cases.FORMS[name](2) for name in ("paired", "per row", "candidates"))
    one_weight, vector = Form("", ("Bn", "Bn")), Form(None, ("BnO", "BnO"), dim=1)
    for n in (16, 13):
        case = paired.case(rng, "float32", B=5, n=n, activations=["sigmoid", "tanh"])
        yield f"activated and masked, n={n}", case.masked(rng, "rows", "one")
        yield f"a weight a row, n={n}", rows.case(rng, "float32", B=5, n=n)
        yield f"one weight, n={n}", one_weight.case(rng, "float32", B=70, n=n)
    yield "mixed", paired.case(rng, "bfloat16", "float32", B=5, n=13)
    yield "a candidate for each", candidates.case(rng, "float32", B=4, n=13, K=9)
    yield "long rows", rows.case(rng, "float32", B=3, n=1100)
    yield "long runs", paired.case(rng, "float32", B=45, n=20)
    yield "tiles of rows", paired.case(rng, "float32", B=2, n=8200)
    yield "tiles of rows, not packed", rows.case(rng, "float32", B=1, n=2051)
    yield "tiles of columns, split runs", vector.case(rng, "float32", B=2, n=19, O=261)
    yield from ((label, case) for label, case, _ in cases.rounded_once() if case.shape[-1] == 13)
    yield "rows that do not start at a packet", paired.case(rng, "float32", B=5, n=20).mapped(lambda z: z[..., 1:17])


def by_emulation(library: str) -> None:
    """Print what is wrong with the calls' results, and what the emulator reports."""
    with cases.emulated(pathlib.Path(library)) as emulated:
        for schedule in emulation.SCHEDULES:
            emulated.schedule(schedule)
            for label, case in calls():
                try:
                    check_both(case, np.random.default_rng(2))
                except AssertionError:
                    print(f"wrong results: {label}, {schedule}", flush=True)
                except RuntimeError as error:
                    print(f"{error}: {label}, {schedule}", flush=True)


def by_sizes(library: str, evidence: str) -> None:
    """Print which particular calls have wrong results: of the one that the evidence names, or of all."""
    with cases.emulated(pathlib.Path(library)) as emulated:
        for label, said in cases.particular(emulated, lambda label: label in (evidence or label)):
            print(f"{said}: {label}", flush=True)


def by_launches(library: str) -> None:
    """Print what is wrong with the launches."""
    for complaint in test_launches.complaints(pathlib.Path(library)):
        print(complaint, flush=True)


def by_nvcc(built: str, library: str) -> None:
    """Print what is wrong with the launches of nvcc's code."""
    for complaint in test_launches.complaints_of_nvcc(pathlib.Path(built), pathlib.Path(library)):
        print(complaint, flush=True)


def by_interpreter(library: str, right: str, csrc: str, folder: str) -> None:
    """Print the findings in the calls' PTX, and where its bits differ from those that the `right` library finds."""
    flags = ["--options-file", str(pathlib.Path(csrc) / "cuda" / "nvcc.options"), "--ptx", "-arch=compute_80"]
    command = [sass.require_tool("nvcc"), *flags, "-I", csrc]

    def compiled(source: pathlib.Path) -> ptx.Module:
        to = pathlib.Path(folder, f"{source.stem}.ptx")
        subprocess.run([*command, str(pathlib.Path(csrc) / source), "-o", str(to)], check=True)
        return ptx.parse(to.read_text())

    with ThreadPoolExecutor(2) as pool:
        parsed = list(pool.map(compiled, cases.TWO_FACTORS[:3]))
    for label, case in calls():
        with cases.emulated(pathlib.Path(right)):
            expected = cases.both(case)
        with cases.emulated(pathlib.Path(library)) as emulated, emulated.recording() as runs:
            try:
                found = cases.both(case)
            except RuntimeError:
                if library == right:
                    raise
                continue  # of what the planner planned and the emulator refuses there are no results to compare
        for array, bits in zip(found, expected, strict=True):
            array[...] = bits
        for run in runs:  # in lockstep: races are found by clocks, whatever the order
            reports, different = cases.replayed(run, parsed)
            for finding in (finding for report in reports for finding in report.findings):
                print(f"{finding.kind}: {label}", flush=True)
            if different:
                print(f"different bits: {label}", flush=True)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Files of the calls, with the results of the sources without bugs."""
    with cases.emulated(build("plain", None)) as library:
        return cases.write(library, tmp_path_factory.mktemp("cases"), calls())


def build(variant: str, bug: planted.Bug | None) -> pathlib.Path:
    return emulation.build(variant, bug, name="two_factors", sources=cases.TWO_FACTORS)


def isolated(function: str, *arguments: object) -> list[str]:
    """Call a function of this file in another process, which a bug may crash or hang; return the lines it printed."""
    code = f"from tests.cuda import test_planted; test_planted.{function}(*{arguments!r})"
    try:
        return run_python(code, timeout=300, PYTHONPATH=os.pathsep.join(sys.path)).splitlines()
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return str(error).splitlines()


def complaints(stage: str, bug: planted.Bug | None, request: pytest.FixtureRequest) -> list[str]:
    """Run the calls through a stage; return what it says about them. Sanitizers say nothing of wrong results."""
    emulated = {"plain": "by_emulation", "sizes": "by_sizes", "launches": "by_launches"}
    if stage in emulated:
        found = dict(bug.stages).get(stage, "") if bug else ""
        evidence = [found if ": " in found else ""] if stage == "sizes" else []
        return isolated(emulated[stage], str(build("plain", bug)), *evidence)
    if stage == "nvcc":
        return isolated("by_nvcc", str(runtime.build(cases.TWO_FACTORS, bug)), str(build("plain", bug)))
    if stage == "bindings":
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_bindings.py")]
        environment = os.environ | {"FUSIONSUM_TEST_CORE": str(emulation.build_bindings(bug))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if stage == "ptx":
        sass.require_tool("nvcc")
        right = build("plain", None)
        library = build("plain", bug) if bug and bug.file == "cuda/sum/plan.cpp" else right
        folder = sass.ROOT / "build" / "cuda-ptx" / (bug.name if bug else "two_factors")
        folder.mkdir(parents=True, exist_ok=True)
        csrc = folder / "csrc" if bug else sass.ROOT / "csrc"
        if bug:
            planted.plant(bug, sass.ROOT / "csrc", csrc)
        return isolated("by_interpreter", *map(str, (library, right, csrc, folder)))
    # A race is one in any order, and ThreadSanitizer is slow.
    schedules = emulation.SCHEDULES[:1] if stage == "thread" else emulation.SCHEDULES
    done = emulation.replay(build(stage, bug), request.getfixturevalue("written"), schedules)
    assert bug or done.returncode == 0, done.stdout + done.stderr
    return SUMMARY[stage].findall(done.stderr)


@pytest.mark.parametrize("stage", planted.STAGES)
def test_nothing_planted(stage: str, request: pytest.FixtureRequest) -> None:
    assert complaints(stage, None, request) == []


@pytest.mark.parametrize(("bug", "stage"), [pytest.param(b, s, id=f"{b.name}-{s}") for b, s in CHOSEN])
def test_planted(bug: planted.Bug, stage: str, request: pytest.FixtureRequest) -> None:
    said = complaints(stage, bug, request)
    evidence = dict(bug.stages).get(stage)
    assert any(evidence in line for line in said) if evidence else not said, said


def test_every_stage_is_needed_by_several() -> None:
    chosen = [bug.stages[0][0] for bug in planted.BUGS]
    assert all(chosen.count(stage) > 2 for stage in planted.STAGES)


def test_the_docs_have_the_table() -> None:
    assert planted.table() in (sass.ROOT / "docs" / "cuda_verification.md").read_text()
