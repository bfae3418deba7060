"""The fusion sum in NumPy: reference, fallback and test oracle.

    F[...] = sum_i  w[..., i] * prod_m  phi_m(z_m[..., i])

What lives here: the formula, its gradient, the activations with their derivatives, and the rule of dtypes, written to be
read. What lives elsewhere: the checks and the choice of backend (``api.py``), the fast kernels (``csrc/``). The functions
here take arguments that ``api.check`` has already checked, and store the whole product, which the kernels never do.
"""

from __future__ import annotations

import functools
import math
import operator
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


# name -> (phi, its derivative). Both take the array module first, so that torch's double backward uses the same formulas.
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


def result_dtype(*arrays: np.ndarray) -> np.dtype:
    """Promote as torch does: arrays of no dimensions count only where there are no others."""
    voters = [a for a in arrays if a.ndim] or list(arrays)
    names = {a.dtype.name for a in voters}
    if len(names) == 1:
        return voters[0].dtype
    return np.dtype("float64" if "float64" in names else "float32")


def _wide(*arrays: np.ndarray) -> np.dtype:
    """Return what sums and products are formed in: float64 if any operand is, else float32."""
    return np.dtype("float64" if any(a.dtype == np.float64 for a in arrays) else "float32")


def align_mask(present: Any, factor: Any) -> Any:
    """Append axes of size 1, so that a mask of the leading dims broadcasts with its factor."""
    return present.reshape(tuple(present.shape) + (1,) * (factor.ndim - present.ndim))


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


def _operands(fusion_weights: Any, factors: Any, activations: Any, present: Any, absent: str, wide: Any) -> list[Any]:
    """Value, derivative and mask (or None) of every operand, the weights first where there are any."""
    operands = [] if fusion_weights is None else [(fusion_weights.astype(wide), wide.type(1), None)]
    for z, activation, mask in zip(factors, activations, present, strict=True):
        phi, derivative = ACTIVATIONS[activation]
        if mask is None:
            z = z.astype(wide)
            operands.append((phi(np, z), derivative(np, z), None))
        else:
            mask = align_mask(mask, z)
            z = np.where(mask, z.astype(wide), wide.type(0))  # what is absent may be NaN and must not be used
            value = np.where(mask, phi(np, z), wide.type(absent == "one"))
            operands.append((value, derivative(np, z), mask))
    return operands


@np.errstate(all="ignore")  # like the kernels and torch, quiet about what NaN and infinities do
def fusion_sum(fusion_weights: Any, factors: Any, activations: Any, present: Any, absent: str, dim: int) -> np.ndarray:
    """Evaluate the formula at the top of this file; `dim` counts from the last axis, negatively."""
    given = [*([] if fusion_weights is None else [fusion_weights]), *factors]
    operands = _operands(fusion_weights, factors, activations, present, absent, _wide(*given))
    product = functools.reduce(operator.mul, [value for value, _, _ in operands])
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
    wide = _wide(grad_output, *given)
    operands = _operands(fusion_weights, factors, activations, present, absent, wide)
    shape = broadcast_shape(*(a.shape for a in given))

    prefixes = [np.expand_dims(grad_output.astype(wide), dim)]
    for value, _, _ in operands[:-1]:
        prefixes.append(prefixes[-1] * value)
    suffix: Any = wide.type(1)
    grads: list[np.ndarray | None] = []
    for z, (value, derivative, mask), prefix, need in zip(
        given[::-1], operands[::-1], prefixes[::-1], needed[::-1], strict=True
    ):
        if need:
            grad = prefix * suffix * derivative
            if mask is not None:
                grad = np.where(mask, grad, wide.type(0))
            grads.append(_sum_to(np.broadcast_to(grad, broadcast_shape(grad.shape, shape)), z.shape).astype(z.dtype))
        else:
            grads.append(None)
        suffix = suffix * value
    return (*([None] if fusion_weights is None else []), *grads[::-1])
