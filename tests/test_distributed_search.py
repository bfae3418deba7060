"""Search among keys on several processes: equal to one process that holds all keys, to the bit.

What lives elsewhere: the search itself (``test_search.py``, ``test_autograd_search.py``), messages and agreement
(``test_distributed_exchange.py``).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fusionsum as fs
from fusionsum.distributed import Exchange
from ranks import ranks, sample, samples

WORLDS = (1, 2, 3, 4)
METHODS = ("gather", "ring")
QUERIES = ("own", "shared")
N = 16
ROWS, COLUMNS = (5, 0, 9, 3), (40, 7, 0, 90)

CASES: dict[str, Any] = {
    "plain": lambda rng, b, c: {},
    "ties": lambda rng, b, c: {"ties": True},
    "lists": lambda rng, b, c: {"exclude": [rng.permutation(c)[: rng.integers(0, c)] for _ in range(b)]},
    "pairs": lambda rng, b, c: {"exclude": rng.random((b, c)) < 0.5},
    "nearly all pairs": lambda rng, b, c: {"exclude": rng.random((b, c)) < 0.98},
    "weights and bias": lambda rng, b, c: {"fusion_weights": rng.normal(size=N), "key_bias": rng.normal(size=c)},
    "several factors": lambda rng, b, c: {
        "more": True,
        "activations": [None, "tanh"],
        "key_activations": ["sigmoid", None],
        "present": [rng.random(b) > 0.3, None],
        "key_present": [None, rng.random(c) > 0.3],
    },
    "NaN": lambda rng, b, c: {"nan": True},
}


def call(case: str, world: int, queries: str, dtype: str) -> tuple[dict[str, Any], np.ndarray, list[int]]:
    """Return what one process is given that holds all, the targets, and how many queries each rank has."""
    rows = list(ROWS[:world]) if queries == "own" else [6] * world
    b, c = sum(rows) if queries == "own" else 6, sum(COLUMNS[:world])
    rng = np.random.default_rng(len(case) + 10 * world)
    given = CASES[case](rng, b, c)
    exact = given.pop("ties", False)

    def some(size: int) -> np.ndarray:
        return (rng.integers(-2, 3, (size, N)) if exact else rng.normal(size=(size, N))).astype(dtype)

    several = 2 if given.pop("more", False) else 1
    given["queries"], given["keys"] = tuple(some(b) for _ in range(several)), tuple(some(c) for _ in range(several))
    if given.pop("nan", False):
        given["keys"][0][3], given["queries"][0][1] = np.nan, np.inf
    given = {k: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x for k, x in given.items()}
    return given, rng.integers(0, c, b), rows


def of_rank(
    given: dict[str, Any], targets: Any, rank: int, rows: list[int], queries: str
) -> tuple[dict[str, Any], Any]:
    starts = np.cumsum([0, *rows]) if queries == "own" else None
    ours = slice(starts[rank], starts[rank + 1]) if queries == "own" else slice(None)
    first = sum(COLUMNS[:rank])
    theirs = slice(first, first + COLUMNS[rank])

    def part(x: Any, some: slice) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(None if entry is None else entry[some] for entry in x)
        return x[some]

    found = dict(given)
    for name in ("queries", "present"):
        if name in given:
            found[name] = part(given[name], ours)
    for name in ("keys", "key_present", "key_bias"):
        if name in given:
            found[name] = part(given[name], theirs)
    if "exclude" in given:
        found["exclude"] = given["exclude"][ours]
    return found, targets[ours]


def as_tensors(given: dict[str, Any], grad: bool) -> dict[str, Any]:
    def tensor(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(map(tensor, x))
        if isinstance(x, np.ndarray):
            return torch.from_numpy(x).requires_grad_(grad and x.dtype.kind == "f")
        return x

    return {name: tensor(x) for name, x in given.items()}


def weighted(values: torch.Tensor, first: int) -> torch.Tensor:
    """Make a scalar of values, of which each has another gradient; -inf and NaN have none."""
    row = torch.arange(first, first + len(values), dtype=values.dtype)[:, None]
    weights = 1 + row + torch.linspace(0, 1, values.shape[1], dtype=values.dtype)
    return (torch.where(values.isfinite(), values, 0) * weights).sum()


def leaves(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {f"{side}[{m}]": x for side in ("queries", "keys") for m, x in enumerate(given[side])}
    return found | {name: given[name] for name in ("fusion_weights", "key_bias") if name in given}


def on_a_rank(rank: int, case: str, queries: str, dtype: str, k: int, method: str, kind: str) -> Any:
    world = dist.get_world_size()
    given, targets, rows = call(case, world, queries, dtype)
    exchange = Exchange(method=method, queries=queries)
    own, own_targets = of_rank(given, targets, rank, rows, queries)
    if kind == "numpy":
        found = fs.top_k(**own, k=k, group=exchange)
        return *found, *[fs.ranks(**own, targets=own_targets, ties=t, group=exchange) for t in ("mean", "optimistic")]
    own = as_tensors(own, True)
    values, _ = fs.top_k(**own, k=k, group=exchange)
    wanted = leaves(own)
    first = sum(rows[:rank]) if queries == "own" else 0
    grads = torch.autograd.grad(weighted(values, first), list(wanted.values()))
    return {name: d.numpy() for name, d in zip(wanted, grads, strict=True)}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_top_k_and_ranks_are_those_of_one_process(world, queries, dtype):
    for case in CASES:
        given, targets, rows = call(case, world, queries, dtype)
        for k in (1, 11, sum(COLUMNS[:world])):
            expected = []
            for rank in range(world):
                # the rank's queries alone, for scores of few queries are summed in another order
                own, own_targets = of_rank(given, targets, rank, rows, queries)
                own |= {name: given[name] for name in ("keys", "key_present", "key_bias") if name in given}
                own, own_targets = as_tensors(own, False), torch.from_numpy(own_targets)
                of_ties = [fs.ranks(**own, targets=own_targets, ties=ties) for ties in ("mean", "optimistic")]
                expected.append([x.numpy() for x in (*fs.top_k(**own, k=k), *of_ties)])
            for method in METHODS:
                found = ranks(world).run(on_a_rank, case, queries, dtype, k, method, "numpy")
                for of_rank_found, of_rank_expected in zip(found, expected, strict=True):
                    for x, y in zip(of_rank_found, of_rank_expected, strict=True):
                        assert x.dtype == y.dtype
                        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("queries", QUERIES)
def test_gradients_are_those_of_one_process(world, queries):
    for case in CASES:
        if case == "NaN":
            continue
        given, *_ = call(case, world, queries, "float64")
        for k in (1, 11):
            whole = as_tensors(given, True)
            values, _ = fs.top_k(**whole, k=k)
            copies = world if queries == "shared" else 1  # as many losses there are
            wanted = leaves(whole)
            expected = torch.autograd.grad(copies * weighted(values, 0), list(wanted.values()))
            for method in METHODS:
                found = ranks(world).run(on_a_rank, case, queries, "float64", k, method, "torch")
                for name, d in zip(wanted, expected, strict=True):
                    parts = [of[name] for of in found]
                    if (
                        name.startswith("keys")
                        or name == "key_bias"
                        or (queries == "own" and name.startswith("queries"))
                    ):
                        total = np.concatenate(parts)
                    else:
                        total = functools.reduce(np.add, parts)
                    np.testing.assert_allclose(total, d.numpy(), rtol=1e-12, atol=1e-12 * float(d.abs().max()))


def map_and_search(rank: int, folder: str, queries: np.ndarray, k: int, how: str) -> Any:
    keys = np.load(f"{folder}/{rank}.npy", mmap_mode="r")
    return fs.top_k(queries, keys, k, group=Exchange(queries=how))


@pytest.mark.parametrize("how", QUERIES)
def test_each_rank_maps_its_own_file(tmp_path, how):
    rng = np.random.default_rng(0)
    shards = [rng.normal(size=(size, N)).astype(np.float32) for size in (700, 1, 300, 1000)]
    for rank, shard in enumerate(shards):
        np.save(tmp_path / f"{rank}.npy", shard)
    queries = rng.normal(size=(50, N)).astype(np.float32)
    expected = fs.top_k(queries, np.concatenate(shards), 20)
    for found in ranks(4).run(map_and_search, str(tmp_path), queries, 20, how):
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("code", samples(__file__))
def test_samples_of_the_docs(code):
    ranks(2).run(sample, code)
