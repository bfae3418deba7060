"""Calls that between them launch every CUDA kernel, and what can be asked of each: results, records, cases, replays.

What lives elsewhere: forms, random operands, the float64 oracle (``conftest.py``), the emulated build (``emulation.py``),
the interpreter of PTX (``ptx.py``).
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import device
from conftest import DTYPES, MIXED, Case, Form, check_both, random, require_native
from tests.cuda import emulation, interface, ptx, sass

FORMS: dict[str, Callable[[int], Form]] = {
    "paired": lambda m: Form("n", ("Bn",) * m),  # forward: rows; backward: columns
    "per row": lambda m: Form("B1", ("Bn",) * m),  # backward: rows
    "vector": lambda m: Form("n1", ("BnO",) * m, dim=1),  # forward: columns
    "candidates": lambda m: Form("n", (*("B1n",) * (m - 1), "BKn")),  # sums of every kind in one pass
}
TWO_FACTORS = (  # what to compile where the whole library would take minutes; kernels first
    pathlib.Path("cuda/sum/combine.cu"),
    pathlib.Path(__file__).with_name("two_factors.cu"),
    pathlib.Path("cuda/launch.cu"),
    pathlib.Path("cuda/sum/plan.cpp"),
    *(pathlib.Path("cuda/scores", name) for name in ("gamma.cu", "merge.cu", "select.cu", "statistics.cu", "steps.cu")),
)
ACTIVATED = ("tanh", "sigmoid", "relu", "silu", "gelu")


def cases(dtypes: Iterable[tuple[str, str]] = (*((d, d) for d in DTYPES), *MIXED)) -> Iterator[tuple[str, Case]]:
    """Yield small calls by name: every kernel of the dtypes (weights, factors), packed or not, plain or not."""
    for weights, dtype in dtypes:
        for name, form in FORMS.items():
            for count in (1, 2, 3, 4, 5):
                for n in (16, 13):
                    rng = np.random.default_rng([count, n])
                    sizes = {"B": 5, "n": n, "O": n, "K": 3}
                    case = form(count).case(rng, dtype, weights, **sizes)
                    label = f"{name}, {weights} and {count} x {dtype}, n={n}"
                    yield label, case
                    case = form(count).case(rng, dtype, weights, activations=ACTIVATED[:count], **sizes)
                    # A mask along the columns, as the vector form's, takes packed operands to the loose kernels.
                    masked = case.masked(rng, "rows", "one")
                    yield f"{label}, activated", case if name == "vector" and n == 16 else masked


def large_cases() -> Iterator[tuple[str, Case]]:
    """Yield calls with sums of several blocks: few rows of many terms, many rows, long runs, tiles of columns."""
    rng = np.random.default_rng(0)
    paired, vector, candidates = FORMS["paired"](2), FORMS["vector"](2), FORMS["candidates"](3)
    yield "a row to several blocks", paired.case(rng, "float32", B=1, n=40_000)
    yield "a row to a block", paired.case(rng, "bfloat16", "float32", B=3, n=20_000)
    yield "many rows", paired.case(rng, "float32", B=3000, n=12)
    yield "tiles of columns", vector.case(rng, "float32", B=2, n=3, O=2500)
    yield "one weight for all", Form("", ("Bn", "Bn")).case(rng, "float32", B=700, n=64)
    yield "weights along a run", vector.case(rng, "float32", B=600, n=3, O=32)
    yield "candidates", candidates.case(rng, "float32", B=40, n=64, K=33)


def sizes() -> Iterator[tuple[str, Case]]:
    """Yield calls of float32 that reach what small ones do not: each showed a foreign bug that no other call did.

    Of two factors, or not packed, so that the kernels of ``two_factors.cu`` are enough.
    """
    rng = np.random.default_rng(0)
    quotient = Form(None, ("AB1n", "A1Kn", "1BKn")).case(rng, "float32", A=2, B=3, K=49, n=7)
    yield "rows whose quotient is off by one", quotient
    yield "a sum for each of many units", Form("B11", ("BKn", "BKn")).case(rng, "float32", B=3000, K=8, n=128)
    yield "gradients stored past the caches", Form("n", ("Bn", "Bn")).case(rng, "float32", B=1100, n=4096)
    form = Form(None, ("ABCKOn", "A1C1On", "1B1K1n"))
    yield "five dims of rows", form.case(rng, "float32", A=2, B=3, C=2, K=3, O=2, n=7)
    yield "a sum over all units", Form("n", ("B1n", "BKn")).case(rng, "float32", B=3000, K=2, n=1023)


def rounded_once(multiple: int = 1) -> Iterator[tuple[str, Case, float]]:
    """Yield sums that float32 would round to the middle between two numbers of the dtype, and what is right.

    Rows of a multiple of 8 start at packets, others do not all.
    """
    for dtype, bits in (("bfloat16", 8), ("float16", 11)):
        for n in (13, 10_007):  # of one block, and of several
            n = -(-n // multiple) * multiple
            terms = np.zeros((3, n), dtype)
            terms[:, [0, 5, 9]] = 1, 2.0**-bits, 2.0**-24  # of two threads at least: exact in float64
            yield f"{dtype} rounded once, n={n}", Case(None, [terms, np.ones_like(terms)]), 1 + 2.0 ** (1 - bits)


def offsets() -> Iterator[tuple[str, Case]]:
    """Yield small calls that are to be spread over memory: those of `cases` that ``two_factors.cu`` has kernels for."""
    for label, case in cases([("float32", "float32")]):
        packed = "n=16" in label
        if not packed or (len(case.factors) == 2 and label.startswith(("paired", "per row"))):
            yield label, case
    for label, case in sizes():
        if label in ("rows whose quotient is off by one", "five dims of rows"):
            yield label, case
    paired = FORMS["paired"](2)
    yield "sums in several parts", paired.case(np.random.default_rng(0), "float32", B=300, n=20)


def both(case: Case) -> list[np.ndarray]:
    """Run forward and backward; return the arrays that are not the case's: recorded runs point to them."""
    rng = np.random.default_rng(1)
    output = case.forward()
    grad_output = random(rng, case.output_shape, np.asarray(output).dtype.name)
    return [output, grad_output, *case.backward(grad_output)]


def long_rows(library: emulation.Library) -> Iterator[tuple[str, bool]]:
    """Run the last blocks alone of calls with more than 2^32 columns; yield by name whether they are right."""
    n, terms = 2**32 + 2**23, np.arange(1.0, 1001, dtype=np.float32)
    f, g = (interface.sparse(4 * 2 * n).view(np.float32).reshape(2, n) for _ in range(2))
    f[:, -1000:], g[:, -1000:] = terms, 2
    with library.running_last(8):  # each of 128 columns or more
        output = device.emulated(library.address).fusion_sum(None, (f[:1], g[:1]), None, None, "one", -1, False)
        yield "columns beyond 2^32, summed", output == 2 * terms.sum()
        u, gradient = np.array([3, 4], np.float32), interface.sparse(4 * n).view(np.float32)
        problem = interface.Problem(2, 1, 4, wide=False, absent=1)
        problem.size[:2] = 2, n
        for operand, array, dims in zip(problem.operand, (u, gradient, f, g), (0b01, 0b10, 0b11, 0b11), strict=False):
            operand.data, operand.dtype, operand.dims = array.ctypes.data, 1, dims
            operand.stride[:2] = operand.grad_stride[:2] = (n if array.ndim == 2 else dims & 1, dims >> 1)
        problem.operand[1].grad = gradient.ctypes.data
        interface.run(interface.library_at(library.address), problem)
        yield "columns beyond 2^32, each by itself", bool((gradient[-1000:] == 14 * terms).all())


def particular(library: emulation.Library, chosen: Callable[[str], bool] = bool) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the calls of `sizes` and the like, by name: "wrong results", or an error."""

    def checked(label: str, check: Callable[[], object]) -> Iterator[tuple[str, str]]:
        try:
            check()
        except (AssertionError, RuntimeError) as error:
            yield label, "wrong results" if isinstance(error, AssertionError) else str(error)

    rng = np.random.default_rng(2)
    for label, case in filter(lambda call: chosen(call[0]), sizes()):
        yield from checked(label, lambda case=case: check_both(case, rng))  # type: ignore[misc]
    for label, case, wanted in rounded_once():
        if chosen(label) and (case.forward() != wanted).any():
            yield label, "wrong results"
    if chosen("columns beyond 2^32"):
        yield from ((label, "wrong results") for label, right in long_rows(library) if not right)
    with spread(library):
        for label, case in filter(lambda call: chosen("spread"), offsets()):
            yield from checked(f"spread over memory, {label}", lambda case=case: check_both(case, rng))  # type: ignore[misc]


@contextmanager
def emulated(path: pathlib.Path) -> Iterator[emulation.Library]:
    """Send NumPy arrays to an emulated build of the CUDA library."""
    library = emulation.Library(path)
    with device.replaced(require_native(), device.emulated(library.address)):
        yield library


@contextmanager
def spread(library: emulation.Library) -> Iterator[None]:
    """Within `emulated`, put 2^32 elements between the entries of each array's outermost dim."""
    native = device.emulated(interface.publish(interface.spread(interface.library_at(library.address))))
    try:
        yield
    finally:
        native.use_cuda(library.address)


def write(library: emulation.Library, folder: pathlib.Path, chosen: Iterable[tuple[str, Case]]) -> list[pathlib.Path]:
    """Check the calls against the oracle, and write the runs they make as cases for the sanitized builds."""
    with library.writing_cases(folder):
        for _, case in chosen:
            check_both(case, np.random.default_rng(2))
    return sorted(folder.glob("*.case"))


# ---- the PTX that nvcc emits -------------------------------------------------------------------------------------------


@functools.cache
def modules() -> tuple[ptx.Module, ...]:
    """Take the PTX out of the library that was built, and parse it."""
    return tuple(map(ptx.parse, sass.ptx_of(sass.require_library())))


def executed(
    run: emulation.Run, parsed: Sequence[ptx.Module], schedule: Any = "lockstep", most_blocks: int | None = None
) -> tuple[list[ptx.Report], list[ptx.Segment]]:
    """Execute the PTX of a recorded run whose memory still is; return a report for each launch, and the memory.

    Memory is what it was: outputs and workspace uninitialised, all else read-only. With `most_blocks`, only so many of a
    grid, the first, are run.
    """
    segments: list[ptx.Segment] = []
    before = {span.begin: span.before for span in run.spans if span.before}
    for begin, end, role in merged(run.spans):
        written = role in ("grad", "workspace")
        if written:
            data = np.full(end - begin, 0xA5, np.uint8)
        else:
            data = np.frombuffer(before.get(begin) or ctypes.string_at(begin, end - begin), np.uint8).copy()
        segments.append(ptx.Segment(begin, data, written or role == "state", not written, role))
    reports = []
    for launch in run.launches:
        module = next(m for m in parsed if launch.kernel in m.entries)
        grid = launch.grid if most_blocks is None else (min(most_blocks, launch.grid[0]), 1, 1)
        given = (launch.kernel, grid, launch.block, launch.parameters, segments)
        reports.append(ptx.launch(module, *given, schedule=schedule))
    return reports, segments


def replayed(
    run: emulation.Run, parsed: Sequence[ptx.Module], schedule: Any = "lockstep"
) -> tuple[list[ptx.Report], list[str]]:
    """Execute the PTX of a recorded run; return its reports, and where its bits differ."""
    reports, segments = executed(run, parsed, schedule)
    after_of = {span.begin: span.after for span in run.spans if span.after}
    different = []
    for segment in segments:
        if segment.name not in ("grad", "state"):
            continue
        after = after_of.get(segment.address) or ctypes.string_at(segment.address, segment.data.size)
        now = np.frombuffer(after, np.uint8)
        if (now != segment.data).any():
            different.append(f"{(now != segment.data).sum()} bytes of {segment.data.size} at {segment.address:#x}")
    return reports, different


def merged(spans: Iterable[emulation.Span]) -> list[tuple[int, int, str]]:
    """Join spans that overlap, as those of one array given twice do."""
    joined: list[tuple[int, int, str]] = []
    for begin, end, role in sorted((s.begin, s.begin + s.bytes, s.role) for s in spans if s.bytes):
        if joined and begin < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]), joined[-1][2])
        else:
            joined.append((begin, end, role))
    return joined
