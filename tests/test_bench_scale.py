"""The formulas of ``bench/scale.py`` against what ranks count and hold, and against the messages acted out.

Bytes are equal to the last one, memory within a few per cent; no test looks at a clock. What lives elsewhere: what is
sent and why (``test_distributed_exchange.py``), the other parts of the benchmark (``test_bench.py``).
"""

from __future__ import annotations

import ctypes
import itertools
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fusionsum as fs
from conftest import source
from fusionsum.distributed import Exchange
from ranks import Ranks, ranks

METHODS = ("gather", "ring")
ROWS, COLUMNS, TERMS = (3, 5, 2, 4), (5, 5, 7, 4), 6
SHARED = 12  # rows of queries that all ranks ask for: as many a rank
BOTH, NONE = (True, True, False), (False, False, False)


@pytest.fixture(autouse=True)
def _bench_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(source("bench").parent))  # bench/ is not installed


# ---- bytes

OF_ALL: list[dict[str, Any]] = [
    {},
    {"gradients": NONE},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "plain": False},
    {"gradients": (True, False, False)},
    {"gradients": (False, True, False)},
]
OF_LOSSES: list[dict[str, Any]] = [
    *OF_ALL,
    {"labels": True},
    {"ids": True},
    {"labels": True, "ids": True, "gradients": NONE},
    {"reduction": "none", "labels": True},
]
OF_CONTRASTIVE: list[dict[str, Any]] = [
    *OF_LOSSES,
    {"key_bias": torch.float32},
    {"key_bias": torch.float32, "labels": True, "gradients": (True, True, True)},
    {"key_bias": torch.float64, "gradients": (False, False, True)},
]
EXCLUDED = 2  # keys that each query leaves out
CASES = [
    *[{"function": "contrastive_loss", "symmetric": way, **x} for way in (True, False) for x in OF_CONTRASTIVE],
    *[{"function": "sigmoid_loss", **x} for x in OF_LOSSES],
    *[
        {"function": "top_k", "k": 3, "shared": shared, **x}
        for shared, x in itertools.product((False, True), [*OF_ALL, {"excluded": True}])
    ],
    *[
        {"function": "ranks", "shared": shared, **x, "gradients": NONE}
        for shared, x in itertools.product((False, True), [*OF_ALL[2:5], {"excluded": True}])
    ],
]


def step(rank: int, group: Any, rows: int, columns: int, terms: int, function: str, **case: Any) -> Callable[[], None]:
    """Make the inputs of a case, on a rank; return the call, backward if there are gradients."""
    gradients = case.get("gradients", BOTH)
    generator = torch.Generator().manual_seed(0)  # shared queries are the same everywhere

    def side(rows: int, factors: int, differentiates: bool) -> Any:
        given = torch.randn(factors, rows, terms, generator=generator).to(case.get("dtype", torch.float32))
        return tuple(x.clone().requires_grad_(differentiates) for x in given)

    is_loss, factors = (
        function.endswith("loss"),
        1 if case.get("plain", True) else 2,
    )  # and with the other side's, three
    queries = side(rows, 1 if is_loss else factors, gradients[0])
    given: dict[str, Any] = {"queries": queries, "keys": side(columns, factors if is_loss else 1, gradients[1])}
    given |= {name: case[name] for name in ("symmetric", "reduction", "k") if name in case}
    codes = torch.arange(rows), torch.arange(columns) % 3
    if case.get("labels"):
        given |= dict(zip(("labels", "key_labels"), codes, strict=True))
    if case.get("ids"):
        given["exclude"] = codes
    if case.get("excluded"):
        given["exclude"] = [range(EXCLUDED)] * rows
    if "key_bias" in case:
        given["key_bias"] = torch.zeros(columns, dtype=case["key_bias"], requires_grad=gradients[2])
    if function == "ranks":
        given["targets"] = torch.zeros(rows, dtype=torch.int64)

    def call() -> None:
        found = getattr(fs, function)(**given, group=group)
        if any(gradients):
            parts = found[:1] if function == "top_k" else found if isinstance(found, tuple) else [found]
            sum(part.sum() for part in parts).backward()

    return call


def sent(rank: int, method: str) -> list[int]:
    """Return how many bytes each case sends from here."""
    found = []
    for case in CASES:
        shared = case.get("shared", False)
        group = Exchange(method=method, queries="shared" if shared else "own")
        step(rank, group, SHARED if shared else ROWS[rank], COLUMNS[rank], TERMS, **case)()
        found.append(group.bytes_sent)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_that_are_sent(method):
    from bench import scale

    for world in (1, 2, 3, 4):
        for rank, of_rank in enumerate(ranks(world).run(sent, method)):
            order = [(rank + step) % world for step in range(world)]  # formulas are those of rank 0
            for case, found in zip(CASES, of_rank, strict=True):
                rows = [SHARED if case.get("shared") else ROWS[r] for r in order]
                given = case | ({"excluded": [EXCLUDED * b for b in rows]} if case.get("excluded") else {})
                expected = scale.Case(rows=rows, columns=[COLUMNS[r] for r in order], terms=TERMS, **given)
                assert scale.predicted(expected, method).sent == found, (world, rank, case)


# ---- FLOPs


def test_work_is_that_of_one_process():
    """Of one rank that of the benchmark's rows, and of several ranks as much in all."""
    from bench import rows, scale, scores

    wanted = {row.name: row for row in scores.SCORES}
    for name, phase, function in (
        ("C9", rows.BOTH, "contrastive_loss"),
        ("C3 n=64", rows.FORWARD, "contrastive_loss"),
        ("C4 n=512", rows.BOTH, "sigmoid_loss"),
        ("C5 k=10", rows.FORWARD, "top_k"),
        ("C7", rows.FORWARD, "ranks"),
    ):
        row = wanted[name]
        queries, keys, terms = row.pairs
        gradients = BOTH if phase == rows.BOTH else NONE
        for world in (1, 2, 8):
            of_ranks = [queries // world] * world, [keys // world] * world
            case = scale.Case(function, *of_ranks, terms, gradients=gradients, k=10)
            assert world * scale.predicted(case, "ring").flop == row.flop[phase], name


# ---- memory

MANY, LONG = 96, 16384  # rows of a rank and terms: blocks of 6 MiB, of which tiles are soon multiplied
HELD: list[dict[str, Any]] = [
    {"function": "contrastive_loss"},
    {"function": "contrastive_loss", "gradients": NONE},
    {"function": "contrastive_loss", "symmetric": False, "gradients": (False, True, False)},
    {"function": "contrastive_loss", "key_bias": torch.float32, "gradients": (True, True, True)},
    {"function": "sigmoid_loss", "dtype": torch.bfloat16},
    {"function": "top_k", "k": 3},
]


def grown(rank: int) -> list[dict[str, int]]:
    """Return by how many bytes the process grew at most in each case: with these rows alone, and by either way."""
    from bench.machine import Cpu

    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is given back
    found = []
    for case in HELD:
        peaks = {}
        for method in ("alone", *METHODS):
            group = None if method == "alone" else Exchange(method=method)
            step(rank, group, 4, 4, LONG, **case)()  # what the first step of any size sets up
            peaks[method] = Cpu().peak_extra(step(rank, group, MANY, MANY, LONG, **case), given_back=0)
        found.append(peaks)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's, /proc is Linux's")
@pytest.mark.parametrize("world", [2, 4])
def test_memory_is_that_of_the_formulas(world):
    from bench import scale

    pool = Ranks(world)  # processes whose memory nothing has used
    try:
        measured = pool.run(grown)
    finally:
        pool.close()
    for case, of_ranks in zip(HELD, zip(*measured, strict=True), strict=True):
        alone, shared = (scale.Case(rows=[MANY] * w, columns=[MANY] * w, terms=LONG, **case) for w in (1, world))
        workspace = max(found["alone"] for found in of_ranks) - scale.predicted(alone, "ring").held
        for method in METHODS:
            # of the ranks: a message may come late, to memory that the system gives when it is written
            found = max(found[method] for found in of_ranks)
            expected = scale.predicted(shared, method, workspace=workspace).held
            # one rank gathers all keys found for their gradient, several each a part of them: that workspace is less
            least = 0.9 if case["function"] == "top_k" else 0.97
            assert least * expected <= found <= 1.03 * expected, (case, method, found / 2**20, expected / 2**20)


# ---- seconds, acted out


def each_travel(world: int) -> Iterator[Any]:
    from bench import scale

    for rows, terms, case in itertools.product((16, 1024, 8192, 65536), (64, 512), CASES):
        if "excluded" not in case:
            of_ranks = [rows] * world
            yield from scale.travels(scale.Case(rows=of_ranks, columns=of_ranks, terms=terms, **case))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 32])
@pytest.mark.parametrize("method", METHODS)
def test_formulas_take_as_long_as_what_is_acted_out(world, method):
    """To rounding where messages take as long as their bytes; where they take longer, rings hide some of that."""
    from bench import scale

    for travel in each_travel(world):
        for latency in (0.0, 1e-5, 1e-3):
            machine = scale.Machine(latency=latency)
            formula, acted = (f(travel, world, method, machine) for f in (scale.seconds, scale.simulated))
            least = 1 if method == "gather" or not latency else 0.6
            assert least * formula <= acted * (1 + 1e-9) <= formula * (1 + 2e-9), (travel, latency)


def test_more_of_a_machine_takes_no_longer():
    from bench import scale

    slow = scale.Machine(latency=1e-4, node=4)
    for travel, method in itertools.product(each_travel(8), METHODS):
        before = scale.simulated(travel, 8, method, slow)
        for faster in ({"flops": 1e15}, {"inside": 1e12}, {"between": 1e12}, {"latency": 0.0}, {"node": 8}):
            assert scale.simulated(travel, 8, method, slow._replace(**faster)) <= before * (1 + 1e-9)


def test_the_tables_are_those_of_the_documentation(capsys):
    from bench import scale

    scale.main()
    shown = source("docs/scale.md").read_text(encoding="utf-8")
    tables = capsys.readouterr().out.split("\n\n")
    assert len(tables) == len(scale.TABLES)
    for table in tables:
        assert table.strip() in shown
