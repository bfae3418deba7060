"""The activations of csrc/formula.h and their derivatives, in units in the last place, over the whole range of a dtype.

What lives elsewhere: NaN, infinities and signs of zero (``test_kernel.py``).
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest

from conftest import ACTIVATIONS, require_native

native = require_native()
pytestmark = pytest.mark.usefixtures("kernels_only")

NUMPY = SimpleNamespace(exp=np.exp, tanh=np.tanh, erfc=np.vectorize(math.erfc), sqrt=np.sqrt, pi=np.pi, where=np.where)
MPMATH = SimpleNamespace(
    exp=mpmath.exp,
    tanh=mpmath.tanh,
    erfc=lambda z: mpmath.erfc(min(max(z, -99), 99)),  # it fails beyond float64's range of integers
    sqrt=mpmath.sqrt,
    pi=mpmath.pi,
    where=lambda condition, a, b: a if condition else b,
)


def sigmoid(m, z):
    return 1 / (1 + m.exp(-z))


def normal_cdf(m, z):
    return m.erfc(-z / m.sqrt(2)) / 2


# Forms without cancellation, unlike those of the reference, so that float64 serves as the truth of float32.
EXACT = {
    None: (lambda m, z: z, lambda m, z: 1 + 0 * z),
    "tanh": (lambda m, z: m.tanh(z), lambda m, z: 4 * sigmoid(m, 2 * z) * sigmoid(m, -2 * z)),
    "sigmoid": (sigmoid, lambda m, z: sigmoid(m, z) * sigmoid(m, -z)),
    "relu": (lambda m, z: m.where(z > 0, z, 0 * z), lambda m, z: m.where(z > 0, 1 + 0 * z, 0 * z)),
    "silu": (lambda m, z: z * sigmoid(m, z), lambda m, z: sigmoid(m, z) * (1 + z * sigmoid(m, -z))),
    "gelu": (
        lambda m, z: z * normal_cdf(m, z),
        lambda m, z: normal_cdf(m, z) + z * m.exp(-z * z / 2) / m.sqrt(2 * m.pi),
    ),
}


def points(dtype, count, rng):
    """Arguments of every magnitude the dtype has, and more of those where the activations bend."""
    limits = np.finfo(dtype)
    magnitudes = 2.0 ** rng.uniform(limits.minexp - limits.nmant, limits.maxexp, count)
    bends = [rng.uniform(-far, far, count) for far in (0.01, 1, 5, 20, 120, 800)]
    return np.concatenate([magnitudes, -magnitudes, *bends]).astype(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("dtype", "count"), [("float32", 20_000), ("float64", 300)])
def test_activation_and_derivative(dtype, count, activation, rng):
    """4 ulp; the derivatives cross zero or approach it as 1 - 1 does, so that theirs are ulp of 1 below 1."""
    z = points(dtype, count, rng)
    for shaped, dim in ((z[None, :], 0), (z[:, None], 1)):
        value = native.fusion_sum(None, (shaped,), activation, None, "one", dim, False)
        needs = [False, True]
        _, slope = native.fusion_sum_grad(np.ones_like(z), None, (shaped,), activation, None, "one", dim, needs, False)
        phi, derivative = EXACT[activation]
        if dtype == "float32":
            with np.errstate(all="ignore"):
                want, want_slope = phi(NUMPY, z.astype(np.float64)), derivative(NUMPY, z.astype(np.float64))
        else:
            with mpmath.workdps(40):
                want, want_slope = (
                    np.array([float(f(MPMATH, mpmath.mpf(float(x)))) for x in z]) for f in (phi, derivative)
                )
        tiny = abs(z) * np.finfo(dtype).smallest_subnormal  # z times a factor that is subnormal, and rounded to that
        for got, exact, last in (
            (value, want, np.spacing(abs(want).astype(dtype))),
            (slope.reshape(-1), want_slope, np.spacing(np.maximum(abs(want_slope), 1).astype(dtype))),
        ):
            ok = abs(got.astype(np.longdouble) - exact) <= 4 * last + tiny
            worst = np.argmin(ok)
            assert ok.all(), f"{(~ok).sum()} wrong; at {z[worst]!r} got {got[worst]!r}, want {exact[worst]!r}"


def test_every_activation_is_known_here():
    assert set(EXACT) == set(ACTIVATIONS)
