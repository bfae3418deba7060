"""The kernels (csrc/cpu) against the oracle: error bounds, sizes near every edge, special values, instruction sets.

What lives elsewhere: memory, that is layouts, guard pages and big offsets (``test_layouts.py``), the activations' own
error (``test_formula.py``), the arguments (``test_api.py``), threads, forks and signals (``test_parallel.py``).
"""

from __future__ import annotations

import hashlib
import itertools
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
    NARROW,
    TABLE,
    TESTS,
    Case,
    check_both,
    check_within,
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


# The 16-bit types are summed in float32 and rounded once; float64 is summed in nothing wider and gets more room.
ULPS = {"float64": 8, "float32": 4, "float16": 1, "bfloat16": 1}


def check_ulps(got, want):
    """Compare with a longdouble, in units in the last place of what was got."""
    last = np.spacing(abs(want).astype(got.dtype)).astype(np.longdouble)
    error = abs(got.astype(np.longdouble) - want) / last
    ok = error <= ULPS[got.dtype.name]
    assert ok.all(), f"{(~ok).sum()} of {ok.size} are off by up to {error.max():.1f} ulp of {got.dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        *(("positive", terms) for terms in (1, 10, 64, 100, 1000, 100_000)),
        *(("log-normal", terms) for terms in (64, 1000, 1_000_000)),
    ],
)
def test_accuracy_in_ulp_without_cancellation(kind, terms, dtype, rng):
    """Sums along rows and along columns, the output's and a weight's gradient, and the plain products of the others."""
    rows = 3 if terms > 1000 else 300
    f, g = ((random(rng, (rows, terms), "float64", kind) / 10).astype(dtype) for _ in range(2))
    f_up, g_up = f.T.copy(), g.T.copy()
    products = f.astype(np.longdouble) * g.astype(np.longdouble)
    check_ulps(native.fusion_sum(None, (f, g), None, None, "one", -1, False), products.sum(-1))
    check_ulps(native.fusion_sum(None, (f_up, g_up), None, None, "one", 0, False), products.sum(-1))
    u = random(rng, (terms,), dtype, "positive")
    for weights in {dtype, "float32" if dtype in NARROW else dtype}:
        weights = random(rng, (rows,), weights, "positive")
        grads = native.fusion_sum_grad(u, weights, (f_up, g_up), None, None, "one", -1, [True] * 3, False)
        check_ulps(grads[0], (products * u.astype(np.longdouble)).sum(-1))
        for grad, other in zip(grads[1:], (g_up, f_up), strict=True):
            check_ulps(grad, u.astype(np.longdouble)[:, None] * weights * other.astype(np.longdouble))


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
    full = native.fusion_sum_grad(
        u, case.weights, tuple(case.factors), None, None, "one", case.dim, [True] * count, False
    )
    for pattern in range(2**count):
        needs = [bool(pattern >> k & 1) for k in range(count)]
        some = native.fusion_sum_grad(u, case.weights, tuple(case.factors), None, None, "one", case.dim, needs, False)
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

ASKED_FOR = pytest.mark.skipif(
    "FUSIONSUM_ISA" in os.environ, reason="this is the run that an instruction set was asked of"
)


def run_again(**environment):
    """Run the tests of the kernels in a process that is forced to use an instruction set."""
    names = ["kernel", "formula", "layouts", "score_kernels", "bits"]
    if environment["FUSIONSUM_ISA"] == "avx512_bf16":  # all but scores is avx512's
        names = ["score_kernels"]
    files = [str(TESTS / f"test_{name}.py") for name in names]
    left_out = "not beyond and not 1000000"  # seconds each, of what does not depend on the set
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", left_out, *files],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@ASKED_FOR
@pytest.mark.parametrize("isa", [name for name, _ in native.isas()])
def test_every_instruction_set(isa):
    if not dict(native.isas())[isa]:
        pytest.skip(f"missing: a processor with {isa}")  # which no CI can install
    assert run_python("import fusionsum.backend as b; print(b.native.isa())", FUSIONSUM_ISA=isa).strip() == isa
    if isa != native.isa():  # it is what all the others of these tests run
        run_again(FUSIONSUM_ISA=isa)


def digest():
    """Hash the output and every gradient of each form, in each dtype, with each activation."""
    found = hashlib.sha256()
    for form, dtypes, activation in itertools.product(
        FORMS.values(), [*((dtype, dtype) for dtype in DTYPES), *MIXED], ACTIVATIONS
    ):
        rng = np.random.default_rng(0)
        case = form.case(rng, dtypes[1], dtypes[0], n=131, B=5, O=37, activations=activation).masked(rng, "rows", "one")
        for result in (case.forward(), *case.backward(random(rng, case.output_shape, dtypes[1]))):
            found.update(np.asarray(result).tobytes())
    return found.hexdigest()


@ASKED_FOR
@pytest.mark.skipif(
    "FUSIONSUM_SIMDE" not in os.environ, reason="missing: FUSIONSUM_SIMDE, where .ci/run put that build"
)
def test_avx512_by_simde():
    """A build whose AVX-512 is emulated (tests/simde) passes the tests, and has the bits of a processor that has it."""
    build = {"PYTHONPATH": os.pathsep.join([os.environ["FUSIONSUM_SIMDE"], str(TESTS)]), "FUSIONSUM_ISA": "avx512"}
    digest = (
        "import test_kernel as t, score_cases as s; print(t.native.__file__, t.native.isa(), t.digest(), s.digests())"
    )
    file, isa, *emulated = run_python(digest, **build).split()
    assert file.startswith(os.environ["FUSIONSUM_SIMDE"])
    assert isa == "avx512"
    if dict(native.isas()).get("avx512"):
        assert emulated == run_python(digest, FUSIONSUM_ISA="avx512").split()[2:]
    run_again(**build)


def test_an_unknown_instruction_set_is_an_error():
    code = """
import numpy as np, fusionsum as fs
for call in (fs.backends, lambda: fs.fusion_sum(None, np.ones(3))):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    said = run_python(code, FUSIONSUM_ISA="mmx").splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith("FUSIONSUM_ISA=mmx: expected one of")
        assert line.endswith(": " + ", ".join(name for name, runs_here in native.isas() if runs_here))
