"""The two sides of the scores of tensors: their factors, and the fusion sum that is a side's product.

What lives here: what needs no autograd. What lives elsewhere: a side that autograd sees (``autograd/sides.py``); sums that
split in two (``split.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .call import Call
from .scores import Scores, Search


class Side(NamedTuple):
    """One of the two products: factors (rows, n), weights or None, and per factor an activation and a mask, or None."""

    fusion_weights: Any
    factors: Sequence[Any]
    activations: Sequence[Any]
    present: Sequence[Any]
    absent: str

    def is_a_factor(self) -> bool:
        """Tell whether the product is its only factor."""
        single = self.fusion_weights is None and len(self.factors) == 1
        return single and self.activations[0] is None and self.present[0] is None

    def call(self) -> Call:
        """Return the fusion sum, over a dim of size 1, that is the product."""
        weights, *factors = [x if x is None else x.unsqueeze(-1) for x in (self.fusion_weights, *self.factors)]
        return Call(weights, tuple(factors), tuple(self.activations), tuple(self.present), self.absent, -1)

    def formed(self, dtype: torch.dtype, fusion_sum: Callable[..., Tensor]) -> Tensor:
        """Form the product (rows, n) by a function of a call's fields, the factors widened to a dtype first."""
        widened = self._replace(factors=[x.to(dtype) for x in self.factors])
        return widened.factors[0] if self.is_a_factor() else fusion_sum(*widened.call())


def sides(call: Scores | Search, kind: Any = Side) -> tuple[Any, Any]:
    """Return the queries' side, which has the weights, and the keys', of `Side` or of another kind."""
    of_queries = kind(call.fusion_weights, call.queries, call.activations, call.present, call.absent)
    return of_queries, kind(None, call.keys, call.key_activations, call.key_present, call.absent)


def wide(call: Scores | Search) -> torch.dtype:
    """Return the dtype in which scores are formed."""
    given = (*call.operands, *([] if call.key_bias is None else [call.key_bias]))
    return getattr(torch, reference.accumulator(given))
