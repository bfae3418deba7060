"""Memory: any layout of the operands, reads and offsets at its edges.

What lives elsewhere: the kernels' error on plain arrays (``test_kernel.py``), allocation (``test_parallel.py``).
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import (
    ACTIVATIONS,
    DTYPES,
    FORMS,
    MIXED,
    TABLE,
    Case,
    check_backward,
    check_both,
    check_forward,
    check_within,
    oracle,
    random,
    require_native,
    run_python,
    widened,
)

native = require_native()
MAP_NORESERVE = 0x4000  # Linux; the mmap module has it from Python 3.13 on

pytestmark = pytest.mark.usefixtures("kernels_only")


# Layouts


def stepped(array, steps):
    """Put the values `steps` elements apart on each axis (negative: backwards), in memory that is otherwise NaN."""
    memory = np.full([n * abs(s) for n, s in zip(array.shape, steps, strict=True)], np.nan, array.dtype)
    view = memory[(..., *(slice(None, None, s) for s in steps))]
    view[...] = array
    return view


def on_axis(axis, step):
    """Step by 1 but on one axis, where the array has it."""
    return lambda a: stepped(a, [step if i in (axis, axis + a.ndim) else 1 for i in range(a.ndim)])


def shifted(array, elements=1):
    memory = np.full(array.size + elements, np.nan, array.dtype)
    view = memory[elements:].reshape(array.shape)
    view[...] = array
    return view


def framed(array):
    memory = np.full([n + 2 for n in array.shape], np.nan, array.dtype)
    view = memory[(..., *[slice(1, -1)] * array.ndim)]
    view[...] = array
    return view


def swapped(array):
    return array if array.ndim < 2 else array.swapaxes(-1, -2).copy().swapaxes(-1, -2)


def repeated(axis):
    """Stride 0: one entry of the axis stands for all."""

    def layout(a):
        if a.ndim < (axis + 1 if axis >= 0 else -axis) or not a.size:
            return a
        return np.broadcast_to(np.take(a, [0], axis), a.shape)

    return layout


def read_only(array):
    array.flags.writeable = False
    return array


LAYOUTS = {
    "Fortran order": lambda a: a.copy(order="F"),
    "last two axes swapped": swapped,
    **{f"step {step} on axis {axis}": on_axis(axis, step) for step in (2, 3, -1, -2) for axis in (0, -2, -1)},
    "step 2 everywhere": lambda a: stepped(a, [2] * a.ndim),
    "reversed everywhere": lambda a: stepped(a, [-1] * a.ndim),
    **{f"stride 0 on axis {axis}": repeated(axis) for axis in (0, 1, -1)},
    "stride 0 everywhere": lambda a: np.broadcast_to(a.reshape(-1)[0] if a.size else a, a.shape),
    "offset by one element": shifted,
    "framed": framed,
    "read-only": read_only,
}


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + list(MIXED), ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form, layout, dtypes, rng):
    case = FORMS[form].case(rng, dtypes[1], dtypes[0], n=19, B=5, O=18, activations="tanh").masked(rng, "rows", "one")
    case = case.mapped(LAYOUTS[layout])
    case.present = [LAYOUTS[layout](mask) for mask in case.present]
    check_forward(case)
    u = LAYOUTS[layout](random(rng, case.output_shape, dtypes[1]))
    check_backward(case, u)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_long_rows(layout, dtype, rng):
    """Longer than a block, where strided rows are copied block by block."""
    for form in ("paired", "vector output"):
        case = FORMS[form].case(rng, dtype, n=2500 if form == "paired" else 3, B=3, O=2500).mapped(LAYOUTS[layout])
        check_both(case, rng)


def packed(array):
    """Strides that are no multiple of the itemsize: a field of packed records."""
    records = np.zeros(array.shape, np.dtype([("before", "i1"), ("value", array.dtype)]))
    records["value"] = array
    return records["value"]


def one_byte_off(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = np.ndarray(array.shape, array.dtype, memory.data, 1)
    view[...] = array
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [packed, one_byte_off])
def test_memory_no_kernel_takes(layout, dtype, rng, monkeypatch):
    """Unaligned arrays are right by way of the reference."""
    monkeypatch.undo()
    for form in TABLE:
        case = FORMS[form].case(rng, dtype, n=9)
        moved = case.mapped(layout)
        want = oracle(case)[0]
        check_within(moved.forward(), want, 0.02 * oracle(case.mapped(abs))[0] + 1e-6)
        grads = moved.backward(layout(np.ones(case.output_shape, dtype)))
        for got, want in zip(grads, case.backward(np.ones(case.output_shape, dtype)), strict=True):
            check_within(got, widened(want), 0.02 * (1 + abs(widened(want))))


@st.composite
def calls(draw):
    """Any shapes, broadcast in any way, in any layout and dtype, summed along any dim."""
    ndim = draw(st.integers(1, 4))
    dim = draw(st.integers(-ndim, -1))
    sizes = [draw(st.sampled_from([0, 1, 2, 3, 5, 8, 9, 17])) for _ in range(ndim)]
    sizes[draw(st.integers(0, ndim - 1))] = draw(st.sampled_from([1, 4, 7, 33, 64, 65, 130]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def operand():
        axes = ndim if draw(st.booleans()) else draw(st.integers(0, ndim))
        shape = [n if draw(st.integers(0, 3)) else 1 for n in sizes[ndim - axes :]]
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](random(rng, tuple(shape), draw(st.sampled_from(DTYPES))))

    factors = [operand() for _ in range(draw(st.integers(1, 4)))]
    factors.append(random(rng, tuple(sizes), draw(st.sampled_from(DTYPES))))
    case = Case(operand() if draw(st.booleans()) else None, factors, dim=dim)
    case.activations = [draw(st.sampled_from(ACTIVATIONS)) for _ in factors]
    if draw(st.booleans()):
        case = case.masked(rng, draw(st.sampled_from(["rows", "full"])), draw(st.sampled_from(["one", "zero"])))
    return case, LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](
        random(rng, case.output_shape, draw(st.sampled_from(DTYPES)))
    )


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(call=calls())
def test_any_call(call):
    case, u = call
    check_forward(case)
    check_backward(case, u)


# Reading past the end


def at_the_edges_of_a_page(array):
    """Two copies of the array that may not be read one byte past: one ends, one begins at a page of no access."""
    page = mmap.PAGESIZE
    whole = -(-max(1, array.nbytes) // page) * page
    memory = mmap.mmap(-1, whole + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for fence in (start, start + page + whole):
        assert libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
    for offset in (page + whole - array.nbytes, page):
        view = np.ndarray(array.shape, array.dtype, memory, offset)
        view[...] = array
        yield view


def walk_along_fences(dtype):
    """Call every form on fenced operands. Run it in a process of its own: a read too far kills it."""
    rng = np.random.default_rng(0)
    for form in (*TABLE, "M=3", "terms first"):
        for n in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100):
            case = FORMS[form].case(rng, dtype, n=n, B=3, O=n, activations="tanh" if n % 2 else None)
            case = case.masked(rng, "rows", "one")
            for side in range(2):
                fenced = case.mapped(lambda a, side=side: list(at_the_edges_of_a_page(a))[side])
                fenced.present = [list(at_the_edges_of_a_page(mask))[side] for mask in case.present]
                u = list(at_the_edges_of_a_page(random(rng, case.output_shape, dtype)))[side]
                check_forward(fenced)
                check_backward(fenced, u)
                fenced.present = None
                for layout in (lambda a: a[..., ::-1], lambda a: a[..., (a.shape[-1] - 1) % 2 :: 2]):
                    check_both(fenced.mapped(layout), rng)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guard_pages(dtype):
    run_python(f"import test_layouts; test_layouts.walk_along_fences({dtype!r})")


# More than 2^31 elements


def test_offsets_beyond_two_to_the_31(rng):
    """Rows 2^33 bytes apart, in memory that is reserved and never touched but for the rows."""
    rows, apart, terms = 3, 2**33, 70
    for dtype in DTYPES:
        memory = mmap.mmap(-1, rows * apart, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        item = np.dtype(dtype).itemsize
        for shape, strides, form in (
            ((rows, terms), (apart, item), "paired"),
            ((rows, terms), (apart, 3 * item), "paired"),
            ((terms, rows), (item, apart), "terms first"),
        ):
            far = np.ndarray(shape, dtype, memory, 0, strides)
            for view in (far, far[::-1], far[:, ::-1]):
                case = FORMS[form].case(rng, dtype, B=rows, n=terms)
                view[...] = case.factors[0]
                case.factors[0] = view
                check_both(case, rng)


@pytest.mark.parametrize("shape", [(2**31 + 5, 1), (1, 2**31 + 5)], ids=["rows", "terms"])
def test_counts_beyond_two_to_the_31(shape):
    """A stride-0 view costs no memory; only the weight's gradient is asked for, one sum over everything."""
    f = np.broadcast_to(np.float64(0.5), shape)
    u = np.broadcast_to(np.float64(2), shape[:1])
    weight = np.ones(1)
    d_weight, d_f = native.fusion_sum_grad(u, weight, (f,), None, None, "one", -1, [True, False], False)
    assert d_weight.tolist() == [2**31 + 5]
    assert d_f is None
    if shape[0] == 1:
        assert native.fusion_sum(None, (f,), None, None, "one", -1, False).tolist() == [(2**31 + 5) / 2]
