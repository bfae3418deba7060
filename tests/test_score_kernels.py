"""The score kernels (csrc/cpu/scores) against a formula in float64: edges of sizes, special values, layouts, memory.

What lives elsewhere: the formula, its bounds and the random calls (``score_cases.py``); instruction sets, each of which
runs this file (``test_kernel.py``), threads and forks (``test_parallel.py``), Ctrl-C (``test_endurance.py``), memory that
runs out and any call at all (``tests/native``), the public functions (``test_losses.py``, ``test_search.py``).
"""

from __future__ import annotations

import itertools
import mmap
from dataclasses import replace

import numpy as np
import pytest

import device
from conftest import DTYPES, random, run_python, widened
from score_cases import Pairs, Scores, check_everything, check_matrix, draw, lists_of, native, results
from test_layouts import LAYOUTS, MAP_NORESERVE, at_the_edges_of_a_page, one_byte_off, packed

# Rows (6, 4) and columns (64, 32, 16, 8, 4) of tiles, blocks (96 to 256), 16 stripes of two tiles each.
NEAR = {size + by for size in (4, 6, 8, 12, 16, 32, 64, 96, 120, 128, 192, 240, 256, 384) for by in (-1, 0, 1)}
SIZES = sorted({0, 1, 2} | NEAR)
TERMS = [*range(71), 127, 128, 129, 255, 257, 511, 513]
KINDS = ("uniform", "integers")

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
of_the_cpu = pytest.mark.skipif(
    device.CUDA_KERNELS, reason="on a GPU torch forms matrices of scores and reads arguments"
)


def any_of(rng, sizes):
    return int(sizes[rng.integers(len(sizes))])


def plain(queries, keys, **options):
    return Scores((queries,), (keys,), **options)


def ints(rng, *shape, dtype="float32"):
    return random(rng, shape, dtype, "integers")


# Accuracy, and exactness on small integers


@by_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_terms(kind, dtype, rng):
    for n in TERMS[:: 1 if dtype == "float32" else 2]:
        check_everything(draw(rng, any_of(rng, SIZES[:24]), any_of(rng, SIZES[:24]), n, dtype, kind), rng)


@by_dtype
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_edges_of_rows(side, dtype, rng):
    for i, size in enumerate(SIZES):
        sizes = size, any_of(rng, SIZES[:27])
        sizes = sizes if side == "queries" else sizes[::-1]
        check_everything(draw(rng, *sizes, any_of(rng, TERMS[:20]), dtype, KINDS[i % 2]), rng)


@by_dtype
@pytest.mark.parametrize("count", range(1, 9))
def test_factors(count, dtype, rng):
    """Every number of factors on one side, each activation among them, masked."""
    names = ("tanh", "sigmoid", "relu", "silu", "gelu", None, "tanh", "gelu")
    for rows, cols in ((5, 40), (33, 9)):
        s = draw(rng, rows, cols, 19, dtype, queries=(random(rng, (rows, 19), dtype, "uniform"),))
        s = replace(s, activations=(None,), present=(rng.random(rows) > 0.4,))
        s = replace(
            s,
            keys=tuple(random(rng, (cols, 19), dtype, "uniform") for _ in range(count)),
            key_activations=names[:count],
            key_present=tuple(rng.random(cols) > 0.4 if m % 2 else None for m in range(count)),
        )
        turned = replace(
            s,
            queries=s.keys,
            keys=s.queries,
            activations=s.key_activations,
            key_activations=s.activations,
            present=s.key_present,
            key_present=s.present,
            **dict.fromkeys(["key_bias", "query_labels", "key_labels", "query_ids", "key_ids", "exclude"]),
        )
        for each in (s, turned):
            check_everything(each, rng)


@by_dtype
def test_wider_operands_widen(dtype, rng):
    """One float64 among the operands, or as key_bias alone, makes the scores' precision that; matrices stay narrow."""
    s = draw(rng, 9, 40, 21, dtype, queries=(random(rng, (9, 21), dtype),), keys=(random(rng, (40, 21), dtype),))
    s = replace(
        s, activations=(None,), key_activations=(None,), present=(None,), key_present=(None,), fusion_weights=None
    )
    for change in (
        {"key_bias": random(rng, (40,), "float64")},
        {"fusion_weights": random(rng, (21,), "float64")},
        {"keys": (random(rng, (40, 21), "float64"),)},
    ):
        wide = replace(s, **change)
        assert wide.working == np.float64
        check_everything(wide, rng)
    if not device.CUDA_KERNELS:
        assert native.score_matrix(*replace(s, key_bias=np.zeros(40)).arguments(), False).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "cols", "n"),
    [(3, 2100, 1000), (20, 2100, 1000), (3583, 5, 2), (3584, 30, 2), (65_573, 3, 2), (1030, 3, 4096)],
    ids=str,
)
def test_chunks(rows, cols, n, kind, rng):
    """Keys beyond 8 MiB, queries beyond 65,536 or 32 MiB, stripes as long as a block: in place, and formed."""
    dtype = "float64" if n > 2 else "float32"
    for factors in (1, 2):
        s = draw(
            rng, rows, cols, n, dtype, kind,
            queries=tuple(ints(rng, rows, n, dtype=dtype) for _ in range(factors)),
            keys=tuple(ints(rng, cols, n, dtype=dtype) for _ in range(factors)),
        )  # fmt: skip
        nothing = (None,) * factors
        s = replace(s, activations=nothing, key_activations=nothing, present=nothing, key_present=nothing)
        s.exclude = None if kind == "integers" else rng.random((rows, cols)) < 0.1
        check_everything(s, rng)


def test_rows_that_were_counted_twice_are_equal(rng):
    """A target's score is found once more, by itself: it equals that of another key of the same entries, in any place."""
    for dtype, name in itertools.product(DTYPES, ("gelu", None)):
        for rows, cols, n in ((1, 3, 5), (8, 40, 64), (33, 130, 33), (300, 301, 17)):
            keys = rng.permutation(np.repeat(random(rng, (cols, n), dtype), 2, axis=0))
            s = draw(rng, rows, 2 * cols, n, dtype, keys=(keys,), key_activations=(name,), key_present=(None,))
            s = replace(s, key_bias=None)
            targets = rng.integers(0, 2 * cols, rows)
            greater, equal = native.ranks(*s.arguments()[:9], None, None, None, targets, False)
            assert (equal >= 1).all()
            assert (greater + equal <= 2 * cols - 1).all()


@of_the_cpu
def test_small_integers_have_exact_gradients(rng):
    """Of even and odd numbers of terms, of keys and of queries: pairs of bf16 have no neighbour at the end."""
    for dtype, rows, cols, n in itertools.product(DTYPES, (1, 2, 5, 33, 255), (1, 2, 7, 64, 301), (0, 1, 2, 31, 64)):
        q, k, u = (ints(rng, *shape, dtype=dtype) for shape in ((rows, n), (cols, n), (rows, cols)))
        for weights in (None, ints(rng, n, dtype=dtype)):
            s = plain(q, k, fusion_weights=weights)
            p = Pairs(s)
            found = native.score_matrix_grad(u, *s.arguments(), (True, True), False)
            for got, want in zip(found, (widened(u) @ p.k, widened(u).T @ p.a), strict=True):
                assert (got == want).all()


@of_the_cpu
@pytest.mark.parametrize("factors", [1, 2])
def test_the_error_of_bf16_is_at_most_twice_that_of_torch(factors, rng):
    """Of scores and of the gradients of their InfoNCE loss, against float64: the largest of each array."""
    torch = pytest.importorskip("torch")

    def naive(sides, scale, dtype):
        leaves = [[torch.from_numpy(widened(x)).to(dtype) for x in side] for side in sides]
        a, k = (torch.stack(side).prod(0).requires_grad_() for side in leaves)
        scores = scale * (a @ k.T)
        (scores.logsumexp(1) - scores.diagonal()).mean().backward()
        return [x.detach().double().numpy() for x in (scores, a.grad, k.grad)]

    for rows, n, scale in ((256, 64, 0.25), (301, 129, 0.125)):
        sides = [tuple(random(rng, (rows, n), "bfloat16") for _ in range(factors)) for _ in range(2)]
        s = Scores(*sides, *((None,) * factors for _ in range(4)), logit_scale=scale)
        coefs = np.zeros((5, rows))
        coefs[0] = native.softmax_stats(*s.arguments(), False, False, False, False)[0][0]
        coefs[1] = coefs[3] = 1 / rows
        grads = native.softmax_grad(*s.arguments(), False, coefs, None, (True, True, False, False), False)
        ours = [widened(native.score_matrix(*s.arguments(), False)), *(scale * widened(d) for d in grads[:2])]
        for got, theirs, want in zip(
            ours, naive(sides, scale, torch.bfloat16), naive(sides, scale, torch.float64), strict=True
        ):
            assert abs(got - want).max() <= 2 * abs(theirs - want).max()


@of_the_cpu
def test_rows_of_bf16_that_are_no_pairs_where_they_lie(rng):
    """Rows that begin between two pairs, or an odd number of entries apart, give the bits of rows that are."""
    memory = random(rng, (2, 70 * 67 + 1), "bfloat16")
    for (rows, cols), start, step in itertools.product(((3, 70), (70, 33)), (0, 1), (66, 67)):
        moved = [
            np.lib.stride_tricks.as_strided(side[start:], (count, 64), (2 * step, 2))
            for side, count in zip(memory, (rows, cols), strict=True)
        ]
        for a, b in zip(results(plain(*moved)), results(plain(*(x.copy() for x in moved))), strict=True):
            assert a.tobytes() == b.tobytes()


# Search


@by_dtype
def test_top_k_of_ties(dtype, rng):
    """All equal, and few different scores: the lower index comes first, with candidates to drop again and again."""
    for rows, cols in ((1, 700), (3, 5000), (20, 3000)):
        ones = np.ones((max(rows, cols), 4), dtype)
        keys = rng.integers(0, 2, (cols, 4)).astype(dtype)
        for k in (1, 7, 64, 65, 200, cols):
            values, indices = native.top_k(*plain(ones[:rows], ones[:cols]).arguments()[:9], None, None, None, k, False)
            assert (indices == np.arange(k)).all()
            assert (values == 4).all()
            scores = keys.astype(int).sum(1)
            want = np.argsort(-scores, kind="stable")[:k]
            values, indices = native.top_k(*plain(ones[:rows], keys).arguments()[:9], None, None, None, k, False)
            assert (indices == want).all()
            assert (values == scores[want]).all()


@by_dtype
@pytest.mark.parametrize("rows", [3, 20])  # by rows of keys as they lie, and by tiles
def test_top_k_and_ranks_with_nan_and_infinities(rows, dtype, rng):
    """Numbers, -inf among them, then NaN by index, then -1; a NaN is neither above a target nor equal to it."""
    cols = 900
    bias = random(rng, (cols,), dtype, "integers")
    for count, value in ((150, np.nan), (100, -np.inf), (5, np.inf)):
        bias[rng.choice(cols, count, replace=False)] = value
    excluded = rng.random((rows, cols)) < 0.2
    s = plain(np.zeros((rows, 3), dtype), np.ones((cols, 3), dtype), key_bias=bias)
    bias = bias.astype(np.float64)
    order = np.lexsort((np.arange(cols), -np.where(np.isnan(bias), 0, bias), np.isnan(bias)))
    for lists in ((excluded, None, None), (None, *lists_of(excluded))):
        for k in (1, 10, 500, 800, cols):
            values, indices = native.top_k(*s.arguments()[:9], *lists, k, False)
            for b in range(rows):
                want = order[~excluded[b, order]][:k]
                assert (indices[b] == np.pad(want, (0, k - len(want)), constant_values=-1)).all()
                assert np.array_equal(values[b, : len(want)], bias[want], equal_nan=True)
                assert (values[b, len(want) :] == -np.inf).all()
        for target in (17, np.isnan(bias).argmax(), np.isneginf(bias).argmax(), np.isposinf(bias).argmax()):
            greater, equal = native.ranks(*s.arguments()[:9], *lists, np.full(rows, target), False)
            others = ~excluded
            others[:, target] = False
            nan = np.isnan(bias[target])
            assert (greater == (others & (nan | (bias > bias[target]))).sum(1)).all()
            assert (equal == (others & (bias == bias[target])).sum(1)).all()


def test_top_k_over_segments_and_chunks(rng):
    """Scores that rise, fall or are equal along the keys, of which there are five chunks with 16 segments each."""
    cols, n = 4100, 1024
    for rows in (1, 12):
        for along in (np.arange(cols), -np.arange(cols), np.arange(cols) % 7, np.zeros(cols)):
            bias = along.astype(np.float32)
            s = plain(np.zeros((rows, n), np.float32), np.broadcast_to(np.float16(1), (cols, n)), key_bias=bias)
            for k in (1, 100, 2000):
                values, indices = native.top_k(*s.arguments()[:9], None, None, None, k, False)
                want = np.argsort(-bias, kind="stable")[:k]
                assert (indices == want).all()
                assert (values == bias[want]).all()


# Special values


def exactly(values, dtype="float32", **options):
    """Keys are unit vectors: the scores are the queries."""
    return plain(values.astype(dtype), np.eye(values.shape[1], dtype=dtype), **options)


@of_the_cpu
@by_dtype
@pytest.mark.parametrize("rows", [2, 20])
def test_special_values_reach_the_scores_they_should(rows, dtype, rng):
    """NaN and infinities stay in their rows, which one of each dozen has; so do products that leave float32."""
    for value, n, formed in itertools.product((np.nan, np.inf, -np.inf, 3e38, 1e-40), (1, 7, 40), (False, True)):
        q, k = abs(ints(rng, rows, n, dtype=dtype)), abs(ints(rng, 40, n, dtype=dtype))  # nothing cancels
        with np.errstate(all="ignore"):
            q[::12, n // 2] = value
            k[1::12, n - 1] = value
            s = plain(q, k, fusion_weights=np.ones(n, dtype) if formed else None)
            want = (q.astype(np.float64) @ k.astype(np.float64).T).astype(s.working).astype(dtype).astype(np.float64)
            got = native.score_matrix(*s.arguments(), False).astype(np.float64)
            assert (np.isnan(got) == np.isnan(want)).all()
            least = 3 * n * 2.0**-126 if s.in_pairs() else 1e-44
            assert ((got == want) | np.isnan(want) | (abs(got - want) <= 1e-2 * abs(want) + least)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_sum_exp_of_extreme_scores(dtype, rng):
    """Rows that rise by more than any margin, rows far apart, scores of -inf; all within a few eps of the largest."""
    limit = float(np.finfo(dtype).max)
    eps = float(np.finfo(dtype).eps)
    values = rng.choice([0, 1, -1, 29, 31, -90, 1e4, -1e4, 1e30, -1e30, limit, -limit, 1e-40], (300, 130))
    values[1] = -limit
    values[2] = np.arange(130) * 40
    values[3] = -np.arange(130) * 40
    values[4] = limit
    values[:, 5] = np.arange(300) * 35
    values[:, 6] = -limit
    bias = np.zeros(130, dtype)
    bias[7::9] = -np.inf
    s = exactly(values, dtype, key_bias=bias)
    scores = values.astype(dtype).astype(np.float64) + bias
    queries, keys = native.softmax_stats(*s.arguments(), True, True, True, False)
    for axis, stats in ((1, queries), (0, keys)):
        top = scores.max(axis, keepdims=True)
        shift = np.where(np.isfinite(top), top, 0)
        with np.errstate(all="ignore"):
            want = np.log(np.exp(scores - shift).sum(axis)) + shift.squeeze(axis)
            assert ((stats[0] == want) | (abs(stats[0] - want) <= eps * (300 + abs(want)))).all()
    assert (keys[0, 7::9] == -np.inf).all()
    losses = native.sigmoid_stats(*s.arguments(), False)
    with np.errstate(all="ignore"):
        want = np.logaddexp(0, np.where(np.eye(*scores.shape, dtype=bool), -scores, scores)).sum(1)
        assert ((want >= limit) | (abs(losses - want) <= 300 * eps * want)).all()
    assert not np.isnan(losses).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_score_of_plus_infinity_makes_the_log_sum_exp_infinite(dtype, rng):
    """Its query's and its key's; no other's."""
    limit = np.finfo(dtype).max
    values = rng.standard_normal((250, 300))
    values[rng.random(values.shape) < 0.01] = limit
    bias = np.where(rng.random(300) < 0.3, limit, 0).astype(dtype)  # twice the limit is infinite
    with np.errstate(over="ignore"):
        scores = values.astype(dtype) + bias
    assert np.isposinf(scores).any(0).sum() > 20
    for any_ in (False, True):
        found = native.softmax_stats(*exactly(values, dtype, key_bias=bias).arguments(), any_, True, False, False)
        for axis, stats in zip((1, 0), found, strict=True):
            assert (np.isposinf(stats[0]) == np.isposinf(scores).any(axis)).all()
            assert not np.isnan(stats[:3]).any()


@pytest.mark.parametrize("rows", [3, 40])
def test_nan_makes_nan_where_it_counts_and_nowhere_else(rows, rng):
    values = rng.standard_normal((rows, 60))
    bias = np.zeros(60, np.float32)
    bias[50] = np.nan
    for exclude in (None, np.broadcast_to(np.arange(60) == 50, (rows, 60))):
        s = exactly(values, key_bias=bias, exclude=exclude)
        coefs = np.zeros((5, rows)), np.zeros((5, 60))
        for c in coefs:
            c[1] = 1
        queries, keys = native.softmax_stats(*s.arguments(), False, True, True, False)
        nan = exclude is None
        assert (np.isnan(queries[0]) == nan).all()
        assert (np.isnan(keys[0]) == (nan & (np.arange(60) == 50))).all()
        assert (np.isnan(native.sigmoid_stats(*s.arguments(), False)) == nan).all()
        d_bias = native.softmax_grad(*s.arguments(), False, *coefs, (False, False, False, True), False)[3]
        assert (np.isnan(d_bias) == (nan & (np.arange(60) == 50))).all()
        assert np.isnan(native.sigmoid_grad(*s.arguments(), np.ones(rows), (False,) * 3 + (True,), False)[4]) == nan


@pytest.mark.parametrize("empty", ["exclude", "ids", "infinity"])
def test_rows_without_a_key(empty, rng):
    """All is excluded, or scores -inf: the log-sum-exp is -inf, losses and derivatives are zero."""
    codes = {"query_ids": np.full(30, 3, np.int32), "key_ids": np.full(50, 3, np.int32)}
    apart = {"query_labels": np.full(30, 1, np.int32), "key_labels": np.full(50, 2, np.int32)}
    options = {
        "exclude": {"exclude": np.ones((30, 50), bool)},
        "ids": codes | apart,
        "infinity": {"key_bias": np.full(50, -np.inf, np.float32)} | apart,
    }[empty]
    s = plain(random(rng, (30, 20), "float32"), random(rng, (50, 20), "float32"), **options)
    for any_ in (False, True):
        for stats in native.softmax_stats(*s.arguments(), any_, True, True, False):
            assert (stats[0] == -np.inf).all()
            assert (stats[1] == (-np.inf if any_ else 0)).all()
            assert (stats[2:] == 0).all()
        coefs = np.zeros((5, 30)), np.zeros((5, 50))
        for grad in native.softmax_grad(*s.arguments(), any_, *coefs, (True,) * 4, False):
            assert (np.asarray(grad) == 0).all()
    assert (native.sigmoid_stats(*s.arguments(), False) == 0).all()
    for grad in native.sigmoid_grad(*s.arguments(), np.ones(30), (True,) * 4, False):
        assert (np.asarray(grad) == 0).all()


# Layouts


def rows_apart(array, bytes_=4096):
    """Entries of a term fall into one set of the first-level cache."""
    if array.ndim != 2:
        return array
    wide = -(-max(1, array.shape[1] * array.itemsize) // bytes_) * bytes_ // array.itemsize
    memory = np.full((array.shape[0], wide), np.nan, array.dtype)
    memory[:, : array.shape[1]] = array
    return memory[:, : array.shape[1]]


@by_dtype
@pytest.mark.parametrize("layout", [*LAYOUTS, "rows 4096 bytes apart"])
def test_layouts(layout, dtype, rng):
    change = LAYOUTS.get(layout, rows_apart)
    for rows, cols in ((7, 37), (31, 33)):
        s = draw(rng, rows, cols, 19, dtype, exclude=rng.random((rows, cols)) < 0.2)
        check_everything(s.mapped(change), rng)
        s = draw(rng, rows, cols, 17, dtype, queries=(random(rng, (rows, 17), dtype),))
        s = replace(s, activations=(None,), present=(None,), fusion_weights=None)  # in place
        check_everything(s.mapped(change), rng)
        if device.CUDA_KERNELS:
            continue
        u = change(random(rng, (rows, cols), dtype, "uniform"))
        p = Pairs(s)
        found = native.score_matrix_grad(u, *s.arguments(), (True, True), False)
        p.check_grads(found, u.astype(np.float64), np.zeros(u.shape))


@of_the_cpu
@pytest.mark.parametrize("change", [packed, one_byte_off])
def test_memory_no_kernel_takes(change, rng):
    s = draw(rng, 5, 7, 9)
    for moved in (replace(s, queries=(change(s.queries[0]), *s.queries[1:])), replace(s, key_bias=change(np.ones(7)))):
        assert native.score_matrix(*moved.arguments(), False) is NotImplemented


def walk_along_fences(dtype):
    """Call everything on fenced operands. Run it in a process of its own: a read too far kills it."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 64, 100):
        for rows, cols in ((1, 1), (3, 33), (8, 5), (14, 32), (15, 31), (33, 47)):
            for in_place in (False, True):
                s = draw(rng, rows, cols, n, dtype)
                if in_place:
                    plain_sides = s.queries[:1], s.keys[:1], *((None,),) * 4
                    s = Scores(*plain_sides, *s.arguments()[6:7], None, *s.arguments()[8:])
                for side in range(2):
                    fenced = s.mapped(lambda a, side=side: list(at_the_edges_of_a_page(a))[side])
                    for name in ("query_labels", "key_labels", "query_ids", "key_ids"):
                        if getattr(fenced, name) is not None:
                            setattr(fenced, name, list(at_the_edges_of_a_page(getattr(fenced, name)))[side])
                    check_everything(fenced, rng)


@of_the_cpu
@by_dtype
def test_guard_pages(dtype):
    run_python(f"import test_score_kernels; test_score_kernels.walk_along_fences({dtype!r})")


@of_the_cpu
def test_offsets_beyond_two_to_the_31(rng):
    """Rows 2^33 bytes apart, of factors, masks and exclusions, in memory that is never touched but for the rows."""
    rows, apart = 3, 2**33

    def far(array):
        if array.ndim == 1 and array.dtype != bool:
            return array
        memory = mmap.mmap(-1, rows * apart, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        view = np.ndarray(array.shape, array.dtype, memory, 0, (apart, array.itemsize)[: array.ndim])
        view[...] = array
        return view

    for dtype in DTYPES:
        s = draw(rng, rows, rows, 70, dtype, exclude=rng.random((rows, rows)) < 0.2)
        s = s.mapped(far)
        check_everything(s, rng)
        check_matrix(s.mapped(lambda a: a[::-1] if a.ndim == 2 else a), rng)


@of_the_cpu
@pytest.mark.parametrize("terms", [2**44, 2**55, 2**57, 2**60])
def test_sizes_no_memory_holds(terms):
    """Views without memory of their own, whose sides would have to be copied: their bytes may not even be a number."""
    far = np.broadcast_to(np.float32(0.5), (1, terms))
    s = plain(far, far)
    calls = {
        "score_matrix": (*s.arguments(),),
        "sigmoid_stats": (*s.arguments(),),
        "softmax_stats": (*s.arguments(), False, True, False),
        "ranks": (*s.arguments()[:9], None, None, None, np.zeros(1, np.int64)),
    }
    for name, arguments in calls.items():
        with pytest.raises(MemoryError):
            getattr(native, name)(*arguments, False)


# Arguments


@pytest.mark.parametrize("call", [pytest.param("matrix", marks=of_the_cpu), "softmax", "sigmoid"])
def test_only_what_is_asked_for(call, rng):
    """Every pattern of `needs` gives the same bits, and None or 0 for the rest."""
    s = draw(rng, 40, 60, 30)
    q, k = rng.uniform(0, 1, (5, 40)), rng.uniform(0, 1, (5, 60))
    u = random(rng, (40, 60), "float32")
    functions = {
        "matrix": (2, lambda needs: native.score_matrix_grad(u, *s.arguments(), needs, False)),
        "softmax": (4, lambda needs: native.softmax_grad(*s.arguments(), False, q, k, needs, False)),
        "sigmoid": (4, lambda needs: native.sigmoid_grad(*s.arguments(), q[0].copy(), needs, False)[1:]),
    }
    count, function = functions[call]
    full = function((True,) * count)
    for pattern in range(2**count):
        needs = [bool(pattern >> i & 1) for i in range(count)]
        for got, want, need in zip(function(tuple(needs)), full, needs, strict=True):
            if need:
                assert np.array_equal(got, want)
            else:
                assert got is None or got == 0


@of_the_cpu
def test_wrong_arguments_are_declined(rng):
    s = draw(rng, 4, 6, 5)
    assert native.score_matrix() is NotImplemented
    assert native.score_matrix(*s.arguments()[:5], False) is NotImplemented
    ten = np.zeros(10, np.int64)
    for change in (
        {"queries": ()},
        {"queries": s.queries[0]},
        {"queries": (np.ones((4, 6), np.float32),)},
        {"keys": (np.ones(6, np.float32),)},
        {"keys": (np.ones((6, 5), np.int32),)},
        {"activations": ("softmax",) * len(s.queries)},
        {"present": (np.ones(3, bool),) * len(s.queries)},
        {"absent": "two"},
        {"fusion_weights": np.ones(4, np.float32)},
        {"key_bias": np.ones((6, 1), np.float32)},
        {"logit_scale": 1},
        {"query_labels": np.zeros(4, np.int32), "key_labels": None},
        {"query_ids": np.zeros(4, np.int64), "key_ids": np.zeros(6, np.int64)},
        {"exclude": np.zeros((6, 4), bool)},
        {"exclude": np.zeros((4, 6), np.uint8)},
    ):
        assert native.sigmoid_stats(*replace(s, **change).arguments(), False) is NotImplemented
    head = s.arguments()[:9]
    for tail in (
        (None, None, None, 7),
        (None, None, None, -1),
        (None, ten[:5] + 1, ten[:0], 1),
        (None, None, None, 1.0),
    ):
        assert native.top_k(*head, *tail, False) is NotImplemented
    for targets in (ten[:5], ten[:4] - 1, ten[:4] + 6, None):
        assert native.ranks(*head, None, None, None, targets, False) is NotImplemented
        assert native.target_scores(*head, None, None, None, targets, False) is NotImplemented
    for given in (np.zeros(4), np.zeros(5, np.float32), np.zeros((4, 1), np.float32), None):
        assert native.ranks(*head, None, None, None, ten[:4], given, False) is NotImplemented


def test_repeats_have_the_same_bits(rng):
    """Memory between the calls varies; what is read before it is written would show."""
    for rows, cols, n in ((3, 4000, 40), (250, 300, 33)):
        s = draw(rng, rows, cols, n)
        first = results(s)
        for i in range(20):
            np.full(int(rng.integers(1, 2**19)), np.nan)
            moved = s.mapped(
                lambda a, i=i: np.concatenate([np.zeros(i % 7, a.dtype), a.ravel()])[i % 7 :].reshape(a.shape)
            )
            assert all(a.tobytes() == b.tobytes() for a, b in zip(results(moved), first, strict=True))
