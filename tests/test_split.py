"""Sums that split in two: which do, and what NumPy arrays get that take the road of the scores.

What lives elsewhere: tensors (``test_contraction.py``), the kernels of scores (``test_scores.py``).
"""

from __future__ import annotations

import tempfile

import ml_dtypes
import numpy as np
import pytest

import fusionsum as fs
from conftest import (
    ACTIVATIONS,
    DTYPES,
    MIXED,
    SIZES,
    SPLIT,
    WHOLE,
    Case,
    Form,
    check_backward,
    check_both,
    check_forward,
    random,
    require_native,
    run_python,
    same_bits,
)
from fusionsum import api, call, split

ROAD = ["score_matrix", "score_matrix_grad"]


class Road:
    """Stands for the native module, lets it decline nothing and notes which of its functions were called."""

    def __init__(self, native):
        self.native, self.seen = native, []

    def __getattr__(self, name):
        def called(*given):
            found = getattr(self.native, name)(*given)
            assert found is not NotImplemented, name
            self.seen.append(name)
            return found

        return called

    def by_scores(self) -> list[str]:
        """Return, and forget, which functions of scores were called."""
        seen, self.seen = [name for name in self.seen if name.startswith("score")], []
        return seen


@pytest.fixture(autouse=True)
def road(monkeypatch):
    """Let small cases through."""
    monkeypatch.setattr(split, "LEAST_WORK", 1)
    monkeypatch.setattr(split, "LEAST_EXTENT", 8)
    monkeypatch.setattr(api, "native", Road(require_native()))
    return api.native


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, *MIXED, ("float64", "float16"), ("bfloat16", "float16")], ids=str)
@pytest.mark.parametrize("form", SPLIT)
def test_values(form, dtype, road, rng):
    weights_dtype, dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    check_both(SPLIT[form].case(rng, dtype, weights_dtype, **SIZES), rng)
    assert road.by_scores() == ROAD


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masks", [None, ("rows", "one"), ("rows", "zero")], ids=str)
@pytest.mark.parametrize("form", SPLIT)
def test_activations_and_masks(form, masks, dtype, road, rng):
    count = len(SPLIT[form].factors)
    for shift in range(0, len(ACTIVATIONS), count):
        names = [ACTIVATIONS[(m + shift) % len(ACTIVATIONS)] for m in range(count)]
        case = SPLIT[form].case(rng, dtype, **SIZES, activations=names)
        check_both(case if masks is None else case.masked(rng, *masks), rng)
        assert road.by_scores() == ROAD


@pytest.mark.parametrize("place", ["n", "1n", "B1n", "Cn", "1Cn", "B11", "C1", "11", ""])
def test_weights_anywhere(place, road, rng):
    for factors in (("B1n", "Cn"), ("Cn", "B1n")):
        check_both(Form(place, factors).case(rng, "float32", **SIZES), rng)
        assert road.by_scores() == ROAD


def test_masks_wider_than_their_factor(road, rng):
    case = Form("n", ("B1n", "1n", "Cn")).case(rng, "float32", **SIZES)
    case.present = [None, rng.random((SIZES["C"], 1)) > 0.4, None]  # of the right side, as its factor then is
    check_both(case, rng)
    assert road.by_scores() == ROAD
    case.factors[1] = case.factors[1][None]
    case.present[1] = rng.random((SIZES["B"], SIZES["C"])) > 0.4
    check_both(case, rng)
    assert road.by_scores() == []


@pytest.mark.parametrize("form", SPLIT)
@pytest.mark.parametrize(
    "dtypes",
    [("float32", "float64"), ("float16", "float32"), ("bfloat16", "float64"), ("float64", "bfloat16")],
    ids=str,
)
def test_gradients_of_other_dtypes(dtypes, form, road, rng):
    case = SPLIT[form].case(rng, dtypes[0], **SIZES)
    check_backward(case, random(rng, case.output_shape, dtypes[1]))
    assert road.by_scores() == ROAD[1:]


@pytest.mark.parametrize("form", ["all pairs", "mixing", "two factors a side", "terms in the middle"])
def test_factors_of_several_dtypes(form, road, rng):
    for dtypes in (("float32", "float64"), ("bfloat16", "float32"), ("float16", "bfloat16"), ("float64", "float16")):
        case = SPLIT[form].case(rng, dtypes[0], **SIZES)
        case.factors[-1] = case.factors[-1].astype(dtypes[1])
        check_both(case, rng)
        assert road.by_scores() == ROAD


def test_layouts(road, rng):
    """Transposed, broadcast, strided, backward; all read-only, as inputs may be."""
    B, C, n = (SIZES[k] for k in "BCn")
    for f, g in (
        (np.asfortranarray(random(rng, (B, n), "float32"))[:, None], random(rng, (n, C), "float32").T),
        (random(rng, (2 * B, 1, 2 * n), "float32")[::2, :, ::2], random(rng, (C, n + 1), "float32")[:, 1:]),
        (random(rng, (B, 1, n), "float32")[::-1], random(rng, (C, n), "float32")[:, ::-1]),
        (
            np.broadcast_to(random(rng, (1, 1, n), "float32"), (B, 1, n)),
            np.broadcast_to(random(rng, (C, 1), "float32"), (C, n)),
        ),
    ):
        for weights in (None, random(rng, (n,), "float32")):
            case = Case(weights, [f, g])
            for x in case.operands:
                x.flags.writeable = False
            check_forward(case)
            for u in (random(rng, (C, B), "float32").T, np.broadcast_to(np.float32(1), (B, C))):
                check_backward(case, u)
            assert road.by_scores() == [ROAD[0], ROAD[1], ROAD[1]]


def test_inputs_are_left_alone_and_results_are_the_caller_s(road, rng):
    for form in SPLIT:
        case = SPLIT[form].case(rng, "float32", **SIZES).masked(rng, "rows", "one")
        given = [*case.operands, *case.present]
        kept = [a.copy() for a in given]
        results = [case.forward(), *case.backward(np.ones(case.output_shape, "float32"))]
        assert all(same_bits(a, b) for a, b in zip(given, kept, strict=True))
        for result in results:
            assert type(result) is np.ndarray
            assert result.flags.writeable
            assert result.flags.c_contiguous
            assert not any(np.shares_memory(result, a) for a in [*given, *(r for r in results if r is not result)])
        assert road.by_scores() == ROAD


@pytest.mark.parametrize("absent", ["one", "zero"])
def test_what_is_absent_never_matters(absent, road, rng):
    case = SPLIT["all pairs"].case(rng, "float32", **SIZES).masked(rng, "rows", absent)
    for z, mask in zip(case.factors, case.present, strict=True):
        z[~mask] = np.nan
    assert np.isfinite(case.forward()).all()
    grads = case.backward(np.ones(case.output_shape))
    assert all(np.isfinite(d).all() for d in grads)
    assert not any(grads[m + 1][~mask].any() for m, mask in enumerate(case.present))
    assert road.by_scores() == ROAD


def test_results_beyond_their_range_are_infinite_without_a_warning(road, rng):
    f, g = np.full((SIZES["B"], 1, 9), 6e4, "float16"), np.full((SIZES["C"], 9), 6e4, "float16")
    assert np.isinf(fs.fusion_sum(None, f, g)).all()
    _, d_f, d_g = fs.fusion_sum_grad(np.full((SIZES["B"], SIZES["C"]), 6e4, "float32"), None, f, g)
    assert np.isinf(d_f).all()
    assert np.isinf(d_g).all()
    assert road.by_scores() == ROAD


def test_memory_maps(road, rng):
    with tempfile.TemporaryFile() as file:
        f = np.memmap(file, "float32", shape=(SIZES["B"], 1, SIZES["n"]))
        f[:] = random(rng, f.shape, "float32")
        case = Case(None, [f, random(rng, (SIZES["C"], SIZES["n"]), "float32")])
        assert type(case.forward()) is np.ndarray
        check_both(case, rng)
    assert road.by_scores() == [ROAD[0], *ROAD]


# ---- which calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WHOLE)
def test_what_does_not_split(form, road, rng):
    check_both(WHOLE[form].case(rng, **SIZES), rng)
    assert road.by_scores() == []


SIDES = {  # axes and operands of either side; operand 0: the weights
    "all pairs": (([-3], [1]), ([-2], [0, 2])),
    "mixing": (([-3], [1, 2]), ([-2], [0])),
    "weights per row": (([-3], [0, 1]), ([-2], [2])),
    "one weight": (([-3], [1]), ([-2], [0, 2])),
    "a factor of terms only": (([-3], [1]), ([-2], [0, 2, 3])),
    "two axes a side": (([-5, -4], [1]), ([-3, -2], [0, 2])),
    "three groups": (([-5, -4, -3], [1, 2]), ([-2], [0, 3])),  # 114 and 13 rows, rather than 6 and 247
    "right first": (([-3], [2]), ([-2], [0, 1])),
    "terms first": (([-2], [1]), ([-1], [0, 2])),
    "terms in the middle": (([-3], [1]), ([-1], [2])),
}


@pytest.mark.parametrize("form", SIDES)
def test_sides(form, rng):
    """Operands that vary with the terms only, or with nothing, go to the side of fewer rows."""
    case = SPLIT[form].case(rng, **SIZES)
    checked = call.check(case.weights, case.factors, None, None, "one", case.dim)
    assert split.find_sides(checked) == SIDES[form]


def test_thresholds(road, monkeypatch, rng):
    case = SPLIT["all pairs"].case(rng, **SIZES)
    work = SIZES["B"] * SIZES["C"] * SIZES["n"]
    for name, limit in (("LEAST_WORK", work), ("LEAST_EXTENT", SIZES["C"])):
        for least in (limit, limit + 1):
            monkeypatch.setattr(split, name, least)
            check_both(case, rng)
            assert road.by_scores() == (ROAD if least == limit else [])
        monkeypatch.setattr(split, name, 1)


def test_blocks_of_very_many_terms_would_not_fit(road, monkeypatch, rng):
    case = SPLIT["all pairs"].case(rng, **SIZES)
    for most in (SIZES["n"] - 1, SIZES["n"]):
        monkeypatch.setattr(split, "MOST_TERMS", most)
        check_both(case, rng)
        assert bool(road.by_scores()) == (most == SIZES["n"])


def test_calls_that_are_not_large_are_not_checked(monkeypatch, rng):
    monkeypatch.undo()
    monkeypatch.setattr(api, "check", None)
    require_native()
    check_both(SPLIT["all pairs"].case(rng, "float32", **SIZES), rng)
    check_both(Form("n", ("Bn", "Bn")).case(rng, "float32", B=1000, n=5000), rng)


def test_bad_arguments_are_errors(road, monkeypatch):
    monkeypatch.setattr(api, "native", road.native)  # which declines them
    f = np.ones((8, 1, 8))
    for bad in ([1.0], None, 3, "f", np.float32, np.ones((8, 3)), f.astype(">f8"), np.ma.masked_array(f)):
        with pytest.raises((TypeError, ValueError), match=r"^factors\[1\]"):
            fs.fusion_sum(None, f, bad)
        with pytest.raises((TypeError, ValueError), match=r"^factors\[1\]"):
            fs.fusion_sum_grad(np.ones((8, 8)), None, f, bad)
    for bad in (None, 1.0, np.ones(8), np.ones((8, 8), int), [[1.0]]):
        with pytest.raises((TypeError, ValueError), match=r"^grad_output"):
            fs.fusion_sum_grad(bad, None, f, np.ones((8, 8)))
    with pytest.raises(ValueError, match=r"^activations"):
        fs.fusion_sum(None, f, np.ones((8, 8)), activations="softplus")


def test_where_the_scores_decline_the_sum_takes_over(monkeypatch, rng):
    native = require_native()

    class Declining(Road):
        def __getattr__(self, name):
            self.seen.append(name)
            return (lambda *given: NotImplemented) if name in ROAD else getattr(native, name)

    monkeypatch.setattr(api, "native", Declining(native))
    check_both(SPLIT["all pairs"].case(rng, **SIZES), rng)
    assert api.native.seen == ["score_matrix", "fusion_sum", "score_matrix_grad", "fusion_sum_grad"]


def test_arrays_that_are_not_aligned(road, monkeypatch, rng):
    """No kernel takes them; the reference does."""
    monkeypatch.setattr(api, "native", road.native)
    packed = np.zeros((SIZES["B"], 1, SIZES["n"]), [("gap", "u1"), ("x", "f4")])
    packed["x"] = random(rng, packed.shape, "float32")
    check_both(Case(None, [packed["x"], random(rng, (SIZES["C"], SIZES["n"]), "float32")]), rng)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["all pairs", "mixing"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, form, road, rng):
    before = fs.get_num_threads()
    try:
        case = SPLIT[form].case(rng, dtype, **{"B": 300, "C": 70, "O": 70, "n": 129})
        u = random(rng, case.output_shape, dtype)
        found = []
        for threads in (1, 2, 3, 8):
            fs.set_num_threads(threads)
            found.append([case.forward(), *case.backward(u)])
        for other in found[1:]:
            assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))
    finally:
        fs.set_num_threads(before)
    assert set(road.by_scores()) == set(ROAD)


def test_without_torch(road):
    run_python("""
import sys; sys.modules["torch"] = None
import numpy as np, fusionsum as fs
f, g = np.ones((128, 1, 300), "float32"), np.ones((200, 300), "float32")
assert (fs.fusion_sum(None, f, g) == 300).all()
_, d_f, d_g = fs.fusion_sum_grad(np.ones((128, 200), "float32"), None, f, g)
assert (d_f == 200).all() and (d_g == 128).all()
""")


def test_bfloat16_is_that_of_ml_dtypes(road, rng):
    case = SPLIT["all pairs"].case(rng, "bfloat16", **SIZES)
    for x in (case.forward(), *case.backward(random(rng, case.output_shape, "bfloat16"))):
        assert x.dtype == ml_dtypes.bfloat16
    assert road.by_scores() == ROAD
