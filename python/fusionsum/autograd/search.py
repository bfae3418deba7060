"""Search over scores for tensors: the best keys of each query, and ranks, as registered operations.

What lives here: the operations ``top_k`` and ``ranks``, a record each, and the gradient of the values of ``top_k``, that of
a fusion sum over the keys found, some queries at a time. What lives elsewhere: the checks (``scores.py``), the ranks from
the counts (``combination.py``), the kernels (``tensors.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import tensors
from ..call import on_gpu
from ..combination import combine_ranks
from ..scores import Search
from . import dtensor, routing, schema
from .registration import apply
from .sides import KEY_BIAS, KEYS, QUERIES, WEIGHTS, arrays, plain, record, sides, wide, with_arrays

MOST_GATHERED = 2**20  # entries of keys that the gradient of the values gathers at a time


def top_k(search: Search, k: int) -> tuple[Tensor, Tensor]:
    """Evaluate `search.top_k` for tensors; takes a checked search."""
    found = [x for x in arrays(search) if isinstance(x, Tensor)]
    if not routing.is_plain(found):
        dtensor.refuse("top_k", found)
        values, indices = apply("top_k", *schema.side_arguments(search), k)
    elif routing.records(found):
        values, indices = recorded(_Here, search, k)
    else:
        values, indices = tensors.top_k(search, k)
    return values, indices


def ranks(search: Search, targets: Tensor, ties: str) -> Tensor:
    """Evaluate `search.ranks` for tensors; takes checked arguments."""
    if _is_direct(search, targets):
        counts = tensors.ranks(search, targets)
    else:
        dtensor.refuse("ranks", (*arrays(search), targets))
        counts = apply("ranks", *schema.side_arguments(search), targets)
    greater, equal = counts.double() if ties == "mean" else counts  # torch divides integers in float32
    return combine_ranks(greater, equal, ties)


def _is_direct(search: Search, *more: Tensor) -> bool:
    given = [x for x in (*arrays(search), *more) if isinstance(x, Tensor)]
    return routing.is_plain(given) and not routing.records(given)


# ---- top_k -----------------------------------------------------------------------------------------------------------


def _top_k_kernel(*given: Any) -> list[Tensor]:
    *of_search, k = given
    return tensors.top_k(schema.search_of(plain(of_search)), k)


def _top_k_fake(*given: Any) -> list[Tensor]:
    *of_search, k = given
    search = schema.search_of(of_search)
    like = search.queries[0]
    shape = like.shape[0], k
    return [like.new_empty(shape, dtype=wide(search)), like.new_empty(shape, dtype=torch.int64)]


def _top_k_backward(grads: Any, needs: Sequence[Any], *rest: Any) -> tuple[Any, ...]:
    *of_search, _, (indices,) = rest
    return *_Here.gradients(grads[0], needs, schema.search_of(of_search), indices), None


class _Here:
    """A search among the keys of this process."""

    @staticmethod
    def top_k(search: Search, k: int) -> list[Tensor]:
        # Looked up when called: torch's import may come in the middle of that of `tensors`.
        return tensors.top_k(search, k)

    @staticmethod
    def gradients(grad: Tensor, needs: Sequence[Any], search: Search, indices: Tensor) -> list[Any]:
        """Gradients of the fields of a search, as `needs` has them, from that of the values."""
        queries, _ = sides(search)
        some_lack = search.exclude is not None or search.excluded_offsets is not None
        d_product, d_keys, d_bias = of_found(search, grad, indices, queries.product(grad.dtype), needs, some_lack)
        return fields_of(search, needs, d_product, d_keys, d_bias)


def fields_of(search: Search, needs: Sequence[Any], d_product: Any, d_keys: Any, d_bias: Any) -> list[Any]:
    """Gradients of the fields of a search, from that of the queries' product, those of the keys' factors and the bias."""
    found: list[Any] = [None] * len(search)
    found[WEIGHTS], *found[QUERIES] = sides(search)[0].grads(d_product, [needs[WEIGHTS], *needs[QUERIES]])
    found[KEYS] = [d if d is None else d.to(x.dtype) for d, x in zip(d_keys, search.keys, strict=True)]
    found[KEY_BIAS] = d_bias if d_bias is None else d_bias.to(search.key_bias.dtype)
    return found


def of_found(
    search: Search, grad: Tensor, indices: Tensor, of_queries: Tensor, needs: Sequence[Any], some_lack: bool
) -> tuple[Any, list[Any], Any]:
    """Gradients, widened, of the queries' product (B, n), the keys' factors and their bias, from that of the values.

    The values are fusion sums of each query and the keys found, which are gathered by their indices.
    Those of some queries at a time. What one key gets is added up in the order of the queries.
    `some_lack` says that indices may be negative: there is no key, and the value is constant.
    """
    _, keys = sides(search)
    of_queries = of_queries.unsqueeze(1)
    wanted = any(needs[QUERIES]) or needs[WEIGHTS], any(needs[KEYS])
    d_queries, d_keys, d_bias = [], [None] * len(keys.factors), None
    rows, k = indices.shape
    for some in _chunks(rows, k, of_queries.shape[-1]):
        given = keys, grad[some], indices[some], of_queries[some]
        flat, of_values, of_rows, of_factors = _of_some(*given, (*wanted, needs[KEYS]), some_lack)
        d_queries.append(of_rows)
        d_keys = [_added(to, flat, d, x) for to, d, x in zip(d_keys, of_factors, keys.factors, strict=True)]
        if needs[KEY_BIAS]:
            d_bias = _added(d_bias, flat, of_values, search.key_bias)

    d_product = None if not wanted[0] else d_queries[0] if len(d_queries) == 1 else torch.cat(d_queries)
    return d_product, d_keys, d_bias


def _chunks(rows: Any, k: Any, terms: Any) -> list[slice]:
    """Cut queries so that the keys found of a chunk have about `MOST_GATHERED` entries; a compiler gets one chunk."""
    if is_compiling() or not all(type(n) is int for n in (rows, k, terms)) or rows * k * terms <= MOST_GATHERED:
        return [slice(None)]
    step = max(1, MOST_GATHERED // (k * terms))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _of_some(keys: Any, grad: Tensor, indices: Tensor, of_queries: Tensor, wanted: Any, some_lack: bool) -> Any:
    """Gradients through some scores: the keys' numbers, and of the bias, the queries and the factors at these."""
    has_key = None
    if some_lack:
        found = indices >= 0  # elsewhere a key of zeros stands in
        grad, indices, has_key = torch.where(found, grad, 0), indices.clamp(min=0), found.reshape(-1, 1)
    flat = indices.reshape(-1)
    gathered = keys._replace(
        # widened: a key may be found many times, and its gradients are summed before they are rounded
        factors=[
            (x[flat] if has_key is None else torch.where(has_key, x[flat], 0)).to(grad.dtype) for x in keys.factors
        ],
        present=[x if x is None else x[flat] for x in keys.present],
    )
    factors = of_queries, gathered.product(grad.dtype).unflatten(0, indices.shape)
    nothing = (None, None)
    _, d_queries, d_gathered = routing.fusion_sum_grad(
        grad, None, factors, nothing, nothing, "one", -1, [False, *wanted[:2]]
    )
    if d_queries is not None:
        d_queries = d_queries.squeeze(1)
    if d_gathered is not None:
        d_gathered = d_gathered.reshape(flat.shape[0], d_gathered.shape[-1])
    return flat, grad.reshape(-1), d_queries, gathered.grads(d_gathered, [False, *wanted[2]])[1:]


def _added(to: Any, flat: Tensor, d: Any, x: Tensor) -> Any:
    """Add the gradients of the rows found to those rows."""
    if d is None:
        return None
    if on_gpu(x):  # where index_add is by atomics, and this one sorts
        return (d.new_zeros(x.shape) if to is None else to).index_put_((flat,), d, accumulate=True)
    return d.new_zeros(x.shape).index_add(0, flat, d) if to is None else to.index_add_(0, flat, d)


class _Recorded(torch.autograd.Function):
    """A top-k as plain autograd records it: of a search, k, the places of the tensors among its `arrays`, and these.

    `way` has the functions `top_k` and `gradients`, those of `_Here` or alike.
    """

    @staticmethod
    def forward(
        ctx: Any, way: Any, search: Search, k: int, places: Sequence[int], *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, indices = way.top_k(search, k)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(*given, indices)
        blank = [None if isinstance(x, Tensor) else x for x in arrays(search)]
        ctx.way, ctx.search, ctx.places = way, with_arrays(search, blank), places
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        *given, indices = ctx.saved_tensors
        count = len(arrays(ctx.search))
        values, needs = [None] * count, [False] * count
        for place, x, need in zip(ctx.places, given, ctx.needs_input_grad[4:], strict=True):
            values[place], needs[place] = x, need
        search = with_arrays(ctx.search, values)
        found = ctx.way.gradients(grads[0], with_arrays(ctx.search, needs), search, indices)
        nothing = [None] * len(search.present), [None] * len(search.key_present)
        flat = *found[QUERIES], *found[KEYS], *nothing[0], *nothing[1], *found[WEIGHTS:]
        return None, None, None, None, *[flat[place] for place in ctx.places]


def recorded(way: Any, search: Search, k: int) -> tuple[Tensor, Tensor]:
    """Evaluate a top-k so that autograd records it."""
    given = arrays(search)
    places = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
    return _record(way, search, k, places, *[given[i] for i in places])


# Past the Python of Function.apply, as in ``routing.py``.
_record = super(torch.autograd.Function, _Recorded).apply

record(
    "top_k",
    "top_k",
    schema=f"({schema.SEARCH}, SymInt k) -> Tensor[]",
    kernel=_top_k_kernel,
    fake=_top_k_fake,
    backward=_top_k_backward,
    keeps=lambda *inputs: 1,  # the indices
)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _ranks_kernel(*given: Any) -> Tensor:
    *of_search, targets = given
    return tensors.ranks(schema.search_of(plain(of_search)), targets)


def _ranks_fake(*given: Any) -> Tensor:
    like = given[QUERIES][0]
    return like.new_empty((2, like.shape[0]), dtype=torch.int64)


record("ranks", "ranks", schema=f"({schema.SEARCH}, Tensor targets) -> Tensor", kernel=_ranks_kernel, fake=_ranks_fake)
