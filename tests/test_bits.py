"""Bits that no machine changes: what an instruction set of any width must find, on x86 and on AArch64 alike.

Products round as written, and each column of a sum along rows, and each score, is one chain of multiply-adds. These are
fused in every set but the scalar one, whose bits differ from theirs, but not from machine to machine. No such bits have
sums along columns and softmax's statistics, which have as many chains as a vector has entries; NaN, whose sign is the
processor's.

What lives elsewhere: that these results are right (``test_kernel.py``, ``test_score_kernels.py``).
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from conftest import ACTIVATIONS, DTYPES, Case, require_native
from score_cases import Scores

native = require_native()
pytestmark = pytest.mark.usefixtures("kernels_only")

BITS = {  # of fused multiply-adds, and of the scalar set
    "of_activations": ("10a3a4be98e22ea1", "dc6af909f4152419"),
    "of_products": ("fba348bd9305c7c1", "fba348bd9305c7c1"),
    "of_sums_along_rows": ("fccc3cb8e1014c5d", "02bd0d90730f54bf"),
    "of_scores": ("93ee4e6f690fb700", "0c3aa51e466f43a2"),
}


def draw(number, *shape, least=-3.0):
    """Multiples of 2^-21 from ``least`` to ``least`` + 6, from bits that NumPy promises to keep."""
    raw = np.random.PCG64(number).random_raw(int(np.prod(shape))) >> np.uint64(42)
    return (raw.astype(np.float64) * 6 * 2.0**-22 + least).reshape(shape)


def of_activations():
    """Values and slopes: the derivatives of phi(f) g by g and f, over all magnitudes that round or saturate otherwise."""
    for dtype in DTYPES:
        f = draw(1, 40, 67) * 2.0 ** (np.arange(40) - 34)[:, None]
        ones = np.ones(f.shape, dtype)
        for name in ACTIVATIONS:
            yield from Case(None, [f.astype(dtype), ones], [name, None]).backward(np.ones(40, dtype))


def of_products():
    """From one factor to eight, at the tails of vectors, and the narrow types' every value and rounding."""
    for dtype in DTYPES:
        for count in range(1, 9):
            factors = [draw(m, 5, 67).astype(dtype) for m in range(count)]
            yield from Case(None, factors).backward(draw(9, 5).astype(dtype))
    for dtype in DTYPES[2:]:
        bits = np.arange(2**16, dtype=np.uint16).reshape(64, 1024)
        bits[bits & 0x7FFF > np.array(np.inf, dtype).view(np.uint16)] = 0  # NaN
        values = bits.view(dtype)
        for by in (values.dtype.type(1), values.dtype.type(1.0078125)):
            yield Case(None, [values, np.full_like(values, by)]).backward(np.ones(64, dtype))[1]


def of_sums_along_rows():
    for dtype, terms, cols in itertools.product(DTYPES, (1, 16, 17, 300), (19, 67, 137)):
        yield Case(None, [draw(1, terms, cols).astype(dtype), draw(2, terms, cols).astype(dtype)], dim=0).forward()


def of_scores():
    """Find a matrix of scores and its gradients, a softmax's gradients, and the best keys of each query."""
    sizes = [(33, 60, 37), *((9, c, c) for c in range(1, 36))]
    dtypes = ("float64", "float32", "float16")  # bfloat16 is multiplied in pairs by some sets
    for dtype, (rows, cols, n) in itertools.product(dtypes, sizes):
        s = Scores(
            (draw(1, rows, n).astype(dtype),),
            (draw(2, cols, n).astype(dtype),),
            key_bias=draw(3, cols),
            logit_scale=0.3,
        )
        coefs = [draw(number, 5, count, least=0) for number, count in ((4, rows), (5, cols))]
        yield native.score_matrix(*s.arguments(), False)
        yield from native.score_matrix_grad(draw(6, rows, cols).astype(dtype), *s.arguments(), (True, True), False)
        yield from native.softmax_grad(*s.arguments(), True, *coefs, (True, True, False, False), False)[:2]
        yield from native.top_k(*s.arguments()[:9], None, None, None, min(7, cols), False)


@pytest.mark.parametrize("results", [of_activations, of_products, of_sums_along_rows, of_scores])
def test_bits_are_the_same_on_every_machine(results):
    found = hashlib.sha256()
    for array in results():
        assert not np.isnan(array).any()
        found.update(array.tobytes())
    assert found.hexdigest()[:16] == BITS[results.__name__][native.isa() == "scalar"]
