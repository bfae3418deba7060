"""Layers with a full core tensor: one weight for every combination of numbers, one from each modality.

What lives elsewhere: what all layers share (``layer.py``), the steps that `TuckerFusion` shares with pooling
(``pooling.py``), the same tensors constrained in rank (``low_rank.py``, ``pooling.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..api import fusion_sum
from .layer import FusionLayer, is_plain
from .pooling import Like, Pooling

# Numbers that a cut of the outer product has to save in a call: below, its additional operations take longer than they
# save. Of 190 sizes (two to five modalities, outer products of 289 to 90,601 numbers, 1 to 256 outputs, 1 to 128 rows; one
# thread of Zen 5) none that is cut takes more than 1.03 times as long as with the whole outer product, most 0.3 to 0.9.
LEAST_SAVED = 2**17


def contracted(core: nn.Linear, factors: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
    """Contract a core tensor, which maps the first factor to (..., O * n_2 * ... * n_M), with the other factors too."""
    z = core(factors[0])
    for x, mask in zip(factors[:0:-1], present[:0:-1], strict=True):
        z = fusion_sum(None, z.unflatten(-1, (-1, x.shape[-1])), x.unsqueeze(-2), present=[None, mask])
    return z


def outer_product(factors: Sequence[Tensor]) -> Tensor:
    """Return the outer product of (..., n_m) factors in each row, (..., n_1 * ... * n_M)."""
    z = factors[0]
    for x in factors[1:]:
        if torch.is_grad_enabled() and z.ndim == x.ndim == 2 and not is_compiling() and len(z) == len(x):
            # Backward of bmm reads the gradient of z twice; that of a multiplication writes two more tensors of z's size.
            z = torch.bmm(z.unsqueeze(2), x.unsqueeze(1)).flatten(1)
        else:
            z = (z.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    return z


def cheapest_cut(sizes: Sequence[int], outputs: int) -> tuple[int, int]:
    """Choose how many of the last factors of an outer product are joined before the core maps them.

    A core of O outputs takes O * D multiply-adds a row, D the product of all sizes, in whatever order it meets the
    factors. Memory differs. Of the whole outer product D numbers are written and read. Where P of them, the outer product
    of the last factors, are mapped first, that leaves P and O * D / P sums, which the other factors contract; a sum
    counts twice, for backward writes its gradient before the matrix product reads it, where an entry of the outer
    product has the gradient written only.

    Returns
    -------
    inner : int
        How many factors, of the cut that is cheapest.
    saved : int
        How many numbers fewer than by the whole outer product, a row; 0 or less where there is nothing to save.
    """
    whole = math.prod(sizes)
    joined = {inner: math.prod(sizes[-inner:]) for inner in range(1, len(sizes))}
    saved = {inner: whole - (size + 2 * outputs * whole // size) for inner, size in joined.items()}
    return max(saved.items(), key=lambda pair: pair[1], default=(1, 0))


class TuckerFusion(Pooling):
    """Tucker decomposition with a full core: every number of one modality times every number of the others.

    ``z[k] = b[k] + sum_{i, j, ...} core[k, i, j, ...] * (W_1 @ x_1)[i] * (W_2 @ x_2)[j] * ...``, ``y = W_out @ z``;
    every map has its bias. The core has ``mm_dim ** (M + 1)`` numbers for M modalities: `mm_dim` has to be small.

    Parameters
    ----------
    input_dims, output_dim, mm_dim, normalize, dropout_input, dropout_pre_lin, dropout_output, device, dtype
        As for `MLB`; `dropout_input` is between the maps and the core.
    shared : bool, optional
        As for `MUTAN`.

    Attributes
    ----------
    core : torch.nn.Linear
        The core tensor as a map of the first modality: rows are (k, j, ...), columns i.
    core_bias : torch.nn.Parameter
        ``(mm_dim,)``.

    Raises
    ------
    TypeError, ValueError
        As for `MUTAN`.

    Notes
    -----
    Where a modality is missing all its mapped numbers count as 1. The original's ``bilinear`` is `core` and `core_bias`.

    References
    ----------
    L. R. Tucker, "Some mathematical notes on three-mode factor analysis", Psychometrika 31(3), 1966; as fusion: H.
    Ben-younes et al., "MUTAN: Multimodal Tucker Fusion for Visual Question Answering", ICCV 2017, eq. 2 to 4.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import TuckerFusion
    >>> fusion = TuckerFusion(input_dims=(32, 16), output_dim=10, mm_dim=24)
    >>> fusion(torch.randn(8, 32), torch.randn(8, 16)).shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1600,
        shared: bool = False,
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        like = Like(device=device, dtype=dtype)
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            like,
            shared=shared,
            normalize=normalize,
            dropout_input=dropout_input,
            dropout_pre_lin=dropout_pre_lin,
            dropout_output=dropout_output,
        )
        self.core = nn.Linear(self.mm_dim, self.mm_dim ** len(self.input_dims), bias=False, **like)
        self.core_bias = nn.Parameter(torch.empty(self.mm_dim, **like))
        self._reset_bias()

    def _reset_bias(self) -> None:
        nn.init.uniform_(self.core_bias, -(self.mm_dim**-0.5), self.mm_dim**-0.5)  # torch.nn.Bilinear's

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        super().reset_parameters()
        self._reset_bias()

    def _pool(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        first, *others = self._mapped(inputs)
        if present[0] is not None:
            first = torch.where(present[0].unsqueeze(-1), first, 1)
        return self._finished(contracted(self.core, [first, *others], present) + self.core_bias)

    def _reference_shapes(self) -> dict[str, tuple[int, ...]]:
        core = (self.mm_dim,) * (1 + len(self.input_dims))
        return super()._reference_shapes() | {"bilinear.weight": core, "bilinear.bias": (self.mm_dim,)}

    def _from_reference(self, name: str, value: Tensor) -> dict[str, Tensor]:
        if name == "bilinear.weight":
            return {"core.weight": value.movedim(1, -1).flatten(0, -2)}
        return {"core_bias": value} if name == "bilinear.bias" else super()._from_reference(name, value)


class TensorFusion(FusionLayer):
    """Tensor fusion: a dense linear map of the outer product of all modalities.

    ``y = W @ ([1, x_1] (x) ... (x) [1, x_M]) + b``: what `LowRankFusion` constrains in rank. W has
    ``output_dim * prod_m (input_dims[m] + 1)`` numbers.

    Parameters
    ----------
    input_dims : sequence of int
        The number of features of each modality; one to eight modalities.
    output_dim : int
        The number of outputs.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    core : torch.nn.Linear
        W and b. Columns of W are the numbers of the outer product of the modalities in the order of their sizes, the
        smallest first; `load_reference_state_dict` reorders.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer, or less than 1, or there are no or more than eight modalities.

    Notes
    -----
    A missing modality's features count as 0, and its 1 stays: the lower-order terms. The original is
    github.com/Justin1904/TensorFusionNetworks, whose ``post_fusion_layer_1`` this is; initialised as there, by torch.

    References
    ----------
    A. Zadeh et al., "Tensor Fusion Network for Multimodal Sentiment Analysis", EMNLP 2017, section 4.2.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import TensorFusion
    >>> fusion = TensorFusion(input_dims=(8, 6, 4), output_dim=10)
    >>> fusion(torch.randn(5, 8), torch.randn(5, 6), torch.randn(5, 4)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dims, output_dim=output_dim)
        self._order = sorted(range(len(self.input_dims)), key=self.input_dims.__getitem__)
        sizes = [self.input_dims[m] + 1 for m in self._order]
        self._inner, self._saved = cheapest_cut(sizes, self.output_dim)
        self.core = nn.Linear(math.prod(sizes), self.output_dim, device=device, dtype=dtype)

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        factors = [torch.constant_pad_nd(inputs[m], (1, 0), 1.0) for m in self._order]
        if not (self._cut_pays(inputs) and is_plain(self.core, nn.Linear)):
            return self.core(outer_product(factors))
        inner, outer = outer_product(factors[-self._inner :]), outer_product(factors[: -self._inner])
        matrix = self.core.weight.view(-1, inner.shape[-1])  # rows are (output, outer)
        mapped = nn.functional.linear(inner, matrix).unflatten(-1, (-1, outer.shape[-1]))
        return fusion_sum(None, mapped, outer.unsqueeze(-2)) + self.core.bias

    def _cut_pays(self, inputs: Sequence[Tensor]) -> bool:
        if self._saved <= 0 or is_compiling():  # numbers of rows may be symbols
            return self._saved > 0
        rows = max(x.numel() // size for x, size in zip(inputs, self.input_dims, strict=True))
        return rows * self._saved >= LEAST_SAVED

    def _reference_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"post_fusion_layer_1.{name}": tuple(p.shape) for name, p in self.core.named_parameters()}

    def _from_reference(self, name: str, value: Tensor) -> dict[str, Tensor]:
        if name.endswith("weight"):
            axes = [0, *(m + 1 for m in self._order)]
            value = value.unflatten(1, [d + 1 for d in self.input_dims]).permute(axes).flatten(1)
        return {name.replace("post_fusion_layer_1", "core"): value}
