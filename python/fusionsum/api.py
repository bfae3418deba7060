"""`fusion_sum` and `fusion_sum_grad`: the public functions.

What lives here: the routing of a call by the type of its arrays; NumPy's ways to the kernels. What lives elsewhere: the
checks and their messages (``call.py``), which calls split in two, to be evaluated as scores (``split.py``), tensors
(``autograd/``, imported once torch is: ``autoload.py``), NumPy without native code (``reference.py``), the kernels
(``csrc/``).

A valid call of arrays that is small, or does not split, goes to the native module unchecked: it parses the arguments itself
and declines (NotImplemented) all that it does not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import reference, split
from .backend import native
from .call import Call, check, is_tensor

_ARRAYS = np.ndarray, np.memmap  # types of arrays that may split
autograd: Any = None  # an import statement in each call would cost 0.3 us


def adopt_autograd() -> Any:
    """Import the package that takes tensors, and keep it for the calls to come."""
    global autograd
    if autograd is None:  # compilers note each assignment
        from . import autograd as package

        autograd = package
    return autograd


def _plain(call: Call) -> Call:
    """View subclasses, such as memmaps, as the arrays they are; the native module takes no others."""
    operands, masks = ([x if x is None else x.view(np.ndarray) for x in xs] for xs in (call.operands, call.masks))
    return call.with_operands(operands, masks)


@np.errstate(all="ignore")  # as in the kernels, a result beyond its dtype's range gives no warning
def _by_scores(call: Call) -> Any:
    """Evaluate a checked call that splits; NotImplemented for any other."""
    call = _plain(call)
    sides = split.find_sides(call) if split.by_scores(call) else None
    if sides is None:
        return NotImplemented
    return split.fusion_sum(np, native.score_matrix, call, sides, reference.result_dtype(*call.arrays))


@np.errstate(all="ignore")
def _grad_by_scores(grad_output: Any, call: Call, needs: Sequence[bool]) -> Any:
    """Evaluate the gradients of a checked call that splits; NotImplemented for any other."""
    call = _plain(call)
    sides = split.find_sides(call) if split.by_scores(call) else None
    if sides is None:
        return NotImplemented
    kernels = native.score_matrix_grad, _checked_grad
    return split.fusion_sum_grad(np, *kernels, grad_output.view(np.ndarray), call, sides, needs)


def _checked_grad(grad_output: Any, call: Call, needs: Sequence[bool]) -> Any:
    """Evaluate the gradients of a checked call that does not split."""
    grads = NotImplemented
    if native is not None:
        grads = native.fusion_sum_grad(grad_output.view(np.ndarray), *_plain(call), needs, False)
    return reference.fusion_sum_grad(grad_output, *call, needs) if grads is NotImplemented else grads


def fusion_sum(
    fusion_weights: Any, *factors: Any, activations: Any = None, present: Any = None, absent: str = "one", dim: int = -1
) -> Any:
    """Sum over `dim` of the weighted product of the factors, without ever storing the product.

    ``F[...] = sum_i fusion_weights[..., i] * prod_m phi_m(factors[m][..., i])``

    Parameters
    ----------
    fusion_weights : None, numpy.ndarray or torch.Tensor
        The weights of the terms; None means all ones. Any shape that broadcasts with the factors, commonly ``(n,)``.
    *factors : numpy.ndarray or torch.Tensor
        One to eight arrays, one per modality, all of one framework and device, float64, float32, bfloat16 or float16.
        All operands broadcast by NumPy's rules.
    activations : None, str or sequence of (None or str), optional
        ``"tanh"``, ``"sigmoid"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (exact, by erf): the function phi_m applied to
        every factor, or one name (or None) per factor.
    present : None or sequence of (None or bool array), optional
        One mask per factor, of that factor's leading dims (it may also cover more of them, except the terms). Where it
        is False the factor is absent: its data is not used, and its gradient is exactly 0.
    absent : {"one", "zero"}, optional
        What an absent factor counts as. ``"one"`` leaves the lower-order terms.
    dim : int, optional
        The axis of the broadcast shape that holds the n terms and is summed.

    Returns
    -------
    numpy.ndarray or torch.Tensor
        The broadcast shape without `dim`. Dtypes promote as in torch: operands of no dims do not count unless all are.
        Float64 accumulates in float64, every other dtype in float32 or better.

    Raises
    ------
    TypeError
        For an argument of a wrong type or dtype, or operands of different frameworks.
    ValueError
        For a wrong shape, device, `dim`, activation name, mask or number of factors.

    Notes
    -----
    With torch tensors it is differentiable, any number of times and in forward mode, and works under ``torch.func`` and
    ``torch.compile``. Results are bit-identical for every number of threads.

    References
    ----------
    The sum is the rank-n form of Z. Liu et al., "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors",
    ACL 2018, eq. 6-8, and of J.-H. Kim et al., "Hadamard Product for Low-rank Bilinear Pooling", ICLR 2017, eq. 3; with
    activations, eq. 5.

    Examples
    --------
    >>> import numpy as np, fusionsum as fs
    >>> f, g = np.array([[1.0, 2.0, 3.0]]), np.array([[4.0, 5.0, 6.0]])
    >>> fs.fusion_sum(np.array([1.0, 10.0, 100.0]), f, g)
    array([1904.])
    >>> fs.fusion_sum(None, f, g, present=[None, np.array([False])])
    array([6.])
    """
    if factors and is_tensor(factors[0]):
        package = adopt_autograd() if autograd is None else autograd
        return package.fusion_sum(fusion_weights, factors, activations, present, absent, dim)
    if native is not None:
        output = NotImplemented
        if split.is_large(fusion_weights, factors, _ARRAYS):
            output = _by_scores(check(fusion_weights, factors, activations, present, absent, dim))
        if output is NotImplemented:
            output = native.fusion_sum(fusion_weights, factors, activations, present, absent, dim, False)
        if output is not NotImplemented:
            return output
    call = check(fusion_weights, factors, activations, present, absent, dim)
    output = NotImplemented if native is None else native.fusion_sum(*_plain(call), False)
    return reference.fusion_sum(*call) if output is NotImplemented else output


def fusion_sum_grad(
    grad_output: Any,
    fusion_weights: Any,
    *factors: Any,
    activations: Any = None,
    present: Any = None,
    absent: str = "one",
    dim: int = -1,
) -> tuple[Any, ...]:
    """Gradients of `fusion_sum` with respect to its weights and factors, in one pass over the data.

    Parameters
    ----------
    grad_output : numpy.ndarray or torch.Tensor
        The gradient of a loss with respect to the output, of exactly the output's shape.
    fusion_weights, *factors, activations, present, absent, dim
        As for `fusion_sum`.

    Returns
    -------
    tuple
        ``(d_fusion_weights, *d_factors)``, each of the shape and dtype of its operand; ``d_fusion_weights`` is None if
        `fusion_weights` is.

    Raises
    ------
    TypeError, ValueError
        As for `fusion_sum`; also if `grad_output` has not the output's shape.

    References
    ----------
    ``d z_m = grad * w * phi_m'(z_m) * prod_{k != m} phi_k(z_k)``, summed over broadcast axes; the product is formed from
    a prefix and a suffix, so zeros are harmless.

    Examples
    --------
    >>> import numpy as np, fusionsum as fs
    >>> f, g = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])
    >>> d_weights, d_f, d_g = fs.fusion_sum_grad(np.array([1.0]), np.array([1.0, 10.0]), f, g)
    >>> d_weights, d_f, d_g
    (array([3., 8.]), array([[ 3., 40.]]), array([[ 1., 20.]]))
    """
    needs = [fusion_weights is not None] + [True] * len(factors)
    if factors and is_tensor(factors[0]):
        package = adopt_autograd() if autograd is None else autograd
        return package.fusion_sum_grad(grad_output, fusion_weights, factors, activations, present, absent, dim, needs)
    if isinstance(grad_output, np.generic):  # as a sum without other dims returns
        grad_output = np.asarray(grad_output)
    if grad_output is None:
        raise TypeError("grad_output: expected an array of the output's shape, got None")
    if native is not None:
        grads = NotImplemented
        if split.is_large(fusion_weights, factors, _ARRAYS):
            call = check(fusion_weights, factors, activations, present, absent, dim, grad_output=grad_output)
            grads = _grad_by_scores(grad_output, call, needs)
        if grads is NotImplemented:
            given = (grad_output, fusion_weights, factors, activations, present, absent, dim, needs)
            grads = native.fusion_sum_grad(*given, False)
        if grads is not NotImplemented:
            return grads
    call = check(fusion_weights, factors, activations, present, absent, dim, grad_output=grad_output)
    return _checked_grad(grad_output, call, needs)
