"""A checked call of scores: its fields, the checks and their messages, and who evaluates it for arrays.

    S[b, c] = logit_scale * sum_i alpha_i prod_m phi_m(q_m[b, i]) prod_m psi_m(k_m[c, i]) + logit_bias + key_bias[c]

What lives here: `Scores`, whose fields keep one order from the losses to the native module; `Search`, those of top-k and
ranks; every check of their arguments, with its error message; the codes of labels and ids. What lives elsewhere: the checks
of one array (``call.py``), the public functions (``losses.py``, ``search.py``), the formulas (``reference.py``).

A call is made ready in two steps. `check` and `check_search` look at types, shapes and devices only, so that tensors of
compilers pass; `Scores.read` and `Search.read` look at values: they make floats of scalars and codes of integers.
"""

from __future__ import annotations

import itertools
import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import reference
from .backend import native
from .call import (
    broadcast,
    check_activations,
    check_array,
    check_choice,
    check_mask,
    check_operand,
    is_tensor,
    on_gpu,
    per_factor,
)

MAX_CODES = 2**24  # codes of labels and ids are exact in float32, in which kernels may hold them


class Scores(NamedTuple):
    """The arguments of the internal functions of losses, in the order in which they and the native module take them.

    Factors are exactly (B, n) or (C, n), and there is one activation and one mask per factor. As `check` leaves it,
    `logit_scale` and `logit_bias` may be arrays of no dims, and labels and ids any integers; `read` makes the rest of it.
    """

    queries: tuple[Any, ...]
    keys: tuple[Any, ...]
    activations: tuple[str | None, ...]
    key_activations: tuple[str | None, ...]
    present: tuple[Any, ...]
    key_present: tuple[Any, ...]
    absent: str
    fusion_weights: Any
    key_bias: Any
    logit_scale: Any
    logit_bias: Any
    query_labels: Any  # without labels the positives are the diagonal: key b of query b
    key_labels: Any
    query_ids: Any  # pairs of equal id that are not positives are excluded
    key_ids: Any
    exclude: Any  # (B, C); pairs that are excluded, positives too

    @property
    def operands(self) -> tuple[Any, ...]:
        """The arrays whose dtypes decide that of the results: factors and weights."""
        return _operands(self)

    @property
    def diagonal(self) -> bool:
        """Tell whether key b is the one positive of query b, and nothing is excluded."""
        return self.query_labels is None and self.query_ids is None and self.exclude is None

    def read(self) -> Scores:
        """Read the values: floats for scalars, int32 codes for labels and ids, plain arrays for memory maps.

        Those on a GPU are left there: scalars as they are, labels and ids as int64.
        """
        if on_gpu(self.queries[0]):
            for name, of_queries, of_keys in (
                ("labels", self.query_labels, self.key_labels),
                ("exclude", self.query_ids, self.key_ids),
            ):
                check_one_kind(name, of_queries, of_keys)
            return Scores._make((*self[:11], *map(_longs, self[11:15]), self.exclude))
        labels = _codes("labels", self.query_labels, self.key_labels)
        ids = _codes("exclude", self.query_ids, self.key_ids)
        scalars = number(self.logit_scale), number(self.logit_bias)
        return Scores._make((*_plain(self[:9]), *scalars, *labels, *ids, _plain(self.exclude)))


class Search(NamedTuple):
    """The arguments that `top_k` and `ranks` share, in the order in which the internal functions take them."""

    queries: tuple[Any, ...]
    keys: tuple[Any, ...]
    activations: tuple[str | None, ...]
    key_activations: tuple[str | None, ...]
    present: tuple[Any, ...]
    key_present: tuple[Any, ...]
    absent: str
    fusion_weights: Any
    key_bias: Any
    exclude: Any  # (B, C); or else
    excluded_offsets: Any  # (B + 1,): query b leaves out excluded_ids[excluded_offsets[b] : excluded_offsets[b + 1]]
    excluded_ids: Any

    @property
    def operands(self) -> tuple[Any, ...]:
        """The arrays whose dtypes decide that of the results: factors and weights."""
        return _operands(self)

    def read(self) -> Search:
        """Read the values: ids of keys to leave out become int64, ascending within a query, each of them once.

        On a GPU, where the values are left, `excluded_ids` become places, ascending, without offsets: the query times the
        number of keys, plus the id. Ids out of range leave out nothing.
        """
        if on_gpu(self.queries[0]):
            return self if self.excluded_offsets is None else self._replace(**self._places())
        plain = Search(*_plain(tuple(self)))
        if plain.excluded_offsets is None:
            return plain
        offsets, ids = (_integers(x).astype(np.int64) for x in (plain.excluded_offsets, plain.excluded_ids))
        rows, columns = len(self.queries[0]), len(self.keys[0])
        check_offsets(offsets, ids)
        _check_below("exclude", ids, columns, "the number of keys")
        places = np.unique(np.repeat(np.arange(rows), np.diff(offsets)) * columns + ids)
        offsets = np.searchsorted(places, np.arange(rows + 1) * columns)
        return plain._replace(excluded_offsets=offsets, excluded_ids=places % max(columns, 1))

    def _places(self) -> dict[str, Any]:
        xp, like = sys.modules["torch"], self.queries[0]
        rows, columns = like.shape[0], self.keys[0].shape[0]
        if not on_gpu(self.excluded_offsets):  # of lists
            offsets, ids = _integers(self.excluded_offsets), _integers(self.excluded_ids)
            check_offsets(offsets, ids)
            _check_below("exclude", ids, columns, "the number of keys")
        offsets, ids = (_longs(x.to(like.device)) for x in (self.excluded_offsets, self.excluded_ids))
        of_query = xp.searchsorted(offsets, xp.arange(len(ids), device=like.device), right=True) - 1
        inside = (ids >= 0) & (ids < columns) & (of_query >= 0) & (of_query < rows)
        places = xp.where(inside, of_query * columns + ids, -1)
        return {"excluded_offsets": None, "excluded_ids": places.sort().values}


def evaluate(name: str, *arguments: Any) -> Any:
    """Evaluate an internal function for NumPy arrays: the kernels, else the reference.

    Parameters
    ----------
    name : str
        ``"softmax_stats"``, for example: a function of ``reference.py`` and, maybe, of the native module.
    *arguments : Any
        Positional: the fields of a `Scores` or `Search` that is read, and those that the function adds.
    """
    kernel = getattr(native, name, None)
    found = NotImplemented if kernel is None else kernel(*arguments, False)
    return getattr(reference, name)(*arguments) if found is NotImplemented else found


# ---- checks ----------------------------------------------------------------------------------------------------------


def check(
    queries: Any,
    keys: Any,
    activations: Any = None,
    key_activations: Any = None,
    present: Any = None,
    key_present: Any = None,
    absent: Any = "one",
    fusion_weights: Any = None,
    key_bias: Any = None,
    logit_scale: Any = 1.0,
    logit_bias: Any = 0.0,
    labels: Any = None,
    key_labels: Any = None,
    exclude: Any = None,
    elsewhere: bool = False,
) -> Scores:
    """Return the call of a loss, normalised but unread; for an invalid one, raise an error that names the argument.

    `elsewhere` says that other processes have keys too, of which a boolean `exclude` has columns.
    """
    shared, rows, columns, first = _check_sides(
        queries, keys, activations, key_activations, present, key_present, absent, fusion_weights, key_bias
    )
    _check_scalar("logit_scale", logit_scale, *first)
    _check_scalar("logit_bias", logit_bias, *first)
    if labels is None and key_labels is None:
        if columns < rows:
            raise ValueError(
                f"keys: expected at least {rows} rows, for key b is the positive of query b, got {columns}; "
                "or say by `labels` and `key_labels` which are positive"
            )
    elif labels is None or key_labels is None:
        lacking, given = ("labels", "key_labels") if labels is None else ("key_labels", "labels")
        raise ValueError(f"{lacking}: expected integers, for {given} are given, got None")
    else:
        _check_integers("labels", labels, rows, "queries", first)
        _check_integers("key_labels", key_labels, columns, "keys", first)
    ids = None, None
    if isinstance(exclude, (tuple, list)):
        if len(exclude) != 2:
            raise ValueError(
                f"exclude: expected a pair of integer vectors or a boolean array, got {len(exclude)} entries"
            )
        _check_integers("exclude[0]", exclude[0], rows, "queries", first)
        _check_integers("exclude[1]", exclude[1], columns, "keys", first)
        ids, exclude = (exclude[0], exclude[1]), None
    elif exclude is not None:
        valid = "a pair of integer vectors or a boolean array"
        _check_pairs(exclude, rows, None if elsewhere else columns, valid, first)
    return Scores._make((*shared, logit_scale, logit_bias, labels, key_labels, *ids, exclude))


def check_search(
    queries: Any,
    keys: Any,
    activations: Any = None,
    key_activations: Any = None,
    present: Any = None,
    key_present: Any = None,
    absent: Any = "one",
    fusion_weights: Any = None,
    key_bias: Any = None,
    exclude: Any = None,
    elsewhere: bool = False,
) -> Search:
    """Return the call of a search, normalised but unread; for an invalid one, raise an error that names the argument.

    `elsewhere` says that other processes have keys too, of which a boolean `exclude` has columns.
    """
    shared, rows, columns, first = _check_sides(
        queries, keys, activations, key_activations, present, key_present, absent, fusion_weights, key_bias
    )
    offsets = ids = None
    if (
        isinstance(exclude, tuple)
        and len(exclude) == 2
        and all(is_tensor(x) or isinstance(x, np.ndarray) for x in exclude)
    ):
        _check_integers("exclude[0], the offsets", exclude[0], rows + 1, "one more than the queries", first)
        _check_integers("exclude[1], the ids", exclude[1], None, "", first)
        (offsets, ids), exclude = exclude, None
    elif isinstance(exclude, (tuple, list)):
        if len(exclude) != rows:
            raise ValueError(f"exclude: expected {rows} sequences of ids, one per query, got {len(exclude)}")
        offsets, ids = _listed(exclude, first[1])
        exclude = None
    elif exclude is not None:
        valid = "a boolean array, a list of ids per query or a pair of arrays (offsets, ids)"
        _check_pairs(exclude, rows, None if elsewhere else columns, valid, first)
    return Search._make((*shared, exclude, offsets, ids))


def check_offsets(offsets: np.ndarray, ids: np.ndarray) -> None:
    """Raise an error unless the offsets say whose each of the ids is."""
    if offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"exclude: expected offsets that ascend from 0 to {len(ids)}, the number of ids, got offsets from "
            f"{offsets[0]} to {offsets[-1]}; a list, rather than a tuple of two arrays, is taken as ids per query"
        )


def check_k(k: Any, columns: int) -> int:
    """Return k, the number of keys wanted for each query."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    if not 0 <= k <= columns:
        raise ValueError(f"k: expected 0 to {columns}, the number of keys, got {k}")
    return int(k)


def check_targets(targets: Any, search: Search, first_name: str) -> None:
    """Raise an error unless the targets are a vector of integers; `read_targets` looks at their values."""
    _check_integers("targets", targets, len(search.queries[0]), "queries", (first_name, search.queries[0]))


def read_targets(targets: Any, columns: int) -> np.ndarray:
    """Read the targets: int64 numbers of keys. On a GPU they are not checked; the rank of one out of range is the last."""
    if on_gpu(targets):
        return _longs(targets)
    found = _integers(targets)
    _check_below("targets", found, columns, "the number of keys")
    return found.astype(np.int64)


def check_smoothing(label_smoothing: Any) -> float:
    """Return the label smoothing as a float."""
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, numbers.Real):
        raise TypeError(f"label_smoothing: expected a number, got {type(label_smoothing).__name__}")
    if not 0 <= float(label_smoothing) < 1:
        raise ValueError(f"label_smoothing: expected at least 0 and less than 1, got {label_smoothing}")
    return float(label_smoothing)


def check_flag(name: str, given: Any) -> bool:
    """Return a boolean option."""
    if not isinstance(given, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type(given).__name__}")
    return bool(given)


def first_name(queries: Any) -> str:
    """Name the first array of a call, to whose framework and device the others are held."""
    return "queries[0]" if isinstance(queries, (tuple, list)) else "queries"


def _check_sides(
    queries: Any,
    keys: Any,
    activations: Any,
    key_activations: Any,
    present: Any,
    key_present: Any,
    absent: Any,
    fusion_weights: Any,
    key_bias: Any,
) -> tuple[Any, int, int, tuple[str, Any]]:
    """Check what losses and searches share: the first nine fields of either, the rows of both sides, the first array."""
    first = first_name(queries), (list(queries) or [None])[0] if isinstance(queries, (tuple, list)) else queries
    sides = [_check_factors("queries", queries, first), _check_factors("keys", keys, first)]
    (left, (rows, terms)), (right, (columns, others)) = sides
    if others != terms:
        raise ValueError(
            f"keys: expected {terms} terms, as queries of shape {(rows, terms)} have, got shape {(columns, others)}"
        )
    _check_vector("fusion_weights", fusion_weights, terms, "one per term", first)
    _check_vector("key_bias", key_bias, columns, "one per key", first)
    names, masks = [], []
    for prefix, side, factors, given, mask in (
        ("", "queries", left, activations, present),
        ("key_", "keys", right, key_activations, key_present),
    ):
        names.append(tuple(per_factor(f"{prefix}activations", given, len(factors), (str,))))
        check_activations(f"{prefix}activations", names[-1])
        masks.append(tuple(_masks(f"{prefix}present", mask, side, factors)))
    check_choice("absent", absent, ("one", "zero"))
    return (left, right, *names, *masks, absent, fusion_weights, key_bias), rows, columns, first


def _check_factors(name: str, given: Any, first: tuple[str, Any]) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """Check one side; return its factors, broadcast to one shape, and that shape."""
    several = isinstance(given, (tuple, list))
    factors = tuple(given) if several else (given,)
    if not 1 <= len(factors) <= reference.MAX_FACTORS:
        raise ValueError(f"{name}: expected 1 to {reference.MAX_FACTORS} arrays, got {len(factors)}")
    shape: tuple[int, ...] = ()
    for m, x in enumerate(factors):
        label = f"{name}[{m}]" if several else name
        check_operand(label, x, *first)
        if not 1 <= x.ndim <= 2:
            raise ValueError(f"{label}: expected two dims, rows and terms, got shape {tuple(x.shape)}")
        shape = broadcast(shape, label, tuple(x.shape), ", ".join([f"{name}[{i}]" for i in range(m)]))
    if len(shape) != 2:
        raise ValueError(f"{name}: expected two dims, rows and terms, got shape {shape}")
    return tuple(_expanded(x, shape) for x in factors), (shape[0], shape[1])


def _masks(name: str, given: Any, side: str, factors: Sequence[Any]) -> list[Any]:
    """Check the masks of one side; return one or None per factor, each of shape (rows,)."""
    if given is None:
        return [None] * len(factors)
    found = per_factor(name, given, len(factors), ())
    for m, (mask, factor) in enumerate(zip(found, factors, strict=True)):
        if mask is not None:
            check_mask(f"{name}[{m}]", mask, f"{side}[{m}]", factor, tuple(factor.shape), -1)
            found[m] = _expanded(reference.align_mask(mask, factor)[:, 0], (factor.shape[0],))
    return found


def _check_vector(name: str, x: Any, length: int, meaning: str, first: tuple[str, Any]) -> None:
    if x is not None:
        check_operand(name, x, *first)
        _check_length(name, x, length, meaning)


def _check_length(name: str, x: Any, length: int, meaning: str) -> None:
    if tuple(x.shape) != (length,):
        raise ValueError(f"{name}: expected shape ({length},), {meaning}, got {tuple(x.shape)}")


def _check_integers(name: str, x: Any, length: int | None, of: str, first: tuple[str, Any]) -> None:
    """Raise an error unless x is a vector of integers; without a length, of any."""
    check_array(name, x, *first)
    if not _is_integer(x):
        raise TypeError(f"{name}: expected an integer dtype, got {reference.dtype_name(x)}")
    if length is not None:
        _check_length(name, x, length, f"as many as {of}" if " " not in of else of)
    elif x.ndim != 1:
        raise ValueError(f"{name}: expected one dim, got shape {tuple(x.shape)}")


def _check_pairs(exclude: Any, rows: int, columns: int | None, valid: str, first: tuple[str, Any]) -> None:
    if not is_tensor(exclude) and not isinstance(exclude, np.ndarray):
        raise TypeError(f"exclude: expected {valid}, got {type(exclude).__name__}")
    check_array("exclude", exclude, *first)
    if reference.dtype_name(exclude) != "bool":
        raise TypeError(f"exclude: expected {valid}, got an array of the dtype {reference.dtype_name(exclude)}")
    if columns is None and exclude.ndim == 2:
        columns = exclude.shape[1]
    if tuple(exclude.shape) != (rows, columns):
        shape = f"({rows}, {'of all ranks' if columns is None else columns})"
        raise ValueError(f"exclude: expected shape {shape}, queries by keys, got {tuple(exclude.shape)}")


def _check_scalar(name: str, x: Any, first_name: str, first: Any) -> None:
    """Raise an error unless x is a finite number or an array of no dims; the value of a tensor is taken as it is."""
    if isinstance(x, numbers.Real) and not isinstance(x, bool):
        if x != x or x in (math.inf, -math.inf):  # math.isfinite takes no symbolic number, which a compiler makes of x
            raise ValueError(f"{name}: expected a finite number, got {x}")
        return
    if not is_tensor(x) and not isinstance(x, (np.ndarray, np.generic)):
        raise TypeError(f"{name}: expected a number or an array of no dims, got {type(x).__name__}")
    check_operand(name, np.asarray(x) if isinstance(x, np.generic) else x, first_name, first)
    if x.ndim:
        raise ValueError(f"{name}: expected a number or an array of no dims, got shape {tuple(x.shape)}")
    if not is_tensor(x) and not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number, got {x}")


# ---- normal forms ----------------------------------------------------------------------------------------------------


def _expanded(x: Any, shape: tuple[int, ...]) -> Any:
    if tuple(x.shape) == shape:
        return x
    return x.expand(shape) if is_tensor(x) else np.broadcast_to(x, shape)


def _operands(call: Scores | Search) -> tuple[Any, ...]:
    return (*call.queries, *call.keys, *([] if call.fusion_weights is None else [call.fusion_weights]))


def _plain(x: Any) -> Any:
    """View memory maps as arrays, in tuples too; the native module takes no subclasses."""
    if type(x) is tuple:
        return tuple([_plain(entry) for entry in x])
    return x.view(np.ndarray) if isinstance(x, np.ndarray) else x


def number(x: Any) -> float:
    """Read a checked scalar."""
    return x if type(x) is float else float(x if isinstance(x, numbers.Real) else x.item())


def _longs(x: Any) -> Any:
    """Make int64 of a tensor of integers, contiguous."""
    return None if x is None else x.to(sys.modules["torch"].int64).contiguous()


def _integers(x: Any) -> np.ndarray:
    return np.asarray(x.cpu() if is_tensor(x) else x)


def _codes(name: str, queries: Any, keys: Any) -> tuple[Any, Any]:
    """Give equal integers of both sides equal codes, from 0 to `MAX_CODES` - 1."""
    if queries is None:
        return None, None
    check_one_kind(name, queries, keys)
    queries, keys = _integers(queries), _integers(keys)
    both = np.concatenate([queries, keys])
    if both.size and both.min() >= 0 and both.max() < MAX_CODES:
        codes = both
    else:
        distinct, codes = np.unique(both, return_inverse=True)
        if len(distinct) > MAX_CODES:
            raise ValueError(f"{name}: expected at most {MAX_CODES} distinct integers, got {len(distinct)}")
    codes = codes.astype(np.int32)
    return codes[: len(queries)], codes[len(queries) :]


def check_one_kind(name: str, queries: Any, keys: Any) -> None:
    """Raise an error for integers of both sides that no integer dtype holds: int64 and uint64; None passes."""
    names = [] if queries is None else [reference.dtype_name(x) for x in (queries, keys)]
    if "uint64" in names and any(name.startswith("int") for name in names):
        raise TypeError(f"{name}: expected one integer dtype on both sides, got {names[0]} and {names[1]}")


def _listed(exclude: Sequence[Any], first: Any) -> tuple[Any, Any]:
    """Concatenate the ids of each query; return the offsets and them, of the framework of the call's first array."""
    xp = sys.modules["torch"] if is_tensor(first) else np
    lists = [xp.zeros(0, dtype=xp.int64)]
    for b, ids in enumerate(exclude):
        if not isinstance(ids, (list, tuple, range, np.ndarray)) and not is_tensor(ids):
            raise TypeError(f"exclude[{b}]: expected a sequence of integers, the ids of keys, got {type(ids).__name__}")
        # To a compiler, lists are constants and arrays are tensors.
        listed = (
            _integers(ids) if xp is np else xp.as_tensor(list(ids) if isinstance(ids, range) else ids, device="cpu")
        )
        if listed.ndim != 1:
            raise ValueError(f"exclude[{b}]: expected one dim, got shape {tuple(listed.shape)}")
        if not _is_integer(listed) and listed.shape[0]:
            raise TypeError(f"exclude[{b}]: expected integers, the ids of keys, got {reference.dtype_name(listed)}")
        lists.append(xp.asarray(listed, dtype=xp.int64))
    offsets = list(itertools.accumulate([x.shape[0] for x in lists]))
    return xp.asarray(offsets, dtype=xp.int64), xp.concatenate(lists)


def _is_integer(x: Any) -> bool:
    return reference.dtype_name(x).startswith(("int", "uint"))


def _check_below(name: str, integers: np.ndarray, limit: int, meaning: str) -> None:
    outside = integers[(integers < 0) | (integers >= limit)]
    if outside.size:
        raise ValueError(f"{name}: expected integers from 0 to less than {limit}, {meaning}, got {outside[0]}")
