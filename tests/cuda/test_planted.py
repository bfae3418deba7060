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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import TESTS, Case, Form, check_both, run_python
from fusionsum import chunks
from tests.cuda import cases, emulation, planted, ptx, runtime, sass, step_cases, test_launches

# What a sanitizer says in a line. Of ThreadSanitizer only races in kernels: it stumbles over memory too, depending on
# what lies beside an array, and takes what is freed after a failed launch for a race with threads that did not end.
SUMMARY = {
    "address": re.compile(r"SUMMARY: AddressSanitizer: .*|.*runtime error: .*"),
    "thread": re.compile(
        r"SUMMARY: ThreadSanitizer: data race .*(?:/csrc/cuda/.* in | in (?:void )?fusionsum::cuda::).*"
    ),
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
    yield "absent", Form(None, ("Bn", "Bn")).case(rng, "float32", B=9, n=13).masked(rng, "rows", "one")
    yield "a candidate for each", candidates.case(rng, "float32", B=4, n=13, K=9)
    yield "long rows", rows.case(rng, "float32", B=3, n=1100)
    yield "long runs", paired.case(rng, "float32", B=145, n=20)
    yield "tiles of rows", paired.case(rng, "float32", B=2, n=8200)
    yield "tiles of rows, not packed", rows.case(rng, "float32", B=1, n=8203)
    yield "tiles of columns, split runs", vector.case(rng, "float32", B=2, n=40, O=261)
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
    for complaint in test_launches.complaints(pathlib.Path(library), test_launches.of_sums):
        print(complaint, flush=True)


def by_steps(library: str, right: str) -> None:
    """Print which results of steps of scores are not those of the `right` library, in chunks large and small."""
    for call in step_cases.PLANTED:
        for most in (chunks.CHUNK_BYTES, 2**10):
            found = []
            for path in (right, library):
                with step_cases.emulated(pathlib.Path(path), most):
                    try:
                        found.append([None if x is None else x.numpy().tobytes() for x in step_cases.results(*call)])
                    except RuntimeError as error:
                        print(f"{error}: {call}", flush=True)
            if found[0] != found[-1]:
                print(f"wrong results: {call}, {most}", flush=True)


def by_launches_of_steps(library: str) -> None:
    """Print what is wrong with the launches of steps of scores."""
    for complaint in test_launches.complaints(pathlib.Path(library), test_launches.of_scores):
        print(complaint, flush=True)


def by_interpreted_steps(right: str, csrc: str, folder: str) -> None:
    """Print the findings in the steps' PTX, and where its bits are not those that the `right` library finds."""
    parsed = interpreted(
        csrc, folder, [x for x in cases.TWO_FACTORS if x.parent.name == "scores" and x.stem != "steps"]
    )
    seen = set()
    with step_cases.emulated(pathlib.Path(right)) as library:
        for call in step_cases.PLANTED:
            with library.recording() as runs:
                step_cases.results(*call)
            for run in runs:
                kernels = tuple(launch.kernel for launch in run.launches)
                if (kernels, call[1]) in seen or sum(launch.grid[0] for launch in run.launches) > 64:
                    continue
                seen.add((kernels, call[1]))
                said(*cases.replayed(run, parsed), str(call))


def by_nvcc(built: str, library: str) -> None:
    """Print what is wrong with the launches of nvcc's code."""
    for complaint in test_launches.complaints_of_nvcc(pathlib.Path(built), pathlib.Path(library)):
        print(complaint, flush=True)


def by_interpreter(library: str, right: str, csrc: str, folder: str) -> None:
    """Print the findings in the calls' PTX, and where its bits differ from those that the `right` library finds."""
    parsed = interpreted(csrc, folder, cases.TWO_FACTORS[:2])
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
            said(*cases.replayed(run, parsed), label)


def interpreted(csrc: str, folder: str, sources: Sequence[pathlib.Path]) -> list[ptx.Module]:
    """Compile sources to PTX by nvcc, and parse it."""
    flags = ["--options-file", str(pathlib.Path(csrc) / "cuda" / "nvcc.options"), "--ptx", "-arch=compute_80"]
    command = [sass.require_tool("nvcc"), *flags, "-I", csrc]

    def compiled(source: pathlib.Path) -> ptx.Module:
        to = pathlib.Path(folder, f"{source.stem}.ptx")
        subprocess.run([*command, str(pathlib.Path(csrc) / source), "-o", str(to)], check=True)
        return ptx.parse(to.read_text())

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def said(reports: Sequence[ptx.Report], different: Sequence[str], label: str) -> None:
    """Print what the interpreter found in a run."""
    for finding in (finding for report in reports for finding in report.findings):
        print(f"{finding.kind}: {label}", flush=True)
    if different:
        print(f"different bits: {label}", flush=True)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Files of the calls, with the results of the sources without bugs."""
    with cases.emulated(build("plain", None)) as library:
        return cases.write(library, tmp_path_factory.mktemp("cases"), calls())


@pytest.fixture(scope="session")
def written_steps(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Files of the steps, alike."""
    folder = tmp_path_factory.mktemp("steps")
    files = []
    for most in (chunks.CHUNK_BYTES, 2**12):
        (folder / str(most)).mkdir()
        with step_cases.emulated(build("plain", None), most) as library, library.writing_cases(folder / str(most)):
            for call in step_cases.PLANTED:
                step_cases.results(*call)
        files += sorted((folder / str(most)).glob("*.case"))
    return files


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
    of_scores = bug and bug.of_scores
    if of_scores and stage in emulated:
        names = {"plain": ("by_steps", build("plain", bug), build("plain", None))}
        return isolated(*map(str, names.get(stage, ("by_launches_of_steps", build("plain", bug)))))
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
        if of_scores:
            return isolated("by_interpreted_steps", *map(str, (right, csrc, folder)))
        return isolated("by_interpreter", *map(str, (library, right, csrc, folder)))
    # A race is one in any order, and ThreadSanitizer is slow.
    schedules = emulation.SCHEDULES[:1] if stage == "thread" else emulation.SCHEDULES
    files = request.getfixturevalue("written_steps" if of_scores else "written")
    done = emulation.replay(build(stage, bug), files, schedules)
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
