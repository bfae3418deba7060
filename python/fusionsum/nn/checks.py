"""Checks of what a layer is constructed with; each returns the argument as layers keep it, or names it in an error.

What lives elsewhere: checks of what a layer is called with (`FusionLayer.forward` in ``layer.py``, `aligned` in
``scores.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from ..reference import ACTIVATIONS


def as_size(name: str, given: Any) -> int:
    """Return a positive integer as Python's int, NumPy's integers too."""
    try:
        size = None if isinstance(given, (bool, np.bool_)) else operator.index(given)
    except TypeError:
        size = None
    if size is None:
        raise TypeError(f"{name}: expected an integer, got {type(given).__name__}")
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
    return size


def as_sizes(name: str, given: Any) -> tuple[int, ...]:
    """Return a sequence of positive integers as a tuple."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a sequence of integers, got {type(given).__name__}")
    return tuple(as_size(f"{name}[{i}]", size) for i, size in enumerate(given))


def as_rate(name: str, given: Any) -> float:
    """Return a rate of dropout, a number from 0 to 1."""
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name}: expected a number from 0 to 1, got {type(given).__name__}")
    rate = float(given)
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {given}")
    return rate


def as_choice(name: str, given: Any, known: Sequence[str | None]) -> Any:
    """Return one of the names that are known."""
    if not (given is None or isinstance(given, str)) or given not in known:
        names = [repr(each) for each in known]
        expected = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
        raise ValueError(f"{name}: expected {expected}, got {given!r}")
    return given


def as_activation(name: str, given: Any) -> str | None:
    """Return the name of an activation that the kernels have, or None."""
    return as_choice(name, given, tuple(ACTIVATIONS))


def as_activations(name: str, given: Any, count: int) -> str | None | Sequence[str | None]:
    """Return one activation for all modalities, or one per modality."""
    if given is None or isinstance(given, str):
        return as_activation(name, given)
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected None, a name or a sequence of them, got {type(given).__name__}")
    if len(given) != count:
        raise ValueError(f"{name}: expected {count} entries, one per modality, got {len(given)}")
    for m, each in enumerate(given):
        as_activation(f"{name}[{m}]", each)
    return given
