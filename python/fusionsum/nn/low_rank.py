"""Layers of one linear map per modality and one sum of their products.

What lives elsewhere: what all layers share (``layer.py``), layers that pool and map once more (``pooling.py``).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..api import fusion_sum
from .checks import as_activations, as_choice
from .layer import FusionLayer, Masks, activated, product, subsets


def multiplied_out(
    fusion_weights: Tensor,
    maps: Iterable[nn.Module],
    inputs: Sequence[Tensor],
    present: Sequence[Tensor | None],
    activations: str | Sequence[str | None] | None = None,
) -> dict[tuple[int, ...], Tensor]:
    """Multiply out ``fusion_weights * prod_m (c_m + g_m)``, for a layer's `contributions`.

    c_m (rank, output_dim) is the factor of features of 0, or 1 where `present` says that the modality is missing, and g_m
    is what the features add to it: the part of some modalities is the product of their g_m and the others' c_m.
    """
    names = [activations] * len(inputs) if activations is None or isinstance(activations, str) else activations
    constant, given = [], []
    for x, linear, mask, activation in zip(inputs, maps, present, names, strict=True):
        zero, whole = (
            activated(activation, linear(z).unflatten(-1, (len(fusion_weights), -1))) for z in (torch.zeros_like(x), x)
        )
        gone = None if mask is None else ~mask[..., None, None]
        constant.append(zero if gone is None else zero.masked_fill(gone, 1))
        given.append(whole - zero if gone is None else (whole - zero).masked_fill(gone, 0))
    return {
        chosen: fusion_weights
        * functools.reduce(operator.mul, [given[m] if m in chosen else constant[m] for m in range(len(given))])
        for chosen in subsets(len(given))
    }


class LowRankFusion(FusionLayer):
    """Low-rank multimodal fusion: a rank-constrained linear map of the outer product of all modalities.

    ``h = fusion_bias + sum_i fusion_weights[i] * prod_m (W_m[i] @ [x_m, 1])``, i = 1..rank, equals the dense
    ``W . ([x_1, 1] (x) ... (x) [x_M, 1])`` for a tensor W of that rank. The appended 1 is the bias of each projection:
    it gives every lower-order term, and so a meaning to a missing modality.

    Parameters
    ----------
    input_dims : sequence of int
        The number of features of each modality; one to eight modalities.
    output_dim : int
        The number of outputs.
    rank : int
        The number of terms.
    bias : bool, optional
        Whether to add `fusion_bias`. The appended 1 is part of the method and always there.
    activations : None, str or sequence of (None or str), optional
        Applied to the projections, as in `fusionsum.fusion_sum`.
    init : {"published", "additive"}, optional
        How parameters are drawn: as the authors' code does, or so that the layer starts near a sum over modalities.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    factors : torch.nn.ModuleList
        One ``Linear(input_dims[m], rank * output_dim)`` per modality.
    fusion_weights : torch.nn.Parameter
        ``(rank, 1)``.
    fusion_bias : torch.nn.Parameter or None
        ``(output_dim,)``.

    Raises
    ------
    TypeError
        If a size is not an integer.
    ValueError
        If a size is less than 1, an activation or `init` is unknown, or there are no or more than eight modalities.

    Notes
    -----
    A missing modality's projection counts as 1: the layer of the others remains.

    The published biases start near 0, so that at first there is little but the product of all modalities. Additive, which
    is ours: they start at 1, and fusion weights have the standard deviation ``1 / sqrt(rank)``, so that there is at first
    little but a linear map of each modality. Where each modality is informative alone, a layer that starts so learns far
    better; where only their interaction is, hardly at all (docs/pipeline.md has the figures).

    References
    ----------
    Z. Liu et al., "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors", ACL 2018, eq. 6-8. The fusion
    weights and the initialisation are those of the authors' code, github.com/Justin1904/Low-rank-Multimodal-Fusion.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import LowRankFusion
    >>> fusion = LowRankFusion(input_dims=(32, 16), output_dim=10, rank=4)
    >>> image, text = torch.randn(8, 32), torch.randn(8, 16)
    >>> fusion(image, text).shape
    torch.Size([8, 10])
    >>> heard = torch.arange(8) % 2 == 0
    >>> fusion(image, text, present=[None, heard]).shape
    torch.Size([8, 10])
    """

    _FACTORS = ("audio_factor", "video_factor", "text_factor")

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        rank: int,
        *,
        bias: bool = True,
        activations: str | Sequence[str | None] | None = None,
        init: str = "published",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dims, output_dim=output_dim, rank=rank)
        self.activations = as_activations("activations", activations, len(self.input_dims))
        self.init = as_choice("init", init, ("published", "additive"))
        self.factors = nn.ModuleList(
            nn.Linear(d, self.rank * self.output_dim, device=device, dtype=dtype) for d in self.input_dims
        )
        self.fusion_weights = nn.Parameter(torch.empty(self.rank, 1, device=device, dtype=dtype))
        if bias:
            self.fusion_bias = nn.Parameter(torch.empty(self.output_dim, device=device, dtype=dtype))
        else:
            self.register_parameter("fusion_bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as `init` says, and set the bias to 0."""
        for d, linear in zip(self.input_dims, self.factors, strict=True):
            # As xavier_normal_ draws the paper's (rank, d + 1, output_dim) tensor: one of the d + 1 is the bias.
            std = math.sqrt(2 / ((d + 1 + self.rank) * self.output_dim))
            nn.init.normal_(linear.weight, std=std)
            nn.init.normal_(linear.bias, std=std)
            if self.init == "additive":
                nn.init.ones_(linear.bias)
        std = math.sqrt(2 / (1 + self.rank)) if self.init == "published" else math.sqrt(1 / self.rank)
        nn.init.normal_(self.fusion_weights, std=std)
        if self.fusion_bias is not None:
            nn.init.zeros_(self.fusion_bias)

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        factors = [
            linear(x).unflatten(-1, (self.rank, self.output_dim))
            for linear, x in zip(self.factors, inputs, strict=True)
        ]
        fused = fusion_sum(self.fusion_weights, *factors, activations=self.activations, present=present, dim=-2)
        return fused if self.fusion_bias is None else fused + self.fusion_bias

    def _parts(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> dict[tuple[int, ...], Tensor]:
        parts = multiplied_out(self.fusion_weights, self.factors, inputs, present, self.activations)
        if self.fusion_bias is not None:
            bias = self.fusion_bias.expand(*parts[()].shape[:-2], 1, self.output_dim)
            parts[()] = torch.cat([parts[()], bias], dim=-2)
        return parts

    def _reference_shapes(self) -> dict[str, tuple[int, ...]]:
        if len(self.input_dims) != 3:
            raise ValueError(f"state: the original fuses 3 modalities, this layer {len(self.input_dims)}")
        factors = zip(self._FACTORS, self.input_dims, strict=True)
        shapes: dict[str, tuple[int, ...]] = {name: (self.rank, d + 1, self.output_dim) for name, d in factors}
        return shapes | {"fusion_weights": (1, self.rank), "fusion_bias": (1, self.output_dim)}

    def _from_reference(self, name: str, value: Tensor) -> dict[str, Tensor]:
        if name not in self._FACTORS:
            return {name: value.reshape(getattr(self, name).shape)}
        bias, weight = value.split([1, value.shape[1] - 1], dim=1)  # the original prepends the 1
        own = f"factors.{self._FACTORS.index(name)}"
        return {f"{own}.weight": weight.transpose(1, 2).flatten(0, 1), f"{own}.bias": bias.flatten()}

    def extra_repr(self) -> str:
        """Name the sizes in `repr`."""
        return (
            f"input_dims={self.input_dims}, output_dim={self.output_dim}, rank={self.rank}, "
            f"bias={self.fusion_bias is not None}, activations={self.activations!r}, init={self.init!r}"
        )


class CPBilinear(FusionLayer):
    """`torch.nn.Bilinear` whose weight tensor has a CP decomposition of rank `rank`: called alike, far cheaper.

    ``y[o] = bias[o] + sum_r weight[o, r] * (linears[0] @ x1)[r] * (linears[1] @ x2)[r]``, which is ``x1^T A[o] x2 + b[o]``
    for ``A[o] = sum_r weight[o, r] * outer(linears[0].weight[r], linears[1].weight[r])``.

    Parameters
    ----------
    in1_features, in2_features, out_features : int
        As of `torch.nn.Bilinear`.
    rank : int
        The number of terms.
    bias : bool, optional
        Whether to add `bias`.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    linears : torch.nn.ModuleList
        Two of ``Linear(in_features, rank, bias=False)``.
    weight : torch.nn.Parameter
        ``(out_features, rank)``.
    bias : torch.nn.Parameter or None
        ``(out_features,)``.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer, or less than 1.

    Notes
    -----
    Initially outputs have the variance they have with `torch.nn.Bilinear`, and projections that of their input. A
    missing input's projection counts as 1.

    References
    ----------
    The decomposition of T. G. Kolda and B. W. Bader, "Tensor Decompositions and Applications", SIAM Review 51(3), 2009,
    section 3; as pooling: J.-H. Kim et al., "Hadamard Product for Low-rank Bilinear Pooling", ICLR 2017, eq. 3.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import CPBilinear
    >>> bilinear = CPBilinear(20, 30, 40, rank=8)
    >>> bilinear(torch.randn(128, 20), torch.randn(128, 30)).shape
    torch.Size([128, 40])
    """

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"in1_features": in1_features, "in2_features": in2_features, "out_features": out_features}
        super().__init__((in1_features, in2_features), **sizes, rank=rank)
        self.linears = nn.ModuleList(
            nn.Linear(d, self.rank, bias=False, device=device, dtype=dtype) for d in self.input_dims
        )
        self.weight = nn.Parameter(torch.empty(self.out_features, self.rank, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for d, linear in zip(self.input_dims, self.linears, strict=True):
            nn.init.normal_(linear.weight, std=math.sqrt(1 / d))
        first, second = self.input_dims
        nn.init.normal_(self.weight, std=math.sqrt(second / (3 * self.rank)))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -math.sqrt(1 / first), math.sqrt(1 / first))

    def forward(self, input1: Tensor, input2: Tensor, *, present: Masks = None) -> Tensor:  # type: ignore[override]
        """Map ``(..., in1_features)`` and ``(..., in2_features)`` to ``(..., out_features)``, as `FusionLayer` does."""
        return super().forward(input1, input2, present=present)

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        factors = [linear(x) for linear, x in zip(self.linears, inputs, strict=True)]
        return nn.functional.linear(product(factors, present=present), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Name the sizes in `repr`."""
        return (
            f"in1_features={self.in1_features}, in2_features={self.in2_features}, "
            f"out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
        )


class GatedFusion(FusionLayer):
    """Gated multimodal unit: each modality's hidden features, weighted by a gate that has seen all modalities.

    ``h = sum_m sigmoid(G_m @ [x_1, ..., x_M]) * tanh(W_m @ x_m)``; of two modalities the second's gate is one minus the
    first's, ``h = z * tanh(W_1 @ x_1) + (1 - z) * tanh(W_2 @ x_2)``.

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
    linears : torch.nn.ModuleList
        One ``Linear(input_dims[m], output_dim, bias=False)`` per modality.
    gate : torch.nn.Linear
        From all features to one gate per modality and output; of two modalities, to the first's.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer, or less than 1, or there are no or more than eight modalities.

    Notes
    -----
    A missing modality adds nothing, and its features count as 0 in the gates. Linear maps have no bias, as in the paper,
    and torch's initialisation: the paper searches the range of its own.

    References
    ----------
    J. Arevalo et al., "Gated Multimodal Units for Information Fusion", ICLR 2017 workshop, section 3.1.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import GatedFusion
    >>> fusion = GatedFusion(input_dims=(32, 16), output_dim=10)
    >>> fusion(torch.randn(8, 32), torch.randn(8, 16)).shape
    torch.Size([8, 10])
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
        gates = 1 if len(self.input_dims) == 2 else len(self.input_dims)
        self.linears = nn.ModuleList(
            nn.Linear(d, self.output_dim, bias=False, device=device, dtype=dtype) for d in self.input_dims
        )
        self.gate = nn.Linear(sum(self.input_dims), gates * self.output_dim, bias=False, device=device, dtype=dtype)

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        inputs = [x.expand(*leading, x.shape[-1]) for x in inputs]
        hidden = torch.stack([linear(x) for linear, x in zip(self.linears, inputs, strict=True)], dim=-2)
        gates = self.gate(torch.cat(inputs, dim=-1)).unflatten(-1, (-1, self.output_dim))
        if len(self.input_dims) == 2:
            gates = torch.cat([gates, -gates], dim=-2)  # 1 - sigmoid(a) = sigmoid(-a)
        # No masks: the features of a missing modality are 0 here, and so is tanh(W 0).
        return fusion_sum(None, gates, hidden, activations=["sigmoid", "tanh"], dim=-2)
