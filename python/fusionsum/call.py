"""A checked call of the sum: its fields, the checks and their messages.

What lives here: `Call`, whose fields keep one order from the API to the registered op and the native module; every check
of the arguments, with its error message; the checks of one array, which calls of scores share. What lives elsewhere: calls
of scores (``scores.py``), the rules of broadcasting, of masks and of dtypes (``reference.py``), the choice of who evaluates
a call (``api.py``, ``autograd/routing.py``).

The native module parses the arguments itself and declines (NotImplemented) all that are not wholly valid; only then does
`check` run, to raise the error or to normalise the call for whoever takes it over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import reference

DTYPES = ("float64", "float32", "bfloat16", "float16")


class Call(NamedTuple):
    """The arguments of a fusion sum, with one activation and one mask per factor."""

    fusion_weights: Any
    factors: tuple[Any, ...]
    activations: tuple[str | None, ...]
    present: tuple[Any, ...]
    absent: str
    dim: int  # negative in a checked call: counted from the last axis of the broadcast shape

    @property
    def operands(self) -> tuple[Any, ...]:
        """The weights, which may be None, and the factors."""
        return (self.fusion_weights, *self.factors)

    @property
    def masks(self) -> tuple[Any, ...]:
        """One mask or None per operand."""
        return (None, *self.present)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The operands that are arrays."""
        return self.factors if self.fusion_weights is None else self.operands

    @property
    def shape(self) -> tuple[int, ...]:
        """The broadcast shape of all operands."""
        return reference.broadcast_shape(*(tuple(x.shape) for x in self.arrays))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The broadcast shape without `dim`."""
        shape = self.shape
        axis = self.dim % len(shape)
        return shape[:axis] + shape[axis + 1 :]

    def with_operands(self, operands: Sequence[Any], masks: Sequence[Any]) -> Call:
        """Replace the operands and their masks; the weights' place among the masks is dropped."""
        return self._replace(fusion_weights=operands[0], factors=tuple(operands[1:]), present=tuple(masks[1:]))


def is_tensor(x: Any) -> bool:
    """Tell whether x is a torch tensor, without importing torch for a caller who has not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def on_gpu(x: Any) -> bool:
    """Tell whether x is a tensor whose values only a GPU sees: reading them here would wait for it."""
    return is_tensor(x) and x.device.type == "cuda"


def spread(fusion_weights: Any, factors: Any, activations: Any, present: Any, absent: Any, dim: Any) -> Call:
    """Give every factor its activation and its mask, and check nothing else."""
    names = per_factor("activations", activations, len(factors), (str,))
    masks = per_factor("present", present, len(factors), ())
    return Call(fusion_weights, tuple(factors), tuple(names), tuple(masks), absent, dim)


def check(
    fusion_weights: Any,
    factors: Sequence[Any],
    activations: Any,
    present: Any,
    absent: Any,
    dim: Any,
    *,
    grad_output: Any = None,
) -> Call:
    """Return a valid call, normalised; for any other, raise an error that names the argument, its value and a valid one."""
    if not 1 <= len(factors) <= reference.MAX_FACTORS:
        raise ValueError(f"factors: expected 1 to {reference.MAX_FACTORS} arrays, got {len(factors)}")
    named = [(f"factors[{m}]", z) for m, z in enumerate(factors)]
    if fusion_weights is not None:
        named.append(("fusion_weights", fusion_weights))
    if grad_output is not None:
        named.append(("grad_output", grad_output))
    for name, x in named:
        check_operand(name, x, *named[0])

    shape: tuple[int, ...] = ()
    for m, (name, x) in enumerate(n for n in named if n[0] != "grad_output"):
        shape = broadcast(shape, name, tuple(x.shape), ", ".join(n for n, _ in named[:m]))

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

    call = spread(fusion_weights, factors, activations, None, absent, dim)
    check_activations("activations", call.activations)
    check_choice("absent", absent, ("one", "zero"))
    masks = per_factor("present", present, len(factors), ())
    for m, mask in enumerate(masks):
        if mask is not None:
            check_mask(f"present[{m}]", mask, f"factors[{m}]", factors[m], shape, dim)
    return call._replace(present=tuple(masks))


# ---- one argument ----------------------------------------------------------------------------------------------------


def kind(x: Any) -> str:
    """Name the framework's type of an array; for anything else, its own type."""
    return "torch.Tensor" if is_tensor(x) else "numpy.ndarray" if isinstance(x, np.ndarray) else type(x).__name__


def check_array(name: str, x: Any, first_name: str, first: Any) -> None:
    """Raise an error unless x is a plain array of the framework and on the device of the call's first array."""
    of_torch = is_tensor(x)
    if not of_torch and not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: expected a numpy.ndarray or torch.Tensor, got {type(x).__name__}")
    if not of_torch and isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked one; say what is absent by `present`")
    if x is first:
        return
    if kind(x) != kind(first):
        raise TypeError(f"{name}: expected a {kind(first)} like {first_name}, got a {kind(x)}; convert one of them")
    if of_torch and x.device != first.device:
        raise ValueError(f"{name}: is on {x.device}, expected {first.device}, where {first_name} is")


def check_operand(name: str, x: Any, first_name: str, first: Any) -> None:
    """Raise an error unless x is such an array, of a floating dtype."""
    check_array(name, x, first_name, first)
    if reference.dtype_name(x) not in DTYPES:
        raise TypeError(f"{name}: expected one of the dtypes {', '.join(DTYPES)}, got {reference.dtype_name(x)}")


def check_activations(name: str, activations: Sequence[Any]) -> None:
    """Raise an error unless every entry is None or the name of an activation."""
    for m, activation in enumerate(activations):
        if activation is None:
            continue
        known = ", ".join(repr(activation) for activation in reference.ACTIVATIONS)
        if not isinstance(activation, str):
            raise TypeError(f"{name}[{m}]: expected one of {known}, got {type(activation).__name__}")
        if activation not in reference.ACTIVATIONS:
            raise ValueError(f"{name}[{m}]: expected one of {known}, got {activation!r}")


def check_choice(name: str, given: Any, known: Sequence[str]) -> None:
    """Raise an error unless the argument is one of these words."""
    if isinstance(given, str) and given in known:
        return
    valid = " or ".join(filter(None, [", ".join(map(repr, known[:-1])), repr(known[-1])]))
    if not isinstance(given, str):
        raise TypeError(f"{name}: expected {valid}, got {type(given).__name__}")
    raise ValueError(f"{name}: expected {valid}, got {given!r}")


def broadcast(shape: tuple[int, ...], name: str, other: tuple[int, ...], before: str) -> tuple[int, ...]:
    """Broadcast a shape, () before the first operand, with that of one more."""
    if shape in ((), other):
        return other
    try:
        return reference.broadcast_shape(shape, other)
    except ValueError:
        raise ValueError(
            f"{name}: shape {other} does not broadcast with {shape}, the broadcast shape of {before}"
        ) from None


def per_factor(name: str, given: Any, count: int, single: tuple[type, ...]) -> list[Any]:
    """One entry per factor from None, one value for all (where its type may be `single`), or a sequence."""
    if given is None or isinstance(given, single):
        return [given] * count
    if not isinstance(given, (list, tuple)):
        valid = "None, a name or a sequence of them" if single else "None or a sequence of boolean arrays"
        raise TypeError(f"{name}: expected {valid}, got {type(given).__name__}")
    if len(given) != count:
        raise ValueError(f"{name}: expected {count} entries, one per factor, got {len(given)}")
    return list(given)


def check_mask(name: str, mask: Any, of: str, factor: Any, shape: tuple[int, ...], dim: int) -> None:
    """Raise an error unless the mask lies along the leading dims of its factor in the broadcast shape."""
    check_array(name, mask, of, factor)
    if reference.dtype_name(mask) != "bool":
        raise TypeError(f"{name}: expected the dtype bool, got {reference.dtype_name(mask)}")
    if mask.ndim > factor.ndim:
        raise ValueError(f"{name}: expected at most the {factor.ndim} dims of {of}, got shape {tuple(mask.shape)}")
    aligned = reference.aligned_shape(tuple(mask.shape), factor.ndim)
    full_shape = shape[len(shape) - factor.ndim :]
    for axis, (n, full) in enumerate(zip(aligned, full_shape, strict=True)):
        summed = axis - factor.ndim == dim
        if n != 1 and (n != full or summed):
            expected = "1, for the terms are present or absent together" if summed else f"1 or {full}"
            raise ValueError(
                f"{name}: shape {tuple(mask.shape)} does not fit the leading dims of {of}, shape {tuple(factor.shape)} "
                f"broadcast to {full_shape}: expected size {expected} at axis {axis}, got {n}"
            )
