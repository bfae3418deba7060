"""What ranks agree on, and what becomes of calls in which they cannot: errors on every rank, within a time limit.

What lives elsewhere: the results (``test_distributed_losses.py``, ``test_distributed_search.py``).
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fusionsum as fs
from fusionsum import distributed, tensors
from fusionsum.distributed import Exchange, exchange
from ranks import Failed, Ranks, ranks

B, N, K = 4, 8, 3


def sides(rank: int, rows: int = B, columns: int = B, n: int = N, dtype: Any = torch.float32) -> dict[str, Any]:
    torch.manual_seed(rank)
    return {"queries": torch.randn(rows, n, dtype=dtype), "keys": torch.randn(columns, n, dtype=dtype)}


FUNCTIONS = {
    "contrastive_loss": lambda given, group: fs.contrastive_loss(**given, group=group),
    "sigmoid_loss": lambda given, group: fs.sigmoid_loss(**given, group=group),
    "top_k": lambda given, group: fs.top_k(**{"k": K} | given, group=group),
    "ranks": lambda given, group: fs.ranks(
        **{"targets": torch.zeros(len(given["queries"]), dtype=torch.int64)} | given, group=group
    ),
}
LOSSES = ("contrastive_loss", "sigmoid_loss")
SEARCHES = ("top_k", "ranks")


def messages_of(rank: int, function: str, differing: Any) -> str:
    """Call a function with what rank 1 has otherwise; return the error's message."""
    given = sides(rank) | (differing(rank) if rank == 1 else {})
    try:
        FUNCTIONS[function](given, dist.group.WORLD)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# What rank 1 gives otherwise; the functions; what all ranks are told.
DIFFERENCES: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "n": (lambda r: sides(r, n=5), tuple(FUNCTIONS), "n: 8 on ranks 0, 2, 5 on rank 1"),
    "dtype": (
        lambda r: sides(r, dtype=torch.float64),
        tuple(FUNCTIONS),
        "dtype: torch.float32 on ranks 0, 2, torch.float64 on rank 1",
    ),
    "k": (lambda r: {"k": 2}, ("top_k",), "k: 3 on ranks 0, 2, 2 on rank 1"),
    "ties": (lambda r: {"ties": "optimistic"}, ("ranks",), "ties: mean on ranks 0, 2, optimistic on rank 1"),
    "logit_scale": (lambda r: {"logit_scale": 2.0}, LOSSES, "logit_scale: 1.0 on ranks 0, 2, 2.0 on rank 1"),
    "logit_bias": (lambda r: {"logit_bias": -1.0}, ("sigmoid_loss",), "logit_bias: 0.0 on ranks 0, 2, -1.0 on rank 1"),
    "weights": (
        lambda r: {"fusion_weights": torch.ones(N)},
        tuple(FUNCTIONS),
        "fusion_weights: None on ranks 0, 2, 8 of",
    ),
    "bias": (
        lambda r: {"key_bias": torch.ones(B)},
        ("contrastive_loss", *SEARCHES),
        "key_bias: None on ranks 0, 2, torch.f",
    ),
    "labels": (
        lambda r: dict.fromkeys(("labels", "key_labels"), torch.zeros(B, dtype=torch.int64)),
        LOSSES,
        "query_labels: False on ranks 0, 2, True on rank 1",
    ),
    "reduction": (lambda r: {"reduction": "sum"}, LOSSES, "rank 1"),
    "symmetric": (lambda r: {"symmetric": False}, ("contrastive_loss",), "rank 1"),
    "gradients": (
        lambda r: {"keys": torch.ones(B, N, requires_grad=True)},
        LOSSES,
        "gradients: [False, False, False, F",
    ),
    "activations": (lambda r: {"activations": "tanh"}, tuple(FUNCTIONS), "rank 1"),
    "masks": (lambda r: {"present": [torch.ones(B, dtype=torch.bool)]}, tuple(FUNCTIONS), "masked on rank 1"),
    "exclude": (lambda r: {"exclude": [[0]] * B}, SEARCHES, "exclude: False on ranks 0, 2, True on rank 1"),
    # not a difference but an error of one rank
    "a wrong shape": (
        lambda r: {"keys": torch.ones(B, N + 1)},
        tuple(FUNCTIONS),
        "rank 1 raised ValueError: keys: expected 8 terms, as queries of shape (4, 8) have, got shape (4, 9)",
    ),
    "too few keys": (lambda r: sides(r, columns=2), LOSSES, "rank 1 raised ValueError: keys: expected at least 4 rows"),
    "a wrong type": (lambda r: {"queries": "text"}, tuple(FUNCTIONS), "rank 1 raised TypeError: queries: expected a"),
    "columns": (
        lambda r: {"exclude": torch.zeros(B, 5, dtype=torch.bool)},
        tuple(FUNCTIONS),
        "rank 1",
    ),
    "k of another type": (
        lambda r: {"k": 2.5},
        ("top_k",),
        "rank 1 raised TypeError: k: expected an integer, got float",
    ),
    "a target out of range": (
        lambda r: {"targets": torch.tensor([0, 1, 12, 0])},
        ("ranks",),
        "targets: expected integers from 0 to less than 12, the number of keys of all ranks, got 12 on rank 1",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_disagree_are_told_who_differs(name):
    _, functions, message = DIFFERENCES[name]
    for function in functions:
        own, *_ = found = ranks(3).run(messages_of, function, differing_of(name))
        assert all(found), (function, found)
        assert message in found[0], found[0]
        assert message in found[2], found[2]
        assert found[0] == found[2]
        if "raised" not in message:
            assert found[1] == own


class differing_of:
    """The function of `DIFFERENCES`, which is pickled by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, rank: int) -> Any:
        return DIFFERENCES[self.name][0](rank)


def other_function(rank: int) -> str:
    return messages_of(rank, "top_k" if rank == 1 else "sigmoid_loss", lambda r: {})


def test_ranks_that_call_different_functions_are_told_so():
    for found in ranks(3).run(other_function):
        assert found.startswith("ValueError: ") and "function: sigmoid_loss on ranks 0, 2, top_k on rank 1" in found


def unchecked(rank: int) -> Any:
    """Call with and without a first exchange; return the loss, its gradients and the bytes."""
    found = []
    for check in (True, False):
        settings = Exchange(check=check)
        given = {name: x.requires_grad_() for name, x in sides(rank).items()}
        loss = fs.contrastive_loss(**given, group=settings)
        found.append([loss.item(), *torch.autograd.grad(loss, list(given.values())), settings.bytes_sent])
    return found


def test_the_first_exchange_may_be_left_out():
    for with_check, without in ranks(3).run(unchecked):
        assert with_check[0] == without[0]
        assert all(torch.equal(a, b) for a, b in zip(with_check[1:3], without[1:3], strict=True))
        assert with_check[3] - without[3] == 2 * 8 * exchange.HEADER  # to two ranks


def repeated(rank: int, method: str) -> Any:
    found = []
    for _ in range(20):
        given = {name: x.requires_grad_() for name, x in sides(rank, rows=3 + rank, columns=9).items()}
        group = Exchange(method=method)
        loss = fs.contrastive_loss(**given, group=group, logit_scale=3.0)
        found.append((loss.detach().numpy(), *[d.numpy() for d in torch.autograd.grad(loss, list(given.values()))]))
    return found


def test_bits_are_the_same_from_run_to_run_and_by_either_way():
    ways = [ranks(3).run(repeated, method) for method in ("gather", "ring")]
    for of_rank in zip(*ways, strict=True):
        first = of_rank[0][0]
        for found in (x for runs in of_rank for x in runs):
            assert all(np.array_equal(a, b) for a, b in zip(found, first, strict=True))


def sent(rank: int, columns: int, symmetric: bool, method: str) -> list[int]:
    given = {name: x.requires_grad_() for name, x in sides(rank, columns=columns).items()}
    settings = Exchange(method=method, check=False)
    loss = fs.contrastive_loss(**given, symmetric=symmetric, group=settings)
    forward = settings.bytes_sent
    loss.backward()
    return [forward, settings.bytes_sent - forward]


@pytest.mark.parametrize("method", ["gather", "ring"])
def test_bytes_are_those_of_the_formulas(method):
    for world in (2, 4):
        for symmetric in (False, True):
            columns, statistics = 6, 40 if symmetric else 0
            keys = columns * (4 * N)
            forward = (world - 1) * (keys + columns * statistics)
            backward = (world - 1) * (2 * keys + columns * statistics)
            for found in ranks(world).run(sent, columns, symmetric, method):
                assert found == [forward, backward]


def chosen(rank: int, columns: int, limits: dict[str, int] | None = None) -> list[str]:
    """Return which ways are taken for so many keys, of 4 KiB."""
    ways = []
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in (limits or {}).items():
            patch.setattr(exchange, name, limit)
        for name in ("_gather", "_ring"):
            way = getattr(exchange.Meeting, name)
            patch.setattr(exchange.Meeting, name, lambda *given, name=name, way=way: ways.append(name) or way(*given))
        fs.contrastive_loss(**sides(rank, columns=columns, n=1024), group=dist.group.WORLD, symmetric=False)
    return ways


def test_few_rows_are_gathered_and_many_go_round():
    assert ranks(2).run(chosen, 8) == [["_gather"]] * 2
    assert ranks(2).run(chosen, exchange.GATHERED // (4 * 1024 * 2) + 1) == [["_ring"]] * 2
    # as many bytes in all of many ranks, in small blocks
    assert ranks(2).run(chosen, 8, {"GATHERED": 0, "SMALL": 2**15}) == [["_gather"]] * 2
    assert ranks(2).run(chosen, 8, {"GATHERED": 0, "SMALL": 2**15 - 1}) == [["_ring"]] * 2
    assert ranks(2).run(chosen, 8, {"GATHERED": 0, "MANY": 2**16 - 1}) == [["_ring"]] * 2


# ---- groups


def groups(rank: int) -> list[str]:
    """Try what is no group of this rank's."""
    given, found = sides(rank), []
    part = dist.new_group([0, 1])
    mesh = dist.device_mesh.init_device_mesh("cpu", (3,), mesh_dim_names=("data",))
    flat = dist.device_mesh.init_device_mesh("cpu", (1, 3), mesh_dim_names=("one", "data"))
    for group in (part, mesh, mesh["data"], flat, flat["data"], "WORLD", 3):
        try:
            found.append(f"{float(fs.sigmoid_loss(**given, group=group)):.6f}")
        except (TypeError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_groups():
    first, second, third = ranks(3).run(groups)
    part, mesh, by_name, flat, row, *wrong = third
    assert part == "ValueError: group: process 2 is not in it"
    assert mesh == by_name == row
    assert flat == "ValueError: group: expected a mesh of one dim, got 2; name one, as in mesh['data']"
    assert wrong == [
        f"TypeError: group: expected a torch.distributed.ProcessGroup or an Exchange, got {kind}"
        for kind in ("str", "int")
    ]
    assert float(first[0]) > 0 and float(second[0]) > 0  # of two ranks
    assert first[1:] != third[1:]


def elsewhere(rank: int) -> str:
    group = Exchange()
    group.backends, group.device = {"cuda": "nccl"}, "cuda"  # as of a group of NCCL alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "gather", lambda self, given: [given.cpu()] * self.world)
        patch.setattr(torch, "tensor", lambda *given, device=None, real=torch.tensor, **also: real(*given, **also))
        try:
            fs.sigmoid_loss(**sides(rank), group=group)
        except ValueError as error:
            return str(error)
    return ""


def test_a_group_of_another_device():
    for found in ranks(2).run(elsewhere):
        assert found.startswith(
            "group: expected a backend that sends tensors on cpu, where queries are, got nccl for cuda; torch.distributed."
        )


def test_without_a_process_group():
    for name in FUNCTIONS:
        with pytest.raises(ValueError, match="group: expected an initialised process group, got str before"):
            FUNCTIONS[name](sides(0), "group")
    with pytest.raises(ValueError, match="got NoneType before"):
        Exchange()


@pytest.mark.parametrize("wrong", [{"method": "mail"}, {"queries": "no"}, {"check": 1}])
def test_settings_are_checked(wrong):
    (found,) = ranks(1).run(settings_error, wrong, errors=True)
    assert isinstance(found, Failed) and f"{next(iter(wrong))}: expected" in str(found)


def settings_error(rank: int, wrong: dict[str, Any]) -> None:
    Exchange(**wrong)


def tiny(rank: int, rows: tuple[int, ...]) -> Any:
    given = {name: x.requires_grad_() for name, x in sides(rank, rows=rows[rank], columns=rows[rank]).items()}
    found = []
    for method in ("gather", "ring"):
        group = Exchange(method=method)
        for function in LOSSES:
            loss = FUNCTIONS[function](given, group)
            loss.backward()
            found.append(loss.item())
        found.append(fs.top_k(**given, k=min(K, sum(rows)), group=group)[1].tolist())
    return found, all(x.grad.isfinite().all() for x in given.values())


@pytest.mark.parametrize("rows", [(0, 0), (0, 3), (1, 1), (3, 0)])
def test_ranks_without_rows(rows):
    for found, finite in ranks(2).run(tiny, rows):
        assert finite and found[:3] == found[3:]
        assert np.isfinite(found[:2]).all()


def watched(rank: int) -> list[str]:
    found = []
    given = sides(rank)
    for call in (
        lambda x: torch.func.grad(lambda q: fs.contrastive_loss(q, given["keys"], group=dist.group.WORLD))(x),
        lambda x: torch.func.vmap(lambda q: fs.top_k(q[None], given["keys"], 1, group=dist.group.WORLD)[0])(x),
        lambda x: torch.autograd.grad(
            torch.autograd.grad(
                fs.contrastive_loss(x.requires_grad_(), given["keys"], group=dist.group.WORLD), x, create_graph=True
            )[0].sum(),
            x,
        ),
    ):
        try:
            call(given["queries"].clone())
            found.append("")
        except (NotImplementedError, RuntimeError) as error:
            found.append(str(error))
    return found


def test_transforms_are_an_error_on_every_rank():
    for found in ranks(2).run(watched):
        assert "group: expected None under torch.func" in found[0]
        assert "group: expected None under torch.func" in found[1]
        assert "contrastive_loss: has first derivatives" in found[2]


def compiled(rank: int) -> Any:
    given = {name: x.requires_grad_() for name, x in sides(rank).items()}

    def step(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return fs.contrastive_loss(queries * 2, keys, group=dist.group.WORLD) + 1

    found = []
    for function in (step, torch.compile(step, backend="eager")):
        loss = function(**given)
        found.append([loss.item(), *[d.tolist() for d in torch.autograd.grad(loss, list(given.values()))]])
    return found


def test_a_compiler_breaks_its_graph_there():
    for plain, under_compiler in ranks(2).run(compiled):
        assert plain == under_compiler


# ---- lost ranks: pools of their own, for a group does not survive them


def step(rank: int, when: str) -> Any:
    """Fail on rank 1, before, in or after the forward pass; return the error of the others, and after how long."""
    given = {name: x.requires_grad_() for name, x in sides(rank).items()}
    start = time.monotonic()
    try:
        if rank == 1 and when == "dies before":
            os._exit(1)
        if rank == 1 and when == "does not call":
            time.sleep(4)
            return None
        if when == "dies in a search":
            return searched(rank, given)
        loss = fs.contrastive_loss(**given, group=Exchange(method="ring"))
        if rank == 1 and when == "dies in backward":
            os._exit(1)
        if rank == 1 and when == "raises in backward":
            loss.register_hook(lambda grad: 1 / 0)
        loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return None


def searched(rank: int, given: dict[str, Any]) -> Any:
    """Search twice; rank 1 dies while the second search is under way."""
    fs.top_k(**given, k=K, group=dist.group.WORLD)
    if rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "top_k", lambda *given: os._exit(1))
            fs.top_k(**given, k=K, group=dist.group.WORLD)
    return fs.top_k(**given, k=K, group=dist.group.WORLD)


ENDS = ("dies before", "does not call", "dies in backward", "raises in backward", "dies in a search")


@pytest.mark.parametrize("when", ENDS)
def test_lost_ranks_end_the_others_in_time(when):
    pool = Ranks(3, timeout=2.0)
    try:
        found = pool.run(step, when, limit=30, errors=True)
    finally:
        pool.close()
    for rank in (0, 2):
        message, seconds = found[rank]
        assert message.startswith(f"RuntimeError: {'top_k' if 'search' in when else 'contrastive_loss'}: rank ")
        assert f"rank {rank} lost rank" in message or f"rank {rank} waited for the 3 ranks in vain" in message
        assert seconds < 10
    if "raises" in when:
        assert found[1][0].startswith("ZeroDivisionError")


def test_the_package_says_what_it_has():
    assert distributed.__all__ == ["Exchange"]
