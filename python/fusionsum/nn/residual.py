"""A sum of linear maps, and on top of it a fusion sum of products: the pipeline's default.

What lives elsewhere: the sum alone (`LateFusion`, ``baselines.py``), products alone (``low_rank.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..api import fusion_sum
from .baselines import summed_scores
from .layer import FusionLayer
from .low_rank import multiplied_out

# Chosen on validation loss alone; docs/pipeline.md has the search. WEIGHT is that of a product at the start, SCALE the
# deviation of the projections it multiplies, for features of unit variance. DECAY is the weight decay of the linear maps.
WEIGHT, SCALE, DECAY = 0.25, 0.4, 10.0


class ResidualFusion(FusionLayer):
    """Linear maps of all modalities, added, plus a fusion sum of products of two modalities and more.

    ``h = sum_m (V_m @ x_m + b_m) + sum_i fusion_weights[i] * prod_m (W_m[i] @ x_m + c_m[i])``, i = 1..rank.

    Parameters
    ----------
    input_dims : sequence of int
        The number of features of each modality; one to eight modalities.
    output_dim : int
        The number of outputs.
    rank : int, optional
        The number of products.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    linears : torch.nn.ModuleList
        V and b: one ``Linear(input_dims[m], output_dim)`` per modality.
    factors : torch.nn.ModuleList
        W and c: one ``Linear(input_dims[m], rank * output_dim)`` per modality.
    fusion_weights : torch.nn.Parameter
        ``(rank, 1)``.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer, or less than 1, or there are no or more than eight modalities.

    Notes
    -----
    The layer is meant for features of mean 0 and variance 1, as `torch.nn.LayerNorm` makes them. Without a modality
    its linear map adds nothing, nor its b, and c alone is its factor in every product.

    The initialisation is ours. The sum starts as `LateFusion` does; products start small beside it, but with factors
    that can move. Term by term the biases c are 0 for the modalities of a pair, then of the next pair, of
    triples and so on, and 1 for all others: every order of interaction is there from the start, as far as `rank` goes.

    Ours too is the weight decay of `param_groups`. Where no sum helps, what V was drawn as is noise in the gradients of
    encoders, and hides those of the products: with V's decay the layer learns what without it it does not. Where a sum
    helps, it has done so before V has decayed.

    References
    ----------
    The form is that of a factorisation machine, S. Rendle, "Factorization Machines", ICDM 2010, eq. 1, of modalities in the
    place of variables; its product terms are those of Z. Liu et al., "Efficient Low-rank Multimodal Fusion with
    Modality-Specific Factors", ACL 2018, eq. 6. Weight decay apart from the loss: I. Loshchilov and F. Hutter, "Decoupled
    Weight Decay Regularization", ICLR 2019.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import ResidualFusion
    >>> fusion = ResidualFusion(input_dims=(32, 16), output_dim=10)
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
        rank: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dims, output_dim=output_dim, rank=rank)
        self.linears = nn.ModuleList(nn.Linear(d, self.output_dim, device=device, dtype=dtype) for d in self.input_dims)
        self.factors = nn.ModuleList(
            nn.Linear(d, self.rank * self.output_dim, device=device, dtype=dtype) for d in self.input_dims
        )
        self.fusion_weights = nn.Parameter(torch.empty(self.rank, 1, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the linear maps and the factors anew, and set all other parameters as the layer's notes say."""
        every = range(len(self.input_dims))
        sets = [chosen for size in every[1:] for chosen in itertools.combinations(every, size + 1)] or [(0,)]
        for m, (linear, factor) in enumerate(zip(self.linears, self.factors, strict=True)):
            linear.reset_parameters()
            nn.init.normal_(factor.weight, std=SCALE / math.sqrt(factor.in_features))
            for i, bias in enumerate(factor.bias.view(self.rank, self.output_dim)):
                bias.fill_(m not in sets[i % len(sets)])
        nn.init.constant_(self.fusion_weights, WEIGHT)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return groups for an optimiser with decoupled weight decay: the linear maps with their own, and all the rest.

        Examples
        --------
        >>> fusion = ResidualFusion(input_dims=(32, 16), output_dim=10)
        >>> optimizer = torch.optim.AdamW(fusion.param_groups(), lr=1e-3)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [10.0, 0.01]
        """
        rest = [*self.factors.parameters(), self.fusion_weights]
        return [{"params": list(self.linears.parameters()), "weight_decay": DECAY}, {"params": rest}]

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        summed = summed_scores(self.linears, inputs, present)
        factors = [
            factor(x).unflatten(-1, (self.rank, self.output_dim))
            for factor, x in zip(self.factors, inputs, strict=True)
        ]
        # No masks: features that are missing are 0 here, and c remains.
        return summed + fusion_sum(self.fusion_weights, *factors, dim=-2)

    def _parts(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> dict[tuple[int, ...], Tensor]:
        parts = multiplied_out(self.fusion_weights, self.factors, inputs, [None] * len(inputs))
        for m, (linear, x, mask) in enumerate(zip(self.linears, inputs, present, strict=True)):
            constant, whole = (summed_scores([linear], [z], [mask]).unsqueeze(-2) for z in (torch.zeros_like(x), x))
            parts[()] = torch.cat([parts[()], constant], dim=-2)
            parts[(m,)] = torch.cat([parts[(m,)], whole - constant], dim=-2)
        return parts
