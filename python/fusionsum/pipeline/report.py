"""Step 5, shown: ``metrics.json``, plots as SVG files, and ``report.html``, one file that loads no other.

What lives here: plots, tables, and the sentences that compare the models. What lives elsewhere: the numbers
(``evaluate.py``), the page itself (``report.html``, a Jinja template beside this file).
"""

from __future__ import annotations

import io
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import confusion_matrix

from ..backend import native
from .config import Config, to_yaml
from .evaluate import GIVEN, Evaluation, Interval, Results, better, calibration, chance, interval
from .fuse import ALONE, FUSED, input_modalities, sides

INK, ACCENT, PALE, SOFT = "#1f2933", "#2563eb", "#93a4b8", "#e4e9f0"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
LINES = 9  # curves that a plot can hold
LABELLED = 16  # classes up to which the cells of the confusion matrix show their numbers
SPLITS = {
    "manifest": "the manifest’s",
    "by-seed": "drawn by group for each seed",
    GIVEN: "none: every row is evaluated",
}


@dataclass(frozen=True)
class Cell:
    """An interval of a metric in a table, and whether it is the best of its column."""

    metric: str
    value: Interval
    best: bool = False

    @property
    def text(self) -> str:
        """The mean."""
        return f"{self.value.mean:.{self.places}f}"

    @property
    def half(self) -> str:
        """The half width of the interval, or nothing for one seed."""
        return "" if self.value.half is None else f"± {self.value.half:.{self.places}f}"

    @property
    def places(self) -> int:
        """One for ranks, three for all others."""
        return 1 if self.metric.endswith("rank") else 3


def write_report(folder: str | Path, evaluation: Evaluation, notes: Sequence[str] = ()) -> None:
    """Write an evaluation's ``metrics.json``, ``plots/`` and ``report.html`` to a folder.

    Parameters
    ----------
    folder : str or pathlib.Path
        Made if it does not exist.
    evaluation : Evaluation
        As `MultimodalPredictor.evaluate` returns it.
    notes : sequence of str, optional
        Paragraphs to end the summary with.
    """
    folder = Path(folder)
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(metrics_json(evaluation.results), encoding="utf-8")
    drawn: dict[str, Markup] = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(evaluation).items():
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True)
            (plots / f"{name}.svg").write_text(text.getvalue(), encoding="utf-8")
            drawn[name] = Markup(text.getvalue()[text.getvalue().index("<svg") :])  # our own drawing: no escaping
    config = evaluation.config
    page = rendered(
        "report.html",
        title=config.title,
        facts=_facts(evaluation),
        verdicts=[*verdicts(evaluation), *notes],
        plots=drawn,
        tables={split: _table(evaluation, split) for split in evaluation.results},
        withheld={split: _withheld(evaluation, split) for split in evaluation.results},
        headline=readable(evaluation.metric),
        data=_data(evaluation),
        messages=evaluation.messages,
        config=to_yaml(config),
        retrieval=config.task.kind == "retrieval",
        seeds=len(config.train.seeds),
        drawn=evaluation.split == "by-seed",
        given=evaluation.split == GIVEN,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def rendered(template: str, **values: Any) -> str:
    """Fill in one of the pages beside this file; all that they have in common is in ``page.html``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["slug"] = _slug
    return environment.get_template(template).render(versions=_versions(), **values)


def metrics_json(results: Results) -> str:
    """Return the results as JSON, means and intervals beside the values of the seeds."""

    def summary(values: list[float]) -> dict[str, Any]:
        found = interval(values)
        return {"mean": found.mean, "interval": found.half, "seeds": values}

    nested = {
        split: {
            model: {condition: {k: summary(v) for k, v in metrics.items()} for condition, metrics in conditions.items()}
            for model, conditions in models.items()
        }
        for split, models in results.items()
    }
    return json.dumps(nested, indent=1)


def readable(metric: str) -> str:
    """Return a metric's name as a person writes it.

    Examples
    --------
    >>> readable("image_to_text_R@10"), readable("macro_f1"), readable("ece")
    ('image → text R@10', 'macro-F1', 'calibration error (ECE)')
    """
    names = {
        "macro_f1": "macro-F1",
        "ece": "calibration error (ECE)",
        "mae": "mean absolute error",
        "pearson": "Pearson’s r",
    }
    return names.get(metric, metric.replace("_to_", " → ").replace("_", " "))


def label(config: Config, model: str) -> str:
    """Return a model's name in the report."""
    if model != FUSED:
        return {"mlp": "concat-MLP, equal parameters"}.get(model, model.replace("-", " "))
    if len(input_modalities(config)) == 1:
        return "two towers" if config.task.kind == "retrieval" else "linear"
    return f"fused: {config.fusion.layer}"


def verdicts(evaluation: Evaluation) -> list[str]:
    """Say of each test split how the fused model compares with each other model, by paired differences over seeds."""
    config, metric = evaluation.config, evaluation.metric
    sign = better(metric)
    said = []
    for split, models in evaluation.results.items():
        ours = np.array(models[FUSED]["all"][metric])
        groups: dict[str, list[str]] = {"beats": [], "loses to": [], "cannot be told from": []}
        for name in models:
            if name == FUSED:
                continue
            difference = interval((sign * (ours - np.array(models[name]["all"][metric]))).tolist())
            unsure = difference.half is None or abs(difference.mean) <= difference.half
            verb = "cannot be told from" if unsure else "beats" if difference.mean > 0 else "loses to"
            which = ("better by " if difference.mean < 0 else "worse by ") if unsure else "by "
            groups[verb].append(f"{label(config, name)} ({which}{abs(difference.mean):.3f})")
        parts = [f"{verb} {', '.join(names)}" for verb, names in groups.items() if names]
        mean = interval(ours.tolist())
        sentence = f"On “{split}”, {label(config, FUSED)} reaches {readable(metric)} {mean}"
        said.append(f"{sentence}; it {'; '.join(parts)}." if parts else f"{sentence}.")
        if any("score sum" in name for name in groups["loses to"]):
            said.append(f"On “{split}” a simple sum of the unimodal models’ scores is better than learned fusion.")
    return said


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    config = evaluation.config
    query, target = sides(config)
    task = (
        f"{config.task.kind}: {query} → {target}" if target else f"{config.task.kind} from {query.replace('+', ' + ')}"
    )
    options = ", ".join(f"{k}={v}" for k, v in config.fusion.options.items())
    encoders = ", ".join(f"{name}: {m.encoder}" for name, m in config.modalities.items())
    return [
        ("task", task),
        ("fusion", f"{config.fusion.layer}({options})" if len(input_modalities(config)) > 1 else "none: one modality"),
        ("encoders", encoders),
        ("rows", f"{evaluation.rows:,} of {evaluation.manifest}"),
        ("split", SPLITS[evaluation.split]),
        ("parameters", f"{evaluation.parameters[FUSED]:,}"),
    ]


def _columns(metrics: Sequence[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Group metrics under a heading: retrieval's two directions, or nothing."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for metric in metrics:
        direction, _, rest = metric.partition("_R@")
        if not rest:
            direction, _, rest = metric.partition("_median_")
        if rest and "_to_" in direction:
            short = f"R@{rest}" if rest.isdigit() else "median rank"
            groups.setdefault(readable(direction), []).append((metric, short))
        else:
            groups.setdefault("", []).append((metric, readable(metric)))
    return list(groups.items())


def _table(evaluation: Evaluation, split: str) -> dict[str, Any]:
    """Return a split's table: a row for each model, and one for chance."""
    models, counts = evaluation.results[split], evaluation.parameters
    metrics = list(models[FUSED]["all"])
    found = {name: {m: interval(conditions["all"][m]) for m in metrics} for name, conditions in models.items()}
    best = {m: max(better(m) * values[m].mean for values in found.values()) for m in metrics}
    rows = [
        (
            label(evaluation.config, name),
            f"{counts[name]:,}" if name in counts else "–",
            [Cell(m, values[m], better(m) * values[m].mean == best[m]) for m in metrics],
            name == FUSED,
        )
        for name, values in found.items()
    ]
    levels = {m: _chance(evaluation, split, m) for m in metrics}
    return {
        "groups": _columns(metrics),
        "rows": rows,
        "chance": [None if levels[m] is None else f"{levels[m]:.3f}" for m in metrics],
        "size": _count(list(map(len, evaluation.labels[split]))),
    }


def _count(rows: Sequence[int]) -> str:
    return f"{rows[0]:,}" if min(rows) == max(rows) else f"{min(rows):,} to {max(rows):,}"


def _chance(evaluation: Evaluation, split: str, metric: str) -> float | None:
    """Return the level of chance, the mean over seeds; a search by target goes over all rows, not distinct targets."""
    levels, kind = [], evaluation.config.task.kind
    for labels in evaluation.labels[split]:
        backwards = kind == "retrieval" and not metric.startswith(f"{sides(evaluation.config)[0]}_to_")
        levels.append(chance(kind, np.arange(len(labels)) if backwards else labels, metric))
    known = [level for level in levels if level is not None]
    return float(np.mean(known)) if known else None


def _withheld(evaluation: Evaluation, split: str) -> dict[str, Any] | None:
    """Return the headline metric of each model that fuses, under each condition; None if no modality is withheld."""
    models, metric = evaluation.results[split], evaluation.metric
    conditions = list(models[FUSED])
    if len(conditions) == 1:
        return None
    rows = []
    for name, found in models.items():
        if not name.endswith(ALONE):
            cells = [Cell(metric, interval(found[c][metric])) if c in found else None for c in conditions]
            rows.append((label(evaluation.config, name), cells, name == FUSED))
    return {"conditions": conditions, "rows": rows}


def _data(evaluation: Evaluation) -> list[list[str]]:
    """Return the table of modalities: kind, rows in each split of the first seed, items that train and test share."""
    table: list[list[str]] = []
    for name, covered in evaluation.coverage.items():
        shared = covered.shared is not None
        if not table:
            table.append(["", "kind", *covered.rows, *(["items in both train and test"] if shared else [])])
        rows = [f"{there:,} of {count:,}" for there, count in covered.rows.values()]
        kind = evaluation.config.modalities[name].kind
        table.append([name, kind, *rows, *([f"{covered.shared:,}"] if shared else [])])
    return table


def _versions() -> str:
    packages = " · ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scikit-learn"))
    kernels = "NumPy reference" if native is None else f"native kernels, {native.isa()}"
    return f"fusionsum ({kernels}) · {packages} · Python {platform.python_version()}"


def _figures(evaluation: Evaluation) -> dict[str, Figure]:
    """Draw all plots, by the names of their files."""
    figures = {"training": _curves(evaluation)}
    for split in evaluation.results:
        place = _slug(split)
        figures[f"models-{place}"] = _bars(evaluation, split)
        if evaluation.probabilities[split]:
            probabilities = np.concatenate(evaluation.probabilities[split])
            labels = np.concatenate(evaluation.labels[split])
            figures[f"confusion-{place}"] = _confusion(probabilities, labels, evaluation.classes)
            figures[f"calibration-{place}"] = _reliability(probabilities, labels)
    return figures


def _slug(split: str) -> str:
    return re.sub(r"\W+", "-", split)


def _bars(evaluation: Evaluation, split: str) -> Figure:
    models, metric = evaluation.results[split], evaluation.metric
    names = list(models)[::-1]
    values = [interval(models[name]["all"][metric]) for name in names]
    figure = Figure(figsize=(8.2, 0.42 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots()
    colours = [ACCENT if name == FUSED else PALE for name in names]
    halves = [v.half or 0 for v in values]
    axes.barh(
        range(len(names)), [v.mean for v in values], xerr=halves, color=colours, height=0.62, ecolor=INK, capsize=3
    )
    level = _chance(evaluation, split, metric)
    if level is not None:
        axes.axvline(level, color=INK, linestyle=":", linewidth=1)
        axes.annotate("chance", (level, len(names) - 0.45), fontsize=9, ha="center", va="bottom", annotation_clip=False)
    for k, v in enumerate(values):
        end = (v.mean + (v.half or 0), k)
        axes.annotate(f"{v.mean:.3f}", end, xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), [label(evaluation.config, name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(readable(metric))
    axes.set_xlim(0, None)
    return figure


def _curves(evaluation: Evaluation) -> Figure:
    """Draw the loss of each model, mean over seeds, over the epochs that all seeds reached."""
    figure = Figure(figsize=(8.2, 3.2), layout="constrained")
    both = figure.subplots(1, 2, sharex=True)
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for name, colour in zip(list(evaluation.parameters)[:LINES], colours, strict=False):
        logs = [log for (model, _), log in evaluation.histories.items() if model == name]
        epochs = min(map(len, logs))
        for axes, key in zip(both, ("train_loss", "validation_loss"), strict=True):
            if key in logs[0][0]:
                mean = np.mean([[entry[key] for entry in log[:epochs]] for log in logs], axis=0)
                marker = "o" if epochs == 1 else None
                curve = label(evaluation.config, name)
                axes.plot(range(1, epochs + 1), mean, color=colour, marker=marker, label=curve)
    for axes, title in zip(both, ("training loss", "validation loss"), strict=True):
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _confusion(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Figure:
    matrix = confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(len(classes)))
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    side = min(5.2, 2.2 + 0.34 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= LABELLED:
        for i, j in np.ndindex(shares.shape):
            if shares[i, j] >= 0.005:
                colour = "white" if shares[i, j] > 0.55 else INK
                axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set_yticks(range(len(classes)), classes)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted", ylabel="true", title="% of each true class")
    return figure


def _reliability(probabilities: np.ndarray, labels: np.ndarray) -> Figure:
    count, confidence, accuracy = calibration(probabilities, labels)
    figure = Figure(figsize=(3.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=PALE, linestyle=":", linewidth=1)
    axes.scatter(confidence, accuracy, s=6 + 150 * count / count.max(), color=ACCENT, alpha=0.85, linewidth=0)
    axes.set(xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal", xlabel="confidence", ylabel="accuracy")
    axes.set_title("calibration (area: rows)")
    return figure
