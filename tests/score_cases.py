"""Random calls of the score kernels, and what they should find: one formula in float64, with bounds on the error.

What lives elsewhere: the tests (``test_score_kernels.py`` and, for threads, signals and memory, those of the sum), the
reference of the package (``reference.py``), which these formulas share nothing with.

A score's error is at most (n + 6 M + 8) eps |logit_scale| sum_i |a_i k_i| + 4 eps (|logit_bias| + |key_bias|), with M
factors on both sides and eps of the working precision, and whatever is made of scores inherits it: a log-sum-exp no more
than the largest, a softmax its share times that. Small integers have no error at all.

Where bf16 is multiplied by pairs (csrc/scores.h says when), each side that is not bf16 once it is formed is rounded to it,
and so is Gamma: 2^-8 of each product more; and what is below 2^-126 counts as zero.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

import device
from conftest import ACTIVATIONS, DTYPES, NARROW, in_pairs, random, require_native, widened

__all__ = ["CALLS", "Pairs", "Scores", "check_everything", "digest", "digests", "draw", "lists_of", "results"]

native = device.scores(require_native())
BF16 = np.dtype("bfloat16")  # ml_dtypes' name, which conftest has brought in
_erfc = np.vectorize(math.erfc, otypes=[np.float64])
_PHI = {
    None: lambda z: z,
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "relu": lambda z: np.where(z <= 0, 0, z),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z * 0.5 * _erfc(-z / math.sqrt(2)),
}
_CHAIN = 300  # as many entries of a strip may be added one after another in the working precision


@dataclass
class Scores:
    """The arguments that the functions of scores begin with, in their order."""

    queries: tuple[Any, ...]
    keys: tuple[Any, ...]
    activations: tuple[Any, ...] = (None,)
    key_activations: tuple[Any, ...] = (None,)
    present: tuple[Any, ...] = (None,)
    key_present: tuple[Any, ...] = (None,)
    absent: str = "one"
    fusion_weights: Any = None
    key_bias: Any = None
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    query_labels: Any = None
    key_labels: Any = None
    query_ids: Any = None
    key_ids: Any = None
    exclude: Any = None

    def arguments(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries[0].shape[0], self.keys[0].shape[0]

    @property
    def given(self) -> list[Any]:
        return [a for a in (*self.queries, *self.keys, self.fusion_weights) if a is not None]

    @property
    def working(self) -> np.dtype[Any]:
        wide = any(a.dtype == np.float64 for a in [*self.given, self.key_bias] if a is not None)
        return np.dtype(np.float64 if wide else np.float32)

    @functools.cached_property
    def whole(self) -> bool:
        """Whether all that is multiplied and added is a small integer, or half of one."""
        arrays = self.given if self.key_bias is None else [*self.given, self.key_bias]
        names = set(self.activations) | set(self.key_activations)
        return names <= {None, "relu"} and all((widened(a) == np.rint(widened(a))).all() for a in arrays)

    def in_pairs(self, searching: bool = False) -> bool:
        """Whether this instruction set multiplies the sides as pairs of bf16."""
        formed = len(self.given) > 2 or {*self.activations, *self.key_activations} != {None}
        narrow = in_pairs(self.given) or (device.CUDA_KERNELS and {a.dtype for a in self.given} == {BF16})
        return self.working == np.float32 and narrow and not (searching and formed)

    @functools.cached_property
    def products(self) -> tuple[Any, ...]:
        """Both sides and the products of their rows; of the first two and of the last, the magnitudes too."""
        queries = _side(self.queries, self.activations, self.present, self.absent, self.fusion_weights)
        keys = _side(self.keys, self.key_activations, self.key_present, self.absent, None)
        return queries, keys, queries[0] @ keys[0].T, queries[1] @ keys[1].T

    def mapped(self, function: Any) -> Scores:
        """Apply the function to each array of floats or bools; integers are NumPy's and contiguous in every call."""

        def one(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(one, value))
            return function(value) if isinstance(value, np.ndarray) and value.dtype != np.int32 else value

        return Scores(*map(one, self.arguments()))


def draw(
    rng: Any, rows: int, cols: int, n: int, dtype: str = "float32", kind: str = "uniform", **options: Any
) -> Scores:
    """Choose everything at random but the sizes, and but the `options`, which are fields. Integers are scored exactly."""
    exact = kind == "integers"

    def some(size: tuple[int, ...]) -> np.ndarray:
        other = str(rng.choice(["float32", *NARROW])) if rng.random() < 0.1 else dtype
        values = random(rng, size, other, kind)
        return values if exact else (values * values.dtype.type(1.25)).astype(other)

    def side(size: int) -> tuple[tuple[Any, ...], ...]:
        count = int(rng.choice([1, 1, 1, 2, 3] if exact else [1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8]))
        names = [None, "relu"] if exact else [None, None, *ACTIVATIONS]
        return (
            tuple(some((size, n)) for _ in range(count)),
            tuple(names[rng.integers(len(names))] if count > 1 or rng.random() < 0.3 else None for _ in range(count)),
            tuple(rng.random(size) > 0.4 if rng.random() < 0.2 else None for _ in range(count)),
        )

    def codes(size: int) -> np.ndarray:
        return (2**24 - 1 - np.random.default_rng(rng.integers(2**32)).integers(0, 1 + cols // 3, size)).astype(
            np.int32
        )

    queries, activations, present = side(rows)
    keys, key_activations, key_present = side(cols)
    scores = Scores(queries, keys, activations, key_activations, present, key_present)
    scores.absent = str(rng.choice(["one", "zero"]))
    scores.fusion_weights = some((n,)) if rng.random() < 0.3 else None
    scores.key_bias = some((cols,)) if rng.random() < 0.3 else None
    scores.logit_scale = float(rng.choice([1, -2, 0.5])) * (1 if exact else 3 / math.sqrt(n + 1))
    scores.logit_bias = float(rng.choice([0, -1.5]))
    if rng.random() < 0.5:
        scores.query_labels, scores.key_labels = codes(rows), codes(cols)
    if rng.random() < 0.4:
        scores.query_ids, scores.key_ids = codes(rows), codes(cols)
    if rng.random() < 0.3:
        scores.exclude = rng.random((rows, cols)) < 0.3
    return replace(scores, **options)


def lists_of(excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and ids of the pairs that are excluded."""
    return np.concatenate([[0], excluded.sum(1).cumsum()]).astype(np.int64), np.nonzero(excluded)[1].astype(np.int64)


def _side(factors: Any, names: Any, masks: Any, absent: str, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Multiply the factors; and what bounds their magnitudes, as ``conftest.tolerances`` says."""
    product = size = np.float64(1) if weights is None else widened(weights)
    size = abs(size)
    for z, name, mask in zip(factors, names, masks, strict=True):
        z = widened(z)
        both = _PHI[name](z), np.ones_like(z) if name == "sigmoid" else abs(z)
        if mask is not None:
            both = tuple(np.where(mask[:, None], part, float(absent == "one")) for part in both)
        product, size = product * both[0], size * both[1]
    return product, size


def _rounding(values: np.ndarray) -> float:
    """Bound the relative error of these as bf16."""
    return 0 if (values.astype(BF16).astype(np.float64) == values).all() else 2.0**-8


def _log_sum_exp(scores: np.ndarray, counted: np.ndarray, axis: int) -> np.ndarray:
    scores = np.where(counted, scores, -np.inf)
    top = scores.max(axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(scores - top).sum(axis)) + top.squeeze(axis)


class Pairs:
    """The scores of a call in float64, each with a bound on its error, and which pairs are positive and excluded."""

    def __init__(self, s: Scores, searching: bool = False):
        scale, bias = (1.0, 0.0) if searching else (s.logit_scale, s.logit_bias)
        factors = len(s.queries) + len(s.keys) + 1
        self.eps = float(np.finfo(s.working).eps) * (
            2 if s.working == np.float64 else 1
        )  # as much for the formula's own
        (self.a, self.a_size), (self.k, self.k_size), self.dots, self.dots_size = s.products
        self.in_pairs = s.in_pairs(searching)
        self.of_a, self.of_k = (_rounding(side) if self.in_pairs else 0.0 for side in (self.a, self.k))
        self.exact = s.whole and (2 * scale).is_integer() and self.of_a == self.of_k == 0
        self.factors = 6 * factors + 8
        self.least = float(np.finfo(s.working).tiny)  # exponentials below it have fewer bits, or none
        offset = bias + (0 if s.key_bias is None else widened(s.key_bias))
        offset_size = abs(bias) + (0 if s.key_bias is None else abs(widened(s.key_bias)))
        self.scores = scale * self.dots + offset
        self.tol = self.eps * (
            (self.a.shape[1] + self.factors) * abs(scale) * self.dots_size + 4 * offset_size
        ) + float(np.finfo(s.working).smallest_subnormal)
        if self.in_pairs:
            flushed = 2 * self.a.shape[1] + self.a_size.sum(1)[:, None] + self.k_size.sum(1)
            self.tol += abs(scale) * (1.01 * (self.of_a + self.of_k) * self.dots_size + self.least * flushed)
        self.tol = self.tol * (not self.exact)
        same = (
            np.eye(*self.scores.shape, dtype=bool)
            if s.query_labels is None
            else s.query_labels[:, None] == s.key_labels
        )
        self.excluded = np.zeros_like(same) if s.exclude is None else s.exclude.copy()
        self.positive = same & ~self.excluded
        if s.query_ids is not None and not searching:
            self.excluded |= (s.query_ids[:, None] == s.key_ids) & ~same
        self.counted = ~self.excluded

    def lse(self, axis: int) -> np.ndarray:
        return _log_sum_exp(self.scores, self.counted, axis)

    def positives(self, any_: bool, axis: int) -> np.ndarray:
        if any_:
            return _log_sum_exp(self.scores, self.positive, axis)
        return np.where(self.positive, self.scores, 0).sum(axis) / np.maximum(1, self.positive.sum(axis))

    def check_grads(self, found: Any, gamma: np.ndarray, tol: np.ndarray) -> None:
        """Check d_queries, d_keys, d_scale and, where there are more, the sums of Gamma or the sum of those."""
        rows, cols = gamma.shape
        d_queries, d_keys, *rest = found
        of_gamma = _rounding(gamma) if self.in_pairs else 0.0
        in_k, in_a = (
            1.01 * (of_gamma + of_side) + self.eps * (count + self.factors)
            for of_side, count in ((self.of_k, cols), (self.of_a, rows))
        )
        d_tol = tol @ self.k_size + in_k * (abs(gamma) @ self.k_size)
        of_keys = tol.T @ self.a_size + in_a * (abs(gamma).T @ self.a_size)
        if self.in_pairs:
            d_tol, of_keys = d_tol + self.least * 3 * cols, of_keys + self.least * 3 * rows
        near(d_queries, gamma @ self.k, d_tol)
        near(d_keys, gamma.T @ self.a, of_keys)
        if rest:
            of_a = (self.eps * self.factors + self.of_a) * (self.a_size * (abs(gamma) @ self.k_size)).sum()
            near(rest[0], (gamma * self.dots).sum(), (self.a_size * d_tol).sum() + of_a)
            want, slack = gamma.sum(0), tol.sum(0) + 1e-12 * abs(gamma).sum(0)
            near(rest[1], *((want, slack) if np.ndim(rest[1]) else (want.sum(), slack.sum())))


def near(got: Any, want: Any, tol: Any) -> None:
    """Infinities are equal; NaN is never near."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    with np.errstate(invalid="ignore"):
        ok = (got == want) | (abs(got - want) <= tol)
    assert ok.all(), f"{(~ok).sum()} of {ok.size} differ; got {got[~ok][:4]}, want {want[~ok][:4]}"


def _zero(x: np.ndarray) -> np.ndarray:
    """Put 0 for a log-sum-exp of nothing, as callers do; its coefficients are 0."""
    return np.where(np.isfinite(x), x, 0)


def check_matrix(s: Scores, rng: Any) -> None:
    p = Pairs(s)
    got = native.score_matrix(*s.arguments(), False)
    names = {a.dtype.name for a in s.given}
    assert got.dtype.name == (
        names.pop() if len(names) == 1 else s.working.name if s.key_bias is None else got.dtype.name
    )
    rounding = 0 if got.dtype == s.working else 2.0**-8 if got.dtype.itemsize == 2 else 2.0**-24
    near(widened(got), p.scores, p.tol + rounding * abs(p.scores) + 1e-7 * (got.dtype.itemsize == 2))
    u = random(rng, s.shape, got.dtype.name, "integers" if p.exact else "uniform")
    p.check_grads(native.score_matrix_grad(u, *s.arguments(), (True, True), False), widened(u), np.zeros(s.shape))


def check_softmax(s: Scores, rng: Any) -> None:
    p = Pairs(s)
    any_, symmetric, totals = (bool(x) for x in rng.integers(0, 2, 3))
    found = native.softmax_stats(*s.arguments(), any_, symmetric, totals, False)
    assert (found[1] is None) == (not symmetric)
    for axis, stats in ((1, found[0]), (0, found[1]))[: 1 + symmetric]:
        worst = np.where(p.counted | p.positive, p.tol, 0).max(axis, initial=0)
        lse, tol = p.lse(axis), worst + p.eps * _CHAIN
        near(stats[0], lse, tol + p.eps * abs(_zero(lse)))
        want = p.positives(any_, axis)
        chain = p.eps * _CHAIN if any_ and device.CUDA_KERNELS else 0  # the CPU adds these up in float64
        near(stats[1], want, worst + chain + 1e-12 * (1 + abs(_zero(want))) + p.eps * abs(_zero(want)))
        assert (stats[2] == p.positive.sum(axis)).all()
        off = p.tol + (2 * p.eps + 1e-12) * abs(p.scores)
        summed, tol = (np.where(p.counted, x, 0).sum(axis) for x in (p.scores, off))
        near(stats[3], summed * totals, tol)
        assert not totals or (stats[4] == p.counted.sum(axis)).all()

    coefs = [rng.uniform(0, 1, (5, count)) for count in s.shape]
    gamma, tol = np.zeros(s.shape), np.zeros(s.shape)
    for axis, q in ((1, coefs[0]), (0, coefs[1]))[: 1 + symmetric]:
        q[0], q[2] = _zero(p.lse(axis)), _zero(p.positives(True, axis)) if any_ else 7
        q = np.expand_dims(q, 1 + axis)
        parts = [(p.counted, q[1], q[0]), *([(p.positive, -q[3], q[2])] if any_ else [])]
        for where, coef, lse in parts:
            x = np.where(where, p.scores - lse, -np.inf)
            part = coef * np.exp(x)
            off = p.tol + p.eps * (abs(lse) + 8 + np.where(where, abs(x), 0))
            gamma, tol = gamma + part, tol + abs(part) * np.expm1(off) + p.eps * abs(part)
        flat = p.counted * q[4] + (0 if any_ else p.positive * q[3])
        gamma, tol = gamma - flat, tol + 4 * p.eps * abs(flat)
    needs = (True,) * 4
    found = native.softmax_grad(*s.arguments(), any_, coefs[0], coefs[1] if symmetric else None, needs, False)
    p.check_grads(found, gamma, tol + 2 * p.eps * abs(gamma) + p.least)


def check_sigmoid(s: Scores, rng: Any) -> None:
    p = Pairs(s)
    losses = np.where(p.counted, np.logaddexp(0, np.where(p.positive, -p.scores, p.scores)), 0)
    tol = np.where(p.counted, p.tol + p.least, 0).sum(1) + p.eps * _CHAIN * losses.sum(1)
    near(native.sigmoid_stats(*s.arguments(), False), losses.sum(1), tol)
    coefs = rng.uniform(0, 1, s.shape[0])
    found = native.sigmoid_grad(*s.arguments(), coefs, (True,) * 4, False)
    near(found[0], losses.sum(1), tol)
    with np.errstate(over="ignore"):
        slope = np.where(p.positive, -1 / (1 + np.exp(p.scores)), 1 / (1 + np.exp(-p.scores)))
    gamma = np.where(p.counted, coefs[:, None] * slope, 0)
    p.check_grads(found[1:], gamma, coefs[:, None] * np.minimum(p.tol, 1) + 8 * p.eps * abs(gamma) + p.least)


def _search(s: Scores, excluded: np.ndarray, as_lists: bool) -> list[Any]:
    """Return what the arguments of both functions of search begin with."""
    return [*s.arguments()[:9], *((None, *lists_of(excluded)) if as_lists else (excluded, None, None))]


def check_top_k(s: Scores, rng: Any) -> None:
    p = Pairs(s, searching=True)
    rows, cols = s.shape
    for k in sorted({0, min(1, cols), min(cols, int(rng.integers(1, 12))), cols if cols < 400 else 3}):
        values, indices = native.top_k(*_search(s, p.excluded, bool(rng.integers(2))), k, False)
        assert values.shape == indices.shape == (rows, k)
        assert (values.dtype, indices.dtype) == (s.working, np.int64)
        found = np.minimum(k, p.counted.sum(1))
        there = np.arange(k) < found[:, None]
        assert (indices[~there] == -1).all()
        assert (values[~there] == -np.inf).all()
        each = np.arange(rows)[:, None]
        near(values[there], p.scores[each, indices][there], p.tol[each, indices][there])
        chosen = np.zeros((rows, cols + 1), bool)
        chosen[np.broadcast_to(each, indices.shape), indices] = True
        assert (chosen[:, :cols].sum(1) == found).all()
        assert not (chosen[:, :cols] & p.excluded).any()
        falls = (values[:, :-1] > values[:, 1:]) | (
            (values[:, :-1] == values[:, 1:]) & (indices[:, :-1] < indices[:, 1:])
        )
        assert falls[there[:, 1:]].all()
        left = np.where(p.counted & ~chosen[:, :cols], p.scores - p.tol, -np.inf).max(1, initial=-np.inf)
        taken = np.where(chosen[:, :cols], p.scores + p.tol, np.inf).min(1, initial=np.inf)
        assert (left <= taken)[found > 0].all() if k else True
        if p.exact:
            order = np.argsort(-np.where(p.counted, p.scores, -np.inf), axis=1, kind="stable")[:, :k]
            assert (indices == np.where(there, order, -1)).all()


def check_ranks(s: Scores, rng: Any) -> None:
    rows, cols = s.shape
    if not cols:
        return
    p = Pairs(s, searching=True)
    targets = rng.integers(0, cols, rows)
    search = _search(s, p.excluded, bool(rng.integers(2)))
    greater, equal = native.ranks(*search, targets, False)
    each = np.arange(rows)
    others = p.counted.copy()
    others[each, targets] = False
    target, slack = p.scores[each, targets][:, None], p.tol[each, targets][:, None] + p.tol
    surely, maybe = (others & (p.scores > target + by) for by in (slack, -slack))
    assert (surely.sum(1) <= greater).all()
    assert (greater <= maybe.sum(1)).all()
    at_least = others & (p.scores >= target - slack)
    assert (greater + equal <= at_least.sum(1)).all()
    if p.exact:
        assert (greater == surely.sum(1)).all()
        assert (equal == (others & (p.scores == target)).sum(1)).all()
    if device.CUDA_KERNELS:  # which no group of processes has yet
        return
    # A target that is no key here, with its score: its key counts as any other does.
    scores = native.target_scores(*search, targets, False)
    assert scores.dtype == s.working
    near(scores, p.scores[each, targets], p.tol[each, targets])
    elsewhere = rng.random(rows) < 0.5
    of_scores = native.ranks(*search, np.where(elsewhere, -1 - targets, targets), scores, False)
    one_more = elsewhere & p.counted[each, targets]
    unordered = np.isnan(scores)
    assert (of_scores[0] == greater + (one_more & unordered)).all()
    assert (of_scores[1] == equal + (one_more & ~unordered)).all()


CALLS = {
    "matrix": check_matrix,
    "softmax": check_softmax,
    "sigmoid": check_sigmoid,
    "top_k": check_top_k,
    "ranks": check_ranks,
}


if device.CUDA_KERNELS:  # torch's products of matrices give them there
    del CALLS["matrix"]


def check_everything(s: Scores, rng: Any) -> None:
    for check in CALLS.values():
        check(s, rng)


def results(s: Scores) -> list[np.ndarray]:
    """Call all functions with the same plain arguments; return every array and number."""
    rows, cols = s.shape
    calls = s.arguments()
    query_coefs, key_coefs = (np.linspace(0.1, 1, 5 * count).reshape(5, count) for count in (rows, cols))
    search = [*calls[:9], s.exclude, None, None]
    found = []
    if "matrix" in CALLS:
        found.append(native.score_matrix(*calls, False))
        found += native.score_matrix_grad(np.ones((rows, cols), np.float32), *calls, (True, True), False)
    found += [
        *native.softmax_stats(*calls, True, True, True, False),
        *native.softmax_stats(*calls, False, False, False, False),
        *native.softmax_grad(*calls, True, query_coefs, key_coefs, (True,) * 4, False),
        *native.softmax_grad(*calls, False, query_coefs, None, (False, True, False, False), False),
        native.sigmoid_stats(*calls, False),
        *native.sigmoid_grad(*calls, query_coefs[0].copy(), (True,) * 4, False),
        *native.top_k(*search, min(cols, 10), False),
        *native.ranks(*search, np.arange(rows) % cols, False),
    ]
    return [np.asarray(a) for a in found if a is not None]


def digest(s: Scores) -> str:
    """Hash the results of all functions."""
    return hashlib.sha256(b"".join(a.tobytes() for a in results(s))).hexdigest()


def digests() -> str:
    """Hash the results of calls of each dtype, for two builds to compare."""
    found = hashlib.sha256()
    for number, dtype in enumerate(DTYPES * 3):
        rng = np.random.default_rng(number)
        found.update(digest(draw(rng, *rng.integers(1, 300, 2), 37, dtype)).encode())
    return found.hexdigest()
