"""`top_k` and `ranks` of NumPy arrays, against a stable sort of every pair's score.

What lives elsewhere: invalid arguments and their messages (``test_scores.py``), tensors (``test_autograd_search.py``).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fusionsum as fs
import pairs
from conftest import DTYPES, check_within
from fusionsum import reference

torch = pytest.importorskip("torch")

EXCLUSIONS = (None, "mask", "lists", "arrays", "everything")


@pytest.fixture(params=["reference", "native"], autouse=True)
def evaluated_by(request, monkeypatch):
    pairs.use_backend(request.param, monkeypatch, "top_k", "ranks")
    return request.param


@pytest.fixture(autouse=True, params=[2**22, 20], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(reference, "SEARCH_BLOCK", request.param)


def excluded(rng, kind, rows, columns):
    """One kind of exclusion, and the same as a boolean array."""
    mask = np.asarray(rng.random((rows, columns)) > 0.5)
    if kind is None:
        return None, np.zeros((rows, columns), bool)
    if kind == "everything":
        return np.ones((rows, columns), bool), np.ones((rows, columns), bool)
    lists = [rng.permutation(np.flatnonzero(row)).tolist() for row in mask]
    if rows:
        lists[0] = lists[0] * 2  # ids may repeat, in any order
    if kind == "lists":
        return lists, mask
    if kind == "arrays":
        offsets = np.cumsum([0, *map(len, lists)]).astype(np.int32)
        return (offsets, np.array([c for ids in lists for c in ids], np.uint16)), mask
    return mask, mask


def scored(case):
    return pairs.Naive(case).scores.detach().numpy()


def by_sorting(scores, mask, k):
    """Sort stably, greater first and NaN last; what is excluded is not there."""
    values, indices = np.full((len(scores), k), -np.inf), np.full((len(scores), k), -1)
    for b, (row, out) in enumerate(zip(scores, mask, strict=True)):
        left = [c for c in range(len(row)) if not out[c]]
        left = sorted(left, key=lambda c: (np.isnan(row[c]), 0 if np.isnan(row[c]) else -row[c]))[:k]
        values[b, : len(left)], indices[b, : len(left)] = row[left], left
    return values, indices


def by_counting(scores, mask, targets):
    """Numbers of keys, neither excluded nor the target, that score above the target and as it does."""
    greater, equal = [], []
    for row, out, t in zip(scores, mask, targets, strict=True):
        others = [row[c] for c in range(len(row)) if c != t and not out[c]]
        greater.append(len(others) if np.isnan(row[t]) else sum(s > row[t] for s in others))
        equal.append(sum(s == row[t] for s in others))
    return np.array(greater, np.int64), np.array(equal, np.int64)


def special(rng, kind, columns):
    """Biases of the keys; with sides of small integers, every score is exact and many are equal."""
    bias = rng.integers(-1, 2, columns).astype(np.float64)
    if kind == "special":
        bias[rng.random(columns) > 0.5] = -np.inf
        bias[rng.random(columns) > 0.7] = np.nan
        bias[rng.random(columns) > 0.8] = np.inf
    return bias


@pytest.mark.parametrize("bias", ["ordinary", "special"])
@pytest.mark.parametrize("exclude", EXCLUSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_a_stable_sort(dtype, exclude, bias, rng):
    columns = 23
    for rows, factors in itertools.product([1, 2, 5], [1, 2, 3]):
        case = pairs.sides(rng, rows, columns, 4, factors, dtype, kind="integers")
        case = case.but(key_bias=special(rng, bias, columns).astype("float32" if dtype != "float64" else dtype))
        given, mask = excluded(rng, exclude, rows, columns)
        scores = scored(case)
        for k in (0, 1, 3, columns - 1, columns):
            values, indices = fs.top_k(tuple(case.queries), tuple(case.keys), k, exclude=given, **case.options)
            wanted = by_sorting(scores, mask, k)
            assert values.dtype == ("float64" if dtype == "float64" else "float32")
            assert indices.dtype == np.int64
            assert np.array_equal(indices, wanted[1])
            assert np.array_equal(values, wanted[0], equal_nan=True)

        targets = rng.integers(0, columns, rows)
        greater, equal = by_counting(scores, mask, targets)
        for ties, wanted in (
            ("optimistic", 1 + greater),
            ("pessimistic", 1 + greater + equal),
            ("mean", 1 + greater + equal / 2),
        ):
            got = fs.ranks(tuple(case.queries), tuple(case.keys), targets, exclude=given, ties=ties, **case.options)
            assert got.dtype == wanted.dtype
            assert np.array_equal(got, wanted)


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("masks", [None, "one", "zero"])
@pytest.mark.parametrize("factors", [1, 2, 3, 8])
def test_every_side(factors, masks, activations, rng):
    """Masked keys are equal and masked queries tie all keys, so indices are checked by the scores they stand for."""
    case = pairs.sides(rng, 4, 30, 5, min(factors, 5), masks=masks, activations=activations)
    scores = scored(case)
    values, indices = fs.top_k(tuple(case.queries), tuple(case.keys), 7, **case.options)
    tol = 1e-12 * (1 + abs(scores).max())
    check_within(values, by_sorting(scores, np.zeros(scores.shape, bool), 7)[0], tol)
    check_within(np.take_along_axis(scores, indices, 1), values, tol)
    assert all(len(set(row)) == 7 for row in indices.tolist())
    best = fs.ranks(tuple(case.queries), tuple(case.keys), indices[:, 0], ties="optimistic", **case.options)
    assert (best == 1).all()


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)], ids=str)
def test_sizes_of_zero(shape):
    rows, columns, terms = shape
    queries, keys = np.ones((rows, terms)), np.ones((columns, terms))
    for exclude in (None, [[]] * rows, np.zeros((rows, columns), bool), (np.zeros(rows + 1, int), np.zeros(0, int))):
        values, indices = fs.top_k(queries, keys, columns, exclude=exclude)
        assert values.shape == indices.shape == (rows, columns)
        assert indices.tolist() == [list(range(columns))] * rows  # n = 0: all scores are 0
        if columns or not rows:
            found = fs.ranks(queries, keys, np.zeros(rows, int), exclude=exclude)
            assert found.tolist() == [1 + (columns - 1) / 2] * rows


def test_a_bias_makes_the_order_euclidean(rng):
    queries, keys = rng.standard_normal((5, 4)), rng.standard_normal((40, 4))
    _, indices = fs.top_k(queries, keys, 40, key_bias=-0.5 * (keys**2).sum(1))
    distances = ((queries[:, None] - keys) ** 2).sum(2)
    assert np.array_equal(indices, np.argsort(distances, 1, kind="stable"))


def test_numbers_come_before_nan_and_nan_before_nothing():
    keys = np.array([[np.nan], [-np.inf], [2.0], [np.nan], [1.0]])
    values, indices = fs.top_k(np.ones((1, 1)), keys, 5, exclude=[[2]])
    assert indices.tolist() == [[4, 1, 0, 3, -1]]
    assert np.array_equal(values, [[1, -np.inf, np.nan, np.nan, -np.inf]], equal_nan=True)


def test_the_target_is_never_excluded():
    queries, keys, targets = np.ones((3, 1)), np.array([[3.0], [2.0], [1.0], [np.nan]]), np.array([2, 0, 3])
    everything = np.ones((3, 4), bool)
    assert fs.ranks(queries, keys, targets, exclude=everything).tolist() == [1, 1, 1]
    assert fs.ranks(queries, keys, targets).tolist() == [3, 1, 4]  # a NaN target comes last, and before no other
    assert fs.ranks(queries, keys, targets, exclude=[[0, 2], [], [1]]).tolist() == [2, 1, 3]


def test_lists_for_two_queries_are_not_offsets():
    """A tuple of two arrays is (offsets, ids); a list of two is a list of ids per query."""
    queries, keys = np.ones((2, 1)), np.arange(4.0)[:, None]
    of_each = [np.array([0, 1, 3]), np.array([3])]
    assert fs.top_k(queries, keys, 1, exclude=of_each)[1].tolist() == [[2], [2]]
    with pytest.raises(ValueError, match=r"exclude: expected offsets that ascend from 0 to 1"):
        fs.top_k(queries, keys, 1, exclude=tuple(of_each))
    assert fs.top_k(queries, keys, 1, exclude=(np.array([0, 0, 1]), np.array([3])))[1].tolist() == [[3], [2]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_maps(dtype, rng, tmp_path):
    keys = np.memmap(tmp_path / "keys", dtype, "w+", shape=(500, 8))
    keys[:] = rng.integers(-3, 4, keys.shape)
    keys.flush()
    read = np.memmap(tmp_path / "keys", dtype, "r", shape=keys.shape)
    queries = rng.integers(-3, 4, (4, 8)).astype(dtype)
    for got, want in zip(fs.top_k(queries, read, 20), fs.top_k(queries, np.array(keys), 20), strict=True):
        assert type(got) is np.ndarray
        assert np.array_equal(got, want)
    targets = np.array([0, 7, 499, 3])
    assert np.array_equal(fs.ranks(queries, read, targets), fs.ranks(queries, np.array(keys), targets))


def test_layouts(rng):
    queries, keys = rng.integers(-3, 4, (4, 6)).astype(float), rng.integers(-3, 4, (50, 6)).astype(float)
    wanted = fs.top_k(queries, keys, 9)
    views = [np.asfortranarray(keys), np.repeat(keys, 2, 0)[::2], np.ascontiguousarray(keys[::-1])[::-1]]
    views.append(np.lib.stride_tricks.as_strided(keys, writeable=False))
    for view in views:
        for got, want in zip(fs.top_k(queries, view, 9), wanted, strict=True):
            assert np.array_equal(got, want)
    rows = fs.top_k((queries, np.ones(6)), (keys, np.ones((1, 6))), 9)
    assert np.array_equal(rows[1], wanted[1])


def test_no_warning_of_numpy_escapes():
    keys = np.array([[np.inf], [np.nan], [1e300], [0.0]])
    fs.top_k(np.array([[0.0], [1e300]]), keys, 3)
    fs.ranks(np.array([[0.0], [1e300]]), keys, np.array([0, 2]))
