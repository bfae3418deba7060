"""How a `Call`, `Scores` or `Search` becomes arguments of a registered operation, and back. The fields keep their order.

An operation takes lists for tuples, and "" for no activation: a schema has no list of optional strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..call import Call
from ..scores import Scores, Search

CALL = "Tensor? fusion_weights, Tensor[] factors, str[] activations, Tensor?[] present, str absent, int dim"

SIDES = (
    "Tensor[] queries, Tensor[] keys, str[] activations, str[] key_activations, Tensor?[] present, Tensor?[] key_present, "
    "str absent, Tensor? fusion_weights, Tensor? key_bias"
)
SEARCH = f"{SIDES}, Tensor? exclude, Tensor? excluded_offsets, Tensor? excluded_ids"
SCORES = (
    f"{SIDES}, Tensor logit_scale, Tensor logit_bias, Tensor? query_labels, Tensor? key_labels, Tensor? query_ids, "
    "Tensor? key_ids, Tensor? exclude"
)


def arguments(call: Call) -> tuple[Any, ...]:
    """Return the arguments with which an operation takes a call."""
    names = [name or "" for name in call.activations]
    return call.fusion_weights, list(call.factors), names, list(call.present), call.absent, call.dim


def call_of(given: Sequence[Any]) -> Call:
    """Return the call, unchecked, that an operation is given."""
    fusion_weights, factors, activations, present, absent, dim = given
    names = tuple(name or None for name in activations)
    return Call(fusion_weights, tuple(factors), names, tuple(present), absent, dim)


def side_arguments(given: Scores | Search) -> tuple[Any, ...]:
    """Return the arguments with which an operation takes the scores of a loss, or a search."""
    names, key_names = ([name or "" for name in group] for group in (given.activations, given.key_activations))
    masks, key_masks = list(given.present), list(given.key_present)
    return list(given.queries), list(given.keys), names, key_names, masks, key_masks, *given[6:]


def scores_of(given: Sequence[Any]) -> Scores:
    """Return the scores that an operation is given."""
    return Scores(*_sides_of(given))


def search_of(given: Sequence[Any]) -> Search:
    """Return the search that an operation is given."""
    return Search(*_sides_of(given))


def _sides_of(given: Sequence[Any]) -> tuple[Any, ...]:
    names, key_names = (tuple(name or None for name in group) for group in given[2:4])
    return tuple(given[0]), tuple(given[1]), names, key_names, tuple(given[4]), tuple(given[5]), *given[6:]
