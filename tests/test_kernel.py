"""The kernels (csrc/cpu) against the oracle: error bounds, sizes near every edge, special values, instruction sets.

What lives elsewhere: memory, that is layouts, guard pages and big offsets (``test_layouts.py``), the activations' own
error (``test_form.py``), the arguments (``test_api.py``), threads, forks and signals (``test_parallel.py``).
"""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from conftest import (
    ACTIVATIONS,
    DTYPES,
    FORMS,
    MIXED,
    TABLE,
    TESTS,
    Case,
    check_both,
    check_within,
    missing,
    oracle,
    random,
    require_native,
    run_python,
    widened,
)
from fusionsum import reference

native = require_native()
EDGES = [*range(71), *(size + near for size in (128, 256, 512, 1024, 2048, 4096) for near in (-1, 0, 1))]


pytestmark = pytest.mark.usefixtures("kernels_only")


# Accuracy


@pytest.mark.parametrize("kind", ["normal", "uniform", "log-normal", "heavy-tailed"])
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + list(MIXED), ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_accuracy(form, dtypes, kind, rng):
    case = FORMS[form].case(rng, dtypes[1], dtypes[0], kind=kind, B=7, n=300, O=21)
    if dtypes[1] == "float16":  # keep eight factors and their sum within its range
        case = case.mapped(lambda z: np.clip(z, -2, 2))
        if case.weights is not None:
            case.weights = np.asarray(case.weights * case.weights.dtype.type(2**-4))
    check_both(case, rng)


def ulps(got, want):
    """Distance in units in the last place of the dtype, where `want` is wider."""
    return abs(got.astype(np.longdouble) - want) / np.spacing(abs(want).astype(got.dtype)).astype(np.longdouble)


@pytest.mark.parametrize("kind", ["positive", "log-normal"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 4), ("float32", 4), ("float16", 1), ("bfloat16", 1)])
@pytest.mark.parametrize("terms", [1, 10, 1000, 100_000, 1_000_000])
def test_accuracy_in_ulp_without_cancellation(terms, dtype, bound, kind, rng):
    """TESTS.md allows the 16-bit types 32 and 256; they are summed in float32 and rounded once."""
    f, g = (random(rng, (3, terms), dtype, kind) for _ in range(2))
    weights_dtype = "float64" if dtype == "float64" else "float32"
    weights = (random(rng, (terms,), "float64", kind) / (40 * terms)).astype(weights_dtype)
    wide = [a.astype(np.longdouble) for a in (weights, f, g)]
    u = (random(rng, (3,), "float64", kind) / 4).astype(dtype)

    got = native.fusion_sum(weights, (f, g), None, None, "one", -1)
    assert (ulps(got.astype(dtype), (wide[0] * wide[1] * wide[2]).sum(-1)) <= bound).all()
    upright = native.fusion_sum(weights[:, None], (f.T.copy(), g.T.copy()), None, None, "one", 0)
    assert (ulps(upright.astype(dtype), (wide[0] * wide[1] * wide[2]).sum(-1)) <= bound).all()
    by_rows = [z.T.copy() for z in (f, g)]  # a gradient that sums a million rows
    weight = random(rng, (3,), weights_dtype, kind)
    d_weight, *_ = native.fusion_sum_grad(
        weights.astype(dtype), weight, tuple(by_rows), None, None, "one", -1, [True, False, False]
    )
    want = (weights.astype(dtype).astype(np.longdouble)[:, None] * wide[1].T * wide[2].T).sum(0)
    if dtype != "float16":  # whose weights / (40 terms) are subnormal
        assert (ulps(d_weight, want) <= bound).all()
    grads = native.fusion_sum_grad(u, weights, (f, g), None, None, "one", -1, [False, True, True])
    for grad, other in zip(grads[1:], (wide[2], wide[1]), strict=True):
        want = u.astype(np.longdouble)[:, None] * wide[0] * other
        normal = want > float(ml_dtypes.finfo(dtype).smallest_normal)
        assert (ulps(grad[normal], want[normal]) <= bound).all()


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + list(MIXED), ids="-".join)
@pytest.mark.parametrize("masks", [None, "rows", "full"], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_exact_on_small_integers(form, masks, dtypes, rng):
    """Every sum is an integer that float32 holds, so every order of summation, and so every ISA, must find it."""
    case = FORMS[form].case(rng, dtypes[1], dtypes[0], kind="integers", B=70, n=67, O=9)
    if masks:
        case = case.masked(rng, masks, "one")
    u = random(rng, case.output_shape, dtypes[1], "integers")
    wanted = [*oracle(case), *oracle(case, u)]
    for got, want in zip([case.forward(), *case.backward(u)], wanted, strict=True):
        assert abs(want).max() < 2**24
        assert (got == want.astype(got.dtype)).all()


# Edges


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [*TABLE, "M=1", "M=3", "M=5", "one weight per row", "terms first"])
def test_edges_of_terms(form, dtype, rng):
    for n in EDGES if form in ("paired", "M=3") else EDGES[:90:3] + EDGES[71:]:
        check_both(FORMS[form].case(rng, dtype, n=n, B=2, C=2, O=2, K=2), rng)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_outputs(dtype, rng):
    for size in EDGES:
        check_both(FORMS["vector output"].case(rng, dtype, n=3, B=2, O=size), rng)
        check_both(FORMS["terms first"].case(rng, dtype, n=3, B=size), rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [*TABLE, "M=4", "weights per row"])
def test_edges_of_rows(form, dtype, rng):
    """Gradients of shared operands are summed over groups of rows."""
    for size in (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1025):
        for n in (1, 9):
            check_both(FORMS[form].case(rng, dtype, n=n, B=size, O=3), rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", range(1, reference.MAX_FACTORS + 1))
def test_edges_of_activations(count, dtype, rng):
    """Every activation at every tail length of a vector, on every number of factors, with masks."""
    for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33):
        names = [ACTIVATIONS[(m + n) % len(ACTIVATIONS)] for m in range(count)]
        case = FORMS[f"M={count}"].case(rng, dtype, n=n, B=3, activations=names)
        check_both(case, rng)
        check_both(case.masked(rng, "rows", "one"), rng)
        check_both(case.masked(rng, "full", "zero"), rng)


@pytest.mark.parametrize("masks", ["rows", "full"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms_with_activations_and_masks(form, activation, masks, rng):
    for dtypes in (("float64", "float64"), ("float32", "float32"), *MIXED):
        case = FORMS[form].case(rng, dtypes[1], dtypes[0], n=13, B=5, O=11, activations=activation)
        check_both(case, rng)
        for absent in ("one", "zero"):
            check_both(case.masked(rng, masks, absent), rng)


@pytest.mark.parametrize("form", TABLE)
def test_only_the_gradients_asked_for(form, rng):
    case = FORMS[form].case(rng, "float32", n=9)
    u = random(rng, case.output_shape, "float32")
    count = len(case.operands)
    full = native.fusion_sum_grad(u, case.weights, tuple(case.factors), None, None, "one", case.dim, [True] * count)
    for pattern in range(2**count):
        needs = [bool(pattern >> k & 1) for k in range(count)]
        some = native.fusion_sum_grad(u, case.weights, tuple(case.factors), None, None, "one", case.dim, needs)
        for grad, want, need in zip(some, full, needs, strict=True):
            if need:
                check_within(grad, widened(want), 2e-6 * abs(widened(want)) + 1e-5)
            else:
                assert grad is None


# Special values

SPECIALS = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.5, "max", "-max", "tiny", "-tiny", "normal", "-normal"]


def specials(dtype):
    limits = ml_dtypes.finfo(dtype)
    named = {"max": limits.max, "tiny": limits.smallest_subnormal, "normal": limits.smallest_normal}
    values = [named[x.lstrip("-")] * (-1 if x[0] == "-" else 1) if isinstance(x, str) else x for x in SPECIALS]
    return np.array([float(x) for x in values]).astype(dtype)


def as_eager(got, want):
    """NaN where eager has NaN, infinities and zeros where it has them, the rest to its last places."""
    got, want = widened(got), widened(want)
    assert (np.isnan(got) == np.isnan(want)).all()
    assert (np.isinf(got) == np.isinf(want)).all()
    rest = ~np.isnan(want)
    assert (np.sign(got[rest]) == np.sign(want[rest])).all()
    finite = np.isfinite(want)
    check_within(got[finite], want[finite], 1e-6 * abs(want[finite]) + 1e-44)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("places", ["alone", "in a row", "in a column"])
def test_special_values_as_eager(places, activation, dtype):
    """Every pair of specials as one product, and among plain terms of longer sums."""
    values = specials(dtype)
    f, g = (z.reshape(-1, 1) for z in np.meshgrid(values, values))
    if places != "alone":
        ones = np.ones((len(f), 20), dtype)
        f, g = (np.concatenate([ones, z, ones], axis=1) for z in (f, g))
    dim = -1
    if places == "in a column":
        f, g, dim = f.T.copy(), g.T.copy(), 0
    case = Case(None, [f, g], [None, activation], dim=dim)
    u = np.ones(len(values) ** 2, dtype)
    normalised = (None, [f, g], [None, activation], [None, None], "one", dim if dim < 0 else dim - f.ndim)
    with np.errstate(all="ignore"):
        as_eager(case.forward(), reference.fusion_sum(*normalised))
        grads = zip(case.backward(u), reference.fusion_sum_grad(u, *normalised, [True] * 3)[1:], strict=True)
        for got, want in grads:
            as_eager(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sign_of_zero_survives_where_nothing_is_summed(dtype):
    f, g = np.array([[0.0, -0.0, 0.0, -0.0]], dtype), np.array([[2.0, 2.0, -2.0, -2.0]], dtype)
    _, d_g = Case(None, [f, g]).backward(np.ones(1, dtype))
    assert np.signbit(d_g).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_kept_and_the_flags_of_the_fpu_with_them(dtype, rng):
    tiny = np.array(float(ml_dtypes.finfo(dtype).smallest_subnormal)).astype(dtype)
    counts = rng.integers(1, 8, (64, 64))
    z = (counts * widened(tiny)).astype(dtype)
    ones = np.ones_like(z)
    assert (Case(None, [z, ones]).forward() == (counts.sum(-1) * widened(tiny)).astype(dtype)).all()
    assert (Case(None, [z, ones]).backward(np.ones(64, dtype))[1] == z).all()
    smallest = np.finfo(np.float64).smallest_subnormal
    assert np.float64(smallest) * np.float64(1) == smallest
    assert np.float32(1e-40) + np.float32(0) != 0


# Instruction sets


@pytest.mark.skipif("FUSIONSUM_ISA" in os.environ, reason="this is the run that an instruction set was asked of")
@pytest.mark.parametrize("isa", [name for name, _ in native.isas()])
def test_every_instruction_set(isa):
    """The tests of the kernels again, in a process that is forced to use the set."""
    if not dict(native.isas())[isa]:
        missing(f"a processor with {isa}")
    assert run_python("import fusionsum.backend as b; print(b.native.isa())", FUSIONSUM_ISA=isa).strip() == isa
    if isa == native.isa():
        return  # it is what all the others of these tests run
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            *(str(TESTS / f"test_{name}.py") for name in ("kernel", "form", "layouts")),
        ],
        env=os.environ | {"FUSIONSUM_ISA": isa},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_an_unknown_instruction_set_is_an_error():
    code = """
try:
    import fusionsum
except Exception as error:
    print(type(error).__name__, error)
"""
    said = run_python(code, FUSIONSUM_ISA="mmx")
    assert "mmx" in said
    assert "FUSIONSUM_ISA" in said
    assert all(name in said for name, _ in native.isas())
