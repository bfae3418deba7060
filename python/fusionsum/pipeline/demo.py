"""The demo, ``fusionsum demo``: the five steps on digits-sum, and the time of a training step against naive torch.

What lives elsewhere: the data (``datasets.py``); training, evaluation and report, the same as of other data
(``predictor.py``, ``report.py``).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backend import native
from ..nn import ResidualFusion
from .compare import interval
from .config import load
from .datasets import digits_sum
from .evaluate import Evaluation
from .fuse import FUSED, FusionModel
from .predictor import MultimodalPredictor
from .report import label, verdicts, write_report
from .train import Objective, contained, loss_of, optimizer, step

CONSTRUCTED = (
    "The inputs are real, the label is constructed: it needs both modalities and how they interact. Each alone, and any "
    "sum of the scores of each, stays near chance. No image or word of the test splits is in the training data."
)


@dataclasses.dataclass
class StepTime:
    """Median milliseconds of our step and of the naive one, and the median of their ratio, naive to ours."""

    ours: float
    naive: float
    ratio: float


class NaiveFusion(nn.Module):
    """The computation of a `ResidualFusion` in plain torch operations, with the same parameters: the contender."""

    def __init__(self, fusion: ResidualFusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits (B, output_dim)."""
        fused, product = torch.zeros(()), self.fusion.fusion_weights
        for linear, factor, x in zip(self.fusion.linears, self.fusion.factors, inputs, strict=True):
            fused = fused + linear(x)
            product = product * factor(x).unflatten(-1, (self.fusion.rank, self.fusion.output_dim))
        return fused + product.sum(dim=-2)


def _interleave(ours: Callable[[], object], naive: Callable[[], object], pairs: int) -> StepTime:
    """Time A B A B ..., so that other load on the machine slows both alike."""
    times: list[list[float]] = [[], []]
    for _ in range(pairs):
        for call, spent in zip((ours, naive), times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - start))
    warm = [spent[pairs // 10 :] for spent in times]
    ratio = statistics.median(b / a for a, b in zip(*warm, strict=True))
    return StepTime(statistics.median(warm[0]), statistics.median(warm[1]), ratio)


def step_times(predictor: MultimodalPredictor, pairs: int) -> dict[str, StepTime]:
    """Time training steps of the fused model against the same model on naive torch: whole, and of the fusion alone."""
    assert predictor.gathered is not None
    state, settings = predictor.states[FUSED, 0], predictor.config.train
    fused = predictor.model(FUSED, state)
    naive = FusionModel(dict(fused.encoders.items()), NaiveFusion(fused.head))
    inputs, labels = predictor.rows(predictor.gathered, state).batch(torch.arange(settings.batch_size))
    loss = loss_of("classification")

    def whole(model: nn.Module) -> Callable[[], object]:
        optim = optimizer(model, dataclasses.replace(settings, learning_rate=0.0))
        objective = Objective(model, loss)
        return lambda: step(objective, optim, (inputs, labels), settings.clip)

    with torch.no_grad():
        features = [encoder(inputs[name][0]) for name, encoder in fused.encoders.items()]

    def layer(head: nn.Module) -> Callable[[], object]:
        leaves = [x.requires_grad_() for x in features]
        grad = torch.ones(len(labels), len(state["task"]["classes"]))
        return lambda: torch.autograd.grad(head(*leaves), [*leaves, *head.parameters()], grad)

    return {
        "whole training step": _interleave(whole(fused), whole(naive), pairs),
        "fusion layer alone, forward and backward": _interleave(layer(fused.head), layer(naive.head), 5 * pairs),
    }


def demonstrate(out: Path, seeds: int = 3, steps: int = 800, timed_pairs: int = 60) -> Evaluation:
    """Train and compare every model on digits-sum; write the report to a folder, with the data in ``data/``.

    Parameters
    ----------
    out : pathlib.Path
        The folder, made if it does not exist.
    seeds : int, optional
        How often to repeat the training, each time from another initialisation and in another order.
    steps : int, optional
        Of training, for each model; every pair of an image and a word is seen once.
    timed_pairs : int, optional
        How many pairs of training steps to time, ours and the naive one.

    Returns
    -------
    Evaluation
        As `MultimodalPredictor.evaluate` returns it.
    """
    start = time.perf_counter()
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    (config,) = digits_sum(data, data, pairs=64 * steps)
    predictor = MultimodalPredictor(load(data / config, [f"train.seeds={seeds}"])).fit()
    evaluation = predictor.evaluate()
    with contained(1):
        times = step_times(predictor, timed_pairs)
    backend = "NumPy reference" if native is None else f"native, {native.isa()}"
    timings = "; ".join(f"{name}: {t.ours:.3f} and {t.naive:.3f} ms, ratio {t.ratio:.2f}" for name, t in times.items())
    notes = [
        CONSTRUCTED,
        f"fusion_sum ({backend}) and the same model on naive torch, one thread, interleaved, medians. {timings}.",
        f"The demo ran for {time.perf_counter() - start:.0f} s.",
    ]
    write_report(out, evaluation, notes)
    print(_table(evaluation), *verdicts(evaluation), *notes, f"Written to {out / 'report.html'}.", sep="\n")
    return evaluation


def _table(evaluation: Evaluation) -> str:
    """Return accuracies as a Markdown table."""
    results = evaluation.results
    lines = [f"\n| model | parameters | {' | '.join(results)} |", f"|---|---|{'---|' * len(results)}"]
    for name in next(iter(results.values())):
        count = evaluation.parameters.get(name)
        cells = [str(interval(models[name]["all"]["accuracy"])) for models in results.values()]
        called = label(evaluation.config, name)
        lines.append(f"| {called} | {'–' if count is None else f'{count:,}'} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
