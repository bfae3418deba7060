"""The fusion sum and scores in NumPy: reference, fallback and test oracle.

    F[...] = sum_i  w[..., i] * prod_m  phi_m(z_m[..., i])
    S[b, c] = logit_scale * sum_i A[b, i] K[c, i] + logit_bias + key_bias[c]

What lives here: the formulas, their gradients, the activations with their derivatives, and the rules of broadcasting, of
masks and of dtypes, written to be read. What lives elsewhere: the checks (``call.py``, ``scores.py``), the choice of
backend (``api.py``, ``scores.py``), the losses that are made of the scores' statistics (``losses.py``), the fast kernels
(``csrc/``). The functions here take the fields of a checked ``call.Call``, or of a ``scores.Scores`` or ``scores.Search``
that is read, and store the whole product, or all scores, which the kernels never do. What takes `xp`, the array module,
serves NumPy and torch.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

MAX_FACTORS = 8
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(xp: Any, z: Any) -> Any:
    if xp is not np:
        return xp.sigmoid(z)  # torch differentiates it, and not |z|, at 0
    e = xp.exp(-abs(z))  # never overflows
    return xp.where(z >= 0, 1 / (1 + e), e / (1 + e))


def _normal_cdf(xp: Any, z: Any) -> Any:
    return 0.5 * (1 + (_erf(z / math.sqrt(2)).astype(z.dtype) if xp is np else xp.erf(z / math.sqrt(2))))


def _normal_pdf(xp: Any, z: Any) -> Any:
    return xp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _silu_derivative(xp: Any, z: Any) -> Any:
    s = _sigmoid(xp, z)
    return s * (1 + z * (1 - s))


# name -> (phi, its derivative)
# The order is that of `enum Activation` in csrc/fusion.h.
ACTIVATIONS: dict[str | None, tuple[Any, Any]] = {
    None: (lambda xp, z: z, lambda xp, z: xp.ones_like(z)),
    "tanh": (lambda xp, z: xp.tanh(z), lambda xp, z: 1 - xp.tanh(z) ** 2),
    "sigmoid": (_sigmoid, lambda xp, z: _sigmoid(xp, z) * (1 - _sigmoid(xp, z))),
    "relu": (lambda xp, z: xp.where(z <= 0, xp.zeros_like(z), z), lambda xp, z: 1 - (z <= 0) * xp.ones_like(z)),
    "silu": (lambda xp, z: z * _sigmoid(xp, z), _silu_derivative),
    "gelu": (
        lambda xp, z: z * _normal_cdf(xp, z),
        lambda xp, z: _normal_cdf(xp, z) + z * _normal_pdf(xp, z),
    ),
}


def dtype_name(x: Any) -> str:
    """Name the dtype of an array or tensor; byte-swapped dtypes have names of their own, such as ``>f4``."""
    return str(x.dtype).removeprefix("torch.")


def promoted(operands: Sequence[Any], batch_dims: int = 0) -> str:
    """Name the dtype to which operands promote, as in torch: those of no dims count only where there are no others.

    The first `batch_dims` dims of each operand are not counted among its dims.
    """
    voters = [x for x in operands if x.ndim > batch_dims] or operands
    names = {dtype_name(x) for x in voters}
    return names.pop() if len(names) == 1 else "float64" if "float64" in names else "float32"


def accumulator(operands: Sequence[Any]) -> str:
    """Name the dtype in which products and sums are formed: float64 if any operand is, else float32."""
    return "float64" if any(dtype_name(x) == "float64" for x in operands) else "float32"


def result_dtype(*arrays: np.ndarray) -> np.dtype:
    """Return the dtype of the sum of these arrays."""
    name = promoted(arrays)
    for a in arrays:
        if a.dtype.name == name:
            return a.dtype  # bfloat16 is not NumPy's
    return np.dtype(name)


def aligned_shape(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Append axes of size 1 to the shape of a mask: it lies along the leading dims of its factor."""
    return shape + (1,) * (ndim - len(shape))


def align_mask(mask: Any, factor: Any) -> Any:
    """View a mask with as many dims as its factor, so that the two broadcast."""
    return mask.reshape(aligned_shape(tuple(mask.shape), factor.ndim))


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Broadcast by NumPy's rules, for any number of dims. Raises ValueError."""
    ndim = max(map(len, shapes))
    result = [1] * ndim
    for shape in shapes:
        for axis, n in enumerate(shape, ndim - len(shape)):
            if n != 1 and result[axis] not in (1, n):
                raise ValueError(f"{n} entries do not broadcast with {result[axis]}")
            result[axis] = result[axis] if n == 1 else n
    return tuple(result)


def present_or_zero(xp: Any, z: Any, mask: Any) -> Any:
    """Put 0 where a factor is absent: its entries may be NaN and must not be used."""
    return z if mask is None else xp.where(align_mask(mask, z), z, xp.zeros_like(z))


def value(xp: Any, z: Any, activation: str | None, mask: Any, absent: str) -> Any:
    """Evaluate phi(z) for a widened factor; where the factor is absent, 1 or 0, whichever it counts as."""
    held = ACTIVATIONS[activation][0](xp, present_or_zero(xp, z, mask))
    return held if mask is None else xp.where(align_mask(mask, z), held, xp.full_like(z, float(absent == "one")))


def derivative(xp: Any, z: Any, activation: str | None, mask: Any) -> Any:
    """Evaluate phi'(z) for a widened factor; where the factor is absent, phi'(0)."""
    return ACTIVATIONS[activation][1](xp, present_or_zero(xp, z, mask))


def _operands(
    fusion_weights: Any, factors: Any, activations: Any, present: Any, absent: str, wide: np.dtype
) -> list[tuple[Any, Any, Any]]:
    """Value, derivative and mask (or None) of every operand, the weights first where there are any."""
    operands = [] if fusion_weights is None else [(fusion_weights.astype(wide), wide.type(1), None)]
    for z, activation, mask in zip(factors, activations, present, strict=True):
        z = z.astype(wide)
        held = value(np, z, activation, mask, absent), derivative(np, z, activation, mask)
        operands.append((*held, None if mask is None else align_mask(mask, z)))
    return operands


@np.errstate(all="ignore")  # NaN and infinities give no warnings, as in the kernels and torch
def fusion_sum(fusion_weights: Any, factors: Any, activations: Any, present: Any, absent: str, dim: int) -> np.ndarray:
    """Evaluate the formula at the top of this file; `dim` counts from the last axis, negatively."""
    given = [*([] if fusion_weights is None else [fusion_weights]), *factors]
    operands = _operands(fusion_weights, factors, activations, present, absent, np.dtype(accumulator(given)))
    product = functools.reduce(operator.mul, [held for held, _, _ in operands])
    product = np.broadcast_to(product, broadcast_shape(*(a.shape for a in given)))
    return product.sum(axis=dim, dtype=product.dtype).astype(result_dtype(*given))


def _sum_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo broadcasting: sum over the axes along which an operand of this shape was repeated."""
    array = array.sum(axis=tuple(range(array.ndim - len(shape))), dtype=array.dtype)
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and array.shape[i] != 1)
    return array.sum(axis=repeated, keepdims=True, dtype=array.dtype)


@np.errstate(all="ignore")
def fusion_sum_grad(
    grad_output: Any,
    fusion_weights: Any,
    factors: Any,
    activations: Any,
    present: Any,
    absent: str,
    dim: int,
    needs: Any,
) -> tuple[np.ndarray | None, ...]:
    """Gradients of the weights and of each factor; None where `needs` is false.

    The gradient of operand k is u * phi_k'(z_k) * prod_{m != k} phi_m(z_m), summed over the axes along which operand k was
    broadcast. The product that leaves k out is formed as prefix times suffix: dividing by operand k would fail at zeros.
    """
    given = [*([] if fusion_weights is None else [fusion_weights]), *factors]
    needed = list(needs if fusion_weights is not None else needs[1:])
    wide = np.dtype(accumulator([grad_output, *given]))
    operands = _operands(fusion_weights, factors, activations, present, absent, wide)
    shape = broadcast_shape(*(a.shape for a in given))

    prefixes = [np.expand_dims(grad_output.astype(wide), dim)]
    for held, _, _ in operands[:-1]:
        prefixes.append(prefixes[-1] * held)
    suffix: Any = wide.type(1)
    grads: list[np.ndarray | None] = []
    for z, (held, slope, mask), prefix, need in zip(
        given[::-1], operands[::-1], prefixes[::-1], needed[::-1], strict=True
    ):
        if need:
            grad = prefix * suffix * slope
            if mask is not None:
                grad = np.where(mask, grad, wide.type(0))
            grads.append(_sum_to(np.broadcast_to(grad, broadcast_shape(grad.shape, shape)), z.shape).astype(z.dtype))
        else:
            grads.append(None)
        suffix = suffix * held
    return (*([None] if fusion_weights is None else []), *grads[::-1])


# ---- scores ----------------------------------------------------------------------------------------------------------

SEARCH_BLOCK = (
    2**22
)  # scores, or entries of keys, that `top_k` and `ranks` hold at a time: the keys may exceed the memory


def _side(factors: Any, activations: Any, present: Any, absent: str, weights: Any, wide: np.dtype) -> np.ndarray:
    """Form the product that is one side, (rows, n)."""
    operands = _operands(weights, factors, activations, present, absent, wide)
    return functools.reduce(operator.mul, [held for held, _, _ in operands])


def _working_dtype(queries: Any, keys: Any, fusion_weights: Any, key_bias: Any) -> np.dtype:
    given = [x for x in (*queries, *keys, fusion_weights, key_bias) if x is not None]
    return np.dtype(accumulator(given))


class _Pairs:
    """All scores of a call, its sides, and which pairs are valid (not excluded) and which positive."""

    def __init__(
        self,
        queries: Any,
        keys: Any,
        activations: Any,
        key_activations: Any,
        present: Any,
        key_present: Any,
        absent: str,
        fusion_weights: Any,
        key_bias: Any,
        logit_scale: float,
        logit_bias: float,
        query_labels: Any,
        key_labels: Any,
        query_ids: Any,
        key_ids: Any,
        exclude: Any,
    ):
        wide = _working_dtype(queries, keys, fusion_weights, key_bias)
        self.query_side = _side(queries, activations, present, absent, fusion_weights, wide)
        self.key_side = _side(keys, key_activations, key_present, absent, None, wide)
        self.unscaled = self.query_side @ self.key_side.T
        scores = wide.type(logit_scale) * self.unscaled + wide.type(logit_bias)
        self.scores = scores if key_bias is None else scores + key_bias.astype(wide)
        shape = self.scores.shape
        self.positive = np.eye(*shape, dtype=np.bool_) if query_labels is None else query_labels[:, None] == key_labels
        self.valid = np.ones(shape, bool)
        if query_ids is not None:
            self.valid = (query_ids[:, None] != key_ids) | self.positive
        if exclude is not None:
            self.valid &= ~exclude
        self.positive &= self.valid

    def side_grads(self, gamma: np.ndarray, needs: Sequence[bool]) -> list[np.ndarray | None]:
        """Gradients of both sides from that of the unscaled scores; None where `needs` is false."""
        gamma = gamma.astype(self.unscaled.dtype)
        return [
            gamma @ self.key_side if needs[0] else None,
            gamma.T @ self.query_side if needs[1] else None,
        ]


def _log_sum_exp(x: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Logarithm of the sum of exp(x) along the last axis, over the entries counted; -inf if there are none."""
    x = np.where(counted, x, -np.inf)
    greatest = x.max(axis=-1, initial=-np.inf)
    shift = np.where(np.isinf(greatest), 0, greatest)
    found = np.log(np.exp(x - shift[..., None]).sum(axis=-1)) + shift
    return np.where(greatest == np.inf, greatest, found)  # any infinity is the sum; NaN stays NaN


@np.errstate(all="ignore")
def score_matrix(*scores: Any) -> np.ndarray:
    """Evaluate the scores, (B, C), in the dtype to which factors and weights promote."""
    queries, keys, fusion_weights = scores[0], scores[1], scores[7]
    given = [x for x in (*queries, *keys, fusion_weights) if x is not None]
    return _Pairs(*scores).scores.astype(result_dtype(*given))


@np.errstate(all="ignore")
def score_matrix_grad(grad_output: np.ndarray, *arguments: Any) -> tuple[np.ndarray | None, ...]:
    """Gradients (B, n) and (C, n) of both sides, to be multiplied by logit_scale; arguments: a Scores, needs."""
    *scores, needs = arguments
    return tuple(_Pairs(*scores).side_grads(grad_output, needs))


@np.errstate(all="ignore")
def softmax_stats(*arguments: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Statistics of each row of scores, (5, B), and if `symmetric` of each column, (5, C); None else. All in float64.

    0: log-sum-exp over the valid pairs; 1: mean score of the positive pairs, or if `any` their log-sum-exp; 2: how many are
    positive; 3 and 4: if `totals` the sum over the valid pairs whose score is not -inf, and how many they are, else 0.
    Without pairs a log-sum-exp is -inf and a mean 0. A log-sum-exp is NaN if a score of its row is, else +inf if one is.
    Kernels keep this contract, of which the losses are made. Arguments: a Scores, any, symmetric, totals.
    """
    *scores, any, symmetric, totals = arguments
    pairs = _Pairs(*scores)

    def stats(s: np.ndarray, valid: np.ndarray, positive: np.ndarray) -> np.ndarray:
        positives = positive.sum(axis=1)
        mean = np.where(positive, s, 0).sum(axis=1) / np.maximum(positives, 1)
        counted = valid & (s != -np.inf) & totals
        total = np.where(counted, s, 0).sum(axis=1)
        of_positives = _log_sum_exp(s, positive) if any else mean
        return np.stack([_log_sum_exp(s, valid), of_positives, positives, total, counted.sum(axis=1)])

    s = pairs.scores.astype(np.float64)
    return stats(s, pairs.valid, pairs.positive), stats(s.T, pairs.valid.T, pairs.positive.T) if symmetric else None


@np.errstate(all="ignore")
def softmax_grad(*arguments: Any) -> tuple[Any, ...]:
    """Gradients of both sides (to be multiplied by logit_scale), of logit_scale and of key_bias.

    Gamma, the gradient of the scores, is made of coefficients of the rows, (5, B), and of the columns, (5, C) or None.
    0: log-sum-exp; 1: coefficient of the softmax; 2: log-sum-exp of the positives, if `any`; 3: coefficient of the
    positives; 4: what every valid pair loses whose score is not -inf, for label smoothing. Arguments: a Scores, any,
    query_coefs, key_coefs, needs.
    """
    *scores, any, query_coefs, key_coefs, needs = arguments
    pairs = _Pairs(*scores)

    def gamma(s: np.ndarray, valid: np.ndarray, positive: np.ndarray, coefs: np.ndarray) -> np.ndarray:
        lse, of_softmax, positive_lse, of_positives, of_all = coefs[:, :, None]
        found = of_softmax * np.exp(s - lse) - np.where(s == -np.inf, 0, of_all)
        found -= np.where(positive, of_positives * (np.exp(s - positive_lse) if any else 1), 0)
        return np.where(valid, found, 0)

    s = pairs.scores.astype(np.float64)
    total = gamma(s, pairs.valid, pairs.positive, query_coefs)
    if key_coefs is not None:
        total += gamma(s.T, pairs.valid.T, pairs.positive.T, key_coefs).T
    d_scale = float(np.where(pairs.valid, total * pairs.unscaled, 0).sum()) if needs[2] else 0.0
    return (*pairs.side_grads(total, needs), d_scale, total.sum(axis=0) if needs[3] else None)


@np.errstate(all="ignore")
def sigmoid_stats(*scores: Any) -> np.ndarray:
    """Loss of each row, (B,) in float64: the sum over the valid pairs of log(1 + exp(-z S)), z = 1 if positive, else -1."""
    return _sigmoid_losses(_Pairs(*scores))


def _sigmoid_losses(pairs: _Pairs) -> np.ndarray:
    s = pairs.scores.astype(np.float64)
    return np.where(pairs.valid, np.logaddexp(0, np.where(pairs.positive, -s, s)), 0).sum(axis=1)


@np.errstate(all="ignore")
def sigmoid_grad(*arguments: Any) -> tuple[Any, ...]:
    """Losses of the rows; gradients of both sides (to be multiplied by logit_scale), of logit_scale and logit_bias.

    Arguments: a Scores, query_coefs (B,), the coefficient of each row's loss, needs.
    """
    *scores, query_coefs, needs = arguments
    pairs = _Pairs(*scores)
    slopes = _sigmoid(np, pairs.scores.astype(np.float64)) - pairs.positive
    gamma = np.where(pairs.valid, query_coefs[:, None] * slopes, 0)
    d_scale = float(np.where(pairs.valid, gamma * pairs.unscaled, 0).sum()) if needs[2] else 0.0
    d_bias = float(gamma.sum()) if needs[3] else 0.0
    return (_sigmoid_losses(pairs), *pairs.side_grads(gamma, needs), d_scale, d_bias)


def _blocks(
    queries: Any,
    keys: Any,
    activations: Any,
    key_activations: Any,
    present: Any,
    key_present: Any,
    absent: str,
    fusion_weights: Any,
    key_bias: Any,
    exclude: Any,
    excluded_offsets: Any,
    excluded_ids: Any,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield, for some keys at a time, the number of the first, their scores (B, some), and which pairs are valid."""
    wide = _working_dtype(queries, keys, fusion_weights, key_bias)
    query_side = _side(queries, activations, present, absent, fusion_weights, wide)
    rows, (columns, terms) = len(query_side), keys[0].shape
    excluded_rows = None if excluded_offsets is None else np.repeat(np.arange(rows), np.diff(excluded_offsets))
    step = max(1, SEARCH_BLOCK // max(rows, terms, 1))
    for start in range(0, columns, step):
        some = slice(start, start + step)
        masks = [None if mask is None else mask[some] for mask in key_present]
        key_side = _side([x[some] for x in keys], key_activations, masks, absent, None, wide)
        # Not by BLAS, which is 5 times as fast and rounds equal keys differently, by where they are: ties would be lost.
        s = np.einsum("bi,ci->bc", query_side, key_side)
        if key_bias is not None:
            s += key_bias[some].astype(wide)
        valid = np.ones(s.shape, bool) if exclude is None else ~exclude[:, some]
        if excluded_rows is not None:
            here = (excluded_ids >= start) & (excluded_ids < start + step)
            valid[excluded_rows[here], excluded_ids[here] - start] = False
        yield start, s, valid


@np.errstate(all="ignore")
def top_k(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Find the k keys of the greatest scores: these and the keys' numbers, both (B, k).

    Equal scores come by their keys' numbers, NaN after all numbers, and -inf with number -1 where no key is left.
    Arguments: a Search, k.
    """
    *search, k = arguments
    rows = len(search[0][0])
    found = np.zeros((rows, 0), _working_dtype(*search[:2], *search[7:9])), np.zeros((rows, 0), np.int64)
    for start, s, valid in _blocks(*search):
        numbers = np.broadcast_to(np.arange(start, start + s.shape[1]), s.shape)
        found = best(found, (np.where(valid, s, -np.inf), np.where(valid, numbers, -1)), k)
    return found


def best(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the best k of two sets of values and keys' numbers, each (B, some), as `top_k` orders them."""
    values, numbers = (np.concatenate(parts, axis=1) for parts in zip(ours, theirs, strict=True))
    order = np.lexsort((numbers, -values, numbers < 0), axis=1)[:, :k]  # NaN after all numbers, what is excluded last
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def _of_targets(search: Any, targets: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Put the scores of the targets that are keys here in their places."""
    rows = np.arange(len(targets))
    for start, s, _ in _blocks(*search):
        here = rows[(targets >= start) & (targets < start + s.shape[1])]
        to[here] = s[here, targets[here] - start]
    return to


@np.errstate(all="ignore")
def target_scores(*arguments: Any) -> np.ndarray:
    """Evaluate the score of each query's target, (B,). Arguments: a Search, targets."""
    *search, targets = arguments
    return _of_targets(search, targets, np.zeros(len(targets), _working_dtype(*search[:2], *search[7:9])))


@np.errstate(all="ignore")
def ranks(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Count the valid keys other than the target whose score is greater than the target's, and equal to it: (B,) each.

    Where the target's score is NaN, all of them are greater. Arguments: a Search, targets and, optionally, scores (B,) of
    targets that are no keys here, whose numbers are negative.
    """
    search, (targets, *given) = arguments[:12], arguments[12:]
    rows = np.arange(len(targets))
    wanted = _of_targets(search, targets, given[0].copy()) if given else target_scores(*arguments)
    greater, equal = np.zeros(len(targets), np.int64), np.zeros(len(targets), np.int64)
    for start, s, valid in _blocks(*search):
        here = rows[(targets >= start) & (targets < start + s.shape[1])]
        valid[here, targets[here] - start] = False
        greater += (valid & ((s > wanted[:, None]) | np.isnan(wanted)[:, None])).sum(axis=1)
        equal += (valid & (s == wanted[:, None])).sum(axis=1)
    return greater, equal
