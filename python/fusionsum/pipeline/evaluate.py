"""Step 5: accuracy on unseen items, the time of a training step, and the report with its plot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from ..backend import native
from . import train
from .fuse import Model, NaiveFusion
from .preprocess import CLASSES, HELD_OUT_LANGUAGES, LANGUAGES, NUMBERS, Split

PAIRS = 4096


@dataclass
class Result:
    """What one model came to: a value per seed, and the loss of each step of each seed."""

    parameters: int
    accuracy: dict[str, list[float]] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)


@dataclass
class StepTime:
    """Median milliseconds of our step and of the naive one, and the median of their ratio, naive to ours."""

    ours: float
    naive: float
    ratio: float


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of right predictions on the same `PAIRS` random pairs for every model."""
    inputs, labels = split.batch(PAIRS, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (model(inputs).argmax(dim=-1) == labels).float().mean().item()


def _interleave(ours: Callable[[], object], naive: Callable[[], object], pairs: int) -> StepTime:
    """Time A B A B ..., so that what else the machine does falls on both."""
    times: list[list[float]] = [[], []]
    for _ in range(pairs):
        for run, spent in zip((ours, naive), times, strict=True):
            start = time.perf_counter()
            run()
            spent.append(1e3 * (time.perf_counter() - start))
    warm = [spent[pairs // 10 :] for spent in times]
    ratio = statistics.median(b / a for a, b in zip(*warm, strict=True))
    return StepTime(statistics.median(warm[0]), statistics.median(warm[1]), ratio)


def step_times(fused: Model, split: Split, pairs: int) -> dict[str, StepTime]:
    """Time training steps of the fused model against the same model on naive torch: whole, and of the fusion alone."""
    naive = Model(dict(fused.encoders.items()), NaiveFusion(fused.head))
    inputs, labels = split.batch(train.BATCH, torch.Generator().manual_seed(0))

    def whole(model: Model) -> Callable[[], object]:
        optim = train.optimizer(model, learning_rate=0.0)
        return lambda: train.step(model, optim, inputs, labels)

    with torch.no_grad():
        features = [encoder(inputs[name]) for name, encoder in fused.encoders.items()]

    def layer(head: nn.Module) -> Callable[[], object]:
        leaves = [x.requires_grad_() for x in features]
        grad = torch.ones(len(labels), CLASSES)
        return lambda: torch.autograd.grad(head(*leaves), [*leaves, *head.parameters()], grad)

    return {
        "whole training step": _interleave(whole(fused), whole(naive), pairs),
        "fusion layer alone, forward and backward": _interleave(layer(fused.head), layer(naive.head), 5 * pairs),
    }


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def report(results: dict[str, Result], times: dict[str, StepTime], steps: int, seconds: float) -> str:
    """Write the findings as Markdown."""
    some = next(iter(results.values()))
    columns = "".join(f" {test} |" for test in some.accuracy)
    accuracies = ""
    for name, result in results.items():
        cells = "".join(f" {statistics.mean(v):.3f} ± {_spread(v):.3f} |" for v in result.accuracy.values())
        accuracies += f"| {name} | {result.parameters:,} |{cells}\n"
    timings = "".join(f"| {name} | {t.ours:.3f} | {t.naive:.3f} | {t.ratio:.2f} |\n" for name, t in times.items())
    backend = "NumPy reference" if native is None else f"native, {native.isa()}"
    return f"""# fusionsum demo: digit + number word

An image of a handwritten digit (scikit-learn) and a number below {len(NUMBERS)} written out in words (num2words); the
label is (digit + number) mod {CLASSES}. **The inputs are real, the label is constructed**: it needs both modalities and
how they interact. Each alone, and any sum of the logits of each, stays near chance, {1 / CLASSES:.1f}.

Every model has the same encoders, a small CNN and a character GRU, and trained for {steps} steps. Accuracy on {PAIRS}
pairs of test images and words: mean ± standard deviation over {len(some.losses)} seed(s), which also draw the split.

| model | parameters |{columns}
|---|---|{"---|" * len(some.accuracy)}
{accuracies}
No test image or word is in the training data. *Unseen words* are of the training languages ({", ".join(LANGUAGES)});
*unseen languages* are {", ".join(HELD_OUT_LANGUAGES)}, each with relatives among those. Concat + MLP has as many
parameters as the fused model; it can express the task too, but takes about three times the steps to learn it.

Time of a training step, `fusion_sum` ({backend}) against the same model on naive torch: one thread, interleaved,
medians. The encoders take most of the whole step.

| | fusionsum, ms | naive torch, ms | naive / fusionsum |
|---|---|---|---|
{timings}
The demo ran for {seconds:.0f} s.

![accuracy by model, and training loss](demo.png)
"""


def plot(results: dict[str, Result], path: Path) -> None:
    """Draw accuracy by model, and the training loss of the models over the steps, to a PNG."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    tests = list(next(iter(results.values())).accuracy)
    for k, test in enumerate(tests):
        values = [result.accuracy[test] for result in results.values()]
        places = [i + (k - (len(tests) - 1) / 2) * 0.4 for i in range(len(values))]
        means, stds = [statistics.mean(v) for v in values], [_spread(v) for v in values]
        bars.bar(places, means, width=0.4, yerr=stds, capsize=3, label=test)
    bars.axhline(1 / CLASSES, color="black", linestyle=":", label="chance")
    bars.set_xticks(range(len(results)), [name.replace(" ", "\n", 1) for name in results])
    bars.set(ylabel="accuracy", ylim=(0, 1), title="(digit + number) mod 10 on unseen items")
    bars.legend()
    for name, result in results.items():
        mean = torch.tensor(result.losses).mean(dim=0)
        width = max(1, len(mean) // 30)
        smooth = mean[: len(mean) // width * width].unflatten(0, (-1, width)).mean(dim=-1)
        curves.plot([width * (i + 0.5) for i in range(len(smooth))], smooth.tolist(), label=name)
    curves.set(xlabel="step", ylabel="training loss", title="mean over seeds", ylim=(0, None))
    curves.legend()
    figure.savefig(path, dpi=120)
