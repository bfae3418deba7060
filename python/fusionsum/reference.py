"""The fusion sum in NumPy: reference, fallback and test oracle.

    F[...] = sum_i  w[..., i] * prod_m  phi_m(z_m[..., i])

What lives here: the formula, its gradient, the activations with their derivatives, and the rules of broadcasting, of masks
and of dtypes, written to be read. What lives elsewhere: the checks (``call.py``), the choice of backend (``api.py``), the
fast kernels (``csrc/``). The sums here take the fields of a checked ``call.Call``, and store the whole product, which the
kernels never do. What takes `xp`, the array module, serves NumPy and torch.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
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
