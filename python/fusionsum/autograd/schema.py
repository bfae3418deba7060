"""How a `Call` becomes arguments of a registered operation, and back. The fields keep their order.

An operation takes lists for tuples, and "" for no activation: a schema has no list of optional strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..call import Call

CALL = "Tensor? fusion_weights, Tensor[] factors, str[] activations, Tensor?[] present, str absent, int dim"


def arguments(call: Call) -> tuple[Any, ...]:
    """Return the arguments with which an operation takes a call."""
    names = [name or "" for name in call.activations]
    return call.fusion_weights, list(call.factors), names, list(call.present), call.absent, call.dim


def call_of(given: Sequence[Any]) -> Call:
    """Return the call, unchecked, that an operation is given."""
    fusion_weights, factors, activations, present, absent, dim = given
    names = tuple(name or None for name in activations)
    return Call(fusion_weights, tuple(factors), names, tuple(present), absent, dim)
