"""Scores of tensors on a GPU: a chunk of them at a time, by torch's products of matrices and our steps of epilogues.

    product[r, c] = sum_i A[r, i] K[c, i]          torch.mm, to a buffer that the second-level cache holds
    steps of the epilogue                          csrc/cuda/scores, which read it there
    dA += Gamma K,    dK += Gamma.T A              torch.mm again

What lives here: the loop over chunks, and the functions that `tensors` evaluates by it. What lives elsewhere: the same on
the CPU (``csrc/cpu/scores``), in NumPy (``reference.py``), what the statistics mean (``combination.py``).

Nothing here waits for the GPU: scalars, labels and targets are read by the kernels, where the device has them. A side is
formed once. It is bfloat16 where all that makes it is, as on the CPU (``csrc/scores.h``); a single factor of 16 bits is
taken as it is; all else is float32 or float64, and float32 is multiplied as torch's settings say. Equal keys score alike
if a product of matrices gives them equal results: so chunks of keys are of one shape, and the last may begin within the
one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import load_cuda, native
from .scores import Scores, Search
from .sides import Side, sides, wide

CHUNK_BYTES = 2**24  # of scores in float32: half of the second-level cache of an A100's or H100's partition
MOST_ROWS = 2048  # of a chunk, where there are as many columns
MOST_SELECTED = 1024  # k of the kernel; beyond, scores are sorted
MOST_KEYS = 2**32 - 2  # which a hit can number
LEAST_BYTES = 2**18  # of a chunk, where memory is short
_ROUND = 32  # entries to which rows of a chunk are rounded up
_LEFT_OUT = {torch.int32: 0x7FC0F5F5, torch.int64: 0x7FF8F5F5F5F5F5F5}  # csrc/cuda/scores/tile.cuh


class Chunk(NamedTuple):
    """Some rows and columns of all scores; the first `skip` columns were in the chunk before."""

    rows: slice
    cols: slice
    skip: int


class Sides(NamedTuple):
    """The formed sides, (B, n) and (C, n), of one dtype, and the dtype of their products."""

    queries: Tensor
    keys: Tensor
    wide: torch.dtype


def form(call: Scores | Search) -> Sides:
    """Form both sides of a call."""
    of_queries, of_keys = sides(call)
    dtypes = {x.dtype for x in call.operands}
    dtype = of_all = wide(call)
    single = of_queries.is_a_factor() and of_keys.is_a_factor()
    if len(dtypes) == 1 and (single or (dtypes == {torch.bfloat16} and isinstance(call, Scores))):
        if of_all == torch.float32:
            (dtype,) = dtypes
    return Sides(_formed(of_queries, dtype), _formed(of_keys, dtype), of_all)


def _formed(side: Side, dtype: torch.dtype) -> Tensor:
    return side.formed(dtype, lambda *call: native.fusion_sum(*call, True)).contiguous()


# ---- products of matrices --------------------------------------------------------------------------------------------


def _multiply(a: Tensor, b: Tensor, to: Tensor, *, add: bool = False) -> None:
    """Put the product of two matrices into another of a dtype that may be wider, or add it."""
    with torch._C._DisableAutocast():  # else torch would round the operands
        if a.dtype == to.dtype:
            to.addmm_(a, b, beta=int(add))
        elif add:
            to += torch.mm(a, b, out_dtype=to.dtype)  # addmm of two dtypes is not the same in all versions of torch
        else:
            torch.mm(a, b, out_dtype=to.dtype, out=to)


class Walk:
    """A call's chunks, the memory for one of them, and what all steps of it are told."""

    def __init__(self, call: Scores | Search, *, gamma: bool = False, alike: bool = False) -> None:
        if reason := load_cuda():
            raise ValueError(f"queries: are on {call.queries[0].device}, but {reason}; or move them to the CPU")
        self.sides = form(call)
        self.rows, self.cols = len(self.sides.queries), len(self.sides.keys)
        self.fields: dict[str, Any] = {"all_rows": self.rows, "all_cols": self.cols}
        names = ["key_bias", "exclude"]
        if isinstance(call, Scores):
            names += ["query_labels", "key_labels", "query_ids", "key_ids"]
            for name in ("logit_scale", "logit_bias"):
                x = getattr(call, name)
                self.fields[name] = x.double() if isinstance(x, Tensor) else float(x)
        self.fields |= {name: x.detach() for name in names if (x := getattr(call, name)) is not None}
        self._chunks: list[Chunk] = []
        if self.rows and self.cols:
            self._chunks = self._allocated(gamma and self.sides.queries.dtype == torch.bfloat16, alike)

    def _allocated(self, narrow: bool, alike: bool) -> list[Chunk]:
        """Cut the scores and allocate a chunk's products and, if Gamma is narrower, Gamma; less, if memory is short."""
        most = CHUNK_BYTES
        while True:
            found = cut(self.rows, self.cols, most // self.sides.wide.itemsize, alike=alike)
            high, wide = (found[0].rows.stop, found[0].cols.stop)
            padded = -(-wide // _ROUND) * _ROUND
            try:
                self._products = self.sides.queries.new_empty((high, padded), dtype=self.sides.wide)
                self._gamma = self.sides.queries.new_empty((high, padded)) if narrow else self._products
            except torch.cuda.OutOfMemoryError as error:
                if most <= LEAST_BYTES:
                    raise torch.cuda.OutOfMemoryError(
                        f"the scores of {self.rows} queries and {self.cols} keys: no memory for a chunk of "
                        f"{high * padded * self.sides.wide.itemsize} bytes, the least that is tried; {error}"
                    ) from error
                most //= 4
            else:
                return found

    def __iter__(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield each chunk and its products."""
        for chunk in self._chunks:
            products = self.part(self._products, chunk)
            self.multiply(chunk, products)
            yield chunk, products

    def first(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield the chunks of the first columns, and memory for their products."""
        return ((chunk, self.part(self._products, chunk)) for chunk in self._chunks if chunk.cols.start == 0)

    def multiply(self, chunk: Chunk, to: Tensor) -> None:
        """Put a chunk's products there."""
        _multiply(self.sides.queries[chunk.rows], self.sides.keys[chunk.cols].T, to)

    def part(self, of: Tensor, chunk: Chunk) -> Tensor:
        """Return as much of a chunk's memory as this one takes."""
        return of[: chunk.rows.stop - chunk.rows.start, : chunk.cols.stop - chunk.cols.start]

    def gamma(self, chunk: Chunk) -> Tensor:
        """Return where Gamma goes: in the place of the products, or beside them."""
        return self.part(self._gamma, chunk)

    def step(self, name: str, chunk: Chunk, products: Tensor, **fields: Any) -> None:
        """Launch a step of an epilogue."""
        where = {"first_row": chunk.rows.start, "first_col": chunk.cols.start, "skip": chunk.skip}
        native.step(name, products, **where, **self.fields, **fields)

    def new(self, *shape: int, dtype: torch.dtype = torch.float64, fill: float = 0) -> Tensor:
        """Allocate what steps add to."""
        return self.sides.queries.new_full(shape, fill, dtype=dtype)


def cut(rows: int, cols: int, entries: int, *, alike: bool = False) -> list[Chunk]:
    """Cut scores into chunks of at most so many entries, for some columns all rows.

    With `alike`, those of several columns have as many each, and no more rows than that.

    Examples
    --------
    >>> [(c.rows, c.cols, c.skip) for c in cut(2, 100, 128, alike=True)]
    [(slice(0, 2, None), slice(0, 64, None), 0), (slice(0, 2, None), slice(36, 100, None), 28)]
    """
    wide = min(cols, max(_ROUND, entries // min(rows, MOST_ROWS) // _ROUND * _ROUND))
    high = min(rows, max(1, entries // wide), wide if alike and wide < cols else rows)
    found = []
    for start in range(0, cols, wide):
        first = min(start, cols - wide) if alike else start
        columns = slice(first, min(start + wide, cols))
        found += [Chunk(slice(row, min(row + high, rows)), columns, start - first) for row in range(0, rows, high)]
    return found


# ---- losses ----------------------------------------------------------------------------------------------------------


def softmax_stats(scores: Scores, any: bool, symmetric: bool, totals: bool) -> tuple[Tensor, Tensor | None]:
    """Evaluate `tensors.softmax_stats`."""
    walk = Walk(scores)
    sizes = (walk.rows, walk.cols)[: 1 + symmetric]
    diagonal = scores.diagonal
    lowest = -torch.finfo(walk.sides.wide).max

    def relative() -> list[Tensor]:  # references, and sums relative to these
        found = [walk.new(2, size) for size in sizes]
        for x in found:
            x[0] = lowest
        return found

    def both(found: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(("of_rows", "of_cols"), found, strict=False))

    of_all, of_positives = relative(), relative() if any and not diagonal else None
    of_pairs = [walk.new(4, size) for size in sizes] if totals or not diagonal else None
    own = {"diagonal": walk.new(walk.rows)} if diagonal else {}
    for chunk, products in walk:
        walk.step("log_sum_exp", chunk, products, **both(of_all), **own)
        if of_positives:
            walk.step("log_sum_exp", chunk, products, only_positives=True, **both(of_positives))
        if of_pairs:
            walk.step("pair_sums", chunk, products, **both(of_pairs))

    found, pairs = [], min(walk.rows, walk.cols)
    for side, size in enumerate(sizes):
        stats = walk.new(5, size)
        torch.add(of_all[side][0], of_all[side][1].log(), out=stats[0])
        if diagonal:
            stats[1, :pairs] = own["diagonal"][:pairs]
            stats[2, :pairs] = 1
        elif of_pairs:
            stats[2] = of_pairs[side][0]
            stats[1] = of_pairs[side][1] / of_pairs[side][0].clip(min=1)
        if any and diagonal:
            stats[1, pairs:] = -torch.inf
        if of_positives:
            torch.add(of_positives[side][0], of_positives[side][1].log(), out=stats[1])
        if totals and of_pairs:
            stats[3:] = of_pairs[side][2:]
        found.append(stats)
    return found[0], found[1] if symmetric else None


def softmax_grad(query_coefs: Tensor, key_coefs: Tensor | None, any: bool, scores: Scores, needs: Any) -> list[Any]:
    """Evaluate `tensors.softmax_grad`, but for the factor logit_scale of the sides' gradients."""
    walk = Walk(scores, gamma=True)
    of_cols = walk.new(walk.cols) if needs[3] else None
    coefs = {"row_coefs": query_coefs.contiguous(), "any": any}
    if key_coefs is not None:
        coefs["col_coefs"] = key_coefs.contiguous()
    d_queries, d_keys, of_all = _differentiated("softmax_gamma", walk, needs, needs[2], of_cols=of_cols, **coefs)
    return [d_queries, d_keys, of_all[0], of_cols]


def sigmoid_stats(scores: Scores) -> Tensor:
    """Evaluate `tensors.sigmoid_stats`."""
    walk = Walk(scores)
    losses = walk.new(walk.rows)
    for chunk, products in walk:
        walk.step("sigmoid", chunk, products, of_rows=losses)
    return losses


def sigmoid_grad(coefs: Tensor, scores: Scores, needs: Any) -> list[Any]:
    """Evaluate the losses, and `tensors.sigmoid_grad` but for the factor logit_scale of the sides' gradients."""
    walk = Walk(scores, gamma=True)
    losses, coefs = walk.new(walk.rows), coefs.contiguous()
    sums = needs[2] or needs[3]
    d_queries, d_keys, of_all = _differentiated("sigmoid", walk, needs, sums, of_rows=losses, row_coefs=coefs)
    return [losses, d_queries, d_keys, *[d if need else None for d, need in zip(of_all, needs[2:], strict=True)]]


def _differentiated(step: str, walk: Walk, needs: Any, sums: bool, **fields: Any) -> tuple[Any, Any, Sequence[Any]]:
    """Return the gradients of both sides, where they are needed, and the sums of Gamma * product and of Gamma."""
    of_sides = [
        torch.zeros_like(x, dtype=walk.sides.wide) if need else None
        for x, need in zip(walk.sides[:2], needs, strict=False)
    ]
    of_all = walk.new(2) if sums else None
    # Gamma of float16 sides is float32, in whose range it is: it falls with the number of pairs.
    for chunk, products in walk:
        gamma = walk.gamma(chunk)
        walk.step(step, chunk, products, gamma=gamma, of_all=of_all, **fields)
        if of_sides[0] is not None:
            _multiply(gamma, walk.sides.keys[chunk.cols].to(gamma.dtype), of_sides[0][chunk.rows], add=True)
        if of_sides[1] is not None:
            _multiply(gamma.T, walk.sides.queries[chunk.rows].to(gamma.dtype), of_sides[1][chunk.cols], add=True)
    # No views of one tensor: an operation may not return these.
    return of_sides[0], of_sides[1], (None, None) if of_all is None else [x.clone() for x in of_all]


# ---- search ----------------------------------------------------------------------------------------------------------


def top_k(search: Search, k: int) -> list[Tensor]:
    """Evaluate `tensors.top_k`, for a search that is read."""
    if len(search.keys[0]) > MOST_KEYS:
        raise ValueError(
            f"keys: expected at most {MOST_KEYS} rows on {search.keys[0].device}, got {len(search.keys[0])}"
        )
    walk = Walk(search, alike=True)
    values = walk.new(walk.rows, k, dtype=walk.sides.wide)
    indices = walk.new(walk.rows, k, dtype=torch.int64)
    if k > MOST_SELECTED:
        _sort(walk, search, values, indices)
    elif k:
        best = walk.new(walk.rows, k * walk.sides.wide.itemsize // 4, dtype=torch.int64)
        for chunk, products in walk:
            _leave_out(walk, search, chunk, products)
            found = {"values": values, "indices": indices} if chunk.cols.stop == walk.cols else {}
            walk.step("top_k", chunk, products, k=k, best=best, **found)
    return [values, indices]


def best(ours: Sequence[Tensor], theirs: Sequence[Tensor], k: int) -> list[Tensor]:
    """Evaluate `tensors.best`."""
    values, numbers = (torch.cat(parts, dim=1) for parts in zip(ours, theirs, strict=True))
    order = numbers.argsort(dim=1)
    for key in (-values, (numbers < 0).to(torch.uint8)):  # NaN after all numbers, what is excluded last
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return [x.gather(1, order[:, :k]) for x in (values, numbers)]


def ranks(search: Search, targets: Tensor, scores: Tensor | None = None) -> Tensor:
    """Evaluate `tensors.ranks` or, with scores, `tensors.ranks_of_scores`, for a search that is read.

    The score of a target out of range, if it is not given, is NaN.
    """
    walk = Walk(search, alike=True)
    counts = walk.new(2, walk.rows)
    if scores is None:
        scores = _of_targets(walk, search, targets)
    for chunk, products in walk:
        _leave_out(walk, search, chunk, products)
        walk.step("rank", chunk, products, of_rows=counts, targets=targets, target_scores=scores)
    return counts.to(torch.int64)


def target_scores(search: Search, targets: Tensor) -> Tensor:
    """Evaluate `tensors.target_scores`, for a search that is read."""
    return _of_targets(Walk(search, alike=True), search, targets)


def _of_targets(walk: Walk, search: Search, targets: Tensor) -> Tensor:
    """Evaluate the targets' scores by products of the shape of all others, so that equal keys score alike."""
    scores = walk.new(walk.rows, dtype=walk.sides.wide)
    inside = targets.clamp(0, max(walk.cols - 1, 0))
    for chunk, products in walk.first():
        own = inside[chunk.rows]
        if products.shape[1] == walk.cols:
            walk.multiply(chunk, products)
            scores[chunk.rows] = products.gather(1, own[:, None])[:, 0]
        else:
            keys = own.new_zeros(products.shape[1])
            keys[: len(own)] = own
            _multiply(walk.sides.queries[chunk.rows], walk.sides.keys[keys].T, products)
            scores[chunk.rows] = products.diagonal()
    if search.key_bias is not None and walk.cols:
        scores += search.key_bias.detach()[inside]
    return torch.where(inside == targets, scores, torch.nan)


def _leave_out(walk: Walk, search: Search, chunk: Chunk, products: Tensor) -> None:
    """Mark the pairs that lists exclude."""
    if search.excluded_ids is not None:
        walk.step("leave_out", chunk, products, places=search.excluded_ids)


def _sort(walk: Walk, search: Search, values: Tensor, indices: Tensor) -> None:
    """Find the best k of rows by sorting all scores, of as many rows at a time as memory is given to."""
    k, step = values.shape[1], max(1, 4 * CHUNK_BYTES // (walk.cols * walk.sides.wide.itemsize))
    for start in range(0, walk.rows, step):
        chunk = Chunk(slice(start, min(start + step, walk.rows)), slice(0, walk.cols), 0)
        padded = -(-walk.cols // _ROUND) * _ROUND
        products = walk.new(chunk.rows.stop - start, padded, dtype=walk.sides.wide)[:, : walk.cols]
        _multiply(walk.sides.queries[chunk.rows], walk.sides.keys.T, products)
        _leave_out(walk, search, chunk, products)
        bits = torch.int32 if walk.sides.wide == torch.float32 else torch.int64
        excluded = products.view(bits) == _LEFT_OUT[bits]
        if search.exclude is not None:
            excluded |= search.exclude[chunk.rows]
        if search.key_bias is not None:
            products += search.key_bias.detach()
        scores = products.masked_fill(excluded, -torch.inf)
        nan = scores.isnan()
        order = scores.masked_fill(nan, -torch.inf).argsort(dim=1, descending=True, stable=True)
        # NaN after numbers, then the excluded.
        last = (2 * excluded.to(torch.uint8) + nan.to(torch.uint8)).gather(1, order)
        order = order.gather(1, last.argsort(dim=1, stable=True))[:, :k]
        values[chunk.rows] = scores.gather(1, order)
        indices[chunk.rows] = order.masked_fill(excluded.gather(1, order), -1)
