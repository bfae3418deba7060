"""`top_k` and `ranks`: exact search among the scores of all pairs, and the places of known answers.

What lives here: the public functions. What lives elsewhere: the checks (``scores.py``), tensors (``autograd/search.py``),
the same in NumPy (``reference.py``), the kernels (``csrc/``).
"""

from __future__ import annotations

import sys
from typing import Any

from .api import adopt_autograd
from .call import check_choice, is_tensor
from .combination import TIES, combine_ranks
from .scores import Search, check_k, check_search, check_targets, evaluate, first_name, read_targets


def top_k(
    queries: Any,
    keys: Any,
    k: int,
    *,
    fusion_weights: Any = None,
    key_bias: Any = None,
    exclude: Any = None,
    activations: Any = None,
    key_activations: Any = None,
    present: Any = None,
    key_present: Any = None,
    absent: str = "one",
    group: Any = None,
) -> tuple[Any, Any]:
    """Find the k keys of the greatest scores for each query, exactly, without ever storing all scores.

    ``S[b, c] = sum_i fusion_weights[i] * queries[b, i] * keys[c, i] + key_bias[c]``

    Parameters
    ----------
    queries, keys, fusion_weights
        As for `contrastive_loss`. The keys may be a memory map larger than the memory; they are read once, in order.
    k : int
        From 0 to the number of keys.
    key_bias : None or array, optional
        Added to the scores of each key, (C,); with ``-0.5 * (keys**2).sum(1)`` the order is that of Euclidean distances.
    exclude : None, bool array, list or tuple, optional
        The keys that a query leaves out: where a boolean array (B, C) is True; or for each query a sequence of their
        numbers, in a list or tuple of B of them; or the tuple of two integer arrays (offsets, ids), where query b leaves
        out ``ids[offsets[b] : offsets[b + 1]]``. A tuple of two arrays is always the latter; for two queries, give a list.
        A compiler takes the numbers in lists for constants, and compiles anew for others; it takes arrays for any.
    activations, key_activations, present, key_present, absent
        As for `contrastive_loss`.
    group : None, torch.distributed.ProcessGroup or fusionsum.distributed.Exchange, optional
        The processes among which the keys are: each gives some of them, any number, and queries of its own, and gets what
        is found among all keys. Keys have the numbers that they have in the order of the ranks, in `exclude` too. With
        ``Exchange(queries="shared")`` all ask for the same queries, which are then searched for once, not by each.

    Returns
    -------
    values : numpy.ndarray or torch.Tensor
        (B, k), the scores, in float64 if an argument is, else in float32, in which they are accumulated.
    indices : numpy.ndarray or torch.Tensor
        (B, k), int64: the numbers of the keys.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As for `contrastive_loss`, but a second derivative is an error with a `group` only; for a `k` out of range; for ids
        out of range.

    Notes
    -----
    The order is that of a stable sort: greater scores first, equal ones by lower index, NaN after all numbers. Where fewer
    than k keys are left, the last places have the value -inf and the index -1. With tensors, the values have gradients.
    On a GPU nothing waits for it: ids that are there and out of range leave out nothing.
    With a `group` queries travel, and keys stay where they are: each process may map its own file into memory. Gradients
    are those of the sum of all processes' values, each times its own gradient; in backward all must take part.

    Examples
    --------
    >>> import numpy as np, fusionsum as fs
    >>> keys = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> fs.top_k(np.array([[3.0, 1.0]]), keys, 2)
    (array([[4., 3.]]), array([[2, 0]]))
    >>> fs.top_k(np.array([[3.0, 1.0]]), keys, 2, exclude=[[2]])
    (array([[3., 1.]]), array([[0, 1]]))
    """
    sides = queries, keys, activations, key_activations, present, key_present, absent, fusion_weights, key_bias
    if group is not None:
        from .distributed import search as shared  # imports torch

        return shared.top_k(group, lambda: (check_search(*sides, exclude, elsewhere=True), check_k(k, sys.maxsize)))
    search = check_search(*sides, exclude)
    k = check_k(k, search.keys[0].shape[0])
    if is_tensor(search.queries[0]):
        return adopt_autograd().search.top_k(search, k)
    return evaluate("top_k", *search.read(), k)


def ranks(
    queries: Any,
    keys: Any,
    targets: Any,
    *,
    fusion_weights: Any = None,
    key_bias: Any = None,
    exclude: Any = None,
    ties: str = "mean",
    activations: Any = None,
    key_activations: Any = None,
    present: Any = None,
    key_present: Any = None,
    absent: str = "one",
    group: Any = None,
) -> Any:
    """Find the place, from 1, of each query's target among the keys ordered by score.

    Parameters
    ----------
    queries, keys, fusion_weights, key_bias, exclude
        As for `top_k`. The target is never excluded: for the filtered protocol of link prediction, give all known answers.
    targets : integer array
        (B,), the number of the key whose rank is asked for.
    ties : {"mean", "optimistic", "pessimistic"}, optional
        Whether half of, none of or all the other keys with the target's score count as before it.
    activations, key_activations, present, key_present, absent
        As for `contrastive_loss`.
    group
        As for `top_k`; the targets' numbers are those of the keys of all processes.

    Returns
    -------
    numpy.ndarray or torch.Tensor
        (B,), float64 for "mean", else int64. A target whose score is NaN comes last, and on a GPU, where values are not
        checked, one out of range.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As for `top_k`; for targets out of range.

    References
    ----------
    M. Berrendorf et al., "On the Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction Methods", 2020,
    section 3 ("mean" is its realistic rank); filtering: A. Bordes et al., "Translating Embeddings for Modeling
    Multi-relational Data", 2013, section 4.2.

    Examples
    --------
    >>> import numpy as np, fusionsum as fs
    >>> queries, keys = np.array([[1.0], [1.0]]), np.array([[3.0], [1.0], [1.0]])
    >>> fs.ranks(queries, keys, np.array([0, 1]))
    array([1. , 2.5])
    >>> fs.ranks(queries, keys, np.array([0, 1]), exclude=[[], [0]], ties="optimistic")
    array([1, 1])
    """
    sides = queries, keys, activations, key_activations, present, key_present, absent, fusion_weights, key_bias

    def checked(elsewhere: bool) -> Search:
        search = check_search(*sides, exclude, elsewhere)
        check_choice("ties", ties, TIES)
        check_targets(targets, search, first_name(queries))
        return search

    if group is not None:
        from .distributed import search as shared

        return shared.ranks(group, lambda: checked(True), targets, ties)
    search = checked(False)
    if is_tensor(search.queries[0]):
        return adopt_autograd().search.ranks(search, targets, ties)
    greater, equal = evaluate("ranks", *search.read(), read_targets(targets, search.keys[0].shape[0]))
    return combine_ranks(greater, equal, ties)
