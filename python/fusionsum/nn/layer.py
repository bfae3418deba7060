"""What the fusion layers share: checks of sizes and inputs, missing modalities, the checkpoints of the originals.

What lives elsewhere: the layers, and with each its equation and its initialisation.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..api import fusion_sum
from ..reference import ACTIVATIONS, MAX_FACTORS

Masks = Sequence[Tensor | None] | None


def check_sizes(**sizes: Any) -> None:
    """Raise an error that names the first size, or entry of a sequence of sizes, that is no positive integer."""
    for name, given in sizes.items():
        entries = {f"{name}[{i}]": size for i, size in enumerate(given)} if isinstance(given, tuple) else {name: given}
        for entry, size in entries.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{entry}: expected an integer, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{entry}: expected at least 1, got {size}")


def check_activation(name: str, given: Any) -> None:
    """Raise an error unless the activation is one that the kernels have, or None."""
    if given not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {given!r}")


def activated(name: str | None, z: Tensor) -> Tensor:
    """Apply an activation outside of a sum: to what a layer returns, or to a plain baseline's hidden units."""
    return z if name is None else getattr(nn.functional, name)(z)


def product(
    factors: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    activations: str | None = None,
    present: Masks = None,
    absent: str = "one",
) -> Tensor:
    """Multiply (..., n) factors element by element, with activations and masks: a sum of one term.

    A linear map may follow, and product and map would be one sum, the mixing form. That one does not store the product,
    but forms it again in backward: a step took 1.1 to 1.25 times as long (B = 512 to 8192, n = 500 to 1200).
    """
    plain = weights is None and activations is None and all(mask is None for mask in present or ())
    if plain and len(factors) <= 2:
        # Nothing to fuse, and torch's own multiplication takes from 0.4 (B = 64, n = 16) to 1.4 times as long (32768, 512).
        return functools.reduce(operator.mul, factors)
    factors = [z.unsqueeze(-2) for z in factors]
    return fusion_sum(weights, *factors, activations=activations, present=present, absent=absent, dim=-2)


def mapped_twice(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    """Map (..., in) by one linear map and another, or by their product where that takes fewer operations."""
    if not (_is_plain(first) and _is_plain(second)):
        return second(first(x))
    rows, size, hidden, width = x.shape[:-1].numel(), first.in_features, first.out_features, second.out_features
    if width * size * (hidden + rows) >= rows * hidden * (size + width):
        return second(first(x))
    bias = torch.addmv(second.bias, second.weight, first.bias)
    return nn.functional.linear(x, second.weight @ first.weight, bias)


def _is_plain(linear: nn.Module) -> bool:
    """Tell a linear map that is not parametrized, replaced or hooked; under a compiler sizes are symbols, and none is."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is nn.Linear and linear.bias is not None and not hooked and not is_compiling()


class ReferenceState(nn.Module):
    """A layer that takes the parameters of its original implementation.

    A subclass says by `_reference_names` what the original calls its parameters, and where shape or order differ also
    by `_reference_shapes` and `_from_reference`.
    """

    def load_reference_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in the parameters of the layer's original implementation (see the layer's References).

        Parameters
        ----------
        state : mapping of str to torch.Tensor
            The parameters by the original's names, of the original's shapes; of this layer only, without a prefix.

        Raises
        ------
        ValueError
            If a name is missing or unexpected, or a shape is not that of this layer's sizes. Nothing is copied then.
        """
        shapes = self._reference_shapes()
        missing, unexpected = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
        if missing or unexpected:
            raise ValueError(
                f"state: expected the parameters of the original {type(self).__name__}, {', '.join(shapes)}; "
                f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
            )
        for name, shape in shapes.items():
            if tuple(state[name].shape) != shape:
                raise ValueError(f"state[{name!r}]: expected shape {shape}, got {tuple(state[name].shape)}")
        own: dict[str, Tensor] = {}
        for name, value in state.items():
            own |= self._from_reference(name, value)
        self.load_state_dict(own)

    def _reference_names(self) -> dict[str, str]:
        """Map the original's names of modules or parameters to this layer's."""
        raise NotImplementedError(f"{type(self).__name__} has no original implementation with a state dict")

    def _reference_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the original's parameters have."""
        own, found = self.state_dict(keep_vars=True), {}
        for theirs, ours in self._reference_names().items():
            for name, parameter in own.items():
                if name == ours or name.startswith(f"{ours}."):
                    found[theirs + name.removeprefix(ours)] = tuple(parameter.shape)
        return found

    def _from_reference(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Convert one of the original's parameters to this layer's."""
        for theirs, ours in self._reference_names().items():
            if name == theirs or name.startswith(f"{theirs}."):
                return {ours + name.removeprefix(theirs): value}
        raise AssertionError(name)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def extra_repr(self) -> str:
        """Name the constructor's arguments in `repr`."""
        names = [name for name in inspect.signature(type(self)).parameters if name not in ("device", "dtype")]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class FusionLayer(ReferenceState):
    """A layer of one input per modality; a subclass is its constructor and `_fuse`."""

    def __init__(self, input_dims: Sequence[int], **sizes: int) -> None:
        super().__init__()
        if not 1 <= len(input_dims) <= MAX_FACTORS:
            raise ValueError(f"input_dims: expected 1 to {MAX_FACTORS} modalities, got {len(input_dims)}")
        check_sizes(input_dims=tuple(input_dims), **sizes)
        self.input_dims = tuple(input_dims)
        for name, size in sizes.items():
            setattr(self, name, size)

    def forward(self, *inputs: Any, present: Masks = None) -> Tensor:
        """Fuse one tensor per modality.

        Parameters
        ----------
        *inputs : torch.Tensor
            One per modality, ``(..., input_dims[m])``; the leading dims broadcast. Or one list of them.
        present : None or sequence of (None or bool torch.Tensor), optional
            One mask per modality, of its leading dims. Where it is False the modality is missing: its features are
            never used (they may be NaN), and its gradients are exactly 0. What it counts as, the layer says.

        Returns
        -------
        torch.Tensor
            ``(..., output_dim)``.

        Raises
        ------
        TypeError
            If a mask is not a boolean tensor.
        ValueError
            If the number of inputs or masks, or a shape, is wrong.
        """
        given = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], (list, tuple)) else inputs
        self._check_count("inputs", given)
        for m, (x, size) in enumerate(zip(given, self.input_dims, strict=True)):
            if x.shape[-1:] != (size,):
                raise ValueError(f"inputs[{m}]: expected shape (..., {size}), got {tuple(x.shape)}")
        if present is None:
            return self._fuse(given, [None] * len(given))
        self._check_count("present", present)
        return self._fuse(list(map(self._blank, range(len(given)), given, present)), present)

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        """Fuse inputs that are checked, and 0 where they are missing."""
        raise NotImplementedError

    def _check_count(self, name: str, given: Sequence[object]) -> None:
        if len(given) != len(self.input_dims):
            raise ValueError(f"{name}: expected {len(self.input_dims)}, one per modality, got {len(given)}")

    @staticmethod
    def _blank(m: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """Zero what is missing: the gradient of linear's weight multiplies it, if by 0, which NaN survives."""
        if mask is None:
            return x
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"present[{m}]: expected a boolean tensor, got {got}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"present[{m}]: expected shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
        return x.masked_fill(~mask.unsqueeze(-1), 0)
