"""The two sides of scores for tensors: what the operations of losses and of search share.

What lives here: a side's product and the way from its gradient to those of its factors, both by a fusion sum over a single
term, and the records' common parts. What lives elsewhere: the operations (``losses.py``, ``search.py``), the order of their
arguments (``schema.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree

from .. import sides as plain_sides
from ..scores import Scores, Search
from ..sides import wide  # noqa: F401  (with the rest of what operations share)
from . import routing, vmap
from .registration import Operation, register

# Places among the fields of `Scores` and of `Search`, which begin alike.
QUERIES, KEYS, WEIGHTS, KEY_BIAS = (Search._fields.index(x) for x in ("queries", "keys", "fusion_weights", "key_bias"))


class Side(plain_sides.Side):
    """A side whose product autograd sees."""

    __slots__ = ()

    def product(self, dtype: torch.dtype) -> Tensor:
        """Form the product (rows, n), in a dtype to which its factors are widened first."""
        return self.formed(dtype, routing.fusion_sum)

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
    return plain_sides.sides(call, Side)


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
