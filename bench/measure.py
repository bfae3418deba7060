"""One row, measured: its contenders, their agreement, the interleaved timing, errors and memory.

A timed pair is a batch of our calls and, directly after it, a batch of the contender's; the report has the median of the
pairs' ratios, with quartiles. The machine's limit is one of the contenders: it reads, copies or does both, with the row's
own arrays, so that a working set which fits a cache is held to that cache's bandwidth; or, of scores, it does as many
multiply-adds in registers. What lives elsewhere: the clock and the limits (``machine.py``, ``gpu.py``).
"""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

import fusionsum as fs

from .layers import LayerRow
from .machine import Cpu, Thunk
from .rows import BACKWARD, BOTH, FORWARD, Row, SumRow
from .scores import ScoreRow

# A pool's threads look out for more work for some 15 ms (OpenBLAS), on the cores that another pool's are timed on: 33 ms
# of torch's threads took 88 ms after np.matmul.
REST_SECONDS = 0.1
BATCH_SECONDS = 0.01  # a timed batch lasts at least about this long: a clock tick or an interrupt is then below 1%


def set_threads(threads: int) -> None:
    """Set the threads of torch and of our kernels."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    set_threads(count)
    try:
        yield
    finally:
        set_threads(before)


@dataclass
class Contender:
    """A way to compute a row's result, and its operands; `grad_output` has the result's dtype, and is None for NumPy."""

    forward: Thunk
    operands: list[Any]
    same: bool = True  # whether its result must agree with ours
    grad_output: torch.Tensor | None = None
    output_bytes: int = 0
    times: int = 1  # calls that together are one of ours
    read: Callable[[Any], list[torch.Tensor]] = lambda output: [torch.as_tensor(output).detach()]

    def both(self) -> Any:
        """Go forward and backward, into fresh gradients; return the output."""
        for x in self.operands:
            x.grad = None
        output = self.forward()
        output.backward(self.grad_output)
        return output

    def prepared(self, phase: str) -> Thunk:
        """Return the call of a phase; the backward pass alone is repeated after one forward pass."""
        if self.times > 1:
            one = replace(self, times=1).prepared(phase)
            return lambda: [one() for _ in range(self.times)]
        if phase != BACKWARD:
            return self.forward if phase == FORWARD else self.both
        return partial(torch.autograd.grad, self.forward(), self.operands, self.grad_output, retain_graph=True)

    def results(self) -> list[torch.Tensor]:
        """Return output and gradients; of NumPy and of searches, which have none, the output."""
        if self.grad_output is None:
            return self.read(self.forward())
        return [*self.read(self.both()), *(x.grad for x in self.operands)]


def contenders(row: SumRow, machine: Cpu, compiled: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return ours and the other contenders, and the reasons of those left out."""
    (naive, einsum), (operands, masks) = row.code, row.build(machine.device)
    keywords: dict[str, Any] = {}
    if row.activations:
        keywords["activations"] = row.activations
    if row.dim != -1:
        keywords["dim"] = row.dim
    present: dict[str, Any] = {"present": masks} if masks else {}
    given: list[Any] = [x.numpy() for x in operands] if row.arrays == "numpy" else operands
    ours: Callable[..., Any] = fs.fusion_sum
    skipped = {}

    entered = {
        "ours": Contender(partial(ours, *given, **keywords, **present), given),
        "naive": Contender(partial(naive, *given, *masks), given),
    }
    if einsum:
        entered["einsum"] = Contender(partial(einsum, *given), given)
    else:
        skipped["einsum"] = "does not express the form"
    if row.arrays == "numpy":
        for contender in entered.values():
            contender.output_bytes = contender.forward().nbytes
        return entered, skipped
    if reason := _uncompiled(machine, compiled):
        skipped["torch.compile"] = reason
    else:
        entered["torch.compile"] = Contender(partial(_compiled(naive), *given, *masks), given)
    if row.dtype != torch.float32:
        wide = [x.float() for x in operands]
        entered["our float32"] = Contender(partial(ours, *wide, **keywords), wide)
    if masks:
        entered["our unmasked"] = Contender(partial(ours, *given, **keywords), given, same=False)

    _require_gradients(entered)
    return entered, skipped


def _require_gradients(entered: dict[str, Contender]) -> None:
    """Give all contenders the same upstream gradient, and let their operands want theirs."""
    shape = entered["ours"].forward().shape
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for contender in entered.values():
        output = contender.forward()
        contender.output_bytes, contender.grad_output = output.nbytes, grad_output.to(output)
        for x in contender.operands:
            x.requires_grad_()


def _uncompiled(machine: Cpu, wanted: bool) -> str:
    """Return the reason why torch.compile is left out; empty if it is not."""
    if not wanted:
        return "--quick"
    return "" if shutil.which(machine.compiler) else f"no compiler ({machine.compiler})"


def _compiled(code: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # else a row whose code was compiled for another shape gets dynamic shapes
    return torch.compile(code)


def layer_contenders(row: LayerRow, machine: Cpu, compiled: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return ours and the other contenders, in training mode; each forms its own gradients of all parameters and inputs."""
    layer, parameters, inputs = row.build()
    entered = {"ours": Contender(partial(layer, *inputs), [*layer.parameters(), *inputs])}
    codes, reason = dict(row.codes), _uncompiled(machine, compiled)
    if not reason:
        codes["torch.compile"] = _compiled(codes["naive"])
    for name, code in codes.items():
        dense = "dense" in parameters and name in ("naive", "torch.compile")  # torch.nn.Bilinear's, of L3
        used = [parameters[key] for key in (("dense", "bias") if dense else row.parameters)]
        entered[name] = Contender(partial(code, parameters, True, *inputs), [*used, *inputs])
    output = entered["ours"].forward()
    for contender in entered.values():
        contender.operands = [x for x in contender.operands if x.requires_grad]
        contender.output_bytes, contender.grad_output = output.nbytes, torch.ones_like(output)
    return entered, {"torch.compile": reason} if reason else {}


def score_contenders(row: ScoreRow, machine: Cpu, compiled: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return ours and the other contenders, and the reasons of those left out; of some only the forward pass is timed."""
    operands, skipped, codes = row.build(machine.device), dict(row.omitted), dict(row.codes)
    if reason := row.uncompiled or _uncompiled(machine, compiled):
        skipped["torch.compile"] = reason
    else:
        codes["torch.compile"] = _compiled(codes["naive"])
    entered = {name: Contender(partial(code, *operands), operands) for name, code in codes.items()}
    if row.dtype != torch.float32:
        wide = [x.float() for x in operands]
        entered["our float32"] = Contender(partial(codes["ours"], *wide), wide)
    if row.parts:
        parts, times = row.parts.build(machine.device), math.prod(row.pairs) // math.prod(row.parts.pairs)
        name = f"{times} × B={row.parts.pairs[0]}"
        entered[name] = Contender(partial(codes["ours"], *parts), parts, same=False, times=times)
    forward_only = {}
    for name, make in row.arrays:
        try:
            forward_only[name] = Contender(make(*(x.numpy() for x in operands)), operands)
        except ModuleNotFoundError as missing:
            skipped[name] = str(missing)
    if BOTH in row.phases:
        _require_gradients(entered)
    else:
        for contender in entered.values():
            output = contender.forward()
            contender.output_bytes = sum(x.nbytes for x in (output if isinstance(output, tuple) else (output,)))
    entered |= forward_only
    if row.read:
        for contender in entered.values():
            contender.read = partial(_read, row.read, contender.operands)
    return entered, skipped


def _read(read: Callable[..., list[torch.Tensor]], operands: list[Any], output: Any) -> list[torch.Tensor]:
    return read(output, *operands)


def layer_errors(row: LayerRow) -> dict[str, dict[str, float]]:
    """Return ours' and naive's errors of the output and of the inputs' gradients, against naive in float64; no dropout.

    Raises
    ------
    AssertionError
        If a contender differs from naive by more than 1e-9 in float64, more than any rounding there. In float32 the
        square roots of a normalisation would magnify roundings.
    """
    results = {}
    for dtype in (torch.float64, torch.float32):
        layer, parameters, inputs = row.build(dtype)
        leaves = [x for x in inputs if x.requires_grad]
        for name, code in {
            "ours": layer.eval(),
            **{k: partial(c, parameters, False) for k, c in row.codes.items()},
        }.items():
            output = code(*inputs)
            results[name, dtype] = [output.detach(), *torch.autograd.grad(output.sum(), leaves)]
    exact = results["naive", torch.float64]

    def distances(some: list[torch.Tensor]) -> list[float]:
        return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(some, exact, strict=True)]

    for name in ("ours", *row.codes):
        for distance in distances(results[name, torch.float64]):
            if not distance <= 1e-9:
                raise AssertionError(f"{row.name}: {name} differs from naive by {distance:.1e}")
    errors = {name: distances(results[name, torch.float32]) for name in ("ours", *row.codes)}
    return {name: {FORWARD: found[0], BOTH: max(found)} for name, found in errors.items()}


def _exact(row: SumRow | ScoreRow, machine: Cpu, ours: Contender) -> list[torch.Tensor]:
    """Return the results of the naive form in float64, or of the row's own way to compute them."""
    masks: list[torch.Tensor] = []
    if isinstance(row, SumRow):
        (operands, masks), naive = row.build(machine.device), row.code[0]
    else:
        operands, naive = row.build(machine.device), row.codes.get("naive", row.codes["ours"])
    wide = [x.double() for x in operands]
    grad_output = None if ours.grad_output is None else ours.grad_output.double()
    if isinstance(row, ScoreRow) and row.exact:
        return row.exact(grad_output, *wide)
    reference = Contender(partial(naive, *wide, *masks), wide, grad_output=grad_output)
    if isinstance(row, ScoreRow) and row.read:
        reference.read = partial(_read, row.read, wide)
    for x in wide:
        x.requires_grad_(grad_output is not None)
    return reference.results()


def errors(row: SumRow | ScoreRow, machine: Cpu, entered: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Return each contender's greatest error against the naive form in float64, relative to the greatest value.

    Raises
    ------
    AssertionError
        If a contender differs from ours by more than the row's tolerance.
    """
    exact = _exact(row, machine, entered["ours"])
    greatest = [float(x.abs().max()) for x in exact]

    def distances(some: list[torch.Tensor], others: list[torch.Tensor]) -> list[float]:
        pairs = zip(some, others, greatest, strict=False)  # NumPy has no gradients
        return [float((a.double() - b).abs_().max()) / size for a, b, size in pairs]

    ours = entered["ours"].results()
    found = {}
    for name, contender in entered.items():
        if not contender.same:
            continue
        theirs = contender.results()
        for i, distance in enumerate(distances(theirs, ours)):
            if not distance <= row.tolerance:
                place = f"gradient of operand {i - 1}" if i else "output"
                raise AssertionError(f"{row.name}: {name} and fusion_sum differ by {distance:.1e} in the {place}")
        error = distances(theirs, exact)
        found[name] = {FORWARD: error[0], BOTH: max(error)}
    return found


def _calls(machine: Cpu, call: Thunk, least: int) -> int:
    """Warm up, and return how many calls make a batch."""
    calls = least
    while machine.seconds(call, calls) * calls < BATCH_SECONDS:
        calls *= 2
    return calls


def compare(
    machine: Cpu, ours: Thunk, others: dict[str, Thunk], pairs: int, least: int = 1, apart: Container[str] = ()
) -> dict[str, Any]:
    """Time ours against each other call, in adjacent batches; those that are to be `apart`, with a rest before each."""
    our_calls = _calls(machine, ours, least)
    our_seconds, against = [], {}
    gc.collect()
    gc.disable()
    try:
        for name, call in others.items():
            calls = _calls(machine, call, least)
            for each, count in ((ours, our_calls), (call, calls)):  # after one such pair malloc faults no more pages
                machine.seconds(each, count)
            seconds, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            rest = REST_SECONDS if name in apart else 0
            for _ in range(pairs):
                time.sleep(rest)
                our_seconds.append(machine.seconds(ours, our_calls))
                time.sleep(rest)
                seconds.append(machine.seconds(call, calls))
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            ratios = np.array(seconds) / our_seconds[-pairs:]
            against[name] = {
                "seconds": float(np.median(seconds)),
                "ratio": dict(zip(("q1", "median", "q3"), np.percentile(ratios, (25, 50, 75)).tolist(), strict=True)),
                "page_faults_per_call": faults / (pairs * (calls + our_calls)),
            }
    finally:
        gc.enable()
    return {"seconds": float(np.median(our_seconds)), "contenders": against}


def transfers(machine: Cpu, arrays: list[torch.Tensor]) -> dict[str, Thunk]:
    """Return the limit of each phase: calls that move as many bytes as a row whose factors are these arrays has to."""
    once, twice = machine.transfers(arrays)
    return {FORWARD: once, BACKWARD: twice, BOTH: lambda: (once(), twice())}


def _limits(row: Row, machine: Cpu, ours: Contender) -> tuple[dict[str, Thunk], str]:
    """Return the machine's limit of each phase, or the reason why it is no contender."""
    if row.unlimited:
        return {}, row.unlimited
    if row.rate == "GFLOP/s":
        if machine.device == "cpu" and not shutil.which(machine.compiler):
            return {}, f"no compiler ({machine.compiler})"
        dtype = ours.operands[-1].dtype
        return {phase: machine.multiplier(flop, dtype) for phase, flop in row.flop.items()}, ""
    return transfers(machine, [torch.as_tensor(x) for x in ours.operands[1:]]), ""


def measure(
    row: SumRow | LayerRow | ScoreRow, machine: Cpu, pairs: int, threads: int, compiled: bool, bar: Any
) -> dict[str, Any]:
    """Measure one row in all its phases; the result is JSON."""
    threads = row.threads or threads
    with _threads(threads):
        bar.set_description(f"{row.name} agreement")
        torch.tanh(torch.ones(1))  # torch's first tanh in a process, on two threads, was off by 1e-3 in 1 of 20
        if isinstance(row, LayerRow):
            (entered, skipped), error = layer_contenders(row, machine, compiled), layer_errors(row)
        else:
            enter: Any = score_contenders if isinstance(row, ScoreRow) else contenders
            entered, skipped = enter(row, machine, compiled)
            error = errors(row, machine, entered)
        limits, unlimited = _limits(row, machine, entered["ours"])
        if unlimited:
            skipped["limit"] = unlimited

        phases = {}
        for phase in row.phases:
            bar.set_description(f"{row.name} {phase}")
            phases[phase] = _phase(row, phase, machine, entered, limits, pairs)
            phases[phase]["error"] = {name: found[phase] for name, found in error.items() if phase in found}
            bar.update()
    result = {"name": row.name, "work": row.work, "threads": threads, "skipped": skipped, "phases": phases}
    result |= {"memory_floor": row.memory_floor, "roofline": row.roofline, "rate": row.rate}
    result["floors"] = [
        {"phase": floor.phase, "against": floor.against, "ratio": floor.ratio, "at_most": floor.at_most}
        | {"passed": floor.passed(reached["ratio"]["median"])}
        for floor in row.floors_on(machine.traits)
        if (reached := phases[floor.phase]["contenders"].get(floor.against))
    ]
    return result


def _phase(
    row: Row, phase: str, machine: Cpu, entered: dict[str, Contender], limits: dict[str, Thunk], pairs: int
) -> dict[str, Any]:
    with torch.no_grad() if phase == FORWARD else contextlib.nullcontext():
        # Backward alone is repeated, which torch.compile's cannot be: it reuses the memory of its saved tensors.
        timed = {
            name: c
            for name, c in entered.items()
            if phase == FORWARD or (c.grad_output is not None and (phase != BACKWARD or name != "torch.compile"))
        }
        calls = {name: machine.prepared(partial(c.prepared, phase), row.graphed) for name, c in timed.items()}
        others = {name: call for name, call in calls.items() if name != "ours"}
        if phase in limits:
            others["limit"] = limits[phase]
        pairs = min(pairs, row.most_pairs or pairs)
        apart = [name for name, _ in row.arrays] if isinstance(row, ScoreRow) else []
        result = compare(machine, calls["ours"], others, pairs, row.calls, apart)
        result["extra_bytes"] = {
            name: None if row.graphed else _extra(phase, machine, calls[name], entered[name])
            for name in ("ours", "naive")
            if name in calls
        }
        if isinstance(row, ScoreRow) and row.apart:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                threads = torch.get_num_threads()
                result["extra_bytes"]["ours"] = process.submit(_extra_of_ours, row, phase, machine, threads).result()
    result |= {"bytes": row.bytes[phase], "flop": row.flop[phase]}
    return result


def _extra(phase: str, machine: Cpu, call: Thunk, contender: Contender) -> int | None:
    """Return the peak memory of a call beyond its output and its gradients, which it allocates too."""
    given_back = 0 if phase == BACKWARD else contender.output_bytes
    if phase != FORWARD:
        given_back += sum(x.nbytes for x in contender.operands)
        for x in contender.operands:
            x.grad = None
    return machine.peak_extra(call, given_back)


def _extra_of_ours(row: ScoreRow, phase: str, machine: Cpu, threads: int) -> int | None:
    """Return our peak memory of a loss, in a process that has computed nothing but its small parts."""
    set_threads(threads)
    extra = None
    for each in filter(None, (row.parts, row)):
        operands = [x.requires_grad_() for x in each.build(machine.device)]
        ours = Contender(partial(row.codes["ours"], *operands), operands, grad_output=torch.ones(()), output_bytes=4)
        extra = _extra(phase, machine, ours.prepared(phase), ours)
    return extra
