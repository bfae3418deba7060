"""The reference, against a loop over mpmath numbers and central differences that share no line with it.

What lives elsewhere: its use as the oracle of the kernels (``conftest.py``, ``test_kernel.py``); gradients of losses and
search, which are held to torch and to sorting (``test_losses.py``, ``test_search.py``).
"""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest

from conftest import ACTIVATIONS, DTYPES, FORMS, Case, check_both, check_within, random
from fusionsum import reference
from fusionsum.scores import Scores

PHI = {
    None: lambda z: z,
    "tanh": mpmath.tanh,
    "sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)),
    "relu": lambda z: max(z, mpmath.mpf(0)),
    "silu": lambda z: z / (1 + mpmath.exp(-z)),
    "gelu": lambda z: z * mpmath.ncdf(z),
}


@pytest.fixture(autouse=True)
def numpy_only(monkeypatch):
    monkeypatch.setattr("fusionsum.api.native", None)


def by_hand(case: Case) -> np.ndarray:
    """Sum every term of every output in 50 digits."""
    shape, axis = case.shape, case.dim % len(case.shape)
    names = case.activations or [None] * len(case.factors)
    weights = None if case.weights is None else np.broadcast_to(case.weights, shape)
    factors = [np.broadcast_to(z, shape) for z in case.factors]
    masks = []
    for mask, z in zip(case.present or [None] * len(factors), case.factors, strict=True):
        masks.append(
            None if mask is None else np.broadcast_to(mask.reshape(mask.shape + (1,) * (z.ndim - mask.ndim)), shape)
        )
    totals = np.full(case.output_shape, mpmath.mpf(0), dtype=object)
    with mpmath.workdps(50):
        for index in np.ndindex(shape):
            term = mpmath.mpf(1 if weights is None else float(weights[index]))
            for z, mask, name in zip(factors, masks, names, strict=True):
                if mask is not None and not mask[index]:
                    term *= {"one": 1, "zero": 0}[case.absent]
                else:
                    term *= PHI[name](mpmath.mpf(float(z[index])))
            totals[index[:axis] + index[axis + 1 :]] += term
    return totals.astype(np.float64)


def central_differences(case: Case, grad_output: np.ndarray, step: float = 1e-6) -> list[np.ndarray]:
    found = []
    for operand in case.operands:
        grad = np.zeros(operand.shape)
        for index in np.ndindex(operand.shape):
            kept = operand[index]
            ends = []
            for moved in (kept + step, kept - step):
                operand[index] = moved
                ends.append((case.forward() * grad_output).sum())
            operand[index] = kept
            grad[index] = (ends[0] - ends[1]) / (2 * step)
        found.append(grad)
    return found


def away_from_kinks(case: Case) -> Case:
    """Keep 0.1 away from relu's corner, where central differences mean nothing."""
    return case.mapped(lambda z: np.where(abs(z) < 0.1, z + 0.3, z))


@pytest.mark.parametrize("masks", [None, ("rows", "one"), ("full", "one"), ("rows", "zero"), ("full", "zero")], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_formula_and_gradient(form, activation, masks, rng):
    case = FORMS[form].case(rng, n=3, O=2, C=2)
    case.activations = [activation] * len(case.factors)
    if masks:
        case = case.masked(rng, *masks)
    case = away_from_kinks(case)
    check_within(case.forward(), by_hand(case), 1e-12)
    grad_output = random(rng, case.output_shape, "float64")
    for got, want in zip(case.backward(grad_output), central_differences(case, grad_output), strict=True):
        check_within(got, want, 1e-6 * (1 + abs(want)))


def test_every_activation_is_known_here():
    assert set(PHI) == set(ACTIVATIONS)


def test_one_activation_per_factor(rng):
    case = FORMS[f"M={len(ACTIVATIONS)}"].case(rng, activations=list(ACTIVATIONS))
    check_within(case.forward(), by_hand(case), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_narrow_dtypes_accumulate_wide(form, dtype, rng):
    check_both(FORMS[form].case(rng, dtype, n=40), rng)


@pytest.mark.parametrize("ndims", list(itertools.product([0, 1, 2], repeat=2)), ids=str)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids="-".join)
def test_promotion_is_torch_s(dtypes, ndims):
    torch = pytest.importorskip("torch")
    shapes = [(2, 2)[:ndim] for ndim in ndims]
    arrays = [np.ones(shape, name) for shape, name in zip(shapes, dtypes, strict=True)]
    tensors = [torch.ones(shape, dtype=getattr(torch, name)) for shape, name in zip(shapes, dtypes, strict=True)]
    assert reference.result_dtype(*arrays).name == str(torch.result_type(*tensors)).removeprefix("torch.")


def test_zero_factors_do_not_spoil_the_gradient(rng):
    case = FORMS["M=3"].case(rng).mapped(np.zeros_like)
    case.factors[0] += 2
    case.weights += 1
    grads = case.backward(np.ones(case.output_shape))
    assert all(np.isfinite(grad).all() for grad in grads)
    case.factors[1] += 3
    check_within(case.backward(np.ones(case.output_shape))[3], np.full((3, 5), 6.0), 0)


# ---- scores ----------------------------------------------------------------------------------------------------------

PAIRINGS = {
    "diagonal": {},
    "labels": {"query_labels": np.array([1, 2, 1, 9]), "key_labels": np.array([2, 1, 1, 3, 2])},
    "ids": {"query_ids": np.array([1, 2, 1, 9]), "key_ids": np.array([2, 1, 1, 3, 2])},
    "mask": {"exclude": np.arange(20).reshape(4, 5) % 3 == 0},
    "nothing left": {"exclude": np.ones((4, 5), bool)},
}
PAIRINGS["labels and ids"] = PAIRINGS["labels"] | {"query_ids": np.arange(4), "key_ids": np.array([0, 0, 2, 3, 3])}
PAIRINGS["labels and mask"] = PAIRINGS["labels"] | PAIRINGS["mask"]


def scores_by_hand(scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All scores in 50 digits, and which pairs are valid and positive."""
    shape = len(scores.queries[0]), len(scores.keys[0])
    found, valid, positive = np.empty(shape, object), np.ones(shape, bool), np.zeros(shape, bool)
    for b, c in np.ndindex(shape):
        total = mpmath.mpf(0)
        for i in range(scores.queries[0].shape[1]):
            term = mpmath.mpf(float(scores.fusion_weights[i]))
            for row, factors, names, masks in (
                (b, scores.queries, scores.activations, scores.present),
                (c, scores.keys, scores.key_activations, scores.key_present),
            ):
                for z, name, mask in zip(factors, names, masks, strict=True):
                    absent = mask is not None and not mask[row]
                    term *= {"one": 1, "zero": 0}[scores.absent] if absent else PHI[name](mpmath.mpf(float(z[row, i])))
            total += term
        found[b, c] = scores.logit_scale * total + scores.logit_bias + mpmath.mpf(float(scores.key_bias[c]))
        if scores.query_labels is None:
            positive[b, c] = b == c
        else:
            positive[b, c] = scores.query_labels[b] == scores.key_labels[c]
        if scores.query_ids is not None and not positive[b, c]:
            valid[b, c] = scores.query_ids[b] != scores.key_ids[c]
        if scores.exclude is not None and scores.exclude[b, c]:
            valid[b, c] = positive[b, c] = False
    return found, valid, positive


@pytest.mark.parametrize("scale", [0.7, -1000.0])
@pytest.mark.parametrize("absent", ["one", "zero"])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_statistics_of_scores(pairing, absent, scale, rng):
    scores = Scores(
        queries=tuple(random(rng, (4, 3), "float64") for _ in range(2)),
        keys=(random(rng, (5, 3), "float64"),),
        activations=("tanh", None),
        key_activations=("gelu",),
        present=(np.array([True, False, True, True]), None),
        key_present=(np.array([True, True, False, True, True]),),
        absent=absent,
        fusion_weights=random(rng, (3,), "float64"),
        key_bias=random(rng, (5,), "float64"),
        logit_scale=scale,
        logit_bias=0.3,
        **dict.fromkeys(["query_labels", "key_labels", "query_ids", "key_ids", "exclude"]) | PAIRINGS[pairing],
    )
    with mpmath.workdps(50):
        s, valid, positive = scores_by_hand(scores)

        def log_sum_exp(values):
            return mpmath.log(mpmath.fsum(mpmath.exp(x) for x in values)) if len(values) else -np.inf

        def stats(s, valid, positive, any):
            rows = []
            for row, ok, wanted in zip(s, valid, positive, strict=True):
                mean = mpmath.fsum(row[wanted]) / max(1, wanted.sum())
                of_positives = log_sum_exp(row[wanted]) if any else mean
                rows.append([log_sum_exp(row[ok]), of_positives, wanted.sum(), mpmath.fsum(row[ok]), ok.sum()])
            return np.array(rows).T.astype(np.float64)

        softplus = [
            mpmath.fsum(mpmath.log(1 + mpmath.exp(-x if p else x)) for x, p in zip(row[ok], wanted[ok], strict=True))
            for row, ok, wanted in zip(s, valid, positive, strict=True)
        ]
        wanted = {any: (stats(s, valid, positive, any), stats(s.T, valid.T, positive.T, any)) for any in (False, True)}

    check_scaled(reference.score_matrix(*scores), s.astype(np.float64))
    check_scaled(reference.sigmoid_stats(*scores), np.array(softplus).astype(np.float64))
    for any, symmetric, totals in itertools.product([False, True], repeat=3):
        found = reference.softmax_stats(*scores, any, symmetric, totals)
        assert (found[1] is None) == (not symmetric)
        for got, want in zip(found, wanted[any], strict=True):
            if got is not None:
                want = want * np.array([1, 1, 1, totals, totals])[:, None]
                assert np.array_equal(np.isinf(got), np.isinf(want))
                check_scaled(np.where(np.isinf(got), 0, got), np.where(np.isinf(want), 0, want))


def check_scaled(got: np.ndarray, want: np.ndarray) -> None:
    check_within(got, want, 1e-12 * (1 + abs(want)))
