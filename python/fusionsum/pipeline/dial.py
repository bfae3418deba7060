"""Accuracy against the dial: how each fusion layer fares as more of the rows need an interaction.

What lives here: training the layers on every task of digits-dial, and the plot. What lives elsewhere: the tasks and the
rule of their labels (``datasets.py``), the layers (``fusionsum.nn``). ``python -m fusionsum.pipeline.dial FOLDER`` writes
accuracies and plot beside the data, that is, to the folder that ``fusionsum prepare digits-dial`` made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .config import from_mapping, load, to_mapping
from .datasets import DIALS
from .fuse import FUSED
from .predictor import MultimodalPredictor

Curves = dict[str, dict[float, list[float]]]  # by layer and dial: an accuracy for each seed
LAYERS: dict[str, dict[str, Any]] = {
    "ResidualFusion": {"layer": "ResidualFusion"},
    "concat linear": {"layer": "LateFusion"},
    "concat-MLP": {"layer": "ConcatMLP"},
    "LowRankFusion": {"layer": "LowRankFusion"},
    "LowRankFusion, additive": {"layer": "LowRankFusion", "rank": 16, "init": "additive"},
    **{name: {"layer": name} for name in ("MLB", "MUTAN", "MFB", "BLOCK", "GatedFusion")},
}


def accuracies(
    folder: Path,
    layers: Mapping[str, Mapping[str, Any]] = LAYERS,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> Curves:
    """Train every layer on every task of a prepared digits-dial; return test accuracies.

    Parameters
    ----------
    folder : pathlib.Path
        What ``fusionsum prepare digits-dial`` made.
    layers : mapping, optional
        By name, the mapping of a layer and its options, as in a configuration.
    overrides : sequence of str, optional
        ``a.b=c``, as of ``fusionsum train --set``.
    progress : bool, optional
        Whether to show bars.

    Returns
    -------
    dict
        ``[layer][dial]``: an accuracy for each seed.
    """
    curves: Curves = {name: {} for name in layers}
    for dial in DIALS:
        config = dataclasses.replace(load(folder / f"dial-{dial}.yaml", overrides), baselines=())
        for name, given in layers.items():
            fusion = from_mapping(to_mapping(config) | {"fusion": given})
            evaluation = MultimodalPredictor(fusion).fit(progress=progress).evaluate(progress=progress)
            curves[name][dial] = evaluation.results["test"][FUSED]["all"]["accuracy"]
    return curves


def figure(curves: Curves) -> Figure:
    """Draw mean accuracy against the dial, a line for each layer, a dot for each seed, and what a sum of scores gets.

    Without any skill on rows that need both modalities but chance, all other rows right: ``1 - 0.9 * dial``.
    """
    drawn = Figure(figsize=(7, 4.2), layout="constrained")
    axes = drawn.subplots()
    axes.plot([0, 1], [1, 0.1], color="0.6", linestyle=":", label="rows that a sum suffices for")
    for k, (name, points) in enumerate(curves.items()):
        means = [statistics.fmean(points[dial]) for dial in points]
        (line,) = axes.plot(
            list(points), means, label=name, color=f"C{k}", linewidth=3 if k == 0 else 1.5, zorder=3 - k
        )
        for dial, values in points.items():
            axes.plot([dial] * len(values), values, ".", color=line.get_color(), markersize=4, alpha=0.6)
    axes.set(xlabel="rows whose label needs both modalities together", ylabel="accuracy", ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.2)
    drawn.legend(loc="outside right upper", fontsize="small", frameon=False)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``dial.json`` and ``dial.svg`` to the folder of a prepared digits-dial."""
    parser = argparse.ArgumentParser(prog="python -m fusionsum.pipeline.dial", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="what `fusionsum prepare digits-dial` made")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c", help="override a key")
    args = parser.parse_args(argv)
    curves = accuracies(args.folder, LAYERS, args.overrides)
    (args.folder / "dial.json").write_text(json.dumps(curves, indent=1), encoding="utf-8")
    figure(curves).savefig(args.folder / "dial.svg")
    print(f"Written to {args.folder / 'dial.json'} and {args.folder / 'dial.svg'}.")


if __name__ == "__main__":
    main()
