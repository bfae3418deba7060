"""What a fusion layer has to beat: fusion without a product.

What lives elsewhere: what all layers share (``layer.py``), the steps that `LinearSum` shares with pooling
(``pooling.py``), the baseline that is all products (``tensor.py``).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from .checks import as_activation, as_rate, as_sizes
from .layer import FusionLayer, activated, product
from .pooling import MLB


class ConcatMLP(FusionLayer):
    """A multilayer perceptron on the features of all modalities, joined.

    ``y = W_L @ phi(... phi(W_1 @ [x_1, ..., x_M] + b_1) ...) + b_L``.

    Parameters
    ----------
    input_dims : sequence of int
        The number of features of each modality; one to eight modalities.
    output_dim : int
        The number of outputs.
    dimensions : sequence of int, optional
        The sizes of the hidden layers.
    activation : str or None, optional
        The activation phi.
    dropout : float, optional
        The rate of dropout, in training, of hidden layers.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Raises
    ------
    TypeError
        If a size is not an integer.
    ValueError
        If a size is less than 1, a rate not from 0 to 1, an activation unknown, or there are no or more than eight
        modalities.

    Notes
    -----
    A missing modality's features count as 0. `linears` are the original's ``mlp.linears``.

    References
    ----------
    R. Cadene, github.com/Cadene/block.bootstrap.pytorch, with its defaults and torch's own initialisation.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import ConcatMLP
    >>> fusion = ConcatMLP(input_dims=(32, 16), output_dim=10, dimensions=(24,))
    >>> fusion(torch.randn(8, 32), torch.randn(8, 16)).shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        dimensions: Sequence[int] = (500, 500),
        activation: str | None = "relu",
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dims, output_dim=output_dim)
        self.dimensions = as_sizes("dimensions", dimensions)
        self.activation, self.dropout = as_activation("activation", activation), as_rate("dropout", dropout)
        sizes = [sum(self.input_dims), *self.dimensions, self.output_dim]
        self.linears = nn.ModuleList(
            nn.Linear(before, after, device=device, dtype=dtype) for before, after in itertools.pairwise(sizes)
        )

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        z = torch.cat([x.expand(*leading, x.shape[-1]) for x in inputs], dim=-1)
        *hidden, last = self.linears
        for linear in hidden:
            z = dropout(activated(self.activation, linear(z)), self.dropout, self.training)
        return last(z)

    def _reference_names(self) -> dict[str, str]:
        return {"mlp.linears": "linears"}


class LinearSum(MLB):
    """`MLB` with a sum in the place of its product.

    ``y = activ_output(W_out @ sum_m activ_input(W_m @ x_m + b_m) + b_out)``. All arguments, attributes and errors are those
    of `MLB`, and the original's parameters are named as there.

    Notes
    -----
    A missing modality adds nothing.

    References
    ----------
    R. Cadene, github.com/Cadene/block.bootstrap.pytorch, with its defaults and torch's own initialisation.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import LinearSum
    >>> fusion = LinearSum(input_dims=(32, 16), output_dim=10, mm_dim=24)
    >>> fusion(torch.randn(8, 32), torch.randn(8, 16)).shape
    torch.Size([8, 10])
    """

    def _pool(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        summands = (
            product([linear(x)], activations=self.activ_input, present=[mask], absent="zero")
            for linear, x, mask in zip(self.linears, inputs, present, strict=True)
        )
        dropped = (dropout(z, self.dropout_input, self.training) for z in summands)
        return self._finished(functools.reduce(operator.add, dropped))


def summed_scores(linears: Iterable[nn.Module], inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
    """Map each modality by its own linear map and add; one that is missing adds nothing, not even a bias."""
    scores = (
        product([linear(x)], present=[mask], absent="zero")
        for linear, x, mask in zip(linears, inputs, present, strict=True)
    )
    return functools.reduce(operator.add, scores)


class LateFusion(FusionLayer):
    """Each modality scores alone, and the scores are added.

    ``y = sum_m (W_m @ x_m + b_m)``.

    Parameters
    ----------
    input_dims : sequence of int
        The number of features of each modality; one to eight modalities.
    output_dim : int
        The number of scores.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer, or less than 1, or there are no or more than eight modalities.

    Notes
    -----
    A missing modality adds nothing. Maps are initialised as torch initialises them.

    References
    ----------
    T. Baltrušaitis et al., "Multimodal Machine Learning: A Survey and Taxonomy", IEEE TPAMI 41(2), 2019, section 6.1.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import LateFusion
    >>> fusion = LateFusion(input_dims=(32, 16), output_dim=10)
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
        self.linears = nn.ModuleList(nn.Linear(d, self.output_dim, device=device, dtype=dtype) for d in self.input_dims)

    def _fuse(self, inputs: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        return summed_scores(self.linears, inputs, present)
