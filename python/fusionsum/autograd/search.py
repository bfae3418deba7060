"""Search over scores for tensors: the best keys of each query, and ranks, as registered operations.

What lives here: the operations ``top_k`` and ``ranks``, a record each, and the gradient of the values of ``top_k``, that of
a fusion sum over the keys found. What lives elsewhere: the checks (``scores.py``), the ranks from the counts
(``combination.py``), the kernels (``tensors.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import tensors
from ..combination import combine_ranks
from ..scores import Search
from . import routing, schema
from .registration import apply
from .sides import KEY_BIAS, KEYS, QUERIES, WEIGHTS, arrays, plain, record, sides, wide


def top_k(search: Search, k: int) -> tuple[Tensor, Tensor]:
    """Evaluate `search.top_k` for tensors; takes a checked search."""
    direct = _is_direct(search)
    values, indices = tensors.top_k(search, k) if direct else apply("top_k", *_arguments(search), k)
    return values, indices


def ranks(search: Search, targets: Tensor, ties: str) -> Tensor:
    """Evaluate `search.ranks` for tensors; takes checked arguments."""
    if _is_direct(search, targets):
        counts = tensors.ranks(search, targets)
    else:
        counts = apply("ranks", *_arguments(search), targets)
    greater, equal = counts.double() if ties == "mean" else counts  # torch divides integers in float32
    return combine_ranks(greater, equal, ties)


def _is_direct(search: Search, *more: Tensor) -> bool:
    given = [x for x in (*arrays(search), *more) if isinstance(x, Tensor)]
    return routing.is_plain(given) and not routing.records(given)


def _arguments(search: Search) -> tuple[Any, ...]:
    listed = (search.excluded_offsets, search.excluded_ids)  # lists of ids per query come as arrays
    offsets, ids = (x if x is None else torch.as_tensor(x) for x in listed)
    return schema.side_arguments(search._replace(excluded_offsets=offsets, excluded_ids=ids))


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
    """Differentiate the values as fusion sums of each query and the keys found, gathered by their indices."""
    *of_search, _, (indices,) = rest
    search = schema.search_of(of_search)
    found: list[Any] = [None] * len(search)
    is_found = indices >= 0  # where no key was left, the value is constant, -inf, and a key of zeros stands in
    grad, places = torch.where(is_found, grads[0], 0), indices.clamp(min=0)
    rows, flat, has_key = places.shape, places.reshape(-1), is_found.reshape(-1, 1)

    queries, keys = sides(search)
    gathered = keys._replace(
        # widened: a key may be found many times, and its gradients are summed before they are rounded
        factors=[torch.where(has_key, x[flat], 0).to(grad.dtype) for x in keys.factors],
        present=[x if x is None else x[flat] for x in keys.present],
    )
    factors = queries.product(grad.dtype).unsqueeze(1), gathered.product(grad.dtype).unflatten(0, rows)
    wanted = any(needs[QUERIES]) or needs[WEIGHTS], any(needs[KEYS])
    nothing = (None, None)
    _, d_queries, d_gathered = routing.fusion_sum_grad(
        grad, None, factors, nothing, nothing, "one", -1, [False, *wanted]
    )

    def scattered(d: Any, x: Tensor) -> Any:
        """Add the gradients of the rows found to those rows."""
        return None if d is None else d.new_zeros(x.shape).index_add(0, flat, d).to(x.dtype)

    if d_queries is not None:
        d_queries = d_queries.squeeze(1)
    if d_gathered is not None:
        d_gathered = d_gathered.reshape(flat.shape[0], d_gathered.shape[-1])
    found[WEIGHTS], *found[QUERIES] = queries.grads(d_queries, [needs[WEIGHTS], *needs[QUERIES]])
    _, *d_rows = gathered.grads(d_gathered, [False, *needs[KEYS]])
    found[KEYS] = [scattered(d, x) for d, x in zip(d_rows, keys.factors, strict=True)]
    if needs[KEY_BIAS]:
        found[KEY_BIAS] = scattered(grad.reshape(-1), search.key_bias)
    return *found, None


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
