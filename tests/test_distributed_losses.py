"""The losses over rows on several processes: equal to one process that holds all rows, in every value and gradient.

What lives elsewhere: the losses themselves (``test_losses.py``), messages and agreement (``test_distributed_exchange.py``),
training steps (``test_distributed_training.py``).
"""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist

import fusionsum as fs
from fusionsum.distributed import Exchange
from ranks import ranks, sample, samples

WORLDS = (1, 2, 3, 4)
ROWS = ("even", "hard negatives", "uneven")
METHODS = ("gather", "ring")
N = 24


def rows_of(kind: str, world: int) -> tuple[list[int], list[int]]:
    """How many queries and keys each rank has."""
    if kind == "even":
        return [7] * world, [7] * world
    if kind == "hard negatives":
        return [5] * world, [9, 5, 7, 12][:world]
    return [6, 0, 11, 3][:world], [8, 2, 11, 3][:world]  # uneven, and a rank without queries


# What a call adds to the two sides, by name: a function of the generator and of the numbers of all queries and keys.
CASES: dict[str, Any] = {
    "plain": lambda rng, b, c: {},
    "labels": lambda rng, b, c: {"labels": rng.integers(0, 5, b), "key_labels": rng.integers(0, 6, c)},
    "rare labels": lambda rng, b, c: {
        "labels": rng.integers(-9, 3, b) * 2**40,
        "key_labels": rng.integers(-9, 9, c) * 2**40,
    },
    "ids": lambda rng, b, c: {"exclude": (rng.integers(0, 9, b), rng.integers(0, 9, c))},
    "labels and ids": lambda rng, b, c: {
        "labels": rng.integers(0, 5, b),
        "key_labels": rng.integers(0, 6, c),
        "exclude": (rng.integers(0, 9, b), rng.integers(0, 9, c)),
    },
    "pairs": lambda rng, b, c: {"exclude": rng.random((b, c)) < 0.3},
    "all pairs excluded": lambda rng, b, c: {"exclude": np.ones((b, c), bool)},
    "weights and bias": lambda rng, b, c: {"fusion_weights": rng.normal(size=N), "key_bias": rng.normal(size=c)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "one direction": {"symmetric": False},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.2},
    "any": {"positives": "any"},
    "lse": {"return_lse": True},
}
SIDES = ("one factor", "M = 3, masked")


def batch(function: str, case: str, rows: str, sides: str, world: int, dtype: str) -> dict[str, Any]:
    """Return the arguments that one process gives that holds all rows: every rank's queries, and its keys."""
    of_queries, of_keys = rows_of(rows, world)
    b, c = sum(of_queries), sum(of_keys)
    rng = np.random.default_rng(sum(map(ord, case + rows + sides)) + world)
    given = CASES[case](rng, b, c)
    factors = {"queries": [rng.normal(size=(b, N))], "keys": [rng.normal(size=(c, N))]}
    if sides != SIDES[0]:
        factors["keys"] += [rng.normal(size=(c, N)) for _ in range(2)]
        factors["queries"] += [rng.normal(size=(b, N))]
        given |= {"activations": [None, "tanh"], "key_activations": ["tanh", None, "sigmoid"]}
        given |= {"present": [rng.random(b) > 0.3, None], "key_present": [None, rng.random(c) > 0.3, None]}
    given |= {name: tuple(torch.from_numpy(x) for x in xs) for name, xs in factors.items()}
    given["logit_scale"] = np.array(0.7 / np.sqrt(N))
    if function == "sigmoid_loss":
        given.pop("key_bias", None)
        given["logit_bias"] = np.array(-0.5)

    def tensor(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(map(tensor, x))
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        return (
            x.to(getattr(torch, dtype)).requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        )

    return {name: tensor(x) for name, x in given.items()}


def of_rank(given: dict[str, Any], rank: int, of_queries: list[int], of_keys: list[int]) -> dict[str, Any]:
    """Return the arguments that a rank gives."""
    some = [slice(sum(of[:rank]), sum(of[: rank + 1])) for of in (of_queries, of_keys)]

    def part(x: Any, axis: int) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(part(entry, axis) for entry in x)
        return x[some[axis]] if isinstance(x, torch.Tensor) else x

    found = {}
    for name, x in given.items():
        if name in ("queries", "labels", "present"):
            found[name] = part(x, 0)
        elif name in ("keys", "key_labels", "key_present", "key_bias"):
            found[name] = part(x, 1)
        elif isinstance(x, tuple):
            found[name] = part(x[0], 0), part(x[1], 1)
        else:
            found[name] = part(x, 0) if name == "exclude" else x
    return found


def leaves(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what has a gradient, by name."""
    found = {f"{side}[{m}]": x for side in ("queries", "keys") for m, x in enumerate(given[side])}
    return found | {
        name: given[name] for name in ("fusion_weights", "key_bias", "logit_scale", "logit_bias") if name in given
    }


def outputs(function: str, given: dict[str, Any], options: dict[str, Any], group: Any = None) -> list[torch.Tensor]:
    found = getattr(fs, function)(**given, **options, group=group)
    return list(torch.utils._pytree.tree_leaves(found))


def upstream(found: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Make a scalar of the outputs, of which all have a gradient, and vectors another one in each entry."""
    parts = [(x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype)).sum() if x.ndim else x for x in found]
    return scale * sum((weight + 1) * part for weight, part in enumerate(parts))


def positives_first(
    given: dict[str, Any], of_queries: list[int], of_keys: list[int]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Order all keys so that key b is the positive of query b; return the arguments and the order."""
    starts = np.cumsum([0, *of_keys])
    firsts = [np.arange(start, start + b) for start, b in zip(starts, of_queries, strict=False)]
    rest = [np.arange(s + b, e) for s, e, b in zip(starts[:-1], starts[1:], of_queries, strict=True)]
    order = torch.from_numpy(np.concatenate([*firsts, *rest]))
    whole = dict(given)
    whole["keys"] = tuple(x[order] for x in given["keys"])
    for name in ("key_labels", "key_bias"):
        if name in given:
            whole[name] = given[name][order]
    if "key_present" in given:
        whole["key_present"] = [x if x is None else x[order] for x in given["key_present"]]
    if "exclude" in given:
        exclude = given["exclude"]
        whole["exclude"] = (exclude[0], exclude[1][order]) if isinstance(exclude, tuple) else exclude[:, order]
    return whole, order


def on_a_rank(
    rank: int, function: str, case: str, rows: str, sides: str, dtype: str, options: dict[str, Any], method: str
) -> list[Any]:
    """Evaluate a rank's share: its outputs, its gradients and the bytes it sent."""
    world = dist.get_world_size()
    given = batch(function, case, rows, sides, world, dtype)
    exchange = Exchange(method=method)
    found = outputs(function, of_rank(given, rank, *rows_of(rows, world)), options, exchange)
    wanted = leaves(given)
    grads = torch.autograd.grad(upstream(found, 1.0), list(wanted.values()), allow_unused=True)
    return [
        [x.detach().double().numpy() for x in found],
        {name: None if d is None else d.double().numpy() for name, d in zip(wanted, grads, strict=True)},
        exchange.bytes_sent,
    ]


def in_one(
    function: str, case: str, rows: str, sides: str, dtype: str, options: dict[str, Any], world: int
) -> list[Any]:
    """Evaluate all rows in one process: each rank's outputs, and the gradients of the ranks' `upstream`s, summed."""
    of_queries, of_keys = rows_of(rows, world)
    given = batch(function, case, rows, sides, world, dtype)
    whole, order = positives_first(given, of_queries, of_keys)
    found = outputs(function, whole, options)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    names = ["loss", "loss"] if options.get("reduction") == "none" else ["loss"]
    symmetric = function == "contrastive_loss" and options.get("symmetric", True)
    if not symmetric or len(names) == 1:
        names = ["loss"]
    of_ranks: list[list[torch.Tensor]] = [[] for _ in range(world)]
    of_side = 0
    for x in found:
        if not x.ndim:
            # a mean of all is the average of the ranks' parts; which parts these are is told by the losses of rows
            for r in range(world):
                of_ranks[r].append(x if options.get("reduction", "mean") == "mean" else x / world)
            continue
        keys = symmetric and of_side % 2 == 1
        of_side += 1
        parts = (x[back] if keys else x).split(of_keys if keys else of_queries)
        for r in range(world):
            of_ranks[r].append(parts[r])
    wanted = leaves(given)
    total = sum(upstream(parts, 1.0) for parts in of_ranks)
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return [
        [[x.detach().double().numpy() for x in parts] for parts in of_ranks],
        {name: None if d is None else d.double().numpy() for name, d in zip(wanted, grads, strict=True)},
    ]


def difference(found: Any, expected: Any, scale: float = 0.0) -> float:
    """Find the greatest difference, as a share of the greatest magnitude or `scale`; NaN where one is NaN."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)  # a log-sum-exp over nothing is -inf
    if not np.array_equal(found[~finite], expected[~finite]):
        return float("nan")
    scale = np.abs(expected[finite]).max(initial=scale)
    return float(np.abs(found[finite] - expected[finite]).max(initial=0.0)) / (scale or 1.0)


def greatest_difference(
    function: str, case: str, rows: str, sides: str, dtype: str, options: dict[str, Any], world: int, method: str
) -> float:
    """Find the greatest relative difference between ranks and one process, of outputs and gradients."""
    arguments = function, case, rows, sides, dtype, options
    of_ranks = ranks(world).run(on_a_rank, *arguments, method)
    expected, d_expected = in_one(*arguments, world)
    given = batch(function, case, rows, sides, world, dtype)
    found = []
    for i, x in enumerate(expected[0]):
        if x.ndim:
            found += [difference(of_ranks[r][0][i], expected[r][i]) for r in range(world)]
        else:  # scalars of ranks differ, and average or add up to that of one process
            found.append(difference(sum(of_rank[i] for of_rank, *_ in of_ranks), sum(e[i] for e in expected)))
    for name, d in d_expected.items():
        total = sum(np.zeros(1) if grads[name] is None else grads[name] for _, grads, _ in of_ranks)
        # the scale's gradient is the sum of queries times their gradient, over the scale, which may cancel
        terms = d_expected["queries[0]"] * given["queries"][0].detach().double().numpy()
        scale = np.abs(terms).sum() / abs(given["logit_scale"].item()) if name == "logit_scale" else 0.0
        found.append(difference(total, np.zeros(1) if d is None else d, scale))
    return float(np.max(found))


BOUND = {"float32": 1e-5, "float64": 1e-12}
FULL = os.environ.get("FUSIONSUM_FULL") == "1"
# Rounding is the same for any number of ranks: float32 in one world is enough, unless all is asked for.
EVERY = [(world, dtype) for world in WORLDS for dtype in BOUND if FULL or dtype == "float64" or world == 3]


REDUCTIONS = {reduction: {"reduction": reduction} for reduction in ("mean", "sum", "none")}


@pytest.mark.parametrize("function", ["contrastive_loss", "sigmoid_loss"])
@pytest.mark.parametrize(("world", "dtype"), EVERY)
@pytest.mark.parametrize("sides", SIDES)
def test_losses_are_those_of_one_process(function, world, dtype, sides):
    for method in METHODS:
        for rows in ROWS:
            every = function == "sigmoid_loss" or (rows == "uneven" and method == "ring") or FULL
            named = REDUCTIONS if function == "sigmoid_loss" else OPTIONS
            for case in CASES:
                for name in named if every else ("mean", "none", "lse"):
                    given = case, rows, sides, dtype, named[name], world, method
                    worst = greatest_difference(function, *given)
                    assert worst <= BOUND[dtype], (*given, worst)


def scaled(rank: int, function: str, rows: str) -> Any:
    """Return the loss and its gradients, of which each rank asks for another multiple."""
    world = dist.get_world_size()
    given = batch(function, "plain", rows, SIDES[0], world, "float64")
    (loss,) = outputs(function, of_rank(given, rank, *rows_of(rows, world)), {}, dist.group.WORLD)
    grads = torch.autograd.grad((1 + rank) * loss, list(leaves(given).values()))
    return loss.item(), [d.numpy() for d in grads]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("function", ["contrastive_loss", "sigmoid_loss"])
def test_ranks_may_scale_their_losses_differently(function, rows):
    """Each rank returns the losses of its own rows, over the mean number of rows; gradients are of what each asks for."""
    world = 3
    of_queries, of_keys = rows_of(rows, world)
    given = batch(function, "plain", rows, SIDES[0], world, "float64")
    whole, order = positives_first(given, of_queries, of_keys)
    found = outputs(function, whole, {"reduction": "none"})
    found[1:] = [x[torch.argsort(order)] for x in found[1:]]  # of the keys, in the order of the ranks
    parts = [x.split(of) for x, of in zip(found, (of_queries, of_keys), strict=False)]
    losses = [sum(of[rank].sum() for of in parts) / len(parts) / (sum(of_queries) / world) for rank in range(world)]
    total = sum((1 + rank) * loss for rank, loss in enumerate(losses))
    expected = torch.autograd.grad(total, list(leaves(given).values()))
    of_ranks = ranks(world).run(scaled, function, rows)
    for (loss, _), own in zip(of_ranks, losses, strict=True):
        assert loss == pytest.approx(own.item(), rel=1e-12)
    for d, *found_grads in zip(expected, *[grads for _, grads in of_ranks], strict=True):
        np.testing.assert_allclose(sum(found_grads), d.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("function", ["contrastive_loss", "sigmoid_loss"])
def test_rows_of_16_bits_travel_as_they_are(function, dtype):
    """Results are rounded to the dtype, and gradients: once, for they are added up wide."""
    for method in METHODS:
        for case in ("labels", "plain"):
            given = case, "uneven", SIDES[0], dtype, {"reduction": "none"}, 3, method
            worst = greatest_difference(function, *given)
            assert worst <= 2 * {"bfloat16": 2**-8, "float16": 2**-11}[dtype], (*given, worst)


def of_arrays(rank: int, function: str, dtype: str) -> Any:
    world = dist.get_world_size()
    given = of_rank(batch(function, "labels", "uneven", SIDES[0], world, dtype), rank, *rows_of("uneven", world))
    given = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.detach(), given)
    tensors = outputs(function, given, {"reduction": "none"}, dist.group.WORLD)

    def array(x: torch.Tensor) -> np.ndarray:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    # torch has no negative strides, and NumPy no bfloat16 of its own
    given = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: array(x)[::-1].copy()[::-1] if x.ndim else array(x), given
    )
    found = getattr(fs, function)(**given, reduction="none", group=dist.group.WORLD)
    found = found if isinstance(found, tuple) else (found,)
    return [(x.float().numpy(), x.dtype) for x in tensors], [(x.astype(np.float32), x.dtype.name) for x in found]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("function", ["contrastive_loss", "sigmoid_loss"])
def test_arrays_of_numpy_give_arrays(function, dtype):
    for tensors, arrays in ranks(3).run(of_arrays, function, dtype):
        for (x, of_tensor), (y, of_array) in zip(tensors, arrays, strict=True):
            assert (str(of_tensor), of_array) == (f"torch.{dtype}", dtype)
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("code", samples(__file__))
def test_samples_of_the_docs(code):
    ranks(2).run(sample, code)
