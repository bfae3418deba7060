"""Bilinear pooling: modalities mapped, multiplied and summed over few terms, normalised, and mapped once more.

What lives here: `MLB`, whose docstring describes the arguments of all, and its successors, each by its equation. What
lives elsewhere: what all layers share (``layer.py``); `TuckerFusion`, which has a full core (``tensor.py``); `LinearSum`,
which adds (``baselines.py``).

All follow R. Cadene's implementation, github.com/Cadene/block.bootstrap.pytorch: its names, its defaults, and torch's
own initialisation; there they take two modalities, here one to eight. Dropout of every factor and of their product drops
terms as one dropout at the joint rate does: fusion weights of 0 or ``1 / keep``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..api import fusion_sum
from .checks import as_activation, as_choice, as_rate, as_size
from .layer import FusionLayer, activated, mapped_twice, product


class Like(TypedDict):
    """Where parameters are made."""

    device: torch.device | str | None
    dtype: torch.dtype | None


def normalized(z: Tensor) -> Tensor:
    """Take signed square roots, then make each row of unit length: ``sign(z) * sqrt(|z|) / max(sqrt(sum |z|), 1e-12)``.

    At 0 all derivatives are 0, of a number and of a row of zeros: the first as in the original, where those of higher
    order and of forward mode are NaN. Square roots are taken of 1 there, which no derivative passes. Elsewhere they are
    the formula's; the second, ``-|z|**-1.5 / 4``, overflows float32 below 1e-25.
    """
    size = z.abs()
    total = size.sum(-1, keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32))
    roots = z.detach().sign() * size.masked_fill(size == 0, 1).sqrt()
    length = total.masked_fill(total == 0, 1).sqrt().clamp_min(1e-12)  # as torch.nn.functional.normalize
    return roots / length.to(z.dtype)


def linears_of(dims: Sequence[int], width: int, shared: bool, like: Like) -> nn.ModuleList:
    """Make one linear map per modality, or one for all."""
    if shared:
        return nn.ModuleList([nn.Linear(dims[0], width, **like)] * len(dims))
    return nn.ModuleList(nn.Linear(d, width, **like) for d in dims)


def chunk_sizes(dim: int, chunks: int) -> list[int]:
    """Cut `dim` numbers into parts as block.bootstrap.pytorch does; the last may be empty, as for 24 numbers in 7 parts.

    All parts are ``ceil(dim / chunks)`` long and the last is what remains. Where less than nothing would remain, all are
    that long but the last parts, which are 1 shorter each.

    Raises
    ------
    ValueError
        If there are so many parts that more than one would be empty.
    """
    if chunks > dim + 1:
        raise ValueError(f"chunks: expected at most mm_dim + 1, {dim + 1}, got {chunks}")
    size = -(-dim // chunks)
    surplus = chunks * size - dim
    if surplus <= size:
        return [size] * (chunks - 1) + [size - surplus]
    return [size] * (chunks - surplus) + [size - 1] * surplus


class Pooling(FusionLayer):
    """The maps and the order of steps that the family shares; a subclass computes the pooled vector in `_pool`."""

    dropout_pre_norm = 0.0

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int,
        like: Like,
        *,
        terms: int = 1,
        stages: int = 1,
        shared: bool = False,
        activ_input: str | None = None,
        activ_output: str | None = None,
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
    ) -> None:
        super().__init__(input_dims, output_dim=output_dim, mm_dim=mm_dim)
        self.activ_input = as_activation("activ_input", activ_input)
        self.activ_output = as_activation("activ_output", activ_output)
        self.dropout_input = as_rate("dropout_input", dropout_input)
        self.dropout_pre_lin = as_rate("dropout_pre_lin", dropout_pre_lin)
        self.dropout_output = as_rate("dropout_output", dropout_output)
        if shared and len(set(self.input_dims)) > 1:
            raise ValueError(f"shared: expected input_dims of one size, got {self.input_dims}")
        self.shared, self.normalize, self._terms = shared, normalize, terms
        self.linears = linears_of(self.input_dims, terms * self.mm_dim, shared, like)
        self.linear_out = nn.Linear(stages * self.mm_dim, self.output_dim, **like)

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        z = activated(self.activ_output, self.linear_out(self._pool(inputs, present)))
        return dropout(z, self.dropout_output, self.training)

    def _pool(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        factors = self._factors(self.linears, inputs)
        weights = self._thinned(factors, *[self.dropout_input] * len(factors), self.dropout_pre_norm)
        return self._finished(fusion_sum(weights, *factors, activations=self.activ_input, present=present, dim=-2))

    def _factors(self, linears: nn.ModuleList, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map each input to (..., terms, mm_dim): terms are summed fastest when they are not the last axis."""
        return [linear(x).unflatten(-1, (-1, self.mm_dim)) for linear, x in zip(linears, inputs, strict=True)]

    def _mapped(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Map each input to (..., mm_dim), with dropout."""
        mapped = (linear(x) for linear, x in zip(self.linears, inputs, strict=True))
        return [dropout(x, self.dropout_input, self.training) for x in mapped]

    def _thinned(self, factors: Sequence[Tensor], *rates: float) -> Tensor | None:
        """Return weights that drop terms as dropout at each of the rates would, one after the other."""
        keep = math.prod([1 - rate for rate in rates])  # a list: torch.compile takes no generator here
        if keep == 1 or not self.training:
            return None
        return dropout(factors[0].new_ones(torch.broadcast_shapes(*(z.shape for z in factors))), 1 - keep)

    def _finished(self, z: Tensor) -> Tensor:
        return dropout(normalized(z) if self.normalize else z, self.dropout_pre_lin, self.training)

    def _reference_names(self) -> dict[str, str]:
        return {f"linear{m}": f"linears.{m}" for m in range(len(self.linears))} | {"linear_out": "linear_out"}

    def _from_reference(self, name: str, value: Tensor) -> dict[str, Tensor]:
        if self._terms > 1 and not name.startswith("linear_out"):
            value = value.unflatten(0, (self.mm_dim, self._terms)).transpose(0, 1).flatten(0, 1)
        return super()._from_reference(name, value)


class MLB(Pooling):
    """Multimodal low-rank bilinear pooling: one product of all modalities, mapped to the output.

    ``y = activ_output(W_out @ prod_m activ_input(W_m @ x_m + b_m) + b_out)``: a bilinear map of rank `mm_dim`.

    Parameters
    ----------
    input_dims : sequence of int
        The number of features of each modality; one to eight modalities.
    output_dim : int
        The number of outputs.
    mm_dim : int, optional
        The size of the space in which modalities meet.
    activ_input, activ_output : str or None, optional
        The activation of each mapped modality, inside the sum, and of the output; as in `fusionsum.fusion_sum`.
    normalize : bool, optional
        Whether to take signed square roots of the pooled vector and divide it by its length.
    dropout_input, dropout_pre_lin, dropout_output : float, optional
        Rates of dropout in training: of each mapped modality, of the pooled vector, of the output.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    linears : torch.nn.ModuleList
        One linear map per modality; the original's ``linear0`` and ``linear1``.
    linear_out : torch.nn.Linear
        From the pooled vector to the output.

    Raises
    ------
    TypeError
        If a size is not an integer.
    ValueError
        If a size is less than 1, a rate not from 0 to 1, an activation unknown, or there are no or more than eight
        modalities.

    Notes
    -----
    Where a modality is missing its factor in the product counts as 1.

    References
    ----------
    J.-H. Kim et al., "Hadamard Product for Low-rank Bilinear Pooling", ICLR 2017, eq. 3 and 5.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import MLB
    >>> fusion = MLB(input_dims=(32, 16), output_dim=10, mm_dim=24, activ_input="tanh")
    >>> image, text = torch.randn(8, 32), torch.randn(8, 16)
    >>> fusion(image, text).shape
    torch.Size([8, 10])
    >>> regions = torch.randn(8, 36, 32)  # leading dims broadcast: one question, mapped once, for 36 regions
    >>> fusion(regions, text.unsqueeze(1)).shape
    torch.Size([8, 36, 10])
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1200,
        activ_input: str | None = "relu",
        activ_output: str | None = "relu",
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            Like(device=device, dtype=dtype),
            activ_input=activ_input,
            activ_output=activ_output,
            normalize=normalize,
            dropout_input=dropout_input,
            dropout_pre_lin=dropout_pre_lin,
            dropout_output=dropout_output,
        )


class MFB(Pooling):
    """Multimodal factorised bilinear pooling: `factor` products for each pooled number, summed.

    ``z[k] = sum_f prod_m activ_input(W_m[f, k] @ x_m + b_m[f, k])``, f = 1..factor; then as `MLB`.

    Parameters
    ----------
    factor : int, optional
        The number of terms.
    dropout_pre_norm : float, optional
        The rate of dropout, in training, of the products before they are summed.
    input_dims, output_dim, mm_dim, activ_input, activ_output, normalize, dropout_input, dropout_output, device, dtype
        As for `MLB`.

    Raises
    ------
    TypeError, ValueError
        As for `MLB`.

    Notes
    -----
    Where a modality is missing its factor in the products counts as 1. Rows of the maps are ordered (factor, mm_dim), not
    (mm_dim, factor) as in the original, so that the sum runs over whole vectors; `load_reference_state_dict` reorders.

    References
    ----------
    Z. Yu et al., "Multi-modal Factorized Bilinear Pooling with Co-attention Learning for Visual Question Answering", ICCV
    2017, eq. 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import MFB
    >>> fusion = MFB(input_dims=(32, 16), output_dim=10, mm_dim=24, factor=5, normalize=True)
    >>> fusion(torch.randn(8, 32), torch.randn(8, 16)).shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1200,
        factor: int = 2,
        activ_input: str | None = "relu",
        activ_output: str | None = "relu",
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_norm: float = 0.0,
        dropout_output: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factor = as_size("factor", factor)
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            Like(device=device, dtype=dtype),
            terms=factor,
            activ_input=activ_input,
            activ_output=activ_output,
            normalize=normalize,
            dropout_input=dropout_input,
            dropout_output=dropout_output,
        )
        self.factor, self.dropout_pre_norm = factor, as_rate("dropout_pre_norm", dropout_pre_norm)


class MFH(Pooling):
    """Multimodal factorised high-order pooling: two stages of `MFB`, the second's products times the first's.

    ``p = prod_m activ_input(U_m @ x_m)``, ``q = p * prod_m activ_input(V_m @ x_m)``, each summed over `factor` terms,
    normalised, and both together mapped to the output; biases are left out here.

    Parameters
    ----------
    dropout_pre_lin : float, optional
        The rate of dropout, in training, of p and of q before they are summed.
    input_dims, output_dim, mm_dim, activ_input, activ_output, normalize, dropout_input, dropout_output, device, dtype
        As for `MLB`.
    factor : int, optional
        As for `MFB`.

    Raises
    ------
    TypeError, ValueError
        As for `MLB`.

    Notes
    -----
    Where a modality is missing its factors in the products count as 1. `linears` and `second_linears` are the original's
    ``linear0_0``, ``linear1_0`` and ``linear0_1``, ``linear1_1``, with rows ordered as those of `MFB`.

    References
    ----------
    Z. Yu et al., "Beyond Bilinear: Generalized Multi-modal Factorized High-order Pooling for Visual Question Answering",
    IEEE TNNLS 29(12), 2018, eq. 7 to 10.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import MFH
    >>> fusion = MFH(input_dims=(32, 16), output_dim=10, mm_dim=24, factor=5, normalize=True)
    >>> fusion(torch.randn(8, 32), torch.randn(8, 16)).shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1200,
        factor: int = 2,
        activ_input: str | None = "relu",
        activ_output: str | None = "relu",
        normalize: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factor = as_size("factor", factor)
        like = Like(device=device, dtype=dtype)
        super().__init__(
            input_dims,
            output_dim,
            mm_dim,
            like,
            terms=factor,
            stages=2,
            activ_input=activ_input,
            activ_output=activ_output,
            normalize=normalize,
            dropout_input=dropout_input,
            dropout_pre_lin=dropout_pre_lin,
            dropout_output=dropout_output,
        )
        self.factor = factor
        self.second_linears = linears_of(self.input_dims, factor * self.mm_dim, False, like)

    def _pool(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        first, second = self._factors(self.linears, inputs), self._factors(self.second_linears, inputs)
        rates = [self.dropout_input] * len(first)
        thinned = self._thinned(first, *rates, self.dropout_pre_lin)
        weights = None if thinned is None else thinned.unsqueeze(-2)
        skip = product(first, activations=self.activ_input, present=present, weights=weights)
        thinned = self._thinned(second, *rates, self.dropout_pre_lin)
        weights = skip if thinned is None else skip * thinned
        stages = (skip.sum(-2), fusion_sum(weights, *second, activations=self.activ_input, present=present, dim=-2))
        return torch.cat([normalized(z) if self.normalize else z for z in stages], dim=-1)

    def _reference_names(self) -> dict[str, str]:
        stages = {"0": "linears", "1": "second_linears"}
        names = {f"linear{m}_{s}": f"{own}.{m}" for s, own in stages.items() for m in range(len(self.linears))}
        return names | {"linear_out": "linear_out"}


class MUTAN(Pooling):
    """Multimodal Tucker fusion: a Tucker decomposition whose core is a sum of `rank` products in each slice.

    ``z = sum_r prod_m (M_m[r] @ (W_m @ x_m))``, r = 1..rank, with z of `mm_dim` numbers; ``y = W_out @ z``; every map has
    its bias.

    Parameters
    ----------
    rank : int, optional
        The number of terms.
    shared : bool, optional
        Whether all modalities, then of one size, have the same maps.
    input_dims, output_dim, mm_dim, normalize, dropout_input, dropout_pre_lin, dropout_output, device, dtype
        As for `MLB`; `dropout_input` is between the two maps.

    Raises
    ------
    TypeError, ValueError
        As for `MLB`; also if `shared` is true and `input_dims` differ.

    Notes
    -----
    Where a modality is missing its factor in the products counts as 1. `merge_linears` are the original's
    ``merge_linear0`` and ``merge_linear1``.

    References
    ----------
    H. Ben-younes et al., "MUTAN: Multimodal Tucker Fusion for Visual Question Answering", ICCV 2017, eq. 6 to 8.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import MUTAN
    >>> fusion = MUTAN(input_dims=(32, 16), output_dim=10, mm_dim=24, rank=5)
    >>> fusion(torch.randn(8, 32), torch.randn(8, 16)).shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1600,
        rank: int = 15,
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
        self.rank = as_size("rank", rank)
        self.merge_linears = linears_of([self.mm_dim] * len(self.input_dims), self.rank * self.mm_dim, shared, like)

    def _pool(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        if self.training and self.dropout_input > 0:
            factors = self._factors(self.merge_linears, self._mapped(inputs))
        else:
            maps = zip(inputs, self.linears, self.merge_linears, strict=True)
            factors = [mapped_twice(*each).unflatten(-1, (self.rank, self.mm_dim)) for each in maps]
        return self._finished(fusion_sum(None, *factors, present=present, dim=-2))

    def _reference_names(self) -> dict[str, str]:
        merges = {f"merge_linear{m}": f"merge_linears.{m}" for m in range(len(self.merge_linears))}
        return super()._reference_names() | merges


class BLOCK(Pooling):
    """Block-superdiagonal fusion: `MUTAN` in each of `chunks` parts of the space in which modalities meet.

    ``z_c = sum_r prod_m (M_mc[r] @ (W_m @ x_m)_c)`` for the parts c of ``W_m @ x_m``; the z_c, normalised each or together,
    are joined and mapped to the output; every map has its bias.

    Parameters
    ----------
    chunks : int, optional
        The number of parts, of `mm_dim` numbers together; where it does not divide `mm_dim`, `chunk_sizes` has the
        original's rule, and torch may warn of an empty part.
    rank : int, optional
        The number of terms in each part.
    pos_norm : {"before_cat", "after_cat"}, optional
        Whether each part is normalised, as `MLB` does it, or all together.
    input_dims, output_dim, mm_dim, dropout_input, dropout_pre_lin, dropout_output, device, dtype
        As for `MLB`; `dropout_input` is between the two maps.
    shared : bool, optional
        As for `MUTAN`.

    Raises
    ------
    TypeError, ValueError
        As for `MUTAN`; also if `chunks` exceeds ``mm_dim + 1``, or `pos_norm` is unknown.

    Notes
    -----
    Where a modality is missing its factor in the products counts as 1. ``merge_linears[m][c]`` is the original's
    ``merge_linears0[c]``, ``merge_linears1[c]``.

    References
    ----------
    H. Ben-younes et al., "BLOCK: Bilinear Superdiagonal Fusion for Visual Question Answering and Visual Relationship
    Detection", AAAI 2019, eq. 5 to 9.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import BLOCK
    >>> fusion = BLOCK(input_dims=(32, 16), output_dim=10, mm_dim=24, chunks=4, rank=5)
    >>> fusion(torch.randn(8, 32), torch.randn(8, 16)).shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        mm_dim: int = 1600,
        chunks: int = 20,
        rank: int = 15,
        shared: bool = False,
        dropout_input: float = 0.0,
        dropout_pre_lin: float = 0.0,
        dropout_output: float = 0.0,
        pos_norm: str = "before_cat",
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
            normalize=True,
            dropout_input=dropout_input,
            dropout_pre_lin=dropout_pre_lin,
            dropout_output=dropout_output,
        )
        self.chunks, self.rank = as_size("chunks", chunks), as_size("rank", rank)
        self.pos_norm = as_choice("pos_norm", pos_norm, ("before_cat", "after_cat"))
        self.sizes = chunk_sizes(self.mm_dim, self.chunks)

        def merges() -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(n, n * self.rank, **like) for n in self.sizes)

        count = len(self.input_dims)
        self.merge_linears = nn.ModuleList([merges()] * count if shared else [merges() for _ in range(count)])

    def _pool(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        parts = zip(*(x.split(self.sizes, dim=-1) for x in self._mapped(inputs)), strict=True)
        pooled = []
        for xs, linears in zip(parts, zip(*self.merge_linears, strict=True), strict=True):
            factors = [linear(x).unflatten(-1, (self.rank, x.shape[-1])) for linear, x in zip(linears, xs, strict=True)]
            z = fusion_sum(None, *factors, present=present, dim=-2)
            pooled.append(normalized(z) if self.pos_norm == "before_cat" else z)
        z = torch.cat(pooled, dim=-1)
        z = normalized(z) if self.pos_norm == "after_cat" else z
        return dropout(z, self.dropout_pre_lin, self.training)

    def _reference_names(self) -> dict[str, str]:
        merges = {f"merge_linears{m}": f"merge_linears.{m}" for m in range(len(self.merge_linears))}
        return super()._reference_names() | merges
