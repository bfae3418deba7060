"""How rows on several processes meet: a group of ranks, what they agree on first, and the two ways by which blocks travel.

What lives here knows messages and no scores: `Exchange`, the settings; `Meeting`, one call on all ranks, with `meet`, which
lets nobody go on who would wait in vain; `Layout`, tensors as bytes; `Meeting.travel`, by ring or by gathering. What lives
elsewhere: what travels, and what is made of it (``losses.py``, ``search.py``).

A block of rows starts from each rank, is seen by all, and what they make of it comes home. Both ways send the same bytes,
in messages from rank to rank, and add up in the same order, so that results are the same to the bit:

* gather: every rank sends its block to all others at once, and later each its part of what was made. Two rounds of
  messages, and all blocks in memory.
* ring: a block moves on to the next rank while it is computed with, and what was made follows it, growing. Two or three
  blocks in memory, W - 1 rounds, hidden behind the computing if that takes as long.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..call import check_choice
from ..scores import check_flag

# Up to so many bytes in all, or in a block and what comes home to it (but for so many in all), rows are gathered: a ring
# waits for W - 1 messages one after another, which only computing with blocks of a thousand rows hides (docs/scale.md).
GATHERED, SMALL, MANY = 2**26, 2**20, 2**31
METHODS = ("auto", "gather", "ring")


class Exchange:
    """The ranks whose rows meet in a loss or a search, and how: what the argument ``group`` takes beside a process group.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or torch.distributed.DeviceMesh, optional
        The ranks; by default all. A mesh must have one dim.
    method : {"auto", "gather", "ring"}, optional
        How rows travel: sent to all at once, or round the ranks, a block at a time, while the last one is computed with.
        "auto" gathers up to 64 MiB of rows, and small blocks of many ranks. Either gives the same bits.
    check : bool, optional
        Exchange a checksum of the arguments first, so that ranks that disagree get an error that says who differs, and
        the numbers of rows, which may differ. It costs one all-gather of 80 bytes a rank. Without it every rank must
        have as many rows and the same arguments, or calls hang or fail.
    queries : {"own", "shared"}, optional
        Of `top_k` and `ranks`: whether each rank asks for queries of its own, or all ask for the same ones and get the
        same answer, each having searched its own keys only.

    Attributes
    ----------
    rank, world : int
        The number of this process in the group, and how many there are.
    bytes_sent : int
        By this rank since the object was made.

    Raises
    ------
    TypeError, ValueError
        If `group` is no process group, there is none yet, or this process is not in it; for an unknown choice.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.distributed import Exchange
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> Exchange(method="ring").world
    1
    >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, group: Any = None, *, method: str = "auto", check: bool = True, queries: str = "own") -> None:
        self.group = _process_group(group)
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        check_choice("method", method, METHODS)
        check_choice("queries", queries, ("own", "shared"))
        self.method, self.check, self.queries = method, check_flag("check", check), queries
        self.bytes_sent = 0
        # "cpu:gloo,cuda:nccl": who sends which device's tensors
        self.backends = dict(each.split(":") for each in dist.get_backend_config(self.group).split(","))
        self.device = next(device for device in ("cpu", *self.backends) if device in self.backends)  # of small messages

    def gather(self, given: Tensor) -> list[Tensor]:
        """Return a small tensor of each rank."""
        found = [torch.empty_like(given) for _ in range(self.world)]
        self.bytes_sent += given.nbytes * (self.world - 1)
        dist.all_gather(found, given, group=self.group)
        return found

    def describe(self, given: Any) -> list[Any]:
        """Return an object of each rank; for errors, for it is slow."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, given, group=self.group)
        return found


def _process_group(given: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"group: expected an initialised process group, got {type(given).__name__} before "
            "torch.distributed.init_process_group was called"
        )
    if given is None:
        return dist.group.WORLD
    if isinstance(given, dist.DeviceMesh):
        if given.ndim != 1:
            raise ValueError(f"group: expected a mesh of one dim, got {given.ndim}; name one, as in mesh['data']")
        given = given.get_group()
    if given is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group: process {dist.get_rank()} is not in it")
    if not isinstance(given, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or an Exchange, got {type(given).__name__}")
    try:
        rank = dist.get_rank(given)
    except ValueError as error:
        raise ValueError(f"group: {error}; has it been destroyed?") from None
    if rank < 0:
        raise ValueError(f"group: process {dist.get_rank()} is not in it")
    return given


class Layout:
    """How the tensors of each rank become one run of bytes, and back: entries of a dtype and a shape for each rank."""

    def __init__(self, *entries: tuple[torch.dtype, Sequence[tuple[int, ...]]]) -> None:
        self.entries = entries

    def _places(self, rank: int) -> list[tuple[int, int]]:
        """Return where each tensor begins and ends, at multiples of 8 bytes, as views of another dtype want it."""
        places, at = [], 0
        for dtype, shapes in self.entries:
            size = dtype.itemsize
            for n in shapes[rank]:
                size *= n
            places.append((at, at + size))
            at += -(-size // 8) * 8
        return places

    def size(self, rank: int) -> int:
        """Return how many bytes those of a rank take."""
        return self._places(rank)[-1][1]

    def pack(self, tensors: Sequence[Tensor], rank: int) -> Tensor:
        """Return the bytes of a rank's tensors: a copy, but for a single one that is contiguous."""
        if len(tensors) == 1:
            return tensors[0].contiguous().view(-1).view(torch.uint8)
        buffer = torch.empty(self.size(rank), dtype=torch.uint8, device=tensors[0].device)
        for view, x in zip(self.unpack(buffer, rank), tensors, strict=True):
            view.copy_(x)
        return buffer

    def unpack(self, buffer: Tensor, rank: int) -> list[Tensor]:
        """View bytes as a rank's tensors."""
        return [
            buffer[start:end].view(dtype).view(shapes[rank])
            for (dtype, shapes), (start, end) in zip(self.entries, self._places(rank), strict=True)
        ]


Visit = Callable[[int, list[Tensor]], Any]  # (source, its block): what this rank makes of it, tensors for its home
Merge = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


class Meeting:
    """One call of a function, on all ranks: how many rows each has, and how what belongs to them travels."""

    def __init__(self, exchange: Exchange, name: str, sizes: Sequence[Sequence[int]]) -> None:
        self.exchange, self.name = exchange, name
        self.rank, self.world, self.device = exchange.rank, exchange.world, exchange.device
        self.rows, self.columns, *self.others = (list(of_ranks) for of_ranks in zip(*sizes, strict=True))
        self.offsets = [0, *itertools.accumulate(self.columns)]  # of the ranks' keys, in the order of the ranks

    def travel(
        self, block: list[Tensor], layout: Layout, visit: Visit, home: Layout | None = None, merge: Merge | None = None
    ) -> Any:
        """Show every rank's block to all ranks; return what they made of this rank's, merged.

        Ranks visit their own block first, then those of the ranks before them. What rank r's block gathers is merged in
        the order of the ranks r + 1, r + 2, ..., r.

        Parameters
        ----------
        block, layout
            The tensors that travel.
        visit : callable
            Called with a rank and its block. With `home`, returns the tensors that this rank makes of it.
        home, merge : optional
            The layout of what is made, and the function that merges two of them; without, nothing comes back.
        """
        if self.world == 1:
            return visit(self.rank, block)
        method = self.exchange.method
        if method == "auto":
            # of all ranks, own rows too, so that all ranks choose alike
            total = sum(each.size(rank) for each in (layout, home) if each is not None for rank in range(self.world))
            gathers = total <= GATHERED or (total <= self.world * SMALL and total <= MANY)
            method = "gather" if gathers else "ring"
        return (self._gather if method == "gather" else self._ring)(block, layout, visit, home, merge)

    def _gather(self, block: list[Tensor], layout: Layout, visit: Visit, home: Any, merge: Any) -> Any:
        others = [(self.rank - step) % self.world for step in range(1, self.world)]
        packed = layout.pack(block, self.rank)
        coming = Trade(self, {to: packed for to in others}, {source: layout.size(source) for source in others})
        own = visit(self.rank, block)
        blocks, made = coming.wait(), {}
        for source in others:
            found = visit(source, layout.unpack(blocks.pop(source), source))
            if home is not None:
                made[source] = home.pack(found, source)
        if home is None:
            return own
        parts = Trade(self, made, dict.fromkeys(others, home.size(self.rank))).wait()
        total = home.unpack(parts.pop(others[-1]), self.rank)
        for source in reversed(others[:-1]):
            total = merge(total, home.unpack(parts.pop(source), self.rank))
        return merge(total, own)

    def _ring(self, block: list[Tensor], layout: Layout, visit: Visit, home: Any, merge: Any) -> Any:
        after, before = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        coming = Trade(self, {after: layout.pack(block, self.rank)}, {before: layout.size(before)})
        own = visit(self.rank, block)
        carried: Trade | None = None
        for step in range(1, self.world):
            source, following = (self.rank - step) % self.world, (self.rank - step - 1) % self.world
            held = coming.wait()[before]
            if following != self.rank:
                coming = Trade(self, {after: held}, {before: layout.size(following)})
            made = visit(source, layout.unpack(held, source))
            if home is not None:
                if carried is not None:
                    made = merge(home.unpack(carried.wait()[before], source), made)
                carried = Trade(self, {after: home.pack(made, source)}, {before: home.size(following)})
        return own if carried is None else merge(home.unpack(carried.wait()[before], self.rank), own)

    def lost(self, peer: int, error: Exception) -> RuntimeError:
        """Make the error of a rank that does not answer."""
        return RuntimeError(f"{self.name}: rank {self.rank} lost rank {peer} of {self.world}: {error}")


class Trade:
    """Messages under way."""

    def __init__(self, ranks: Meeting, sends: Mapping[int, Tensor], sizes: Mapping[int, int]) -> None:
        self.ranks, self.sends = ranks, sends  # held until they are sent
        device = next(iter(sends.values())).device
        self.received = {source: torch.empty(size, dtype=torch.uint8, device=device) for source, size in sizes.items()}
        ops, self.peers = [], []
        for op, messages in ((dist.irecv, self.received), (dist.isend, sends)):
            for peer, message in messages.items():
                if message.numel():
                    ops.append(dist.P2POp(op, message, group=ranks.exchange.group, group_peer=peer))
                    self.peers.append(peer)
        ranks.exchange.bytes_sent += sum(message.nbytes for message in sends.values())
        try:
            self.works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise ranks.lost(self.peers[0], error) from None

    def wait(self) -> dict[int, Tensor]:
        """Wait until all is sent and received; return what was received."""
        # a backend that coalesces messages gives one work for all
        for work, peer in zip(self.works, self.peers, strict=False):
            try:
                work.wait()
            except RuntimeError as error:
                raise self.ranks.lost(peer, error) from None
        self.works = []
        return self.received


# ---- agreement -------------------------------------------------------------------------------------------------------


def meet(
    exchange: Exchange,
    name: str,
    check: Callable[[], Any],
    sizes: Callable[[Any], Sequence[int]],
    arguments: Callable[[Any], Mapping[str, Any]],
) -> tuple[Meeting, Any]:
    """Check a call on all ranks and let them agree; return the ranks and what `check` returned.

    Parameters
    ----------
    exchange, name
        The ranks, and the function they call.
    check : callable
        Returns the checked call, or raises TypeError or ValueError, which makes every rank raise an error.
    sizes, arguments : callable
        Of the checked call: its numbers of queries and of keys and further integers, as many on each rank, which may
        differ; and what must not differ, by its name.

    Raises
    ------
    TypeError, ValueError
        Of this rank's own arguments; or the latter, if another rank's are wrong or differ.
    """
    failure: Exception | None = None
    call, own, known = None, [], {}
    try:
        call = check()
        own = list(sizes(call))
        if exchange.check and exchange.world > 1:
            known = {"function": name, **arguments(call)}
    except (TypeError, ValueError, NotImplementedError) as error:
        failure = error
    if not exchange.check or exchange.world == 1:
        if failure:
            raise failure
        return Meeting(exchange, name, [own] * exchange.world), call
    checksum = hashlib.blake2b(repr(sorted(known.items())).encode(), digest_size=7).digest()
    header = [int(failure is not None), int.from_bytes(checksum, "big"), *own]
    header += [0] * (HEADER - len(header))
    try:
        gathered = exchange.gather(torch.tensor(header, dtype=torch.int64, device=exchange.device))
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: rank {exchange.rank} waited for the {exchange.world} ranks in vain: {error}"
        ) from None
    headers = [header.tolist() for header in gathered]
    if any(failed for failed, *_ in headers) or len({checksum for _, checksum, *_ in headers}) > 1:
        told = exchange.describe((None if failure is None else f"{type(failure).__name__}: {failure}", known))
        if failure:
            raise failure
        raise ValueError(f"{name}: {_difference(told)}")
    return Meeting(exchange, name, [header[2 : 2 + len(own)] for header in headers]), call


HEADER = 10  # integers: whether the arguments are wrong, their checksum, up to eight sizes


def _difference(told: Sequence[tuple[str | None, Mapping[str, Any]]]) -> str:
    """Say which ranks were given wrong arguments or, if none was, in which argument they differ."""
    failed = [f"rank {rank} raised {failure}" for rank, (failure, _) in enumerate(told) if failure]
    if failed:
        return "; ".join(failed)
    different = []
    for key in dict.fromkeys(key for _, known in told for key in known):
        by_value: dict[str, list[int]] = {}
        for rank, (_, known) in enumerate(told):
            by_value.setdefault(str(known.get(key, "not given")), []).append(rank)
        if len(by_value) > 1:
            different.append(f"{key}: " + ", ".join(f"{value} on {_named(of)}" for value, of in by_value.items()))
    return "expected the same on all ranks, got " + "; ".join(different)


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
