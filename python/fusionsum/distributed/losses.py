"""The losses of rows on several processes: which tiles each rank evaluates, and what becomes of their statistics.

A rank has queries and keys of its own. Its keys travel, as a block: their product, as it is given if it is a plain factor,
with their bias, labels and ids. Each rank evaluates its queries with every block, a tile of the whole matrix, by the same
functions that evaluate the whole (``tensors.py``):

    statistics of queries   merged here, over the blocks
    statistics of keys      40 bytes a key go home, and are merged on the way
    gradient of queries     added up here; so are those of weights, logit_scale and logit_bias, of this rank's queries
    gradient of keys        goes home, with that of the bias

What lives elsewhere: how blocks travel (``exchange.py``), statistics to losses and back (``combination.py``), autograd
(``autograd/losses.py``), which takes `Tiles` for ``tensors``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tensors
from ..autograd import losses
from ..autograd.sides import sides, wide
from ..call import on_gpu
from ..combination import Options, arrange, merge_stats
from ..scores import Scores, check_one_kind, number
from .calls import (
    added,
    check_widths,
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
def contrastive_loss(group: Any, check: Callable[[], tuple[Scores, Options]]) -> Any:
    """Evaluate `losses.contrastive_loss` over the rows of all ranks; `check` returns its checked arguments."""
    ranks, scores, read, options, home = _met("contrastive_loss", losses.Contrastive, group, check)
    return home(arrange(losses.evaluated(_Contrastive(ranks, options), scores, read), options))


@outside_graphs
def sigmoid_loss(group: Any, check: Callable[[], tuple[Scores, str]]) -> Any:
    """Evaluate `losses.sigmoid_loss` over the rows of all ranks; `check` returns its checked arguments."""
    ranks, scores, read, reduction, home = _met("sigmoid_loss", losses.Sigmoid, group, check)
    keep = losses.asked(losses.Sigmoid, scores) if reduction != "none" and torch.is_grad_enabled() else [False] * 4
    return home(losses.evaluated(_Sigmoid(ranks, reduction, keep), scores, read)[0])


def _met(name: str, loss: Any, group: Any, check: Callable[[], tuple[Scores, Any]]) -> tuple[Any, ...]:
    """Let the ranks agree on a call of a loss.

    Returns the ranks; the scores, as tensors; the same, with scalars read, if they are not on a GPU, but not labels and
    ids, which become codes in each tile; the options; and the function that makes of tensors what the caller gave.
    """
    exchange = exchange_of(group)

    def scalars(scores: Scores) -> dict[str, float]:
        return {"logit_scale": number(scores.logit_scale), "logit_bias": number(scores.logit_bias)}

    def checked() -> Any:
        given, options = check()
        check_one_kind("labels", given.query_labels, given.key_labels)
        check_one_kind("exclude", given.query_ids, given.key_ids)
        scores = from_arrays(given, exchange)
        read = scores if on_gpu(scores.queries[0]) else scores._replace(**scalars(scores))
        return scores, read, options, functools.partial(to_arrays, first=given.queries[0])

    def sizes(call: Any) -> list[int]:
        scores, *_ = call
        width = -1 if scores.exclude is None else scores.exclude.shape[1]
        return [len(scores.queries[0]), len(scores.keys[0]), width]

    def arguments(call: Any) -> dict[str, Any]:
        scores, _, options, _ = call
        given = {name: getattr(scores, name) is not None for name in ("query_labels", "query_ids", "exclude")}
        gradients = losses.asked(loss, scores) if torch.is_grad_enabled() else None
        known = shared_arguments(scores, exchange)
        return {**known, **scalars(scores), **given, "options": options, "gradients": gradients}

    ranks, call = meet(exchange, name, checked, sizes, arguments)
    check_widths(ranks, ranks.others[0])
    return ranks, *call


class _Contrastive(losses.Contrastive):
    def __init__(self, ranks: Meeting, options: Options) -> None:
        super().__init__(*options)
        self.tiles = Tiles(ranks)

    def count(self, of_queries: Any, of_keys: Any, scores: Scores) -> Any:
        if self.options.reduction != "mean":
            return None
        ranks = self.tiles.ranks
        if scores.diagonal:  # every query has a positive, and as many keys are one
            return (max(sum(ranks.rows), 1) / ranks.world,) * 2
        return self.tiles.counts(of_queries, of_keys)


class _Sigmoid(losses.Sigmoid):
    def __init__(self, ranks: Meeting, *options: Any) -> None:
        super().__init__(*options)
        self.tiles, self.count = Tiles(ranks), max(sum(ranks.rows), 1) / ranks.world

    def may_scale(self, upstream: Any) -> bool:
        """Tell whether all ranks scale by the same number: the gradients kept hold the parts of all ranks."""
        ranks = self.tiles.ranks
        if ranks.world == 1:
            return True
        own = torch.tensor(float(upstream), dtype=torch.float64, device=ranks.device)
        return len({x.item() for x in ranks.exchange.gather(own)}) == 1


class Tiles:
    """The functions of ``tensors.py`` that losses call, over the rows of all ranks: they take scores that are not read."""

    def __init__(self, ranks: Meeting) -> None:
        self.ranks = ranks

    def counts(self, of_queries: Any, of_keys: Any) -> tuple[Any, ...]:
        """Return how many queries and keys have a positive, on average over the ranks, so that ranks' means average."""
        found = torch.stack([torch.as_tensor(x[2] > 0).sum() for x in (of_queries, of_keys) if x is not None])
        if self.ranks.world > 1:
            found = torch.stack(self.ranks.exchange.gather(found)).sum(dim=0)
        return tuple(_array(found.clip(min=1).double() / self.ranks.world))

    def softmax_stats(self, scores: Scores, any: bool, symmetric: bool, totals: bool) -> Any:
        """Evaluate the statistics of this rank's queries, (5, B), and, if symmetric, of its keys, (5, C)."""
        of_queries: Any = None
        xp = losses.namespace(scores)

        def visit(tile: Scores, coefs: Any) -> list[Tensor]:
            nonlocal of_queries
            found, of_block = tensors.softmax_stats(tile, any, symmetric, totals)
            of_queries = found if of_queries is None else merge_stats(xp, of_queries, found, any)
            return [torch.as_tensor(of_block)] if symmetric else []

        def merge(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [torch.as_tensor(merge_stats(xp, _array(ours[0]), _array(theirs[0]), any))]

        home = [(torch.float64, [(5, columns) for columns in self.ranks.columns])] if symmetric else []
        of_keys = self._tiles(scores, None, visit, home, merge)
        return of_queries, _array(of_keys[0]) if symmetric else None

    def softmax_grad(
        self, query_coefs: Any, key_coefs: Any, any: bool, scores: Scores, needs: tensors.Needs
    ) -> list[Tensor]:
        """Evaluate the gradients that are needed; those of the keys from all ranks' queries."""

        def grads(tile: Scores, coefs: Any) -> list[Tensor]:
            return tensors.softmax_grad(query_coefs, None if coefs is None else _array(coefs), any, tile, needs)

        return self._grads(scores, key_coefs, grads, needs, bias_is_of_keys=True)

    def sigmoid_stats(self, scores: Scores) -> Any:
        """Evaluate the losses of this rank's queries, (B,)."""
        losses = _zeros(scores)

        def visit(tile: Scores, coefs: Any) -> list[Tensor]:
            losses[:] += tensors.sigmoid_stats(tile)
            return []

        self._tiles(scores, None, visit)
        return losses

    def sigmoid_stats_and_grad(self, coefs: Any, scores: Scores, needs: tensors.Needs) -> tuple[Any, list[Tensor]]:
        """Evaluate those losses and, in the same pass, the gradients that are needed."""
        losses = _zeros(scores)

        def grads(tile: Scores, _: Any) -> list[Tensor]:
            of_tile, found = tensors.sigmoid_stats_and_grad(coefs, tile, needs)
            losses[:] += of_tile
            return found

        return losses, self._grads(scores, None, grads, needs, bias_is_of_keys=False)

    def sigmoid_grad(self, coefs: Any, scores: Scores, needs: tensors.Needs) -> list[Tensor]:
        """Evaluate the gradients that are needed."""
        return self.sigmoid_stats_and_grad(coefs, scores, needs)[1]

    def _grads(
        self, scores: Scores, key_coefs: Any, grads: Callable[..., list[Tensor]], needs: Any, bias_is_of_keys: bool
    ) -> list[Tensor]:
        """Sum the gradients of the tiles: here, or at the keys' home."""
        at_home = [need and of_keys for need, of_keys in zip(needs, (False, True, False, bias_is_of_keys), strict=True)]
        here: list[Tensor] = []

        def visit(tile: Scores, coefs: Any) -> list[Tensor]:
            found = iter(grads(tile, coefs))
            both: tuple[list[Tensor], list[Tensor]] = [], []
            for need, goes in zip(needs, at_home, strict=True):
                if need:
                    both[goes].append(next(found))
            here[:] = added(here, both[0]) if here else both[0]
            return both[1]

        columns, terms = self.ranks.columns, scores.queries[0].shape[1]
        entries = [(wide(scores), [(c, terms) for c in columns]), (torch.float64, [(c,) for c in columns])]
        home = [entry for entry, goes in zip(entries, (at_home[1], at_home[3]), strict=True) if goes]
        there = iter(self._tiles(scores, key_coefs, visit, home, added) or [])
        ours = iter(here)
        return [next(there if goes else ours) for need, goes in zip(needs, at_home, strict=True) if need]

    def _tiles(self, scores: Scores, key_coefs: Any, visit: Any, home: Any = (), merge: Any = None) -> Any:
        """Let the keys of all ranks, with coefficients (5, C) or None, travel, and visit the tile of each block."""
        _, keys = sides(scores)
        columns, terms = self.ranks.columns, scores.queries[0].shape[1]
        bias, labels, ids = scores.key_bias, scores.key_labels, scores.key_ids
        block = [None if x is None else x.to(torch.int64) for x in (labels, ids)]
        block += [None if key_coefs is None else torch.as_tensor(key_coefs), bias, travelling(keys, wide(scores))]
        dtypes = [torch.int64, torch.int64, torch.float64, None if bias is None else bias.dtype]
        dtypes.append(travelling_dtype(keys, wide(scores)))
        shapes: list[Any] = [[(c,) for c in columns]] * 2 + [[(5, c) for c in columns], [(c,) for c in columns]]
        shapes.append([(c, terms) for c in columns])
        given = [x is not None for x in block]
        layout = Layout(*[(t, of) for t, of, has in zip(dtypes, shapes, given, strict=True) if has])

        def visited(source: int, found: list[Tensor]) -> Any:
            parts = iter(found)
            labels, ids, coefs, bias, keys = [next(parts) if has else None for has in given]
            return visit(self._tile(scores, source, labels, ids, bias, keys), coefs)

        packed = [x.detach() for x in block if x is not None]
        return self.ranks.travel(packed, layout, visited, Layout(*home) if home else None, merge)

    def _tile(self, scores: Scores, source: int, labels: Any, ids: Any, bias: Any, keys: Tensor) -> Scores:
        """Return the scores, read, of this rank's queries with the keys of a rank."""
        query_labels, exclude = scores.query_labels, scores.exclude
        if labels is None and source != self.ranks.rank:  # the diagonal lies in the own tile: no positives here
            query_labels = keys.new_zeros(len(scores.queries[0]), dtype=torch.int32)
            labels = keys.new_ones(len(keys), dtype=torch.int32)
        if exclude is not None:
            exclude = exclude[:, self.ranks.offsets[source] : self.ranks.offsets[source + 1]]
        return scores._replace(
            keys=(keys,),
            key_activations=(None,),
            key_present=(None,),
            key_bias=bias,
            query_labels=query_labels,
            key_labels=labels,
            key_ids=ids,
            exclude=exclude,
        ).read()


def _array(x: Tensor) -> Any:
    """Return statistics or coefficients as the functions of ``tensors.py`` take them: an array or, on a GPU, the tensor."""
    return x if on_gpu(x) else x.numpy()


def _zeros(scores: Scores) -> Any:
    return _array(scores.queries[0].new_zeros(len(scores.queries[0]), dtype=torch.float64))
