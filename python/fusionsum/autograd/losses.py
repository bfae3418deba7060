"""The losses over scores for tensors: as plain autograd records them, and as registered operations.

    S[b, c] = logit_scale * sum_i alpha_i prod_m phi_m(q_m[b, i]) prod_m psi_m(k_m[c, i]) + logit_bias + key_bias[c]

What lives here: which way a loss takes; the operations ``contrastive_loss``, ``softmax_grad``, ``sigmoid_loss`` and
``sigmoid_grad``, a record each; the way from the gradients of the sides' products to those of the arguments. What lives
elsewhere: the checks (``scores.py``), statistics to losses and back (``combination.py``), the kernels (``tensors.py``).

The ways are those of ``routing.py``. Nothing records: the kernels are called. Autograd records plain tensors: `_Recorded`
calls them, and statistics and coefficients are NumPy's vectors. Something watches: it sees the operations. All of them save
statistics, never scores; a sigmoid loss that is summed saves its gradients, found in the same pass.

A loss is differentiated once: the gradients of ``softmax_grad`` and ``sigmoid_grad`` are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference, tensors
from ..call import on_gpu
from ..combination import Options, arrange, coefficients, coefficients_sigmoid, combine, combine_sigmoid
from ..scores import Scores
from . import dtensor, routing, schema
from .registration import apply, layered
from .sides import KEY_BIAS, KEYS, QUERIES, WEIGHTS, arrays, once, plain, record, requiring, sides, wide, with_arrays

_LOGIT_SCALE, _LOGIT_BIAS = (Scores._fields.index(name) for name in ("logit_scale", "logit_bias"))


def contrastive_loss(scores: Scores, options: Options) -> Any:
    """Evaluate `losses.contrastive_loss` for tensors; takes checked arguments."""
    return arrange(_evaluated(Contrastive(*options), options, scores), options)


def sigmoid_loss(scores: Scores, reduction: str) -> Tensor:
    """Evaluate `losses.sigmoid_loss` for tensors; takes checked arguments."""
    keep = [False] * 4
    if reduction != "none" and torch.is_grad_enabled() and not layered():  # functorch asks for what has a derivative
        keep = asked(Sigmoid, scores)
    return _evaluated(Sigmoid(reduction, keep), (reduction, keep), scores)[0]


# ---- the losses: outputs from one pass over the scores, gradients from a second one if need be -----------------------


class Contrastive:
    """Keeps the statistics: (5, B) and, if symmetric, (5, C). A subclass may have other `tiles`, and count other rows."""

    name = "contrastive_loss"
    schema = "bool any_positive, bool symmetric, float label_smoothing, str reduction, bool return_lse"
    bias = KEY_BIAS  # the place of the bias that has a gradient
    tiles: Any = tensors  # who evaluates scores
    counts: Any = None

    def __init__(self, *options: Any) -> None:
        self.options = Options(*options)

    def shapes(self, rows: int, columns: int) -> list[tuple[int, ...]]:
        """Return the shapes of the outputs."""
        vectors: list[tuple[int, ...]] = [(rows,), (columns,)] if self.options.symmetric else [(rows,)]
        return [*(vectors if self.options.reduction == "none" else [()]), *(vectors if self.options.return_lse else [])]

    def empty(self, scores: Scores) -> list[Tensor]:
        """Return what is kept, without data."""
        first = scores.queries[0], scores.keys[0]
        return [x.new_empty((5, x.shape[0]), dtype=torch.float64) for x in first[: 1 + self.options.symmetric]]

    def keeps(self) -> int:
        """Return how many tensors are kept."""
        return 1 + self.options.symmetric

    def evaluate(self, scores: Scores) -> tuple[Any, list[Tensor]]:
        """Evaluate the outputs, float64 arrays, and what is kept, for scores that are read."""
        of_queries, of_keys = self.tiles.softmax_stats(
            scores, self.options.any, self.options.symmetric, self.options.totals
        )
        self.counts = self.count(of_queries, of_keys, scores)
        kept = [torch.as_tensor(x) for x in (of_queries, of_keys) if x is not None]
        return combine(namespace(scores), of_queries, of_keys, self.options, scores.diagonal, self.counts), kept

    def count(self, of_queries: Any, of_keys: Any, scores: Scores) -> Any:
        """Return by how many queries and keys means divide, where not by those of these that have a positive."""

    def gradients(
        self, is_plain: bool, upstream: Any, needed: list[bool], scores: Scores, kept: Any, differentiate: Any
    ) -> Any:
        """Evaluate those of the gradients that are `needed`; `upstream` has one array, or None, per output."""
        xp = namespace(scores, is_plain)
        of_queries, of_keys, *_ = [*(x.numpy() if xp is np else x for x in kept), None]
        coefs = coefficients(xp, of_queries, of_keys, self.options, upstream, scores.diagonal, self.counts)
        return differentiate("softmax_grad", *coefs, self.options.any, needed)


class Sigmoid:
    """Keeps the gradients that the caller says, of a sum or mean: one pass finds them with the loss.

    Where the kernels are called it hands them over once, so there is one instance for each call.
    """

    name = "sigmoid_loss"
    schema = "str reduction, bool[] keep"
    bias = _LOGIT_BIAS
    tiles: Any = tensors
    count: float | None = None  # by which a mean divides, where not by these rows

    def __init__(self, reduction: str, keep: Sequence[bool]) -> None:
        self.reduction, self.keep = reduction, keep

    def shapes(self, rows: int, columns: int) -> list[tuple[int, ...]]:
        """Return the shapes of the outputs."""
        return [(rows,) if self.reduction == "none" else ()]

    def empty(self, scores: Scores) -> list[Tensor]:
        """Return what is kept, without data."""
        return _empty(scores, self.keep, self.bias)

    def keeps(self) -> int:
        """Return how many tensors are kept."""
        return sum(self.keep)

    @np.errstate(all="ignore")  # infinities and NaN give no warnings, as in torch
    def evaluate(self, scores: Scores) -> tuple[Any, list[Tensor]]:
        """Evaluate the output, a float64 array, and what is kept, for scores that are read."""
        if not any(self.keep):
            return [combine_sigmoid(self.tiles.sigmoid_stats(scores), self.reduction, self.count)], []
        first = scores.queries[0]
        one = first.new_ones((), dtype=torch.float64) if on_gpu(first) else np.float64(1)
        coefs = coefficients_sigmoid(namespace(scores), one, len(first), self.reduction, self.count)
        of_queries, found = self.tiles.sigmoid_stats_and_grad(coefs, scores, self.keep)
        return [combine_sigmoid(of_queries, self.reduction, self.count)], found

    def gradients(
        self, is_plain: bool, upstream: Any, needed: list[bool], scores: Scores, kept: Any, differentiate: Any
    ) -> Any:
        """Evaluate those of the gradients that are `needed`; `upstream` has the one of the output."""
        # Where a second derivative may follow, only the operation can raise the error that there is none.
        kept_all = all(has or not need for has, need in zip(self.keep, needed, strict=True))
        if not torch.is_grad_enabled() and kept_all and self.may_scale(upstream[0]):
            wanted = [need for has, need in zip(self.keep, needed, strict=True) if has]
            found = [d for d, need in zip(kept, wanted, strict=True) if need]
            if not is_plain:  # operations change nothing
                return [d * upstream[0] for d in found]
            # Handed over as they lie, for a copy would double the memory; of `data`, whose changes autograd does not see.
            # A second call for the same graph finds none and computes them anew.
            self.keep = [False] * len(needed)
            return [d.data.mul_(upstream[0]) for d in found]
        coefs = coefficients_sigmoid(
            namespace(scores, is_plain), upstream[0], scores.queries[0].shape[0], self.reduction, self.count
        )
        return differentiate("sigmoid_grad", coefs, needed)

    def may_scale(self, upstream: Any) -> bool:
        """Tell whether the gradients kept, times that of the output, are the gradients."""
        return True


# ---- gradients: of the queries' side, the keys' side, logit_scale, and key_bias or logit_bias ------------------------


def asked(loss: Any, scores: Scores) -> list[bool]:
    """Tell which of these gradients autograd may ask for."""
    return _needed(requiring(scores), loss.bias)


def _needed(needs: Sequence[Any], bias: int) -> list[bool]:
    """Tell which of these gradients the arguments need."""
    return [any(needs[QUERIES]) or needs[WEIGHTS], any(needs[KEYS]), needs[_LOGIT_SCALE], needs[bias]]


def _empty(scores: Scores, needed: Sequence[bool], bias: int) -> list[Tensor]:
    """Return tensors without data for the gradients that are needed."""
    like, dtype, of_bias = scores.queries[0], wide(scores), [*scores][bias]
    found = [(like.shape, dtype), (scores.keys[0].shape, dtype), ((), torch.float64)]
    found.append((() if of_bias is None else of_bias.shape, torch.float64))
    return [like.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(found, needed, strict=True) if need]


def _gradients(
    loss: Any, is_plain: bool, grads: Sequence[Any], needs: Sequence[Any], scores: Scores, kept: Any, differentiate: Any
) -> Scores:
    """Gradients of the fields of `scores`, None for all but some, from those of the outputs and of what was kept."""
    if namespace(scores, is_plain) is np:  # a number or a vector of float64
        upstream = [d if d is None else d.double().numpy() if d.ndim else d.item() for d in grads]
    else:
        upstream = [d if d is None else d.double() for d in grads]
    needed = _needed(needs, loss.bias)
    found = iter(loss.gradients(is_plain, upstream, needed, scores, kept, differentiate))
    d_queries, d_keys, d_scale, d_bias = [next(found) if need else None for need in needed]

    queries, keys = sides(scores)
    d_weights, *of_queries = queries.grads(d_queries, [needs[WEIGHTS], *needs[QUERIES]])
    _, *of_keys = keys.grads(d_keys, [False, *needs[KEYS]])
    others: dict[int, Any] = {WEIGHTS: d_weights}
    for place, d in ((_LOGIT_SCALE, d_scale), (loss.bias, d_bias)):
        others[place] = d if d is None else d.to([*scores][place].dtype)
    masks = [None] * (len(scores.queries) + len(scores.keys))
    return with_arrays(scores, [*of_queries, *of_keys, *masks, *map(others.get, range(WEIGHTS, len(scores)))])


def namespace(scores: Scores, is_plain: bool = True) -> Any:
    """Return of which module's functions statistics and coefficients are made.

    Torch's operate on what a GPU has, and can be watched: a call that is not plain may be.
    """
    return np if is_plain and not on_gpu(scores.queries[0]) else torch


# ---- the ways --------------------------------------------------------------------------------------------------------


def _evaluated(loss: Any, options: Sequence[Any], scores: Scores) -> Sequence[Tensor]:
    """Return the outputs of a loss; `options` are those of its operation."""
    given = arrays(scores)
    found = [x for x in given if isinstance(x, Tensor)]
    if not routing.is_plain(found):
        dtensor.refuse(loss.name, found)
        outputs = apply(loss.name, *schema.side_arguments(_as_tensors(scores)), *options)
        return outputs[: len(loss.shapes(0, 0))]
    return evaluated(loss, scores, scores.read())


def evaluated(loss: Any, scores: Scores, read: Scores) -> Sequence[Tensor]:
    """Return the outputs of a loss of plain tensors, which autograd may record; `read` are the scores, read."""
    given = arrays(scores)
    if not routing.records([x for x in given if isinstance(x, Tensor)]):
        return _rounded(loss.evaluate(read)[0], scores)
    values = arrays(read)
    # Integers have no gradients, and were read once.
    places = [i for i, x in enumerate(given) if isinstance(x, Tensor) and not isinstance(values[i], np.ndarray)]
    return _record(loss, scores, read, places, *[given[i] for i in places])


def _result_dtype(scores: Scores) -> torch.dtype:
    """Return the dtype to which factors and weights promote."""
    return getattr(torch, reference.promoted(scores.operands))


def _rounded(outputs: Sequence[Any], scores: Scores) -> list[Tensor]:
    dtype = _result_dtype(scores)
    if on_gpu(scores.queries[0]):
        return [x.to(dtype, copy=True) for x in outputs]  # operations may not return what is kept, too
    # torch.tensor takes 4 us for a number
    return [torch.tensor(x, dtype=dtype) if np.ndim(x) else torch.scalar_tensor(x, dtype=dtype) for x in outputs]


def _as_tensors(scores: Scores) -> Scores:
    """Make tensors of numbers, and of codes: operations take no others.

    Of numbers where the queries are: a compiler makes no CUDA graph of what has a tensor of the CPU.
    """
    device = scores.queries[0].device

    def tensor(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return torch.from_numpy(x)
        return (
            torch.scalar_tensor(x, dtype=torch.float64, device=device) if isinstance(x, (int, float, np.number)) else x
        )

    names = "logit_scale", "logit_bias", "query_labels", "key_labels", "query_ids", "key_ids"
    return scores._replace(**{name: tensor(getattr(scores, name)) for name in names})


class _Recorded(torch.autograd.Function):
    """A loss as plain autograd records it: of scores, the same read, the places of its tensors among `arrays`, and these.

    It saves the tensors, and what the loss keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Any, scores: Scores, read: Scores, places: Sequence[int], *given: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, kept = loss.evaluate(read)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, *kept)
        values = [None if isinstance(x, Tensor) else x for x in arrays(read)]
        ctx.loss, ctx.read, ctx.places = loss, with_arrays(read, values), places
        return tuple(_rounded(outputs, scores))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if all(d is None for d in grads):
            return (None,) * len(ctx.needs_input_grad)
        places, saved = ctx.places, ctx.saved_tensors
        kept = saved[len(places) :]
        values, needed = [*arrays(ctx.read)], [False] * len(arrays(ctx.read))
        for place, x, need in zip(places, saved, ctx.needs_input_grad[-len(places) :], strict=False):
            values[place], needed[place] = x, need
        scores, needs = with_arrays(ctx.read, values), with_arrays(ctx.read, needed)
        found = [x for x in (*grads, *saved) if x is not None]
        if routing.is_plain(found) and not routing.records(found):
            scalars = {"logit_scale": ctx.read.logit_scale, "logit_bias": ctx.read.logit_bias}
            read = scores.read() if on_gpu(scores.queries[0]) else scores._replace(**scalars)
            gradients = _gradients(ctx.loss, True, grads, needs, scores, kept, _by_tiles(ctx.loss.tiles, read))
        elif ctx.loss.tiles is not tensors:
            once(ctx.loss.name)
        else:
            of_scores = schema.side_arguments(_as_tensors(scores))
            gradients = _gradients(ctx.loss, False, grads, needs, scores, kept, _by_operations(of_scores))
        flat = arrays(gradients)
        return None, None, None, None, *[flat[place] for place in places]


# Past the Python of Function.apply, as in ``routing.py``.
_record = super(torch.autograd.Function, _Recorded).apply


def _by_tiles(tiles: Any, read: Scores) -> Callable[..., list[Tensor]]:
    return lambda name, *head: getattr(tiles, name)(*head[:-1], read, head[-1])


def _by_operations(of_scores: Sequence[Any]) -> Callable[..., list[Tensor]]:
    return lambda name, *head: apply(name, *head[:-1], *of_scores, head[-1])


# ---- the operations --------------------------------------------------------------------------------------------------


def _split(inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return inputs[: len(Scores._fields)], inputs[len(Scores._fields) :]


def _record_loss(kind: Any) -> None:
    def kernel(*inputs: Any) -> list[Tensor]:
        of_scores, options = _split(inputs)
        scores = schema.scores_of(plain(of_scores))
        outputs, kept = kind(*options).evaluate(scores.read())
        return [*_rounded(outputs, scores), *kept]

    def fake(*inputs: Any) -> list[Tensor]:
        of_scores, options = _split(inputs)
        scores, loss = schema.scores_of(of_scores), kind(*options)
        queries, keys = scores.queries[0], scores.keys[0]
        dtype, shapes = _result_dtype(scores), loss.shapes(queries.shape[0], keys.shape[0])
        return [*(queries.new_empty(shape, dtype=dtype) for shape in shapes), *loss.empty(scores)]

    def keeps(*inputs: Any) -> int:
        return kind(*_split(inputs)[1]).keeps()

    def backward(grads: Any, needs: Any, *rest: Any) -> tuple[Any, ...]:
        *inputs, kept = rest
        of_scores, options = _split(inputs)
        scores, loss = schema.scores_of(of_scores), kind(*options)
        upstream = grads[: len(grads) - len(kept)]
        found = _gradients(loss, False, upstream, needs, scores, kept, _by_operations(of_scores))
        nothing = [None] * (WEIGHTS - 2), [None] * len(options)
        return list(found.queries), list(found.keys), *nothing[0], *found[WEIGHTS:], *nothing[1]

    record(
        kind.name,
        kind.name,
        schema=f"({schema.SCORES}, {kind.schema}) -> Tensor[]",
        kernel=kernel,
        fake=fake,
        backward=backward,
        keeps=keeps,
    )


_record_loss(Contrastive)
_record_loss(Sigmoid)


def _coefs(x: Tensor, scores: Scores) -> Any:
    """Give coefficients as the kernels take them."""
    return x if on_gpu(scores.queries[0]) else x.contiguous().numpy()


def _softmax_grad_kernel(query_coefs: Tensor, key_coefs: Any, any_positive: bool, *rest: Any) -> list[Tensor]:
    *of_scores, needed = rest
    scores = schema.scores_of(plain(of_scores)).read()
    of_queries, of_keys = (x if x is None else _coefs(x, scores) for x in plain([query_coefs, key_coefs]))
    return tensors.softmax_grad(of_queries, of_keys, any_positive, scores, needed)


def _softmax_grad_fake(query_coefs: Tensor, key_coefs: Any, any_positive: bool, *rest: Any) -> list[Tensor]:
    *of_scores, needed = rest
    return _empty(schema.scores_of(of_scores), needed, Contrastive.bias)


record(
    "softmax_grad",
    Contrastive.name,
    schema=f"(Tensor query_coefs, Tensor? key_coefs, bool any_positive, {schema.SCORES}, bool[] needed) -> Tensor[]",
    kernel=_softmax_grad_kernel,
    fake=_softmax_grad_fake,
)


def _sigmoid_grad_kernel(coefs: Tensor, *rest: Any) -> list[Tensor]:
    *of_scores, needed = rest
    scores = schema.scores_of(plain(of_scores)).read()
    return tensors.sigmoid_grad(_coefs(plain([coefs])[0], scores), scores, needed)


def _sigmoid_grad_fake(coefs: Tensor, *rest: Any) -> list[Tensor]:
    *of_scores, needed = rest
    return _empty(schema.scores_of(of_scores), needed, Sigmoid.bias)


record(
    "sigmoid_grad",
    Sigmoid.name,
    schema=f"(Tensor coefs, {schema.SCORES}, bool[] needed) -> Tensor[]",
    kernel=_sigmoid_grad_kernel,
    fake=_sigmoid_grad_fake,
)
