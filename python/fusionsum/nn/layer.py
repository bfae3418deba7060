"""What the fusion layers share: checks of inputs, missing modalities, the checkpoints of the originals.

What lives elsewhere: checks of constructors' arguments (``checks.py``); the layers, and with each its equation and its
initialisation.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from ..api import fusion_sum
from ..reference import MAX_FACTORS
from .checks import as_size, as_sizes

Masks = Sequence[Tensor | None] | None


def activated(name: str | None, z: Tensor) -> Tensor:
    """Apply an activation outside of a fusion sum: to a layer's output, or to a baseline's hidden units."""
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

    Where a linear map follows, product and map could be one fusion sum, with the map's weight for fusion weights. It would
    not store the product but form it again in backward: a step took 1.1 to 1.25 times as long (B = 512 to 8192, n = 500 to
    1200).
    """
    plain = weights is None and activations is None and all(mask is None for mask in present or ())
    if plain and len(factors) <= 2:
        # Nothing to fuse, and torch's own multiplication takes from 0.4 (B = 64, n = 16) to 1.4 times as long (32768, 512).
        return functools.reduce(operator.mul, factors)
    factors = [z.unsqueeze(-2) for z in factors]
    return fusion_sum(weights, *factors, activations=activations, present=present, absent=absent, dim=-2)


def mapped_twice(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    """Map (..., in) by one linear map and another, or by their product where that takes fewer operations."""
    if is_compiling():  # sizes may be symbols
        return second(first(x))
    if not (is_plain(first, nn.Linear) and is_plain(second, nn.Linear)) or first.bias is None or second.bias is None:
        return second(first(x))
    rows, size, hidden, width = x.shape[:-1].numel(), first.in_features, first.out_features, second.out_features
    if width * size * (hidden + rows) >= rows * hidden * (size + width):
        return second(first(x))
    bias = torch.addmv(second.bias, second.weight, first.bias)
    return nn.functional.linear(x, second.weight @ first.weight, bias)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module may be computed from its parameters, past its call: it is not replaced, parametrized or hooked.

    A parametrized module is of a class of its own. Hooks are those of the module and those of all modules.
    """
    hooked = (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or torch_module._has_any_global_hook()
    )
    return type(module) is kind and "forward" not in module.__dict__ and not hooked


def subsets(count: int) -> list[tuple[int, ...]]:
    """Return all sets of the numbers below `count`, smaller ones first.

    Examples
    --------
    >>> subsets(2)
    [(), (0,), (1,), (0, 1)]
    """
    return [chosen for size in range(count + 1) for chosen in itertools.combinations(range(count), size)]


class ReferenceState(nn.Module):
    """A layer that takes the parameters of its original implementation.

    A subclass lists the original's names in `_reference_names`; where shapes or orders differ from the layer's,
    `_reference_shapes` has the original's and `_from_reference` converts its parameters.
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
            If a name is missing or unexpected, a shape is not that of this layer's sizes, or parameters that the layer
            shares differ in `state`. Nothing is copied then.

        Examples
        --------
        >>> import torch
        >>> from fusionsum.nn import MLB
        >>> sizes = {"linear0": (3, 4), "linear1": (2, 4), "linear_out": (4, 5)}
        >>> original = torch.nn.ModuleDict({name: torch.nn.Linear(*size) for name, size in sizes.items()})
        >>> fusion = MLB((3, 2), 5, mm_dim=4)
        >>> fusion.load_reference_state_dict(original.state_dict())  # or what `torch.load` reads
        >>> torch.equal(fusion.linears[0].weight, original["linear0"].weight)
        True
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
        origin: dict[str, str] = {}
        for name, value in state.items():
            converted = self._from_reference(name, value)
            own |= converted
            origin |= dict.fromkeys(converted, name)
        self._check_shared(own, origin)
        self.load_state_dict(own)

    def _check_shared(self, own: Mapping[str, Tensor], origin: Mapping[str, str]) -> None:
        """Raise an error if values differ that are to become one shared parameter; `origin` has the original's names."""
        parameters = self.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        for name, value in own.items():
            earlier = first.setdefault(id(parameters.get(name, value)), name)
            these, those = own[earlier].double(), value.double()
            if not torch.allclose(these, those, rtol=0, atol=0, equal_nan=True):
                greatest = (these - those).abs().max().item()
                raise ValueError(
                    f"state[{origin[earlier]!r}], state[{origin[name]!r}]: expected equal values, which this layer "
                    f"shares, got a greatest difference of {greatest:.3g}"
                )

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
        self.input_dims = as_sizes("input_dims", input_dims)
        if not 1 <= len(self.input_dims) <= MAX_FACTORS:
            raise ValueError(f"input_dims: expected 1 to {MAX_FACTORS} modalities, got {len(self.input_dims)}")
        for name, size in sizes.items():
            setattr(self, name, as_size(name, size))

    def forward(self, *inputs: Any, present: Masks = None) -> Tensor:
        """Fuse one tensor per modality.

        Parameters
        ----------
        *inputs : torch.Tensor
            One per modality, ``(..., input_dims[m])``; the leading dims broadcast. Or one list of them.
        present : None or sequence of (None or bool torch.Tensor), optional
            One mask per modality, of its leading dims. Where it is False the modality is missing: its features are
            never used (they may be NaN), and its gradients are exactly 0. The layer's notes say what it counts as.

        Returns
        -------
        torch.Tensor
            ``(..., output_dim)``.

        Raises
        ------
        TypeError
            If an input is not a tensor, or a mask not a boolean one.
        ValueError
            If the number of inputs or masks, or a shape, is wrong.
        """
        return self._fuse(*self._checked(inputs, present))

    def contributions(self, *inputs: Any, present: Masks = None) -> dict[tuple[int, ...], Tensor]:
        """Take the output apart: one part for each set of modalities, whose sum over sets and terms is the output.

        Parameters
        ----------
        *inputs, present
            As of `forward`.

        Returns
        -------
        dict of tuple of int to torch.Tensor
            By the modalities on whose features a part depends, ``()`` for the constant: ``(..., terms, output_dim)``. Of
            `LowRankFusion` and `ResidualFusion`: what each of their terms adds, against features of 0, and after them
            the biases in ``()`` and the linear maps. Of any other layer, by inclusion and exclusion: one term, what a set
            of modalities gives beyond all smaller sets, against modalities that are missing.

        Raises
        ------
        TypeError, ValueError
            As `forward` does.

        References
        ----------
        J. C. Harsanyi, "A Simplified Bargaining Model for the n-Person Cooperative Game", International Economic Review 4,
        1963: the dividends of a set.

        Examples
        --------
        >>> import torch
        >>> from fusionsum.nn import LowRankFusion
        >>> fusion, x, y = LowRankFusion((3, 2), 4, rank=5), torch.randn(6, 3), torch.randn(6, 2)
        >>> parts = fusion.contributions(x, y)
        >>> {modalities: tuple(part.shape) for modalities, part in parts.items()}
        {(): (6, 6, 4), (0,): (6, 5, 4), (1,): (6, 5, 4), (0, 1): (6, 5, 4)}
        >>> torch.allclose(sum(part.sum(dim=-2) for part in parts.values()), fusion(x, y), atol=1e-5)
        True
        """
        return self._parts(*self._checked(inputs, present))

    def _checked(self, inputs: Sequence[Any], present: Masks) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Return the inputs, 0 where they are missing, and a mask for each."""
        given = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], (list, tuple)) else inputs
        self._check_count("inputs", given)
        for m, (x, size) in enumerate(zip(given, self.input_dims, strict=True)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"inputs[{m}]: expected a torch.Tensor of shape (..., {size}), got {type(x).__name__}; "
                    "say what is missing by `present`"
                )
            if x.shape[-1:] != (size,):
                raise ValueError(f"inputs[{m}]: expected shape (..., {size}), got {tuple(x.shape)}")
        if present is None:
            return given, [None] * len(given)
        self._check_count("present", present)
        return list(map(self._blank, range(len(given)), given, present)), present

    def _parts(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> dict[tuple[int, ...], Tensor]:
        """Take apart what `_fuse` returns of the same arguments."""
        there = [
            torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
            for x, mask in zip(inputs, present, strict=True)
        ]
        parts: dict[tuple[int, ...], Tensor] = {}
        for chosen in subsets(len(inputs)):
            masks = [mask if m in chosen else torch.zeros_like(mask) for m, mask in enumerate(there)]
            blank = [self._blank(m, x, mask) for m, (x, mask) in enumerate(zip(inputs, masks, strict=True))]
            below = [part for smaller, part in parts.items() if set(smaller) < set(chosen)]
            parts[chosen] = self._fuse(blank, masks).unsqueeze(-2) - sum(below)
        return parts

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        """Fuse inputs that are checked, and 0 where they are missing."""
        raise NotImplementedError

    def _check_count(self, name: str, given: Sequence[object]) -> None:
        if len(given) != len(self.input_dims):
            raise ValueError(f"{name}: expected {len(self.input_dims)}, one per modality, got {len(given)}")

    @staticmethod
    def _blank(m: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """Set missing features to 0: a weight's gradient is their product with a gradient of 0, and NaN * 0 is NaN."""
        if mask is None:
            return x
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"present[{m}]: expected a boolean tensor, got {got}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"present[{m}]: expected shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
        return x.masked_fill(~mask.unsqueeze(-1), 0)
