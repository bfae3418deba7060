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
from ..combination import combine_ranks
from ..scores import Search
from . import routing, schema
from .registration import apply
from .sides import KEY_BIAS, KEYS, QUERIES, WEIGHTS, arrays, plain, record, sides, wide, with_arrays

MOST_GATHERED = 2**20  # entries of keys that the gradient of the values gathers at a time


def top_k(search: Search, k: int) -> tuple[Tensor, Tensor]:
    """Evaluate `search.top_k` for tensors; takes a checked search."""
    given = arrays(search)
    places = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
    found = [given[i] for i in places]
    if not routing.is_plain(found):
        values, indices = apply("top_k", *schema.side_arguments(search), k)
    elif routing.records(found):
        values, indices = _record(search, k, places, *found)
    else:
        values, indices = tensors.top_k(search, k)
    return values, indices


def ranks(search: Search, targets: Tensor, ties: str) -> Tensor:
    """Evaluate `search.ranks` for tensors; takes checked arguments."""
    if _is_direct(search, targets):
        counts = tensors.ranks(search, targets)
    else:
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
    """Differentiate the values as fusion sums of each query and the keys found, gathered by their indices.

    The keys found are gathered for some queries at a time. What one key gets is added up in the order of the queries.
    """
    *of_search, _, (indices,) = rest
    search, grad = schema.search_of(of_search), grads[0]
    queries, keys = sides(search)
    of_queries = queries.product(grad.dtype).unsqueeze(1)
    wanted = any(needs[QUERIES]) or needs[WEIGHTS], any(needs[KEYS])
    d_queries, d_keys, d_bias = [], [None] * len(keys.factors), None
    rows, k = indices.shape
    for some in _chunks(rows, k, of_queries.shape[-1]):
        part = _of_found(search, grad[some], indices[some], of_queries[some], keys, (*wanted, needs[KEYS]))
        flat, of_values, of_rows, of_factors = part
        d_queries.append(of_rows)
        d_keys = [_added(to, flat, d, x) for to, d, x in zip(d_keys, of_factors, keys.factors, strict=True)]
        if needs[KEY_BIAS]:
            d_bias = _added(d_bias, flat, of_values, search.key_bias)

    found: list[Any] = [None] * len(search)
    d_product = None if not wanted[0] else d_queries[0] if len(d_queries) == 1 else torch.cat(d_queries)
    found[WEIGHTS], *found[QUERIES] = queries.grads(d_product, [needs[WEIGHTS], *needs[QUERIES]])
    found[KEYS] = [d if d is None else d.to(x.dtype) for d, x in zip(d_keys, keys.factors, strict=True)]
    found[KEY_BIAS] = d_bias if d_bias is None else d_bias.to(search.key_bias.dtype)
    return *found, None


def _chunks(rows: Any, k: Any, terms: Any) -> list[slice]:
    """Cut queries so that the keys found of a chunk have about `MOST_GATHERED` entries; a compiler gets one chunk."""
    if is_compiling() or not all(type(n) is int for n in (rows, k, terms)) or rows * k * terms <= MOST_GATHERED:
        return [slice(None)]
    step = max(1, MOST_GATHERED // (k * terms))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _of_found(search: Search, grad: Tensor, indices: Tensor, of_queries: Tensor, keys: Any, wanted: Any) -> Any:
    """Gradients through the scores found: the keys' numbers, and of the bias, the queries and the factors at these."""
    has_key = None
    if search.exclude is not None or search.excluded_offsets is not None:
        found = indices >= 0  # where no key was left, the value is constant, -inf, and a key of zeros stands in
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
    return d.new_zeros(x.shape).index_add(0, flat, d) if to is None else to.index_add_(0, flat, d)


class _Recorded(torch.autograd.Function):
    """A top-k as plain autograd records it: of a search, k, the places of the tensors among its `arrays`, and these."""

    @staticmethod
    def forward(ctx: Any, search: Search, k: int, places: Sequence[int], *given: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = tensors.top_k(search, k)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(*given, indices)
        blank = [None if isinstance(x, Tensor) else x for x in arrays(search)]
        ctx.search, ctx.places = with_arrays(search, blank), places
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        *given, indices = ctx.saved_tensors
        count = len(arrays(ctx.search))
        values, needs = [None] * count, [False] * count
        for place, x, need in zip(ctx.places, given, ctx.needs_input_grad[3:], strict=True):
            values[place], needs[place] = x, need
        search = with_arrays(ctx.search, values)
        inputs = *schema.side_arguments(search), indices.shape[1], (indices,)
        *found, _ = _top_k_backward(grads, with_arrays(ctx.search, needs), *inputs)
        nothing = [None] * len(search.present), [None] * len(search.key_present)
        flat = *found[QUERIES], *found[KEYS], *nothing[0], *nothing[1], *found[WEIGHTS:]
        return None, None, None, *[flat[place] for place in ctx.places]


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
