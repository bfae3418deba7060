"""A short self-test of this installation: `fusion_sum` and its gradient against the reference in float64.

What lives elsewhere: the tests proper (``tests/``), which cover every form, dtype and edge; what is printed about the
machine (``__main__.py``).
"""

from __future__ import annotations

import itertools
import math
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import reference
from .api import fusion_sum, fusion_sum_grad

# Each form by the shapes of its weights and factors, and dim.
FORMS: dict[str, tuple[tuple[int, ...] | None, list[tuple[int, ...]], int]] = {
    "paired": ((67,), [(5, 67), (5, 67)], -1),
    "three modalities": (None, [(5, 67), (5, 67), (5, 67)], -1),
    "vector output": ((7, 1), [(5, 7, 33), (5, 7, 33)], -2),
    "mixing": ((9, 67), [(5, 1, 67), (5, 1, 67)], -1),
    "all pairs": ((67,), [(5, 1, 67), (9, 67)], -1),
    "candidates": (None, [(5, 1, 67), (5, 1, 67), (5, 9, 67)], -1),
}
DTYPES = ("float64", "float32", "float16")
ACTIVATIONS = (None, "tanh")


def _numpy(grad: Any, weights: Any, factors: Any, activation: Any, masks: Any, dim: int) -> list[Any]:
    options = {"activations": activation, "present": masks, "dim": dim}
    return [fusion_sum(weights, *factors, **options), *fusion_sum_grad(grad, weights, *factors, **options)]


def _torch(grad: Any, weights: Any, factors: Any, activation: Any, masks: Any, dim: int) -> list[Any]:
    import torch

    leaves = [None if a is None else torch.from_numpy(a).requires_grad_() for a in (weights, *factors)]
    masks = [None if mask is None else torch.from_numpy(mask) for mask in masks]
    output = fusion_sum(*leaves, activations=activation, present=masks, dim=dim)
    output.backward(torch.from_numpy(grad))
    return [output.detach().numpy(), *(None if a is None else a.grad.numpy() for a in leaves)]


def _exact(of: Any, grad: Any, weights: Any, factors: Any, activation: Any, masks: Any, dim: int) -> list[Any]:
    """Evaluate in float64; where `of` is ``np.abs``, the sums of the magnitudes of the terms."""
    grad, weights, *factors = (None if a is None else of(a.astype(np.float64)) for a in (grad, weights, *factors))
    given = (weights, factors, [activation] * len(factors), masks, "one", dim)
    needs = [True] * (1 + len(factors))
    return [reference.fusion_sum(*given), *reference.fusion_sum_grad(grad, *given, needs)]


def _within(got: Any, exact: Any, magnitude: Any, dtype: str, terms: float) -> bool:
    """Tell whether the error is within (terms + 64) * eps * magnitude and an ulp of the result; NaN never is.

    The 64 allows for ``1 - tanh(z) ** 2``, which cancels.
    """
    if exact is None:
        return got is None
    store, wide = np.finfo(dtype), np.finfo("float64" if dtype == "float64" else "float32")
    bound = (terms + 64) * wide.eps * magnitude + store.eps * abs(exact) + store.smallest_subnormal
    return got.dtype == dtype and got.shape == exact.shape and bool((abs(got - exact) <= bound).all())


def run() -> dict[str, list[str]]:
    """Run every form in every dtype, with and without an activation, one modality partly absent, forward and backward.

    Returns
    -------
    dict of str to list of str
        For ``"numpy"``, and ``"torch"`` where it is installed, the cases whose error exceeds its bound.

    Examples
    --------
    >>> from fusionsum import selftest
    >>> selftest.run()["numpy"]
    []
    """
    frameworks = {"numpy": _numpy} | ({"torch": _torch} if find_spec("torch") else {})
    failures: dict[str, list[str]] = {framework: [] for framework in frameworks}
    rng = np.random.default_rng(0)
    for (form, shapes), dtype, activation in itertools.product(FORMS.items(), DTYPES, ACTIVATIONS):
        weights_shape, factor_shapes, dim = shapes
        weights = None if weights_shape is None else rng.uniform(-1, 1, weights_shape).astype(dtype)
        factors = [rng.uniform(-2, 2, shape).astype(dtype) for shape in factor_shapes]
        product_shape = list(np.broadcast_shapes(*factor_shapes, weights_shape or ()))
        terms = math.prod(product_shape)
        del product_shape[dim]
        grad = rng.uniform(-1, 1, product_shape).astype(dtype)
        masks = [*[None] * (len(factors) - 1), rng.random(factor_shapes[-1][0]) < 0.7]
        case = (grad, weights, factors, activation, masks, dim)
        exact, magnitude = _exact(np.asarray, *case), _exact(np.abs, *case)
        for framework, compute in frameworks.items():
            results = compute(*case)
            if not all(_within(*r, dtype, terms) for r in zip(results, exact, magnitude, strict=True)):
                failures[framework].append(f"{form}, {dtype}, activation {activation}")
    return failures
