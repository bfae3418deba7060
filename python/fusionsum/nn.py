"""Fusion layers: `torch.nn` modules whose fusion step is `fusion_sum`.

What lives here: parameters, their initialisation, and the learned projections, which belong to BLAS. What lives
elsewhere: the sum itself and the checks of its arguments (``api.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .api import fusion_sum
from .reference import MAX_FACTORS


class LowRankFusion(nn.Module):
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
        If a size is less than 1, or there are no or more than eight modalities.

    References
    ----------
    Z. Liu et al., "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors", ACL 2018, eq. 6-8. The fusion
    weights and the initialisation are those of the authors' published code.

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

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        rank: int,
        *,
        bias: bool = True,
        activations: str | Sequence[str | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= len(input_dims) <= MAX_FACTORS:
            raise ValueError(f"input_dims: expected 1 to {MAX_FACTORS} modalities, got {len(input_dims)}")
        sizes = {f"input_dims[{m}]": d for m, d in enumerate(input_dims)} | {"output_dim": output_dim, "rank": rank}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.input_dims = tuple(input_dims)
        self.output_dim = output_dim
        self.rank = rank
        self.activations = activations
        self.factors = nn.ModuleList(
            nn.Linear(d, rank * output_dim, device=device, dtype=dtype) for d in self.input_dims
        )
        self.fusion_weights = nn.Parameter(torch.empty(rank, 1, device=device, dtype=dtype))
        if bias:
            self.fusion_bias = nn.Parameter(torch.empty(output_dim, device=device, dtype=dtype))
        else:
            self.register_parameter("fusion_bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors and weights as the paper's code does, and set the bias to 0."""
        for d, linear in zip(self.input_dims, self.factors, strict=True):
            # What xavier_normal_ makes of the paper's (rank, d + 1, output_dim) tensor, its appended 1 included.
            std = math.sqrt(2 / ((d + 1 + self.rank) * self.output_dim))
            nn.init.normal_(linear.weight, std=std)
            nn.init.normal_(linear.bias, std=std)
        nn.init.xavier_normal_(self.fusion_weights)
        if self.fusion_bias is not None:
            nn.init.zeros_(self.fusion_bias)

    def forward(self, *inputs: Tensor, present: Sequence[Tensor | None] | None = None) -> Tensor:
        """Fuse one tensor per modality.

        Parameters
        ----------
        *inputs : torch.Tensor
            One per modality, ``(..., input_dims[m])``; the leading dims broadcast.
        present : None or sequence of (None or bool torch.Tensor), optional
            One mask per modality, of its leading dims. Where it is False the modality is missing: its features are
            never used (they may be NaN), its projection counts as 1, and its gradients are exactly 0.

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
        self._check_count("inputs", inputs)
        if present is not None:
            self._check_count("present", present)
            inputs = tuple(map(self._blank, range(len(inputs)), inputs, present))
        factors = []
        for m, (x, linear) in enumerate(zip(inputs, self.factors, strict=True)):
            if x.shape[-1:] != (linear.in_features,):
                raise ValueError(f"inputs[{m}]: expected shape (..., {linear.in_features}), got {tuple(x.shape)}")
            factors.append(linear(x).unflatten(-1, (self.rank, self.output_dim)))
        fused = fusion_sum(self.fusion_weights, *factors, activations=self.activations, present=present, dim=-2)
        return fused if self.fusion_bias is None else fused + self.fusion_bias

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

    def extra_repr(self) -> str:
        """Name the sizes in `repr`."""
        return (
            f"input_dims={self.input_dims}, output_dim={self.output_dim}, rank={self.rank}, "
            f"bias={self.fusion_bias is not None}, activations={self.activations!r}"
        )
