"""What the bench's rows should take on a GPU, before one has run them: launches, bytes, operations, and the time they take.

    PYTHONPATH=tests python -m tests.cuda.predictions     writes docs/cuda_predictions.md and predictions.json, in minutes

A prediction is a sum over launches of the longest of three times: bytes by bandwidth, operations of matrix products by
their peak, instructions by the rate of issue. All are lower bounds, which leave out latency and the time between launches.

* The calls are the bench's, of the rows' own sizes, through the code that a GPU runs, on tensors of the ``meta`` device:
  they have shapes and no data, so that all is taken down and nothing computed, and what would read a value is an error.
* Of a sum or step the launches are those of the emulated library, told to run none; its instructions are counted by the
  interpreter of PTX, on the first blocks of those grids.
* A chunk of scores stays in the second-level cache. All else is read and written in DRAM by each launch that takes it.

What lives elsewhere: the rows (``bench``), sums counted whole at a small batch (``traffic.py``), the report that puts these
beside what was measured (``report.py``).
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import device
from bench.rows import BACKWARD, BOTH, CUDA_ROWS, FORWARD, SumRow
from bench.scores import SCORES, ScoreRow, on_gpu
from conftest import require_native
from fusionsum import chunks, contraction, tensors
from fusionsum.autograd import routing
from tests.cuda import cases, emulation, ptx, traffic

JSON = pathlib.Path(__file__).with_name("predictions.json")
TABLE = pathlib.Path(__file__).parents[2] / "docs" / "cuda_predictions.md"
LAUNCH = 2e-6  # seconds from one launch to the next, an assumption
# Blocks of a grid that the interpreter runs: all that find the lists which the next launch merges; else they are alike.
MOST_BLOCKS, MOST_SELECTING = 16, 200
HALVES = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Gpu:
    """Peaks by NVIDIA's data sheets, without sparsity."""

    name: str
    bandwidth: float  # of DRAM
    narrow: float  # FLOP/s of bfloat16 and float16 on tensor cores
    wide: float  # of float32 on CUDA cores, or in TF32
    multiprocessors: int
    clock: float

    def seconds(self, launch: Launch) -> float:
        """Return the least that a launch takes; each multiprocessor has four schedulers, and blocks of its own."""
        peak = self.narrow if launch.dtype in HALVES else self.wide
        issue = min(self.multiprocessors, launch.blocks) * 4 * ptx.WARP * self.clock
        return max(launch.bytes / self.bandwidth, launch.flop / peak, launch.instructions / issue)


# "NVIDIA A100 Tensor Core GPU" (SXM, 80 GB), "NVIDIA H100 Tensor Core GPU" (SXM), "NVIDIA H200 Tensor Core GPU" (SXM): data
# sheets. Clocks are those of their peaks of float32: 19.5e12 of 108 multiprocessors with 64 lanes, 67e12 of 132 with 128.
_H100 = Gpu("H100", 3.35e12, 989.4e12, 67e12, 132, 1.98e9)
GPUS = (
    Gpu("A100", 2.039e12, 312e12, 19.5e12, 108, 1.41e9),
    _H100,
    replace(_H100, name="H200", bandwidth=4.8e12),
    replace(_H100, name="H100, TF32", wide=494.7e12),  # torch.backends.cuda.matmul.allow_tf32
)


class Launch(NamedTuple):
    """One launch, of torch's an operation: that is one at the least."""

    name: str
    bytes: int = 0  # of DRAM
    flop: int = 0
    dtype: torch.dtype = torch.float32
    blocks: int = 1
    instructions: float = 0  # of threads


# ---- what the code does with a call ----------------------------------------------------------------------------------

_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "_unsafe_view"}
_FREE |= {"scalar_tensor"}  # which a GPU's kernels are told


def _bytes(x: torch.Tensor) -> int:
    return min(x.numel() * x.itemsize, x.untyped_storage().nbytes())  # some are expanded


class Recorder(TorchDispatchMode):
    """Takes down what torch and the native module, for which it stands, are asked for, of tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any], int, torch.dtype, Any]] = []  # name, tensors, FLOPs of a dtype, ours
        self.bound = 0  # bytes of operands and results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        given = [x for x in flat if isinstance(x, torch.Tensor)]
        found = func(*args, **kwargs)
        made = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
        if func.is_view or name in _FREE or not any(x.is_meta for x in made):
            return found
        assert all(x.is_meta or not x.ndim for x in given), f"{name} takes what is not on the GPU"
        flop, dtype = 0, made[0].dtype
        if name in ("mm", "addmm", "addmm_"):
            a, b = given[:2] if name == "mm" else given[1:3]
            assert a.dtype == b.dtype, (a.dtype, b.dtype)
            flop, dtype = 2 * a.shape[0] * a.shape[1] * b.shape[1], a.dtype
        self.calls.append((name, _distinct([*given, *made]), flop, dtype, None))
        return found

    def use_torch(self, *given: Any) -> None:
        """Be told of torch, as the native module is."""

    def step(self, name: str, products: torch.Tensor, **fields: Any) -> None:
        """Take down a step of scores."""
        self.calls.append((name, [], 0, products.dtype, (name, products, fields)))

    def fusion_sum(self, *given: Any) -> torch.Tensor:
        """Take down a sum, and make its output."""
        call = tensors.Call(*given[:6])
        operands = [x for x in call.operands if x is not None]
        output = operands[-1].new_empty(call.output_shape, dtype=tensors.result_dtype(call))
        self.calls.append(("fusion_sum", _distinct([*operands, output]), 0, output.dtype, ("fusion_sum", call)))
        return output

    def fusion_sum_grad(self, grad_output: torch.Tensor, *given: Any) -> list[Any]:
        """Take down the gradients of a sum, and make them."""
        call, needs = tensors.Call(*given[:6]), given[6]
        grads = [torch.empty_like(x) if need else None for x, need in zip(call.operands, needs, strict=True)]
        moved = [x for x in (grad_output, *call.operands, *grads) if x is not None]
        own = ("fusion_sum_grad", call, grad_output, needs)
        self.calls.append(("fusion_sum_grad", _distinct(moved), 0, grad_output.dtype, own))
        return grads


def _distinct(given: Sequence[Any]) -> list[Any]:
    """Return tensors, each once that is both read and written in place."""
    found: dict[Any, Any] = {}
    for x in given:
        if x.is_meta:
            found[x.untyped_storage()._cdata, x.storage_offset(), x.shape] = x
    return list(found.values())


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Take tensors of the meta device for a GPU's, and take down what is asked for."""
    recorder, multiply = Recorder(), chunks._multiply
    hidden = [(routing, "_dispatch_modes", lambda: 0), (contraction, "is_plain", lambda *given: True)]
    before = [getattr(module, name) for module, name, _ in hidden]
    with device.replaced(require_native(), recorder), device.pretending(recorder, multiply):
        try:
            for module, name, value in hidden:
                setattr(module, name, value)
            with recorder:
                yield recorder
        finally:
            for (module, name, _), value in zip(hidden, before, strict=True):
                setattr(module, name, value)


def record(row: ScoreRow, phase: str) -> Recorder:
    """Take down our call of a row."""
    factors = [torch.empty(shape, dtype=row.dtype, device="meta") for shape in row.shapes]
    operands = [*(torch.empty((), device="meta") for _ in row.scalars), *factors]
    with recording() as recorder:
        if phase == FORWARD:
            with torch.no_grad():
                output = row.codes["ours"](*operands)
            results = [*output] if isinstance(output, tuple) else [output]
        else:
            output = row.codes["ours"](*(x.requires_grad_() for x in operands))
            upstream = output.new_empty(output.shape)
            output.backward(upstream)
            results = [output, *(x.grad for x in operands)]
            operands.append(upstream)
    recorder.bound = sum(map(_bytes, (*operands, *results)))
    return recorder


# ---- what a sum or step launches, and executes -----------------------------------------------------------------------


class Kernel(NamedTuple):
    """One launch of ours; instructions are those of threads."""

    name: str
    blocks: int
    instructions: float = 0
    sectors: float = 0  # of all requests: what the second-level cache serves


def _key(x: Any) -> Any:
    """Return what costs depend on: all of a call but where its tensors are."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.stride(), x.dtype
    if isinstance(x, dict):  # of a step; where in all scores it is does not matter
        places = ("first_row", "first_col", "skip")
        return tuple((name, _key(y)) for name, y in sorted(x.items()) if name not in places and y is not None)
    return tuple(map(_key, x)) if isinstance(x, (tuple, list)) else x


def _real(x: Any, name: str = "") -> Any:
    """Make data for a tensor that has none: scores as far apart as a row's, states as they are halfway through a call."""
    if isinstance(x, dict):
        return {name: _real(y, name) for name, y in x.items()}
    if isinstance(x, (tuple, list)):
        return tuple([_real(y, name) for y in x])
    if not isinstance(x, torch.Tensor):
        return x
    like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    if name == "best":
        return _best(like)
    if x.dtype.is_floating_point and x.numel() <= 2**23:
        return like.copy_(0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    return like.zero_()


def _best(like: torch.Tensor) -> torch.Tensor:
    """Make hits of float32 (csrc/cuda/scores/select.cuh) for a search that has seen half of 2^20 keys."""
    rows, k = like.shape
    scores = 0.1 * np.sort(np.random.default_rng(0).standard_normal((1, 2**19)).astype(np.float32))[:, : -k - 1 : -1]
    bits = np.broadcast_to(scores.view(np.uint32) | np.uint32(2**31), (rows, k))
    hits = np.stack([bits, np.broadcast_to(~np.arange(k, dtype=np.uint32), (rows, k))], -1)
    return like.copy_(torch.from_numpy(np.ascontiguousarray(hits).view(np.int64)[..., 0]))


class Costs:
    """Launches of sums and steps, each kind asked of the emulated library once; with PTX, what they execute, too."""

    def __init__(self, library: emulation.Library, native: Any, parsed: Sequence[ptx.Module] | None) -> None:
        self._library, self._native, self.parsed = library, native, parsed
        self.found: dict[Any, list[Kernel]] = {}

    def of(self, own: Any) -> list[Kernel]:
        """Return the launches of a call of ours."""
        key = _key(own)
        if key not in self.found:
            self.found[key] = self._run(own)
        return self.found[key]

    def _run(self, own: Any) -> list[Kernel]:
        with self._library.recording() as runs, self._library.running_last(0):
            alive = self._called(own)
        assert len(runs) == 1
        launches = runs[0].launches
        if self.parsed is None:
            return [Kernel(launch.kernel, launch.grid[0]) for launch in launches]
        # What the blocks left out would have written is uninitialised: where it is read, reports say so in vain.
        most = MOST_SELECTING if own[0] == "top_k" else MOST_BLOCKS
        reports, _ = cases.executed(runs[0], self.parsed, most_blocks=most)
        del alive
        found = []
        for launch, report in zip(launches, reports, strict=True):
            blocks, counters = launch.grid[0], report.counters
            instructions, sectors = (
                sum(counters.instructions.values()),
                counters.sectors(False) + counters.sectors(True),
            )
            share = blocks / min(most, blocks)
            found.append(Kernel(launch.kernel, blocks, share * ptx.WARP * instructions, share * sectors))
        return found

    def _called(self, own: Any) -> Any:
        name, *given = own
        if name == "fusion_sum":
            (call,) = _real(given)
            return call, self._native.fusion_sum(*call, True)
        if name == "fusion_sum_grad":
            call, grad_output, needs = _real(given)
            return call, grad_output, self._native.fusion_sum_grad(grad_output, *call, needs, True)
        products, fields = _real(given)
        if fields.get("gamma") is not None and _same(given[1]["gamma"], given[0]):
            fields["gamma"] = products
        self._native.step(name, products, **fields)
        return products, fields


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Prediction:
    """A phase of a row; seconds of each GPU, without the time between launches."""

    launches: int
    bytes: int  # of DRAM, if it keeps nothing but the chunk in its cache
    bound: int  # operands read once, results written once
    flop: dict[str, int]  # of matrix products, by dtype
    instructions: int
    seconds: dict[str, float]

    @property
    def floor(self) -> float:
        """Return the seconds that the launches take at the least, one after another."""
        return self.launches * LAUNCH


def _predicted(launches: Sequence[Launch], bound: int) -> Prediction:
    flop: Counter[str] = Counter()
    for launch in launches:
        if launch.flop:
            flop[str(launch.dtype).removeprefix("torch.")] += launch.flop
    return Prediction(
        len(launches),
        sum(launch.bytes for launch in launches),
        bound,
        dict(flop),
        round(sum(launch.instructions for launch in launches)),
        {gpu.name: sum(map(gpu.seconds, launches)) for gpu in GPUS},
    )


def of_scores(row: ScoreRow, phase: str, costs: Costs) -> Prediction:
    """Predict a phase of a row C."""
    recorder = record(row, phase)
    calls = recorder.calls
    held = [own[1:] for *_, own in calls if own and isinstance(own[-1], dict)]
    kept = {
        x.untyped_storage()._cdata
        for products, fields in held
        for x in (products, fields.get("gamma"))
        if x is not None
    }
    launches = []
    for name, moved, flop, dtype, own in calls:
        size = sum(_bytes(x) for x in moved if x.untyped_storage()._cdata not in kept)
        kernels = costs.of(own) if own else [Kernel(name, 1)]
        first, *others = [Launch(k.name, 0, flop, dtype, k.blocks, k.instructions) for k in kernels]
        launches += [first._replace(bytes=size), *others]
    return _predicted(launches, recorder.bound)


def of_sums(row: SumRow, costs: Costs, library: emulation.Library) -> dict[str, Prediction]:
    """Predict a row P: what its launches are at its own size, what they execute and move at a small batch."""
    small = traffic.case_of(row, 1)
    case = replace(
        small,
        factors=[np.zeros(shape, x.dtype) for shape, x in zip(row.shapes, small.factors, strict=True)],
        present=small.present and [np.zeros(shape[0], bool) for shape in row.shapes],
    )
    with library.recording() as runs, library.running_last(0):
        alive = cases.both(case)
    found = {}
    counted: Any = [None, None] if costs.parsed is None else traffic.count(row, library, costs.parsed)
    for phase, run, of_batch in zip((FORWARD, BACKWARD), runs, counted, strict=True):
        size, executed = 0, 0.0
        if of_batch:
            (moved, reports), more = of_batch, row.shapes[0][0] / traffic.BATCH
            size = round(more * moved.entries * moved.per_entry)
            executed = more * ptx.WARP * sum(reports[0].counters.instructions.values())
        launches = [Launch(launch.kernel, blocks=launch.grid[0]) for launch in run.launches]
        # The first sums; others combine its parts, which are few.
        launches[0] = launches[0]._replace(bytes=size, instructions=executed)
        bound = sum(end - begin for begin, end, role in cases.merged(run.spans) if role != "workspace")
        found[phase] = _predicted(launches, bound)
    del alive
    forward, backward = found.values()
    both = {gpu.name: forward.seconds[gpu.name] + backward.seconds[gpu.name] for gpu in GPUS}
    added = [
        getattr(forward, name) + getattr(backward, name) for name in ("launches", "bytes", "bound", "instructions")
    ]
    return {**found, BOTH: Prediction(*added[:3], {}, added[3], both)}


def rows(costs: Costs) -> Iterator[tuple[str, dict[str, Prediction]]]:
    """Predict all rows that the bench has on a GPU; one in a CUDA graph is the same without it, but for the launches."""
    for row in on_gpu(SCORES):
        yield row.name, {phase: of_scores(row, phase, costs) for phase in row.phases}
    with cases.emulated(emulation.build("plain")) as library:
        for of_sum in CUDA_ROWS:
            yield of_sum.name, of_sums(of_sum, costs, library)


def steps(costs: Costs) -> Iterator[dict[str, Any]]:
    """Tell what each step of scores executes and moves for each score, beside the least that it must; a call's first."""
    seen = set()
    for key, kernels in costs.found.items():
        if key[0].startswith("fusion_sum"):
            continue
        name, ((high, wide), _, dtype), fields = key
        given = dict(fields)
        gamma = given.get("gamma")
        what = [option for option in ("diagonal", "only_positives") if option in given]
        what += [f"Gamma in {gamma[2]}".replace("torch.", "")] if gamma else []
        what += [f"k={given['k']}"] if "k" in given else []
        label, scores = ", ".join([name, *what]), high * wide
        if (label, high, wide) in seen:
            continue
        seen.add((label, high, wide))
        yield {
            "step": label,
            "chunk": [high, wide],
            "launches": [k.name for k in kernels],
            "blocks": [k.blocks for k in kernels],
            "bound": dtype.itemsize + (gamma[2].itemsize if gamma else 0),  # bytes for each score
            "bytes": 32 * sum(k.sectors for k in kernels) / scores,
            "instructions": sum(k.instructions for k in kernels) / scores,
        }


def costs(parsed: Sequence[ptx.Module] | None) -> Costs:
    """Load the emulated library, to be asked; without PTX it tells no instructions."""
    library = emulation.Library(emulation.build("plain"))
    native = device.emulated(library.address)
    native.use_torch(torch, None, None, None)
    return Costs(library, native, parsed)


def main() -> None:
    """Write both files."""
    asked = costs(cases.modules())
    found = {name: {phase: asdict(p) for phase, p in of.items()} for name, of in rows(asked)}
    gpus = {gpu.name: asdict(gpu) for gpu in GPUS}
    result = {"gpus": gpus, "launch": LAUNCH, "rows": found, "steps": list(steps(asked))}
    JSON.write_text(json.dumps(result, indent=1) + "\n")
    TABLE.write_text(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of what `main` found."""
    names = list(result["gpus"])
    lines = [
        "# Predictions of the CUDA kernels, no GPU has confirmed them",
        "",
        "By `PYTHONPATH=tests python -m tests.cuda.predictions`, whose first lines say how: for every launch the longest "
        "of bytes by bandwidth, operations of matrix products by their peak, and instructions by the rate of issue, by the "
        "figures "
        "of NVIDIA's data sheets for an A100 (SXM, 80 GB), an H100 and an H200 (SXM). They are lower bounds: no product of "
        "matrices reaches its peak, and nothing is known of latency. *At least*: what the launches take one after another, "
        f"at {result['launch'] * 1e6:.0f} µs each, which is an assumption; an operation of torch counts as one. Where it "
        "is longer than a GPU's time, it is the prediction, but not in a CUDA graph. `tests/cuda/on_gpu.sh` puts "
        "measurements beside both. *DRAM*: bytes that launches move if the second-level cache keeps nothing but the chunk "
        "of scores; and the bound: operands and results once (P7's absent rows are not read).",
        "",
        f"| row | phase | launches | DRAM | bound | GFLOP | {' | '.join(names)} | at least |",
        "|" + "---|" * (7 + len(names)),
    ]
    for name, phases in result["rows"].items():
        for phase, p in phases.items():
            flop = ", ".join(f"{n / 1e9:.3g} {dtype}" for dtype, n in p["flop"].items()) or "–"
            cells = [name, phase, str(p["launches"]), _size(p["bytes"]), _size(p["bound"]), flop]
            cells += [_time(p["seconds"][gpu]) for gpu in names]
            lines.append(f"| {' | '.join([*cells, _time(p['launches'] * result['launch'])])} |")
    lines += [
        "",
        "The steps on a chunk of scores, for each score: bytes that all requests ask of the second-level cache, beside the "
        "bound (a score read once; Gamma written once), and instructions of PTX.",
        "",
        "| step | chunk | launches | blocks | bytes | bound | instructions |",
        "|" + "---|" * 7,
    ]
    for s in result["steps"]:
        cells = [s["step"], " × ".join(map(str, s["chunk"])), str(len(s["launches"])), ", ".join(map(str, s["blocks"]))]
        cells += [f"{s['bytes']:.2f}", str(s["bound"]), f"{s['instructions']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    main()
