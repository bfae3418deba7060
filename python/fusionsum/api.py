"""`fusion_sum` and `fusion_sum_grad`: the public functions.

What lives here: every check of the arguments, with its error message, and the routing of a call by the type of its
arrays. What lives elsewhere: torch (``torch_op.py``, imported when the first tensor arrives), NumPy without native code
(``reference.py``), the kernels (``csrc/``).

A valid call is not checked here: the native module parses the arguments itself and declines (NotImplemented) whatever it
does not take. Only then does `check` run, to raise the error or to normalise the call for the reference.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import reference
from .backend import native

torch_op: Any = None  # imported when the first tensor arrives; an import statement in each call would cost 0.3 us
_DTYPES = ("float64", "float32", "bfloat16", "float16")


def is_tensor(x: Any) -> bool:
    """Tell whether x is a torch tensor, without importing torch for a caller who has not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _kind(x: Any) -> str:
    return "torch.Tensor" if is_tensor(x) else "numpy.ndarray" if isinstance(x, np.ndarray) else type(x).__name__


def _check_array(name: str, x: Any, like: str) -> None:
    if not isinstance(x, np.ndarray) and not is_tensor(x):
        raise TypeError(f"{name}: expected a numpy.ndarray or torch.Tensor, got {type(x).__name__}")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked one; say what is absent by `present`")
    if _kind(x) != like:
        raise TypeError(f"{name}: expected a {like} like factors[0], got a {_kind(x)}; convert one of them")


def _broadcast(shape: tuple[int, ...], name: str, other: tuple[int, ...], before: str) -> tuple[int, ...]:
    try:
        return reference.broadcast_shape(shape, other)
    except ValueError:
        raise ValueError(
            f"{name}: shape {other} does not broadcast with {shape}, the broadcast shape of {before}"
        ) from None


def check(
    fusion_weights: Any,
    factors: tuple[Any, ...],
    activations: Any,
    present: Any,
    absent: Any,
    dim: Any,
    grad_output: Any = None,
) -> tuple[list[str | None], list[Any], int]:
    """Raise an error that names the argument, what came and what was expected; or normalise a valid call.

    Returns
    -------
    activations : list of str or None
        One per factor.
    present : list of array or None
        One per factor.
    dim : int
        Negative: counted from the last axis of the broadcast shape.
    """
    if not 1 <= len(factors) <= reference.MAX_FACTORS:
        raise ValueError(f"factors: expected 1 to {reference.MAX_FACTORS} arrays, got {len(factors)}")
    like = _kind(factors[0])
    named = [(f"factors[{m}]", z) for m, z in enumerate(factors)]
    if fusion_weights is not None:
        named.append(("fusion_weights", fusion_weights))
    if grad_output is not None:
        named.append(("grad_output", grad_output))
    for name, x in named:
        _check_array(name, x, like)
        if _dtype_name(x) not in _DTYPES:
            raise TypeError(f"{name}: expected one of the dtypes {', '.join(_DTYPES)}, got {_dtype_name(x)}")
        if like == "torch.Tensor" and x.device != factors[0].device:
            raise ValueError(f"{name}: is on {x.device}, expected {factors[0].device}, where factors[0] is")

    shape: tuple[int, ...] = ()
    for m, (name, x) in enumerate(n for n in named if n[0] != "grad_output"):
        shape = _broadcast(shape, name, tuple(x.shape), ", ".join(n for n, _ in named[:m]))

    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if not shape:
        raise ValueError("factors: expected at least one array of one dimension or more, got only arrays of none")
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim: expected {-len(shape)} to {len(shape) - 1} for the broadcast shape {shape}, got {dim}")
    dim = int(dim) if dim < 0 else int(dim) - len(shape)

    if grad_output is not None:
        expected = shape[: len(shape) + dim] + shape[len(shape) + dim + 1 :]
        if tuple(grad_output.shape) != expected:
            raise ValueError(
                f"grad_output: expected shape {expected}, that of the output, got {tuple(grad_output.shape)}"
            )

    known = ", ".join(repr(name) for name in reference.ACTIVATIONS)
    per_factor = _per_factor("activations", activations, len(factors), (str,))
    for m, name in enumerate(per_factor):
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"activations[{m}]: expected one of {known}, got {type(name).__name__}")
        if name not in reference.ACTIVATIONS:
            raise ValueError(f"activations[{m}]: expected one of {known}, got {name!r}")

    if not isinstance(absent, str):
        raise TypeError(f"absent: expected 'one' or 'zero', got {type(absent).__name__}")
    if absent not in ("one", "zero"):
        raise ValueError(f"absent: expected 'one' or 'zero', got {absent!r}")
    masks = _per_factor("present", present, len(factors), ())
    for m, mask in enumerate(masks):
        if mask is not None:
            _check_mask(f"present[{m}]", mask, f"factors[{m}]", factors[m], shape, dim, like)
    return per_factor, masks, dim


def _per_factor(name: str, given: Any, count: int, single: tuple[type, ...]) -> list[Any]:
    """One entry per factor from None, one value for all (where its type may be `single`), or a sequence."""
    if given is None or isinstance(given, single):
        return [given] * count
    if not isinstance(given, (list, tuple)):
        what = "None, a name or a sequence of them" if single else "None or a sequence of boolean arrays"
        raise TypeError(f"{name}: expected {what}, got {type(given).__name__}")
    if len(given) != count:
        raise ValueError(f"{name}: expected {count} entries, one per factor, got {len(given)}")
    return list(given)


def _check_mask(name: str, mask: Any, of: str, factor: Any, shape: tuple[int, ...], dim: int, like: str) -> None:
    _check_array(name, mask, like)
    if _dtype_name(mask) != "bool":
        raise TypeError(f"{name}: expected the dtype bool, got {_dtype_name(mask)}")
    if like == "torch.Tensor" and mask.device != factor.device:
        raise ValueError(f"{name}: is on {mask.device}, expected {factor.device}, where {of} is")
    if mask.ndim > factor.ndim:
        raise ValueError(f"{name}: expected at most the {factor.ndim} dims of {of}, got shape {tuple(mask.shape)}")
    aligned = tuple(mask.shape) + (1,) * (factor.ndim - mask.ndim)
    target = shape[len(shape) - factor.ndim :]
    for axis, (n, full) in enumerate(zip(aligned, target, strict=True)):
        summed = axis - factor.ndim == dim
        if n != 1 and (n != full or summed):
            expected = "1, for the terms are present or absent together" if summed else f"1 or {full}"
            raise ValueError(
                f"{name}: shape {tuple(mask.shape)} does not fit the leading dims of {of}, shape {tuple(factor.shape)} "
                f"broadcast to {target}: expected size {expected} at axis {axis}, got {n}"
            )


def _for_torch() -> Any:
    global torch_op
    from . import torch_op as module

    torch_op = module
    return torch_op


def _plain(*arrays: Any) -> bool:
    return all(x is None or type(x) is np.ndarray for x in arrays)


def _as_plain(x: Any) -> Any:
    """View a subclass, such as a memmap, as the array it is; the native module takes no subclasses."""
    return x if x is None else x.view(np.ndarray)


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
    ACL 2018, eq. 6-8; with ``activations="tanh"`` that of J.-H. Kim et al., "Hadamard Product for Low-rank Bilinear
    Pooling", ICLR 2017, eq. 3.

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
        module = _for_torch() if torch_op is None else torch_op
        return module.fusion_sum(fusion_weights, factors, activations, present, absent, dim)
    if native is not None:
        output = native.fusion_sum(fusion_weights, factors, activations, present, absent, dim, False)
        if output is not NotImplemented:
            return output
    names, masks, dim = check(fusion_weights, factors, activations, present, absent, dim)
    if native is not None and not _plain(fusion_weights, *factors, *masks):
        plain = map(_as_plain, (fusion_weights, *factors))
        return fusion_sum(*plain, activations=names, present=list(map(_as_plain, masks)), absent=absent, dim=dim)
    return reference.fusion_sum(fusion_weights, factors, names, masks, absent, dim)


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
        given = (grad_output, fusion_weights, factors, activations, present, absent, dim, needs)
        return (_for_torch() if torch_op is None else torch_op).fusion_sum_grad(*given)
    grad_output = (
        np.asarray(grad_output) if isinstance(grad_output, np.generic) else grad_output
    )  # as a 1-D sum returns
    if native is not None:
        given = (grad_output, fusion_weights, factors, activations, present, absent, dim, needs)
        grads = native.fusion_sum_grad(*given, False)
        if grads is not NotImplemented:
            return grads
    if grad_output is None:
        raise TypeError("grad_output: expected an array of the output's shape, got None")
    names, masks, dim = check(fusion_weights, factors, activations, present, absent, dim, grad_output)
    if native is not None and not _plain(grad_output, fusion_weights, *factors, *masks):
        plain = map(_as_plain, (grad_output, fusion_weights, *factors))
        return fusion_sum_grad(*plain, activations=names, present=list(map(_as_plain, masks)), absent=absent, dim=dim)
    return reference.fusion_sum_grad(grad_output, fusion_weights, factors, names, masks, absent, dim, needs)
