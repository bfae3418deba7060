"""Several processes, *ranks*, that take the pipeline's steps together: `torchrun ... -m fusionsum train`.

What lives here: all that knows of ranks. Steps ask `here` for their share of the work, and get everybody's in return; with
one process they get what they gave. What lives elsewhere: the work (``preprocess.py``, ``train.py``, ``evaluate.py``,
``prediction.py``), the loss of rows on several ranks (``fusionsum.distributed``).

Three rules keep ranks together. All take the same way through the program, for each decides by what all have; inside what
each does by itself, it is alone. What a user may have done wrong is raised on all ranks, if any finds it. Only the first
writes, and prints.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from .errors import CheckpointError, ConfigError, ManifestError, PrepareError, RankError

T = TypeVar("T")
KNOWN = (ConfigError, ManifestError, CheckpointError, PrepareError, ArithmeticError, OSError, ModuleNotFoundError)
MEETING = timedelta(minutes=2)  # until when all ranks are there
# A rank that dies closes its connections, which the others notice at once; one that is slow, as its share of the items is
# not in the cache, is waited for.
PATIENCE = timedelta(days=30)
TELLING = 2.0  # seconds to learn of another rank why it ended
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # with WORLD_SIZE what torchrun tells its processes


@dataclass(frozen=True)
class Share:
    """The rows of a batch, of `total`, that are one rank's: from `start` to `stop`, which may be none."""

    start: int
    stop: int
    total: int

    @property
    def taken(self) -> slice:
        """The rows to compute: these, or one, whose result does not count: encoders need not take a batch of none."""
        return slice(self.start, max(self.stop, self.start + 1))

    @property
    def own(self) -> slice:
        """The rows that count."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Ranks:
    """A process, number `rank` of `count`, and the others.

    Examples
    --------
    >>> ranks = Ranks()  # alone
    >>> ranks.mapped(abs, [-1, 2]), ranks.first(lambda: 3), ranks.each(lambda: 4)
    ([1, 2], 3, [4])
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    leader: int = 0  # the first rank on this one's machine

    def share(self, total: int) -> Share:
        """Return this rank's share of a batch; they differ by one row at most."""
        return Share(self.rank * total // self.count, (self.rank + 1) * total // self.count, total)

    def each(self, function: Callable[[], T]) -> list[T]:
        """Call a function on each rank; return what they return, by rank, on all. What one raises, of `KNOWN`, all do."""
        if self.count == 1:
            return [function()]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, _attempted(function), group=self.group)
        return [_result(x) for x in found]

    def first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank alone; return what it returns, or raise what it raises, on all."""
        if self.count == 1:
            return function()
        found = [None if self.rank else _attempted(function)]
        dist.broadcast_object_list(found, src=dist.get_global_rank(self.group, 0), group=self.group)
        return _result(found[0])

    def mapped(self, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Return what a function returns for each item, in order, on all ranks; each item is one rank's."""
        mine = items[self.rank :: self.count]
        found = self.each(lambda: [function(item) for item in mine])
        return [found[k % self.count][k // self.count] for k in range(len(items))]

    def merged(self, mine: Iterable[T]) -> Iterator[T]:
        """Give what the iterators of all ranks give, one of each rank in turn, on all; the first that ends ends it."""
        if self.count == 1:
            yield from mine
            return
        left = iter(mine)
        while True:
            for found in self.each(lambda: list(itertools.islice(left, 1))):
                if not found:
                    return
                yield found[0]

    def mean(self, number: float) -> float:
        """Return the mean of the ranks' numbers."""
        return sum(self.each(lambda: number)) / self.count

    def array(self, shape: tuple[int, ...], dtype: Any, folder: Path) -> np.ndarray:
        """Return one array for all ranks of a machine, in a file without a name: what memory has no room for is on disk.

        Parameters
        ----------
        shape, dtype
        folder : pathlib.Path
            Of the file, if one can be made there.

        Raises
        ------
        OSError
            If the disk has not so much room.
        """
        size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        place = folder if folder.is_dir() and os.access(folder, os.W_OK) else None

        def make() -> str:
            handle, path = tempfile.mkstemp(dir=place, prefix="items-")
            try:
                reserve = getattr(os, "posix_fallocate", None)  # else a disk that gets full ends the process
                reserve(handle, 0, size) if reserve else os.truncate(handle, size)
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(handle)
            return path

        path = self.each(lambda: make() if self.leads else "")[self.leader]
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), size)
        self.wait()
        if self.leads:
            os.unlink(path)
        return np.ndarray(shape, dtype, buffer=mapped)

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.rank == self.leader

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.each(lambda: None)

    def agree(self) -> None:
        """Give all ranks the first one's state of torch's generator."""
        if self.count > 1:
            torch.set_rng_state(self.first(torch.get_rng_state))

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are the means of all ranks'."""
        if self.count == 1:
            return module
        # Without a search for unused parameters it would order its buckets anew after the first step. A training that is
        # resumed would then sum the gradients of its first steps in another order, which three ranks round differently.
        # Where that search finds none it warns of its cost, on every rank: so there is one.
        module.register_parameter("unused", nn.Parameter(torch.zeros(())))
        return nn.parallel.DistributedDataParallel(module, process_group=self.group, find_unused_parameters=True)


ALONE = Ranks()
_current = ALONE


def here() -> Ranks:
    """Return the ranks that this process has `joined`; it alone if it has joined none."""
    return _current


def _attempted(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Call a function, in which this rank is alone; return its result, or what it raises of `KNOWN`."""
    global _current
    before, _current = _current, ALONE
    try:
        return function(), None
    except KNOWN as error:
        return None, error
    finally:
        _current = before


def _result(attempted: Any) -> Any:
    value, error = attempted
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Let the pipeline's steps be taken by all ranks together: those of torchrun, or of torch.distributed's default group.

    All ranks call the same methods with the same arguments. Where neither is there, the process is alone.

    Raises
    ------
    ConfigError
        If the environment names other processes, but not all that it takes to meet them, or if they do not come.
    RankError
        Of what is raised inside, if torchrun's ranks were joined: with the number of the rank, or of another that ended.
    """
    global _current
    before, store = _current, None
    if not (dist.is_available() and dist.is_initialized()):
        if (found := _met()) is None:
            yield ALONE
            return
        store, rank, count = found
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        peers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(peers, (socket.gethostname(), os.getpid()), group=group)
        hosts = [host for host, _ in peers]
        rank = dist.get_rank(group)
        _current = Ranks(rank, len(peers), group, hosts.index(hosts[rank]))
        yield _current
    except Exception as error:
        if store is None:
            raise
        text, known = _reason(error, store, rank, peers), isinstance(error, KNOWN) or _lost(error)
        told = _told(text, store, rank)
        if not known and not told:
            raise
        raise RankError("" if told else f"rank {rank}: {text}") from error
    finally:
        _current = before
        dist.destroy_process_group(None if store is not None else group)


def _met() -> tuple[Any, int, int] | None:
    """Return the store where torchrun's processes meet, this one's number and how many they are; None if it is alone."""
    given = os.environ.get("WORLD_SIZE", "1")
    if given == "1":
        return None
    missing = [name for name in NEEDED if name not in os.environ]
    if missing or not given.isdecimal():
        reason = f"{', '.join(missing)}: not set" if missing else "expected the number of processes"
        raise ConfigError(f"WORLD_SIZE is {given!r}, but {reason}: start with torchrun, or unset WORLD_SIZE")
    from torch.distributed.rendezvous import rendezvous

    try:
        found: tuple[Any, int, int] = next(iter(rendezvous("env://", timeout=MEETING)))
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError is a RuntimeError
        place = ":".join(os.environ[name] for name in NEEDED[1:])
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"WORLD_SIZE is {given}, but the processes do not meet at {place}: {reason}") from None
    return found


def _lost(error: BaseException) -> bool:
    """Tell whether an error says that the connection to another rank is lost."""
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def _reason(error: BaseException, store: Any, rank: int, peers: Sequence[tuple[str, int]]) -> str:
    """Return why a rank ends: the error, or what another rank said or that it died, where the connection is lost."""
    if not _lost(error):
        return str(error) if isinstance(error, KNOWN) else f"{type(error).__name__}: {error}"
    others = [other for other in range(len(peers)) if other != rank]
    for other, said in _heard(store, others):
        if said is not None:
            return f"rank {other} has failed: {said}"
        if peers[other][0] == peers[rank][0] and not _alive(peers[other][1]):
            return f"rank {other} has died"
    return f"the connection to another rank is lost: {error}"


def _heard(store: Any, others: Sequence[int]) -> Iterator[tuple[int, str | None]]:
    """Give what other ranks have said of why they end, again and again, for a while."""
    end = time.monotonic() + TELLING
    while others and time.monotonic() < end:
        for other in others:
            said = None
            try:
                if store is not None and store.check([f"failed/{other}"]):
                    said = store.get(f"failed/{other}").decode()
            except RuntimeError:  # the store ended with the first rank
                store = None
            yield other, said
        time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def _told(text: str, store: Any, rank: int) -> bool:
    """Say why this rank ends; return whether the first one ends for the same reason, and says so."""
    with contextlib.suppress(RuntimeError):
        store.set(f"failed/{rank}", text)
    said = (said for _, said in _heard(store, [0] if rank else []) if said is not None)
    return next(said, None) == text


class AsOne(TorchFunctionMode):
    """Dropout of a share of a batch's rows is what these rows get in one process, which draws for the whole batch."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Draw for all rows, and take the share's."""
        kwargs = kwargs or {}
        if function is not nn.functional.dropout:
            return function(*args, **kwargs)
        return self._dropout(*args, **kwargs)

    def _dropout(
        self, given: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        rows = self.share.taken
        times, rest = divmod(len(given), rows.stop - rows.start)  # rows of a batch: of each word, for one
        if not training or not 0 < p < 1 or rest:
            return nn.functional.dropout(given, p, training, inplace)
        kept = given.new_empty(self.share.total * times, *given.shape[1:]).bernoulli_(1 - p)
        scale = kept[rows.start * times : rows.stop * times].div_(1 - p)
        return given.mul_(scale) if inplace else given * scale
