"""PTX arithmetic on NumPy arrays, to the bit: one correctly rounded result wherever the ISA promises one.

What lives here: fused multiply-add, conversions, comparisons, and the table :data:`OPERATIONS` of what maps typed operands
to one typed result, all by the PTX ISA 9.0. What lives elsewhere: registers, memory and control (``ptx.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tests.cuda.ptx_parse import BYTES

Array = np.ndarray[Any, np.dtype[Any]]

# How a register is seen through an instruction's type. bf16 has no NumPy type: its bits.
NUMPY = {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
NUMPY |= {f"{k}{8 * n}": np.dtype(f"{'i' if k == 's' else 'u'}{n}") for k in "bus" for n in (1, 2, 4, 8)}
NUMPY |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")}

# Significant bits, least exponent of a normal number, greatest finite value.
_FORMATS = {
    "f16": (11, -14, 65504.0),
    "bf16": (8, -126, float.fromhex("0x1.fep127")),
    "f32": (24, -126, float(np.finfo(np.float32).max)),
    "f64": (53, -1022, float(np.finfo(np.float64).max)),
}
_COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
_COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal}
_NEAREST = {"n": np.rint, "z": np.trunc, "m": np.floor, "p": np.ceil}


def canonical(x: Array) -> Array:
    """Give float32 NaNs the bits that the ISA gives them, 0x7fffffff; float64 NaNs keep their payload."""
    if x.dtype == np.float32 and (nan := np.isnan(x)).any():
        x = np.where(nan, np.uint32(0x7FFFFFFF).view(np.float32), x)
    return x


# ---- fused multiply-add ----------------------------------------------------------------------------------------------


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b rounded and what the rounding lost (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a * b rounded and what the rounding lost (Dekker, halves by Veltkamp)."""
    high_a, high_b = (x * 134217729.0 - (x * 134217729.0 - x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    p = a * b
    return p, low_a * low_b - (((p - high_a * high_b) - low_a * high_b) - high_a * low_b)


def _odd(s: Array, lost: Array) -> Array:
    """Round s + lost to odd: of the two neighbours of an inexact sum the one with an odd last bit."""
    bits = s.view(np.int64)
    step = np.where((lost > 0) == (s > 0), 1, -1)
    return np.where((lost != 0) & (bits & 1 == 0), bits + step, bits).view(np.float64)


def _fma32(a: Array, b: Array, c: Array) -> Array:
    """Sum the product, exact in float64, rounded to odd: that leaves float32's rounding its ties."""
    s, lost = _two_sum(a.astype(np.float64) * b, np.asarray(c, np.float64))
    return np.where(np.isfinite(s), _odd(s, np.where(np.isfinite(s), lost, 0)), s).astype(np.float32)


def _fma64(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE Trans. Comp. 57 (2008), algorithm 5.

    Where a step could overflow or underflow, by exact fractions.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _two_product(a, b)
    sum_high, sum_low = _two_sum(c, low)
    total, rest = _two_sum(high, sum_high)
    result = np.asarray(total + _odd(*_two_sum(rest, sum_low)))
    exact = (a == 0) | (b == 0) | ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    # A finite product that overflows does not meet an infinite c.
    infinite = np.isinf(c) & np.isfinite(a) & np.isfinite(b)
    result = np.where(exact, np.where(infinite, c, a * b + c), result)
    size = np.abs(high)
    safe = (np.abs(a) < 2.0**970) & (np.abs(b) < 2.0**970) & (np.abs(c) < 2.0**970) & (size > 2.0**-900)
    for i in np.flatnonzero(~exact & ~(safe & (size < 2.0**970))):
        x, y, z = float(a.flat[i]), float(b.flat[i]), float(c.flat[i])
        fraction = Fraction(x) * Fraction(y) + Fraction(z)
        try:
            result.flat[i] = fraction.numerator / fraction.denominator  # int / int rounds once, subnormals too
        except OverflowError:
            result.flat[i] = np.inf if fraction > 0 else -np.inf
    return result


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c, rounded once, in float32 or float64."""
    return canonical(_fma32(a, b, c) if a.dtype == np.float32 else _fma64(a, b, c))


# ---- conversions -----------------------------------------------------------------------------------------------------


def rounded(x: Array, to: str, mode: str) -> Array:
    """Round float64 values to the values of a format.

    Parameters
    ----------
    x : ndarray of float64
    to : str
        "f16", "bf16", "f32" or "f64".
    mode : str
        "n" (to nearest, ties to even), "z" (to zero), "m" (down) or "p" (up).

    Returns
    -------
    ndarray of float64
        Values that the format has, so that the cast that follows is exact.

    Examples
    --------
    >>> rounded(np.array([1.0 + 2.0**-11, 65520.0, -1e-9]), "f16", "n").tolist()
    [1.0, inf, -0.0]
    """
    digits, least, greatest = _FORMATS[to]
    if to == "f64":
        return x
    exponent = np.frexp(np.where(np.isfinite(x), x, 0))[1] - digits
    quantum = np.maximum(exponent, least - digits + 1)
    y = np.ldexp(_NEAREST[mode](np.ldexp(x, -quantum)), quantum)
    inward = np.full(x.shape, mode == "z") | (x > 0 if mode == "m" else (x < 0) & (mode == "p"))
    overflow = np.where(inward, np.copysign(greatest, x), np.copysign(np.inf, x))
    return np.where(np.isfinite(x), np.where(np.abs(y) > greatest, overflow, y), x)


def pack_float(x: Array, to: str) -> Array:
    """Float64 values that a format has, in its register type; NaN becomes the format's canonical one."""
    if to == "f64":
        return x
    single = canonical(x.astype(np.float32))
    if to == "f32":
        return single
    if to == "bf16":
        return (single.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16)).view(np.float16)


def as_float64(x: Array, kind: str) -> Array:
    """Widen a register of floating-point type `kind`, exactly."""
    if kind == "bf16":
        x = (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float64)


def convert(x: Array, source: str, to: str, mode: str) -> Array:
    """``cvt``: `mode` is "" or one of rn, rz, rm, rp, and rni, rzi, rmi, rpi, which round to integral values."""
    if source[0] in "fb" and to[0] in "fb":
        wide = as_float64(x, source)
        if mode.endswith("i"):
            return pack_float(_NEAREST[mode[1]](wide), to)
        return pack_float(rounded(wide, to, mode[1:] or "n"), to)
    if source[0] in "fb":
        y = _NEAREST[mode[1]](as_float64(x, source))
        bits = 8 * BYTES[to] - (to[0] == "s")
        least, greatest = -(2**bits) if to[0] == "s" else 0, 2**bits - 1
        # The greatest 64-bit integers are no floats: from their successor on, saturate.
        result = np.where(y < greatest, y, 0).clip(least).astype(NUMPY[to])
        # NaN (PTX ISA 9.0, cvt): 0, or 1 << (bits - 1) where float64 or a 64-bit integer is involved.
        nan = np.array(1 << 8 * BYTES[to] - 1 if 8 in (BYTES[source], BYTES[to]) else 0, f"u{BYTES[to]}").view(
            NUMPY[to]
        )
        return np.where(np.isnan(y), nan, np.where(y >= greatest, NUMPY[to].type(greatest), result))
    if to in ("f32", "f64"):
        return x.astype(NUMPY[to])  # NumPy rounds to nearest, ties to even, from 64-bit integers too
    if to[0] in "fb":
        return pack_float(rounded(x.astype(np.float64), to, "n"), to)
    return x.astype(NUMPY[to])


# ---- the rest --------------------------------------------------------------------------------------------------------


def _extreme(pick: Callable[..., Array], x: Array, y: Array) -> Array:
    """``min``/``max``: a NaN gives way to a number, and -0 is less than +0."""
    if x.dtype.kind != "f":
        return pick(x, y)
    ordered = np.where((x == 0) & (y == 0), np.where(np.signbit(x) == (pick is np.fmin), x, y), pick(x, y))
    return canonical(ordered)


def _quotient(x: Array, y: Array) -> Array:
    """Integer division towards zero; a division by zero has been reported, its result is undefined."""
    y = np.where(y == 0, y.dtype.type(1), y)
    q = x // y
    return np.where((q * y != x) & ((x < 0) != (y < 0)), q + q.dtype.type(1), q)


def high_product(x: Array, y: Array) -> Array:
    """Return the upper half of an integer product: Python's integers where twice the width is no type."""
    bits = 8 * x.dtype.itemsize
    if bits < 64:
        twice = np.dtype(f"{x.dtype.kind}{x.dtype.itemsize * 2}")
        return (x.astype(twice) * y.astype(twice) >> twice.type(bits)).astype(x.dtype)
    return (x.astype(object) * y.astype(object) >> bits).astype(x.dtype)


def _shift(x: Array, count: Array, left: bool) -> Array:
    """Shift; counts beyond the width clear the value, or leave its sign."""
    bits = 8 * x.dtype.itemsize
    inside = np.minimum(count, bits - 1).astype(x.dtype)
    shifted = x << inside if left else x >> inside
    return np.where((count >= bits) & (left or x.dtype.kind == "u"), x.dtype.type(0), shifted)


def _insert(field: Array, into: Array, start: Array, length: Array) -> Array:
    """``bfi``: put the lowest bits of a field into another register."""
    ones = np.full_like(into, ~into.dtype.type(0))
    mask = _shift(~_shift(ones, length & 255, left=True), start & 255, left=True)
    return into & ~mask | _shift(field, start & 255, left=True) & mask


def compare(name: str, x: Array, y: Array) -> Array:
    """``setp``'s comparisons; those that end in u hold for NaN too."""
    if name in ("nan", "num"):
        nan = np.isnan(x) | np.isnan(y)
        return nan if name == "nan" else ~nan
    unordered = x.dtype.kind == "f" and name in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name[:-1] if unordered else name)
    holds: Array = _COMPARISONS[plain](x, y)
    if x.dtype.kind == "f":
        nan = np.isnan(x) | np.isnan(y)
        return holds | nan if unordered else holds & ~nan
    return holds


def _wide(x: Array) -> Array:
    return x.astype(f"{x.dtype.kind}{x.dtype.itemsize * 2}")


# Opcode without its type, and what the type is: f (float32, float64), i (integers) or b (bits, predicates). Sums and
# products without .rn are left out: ptxas may contract them, so that their result is open (-fmad=false makes nvcc say .rn).
OPERATIONS: dict[tuple[str, str], Callable[..., Array]] = {
    ("add.rn", "f"): lambda x, y: canonical(x + y),
    ("sub.rn", "f"): lambda x, y: canonical(x - y),
    ("mul.rn", "f"): lambda x, y: canonical(x * y),
    ("div.rn", "f"): lambda x, y: canonical(x / y),
    ("rcp.rn", "f"): lambda x: canonical(x.dtype.type(1) / x),
    ("fma.rn", "f"): fma,
    ("neg", "f"): lambda x: canonical(-x),
    ("abs", "f"): lambda x: canonical(np.abs(x)),
    ("copysign", "f"): lambda sign, x: np.copysign(x, sign),  # the first operand gives the sign
    ("min", "f"): lambda x, y: _extreme(np.fmin, x, y),
    ("max", "f"): lambda x, y: _extreme(np.fmax, x, y),
    ("add", "i"): np.add,
    ("sub", "i"): np.subtract,
    ("mul.lo", "i"): np.multiply,
    ("mul.hi", "i"): high_product,
    ("mul.wide", "i"): lambda x, y: _wide(x) * _wide(y),
    ("mad.lo", "i"): lambda x, y, z: x * y + z,
    ("mad.wide", "i"): lambda x, y, z: _wide(x) * _wide(y) + z,
    ("div", "i"): _quotient,
    ("rem", "i"): lambda x, y: x - _quotient(x, y) * y,
    ("neg", "i"): np.negative,
    ("abs", "i"): np.abs,
    ("min", "i"): np.minimum,
    ("max", "i"): np.maximum,
    ("and", "b"): np.bitwise_and,
    ("or", "b"): np.bitwise_or,
    ("xor", "b"): np.bitwise_xor,
    ("not", "b"): np.bitwise_not,
    ("bfi", "b"): _insert,
    # Rounded once, in the emulator too; of a GPU's the ISA promises an error of 2^-22.
    ("ex2.approx", "f"): lambda x: canonical(np.exp2(x.astype(np.float64)).astype(np.float32)),
    ("popc", "b"): lambda x: np.bitwise_count(x).astype(np.uint32),
    ("shl", "b"): lambda x, count: _shift(x, count, left=True),
    ("shr", "b"): lambda x, count: _shift(x, count, left=False),
    ("shr", "i"): lambda x, count: _shift(x, count, left=False),
}
