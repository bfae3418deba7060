"""The interpreter of PTX by itself: instructions against independent arithmetic, planted mistakes, known traffic.

``ptx_probe.cu`` holds the kernels that nvcc compiles here; instructions one by one are written as PTX. What lives
elsewhere: the project's kernels under the interpreter.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import itertools
import operator
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.cuda import ptx, sass

SCHEDULES = ("lockstep", "adversarial")
PROBE = Path(__file__).with_name("ptx_probe.cu")
LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
for _name, _type in (("fma", ctypes.c_double), ("fmaf", ctypes.c_float)):
    getattr(LIBM, _name).argtypes, getattr(LIBM, _name).restype = [_type] * 3, _type

INFINITY = float("inf")
FLOATS = [0.0, -0.0, 1.0, -1.0, 1.5, 3.0, -7.25, 1 / 3, 1e-3, 65504.0, 65519.9, 65520.0, -1e6, INFINITY, -INFINITY]
SPECIAL = {
    "f32": np.array([*FLOATS, 2**-24, 2**-25, 3 * 2**-26, 1e-40, -1e-45, 1 + 2**-23, 3.4e38, np.nan], np.float32),
    "f64": np.array([*FLOATS, 2**-24, 2**-25, 1e-40, 1 + 2**-52, 1 + 2**-11, 1e308, -5e-324, 1e-310, 2.0**31, np.nan]),
    "s32": np.array([0, 1, -1, 2, 7, -7, 31, 32, 33, 2**31 - 1, -(2**31), 123456789], np.int32),
    "u32": np.array([0, 1, 2, 7, 31, 32, 33, 2**31, 2**32 - 1, 123456789], np.uint32),
    "s64": np.array([0, 1, -1, 7, -7, 63, 64, 2**53 + 1, 2**63 - 1, -(2**63), 123456789012345], np.int64),
    "u64": np.array([0, 1, 7, 63, 64, 2**53 + 1, 2**63, 2**64 - 1, 123456789012345], np.uint64),
}
SPECIAL |= {"b32": SPECIAL["u32"], "b64": SPECIAL["u64"], "u16": np.array([0, 1, 65535, 32768], np.uint16)}


def parameters(*values):
    """Lay out kernel parameters: an array is its address, an int 32 bits, bytes are themselves."""
    packed = b""
    for value in values:
        one = {np.ndarray: lambda v: v.ctypes.data.to_bytes(8, "little"), int: lambda v: struct.pack("<i", v)}
        item = value if isinstance(value, bytes) else one[type(value)](value)
        packed += bytes(-len(packed) % min(len(item), 8)) + item
    return packed


def aligned(array):
    """Copy to an address that is a multiple of 256, as a GPU's allocations are."""
    raw = np.zeros(array.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def apply(instruction, types, *columns):
    """Run `instruction`, written with %d for its result and %a, %b, %c for its operands, on one row per thread."""
    sizes = [ptx_bytes(t) for t in types]
    count = columns[0].size
    arrays = [np.resize(column, -(-count // 32) * 32) for column in columns]
    result = np.zeros(arrays[0].size, f"u{sizes[0]}")
    names = "dabc"[: len(types)]
    registers = "".join(f".reg .b{8 * max(s, 2)} %{n};" for n, s in zip(names, sizes, strict=True))
    loads = "".join(
        f"ld.param.u64 %p, [p{n}]; mad.wide.u32 %p, %i, {s}, %p; ld.global.b{8 * s} %{n}, [%p];"
        for n, s in zip(names[1:], sizes[1:], strict=True)
    )
    text = f""".visible .entry one({", ".join(f".param .u64 p{n}" for n in names)}) {{
        {registers} .reg .b64 %p; .reg .b32 %i, %n, %t; .reg .pred %q, %r;
        mov.u32 %i, %ctaid.x; mov.u32 %n, %ntid.x; mov.u32 %t, %tid.x; mad.lo.s32 %i, %i, %n, %t;
        {loads} {instruction};
        ld.param.u64 %p, [pd]; mad.wide.u32 %p, %i, {sizes[0]}, %p; st.global.b{8 * sizes[0]} [%p], %d; ret; }}"""
    segments = [ptx.Segment.of(array) for array in arrays] + [ptx.Segment.of(result, writable=True, initialised=False)]
    report = ptx.launch(ptx.parse(text), "one", (result.size // 32,), (32,), parameters(result, *arrays), segments)
    return result[:count], report


def ptx_bytes(kind):
    return int("".join(filter(str.isdigit, kind.replace("bf16", "16"))) or 32) // 8


@np.errstate(all="ignore")
def equal(got, want):
    """Check for the same bits, any NaN being as good as any other."""
    got = got.view(want.dtype)
    same = got.view(f"u{want.dtype.itemsize}") == want.view(f"u{want.dtype.itemsize}")
    if want.dtype.kind == "f" or want.dtype == ml_dtypes.bfloat16:
        same |= np.isnan(got.astype(np.float64)) & np.isnan(want.astype(np.float64))
    assert same.all(), [(i, got[i], want[i]) for i in np.flatnonzero(~same)[:5]]


def combinations(*columns):
    return [np.array(c, columns[i].dtype) for i, c in enumerate(zip(*itertools.product(*columns), strict=True))]


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def random_floats(rng, n, dtype):
    """Draw numbers of every exponent, subnormals included."""
    return rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), n, f"u{np.dtype(dtype).itemsize}").view(dtype)


def near_ties(rng, n, dtype):
    """Draw a, b, c whose a * b + c lies close to halfway between two numbers, or cancels, where two roundings go wrong."""
    digits = np.finfo(dtype).nmant + 1
    a = (1 + rng.integers(0, 2 ** (digits // 2), n) * 2.0 ** -(digits // 2)).astype(dtype)
    b = (1 + rng.integers(0, 2 ** (digits // 2), n) * 2.0 ** -(digits // 2)).astype(dtype)
    scale = 2.0 ** rng.integers(-2 * digits - 4, 2 * digits + 4, n)
    c = (rng.choice([-1.0, 1.0], n) * scale * (1 + rng.integers(0, 2, n) * 2.0 ** (1 - digits))).astype(dtype)
    c[: n // 4] = -(a * b)[: n // 4]
    return a, b, c


@pytest.mark.parametrize(("kind", "dtype", "libm"), [("f32", np.float32, LIBM.fmaf), ("f64", np.float64, LIBM.fma)])
def test_fma_rounds_once(kind, dtype, libm):
    rng = np.random.default_rng(0)
    sets = [
        combinations(*[SPECIAL[kind]] * 3),
        [random_floats(rng, 20000, dtype) for _ in range(3)],
        near_ties(rng, 20000, dtype),
    ]
    a, b, c = (np.concatenate(column) for column in zip(*sets, strict=True))
    got, _ = apply(f"fma.rn.{kind} %d, %a, %b, %c", [kind] * 4, a, b, c)
    want = np.array([libm(*row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], dtype)
    with np.errstate(all="ignore"):
        twice = a * b + c
    assert (twice != want).sum() > 1000  # the cases can tell
    equal(got, want)


BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", BINARY)
def test_float_arithmetic(name, kind):
    a, b = combinations(SPECIAL[kind], SPECIAL[kind])
    got, _ = apply(f"{name}.rn.{kind} %d, %a, %b", [kind] * 3, a, b)
    with np.errstate(all="ignore"):
        equal(got, BINARY[name](a, b))


def test_division_and_reciprocal_are_correctly_rounded():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(1, 2, (2, 500)).astype(np.float32)
    for instruction, x in (("div.rn.f32 %d, %a, %b", a), ("rcp.rn.f32 %d, %b", np.ones_like(a))):
        got = apply(instruction, ["f32"] * 3, a, b)[0].view(np.float32)
        for x_i, b_i, got_i in zip(x.tolist(), b.tolist(), got, strict=True):
            exact, last = Fraction(x_i) / Fraction(b_i), Fraction(float(np.spacing(got_i)))
            assert abs(Fraction(float(got_i)) - exact) <= last / 2


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes_prefer_numbers_and_order_zeros(name, kind):
    a, b = combinations(SPECIAL[kind], SPECIAL[kind])
    got = apply(f"{name}.{kind} %d, %a, %b", [kind] * 3, a, b)[0].view(a.dtype)
    for x, y, z in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        numbers = [v for v in (x, y) if v == v]
        pick = min if name == "min" else max
        want = pick(numbers, key=lambda v: (v, np.copysign(1, v))) if numbers else np.nan
        equal(np.array([z]), np.array([want]))


def test_nan_is_canonical_in_float32():
    nan = np.array([0xFFC12345], np.uint32).view(np.float32)
    for instruction in (
        "add.rn.f32 %d, %a, %a",
        "fma.rn.f32 %d, %a, %a, %a",
        "min.f32 %d, %a, %a",
        "mul.rn.f32 %d, %a, %a",
    ):
        assert apply(instruction, ["f32", "f32"], nan)[0].tolist() == [0x7FFFFFFF]


def test_sign_operations():
    a, b = combinations(SPECIAL["f32"], SPECIAL["f32"])
    equal(apply("copysign.f32 %d, %a, %b", ["f32"] * 3, a, b)[0], np.copysign(b, a))
    equal(apply("neg.f32 %d, %a", ["f32"] * 2, a)[0], -a)
    equal(apply("abs.f32 %d, %a", ["f32"] * 2, a)[0], np.abs(a))


def wrapped(value, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([value & (1 << bits) - 1], f"u{bits // 8}").view(dtype)[0]


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


INTEGER = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mul.hi": lambda a, b: a * b,
    "mul.wide": operator.mul,
    "div": truncated,
    "rem": lambda a, b: a - b * truncated(a, b),
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", INTEGER)
def test_integer_arithmetic(name, kind):
    if name == "mul.wide" and kind[1:] == "64":
        return  # PTX has none
    a, b = combinations(SPECIAL[kind], SPECIAL[kind])
    if name in ("div", "rem"):
        a, b = a[b != 0], b[b != 0]
    result = kind.replace("32", "64") if name == "mul.wide" else kind
    got, report = apply(f"{name}.{kind} %d, %a, %b", [result, kind, kind], a, b)
    dtype = SPECIAL[result].dtype
    shift = 8 * dtype.itemsize if name == "mul.hi" else 0
    want = [wrapped(INTEGER[name](x, y) >> shift, dtype) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    equal(got, np.array(want, dtype))
    assert not report.findings


def test_multiply_add_of_integers():
    a, b, c = combinations(SPECIAL["s32"], SPECIAL["s32"], SPECIAL["s64"])
    got, _ = apply("mad.wide.s32 %d, %a, %b, %c", ["s64", "s32", "s32", "s64"], a, b, c)
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    equal(got, np.array([wrapped(x * y + z, np.int64) for x, y, z in rows]))
    got, _ = apply("mad.lo.s32 %d, %a, %b, %c", ["s32"] * 4, a, b, c.astype(np.int32))
    rows = zip(a.tolist(), b.tolist(), c.astype(np.int32).tolist(), strict=True)
    equal(got, np.array([wrapped(x * y + z, np.int32) for x, y, z in rows]))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_shifts_past_the_width(kind):
    a, b = combinations(SPECIAL[kind], SPECIAL["u32"])
    bits = 8 * a.dtype.itemsize
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    right = [wrapped(x >> min(n, bits), a.dtype) for x, n in rows]
    equal(apply(f"shr.{kind} %d, %a, %b", [kind, kind, "u32"], a, b)[0], np.array(right, a.dtype))
    left = [wrapped(x << min(n, bits), a.dtype) for x, n in rows]
    equal(apply(f"shl.b{bits} %d, %a, %b", [kind, kind, "u32"], a, b)[0], np.array(left, a.dtype))


def test_bits():
    a, b = combinations(SPECIAL["u64"], SPECIAL["u64"])
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        equal(apply(f"{name}.b64 %d, %a, %b", ["u64"] * 3, a, b)[0], function(a, b))
    equal(apply("not.b32 %d, %a", ["u32"] * 2, SPECIAL["u32"])[0], ~SPECIAL["u32"])
    a, b = combinations(SPECIAL["u32"], SPECIAL["u32"])
    got, _ = apply("bfi.b32 %d, %a, %b, 5, 27", ["u32"] * 3, a, b)
    equal(got, (a << np.uint32(5)) | (b & np.uint32(31)))
    got, _ = apply("mov.b64 %d, {%a, %b}", ["u64", "u32", "u32"], a, b)
    equal(got, a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))
    got, _ = apply("mov.b64 {%t, %d}, %a", ["u32", "u64"], SPECIAL["u64"])
    equal(got, (SPECIAL["u64"] >> np.uint64(32)).astype(np.uint32))


COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt}
COMPARISONS |= {"ge": operator.ge}


@pytest.mark.parametrize("name", [*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num", "nan"])
def test_comparisons_of_floats(name):
    a, b = combinations(SPECIAL["f64"], SPECIAL["f64"])
    got, _ = apply(
        f"setp.{name}.f64 %q|%r, %a, %b; selp.u32 %d, 1, 0, %q; @%r add.u32 %d, %d, 2", ["u32", "f64", "f64"], a, b
    )
    nan = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        want = nan == (name == "nan")
    else:
        want = np.where(nan, name.endswith("u"), COMPARISONS[name.removesuffix("u")](a, b))
    equal(got, np.where(want, 1, 2).astype(np.uint32))


def test_comparisons_of_integers_and_predicates():
    a, b = combinations(SPECIAL["u32"], SPECIAL["u32"])
    select = "; selp.u32 %d, 1, 0, %q"
    equal(
        apply("setp.lt.s32 %q, %a, %b" + select, ["u32"] * 3, a, b)[0],
        (a.view(np.int32) < b.view(np.int32)).astype("u4"),
    )
    equal(apply("setp.hs.u32 %q, %a, %b" + select, ["u32"] * 3, a, b)[0], (a >= b).astype("u4"))
    combined = "setp.eq.u32 %r, %a, 7; setp.gt.and.u32 %q, %b, 7, !%r"
    equal(apply(combined + select, ["u32"] * 3, a, b)[0], ((b > 7) & (a != 7)).astype("u4"))
    logic = "setp.eq.u32 %r, %a, 7; setp.gt.u32 %q, %b, 7; not.pred %r, %r; xor.pred %q, %q, %r"
    equal(apply(logic + select, ["u32"] * 3, a, b)[0], ((b > 7) ^ (a != 7)).astype("u4"))


# ---- conversions -----------------------------------------------------------------------------------------------------

HALF = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@np.errstate(all="ignore")
def conversion_inputs(kind):
    """Give special values, numbers of every exponent, and every 16-bit float with its neighbours and ties."""
    rng = np.random.default_rng(2)
    dtype = SPECIAL[kind].dtype
    halves = np.arange(0, 65536, 7, dtype=np.uint16).view(np.float16).astype(dtype)
    brains = np.arange(0, 65536, 7, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(dtype)
    values = np.concatenate([halves, brains])
    ties = np.concatenate([values * dtype.type(1 + 2.0**-bit) for bit in (8, 9, 11, 12, 24)])
    near = [np.nextafter(ties, dtype.type(to)) for to in (np.inf, -np.inf)]
    return np.concatenate([SPECIAL[kind], random_floats(rng, 4000, dtype), values, ties, *near])


@np.errstate(all="ignore")
@pytest.mark.parametrize(("to", "source"), [("f16", "f32"), ("f16", "f64"), ("bf16", "f32"), ("f32", "f64")])
def test_narrowing_rounds_to_nearest(to, source):
    x = conversion_inputs(source)
    got, _ = apply(f"cvt.rn.{to}.{source} %d, %a", [to, source], x)
    equal(got, x.astype(HALF.get(to, np.dtype(np.float32))))


@np.errstate(all="ignore")
@pytest.mark.parametrize(("to", "source"), [("f16", "f32"), ("bf16", "f32"), ("f32", "f64")])
def test_directed_roundings_enclose(to, source):
    x = conversion_inputs(source)
    x = x[np.isfinite(x)]
    dtype = HALF.get(to, np.dtype(np.float32))
    down, up, zero = (
        apply(f"cvt.{mode}.{to}.{source} %d, %a", [to, source], x)[0].view(dtype).astype(np.float64)
        for mode in ("rm", "rp", "rz")
    )
    wide = x.astype(np.float64)
    assert ((down <= wide) & (wide <= up)).all()
    assert (zero == np.where(x < 0, up, down)).all()
    exact = wide == np.where(np.isfinite(wide), wide, 0).astype(dtype).astype(np.float64)
    assert (down[exact] == up[exact]).all()
    finite = ~exact & np.isfinite(down) & np.isfinite(up)
    successor = np.nextafter(down[finite].astype(dtype), dtype.type(np.inf)).astype(np.float64)  # nothing lies between
    assert (successor == up[finite]).all() and finite.sum() > 100


@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_widening_is_exact(source):
    x = np.arange(65536, dtype=np.uint16)
    got, _ = apply(f"cvt.f32.{source} %d, %a", ["f32", source], x)
    equal(got, x.view(HALF[source]).astype(np.float32))


@np.errstate(all="ignore")
def test_two_halves_at_once():
    a, b = combinations(SPECIAL["f32"], SPECIAL["f32"])
    for kind, dtype in HALF.items():
        got, _ = apply(f"cvt.rn.{kind}x2.f32 %d, %a, %b", ["b32", "f32", "f32"], a, b)
        equal((got >> np.uint32(16)).astype(np.uint16), a.astype(dtype))
        equal(got.astype(np.uint16), b.astype(dtype))


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("mode", ROUNDINGS)
@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64"])
def test_floats_to_integers_saturate(to, source, mode):
    x = np.concatenate(
        [SPECIAL[source], np.array([0.5, 2.5, -0.5, -1.5, 2.0**63, 2.0**64, -(2.0**70)], SPECIAL[source].dtype)]
    )
    got, _ = apply(f"cvt.{mode}.{to}.{source} %d, %a", [to, source], x)
    limits = np.iinfo(SPECIAL[to].dtype)
    want = []
    for value in ROUNDINGS[mode](x.astype(np.float64)).tolist():
        if value != value:  # PTX ISA 9.0, cvt: zero unless the source is .f64 or the destination has 64 bits
            want.append(wrapped(1 << 8 * limits.dtype.itemsize - 1 if "64" in to + source else 0, limits.dtype))
        else:
            want.append(min(max(int(np.clip(value, -1e30, 1e30)), limits.min), limits.max))
    equal(got, np.array(want, limits.dtype))


@pytest.mark.parametrize(
    ("to", "source"), [("f64", "s64"), ("f32", "s64"), ("f32", "u64"), ("f64", "u32"), ("f32", "s32")]
)
def test_integers_to_floats_round_once(to, source):
    rng = np.random.default_rng(3)
    dtype = SPECIAL[source].dtype
    bits = 8 * dtype.itemsize
    ties = [2**k + 2 ** (k - 24) + d for k in range(26, bits - 1) for d in (-1, 0, 1)]
    x = np.concatenate([SPECIAL[source], rng.integers(0, 2**bits, 500, np.uint64).astype(dtype), np.array(ties, dtype)])
    got = apply(f"cvt.rn.{to}.{source} %d, %a", [to, source], x)[0].view(SPECIAL[to].dtype)
    for value, result in zip(x.tolist(), got, strict=True):
        error, below = abs(int(float(result)) - value), abs(int(float(np.nextafter(result, 0))) - value)
        above = abs(int(float(np.nextafter(result, np.copysign(np.inf, result)))) - value)
        assert error < min(below, above) or (error == min(below, above) and result.view(f"u{got.itemsize}") % 2 == 0)


def test_integers_of_other_widths():
    equal(apply("cvt.s64.s32 %d, %a", ["s64", "s32"], SPECIAL["s32"])[0], SPECIAL["s32"].astype(np.int64))
    equal(apply("cvt.u64.u32 %d, %a", ["u64", "u32"], SPECIAL["u32"])[0], SPECIAL["u32"].astype(np.uint64))
    equal(apply("cvt.u32.u64 %d, %a", ["u32", "u64"], SPECIAL["u64"])[0], SPECIAL["u64"].astype(np.uint32))
    equal(apply("cvt.s32.s16 %d, %a", ["s32", "u16"], SPECIAL["u16"])[0], SPECIAL["u16"].view("i2").astype(np.int32))
    equal(
        apply("cvt.s32.s8 %d, %a", ["s32", "u32"], SPECIAL["u32"])[0], SPECIAL["u32"].astype(np.int8).astype(np.int32)
    )


# ---- control ---------------------------------------------------------------------------------------------------------


def test_branch_by_index():
    text = """.visible .entry jump(.param .u64 to) { .reg .b32 %r<3>; .reg .b64 %rd<2>; .reg .pred %p;
      mov.u32 %r0, %tid.x; mov.u32 %r2, 9; and.b32 %r1, %r0, 3; setp.gt.u32 %p, %r0, 31;
      $table: .branchtargets $a, $b, $a, $c;
      @!%p brx.idx %r1, $table;
      $a: mov.u32 %r2, 1; bra.uni $end;
      $b: mov.u32 %r2, 2; bra.uni $end;
      $c: mov.u32 %r2, 3;
      $end: ld.param.u64 %rd0, [to]; mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r2; ret; }"""
    out = np.zeros(40, np.uint32)
    for schedule in SCHEDULES:
        segments = [ptx.Segment.of(out, writable=True)]
        assert not ptx.launch(ptx.parse(text), "jump", (1,), (40,), parameters(out), segments, schedule).findings
        assert out.tolist() == [1, 2, 1, 3] * 8 + [1] * 8


SHUFFLES = {
    "bfly": lambda lane, by: lane ^ by,
    "idx": lambda lane, by: by,
    "up": lambda lane, by: lane - by if lane >= by else lane,
    "down": lambda lane, by: lane + by if lane + by < 32 else lane,
}


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffles(mode):
    for by in (0, 1, 5, 16, 31):
        x, y = np.arange(100, 132, dtype=np.uint32), np.zeros(32, np.uint32)
        clamp = 0 if mode == "up" else 31
        text = f""".visible .entry mix(.param .u64 x, .param .u64 y) {{ .reg .b32 %r<3>; .reg .b64 %rd<2>; .reg .pred %p;
          mov.u32 %r0, %tid.x; ld.param.u64 %rd0, [x]; mad.wide.u32 %rd0, %r0, 4, %rd0; ld.global.u32 %r1, [%rd0];
          shfl.sync.{mode}.b32 %r2|%p, %r1, {by}, {clamp}, -1; @!%p add.u32 %r2, %r2, 1000;
          ld.param.u64 %rd1, [y]; mad.wide.u32 %rd1, %r0, 4, %rd1; st.global.u32 [%rd1], %r2; ret; }}"""
        segments = [ptx.Segment.of(x), ptx.Segment.of(y, writable=True)]
        assert not ptx.launch(ptx.parse(text), "mix", (1,), (32,), parameters(x, y), segments).findings
        inside = [lane >= by if mode == "up" else lane + by < 32 if mode == "down" else True for lane in range(32)]
        assert y.tolist() == [100 + SHUFFLES[mode](i, by) + (0 if inside[i] else 1000) for i in range(32)]


def test_endless_loop_is_given_up():
    report = ptx.launch(ptx.parse(".visible .entry k() { $a: bra $a; }"), "k", (1,), (32,), b"", [], most_steps=1000)
    assert [f.kind for f in report.findings] == ["endless"]


@pytest.mark.parametrize(
    "what", ["sin.approx.f32 %f0, %f0", "add.f32 %f0, %f0, %f0", "ld.f32 %f0, [%rd0]", "add.rn.ftz.f32 %f0, %f0, %f0"]
)
def test_unknown_instructions_are_named(what):
    text = f".visible .entry k() {{ .reg .f32 %f<1>; .reg .b64 %rd<1>; {what}; ret; }}"
    with pytest.raises(ptx.PtxError, match=what.split()[0]):
        ptx.launch(ptx.parse(text), "k", (1,), (32,), b"", [])


@pytest.mark.parametrize(
    "text", [".func f() { ret; }", ".extern .shared .align 8 .b8 x[];", ".global .b32 x;", "nonsense"]
)
def test_unknown_declarations_are_named(text):
    with pytest.raises(ptx.PtxError, match=text.split("(")[0].split(";")[0].split("[")[0].strip()):
        ptx.parse(text)


def test_launches_that_do_not_fit_are_refused():
    module = ptx.parse(".visible .entry k(.param .u64 x) { ret; }")
    with pytest.raises(ptx.PtxError, match="8 bytes"):
        ptx.launch(module, "k", (1,), (32,), b"", [])
    with pytest.raises(ptx.PtxError, match="no kernel"):
        ptx.launch(module, "other", (1,), (32,), b"", [])
    with pytest.raises(ValueError, match="schedule"):
        ptx.launch(module, "k", (1,), (32,), bytes(8), [], "random")
    x = np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="overlap"):
        ptx.launch(module, "k", (1,), (32,), bytes(8), [ptx.Segment.of(x), ptx.Segment.of(x[4:])])
    with pytest.raises(ValueError, match="contiguous"):
        ptx.Segment.of(x[::2])


# ---- what nvcc made of ptx_probe.cu ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[75, 90])
def probe(request, tmp_path_factory):
    nvcc = sass.require_tool("nvcc")
    to = tmp_path_factory.mktemp("probe") / "probe.ptx"
    flags = ["-std=c++17", "-O3", "-fmad=false", "--ptx", f"-arch=compute_{request.param}"]
    subprocess.run([nvcc, *flags, str(PROBE), "-o", str(to)], check=True)
    return ptx.parse(to.read_text())


@pytest.fixture(scope="module")
def run(probe):
    """Return a function that launches a kernel on read-only arrays and, after None, on written ones."""

    def launch(name, grid, block, *arguments, schedule="lockstep", seed=0, initialised=False):
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        segments = [
            ptx.Segment.of(
                a, writable=i == len(arrays) - 1, initialised=initialised or i < len(arrays) - 1, name=f"array {i}"
            )
            for i, a in enumerate(arrays)
        ]
        return ptx.launch(probe, name, (grid,), (block,), parameters(*arguments), segments, schedule, seed)

    return launch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_block_sum(probe, schedule, seed):
    x = np.random.default_rng(seed).integers(-1000, 1000, 5000).astype(np.float32)
    partial = np.zeros(3)
    packed = struct.pack("<QQ4qii", x.ctypes.data, partial.ctypes.data, 7, 7, 2, 7, 2500, 2)
    segments = [ptx.Segment.of(x), ptx.Segment.of(partial, writable=True, initialised=False)]
    report = ptx.launch(probe, "block_sum", (3,), (256,), packed, segments, schedule, seed)
    assert not report.findings
    index = np.arange(2500)
    assert [x[::2][index // 256 % 3 == block].sum(dtype=float) for block in range(3)] == partial.tolist()
    assert segments[1].initialised.all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_divergence(run, schedule):
    start, steps = np.arange(1, 101), np.zeros(100, np.int32)
    assert not run("collatz", 2, 64, start, steps, 100, schedule=schedule).findings

    @functools.cache
    def length(n):
        return 0 if n == 1 else 1 + length(3 * n + 1 if n % 2 else n // 2)

    assert steps.tolist() == [length(n) for n in range(1, 101)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_syncwarp_orders_memory(run, schedule):
    x, y = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    assert not run("warp_reverse", 1, 32, x, y, schedule=schedule).findings
    assert (y == x[::-1]).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_local_arrays(run, schedule):
    x, y = np.arange(40 * 64, dtype=np.float32).reshape(40, 64), np.zeros((40, 64), np.float32)
    report = run("local_rotate", 1, 40, x, y, 3, schedule=schedule)
    assert not report.findings and any(".local" in opcode for opcode in report.counters.instructions)
    assert (y == np.roll(x, -3, axis=1)).all()


MISTAKES = {
    # kernel: what it must be found to do, blocks, threads of each, arguments
    "past_the_end": ("out of bounds", 1, 64, np.ones(48, "f4"), np.zeros(48, "f4"), 48),
    "misaligned": ("misaligned", 1, 32, np.ones(64, "f4"), np.zeros((32, 4), "f4")),
    "writes_input": ("read-only", 1, 32, np.zeros(32, "f4"), np.ones(32, "f4")),
    "reads_unwritten_shared": ("uninitialised", 1, 63, np.zeros(64, "f4")),
    "shared_past_the_end": ("out of bounds", 1, 64, np.zeros(64, "f4"), 64),
    "missing_barrier": ("race", 1, 64, np.ones(64, "f4"), np.zeros(64, "f4")),
    "missing_second_barrier": ("race", 1, 64, np.ones(64, "f4"), np.zeros(128, "f4")),
    "read_by_all_written_by_the_last": ("race", 1, 64, np.zeros(128, "f4")),
    "missing_syncwarp": ("race", 1, 32, np.ones(32, "f4"), np.zeros(32, "f4")),
    "shuffle_for_a_fence": ("race", 1, 32, np.ones(32, "f4"), np.zeros(32, "f4")),
    "blocks_share_a_sum": ("block race", 4, 32, np.zeros(1, "f4")),
    "blocks_overlap": ("block race", 4, 32, np.zeros(128, "f4")),
    "reads_another_block": ("block race", 4, 32, np.zeros(256, "f4")),
    "barrier_in_one_branch": ("barrier", 1, 64, np.zeros(64, "f4")),
    "two_barriers": ("barrier", 1, 64, np.zeros(64, "f4")),
    "shuffle_in_a_branch": ("sync mask", 1, 32, np.zeros(32, "f4")),
    "shuffle_after_exit": ("sync mask", 1, 32, np.zeros(32, "f4")),
    "shuffle_outside_its_mask": ("sync mask", 1, 32, np.zeros(32, "f4")),
    "divides_by_zero": ("division by zero", 1, 32, np.zeros(32, "i4"), 5),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(run, name, schedule):
    kind, grid, block, *arguments = MISTAKES[name]
    arguments = [aligned(a) if isinstance(a, np.ndarray) else a for a in arguments]
    for seed in range(3):
        report = run(name, grid, block, *arguments, schedule=schedule, seed=seed, initialised=kind != "uninitialised")
        kinds = {finding.kind for finding in report.findings}
        assert kind in kinds, kinds
        found = next(f for f in report.findings if f.kind == kind)
        assert found.kernel == name and found.instruction.split()[0].strip("@%!;") and found.line > 0
        assert kind in str(found) and name in str(found)


def test_each_mistake_is_one_of_its_kind(run):
    """Without the mistake, the same kernels are clean: findings are not of the kernel but of how it is called."""
    x, y = np.ones(64, "f4"), np.zeros(64, "f4")
    assert not run("past_the_end", 1, 64, np.ones(65, "f4"), np.zeros(65, "f4"), 64).findings
    assert not run("shared_past_the_end", 1, 64, y, 63).findings
    assert not run("blocks_overlap", 1, 32, y).findings
    assert not run("blocks_share_a_sum", 1, 32, np.zeros(1, "f4"), initialised=True).findings
    assert not run("divides_by_zero", 1, 32, np.zeros(32, "i4"), 50).findings
    assert not run("nc_of_written", 1, 32, x, y).findings


def test_non_coherent_load_of_what_is_written(probe):
    x = np.ones(32, "f4")
    segments = [ptx.Segment.of(x, writable=True)]
    report = ptx.launch(probe, "nc_of_written", (1,), (32,), parameters(x, x), segments)
    assert {finding.kind for finding in report.findings} == {"nc"}


def test_uninitialised_global_memory(probe):
    x, y = np.ones(32, "f4"), np.zeros(32, "f4")
    known = np.arange(128) != 127
    segments = [ptx.Segment(x.ctypes.data, x.view(np.uint8), initialised=known), ptx.Segment.of(y, writable=True)]
    report = ptx.launch(probe, "nc_of_written", (1,), (32,), parameters(x, y), segments)
    assert [finding.kind for finding in report.findings] == ["uninitialised"]


# ---- traffic -----------------------------------------------------------------------------------------------------------


def loads_and_stores(report, space="global"):
    return {a.store: a for a in report.counters.accesses if a.space == space}


def test_traffic_of_packets(run):
    x, y = aligned(np.arange(1024, dtype=np.float32)), aligned(np.zeros(1024, np.float32))
    counters = (report := run("copy_packets", 2, 128, x, y)).counters
    for access in loads_and_stores(report).values():  # 32 lanes of 16 bytes: 16 sectors, none in part
        assert (access.requests, access.transactions, access.bytes_asked, access.bytes_unique) == (8, 128, 4096, 4096)
    assert (counters.sectors(False), counters.sectors(True)) == (128, 128)
    assert (counters.distinct_loaded, counters.distinct_stored) == (128, 128)
    assert counters.instructions["ret"] == 8


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32), (0, 1)])
def test_traffic_of_strides(run, stride, sectors):
    x, y = aligned(np.zeros(32 * 33, np.float32)), aligned(np.zeros(32, np.float32))
    loads = loads_and_stores(report := run("copy_strided", 1, 32, x, y, stride))[False]
    assert (loads.requests, loads.transactions) == (1, sectors)
    assert (loads.bytes_asked, loads.bytes_unique) == (128, 128 if stride else 4)
    assert report.counters.distinct_loaded == sectors


def test_traffic_counts_shared_sectors_once(run):
    """Every warp reads the same sector, from the same address."""
    x, y = aligned(np.zeros(1, np.float32)), aligned(np.zeros(256, np.float32))
    counters = run("copy_strided", 2, 128, x, y, 0).counters
    assert (counters.sectors(False), counters.distinct_loaded) == (8, 1)


def test_traffic_of_misplaced_arrays(run):
    """A row of 128 bytes that starts in the middle of a sector touches five."""
    x, y = aligned(np.zeros(40, np.float32))[4:36], aligned(np.zeros(32, np.float32))
    assert loads_and_stores(run("copy_strided", 1, 32, x, y, 1))[False].transactions == 5


@pytest.mark.parametrize(("name", "wavefronts"), [("transpose_conflicting", 32), ("transpose_padded", 1)])
def test_bank_conflicts(run, name, wavefronts):
    x, y = aligned(np.arange(1024, dtype=np.float32).reshape(32, 32)), aligned(np.zeros((32, 32), np.float32))
    report = run(name, 1, 256, x, y)
    accesses = [a for a in report.counters.accesses if a.space == "shared"]
    assert not report.findings and (y == x.T).all()
    assert sum(a.requests for a in accesses if not a.store) == 32
    assert sum(a.transactions for a in accesses if not a.store) == 32 * wavefronts
    assert sum(a.transactions for a in accesses if a.store) == 32


@pytest.mark.parametrize(
    ("address", "wavefronts"),
    [
        ("shl.b32 %r1, %r0, 3", 2),  # side by side
        ("shl.b32 %r1, %r0, 7", 32),  # one below the other, in two banks
        ("shl.b32 %r1, %r0, 7; @%p mov.u32 %r1, 8", 17),  # so for the first half, the second all in one place
    ],
)
def test_wide_accesses_go_by_half_warps(address, wavefronts):
    text = f""".visible .entry k() {{ .reg .b32 %r<2>; .reg .f64 %fd<1>; .reg .pred %p; .shared .align 8 .b8 x[4096];
      mov.u32 %r0, %tid.x; setp.gt.u32 %p, %r0, 15; {address}; mov.u32 %r0, x; add.u32 %r1, %r1, %r0;
      mov.f64 %fd0, 0d3FF0000000000000; st.shared.f64 [%r1], %fd0; ret; }}"""
    (access,) = ptx.launch(ptx.parse(text), "k", (1,), (32,), b"", []).counters.accesses
    assert (access.requests, access.transactions, access.bytes_asked) == (1, wavefronts, 256)
