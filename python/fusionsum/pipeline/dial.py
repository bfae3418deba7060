"""Accuracy against the dial: how each fusion layer fares as more of the rows need an interaction.

What lives here: training the layers on every task of digits-dial, and their curves. What lives elsewhere: the tasks and the
rule of their labels (``datasets.py``), the layers (``fusionsum.nn``). ``python -m fusionsum.pipeline.dial FOLDER`` writes
accuracies, plot and report beside the data, that is, to the folder that ``fusionsum prepare digits-dial`` made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts
from .charts import Curves
from .config import from_mapping, load, to_mapping
from .datasets import DIALS
from .fuse import FUSED
from .predictor import MultimodalPredictor
from .report import write_report

Accuracies = dict[str, dict[float, list[float]]]  # by layer and dial: one for each seed
DEFAULT = "ResidualFusion"
LAYERS: dict[str, dict[str, Any]] = {
    DEFAULT: {"layer": DEFAULT},
    "concat linear": {"layer": "LateFusion"},
    "concat-MLP": {"layer": "ConcatMLP"},
    "LowRankFusion": {"layer": "LowRankFusion"},
    "LowRankFusion, additive": {"layer": "LowRankFusion", "rank": 16, "init": "additive"},
    **{
        name: {"layer": name}
        for name in ("MLB", "MUTAN", "MFB", "MFH", "BLOCK", "TuckerFusion", "TensorFusion", "GatedFusion", "LinearSum")
    },
}


def accuracies(
    folder: Path,
    layers: Mapping[str, Mapping[str, Any]] = LAYERS,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> Accuracies:
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
    measured: Accuracies = {name: {} for name in layers}
    for dial in DIALS:
        config = dataclasses.replace(load(folder / f"dial-{dial}.yaml", overrides), baselines=())
        for name, given in layers.items():
            fusion = from_mapping(to_mapping(config) | {"fusion": given})
            evaluation = MultimodalPredictor(fusion).fit(progress=progress).evaluate(progress=progress)
            measured[name][dial] = evaluation.results["test"][FUSED]["all"]["accuracy"]
    return measured


def drawing(measured: Accuracies) -> Curves:
    """Return the curves of `accuracies`, and beside them what rows give that a sum of scores suffices for.

    Without any skill on rows that need both modalities but chance, and all other rows right: ``1 - 0.9 * dial``.

    Examples
    --------
    >>> drawing({"a layer": {0.0: [0.9], 1.0: [0.5]}}).series["only what a sum can"]
    [[1.0], [0.1]]
    """
    dials = sorted({dial for points in measured.values() for dial in points})
    of_sum: list[Sequence[float] | None] = [[round(1 - 0.9 * dial, 12)] for dial in dials]
    return Curves(
        title="Accuracy against the dial",
        x_label="share of the rows whose label needs both modalities together",
        y_label="accuracy",
        x=dials,
        series={name: [points.get(dial) for dial in dials] for name, points in measured.items()}
        | {"only what a sum can": of_sum},
        bounds=(0.0, 1.0),
        marked=[name for name in measured if name == DEFAULT],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``dial.json``, ``dial.svg`` and the report of the middle dial, which shows them, to a digits-dial's folder."""
    parser = argparse.ArgumentParser(prog="python -m fusionsum.pipeline.dial", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="what `fusionsum prepare digits-dial` made")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c", help="override a key")
    args = parser.parse_args(argv)
    measured = accuracies(args.folder, LAYERS, args.overrides)
    (args.folder / "dial.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
    curves = drawing(measured)
    charts.write(args.folder / "dial.svg", charts.lines(curves))
    middle = load(args.folder / f"dial-{DIALS[len(DIALS) // 2]}.yaml", args.overrides)
    write_report(args.folder, MultimodalPredictor(middle).fit().evaluate(), curves=[curves])
    print(f"Written to {args.folder / 'dial.json'}, {args.folder / 'dial.svg'} and {args.folder / 'report.html'}.")


if __name__ == "__main__":
    main()
