"""The two sides of scores for tensors: what the operations of losses and of search share.

What lives here: a side's product and the way from its gradient to those of its factors, both by a fusion sum over a single
term, and the records' common parts. What lives elsewhere: the operations (``losses.py``, ``search.py``), the order of their
arguments (``schema.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree

from .. import chunks, reference
from ..call import Call
from ..scores import Scores, Search
from . import routing, vmap
from .registration import Operation, register

# Places among the fields of `Scores` and of `Search`, which begin alike.
QUERIES, KEYS, WEIGHTS, KEY_BIAS = (Search._fields.index(x) for x in ("queries", "keys", "fusion_weights", "key_bias"))


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

    def product(self, dtype: torch.dtype) -> Tensor:
        """Form the product (rows, n), in a dtype to which its factors are widened first."""
        widened = self._replace(factors=[x.to(dtype) for x in self.factors])
        return widened.factors[0] if self.is_a_factor() else routing.fusion_sum(*widened.call())

    def grads(self, d_product: Any, needs: Sequence[bool]) -> list[Any]:
        """Gradients of the weights and of each factor, where needed, from that of the product."""
        if d_product is None or not any(needs):
            return [None] * len(needs)
        if self.is_a_factor():
            return [None, d_product.to(self.factors[0].dtype)]
        found = routing.fusion_sum_grad(d_product, *self.call(), needs)
        return [d if d is None else d.squeeze(-1) for d in found]


def sides(call: Scores | Search) -> tuple[Side, Side]:
    """Return the queries' side, which has the weights, and the keys'."""
    of_queries = Side(call.fusion_weights, call.queries, call.activations, call.present, call.absent)
    return of_queries, Side(None, call.keys, call.key_activations, call.key_present, call.absent)


def arrays(call: Scores | Search) -> tuple[Any, ...]:
    """Return the tensors of a call and what may stand for one: None, a number, arrays of integers."""
    return *call.queries, *call.keys, *call.present, *call.key_present, *call[WEIGHTS:]


def with_arrays(call: Any, given: Sequence[Any]) -> Any:
    """Return the call with these in the places of its `arrays`."""
    given, queries = tuple(given), len(call.queries)
    factors = queries + len(call.keys)
    of_sides = given[:queries], given[queries:factors]
    masks = given[factors : factors + queries], given[factors + queries : 2 * factors]
    names = call.activations, call.key_activations
    return type(call)(*of_sides, *names, *masks, call.absent, *given[2 * factors :])


def requiring(call: Any) -> Any:
    """Return the call with, in the places of its `arrays`, whether they are tensors that require a gradient."""
    return with_arrays(call, [isinstance(x, Tensor) and x.requires_grad for x in arrays(call)])


def wide(call: Scores | Search) -> torch.dtype:
    """Return the dtype in which scores are formed."""
    given = (*call.operands, *([] if call.key_bias is None else [call.key_bias]))
    return getattr(torch, reference.accumulator(given))


def plain(given: Sequence[Any]) -> list[Any]:
    """Return the inputs of an operation with subclasses of tensors as the tensors they are, and none that records."""
    return _pytree.tree_map_only(Tensor, lambda x: x.detach().as_subclass(Tensor), list(given))


def once(function: str, *given: Any) -> NoReturn:
    """Raise the error of what has first derivatives in reverse mode only."""
    raise NotImplementedError(
        f"{function}: has first derivatives in reverse mode only, got a call for a second derivative or for forward mode; "
        "torch's own operations on the scores of fusion_sum have these"
    )


def record(name: str, function: str, **fields: Any) -> None:
    """Register an operation that maps item by item, and of which every derivative is an error but those given."""
    lacking = functools.partial(once, function)
    mapped = functools.partial(vmap.one_by_one, name)
    register(Operation(name=name, jvp=lacking, vmap=mapped, **{"backward": lacking, **fields}))


chunks.sides_of, chunks.wide_of = sides, wide
