"""Step 5, shown: ``metrics.json``, ``differences.json``, plots (SVG), and ``report.html``, one file that loads no other.

What lives here: the sentences that compare the models, and what tables and drawings of the page hold. What lives elsewhere:
the numbers (``evaluate.py``), how drawings look (``charts.py``), items on the page (``items.py``), the page itself
(``report.html``, a Jinja template beside this file).
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from ..backend import native
from . import charts
from .charts import Curves, Strip
from .compare import Difference, Effect, Interval, interval
from .config import Config, to_yaml
from .evaluate import CHANCE, GIVEN, Evaluation, Results
from .explain import Example, Part
from .fuse import ALONE, FUSED, SUM, combined_models, input_modalities, may_be_sum, sides
from .items import shown
from .metrics import average_precisions, better, bounds, calibration

LISTED = 40  # classes that are listed one by one
DRAWN = 30  # classes up to which the confusion matrix is drawn
TERMS = 8  # terms of the fusion that are drawn
COMMON = 0.8  # of the rows: from this share of one class on, accuracy says little
SPLITS = {
    "manifest": "the manifest’s",
    "by-seed": "drawn by group for each seed",
    GIVEN: "none: every row is evaluated",
}


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a text, a smaller one behind it, and whether it is the best of its column."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page: each row a kind (``ours``, ``soft`` or nothing), the row's name and its cells."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Cell]]]


def write_report(
    folder: str | Path,
    evaluation: Evaluation,
    notes: Sequence[str] = (),
    curves: Sequence[Curves] = (),
    command: str | None = None,
) -> None:
    """Write an evaluation's ``metrics.json``, ``differences.json``, ``plots/`` and ``report.html`` to a folder.

    Parameters
    ----------
    folder : str or pathlib.Path
        Made if it does not exist.
    evaluation : Evaluation
        As `MultimodalPredictor.evaluate` returns it.
    notes : sequence of str, optional
        Paragraphs to end the summary with, after the evaluation's own.
    curves : sequence of charts.Curves, optional
        Further drawings, which follow the summary.
    command : str, optional
        What was typed.

    Examples
    --------
    See `MultimodalPredictor`.
    """
    folder = Path(folder)
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(metrics_json(evaluation.results), encoding="utf-8")
    compared = {split: evaluation.differences(split) for split in evaluation.results}
    (folder / "differences.json").write_text(differences_json(compared), encoding="utf-8")
    drawn = _drawings(evaluation, compared)
    for name, drawing in drawn.items():
        charts.write(plots / f"{name}.svg", drawing)
    extra = [(curve, charts.lines(curve)) for curve in curves]
    for curve, drawing in extra:
        charts.write(plots / f"{_slug(curve.title)}.svg", drawing)
    config = evaluation.config
    page = rendered(
        "report.html",
        title=config.title,
        facts=_facts(evaluation, command),
        verdicts={split: _verdict(evaluation, split, compared[split]) for split in evaluation.results},
        notes=[*evaluation.notes, *notes],
        curves=extra,
        plots=drawn,
        metric=readable(evaluation.metric),
        fused=label(config, FUSED),
        differences={split: _differences(evaluation, split, found) for split, found in compared.items()},
        tables={split: _tables(evaluation, split) for split in evaluation.results},
        withheld={split: _withheld(evaluation, split) for split in evaluation.results},
        classes={split: _classes(evaluation, split) for split in evaluation.results},
        explained={split: _explained(evaluation, split) for split in evaluation.results},
        sizes={split: _count([len(m.rows) for m in found]) for split, found in evaluation.measured.items()},
        data=_data(evaluation),
        messages=evaluation.messages,
        config=to_yaml(config),
        seeds=_seeds(evaluation),
        drawn=evaluation.split == "by-seed",
        given=evaluation.split == GIVEN,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def rendered(template: str, **values: Any) -> str:
    """Fill in one of the pages beside this file; all that they have in common is in ``page.html``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = _slug
    return environment.get_template(template).render(versions=_versions(), **values)


def metrics_json(results: Results) -> str:
    """Return the results as JSON, means and the ends of intervals over seeds beside the values of the seeds."""

    def summary(metric: str, values: list[float]) -> dict[str, Any]:
        found = interval(values, bounds(metric))
        return {"mean": found.mean, "low": found.low, "high": found.high, "seeds": values}

    nested = {
        split: {
            model: {
                condition: {k: summary(k, v) for k, v in metrics.items()} for condition, metrics in conditions.items()
            }
            for model, conditions in models.items()
        }
        for split, models in results.items()
    }
    return json.dumps(nested, indent=1)


def differences_json(compared: Mapping[str, Mapping[str, Difference]]) -> str:
    """Return by split and model how much better the fused model is, with both intervals and the tests' p, as JSON."""

    def effect(found: Effect | None) -> dict[str, Any] | None:
        return None if found is None else {"low": found.interval.low, "high": found.interval.high, "p": found.p}

    nested = {
        split: {
            name: {"mean": d.mean, "rows": effect(d.rows), "seeds": effect(d.seeds), "certain": d.certain}
            for name, d in found.items()
        }
        for split, found in compared.items()
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
    if model == CHANCE:
        names = {"classification": "always the commonest class", "regression": "the mean of training"}
        return names.get(config.task.kind, "a random order")
    if model != FUSED:
        return {"mlp": "concat-MLP, equal parameters"}.get(model, model.replace("-", " "))
    if len(input_modalities(config)) == 1:
        return "two towers" if config.task.kind == "retrieval" else "linear"
    return f"fused: {config.fusion.layer}"


def verdicts(evaluation: Evaluation) -> list[str]:
    """Say of each test split which model is best, how the fused model compares with each other, and what is certain."""
    return [
        sentence
        for split in evaluation.results
        for sentence in _verdict(evaluation, split, evaluation.differences(split))
    ]


def _verdict(evaluation: Evaluation, split: str, compared: Mapping[str, Difference]) -> list[str]:
    config, metric, models = evaluation.config, evaluation.metric, evaluation.results[split]
    best, *level = evaluation.contenders[split]
    fused, sizes = label(config, FUSED), [len(m.rows) for m in evaluation.measured[split]]
    reached = {name: str(interval(found["all"][metric], bounds(metric))) for name, found in models.items()}
    start = f"On “{split}” ({_count(sizes)} rows, {_seeds(evaluation)}), {label(config, best)} has the best"
    if best == FUSED:
        said = [f"{start} {readable(metric)}: {reached[best]}."]
    else:
        said = [f"{start} {readable(metric)}, {reached[best]}; {fused} reaches {reached[FUSED]}."]
    if best != FUSED and FUSED not in level:
        said.append(f"That {label(config, best)} is better than {fused} is certain.")
    groups: dict[str, list[str]] = {"is better than": [], "is worse than": [], "cannot be told from": []}
    for name, found in compared.items():
        if name == CHANCE:
            continue
        if found.certain:
            verb, how = ("is better than" if found.mean > 0 else "is worse than"), f"by {abs(found.mean):.3f}"
        else:
            verb = "cannot be told from"
            how = f"which is {abs(found.mean):.3f} {'worse' if found.mean > 0 else 'better'}" if found.mean else "equal"
        groups[verb].append(f"{label(config, name)} ({how})")
    parts = [f"{verb} {', '.join(names)}" for verb, names in groups.items() if names]
    if parts:
        said.append(f"{fused[0].upper()}{fused[1:]} {'; it '.join(parts)}.")
    chance = compared.get(CHANCE)
    if chance is not None and not (chance.certain and chance.mean > 0):
        said.append(f"It is not certain that {fused} is better than no model at all ({label(config, CHANCE)}).")
    if "score-sum" in compared and compared["score-sum"].certain and compared["score-sum"].mean < 0:
        said.append(f"On “{split}” a simple sum of the unimodal models’ scores is better than learned fusion.")
    share = float(np.mean([m.levels.get("accuracy", 0) for m in evaluation.measured[split]]))
    if share >= COMMON:
        said.append(
            f"Beware: {share:.0%} of the rows are of one class, so that accuracy says little; read balanced accuracy and "
            "average precision, and the table of classes."
        )
    return said


def _seeds(evaluation: Evaluation) -> str:
    count = len(next(iter(evaluation.measured.values())))
    return "one seed" if count == 1 else f"{count} seeds"


def _count(rows: Sequence[int]) -> str:
    return f"{rows[0]:,}" if min(rows) == max(rows) else f"{min(rows):,} to {max(rows):,}"


def _facts(evaluation: Evaluation, command: str | None) -> list[tuple[str, str]]:
    config = evaluation.config
    query, target = sides(config)
    task = (
        f"{config.task.kind}: {query} → {target}" if target else f"{config.task.kind} from {query.replace('+', ' + ')}"
    )
    encoders = ", ".join(f"{name}: {m.encoder}" for name, m in config.modalities.items())
    return [
        ("task", task),
        ("fusion", _fusion(evaluation)),
        ("encoders", encoders),
        ("rows", f"{evaluation.rows:,} of {evaluation.manifest.name}"),
        ("split", SPLITS[evaluation.split]),
        ("trained with", _seeds(evaluation)),
        ("evaluated", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"),
        *([("command", command)] if command else []),
    ]


def _fusion(evaluation: Evaluation) -> str:
    """Return the layer, and of one whose products may be dropped in how many seeds they were kept."""
    config, histories = evaluation.config, evaluation.histories
    if len(input_modalities(config)) == 1:
        return "none: one modality"
    fusion = f"{config.fusion.layer}({', '.join(f'{k}={v}' for k, v in config.fusion.options.items())})"
    if not may_be_sum(config):
        return fusion
    seeds = config.train.seeds
    kept = sum(histories.get((FUSED, seed)) != histories.get((SUM, seed)) for seed in seeds)
    return f"{fusion}; its products helped in {kept} of {len(seeds)} seeds (validation rows), else it is the sum"


def _written(metric: str, value: Interval, best: bool = False) -> Cell:
    mean, ends = value.written(1 if metric.endswith("rank") else 3)
    return Cell(mean, ends, best)


def _groups(metrics: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Group metrics under retrieval's two directions, or under nothing, with the name of each in its table."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for metric in metrics:
        found = re.fullmatch(r"(.*_to_.*)_([RP]@\d+|mAP|median_rank)", metric)
        direction, short = (found[1], found[2].replace("_", " ")) if found else ("", readable(metric))
        groups.setdefault(direction and readable(direction), []).append((metric, short))
    return groups


def _parameters(evaluation: Evaluation, model: str) -> str:
    """Return how many parameters a model has; a combination those of what it combines."""
    counts = evaluation.parameters
    if model in combined_models(evaluation.config):
        return f"{sum(count for name, count in counts.items() if name.endswith(ALONE)):,}"
    return f"{counts[model]:,}"


def _tables(evaluation: Evaluation, split: str) -> list[Table]:
    """Return a table of all metrics for each direction: a row for each model, and one for chance.

    A calibration error is compared among the models only that the best one cannot be told from: a model at chance is
    calibrated easily.
    """
    models, config = evaluation.results[split], evaluation.config
    tables = []
    for direction, columns in _groups(list(models[FUSED]["all"])).items():
        means = {
            m: {name: better(m) * float(np.mean(found["all"][m])) for name, found in models.items()} for m, _ in columns
        }
        if "ece" in means:
            means["ece"] = {name: means["ece"][name] for name in evaluation.contenders[split]}
        best = {m: max(values.values()) for m, values in means.items()}
        rows = []
        for name, found in models.items():
            cells = [
                _written(m, interval(found["all"][m], bounds(m)), means[m].get(name) == best[m] and len(models) > 1)
                for m, _ in columns
            ]
            kind = "ours" if name == FUSED else ""
            rows.append((kind, label(config, name), [Cell(_parameters(evaluation, name)), *cells]))
        levels = [
            [of_seed.levels[m] for of_seed in evaluation.measured[split] if m in of_seed.levels] for m, _ in columns
        ]
        if any(levels):
            cells = [Cell(f"{np.mean(level):.3f}" if level else "") for level in levels]
            rows.append(("soft", label(config, CHANCE), [Cell(""), *cells]))
        tables.append(Table(direction, ["model", "parameters", *(short for _, short in columns)], rows))
    return tables


def _differences(evaluation: Evaluation, split: str, compared: Mapping[str, Difference]) -> Table:
    def said(effect: Effect | None) -> list[Cell]:
        if effect is None:
            return []
        low, high = effect.interval.low, effect.interval.high
        ends = "–" if low is None or high is None else f"{_signed(low)} to {_signed(high)}"
        return [Cell(ends, f"p {'< 0.001' if effect.p < 0.001 else f'= {effect.p:.3f}'}")]

    rows = []
    for name, found in _ordered(compared):
        verdict = ("better" if found.mean > 0 else "worse") if found.certain else "not certain"
        cells = [Cell(_signed(found.mean)), *said(found.rows), *said(found.seeds), Cell(verdict)]
        rows.append(("soft" if name == CHANCE else "", label(evaluation.config, name), cells))
    seeds = ["over seeds"] if next(iter(compared.values())).seeds is not None else []
    columns = ["against", "difference", "over rows", *seeds, label(evaluation.config, FUSED)]
    return Table("The differences in numbers", columns, rows)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _ordered(compared: Mapping[str, Difference]) -> list[tuple[str, Difference]]:
    """Order by difference, the strongest contender first."""
    return sorted(compared.items(), key=lambda pair: pair[1].mean)


def _withheld(evaluation: Evaluation, split: str) -> Table | None:
    """Return the headline metric of each model that fuses, under each condition; None if no modality is withheld."""
    models, metric = evaluation.results[split], evaluation.metric
    conditions = list(models[FUSED])
    if len(conditions) == 1:
        return None
    rows = []
    for name, found in models.items():
        if not name.endswith(ALONE):
            cells = [
                _written(metric, interval(found[c][metric], bounds(metric))) if c in found else Cell("–")
                for c in conditions
            ]
            rows.append(("ours" if name == FUSED else "", label(evaluation.config, name), cells))
    return Table(f"{readable(evaluation.metric)} with a modality withheld at test time", ["model", *conditions], rows)


def _classes(evaluation: Evaluation, split: str) -> Table | None:
    """Return the fused model's precision, recall and more for each class, over all seeds; None where there are none."""
    pooled = _pooled(evaluation, split)
    if pooled is None:
        return None
    labels, predicted, probabilities = pooled
    classes = evaluation.classes
    every = range(len(classes))
    single = labels.ndim == 1
    precision, recall, f1, count = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    average = average_precisions(probabilities, labels)
    taken = confusion_matrix(labels, predicted, labels=every) if single else np.zeros((len(classes), len(classes)))
    np.fill_diagonal(taken, 0)
    order = [k for k in np.argsort(-count, kind="stable") if count[k]]
    if len(order) > LISTED:
        order = sorted(order, key=lambda k: f1[k])[:LISTED]
    rows = []
    for k in order:
        other = int(taken[k].argmax())
        mistaken = f"{classes[other]} ({100 * taken[k, other] / count[k]:.0f}%)" if taken[k, other] else "–"
        numbers = [Cell(f"{value:.3f}") for value in (precision[k], recall[k], f1[k], average[k])]
        rows.append(("", classes[k], [Cell(f"{count[k]:,}"), *numbers, *([Cell(mistaken)] if single else [])]))
    left = sum(count > 0) - len(order)
    caption = f"The {len(order)} worst classes; {left} more" if left else "Each class"
    columns = ["class", "rows", "precision", "recall", "F1", "average precision"]
    columns += ["most often taken for"] if single else []
    return Table(f"{caption}: {label(evaluation.config, FUSED)}, all seeds together", columns, rows)


def _pooled(evaluation: Evaluation, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the labels and the fused model's decisions and probabilities, of all seeds; None if there are no classes."""
    of_seeds = evaluation.measured[split]
    if of_seeds[0].probabilities is None:
        return None
    labels, predicted, probabilities = zip(*((m.labels, m.predicted, m.probabilities) for m in of_seeds), strict=True)
    return np.concatenate(labels), np.concatenate(predicted), np.concatenate(probabilities)


def _data(evaluation: Evaluation) -> Table:
    """Return the table of modalities: kind, rows in each split of the first seed, items that train and test share."""
    rows = []
    columns = ["modality", "kind"]
    for name, covered in evaluation.coverage.items():
        shared = covered.shared is not None
        columns = ["modality", "kind", *covered.rows, *(["items in both train and test"] if shared else [])]
        counts = [Cell(f"{there:,} of {count:,}") for there, count in covered.rows.values()]
        kind = evaluation.config.modalities[name].kind
        rows.append(("", name, [Cell(kind), *counts, *([Cell(f"{covered.shared:,}")] if shared else [])]))
    return Table("Rows that have each modality", columns, rows)


def _explained(evaluation: Evaluation, split: str) -> dict[str, Any] | None:
    """Return the drawings of parts and terms, and the rows that are shown, of the first seed; None if there are none."""
    found = evaluation.measured[split][0].explained
    if found is None or not (found.parts or found.examples):
        return None
    most = max((abs(value) for example in found.examples for _, value in example.parts), default=1.0)
    return {
        "rows": f"{found.rows:,}",
        "parts": bool(found.parts),
        "terms": len(found.terms),
        "examples": [_example(evaluation, example, most) for example in found.examples],
    }


def _example(evaluation: Evaluation, example: Example, most: float) -> dict[str, Any]:
    config, manifest = evaluation.config, evaluation.manifest
    given = str(manifest.column("label")[example.row])
    found = []
    if example.predicted is not None and example.rival is not None:
        answer, rival = (evaluation.classes[k] for k in (example.predicted, example.rival))
        said = f"“{answer}”, {example.confidence:.0%} certain"
        said += ": right" if example.joint else f"; it is “{given}”"
        against = f"for “{answer}” and against “{rival}”"
    elif example.predicted is not None:
        name = evaluation.classes[example.predicted]
        said = f"“{name}”, {example.confidence:.0%} certain; it is {given or '–'}"
        against = f"for “{name}”"
    elif example.error is not None:
        said = f"{float(given) + example.error:.4g}; it is {float(given):.4g}"
        against = "to the number"
    else:
        said = f"the right one is number {example.rank}"
        found = [shown(config, manifest, row, config.task.target) for row in example.found]
        against = "to the right one’s lead over the best other’s score"
    rows = [
        Strip(_joined(names), _signed(value), bar=(0, value), ours=len(names) > 1) for names, value in example.parts[:7]
    ]
    return {
        "item": shown(config, manifest, example.row, list(config.modalities)),
        "joint": example.joint,
        "said": said,
        "against": against,
        "found": found,
        "chart": charts.strips(f"What speaks {against}", rows, {0: ""}, -most, most) if rows else None,
        "terms": ", ".join(f"{t} ({_signed(value)})" for t, value in example.terms[:4]),
    }


def _joined(names: Sequence[str]) -> str:
    return " × ".join(names) if len(names) > 1 else f"{names[0]}, by itself" if names else "what is missing"


def _versions() -> str:
    packages = " · ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scikit-learn"))
    kernels = "NumPy reference" if native is None else f"native kernels, {native.isa()}"
    return f"fusionsum ({kernels}) · {packages} · Python {platform.python_version()}"


def _drawings(evaluation: Evaluation, compared: Mapping[str, Mapping[str, Difference]]) -> dict[str, Markup]:
    """Draw all plots, by the names of their files."""
    drawn = {f"training-{key}": charts.lines(curves) for key, curves in _training(evaluation).items()}
    for split, found in compared.items():
        place = _slug(split)
        drawn[f"models-{place}"] = _models(evaluation, split)
        drawn[f"differences-{place}"] = _against(evaluation, split, found)
        pooled = _pooled(evaluation, split)
        if pooled is not None and pooled[0].ndim == 1:
            labels, predicted, probabilities = pooled
            if len(evaluation.classes) <= DRAWN:
                drawn[f"confusion-{place}"] = _confusion(labels, predicted, evaluation.classes)
            title = f"Calibration of {label(evaluation.config, FUSED)} on {split}"
            drawn[f"calibration-{place}"] = charts.reliability(title, *calibration(probabilities, labels))
        explained = evaluation.measured[split][0].explained
        if explained is not None and explained.parts:
            drawn[f"parts-{place}"] = _parts(evaluation, explained.parts)
        if explained is not None and explained.terms:
            drawn[f"terms-{place}"] = _parts(evaluation, explained.terms[:TERMS])
    return drawn


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)


def _models(evaluation: Evaluation, split: str) -> Markup:
    models, metric = evaluation.results[split], evaluation.metric
    sign = better(metric)
    best = evaluation.contenders[split]
    rows = []
    for name in sorted(models, key=lambda name: -sign * float(np.mean(models[name]["all"][metric]))):
        value = interval(models[name]["all"][metric], bounds(metric))
        rows.append(
            Strip(
                label(evaluation.config, name),
                str(value) + (" best" if name == best[0] and len(models) > 1 else ""),
                thick=_ends(evaluation.over_rows(split, name)),
                thin=_ends(value),
                dot=value.mean,
                ours=name == FUSED,
            )
        )
    low, high = bounds(metric)
    levels = [sign * m.scores[CHANCE].mean() for m in evaluation.measured[split] if CHANCE in m.scores]
    at = {float(np.mean(levels)): label(evaluation.config, CHANCE)} if levels else {}
    title = f"{readable(metric)} of each model on {split}"
    return charts.strips(title, rows, at, low, high if np.isfinite(high) else low)


def _ends(value: Interval) -> tuple[float, float] | None:
    return None if value.low is None or value.high is None else (value.low, value.high)


def _against(evaluation: Evaluation, split: str, compared: Mapping[str, Difference]) -> Markup:
    rows = [
        Strip(
            label(evaluation.config, name),
            f"{_signed(found.mean)}, {('better' if found.mean > 0 else 'worse') if found.certain else 'not certain'}",
            thick=_ends(found.rows.interval),
            thin=None if found.seeds is None else _ends(found.seeds.interval),
            dot=found.mean,
            certain=found.certain,
            ours=found.certain,
        )
        for name, found in _ordered(compared)
    ]
    title = f"How much better {label(evaluation.config, FUSED)} is than each other model on {split}"
    return charts.strips(title, rows, {0: "equal"}, 0, 0)


def _parts(evaluation: Evaluation, parts: Sequence[Part]) -> Markup:
    without = {"regression": "error", "multilabel": "all labels right"}.get(evaluation.config.task.kind, "accuracy")
    rows = []
    for part in parts:
        name = _joined(part.names) if part.term is None else f"term {part.term}"
        text = [f"{part.size:.3f}"]
        if part.weight is not None:
            text.append(f"α {part.weight:+.2f}".replace("-", "−"))
        if part.without is not None:
            text.append(f"{without} without it {part.without:.3f}")
        rows.append(
            Strip(name, " · ".join(text), bar=(0, part.size), ours=part.term is not None or len(part.names) > 1)
        )
    return charts.strips("Mean size of each contribution", rows, {}, 0, 0)


def _training(evaluation: Evaluation) -> dict[str, Curves]:
    """Return the loss of each model, mean over seeds, over the epochs that all seeds reached."""
    found = {}
    for key, title in (("train", "training loss"), ("validation", "validation loss")):
        series: dict[str, list[Sequence[float] | None]] = {}
        for name in evaluation.parameters:
            logs = [log for (model, _), log in evaluation.histories.items() if model == name]
            if all(f"{key}_loss" in log[0] for log in logs):
                epochs = min(map(len, logs))
                means = np.mean([[entry[f"{key}_loss"] for entry in log[:epochs]] for log in logs], axis=0)
                series[label(evaluation.config, name)] = [[float(mean)] for mean in means]
        if series:
            longest = max(map(len, series.values()))
            filled = {name: [*values, *[None] * (longest - len(values))] for name, values in series.items()}
            ours = [label(evaluation.config, FUSED)]
            found[key] = Curves(title, "epoch", title, list(range(1, longest + 1)), filled, marked=ours)
    return found


def _confusion(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> Markup:
    taken = confusion_matrix(labels, predicted, labels=range(len(classes)))
    return charts.matrix(
        "Confusion: % of each true class", taken / taken.sum(axis=1, keepdims=True).clip(min=1), classes
    )
