"""Rows C1 to C10: all pairs, mixing, contrastive losses and search, against torch, np.matmul, FAISS and the limit.

What lives here: sizes, the contenders' code as a user writes it without us, the floors, the count of FLOPs. What lives
elsewhere: timing (``measure.py``), keys larger than memory (``memory_map.py``). A new row is one entry of `_table`.
B queries, C keys, n terms. Sides are drawn with rows of length about 1, as embeddings are normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import fusionsum as fs

from .machine import Thunk
from .rows import BOTH, FORWARD, Floor, Row

SCALE, BIAS = 20.0, -10.0  # logit_scale and logit_bias; SigLIP's initial bias


@dataclass(frozen=True)
class ScoreRow(Row):
    """A call of `fusion_sum`, a loss or a search; `shapes` are the factors', the keys' last."""

    codes: dict[str, Callable[..., Any]]  # (*operands), by the contender's name; "ours" among them
    pairs: tuple[int, int, int]  # B, C, n
    products: dict[str, int]  # of each phase: matrix products of B x C x n multiply-adds that it must form
    _: KW_ONLY
    dtype: torch.dtype = torch.float32  # of the factors
    scalars: tuple[float, ...] = ()  # operands before the factors, float32
    arrays: tuple[tuple[str, Callable[..., Thunk]], ...] = ()  # name and maker (*NumPy operands) of forward contenders
    uncompiled: str = ""  # the reason why torch.compile is no contender
    omitted: tuple[tuple[str, str], ...] = ()  # name and reason of other contenders that are none
    memory: int = 0  # the floor in bytes
    parts: ScoreRow | None = None  # a smaller row, which repeated until it has as many pairs is a contender
    apart: bool = False  # whether our memory is measured in a process of its own
    exact: Callable[..., list[Tensor]] | None = None  # (grad_output, *float64 operands): results; None: naive's
    read: Callable[..., list[Tensor]] | None = None  # (result, *operands): what contenders must agree in
    slack: float = 0.0  # of counts, which roundings change by one

    @property
    def phases(self) -> tuple[str, ...]:
        """A search has no backward."""
        return tuple(self.products)

    @property
    def unlimited(self) -> str:
        """All have a limit."""
        return ""

    @property
    def rate(self) -> str:
        """One query reads the keys, many multiply."""
        return "GB/s" if self.pairs[0] == 1 else "GFLOP/s"

    @property
    def memory_floor(self) -> int:
        """The losses' and searches'."""
        return self.memory

    @property
    def bytes(self) -> dict[str, int]:
        """Compulsory traffic without a matrix of scores: forward reads the factors once, backward writes as much."""
        forward = sum(int(np.prod(shape)) for shape in self.shapes) * self.dtype.itemsize
        return {phase: forward * (1 if phase == FORWARD else 3) for phase in self.phases}

    @property
    def flop(self) -> dict[str, int]:
        """Operations of the matrix products."""
        return {phase: 2 * count * int(np.prod(self.pairs)) for phase, count in self.products.items()}

    @property
    def tolerance(self) -> float:
        """The distance from ours, of the greatest value, at which a contender computes something else."""
        return 64 * torch.finfo(self.dtype).eps + self.slack

    def build(self, device: str = "cpu") -> list[Tensor]:
        """Make the operands, scalars first; seeded, and the same on any device."""
        generator = torch.Generator().manual_seed(0)
        factors = [(torch.randn(s, generator=generator) / s[-1] ** 0.5).to(self.dtype) for s in self.shapes]
        return [x.to(device) for x in (*map(torch.tensor, self.scalars), *factors)]


# ---- C1, C2, C10: the matrix is stored --------------------------------------------------------------------------------


def _pairs(w: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return (w * f) @ g.T


def _our_pairs(w: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return fs.fusion_sum(w, f[:, None], g)


def _matmul(w: np.ndarray, f: np.ndarray, g: np.ndarray) -> Thunk:
    return lambda: np.matmul(w * f, g.T)


def _mixed(f: Tensor, g: Tensor, w: Tensor) -> Tensor:
    return (f * g) @ w.T


def _our_mixed(f: Tensor, g: Tensor, w: Tensor) -> Tensor:
    return fs.fusion_sum(w, f[:, None], g[:, None])


def _entities(h: Tensor, r: Tensor, e: Tensor) -> Tensor:
    return (h * r) @ e.T


def _our_entities(h: Tensor, r: Tensor, e: Tensor) -> Tensor:
    return fs.fusion_sum(None, h[:, None], r[:, None], e)


# ---- C3, C4, C9: open_clip's ClipLoss and SigLipLoss, loss.py --------------------------------------------------------


def _clip(scale: Tensor, f: Tensor, g: Tensor) -> Tensor:
    logits = scale * f @ g.T
    labels = torch.arange(len(f), device=f.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def _our_clip(scale: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return fs.contrastive_loss(f, g, logit_scale=scale)


def _siglip(scale: Tensor, bias: Tensor, f: Tensor, g: Tensor) -> Tensor:
    logits = scale * f @ g.T + bias
    signs = 2 * torch.eye(len(f), dtype=logits.dtype, device=f.device) - 1
    return -functional.logsigmoid(signs * logits).sum() / len(f)


def _our_siglip(scale: Tensor, bias: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return fs.sigmoid_loss(f, g, logit_scale=scale, logit_bias=bias)


def _sliced_clip(grad_output: Tensor, scale: Tensor, f: Tensor, g: Tensor) -> list[Tensor]:
    """Return loss and gradients of `_clip` by slices of queries, where autograd would keep the whole matrix."""
    slices = torch.arange(len(f), device=f.device).split(1024)
    rows = torch.cat([torch.logsumexp(scale * f[at] @ g.T, 1) for at in slices])
    columns = torch.stack([torch.logsumexp(scale * f[at] @ g.T, 0) for at in slices]).logsumexp(0)
    loss = ((rows + columns) / 2 - scale * (f * g).sum(1)).mean()
    d_scale, d_f, d_g = torch.zeros_like(scale), torch.zeros_like(f), torch.zeros_like(g)
    for at in slices:
        scores = f[at] @ g.T
        gamma = torch.exp(scale * scores - rows[at, None]) + torch.exp(scale * scores - columns)
        gamma[at - at[0], at] -= 2
        gamma *= grad_output / (2 * len(f))
        d_scale += (gamma * scores).sum()
        d_f[at] = scale * gamma @ g
        d_g += scale * gamma.T @ f[at]
    return [loss, d_scale, d_f, d_g]


# ---- C5 to C7: search -----------------------------------------------------------------------------------------------


def _top_k(k: int, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.topk(f @ g.T, k))


def _our_top_k(k: int, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return fs.top_k(f, g, k)


def _faiss(k: int, f: np.ndarray, g: np.ndarray) -> Thunk:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(g.shape[1])
    index.add(g)
    return lambda: index.search(f, k)


def _found(result: Any, f: Tensor, g: Tensor) -> list[Tensor]:
    """Return the values, and in float64 the scores of the keys whose indices were returned."""
    values, indices = map(torch.as_tensor, result)
    return [values, (f[:, None].double() * g[indices].double()).sum(-1)]


def _ranks(f: Tensor, g: Tensor) -> Tensor:
    """Rank key b for query b, in tiles of 256 queries."""
    found = []
    for at in torch.arange(len(f), device=f.device).split(256):
        scores = f[at] @ g.T
        target = scores.gather(1, at[:, None])
        found.append(1 + (scores > target).sum(1) + ((scores == target).sum(1) - 1) / 2)
    return torch.cat(found)


def _our_ranks(f: Tensor, g: Tensor) -> Tensor:
    return fs.ranks(f, g, torch.arange(len(f), device=f.device))


# ---- the table -------------------------------------------------------------------------------------------------------

_MIB = 2**20
_SEARCHED = "most of it is torch.mm and torch.topk"
_STORED, _LOSS, _ONE_PASS = {FORWARD: 1, BOTH: 3}, {FORWARD: 1, BOTH: 4}, {FORWARD: 1, BOTH: 3}
_PAIRS = {"ours": _our_pairs, "naive": _pairs}
_CLIP, _SIGLIP = {"ours": _our_clip, "naive": _clip}, {"ours": _our_siglip, "naive": _siglip}


def _faster(low: float, zen5: float = 0) -> tuple[Floor, ...]:
    """Return the floors of a training step against naive torch."""
    every = Floor(BOTH, "naive", low)
    return (Floor(BOTH, "naive", zen5, where="Zen 5"), every) if zen5 else (every,)


def _all_pairs_row(b: int, n: int) -> ScoreRow:
    # naive is torch.mm: it and np.matmul together are the best BLAS
    floors = [*(Floor(FORWARD, blas, 0.95) for blas in ("naive", "np.matmul")), *_faster(1.2, 1.8)]
    if n >= 256:
        floors.append(Floor(FORWARD, "limit", 0.75))
    name, work, shapes = f"C1 n={n}", f"all pairs, {b} × {b}", ((n,), (b, n), (b, n))
    return ScoreRow(name, work, shapes, tuple(floors), _PAIRS, (b, b, n), _STORED, arrays=(("np.matmul", _matmul),))


def _clip_row(b: int, n: int, *floors: Floor) -> ScoreRow:
    name, work, shapes = f"C3 n={n}", f"symmetric InfoNCE, B={b}", ((b, n), (b, n))
    return ScoreRow(name, work, shapes, floors, _CLIP, (b, b, n), _LOSS, scalars=(SCALE,), memory=16 * _MIB)


def _siglip_row(b: int, n: int, *floors: Floor) -> ScoreRow:
    name, work, shapes = f"C4 n={n}", f"sigmoid loss, B={b}", ((b, n), (b, n))
    scalars = (SCALE, BIAS)
    return ScoreRow(name, work, shapes, floors, _SIGLIP, (b, b, n), _ONE_PASS, scalars=scalars, memory=16 * _MIB)


def _search_row(name: str, k: int, b: int, c: int, n: int, *floors: Floor, **kind: Any) -> ScoreRow:
    return ScoreRow(
        name,
        f"top {k} of {c} keys, B={b}, n={n}",
        ((b, n), (c, n)),
        floors,
        {"ours": partial(_our_top_k, k), "naive": partial(_top_k, k)},
        (b, c, n),
        {FORWARD: 1},
        arrays=(("FAISS", partial(_faiss, k)),),
        uncompiled=_SEARCHED,
        read=_found,
        **kind,
    )


def _in_16_bits(row: ScoreRow) -> list[ScoreRow]:
    """Return the row in bfloat16 and float16, held to our own float32 in its last phase, or in both of a matrix."""
    phases = row.phases if row.products == _STORED else row.phases[-1:]
    slack = 0.25 if row.products == _LOSS else 0.0  # naive sums the gradient of logit_scale over all pairs in 16 bits
    rows = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        pairs = [Floor(phase, "our float32", 1.5, where="AVX512_BF16") for phase in phases] if short == "bf16" else []
        rows.append(
            replace(
                row,
                name=f"C8 {short}, {row.name}",
                floors=(*pairs, *(Floor(phase, "our float32", 0.9) for phase in phases)),
                dtype=dtype,
                slack=slack,
                memory=0,  # gradients are summed in float32, beyond those of 16 bits
                arrays=(),
                uncompiled="it is measured in float32",
                omitted=tuple((name, "it has no 16-bit types") for name, _ in row.arrays),
            )
        )
    return rows


def _large_row(b: int, times: int) -> ScoreRow:
    """Return a batch whose matrix does not fit the memory, and as its contender the small batches of as many pairs."""
    small, reason = _clip_row(b // times, 256), f"its matrices take {3 * 4 * b * b / 1e9:.2g} GB"
    return replace(
        _clip_row(b, 256),
        name="C9",
        work=f"symmetric InfoNCE, B={b}, n=256",
        floors=(Floor(BOTH, f"{times**2} × B={b // times}", 1.1, at_most=True),),
        codes={"ours": _our_clip},
        products={BOTH: 4},
        uncompiled=reason,
        omitted=(("naive", reason),),
        memory=64 * _MIB,
        parts=small,
        most_pairs=3,
        apart=True,
        exact=_sliced_clip,
    )


def _table(divisor: int) -> tuple[ScoreRow, ...]:
    """Return the rows, with batches and keys divided."""
    b, keys = 4096 // divisor, 1_000_000 // divisor
    h, entities, ranked = 1024 // divisor, 14541 // divisor, 100_000 // divisor
    pairs = [_all_pairs_row(b, n) for n in (64, 256, 512)]
    mixing = ScoreRow(
        "C2",
        f"mixing, B={2 * b}, n=512, O=256",
        ((2 * b, 512), (2 * b, 512), (256, 512)),
        _faster(1.2, 1.8),
        {"ours": _our_mixed, "naive": _mixed},
        (2 * b, 256, 512),
        _STORED,
    )
    clip = [_clip_row(b, 64, *_faster(3)), _clip_row(b, 256), _clip_row(b, 512, *_faster(1, 2))]
    siglip = [_siglip_row(b, 64, *_faster(3)), _siglip_row(b, 512, *_faster(1.5))]
    found = (Floor(FORWARD, "FAISS", 2, where="AVX-512"), Floor(FORWARD, "FAISS", 1), Floor(FORWARD, "naive", 2))
    top_k = [_search_row(f"C5 k={k}", k, 256 // divisor, keys, 128, *found, memory=64 * _MIB) for k in (10, 100)]
    one = (Floor(FORWARD, "limit", 0.85), Floor(FORWARD, "FAISS", 1.2))
    single = _search_row("C6", 10, 1, keys, 128, *one)
    ranks = ScoreRow(
        "C7",
        f"ranks among {ranked} keys, B={b}, n=128",
        ((b, 128), (ranked, 128)),
        (Floor(FORWARD, "naive", 2),),
        {"ours": _our_ranks, "naive": _ranks},
        (b, ranked, 128),
        {FORWARD: 1},
        uncompiled="most of it is torch.mm",
        slack=10 / ranked,
    )
    low = [_in_16_bits(row) for row in (pairs[0], pairs[-1], clip[0], clip[-1], top_k[0])]
    graph = ScoreRow(
        "C10",
        f"h∘r, B={h}, n=200, against {entities} entities",
        ((h, 200), (h, 200), (entities, 200)),
        _faster(1.2),
        {"ours": _our_entities, "naive": _entities},
        (h, entities, 200),
        _STORED,
    )
    rows = *pairs, mixing, *clip, *siglip, *top_k, single, ranks, *(row for both in low for row in both)
    return (*rows, _large_row(8 * b, 8), graph)


def on_gpu(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Return the rows as a GPU's: no floor of speed is known of any, and what takes NumPy's arrays is left out.

    Of a training step whose launches take longer than its arithmetic there is a row in a CUDA graph, too.
    """
    found = []
    for row in rows:
        omitted = (*row.omitted, *((name, "it runs on the CPU") for name, _ in row.arrays))
        memory = row.memory and 64 * _MIB  # a chunk of scores is in memory
        found.append(replace(row, floors=(), arrays=(), omitted=omitted, memory=memory, apart=False))
    small = next(row for row in found if row.name == "C3 n=64")
    graphed = replace(small, name=f"{small.name} graph", work=f"{small.work}, in a CUDA graph", graphed=True)
    return [*found, graphed]


SCORES = _table(1)
# For CI: the floors are of the full sizes.
QUICK_SCORES = tuple(replace(row, floors=(), memory=0) for row in _table(64))
