"""The rows: the sums that are measured, a user's code for each without us, and the floors to reach.

What lives here: the record of a row; shapes, dtypes, the contenders' code, the floors, the count of bytes and FLOPs of
sums. What lives elsewhere: whole layers (``layers.py``), all pairs, losses and search (``scores.py``), timing
(``measure.py``). A new row is one entry of `ROWS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

FORWARD, BACKWARD, BOTH = PHASES = ("forward", "backward", "forward + backward")


@dataclass(frozen=True)
class Floor:
    """A goal: the contender's time divided by ours is at least `ratio`; `at_most`: ours by the contender's is at most."""

    phase: str
    against: str
    ratio: float
    at_most: bool = False
    _: KW_ONLY
    where: str = ""  # only on machines of this trait (`machine.Cpu.traits`); stands before the floor of all others

    def passed(self, ratio: float) -> bool:
        """Return whether the contender's time divided by ours reaches the goal."""
        return 1 / ratio <= self.ratio if self.at_most else ratio >= self.ratio


@dataclass(frozen=True)
class Row(ABC):
    """One row of the benchmark: a sum (`SumRow`), a whole layer (``layers.LayerRow``), scores (``scores.ScoreRow``)."""

    name: str
    work: str
    shapes: tuple[tuple[int, ...], ...]  # of the factors, or of the layer's inputs
    floors: tuple[Floor, ...]
    _: KW_ONLY
    threads: int = 0  # 0: as many as asked for
    calls: int = 1  # per timed batch, at least
    graphed: bool = False  # replayed from a CUDA graph
    most_pairs: int = 0  # timed, where one call lasts seconds; 0: as many as asked for

    roofline: ClassVar[bool] = False  # whether the row is drawn there

    @property
    @abstractmethod
    def memory_floor(self) -> int:
        """The extra memory that ours may take, in bytes; 0 if there is no such floor."""

    def floors_on(self, traits: Collection[str]) -> list[Floor]:
        """Return the floors on a machine of these traits: of a phase and contender the first that applies."""
        found: dict[tuple[str, str], Floor] = {}
        for floor in self.floors:
            if not floor.where or floor.where in traits:
                found.setdefault((floor.phase, floor.against), floor)
        return list(found.values())

    @property
    @abstractmethod
    def phases(self) -> tuple[str, ...]:
        """The phases that are timed."""

    @property
    @abstractmethod
    def unlimited(self) -> str:
        """The reason why the machine's limit is no contender; empty if it is one."""

    @property
    def rate(self) -> str:
        """What bounds the row, and what the report counts: bytes, or operations ("GFLOP/s")."""
        return "GB/s"

    @property
    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Compulsory traffic of each phase."""

    @property
    @abstractmethod
    def flop(self) -> dict[str, int]:
        """Operations of each phase."""


@dataclass(frozen=True)
class SumRow(Row):
    """A call of `fusion_sum`; B rows, n terms, O outputs, K candidates, M = ``len(shapes)`` modalities."""

    weights: tuple[int, ...]
    code: tuple[Callable[..., Any], Callable[..., Any] | None]  # a user's: naive, and by einsum, which not all have
    _: KW_ONLY
    dtype: torch.dtype = torch.float32  # of the factors; the weights are float32
    activations: tuple[str | None, ...] | None = None
    masked: bool = False
    dim: int = -1
    arrays: str = "torch"

    roofline = True
    memory_floor = 2**20  # theirs is threads x n x a small constant, less than the resident set resolves

    @property
    def phases(self) -> tuple[str, ...]:
        """NumPy has no backward."""
        return (FORWARD,) if self.arrays == "numpy" else PHASES

    @property
    def unlimited(self) -> str:
        """Bandwidth is no limit below 1 MiB, where a torch call's own overhead exceeds the transfer to measure."""
        return "" if self.bytes[FORWARD] >= 2**20 else "it is overhead, not bandwidth"

    @property
    def bytes(self) -> dict[str, int]:
        """Compulsory traffic: forward reads the factors once, backward reads them and writes as much."""
        forward = sum(math.prod(shape) for shape in self.shapes) * self.dtype.itemsize
        return {FORWARD: forward, BACKWARD: 2 * forward, BOTH: 3 * forward}

    @property
    def flop(self) -> dict[str, int]:
        """Operations: 3 forward and 6 backward per term for two modalities, M + 1 and 4 M for more."""
        terms, count = math.prod(np.broadcast_shapes(*self.shapes)), len(self.shapes)
        forward, backward = terms * (count + 1), terms * (6 if count == 2 else 4 * count)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}

    @property
    def tolerance(self) -> float:
        """The distance from ours, of the greatest value, at which a contender computes something else.

        4 roundings of the factors' dtype and 64 of float32, the accumulator's.
        """
        return 4 * torch.finfo(self.dtype).eps + 64 * torch.finfo(torch.float32).eps

    def build(self, device: str = "cpu") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Make the operands (weights first) and one mask per factor, 30% absent, or none; the same on any device."""
        generator = torch.Generator().manual_seed(0)
        operands = [torch.randn(self.weights, generator=generator)]
        operands += [torch.randn(shape, generator=generator).to(self.dtype) for shape in self.shapes]
        masks = [torch.rand(shape[0], generator=generator) >= 0.3 for shape in self.shapes if self.masked]
        return [x.to(device) for x in operands], [mask.to(device) for mask in masks]


def _paired(w, f, g):
    return (w * f * g).sum(-1)


def _paired_einsum(w, f, g):
    return torch.einsum("n,bn,bn->b", w.to(f.dtype), f, g)  # einsum takes operands of one dtype only


def _activated(w, x, y, z):
    return (w * torch.tanh(x) * torch.sigmoid(y) * z).sum(-1)


def _activated_einsum(w, x, y, z):
    return torch.einsum("n,bn,bn,bn->b", w, torch.tanh(x), torch.sigmoid(y), z)


def _masked(w, x, y, z, has_x, has_y, has_z):
    x = torch.where(has_x[:, None], x, 1.0)
    y = torch.where(has_y[:, None], y, 1.0)
    z = torch.where(has_z[:, None], z, 1.0)
    return (w * x * y * z).sum(-1)


def _vector(w, f, g):
    return (w * f * g).sum(1)


def _vector_einsum(w, f, g):
    return torch.einsum("r,bro,bro->bo", w[:, 0], f, g)


def _candidates(w, h, r, t):
    return (w * h * r * t).sum(-1)


def _candidates_einsum(w, h, r, t):
    return torch.einsum("n,bn,bn,bkn->bk", w, h[:, 0], r[:, 0], t)


def _numpy_einsum(w, f, g):
    return np.einsum("n,bn,bn->b", w, f, g)


def _floors(forward: float = 0, both: float = 0, compiled: float = 0, *more: Floor) -> tuple[Floor, ...]:
    ratios = (Floor(FORWARD, "naive", forward), Floor(BOTH, "naive", both), Floor(BOTH, "torch.compile", compiled))
    return (*(floor for floor in ratios if floor.ratio), *more)


PAIRED, NUMPY = (_paired, _paired_einsum), (_paired, _numpy_einsum)
ACTIVATED, MASKED = (_activated, _activated_einsum), (_masked, None)
VECTOR, CANDIDATES = (_vector, _vector_einsum), (_candidates, _candidates_einsum)

_BIG, _THREE, _MIDDLE = ((65536, 512),) * 2, ((16384, 512),) * 3, ((8192, 512),) * 2
_ENTITIES = ((512, 1, 256), (512, 1, 256), (512, 256, 256))
_P1 = _floors(2.5, 3, 2.5, Floor(FORWARD, "limit", 0.85), Floor(BACKWARD, "limit", 0.85))
_P5 = _floors(4, 4, 2.5, Floor(FORWARD, "our float32", 1.7), Floor(BOTH, "our float32", 1.7))
_P6 = ("tanh", "sigmoid", None)
_P7 = _floors(0, 4, 0, Floor(FORWARD, "our unmasked", 1.15, True), Floor(BOTH, "our unmasked", 1.15, True))
_P10 = (Floor(FORWARD, "naive", 4), Floor(FORWARD, "einsum", 4))

# The floors are goals, not promises. P10's contenders are loops and element-wise operations: none calls BLAS, so that
# the choice of OpenBLAS kernel does not matter to it.
ROWS: tuple[SumRow, ...] = (
    SumRow("P1", "M=2, B=65536, n=512", _BIG, _P1, (512,), PAIRED),
    SumRow("P2", "M=2, B=8192, n=512", _MIDDLE, _floors(4, 3.8, 2.8), (512,), PAIRED),
    SumRow("P3", "M=2, B=1024, n=256", ((1024, 256),) * 2, _floors(2.5, 2.5, 2.5), (256,), PAIRED),
    SumRow("P4", "M=2, B=64, n=64", ((64, 64),) * 2, _floors(1.8, 1.2, 3), (64,), PAIRED, threads=1, calls=200),
    SumRow("P5 bf16", "P1 in bf16, f32 weights", _BIG, _P5, (512,), PAIRED, dtype=torch.bfloat16),
    SumRow("P5 f16", "P1 in f16, f32 weights", _BIG, _P5, (512,), PAIRED, dtype=torch.float16),
    SumRow("P6", "M=3, tanh and sigmoid, B=16384, n=512", _THREE, _floors(4, 4, 2), (512,), ACTIVATED, activations=_P6),
    SumRow("P7", "M=3, 30% absent, B=16384, n=512", _THREE, _P7, (512,), MASKED, masked=True),
    SumRow("P8", "B=4096, R=16, O=128, dim=1", ((4096, 16, 128),) * 2, _floors(2.5, 3, 2), (16, 1), VECTOR, dim=1),
    SumRow("P9", "candidates, B=512, K=256, n=256", _ENTITIES, _floors(3, 3, 2), (256,), CANDIDATES),
    SumRow("P10", "NumPy, B=8192, n=512", _MIDDLE, _P10, (512,), NUMPY, arrays="numpy"),
)

# On a GPU the floor is its copy bandwidth, of the rows whose time the bytes alone should determine.
_COPY, _COPIES = tuple(Floor(phase, "limit", 0.85) for phase in (FORWARD, BACKWARD)), ("P1", "P5 bf16", "P5 f16", "P6")
_ON_GPU = [
    replace(row, floors=_COPY if row.name in _COPIES else ()) for row in ROWS if row.name not in ("P2", "P3", "P10")
]
_GRAPHED = [
    replace(row, name="P4 graph", work="P4 in a CUDA graph", graphed=True) for row in _ON_GPU if row.name == "P4"
]
CUDA_ROWS = (*_ON_GPU, *_GRAPHED)


def select(names: str, rows: Sequence[Any] = ROWS) -> list[Any]:
    """Return the rows of a comma-separated list of names, all rows if it is empty; P5 means both dtypes of P5."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = list(dict.fromkeys(row.name.split()[0] for row in rows))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"--rows: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return [row for row in rows if not wanted or row.name.split()[0] in wanted]
