"""`contrastive_loss` and `sigmoid_loss`: the public functions.

What lives here: their documentation, and the routing of a call by the type of its arrays. What lives elsewhere: the checks
(``scores.py``), how statistics of scores become losses (``combination.py``), tensors (``autograd/losses.py``), statistics
in NumPy (``reference.py``), the kernels (``csrc/``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import reference
from .api import adopt_autograd
from .call import check_choice, is_tensor
from .combination import REDUCTIONS, Options, arrange, combine, combine_sigmoid
from .scores import Scores, check, check_flag, check_smoothing, evaluate


def contrastive_loss(
    queries: Any,
    keys: Any,
    *,
    fusion_weights: Any = None,
    logit_scale: Any = 1.0,
    key_bias: Any = None,
    labels: Any = None,
    key_labels: Any = None,
    exclude: Any = None,
    positives: str = "mean",
    symmetric: bool = True,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    activations: Any = None,
    key_activations: Any = None,
    present: Any = None,
    key_present: Any = None,
    absent: str = "one",
    group: Any = None,
) -> Any:
    """Cross-entropy of all pairs' scores (InfoNCE, CLIP, SupCon, MIL-NCE), without ever storing them.

    ``S[b, c] = logit_scale * sum_i fusion_weights[i] * queries[b, i] * keys[c, i] + key_bias[c]``, and the loss of query b
    is ``log sum_c exp(S[b, c])`` minus the score of its positive.

    Parameters
    ----------
    queries : numpy.ndarray, torch.Tensor or tuple of them
        One side, of shape (B, n), float64, float32, bfloat16 or float16; or up to eight factors, which broadcast to that
        shape and whose product is the side.
    keys : numpy.ndarray, torch.Tensor or tuple of them
        The other side, (C, n), alike.
    fusion_weights : None or array, optional
        The weights of the terms, (n,); None means all ones.
    logit_scale : float or array, optional
        The inverse temperature: any finite number, or an array of no dims. The value of a tensor is not checked.
    key_bias : None or array, optional
        Added to the scores of each key, (C,): minus the logarithm of its sampling probability, for sampled negatives.
    labels, key_labels : None or integer arrays, optional
        (B,) and (C,), both or neither: the keys whose label equals the query's are its positives. Without labels, key b is
        the positive of query b; keys beyond B are further negatives.
    exclude : None, pair of integer arrays or bool array, optional
        What is neither positive nor negative. A pair of ids (B,) and (C,): pairs of equal id that are not positives. A
        boolean array (B, C): the pairs where it is True, positives too.
    positives : {"mean", "any"}, optional
        For several positives of a query: the mean of their losses, or minus the logarithm of their summed probability.
    symmetric : bool, optional
        Average the queries' loss among the keys with the keys' loss among the queries.
    label_smoothing : float, optional
        From 0 to less than 1: the part of the loss in which all keys not excluded are positives.
    reduction : {"mean", "sum", "none"}, optional
        The mean over the queries that have a positive (if symmetric, half of it plus half of that over the keys that have
        one), the same of sums, or a loss per query (if symmetric, and one per key).
    return_lse : bool, optional
        Also return the log-sum-exp of each query's scores (if symmetric, and of each key's).
    activations, key_activations : None, str or sequence of (None or str), optional
        Of the factors of either side, as for `fusion_sum`.
    present, key_present : None or sequence of (None or bool array), optional
        One mask per factor of either side, (B,) or (C,), as for `fusion_sum`.
    absent : {"one", "zero"}, optional
        What an absent factor counts as.
    group : None, torch.distributed.ProcessGroup or fusionsum.distributed.Exchange, optional
        The processes whose rows are those of one batch. Each gives queries and keys of its own, any number of them, and
        key b is the positive of its own query b; labels and ids compare across processes. A boolean `exclude` has columns
        for the keys of all processes, in the order of the ranks. What is not rows must be the same everywhere.

    Returns
    -------
    scalar, array or tuple
        The loss: a scalar, or with reduction "none" an array (B,), or if symmetric a pair (B,), (C,). With `return_lse`
        ``(loss, query_lse)``, or if symmetric ``(loss, query_lse, key_lse)``. The dtype is that to which factors and
        weights promote.

    Raises
    ------
    TypeError
        For an argument of a wrong type or dtype, or arrays of different frameworks.
    ValueError
        For a wrong shape, device, name or value: sides of different n, fewer keys than queries without labels, labels of
        one side only.
    NotImplementedError
        For a second derivative, and in forward mode: there are first derivatives in reverse mode only. If `group` is given
        under torch.func, or with tensors that are not plain.
    RuntimeError
        If a process of `group` does not answer.

    Notes
    -----
    A query without any positive, or whose keys are all excluded, contributes 0 and is not counted; where none is counted,
    as for B = 0, the loss is 0. A log-sum-exp over no key is -inf, one with a score of +inf is +inf: then the loss is +inf
    where the positive's score is finite, and NaN where it is +inf too, or with label smoothing. A key whose score is -inf
    has the probability 0: as the positive its loss is +inf, and label smoothing counts it as excluded.

    With tensors, the loss and the log-sum-exps have gradients for both sides, `fusion_weights`, `logit_scale` and
    `key_bias`. Scores are accumulated in float32 (float64 if an argument is), sums over them in float64. Results are
    bit-identical for every number of threads. On a GPU nothing waits for it: values are not checked there, float32 is
    multiplied as torch's settings say, and labels and ids may not change before backward.

    With a `group`, a process returns the losses and log-sum-exps of its own rows, among the rows of all: with "sum" they
    add up, and with "mean" they average, over the processes, to what one process returns that holds all rows. Where all
    have as many rows that count, "mean" is that of a process's own rows. Gradients are those of the sum of all processes'
    outputs, each times its own gradient: of a process's rows they are whole, of `fusion_weights` and `logit_scale` they are
    its queries' part. So the average that DistributedDataParallel and FSDP make of gradients is the gradient of the mean
    over all rows. In backward all processes must take part, too. See docs/distributed.md.

    References
    ----------
    A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3;
    P. Khosla et al., "Supervised Contrastive Learning", 2020, eq. 2 (``positives="mean"``); A. Miech et al., "End-to-End
    Learning of Visual Representations from Uncurated Instructional Videos", 2020, eq. 1 (``positives="any"``).

    Examples
    --------
    >>> import numpy as np, fusionsum as fs
    >>> images, texts = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> round(float(fs.contrastive_loss(images, texts, logit_scale=2.0)), 6)  # log(1 + exp(-2))
    0.126928
    >>> fs.contrastive_loss(images, texts, labels=np.array([0, 7]), key_labels=np.array([7, 0]), reduction="none")
    (array([1.31326169, 1.31326169]), array([1.31326169, 1.31326169]))
    """
    sides = queries, keys, activations, key_activations, present, key_present, absent, fusion_weights, key_bias
    pairs = logit_scale, 0.0, labels, key_labels, exclude
    chosen = positives, symmetric, label_smoothing, reduction, return_lse
    if group is not None:
        from .distributed import losses as shared  # imports torch

        return shared.contrastive_loss(group, lambda: (check(*sides, *pairs, elsewhere=True), _checked(*chosen)))
    scores, options = check(*sides, *pairs), _checked(*chosen)
    if is_tensor(scores.queries[0]):
        return adopt_autograd().losses.contrastive_loss(scores, options)
    of_queries, of_keys = evaluate("softmax_stats", *scores.read(), options.any, options.symmetric, options.totals)
    with np.errstate(all="ignore"):  # infinities and NaN give no warnings, as in the kernels and torch
        return arrange(
            [_rounded(x, scores) for x in combine(np, of_queries, of_keys, options, scores.diagonal)], options
        )


def sigmoid_loss(
    queries: Any,
    keys: Any,
    *,
    fusion_weights: Any = None,
    logit_scale: Any = 1.0,
    logit_bias: Any = 0.0,
    labels: Any = None,
    key_labels: Any = None,
    exclude: Any = None,
    reduction: str = "mean",
    activations: Any = None,
    key_activations: Any = None,
    present: Any = None,
    key_present: Any = None,
    absent: str = "one",
    group: Any = None,
) -> Any:
    """Binary cross-entropy of every pair (SigLIP), without ever storing the pairs' scores.

    ``S[b, c] = logit_scale * sum_i fusion_weights[i] * queries[b, i] * keys[c, i] + logit_bias``, and the loss of query b
    is ``sum_c log(1 + exp(-z S[b, c]))`` with z = 1 where key c is a positive of query b, else -1.

    Parameters
    ----------
    queries, keys, fusion_weights, logit_scale, labels, key_labels, exclude
        As for `contrastive_loss`.
    logit_bias : float or array, optional
        Added to every score: any finite number, or an array of no dims.
    reduction : {"mean", "sum", "none"}, optional
        The sum over all pairs divided by B, as SigLIP's; that sum; or a loss per query.
    activations, key_activations, present, key_present, absent, group
        As for `contrastive_loss`.

    Returns
    -------
    scalar or array
        The loss; with reduction "none" an array (B,). The dtype is that to which factors and weights promote.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As for `contrastive_loss`.

    Notes
    -----
    Every pair counts that is not excluded; for B = 0 the loss is 0. With tensors it has gradients for both sides,
    `fusion_weights`, `logit_scale` and `logit_bias`. Results are bit-identical for every number of threads. With a `group`,
    a process returns the losses of its own queries among all keys, as `contrastive_loss` does.

    References
    ----------
    X. Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, algorithm 1.

    Examples
    --------
    >>> import numpy as np, fusionsum as fs
    >>> images, texts = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> round(float(fs.sigmoid_loss(images, texts, logit_scale=4.0, logit_bias=-2.0)), 6)  # 2 log(1 + exp(-2))
    0.253856
    """
    sides = queries, keys, activations, key_activations, present, key_present, absent, fusion_weights, None
    pairs = logit_scale, logit_bias, labels, key_labels, exclude
    if group is not None:
        from .distributed import losses as shared

        return shared.sigmoid_loss(
            group, lambda: (check(*sides, *pairs, elsewhere=True), _checked_reduction(reduction))
        )
    scores, reduction = check(*sides, *pairs), _checked_reduction(reduction)
    if is_tensor(scores.queries[0]):
        return adopt_autograd().losses.sigmoid_loss(scores, reduction)
    of_queries = evaluate("sigmoid_stats", *scores.read())
    with np.errstate(all="ignore"):
        return _rounded(combine_sigmoid(of_queries, reduction), scores)


def _checked(positives: Any, symmetric: Any, label_smoothing: Any, reduction: Any, return_lse: Any) -> Options:
    check_choice("positives", positives, ("mean", "any"))
    return Options(
        positives == "any",
        check_flag("symmetric", symmetric),
        check_smoothing(label_smoothing),
        _checked_reduction(reduction),
        check_flag("return_lse", return_lse),
    )


def _checked_reduction(reduction: Any) -> str:
    check_choice("reduction", reduction, REDUCTIONS)
    return reduction


def _rounded(x: Any, scores: Scores) -> Any:
    """Round a result to the dtype to which factors and weights promote; a scalar for no dims."""
    return np.asarray(x).astype(reference.result_dtype(*scores.operands))[()]
