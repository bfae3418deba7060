"""Search among keys on several processes: queries travel, keys stay, and what is found comes home and is merged.

Keys are numbered in the order of the ranks. A query's block carries what a rank needs to search its own keys for it: the
product of its factors, as it is given if it is a plain factor, and which keys it leaves out; for gradients the values'
gradient and the keys found; for ranks its target and, once the target's rank has told it, the target's score. Where all
ranks ask for the same queries, nothing but what is found travels.

What lives elsewhere: how blocks travel (``exchange.py``), the search of one rank's keys and the order of what is found
(``tensors.py``), its gradient (``autograd/search.py``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import tensors
from ..autograd import routing
from ..autograd import search as of_one
from ..autograd.sides import KEY_BIAS, KEYS, QUERIES, WEIGHTS, arrays, requiring, sides, wide
from ..call import on_gpu
from ..combination import combine_ranks
from ..scores import Search, check_k, check_offsets
from .calls import (
    added,
    check_widths,
    checksum,
    exchange_of,
    from_arrays,
    outside_graphs,
    shared_arguments,
    to_arrays,
    travelling,
    travelling_dtype,
)
from .exchange import Layout, Meeting, meet


@outside_graphs
def top_k(group: Any, check: Callable[[], tuple[Search, int]]) -> tuple[Any, Any]:
    """Evaluate `search.top_k` among the keys of all ranks; `check` returns its checked arguments."""

    def checked() -> Any:
        search, k = check()
        return search, {"k": k}, None

    sharded, search, options, _, home = _met("top_k", group, checked)
    k = check_k(options["k"], sharded.ranks.offsets[-1])
    records = routing.records([x for x in arrays(search) if isinstance(x, Tensor)])
    values, indices = of_one.recorded(sharded, search, k) if records else sharded.top_k(search, k)
    return home((values, indices))


@outside_graphs
def ranks(group: Any, check: Callable[[], Search], targets: Any, ties: str) -> Any:
    """Evaluate `search.ranks` among the keys of all ranks; `check` returns the checked search."""
    sharded, search, _, numbers, home = _met("ranks", group, lambda: (check(), {"ties": ties}, targets))
    with torch.no_grad():
        counts = sharded.counts(search, numbers)
    greater, equal = counts.double() if ties == "mean" else counts
    return home(combine_ranks(greater, equal, ties))


def _met(name: str, group: Any, check: Callable[[], tuple[Search, Any, Any]]) -> tuple[Any, ...]:
    """Let the ranks agree on a search; `check` returns it, its options and the targets or None.

    Returns the keys of all ranks; the search, as tensors, with lists of the keys that queries leave out; the options; the
    targets; and the function that makes of tensors what the caller gave.
    """
    exchange = exchange_of(group)

    def checked() -> Any:
        given, options, targets = check()
        search, width = _with_lists(from_arrays(given, exchange))
        if targets is not None:
            targets = torch.as_tensor(targets).to(search.queries[0].device, torch.int64).contiguous()
        return search, width, options, targets, functools.partial(to_arrays, first=given.queries[0])

    def sizes(call: Any) -> list[int]:
        search, width, _, targets, _ = call
        ids = search.excluded_ids
        sides = [len(search.queries[0]), len(search.keys[0])]
        return [*sides, 0 if ids is None else len(ids), width, *_range(ids), *_range(targets)]

    def arguments(call: Any) -> dict[str, Any]:
        search, _, options, targets, _ = call
        shared = {}
        if exchange.queries == "shared":
            given = [*search.queries, *search.present, search.excluded_offsets, search.excluded_ids, targets]
            shared["queries' checksum"] = [None if x is None else f"{checksum(x):08x}" for x in given]
        excludes = {"exclude": search.excluded_ids is not None}
        gradients = _asked(requiring(search)) if torch.is_grad_enabled() else None
        known = shared_arguments(search, exchange)
        return {**known, **options, **shared, **excludes, "queries of": exchange.queries, "gradients": gradients}

    ranks, (search, _, options, targets, home) = meet(exchange, name, checked, sizes, arguments)
    total = ranks.offsets[-1]
    _, widths, *ends = ranks.others
    check_widths(ranks, widths)
    for rank in range(ranks.world):
        for argument, (least, most) in (("exclude", ends[:2]), ("targets", ends[2:])):
            for number in (least[rank], most[rank]):
                if not 0 <= number < max(total, 1):
                    raise ValueError(
                        f"{argument}: expected integers from 0 to less than {total}, the number of keys of all ranks, got "
                        f"{number} on rank {rank}"
                    )
    return Sharded(ranks), search, options, targets, home


def _with_lists(search: Search) -> tuple[Search, int]:
    """Return the search with lists of numbers instead of a boolean `exclude`, and of how many columns this was, or -1."""
    if search.exclude is not None:
        offsets = search.exclude.sum(dim=1).cumsum(dim=0)
        offsets, ids = torch.cat([offsets.new_zeros(1), offsets]), search.exclude.nonzero()[:, 1]
        return search._replace(exclude=None, excluded_offsets=offsets, excluded_ids=ids), search.exclude.shape[1]
    if search.excluded_offsets is None:
        return search, -1
    given = search.excluded_offsets, search.excluded_ids
    offsets, ids = (x.to(search.queries[0].device, torch.int64) for x in given)
    check_offsets(offsets.cpu().numpy(), ids.cpu().numpy())
    return search._replace(excluded_offsets=offsets, excluded_ids=ids), -1


def _range(integers: Tensor | None) -> tuple[int, int]:
    """Return the least and the greatest; zeros for none."""
    return (0, 0) if integers is None or not len(integers) else (int(integers.min()), int(integers.max()))


def _asked(needs: Sequence[Any]) -> list[bool]:
    """Tell which gradients are needed: of the queries' side, the keys' factors, and their bias."""
    return [any(needs[QUERIES]) or needs[WEIGHTS], any(needs[KEYS]), needs[KEY_BIAS]]


class Sharded:
    """The keys of all ranks: the functions of a search, of which the rank's own keys are a part."""

    def __init__(self, ranks: Meeting) -> None:
        self.ranks = ranks
        self.first, self.end = ranks.offsets[ranks.rank : ranks.rank + 2]  # of the numbers of this rank's keys
        self.shared = ranks.exchange.queries == "shared"

    # ---- top_k

    def top_k(self, search: Search, k: int) -> tuple[Tensor, ...]:
        """Find the k best keys of all ranks for the queries of this one: values and indices, (B, k)."""
        merge = functools.partial(tensors.best, k=k)
        if self.shared:
            found = self._found(search, k)
            return tuple(self._merged(found, [wide(search), torch.int64], (k,), merge))
        rows = self.ranks.rows
        home = Layout((wide(search), [(b, k) for b in rows]), (torch.int64, [(b, k) for b in rows]))
        return tuple(self._travel(search, [], [], lambda part, _: self._found(part, k), home, merge))

    def _found(self, search: Search, k: int) -> Any:
        """Find the best of this rank's keys, by the numbers among all; -inf and -1 where it has fewer than k."""
        values, indices = tensors.top_k(self._here(search), min(k, self.end - self.first))
        indices = torch.where(indices >= 0, indices + self.first, indices)
        lacking = len(values), k - values.shape[1]
        values = torch.cat([values, values.new_full(lacking, -torch.inf)], dim=1)
        return [values, torch.cat([indices, indices.new_full(lacking, -1)], dim=1)]

    def gradients(self, grad: Tensor, needs: Sequence[Any], search: Search, indices: Tensor) -> list[Any]:
        """Gradients of the fields of a search, as `needs` has them, from that of the values."""
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (grad, *search.queries, *search.keys)
        ):
            raise NotImplementedError("top_k: has first derivatives only where `group` is given")
        of_queries, _, of_bias = _asked(needs)
        d_keys: list[Any] = [None] * len(search.keys)
        d_bias = None

        def visit(source: int, block: list[Tensor]) -> list[Tensor]:
            nonlocal d_keys, d_bias
            given, numbers, product = block
            here = self._own(numbers)
            # of each query as many places as the most of any that are here, those first
            most = int((here >= 0).sum(dim=1).max()) if here.numel() else 0
            places = (here < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
            given, here = given.gather(1, places), here.gather(1, places)
            if most:
                d_product, d_factors, more = of_one.of_found(search, given, here, product, needs, True)
                d_keys = [_sum(a, b) for a, b in zip(d_keys, d_factors, strict=True)]
                d_bias = _sum(d_bias, more)
            else:
                d_product = torch.zeros_like(product)
            return [d_product] if of_queries else []

        block = [grad.contiguous(), indices, sides(search)[0].product(grad.dtype).detach().contiguous()]
        if self.shared:
            # the ranks' values are the same, and each rank has its part of the gradient of their sum
            (block[0],) = self._merged(block[:1], [grad.dtype], indices.shape[1:], added)
            d_product = visit(self.ranks.rank, block)
        else:
            rows, k, terms = self.ranks.rows, indices.shape[1], block[2].shape[1]
            shapes = (grad.dtype, [(b, k) for b in rows]), (torch.int64, [(b, k) for b in rows])
            product = grad.dtype, [(b, terms) for b in rows]
            home = Layout(product) if of_queries else None
            d_product = self.ranks.travel(block, Layout(*shapes, product), visit, home, added)
        d_keys = [
            torch.zeros_like(x) if need and d is None else d
            for x, d, need in zip(search.keys, d_keys, needs[KEYS], strict=True)
        ]
        if of_bias and d_bias is None:
            d_bias = torch.zeros_like(search.key_bias)
        return of_one.fields_of(search, needs, d_product[0] if of_queries else None, d_keys, d_bias)

    # ---- ranks

    def counts(self, search: Search, targets: Tensor) -> Tensor:
        """Count the scores greater than and equal to the target's among all ranks' keys, (2, B)."""

        def known(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [torch.where(torch.isnan(ours[0]), theirs[0], ours[0])]

        if self.shared:
            (scores,) = self._merged([self._targets_scores(search, targets)], [wide(search)], (), known)
            found = self._counts(search, targets, scores).T.contiguous()
            return self._merged([found], [torch.int64], (2,), added)[0].T
        rows = self.ranks.rows
        of_rows, numbers = [(b,) for b in rows], (torch.int64, [(b,) for b in rows])
        home = Layout((wide(search), of_rows))

        def scored(part: Search, given: list[Tensor]) -> list[Tensor]:
            return [self._targets_scores(part, given[0])]

        def counted(part: Search, given: list[Tensor]) -> list[Tensor]:
            return [self._counts(part, *given)]

        plain = search._replace(excluded_offsets=None, excluded_ids=None)
        (scores,) = self._travel(plain, [targets], [numbers], scored, home, known)
        home = Layout((torch.int64, [(2, b) for b in rows]))
        return self._travel(search, [targets, scores], [numbers, (wide(search), of_rows)], counted, home, added)[0]

    def _targets_scores(self, search: Search, targets: Tensor) -> Tensor:
        """Evaluate the scores of the targets that are this rank's keys; NaN for the others."""
        here = self._own(targets)
        if on_gpu(targets):  # where equal keys score alike in products of one shape
            plain = search._replace(excluded_offsets=None, excluded_ids=None)
            return tensors.target_scores(plain, here)
        rows = (here >= 0).nonzero()[:, 0]
        keys = here[rows]

        def some(given: Any, of: Tensor) -> Any:
            return tuple(x if x is None else x[of] for x in given)

        part = search._replace(
            queries=some(search.queries, rows),
            present=some(search.present, rows),
            keys=some(search.keys, keys),
            key_present=some(search.key_present, keys),
            key_bias=some([search.key_bias], keys)[0],
            excluded_offsets=None,
            excluded_ids=None,
        )
        found = torch.full((len(targets),), torch.nan, dtype=wide(search))
        if len(rows):
            found[rows] = tensors.target_scores(part, torch.arange(len(rows)))
        return found

    def _counts(self, search: Search, targets: Tensor, scores: Tensor) -> Tensor:
        return tensors.ranks_of_scores(self._here(search), self._own(targets), scores)

    # ---- both

    def _own(self, numbers: Tensor) -> Tensor:
        """Count keys' numbers from this rank's first; -1 for the keys of others."""
        return torch.where((numbers >= self.first) & (numbers < self.end), numbers - self.first, -1)

    def _here(self, search: Search) -> Search:
        """Keep of the numbers that queries leave out those of this rank's keys, counted from its first."""
        if search.excluded_ids is None:
            return search
        offsets, ids = search.excluded_offsets, search.excluded_ids
        kept = (ids >= self.first) & (ids < self.end)
        before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(dim=0)])
        return search._replace(excluded_offsets=before[offsets], excluded_ids=ids[kept] - self.first)

    def _travel(
        self, search: Search, more: list[Tensor], entries: list[Any], visit: Any, home: Layout, merge: Any
    ) -> Any:
        """Let the queries of all ranks travel, with more tensors of theirs; `visit` gets their search of these keys."""
        queries, _ = sides(search)
        queries = queries._replace(fusion_weights=None)
        rows, terms = self.ranks.rows, search.queries[0].shape[1]
        block, laid = [*more], [*entries]
        lists = search.excluded_ids is not None
        if lists:
            block += [search.excluded_offsets, search.excluded_ids]
            counts = self.ranks.others[0]
            laid += [(torch.int64, [(b + 1,) for b in rows]), (torch.int64, [(count,) for count in counts])]
        block.append(travelling(queries, wide(search)).detach())
        laid.append((travelling_dtype(queries, wide(search)), [(b, terms) for b in rows]))

        def visited(source: int, found: list[Tensor]) -> Any:
            offsets, ids = found[-3:-1] if lists else (None, None)
            part = search._replace(
                queries=(found[-1],),
                activations=(None,),
                present=(None,),
                excluded_offsets=offsets,
                excluded_ids=ids,
            )
            return visit(part, found[: len(more)])

        return self.ranks.travel(block, Layout(*laid), visited, home, merge)

    def _merged(self, given: list[Tensor], dtypes: Sequence[Any], after: Sequence[int], merge: Any) -> list[Tensor]:
        """Merge tensors (B, *after) of all ranks, for the same rows: each rank some of the rows, then all have all."""
        world, rows = self.ranks.world, self.ranks.rows[0]
        starts = [rank * rows // world for rank in range(world + 1)]
        shares = [(end - start, *after) for start, end in itertools.pairwise(starts)]
        layout, nothing = Layout(*[(dtype, shares) for dtype in dtypes]), given[0].new_empty(0, dtype=torch.uint8)
        found: dict[int, list[Tensor]] = {}

        def of_share(rank: int, _: list[Tensor]) -> list[Tensor]:
            return [x[starts[rank] : starts[rank + 1]] for x in given]

        own = self.ranks.travel([nothing], Layout((torch.uint8, [(0,)] * world)), of_share, layout, merge)
        self.ranks.travel(own, layout, found.__setitem__)
        return [torch.cat(parts) for parts in zip(*[found[rank] for rank in range(world)], strict=True)]


def _sum(ours: Any, theirs: Any) -> Any:
    return theirs if ours is None else ours.add_(theirs)
