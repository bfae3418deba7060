"""Losses and search over more ranks than can be run: bytes, FLOPs, memory, seconds; ``python -m bench.scale``.

It prints the tables of docs/scale.md. What lives here: what travels in each call, the formulas that follow from it, and
`simulated`, which acts messages and tiles out and knows no formula. Nothing is measured. What lives elsewhere: the messages
(``fusionsum/distributed``), to whose bytes and memory the tests hold these formulas; ranks of this machine, timed
(``ranks.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fusionsum.distributed.exchange import HEADER, Layout

METHODS = ("gather", "ring")
LOSSES = ("contrastive_loss", "sigmoid_loss")


class Machine(NamedTuple):
    """A rank's device, and links that send and receive at once; nominal figures, none of which was measured."""

    flops: float = 500e12  # a second, in tiles: half of an H100's 989e12 of bfloat16
    inside: float = 450e9  # bytes a second to ranks of its node: NVLink 4
    between: float = 50e9  # and to others: 400 Gb/s for each rank
    latency: float = 10e-6  # seconds from a message's last byte to its use
    node: int = 8  # ranks
    memory: int = 8 * 2**30  # bytes that the model leaves


NOMINAL = Machine()


class Case(NamedTuple):
    """A call on all ranks, with its gradients: how many rows each rank has, and what it is given."""

    function: str
    rows: Sequence[int]  # queries of each rank
    columns: Sequence[int]  # and keys
    terms: int
    dtype: torch.dtype = torch.float32
    plain: bool = True  # the side that travels is one factor, without activation or mask
    labels: bool = False
    ids: bool = False
    key_bias: torch.dtype | None = None
    gradients: Sequence[bool] = (True, True, False)  # of the queries' side, the keys', and the bias
    symmetric: bool = True
    reduction: str = "mean"
    k: int = 0
    shared: bool = False  # all ranks search for the same queries
    excluded: Sequence[int] | None = None  # how many keys each rank's queries leave out


class Travel(NamedTuple):
    """Blocks that meet all ranks, and what is made of them."""

    block: Layout
    home: Layout | None = None  # what a block gathers
    flop: int = 0  # of all tiles of rank 0
    kept: int = 0  # bytes that a tile makes for the rank itself, and that are added up there
    beside: int = 0  # bytes held meanwhile
    stays: bool = False  # blocks are kept, and `flop` is done before they leave

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of rank 0's block, and of what comes home to it."""
        return self.block.size(0), self.home.size(0) if self.home else 0


class Predicted(NamedTuple):
    """What a rank sends (bytes), computes, holds at most beside its own rows (bytes), and the seconds."""

    sent: int
    flop: int
    held: int
    seconds: float


# ---- what travels ----------------------------------------------------------------------------------------------------


def travels(case: Case) -> list[Travel]:
    """Return what travels, one after another: in the forward pass and, if there are gradients, in the backward pass."""
    return _of_loss(case) if case.function in LOSSES else _of_search(case)


def _layout(sizes: Sequence[int], *entries: Any) -> Layout:
    """Lay out rows, so many on each rank; an entry, or None, has a dtype, numbers a row and, where they differ, rows."""
    given = [entry for entry in entries if entry]
    return Layout(*[(dtype, [(n, width) for n in (*others, sizes)[0]]) for dtype, width, *others in given])


def _wide(case: Case) -> torch.dtype:
    return torch.float64 if torch.float64 in (case.dtype, case.key_bias) else torch.float32


def _of_loss(case: Case) -> list[Travel]:
    """Let keys travel; a tile is multiplied once for its scores and once for each side's gradient."""
    wide, rows, columns, terms = _wide(case), case.rows[0], case.columns, case.terms
    of_queries, of_keys, of_bias = case.gradients
    statistics = (torch.float64, 5) if case.function == "contrastive_loss" and case.symmetric else None
    codes = [(torch.int64, 1) for has in (case.labels, case.ids) if has]
    bias = case.key_bias and (case.key_bias, 1)
    keys = (case.dtype if case.plain else wide, terms)
    formed = 0 if case.plain else columns[0] * terms * wide.itemsize
    product = 2 * rows * sum(columns) * terms

    ends = [(wide, terms)] * of_keys + [(torch.float64, 1)] * of_bias
    home, own = _layout(columns, *ends) if ends else None, of_queries * rows * terms * wide.itemsize
    if case.function == "sigmoid_loss":
        block, differentiates = _layout(columns, *codes, keys), any(case.gradients)
        both = Travel(block, home, (1 + of_queries + of_keys) * product, own + 8 * rows, formed)
        alone = [] if differentiates and case.reduction != "none" else [Travel(block, None, product, 8 * rows, formed)]
        return [*alone, both] if differentiates else alone
    forward = _layout(columns, *codes, bias, keys), _layout(columns, statistics) if statistics else None
    found = [Travel(*forward, product, 40 * rows, formed)]
    if any(case.gradients):
        saved = 80 * (rows + columns[0] * bool(statistics))  # statistics and coefficients
        block = _layout(columns, *codes, statistics, bias, keys)
        found.append(Travel(block, home, (1 + of_queries + of_keys) * product, own, formed + saved))
    return found


def _of_search(case: Case) -> list[Travel]:
    """Let queries travel or, where all ranks have the same, what each found."""
    wide, rows, terms, integers = _wide(case), case.rows, case.terms, torch.int64
    of_queries, of_keys, _ = case.gradients
    asked = rows[0] if case.shared else sum(rows)
    flop = 2 * asked * case.columns[0] * terms
    # Of the same queries each rank merges a share, which all then have.
    ends = [rank * rows[0] // len(rows) for rank in range(len(rows) + 1)]
    shares, nothing = (
        [end - start for start, end in itertools.pairwise(ends)],
        _layout([0] * len(rows), (torch.uint8, 1)),
    )

    def shared(*entries: Any, first: int = 0, last: int = 0) -> list[Travel]:
        whole, share = _layout(rows, *entries).size(0), _layout(shares, *entries)
        return [
            Travel(nothing, share, first, beside=whole),
            Travel(share, flop=last, beside=2 * whole, stays=True),
        ]

    lists = [] if case.excluded is None else [(integers, 1, [b + 1 for b in rows]), (integers, 1, case.excluded)]
    query = case.dtype if case.plain else wide, terms
    value, number = (wide, case.k or 1), (integers, case.k or 1)  # found, or a target's
    if case.function == "ranks":
        score, counts = _layout(rows, value), _layout(rows, (integers, 2))
        if case.shared:
            return [*shared(value), *shared((integers, 2), first=flop)]
        scored = Travel(_layout(rows, number, query), score)
        return [scored, Travel(_layout(rows, number, value, *lists, query), counts, flop)]
    # The gradient of the values: every rank goes through what was found of its own keys, here as many as of the others'.
    of_values, own = 4 * case.k * terms * asked // len(rows), of_keys * case.columns[0] * terms * wide.itemsize
    found = _layout(rows, value, number)
    if case.shared:
        passes = shared(value, number, first=flop), shared(value, last=of_values)
    else:
        home = _layout(rows, (wide, terms)) if of_queries else None
        block = _layout(rows, value, number, (wide, terms))
        passes = [Travel(_layout(rows, *lists, query), found, flop)], [Travel(block, home, of_values, own)]
    return [*passes[0], *passes[1]] if any(case.gradients) else [*passes[0]]


def agreed(case: Case) -> list[int]:
    """Return the bytes that each rank tells each other before and after, a message each: sizes, counts, factors."""
    found = [8 * HEADER]
    if case.function == "contrastive_loss" and case.reduction == "mean" and (case.labels or case.ids):
        found.append(8 * (1 + case.symmetric))
    if case.function == "sigmoid_loss" and case.reduction != "none" and any(case.gradients):
        found.append(8)
    return found


# ---- formulas --------------------------------------------------------------------------------------------------------


def predicted(case: Case, method: str, machine: Machine = NOMINAL, workspace: int = 0) -> Predicted:
    """Predict what rank 0 does; kernels hold `workspace` bytes during a tile."""
    found, world, told = travels(case), len(case.rows), agreed(case)
    return Predicted(
        sum(sent(travel, world, method) for travel in found) + (world - 1) * sum(told),
        sum(travel.flop for travel in found),
        max(held(travel, world, method, workspace) for travel in found),
        sum(seconds(travel, world, method, machine) for travel in found) + (world > 1) * len(told) * machine.latency,
    )


def sent(travel: Travel, world: int, method: str) -> int:
    """Predict the bytes that rank 0 sends: by gather its own block to all, by ring all blocks but that of the next."""
    if world == 1:
        return 0
    blocks = [0] * (world - 1) if method == "gather" else [0, *range(2, world)]
    return sum(map(travel.block.size, blocks)) + sum(map(travel.home.size, range(1, world)) if travel.home else [])


def held(travel: Travel, world: int, method: str, workspace: int = 0) -> int:
    """Predict the most bytes beside the rank's own rows, its results among them, where all ranks have as many rows.

    These are the moments of ``exchange.py`` at which most tensors live: a tile being computed, or messages that begin.
    """
    (block, home), kept = travel.sizes(), travel.kept
    copied, several = len(travel.block.entries) > 1, bool(travel.home and len(travel.home.entries) > 1)
    if world == 1:
        return travel.beside + kept + home + workspace
    if travel.stays:
        return travel.beside + (world - 1 + copied) * block
    others, tile = world - 1, 2 * kept + workspace  # the sum, and what the tile adds
    made = home * several  # made of a tile, and copied to be sent
    if method == "gather":
        first, last = others * block + 2 * home + tile, block + world * home + made * (world > 2) + tile
        return travel.beside + copied * block + max(first, last, kept + (1 + 2 * others) * home + made)
    blocks = 1 + (copied or world > 2)
    begins = 3 if world > 3 or (copied and world > 2) else blocks  # one arrives, one is passed on, one was
    travelling = 2 * (world > 2)  # of what goes home: what arrived and has grown, and where the next arrives
    computing = blocks * block + (2 + travelling) * home + made * (world > 2) + tile
    passing_on = begins * block + kept + (1 + travelling) * home
    sending_home = blocks * block + kept + (3 + (world > 2)) * home + made
    return travel.beside + max(computing, passing_on, sending_home)


def seconds(travel: Travel, world: int, method: str, machine: Machine) -> float:
    """Predict the seconds where all ranks have as many rows: tiles and messages, which go on at the same time."""
    (block, home), tile = travel.sizes(), travel.flop / machine.flops / world
    if world == 1 or travel.stays:
        return world * tile + (world > 1) * _spread(block, world, method, machine)
    if method == "gather":
        comes_home = _spread(home, world, method, machine) if home else 0.0
        return max(tile, _spread(block, world, method, machine)) + (world - 1) * tile + comes_home
    speed, latency = machine.between if world > machine.node else machine.inside, machine.latency
    alone, both, last = block / speed + latency, (block + home) / speed + latency, home / speed + latency
    if not home:
        return (world - 1) * max(tile, alone) + tile
    if world == 2:
        return max(tile, alone) + tile + last
    return 2 * max(tile, alone) + (world - 3) * max(tile, both) + max(tile, last) + last


def _spread(size: int, world: int, method: str, machine: Machine) -> float:
    """Seconds until a message of each rank is with all others, and nothing else is done."""
    near = min(world, machine.node) - 1
    if method == "gather":  # to both at once
        return max(near * size / machine.inside, (world - 1 - near) * size / machine.between) + machine.latency
    speed = machine.between if world > machine.node else machine.inside
    return (world - 1) * (size / speed + machine.latency)


# ---- acted out -------------------------------------------------------------------------------------------------------


def simulated(travel: Travel, world: int, method: str, machine: Machine) -> float:
    """Act a travel out, message by message and tile by tile, as ``exchange.py`` has them; return the last rank's seconds.

    A rank computes a tile at a time. Its messages leave it in order, over one link to its node and one to the others.
    """
    (block, home), tile = travel.sizes(), travel.flop / machine.flops / world
    ranks, free = np.arange(world), np.zeros((2, world))  # when the links are free

    def send(to: np.ndarray, size: int, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return when all messages have been sent, by sender, and have arrived, by receiver."""
        far = (ranks // machine.node != to // machine.node).astype(int)
        start = np.maximum(at, free[far, ranks])
        free[far, ranks] = start + size / np.where(far, machine.between, machine.inside)
        arrives = free[far, ranks] + machine.latency
        return arrives, arrives[np.argsort(to)]

    def spread(size: int, at: np.ndarray) -> np.ndarray:
        """Return when a message of each rank has arrived at all others."""
        arrived = at
        for step in range(1, world):
            arrived = np.maximum(arrived, np.maximum(*send((ranks - step) % world, size, at)))
        return arrived

    now, after = np.zeros(world), (ranks + 1) % world
    if travel.stays:
        now, tile = now + world * tile, 0.0
    if method == "gather":
        now = np.maximum(now + tile, spread(block, now)) + (world - 1) * tile
        return float((spread(home, now) if home else now).max())
    coming, carried = send(after, block, now), (now, now)
    now = now + tile
    for step in range(1, world):
        now = np.maximum(now, np.maximum(*coming))
        if step < world - 1:
            coming = send(after, block, now)
        now = now + tile
        if home:
            now = np.maximum(now, np.maximum(*carried))
            carried = send(after, home, now)
    return float(np.maximum(now, np.maximum(*carried)).max())


# ---- tables ----------------------------------------------------------------------------------------------------------

BATCHES, WORLDS, TERMS = (2**16, 2**19, 2**22), (8, 64, 1024), 512
FEW_TO_MANY = (64, 256, 1024, 4096, 16384, 65536)  # rows of a rank
GALLERY, ASKED, BEST = 2**30, 2**16, 100  # keys of all ranks, queries in all, how many keys of each are found


def _even(function: str, rows: int, world: int, columns: int = 0, **fields: Any) -> Case:
    """Return a case of rows and terms in bfloat16, as many on each rank."""
    return Case(function, [rows] * world, [columns or rows] * world, TERMS, torch.bfloat16, **fields)


def _acted(case: Case, method: str) -> float:
    return sum(simulated(travel, len(case.rows), method, NOMINAL) for travel in travels(case))


def _table(head: str, rows: list[list[Any]]) -> str:
    def cell(x: Any) -> str:
        return str(x) if isinstance(x, str) else f"{x:{',.0f' if x >= 100 else '.3g'}}"

    cells = [head, *(" | ".join(map(cell, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in (cells[0], " | ".join(["---"] * (head.count(" | ") + 1)), *cells[1:]))


def _holds(batch: int, world: int) -> list[float]:
    """Return the bytes held by gather and by ring, and in two matrices of a rank's scores, each side's with all others."""
    case = _even("contrastive_loss", batch // world, world)
    return [*(predicted(case, method).held for method in METHODS), 2 * 4 * batch * batch / world]


def _losses() -> str:
    rows = []
    for batch, world in itertools.product(BATCHES, WORLDS):
        case = _even("contrastive_loss", batch // world, world)
        gather, ring = (predicted(case, method) for method in METHODS)
        times = ring.flop / NOMINAL.flops, gather.seconds, ring.seconds, _acted(case, "ring")
        cells = [batch, world, batch // world, ring.flop / 1e12]
        rows.append([*cells, *(x / 2**30 for x in (ring.sent, *_holds(batch, world))), *(1e3 * x for x in times)])
    head = "B | ranks | rows a rank | TFLOP | GiB sent | held by gather | by ring | two matrices of scores"
    return _table(f"{head} | ms: tiles alone | gather | ring | ring, acted out", rows)


def _ends() -> str:
    """Return the greatest batch, a power of two, of which what is held fits the memory."""
    rows = []
    for world in WORLDS:
        batches = [2**i for i in range(10, 40)]
        held = [_holds(batch, world) for batch in batches]
        fits = [[size <= NOMINAL.memory for size in sizes].index(False) for sizes in zip(*held, strict=True)]
        rows.append([world, *(batches[i - 1] for i in fits)])
    return _table("ranks | gather | ring | two matrices of scores", rows)


def _ways() -> str:
    rows: list[list[Any]] = []
    for of_rank in FEW_TO_MANY:
        rows.append([of_rank])
        for world in WORLDS:
            case = _even("contrastive_loss", of_rank, world)
            gather, ring = (_acted(case, method) for method in METHODS)
            tiles = predicted(case, "ring").flop / NOMINAL.flops
            rows[-1] += [f"{gather / ring:.2f}", f"{tiles / ring:.0%}"]
    return _table(" | ".join(["rows a rank", *(f"{w} ranks: gather / ring | tiles / ring" for w in WORLDS)]), rows)


def _hides() -> str:
    """Return the rows of a rank from which on a tile takes as long as a block and what goes home, latency aside."""
    rows = []
    for function, phases in (("contrastive_loss", ("forward", "backward")), ("sigmoid_loss", ("both",))):
        for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
            case = _even(function, 1, 2)._replace(dtype=dtype)
            for travel, phase in zip(travels(case), phases, strict=True):
                a_row = 2 * sum(travel.sizes()) / travel.flop  # bytes by FLOPs of a pair: there are two tiles
                least = [a_row * NOMINAL.flops / speed for speed in (NOMINAL.inside, NOMINAL.between)]
                rows.append([f"`{function}`, {phase}", name, *least])
    return _table("loss, pass | dtype | within a node | between nodes", rows)


def _searches() -> str:
    rows = []
    for world, shared in itertools.product(WORLDS, (False, True)):
        given = {"k": BEST, "shared": shared, "gradients": (False, False, False)}
        case = _even("top_k", ASKED if shared else ASKED // world, world, GALLERY // world, **given)
        found = predicted(case, "ring")
        times = found.flop / NOMINAL.flops, _acted(case, "ring")
        sizes = found.flop / 1e12, found.sent / 2**30, found.held / 2**30
        rows.append([world, "shared" if shared else "own", *sizes, *(1e3 * x for x in times)])
    return _table("ranks | queries | TFLOP | GiB sent | GiB held | ms: tiles alone | ring, acted out", rows)


TABLES = (_losses, _ends, _ways, _hides, _searches)


def main() -> None:
    """Print the tables of docs/scale.md."""
    print("\n\n".join(table() for table in TABLES))


if __name__ == "__main__":
    main()
