"""Layers with a full core tensor: one weight for every combination of numbers, one from each modality.

What lives elsewhere: what all layers share (``layer.py``), the steps that `TuckerFusion` shares with pooling
(``pooling.py``), the same tensors constrained in rank (``low_rank.py``, ``pooling.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..api import fusion_sum
from .layer import FusionLayer
from .pooling import Like, Pooling


def contracted(core: nn.Linear, factors: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
    """Contract a core tensor, which maps the first factor to (..., O * n_2 * ... * n_M), with the other factors too."""
    z = core(factors[0])
    for x, mask in zip(factors[:0:-1], present[:0:-1], strict=True):
        z = fusion_sum(None, z.unflatten(-1, (-1, x.shape[-1])), x.unsqueeze(-2), present=[None, mask])
    return z


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
        self.core = nn.Linear(mm_dim, mm_dim ** len(self.input_dims), bias=False, **like)
        self.core_bias = nn.Parameter(torch.empty(mm_dim, **like))
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
        W as a map of the first modality: rows are (output, second, ...).
    bias : torch.nn.Parameter
        ``(output_dim,)``.

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
        first, *others = (d + 1 for d in self.input_dims)
        rows = output_dim * math.prod(others)
        self.core = nn.Linear(first, rows, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(output_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        bound = math.prod(d + 1 for d in self.input_dims) ** -0.5  # of a linear map of the whole outer product
        for parameter in (self.core.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        with_one = [nn.functional.pad(x, (1, 0), value=1.0) for x in inputs]
        return contracted(self.core, with_one, [None] * len(inputs)) + self.bias

    def _reference_shapes(self) -> dict[str, tuple[int, ...]]:
        outer = math.prod(d + 1 for d in self.input_dims)
        return {"post_fusion_layer_1.weight": (self.output_dim, outer), "post_fusion_layer_1.bias": (self.output_dim,)}

    def _from_reference(self, name: str, value: Tensor) -> dict[str, Tensor]:
        if name.endswith("bias"):
            return {"bias": value}
        return {"core.weight": value.unflatten(1, [d + 1 for d in self.input_dims]).movedim(1, -1).flatten(0, -2)}
