"""The command line's verbs: each is a few calls of the pipeline, and what it prints.

What lives here: one function a verb, the defaults of its paths, and what it may not overwrite. What lives elsewhere: the
options (``fusionsum.__main__``), the work (``predictor.py`` and the steps).
"""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import replace
from pathlib import Path

from . import infer, sources
from .cache import Cache
from .config import Config, Data, load, template
from .datasets import DATA_SETS
from .datasets import prepare as prepare_data
from .demo import demonstrate
from .errors import ConfigError
from .predictor import MultimodalPredictor
from .processes import here
from .report import verdicts, write_report
from .retrieve import write_retrieved


def demo(out: Path, seeds: int, steps: int) -> None:
    """Take the five steps on digits-sum; write the report."""
    demonstrate(out, seeds, steps)


def prepare(name: str, out: Path | None, source: Path | None) -> None:
    """Make a data set's folder and say how to train on it."""
    for config in prepare_data(name, out or Path("data", name), source):
        print(f"fusionsum train {config} --out {Path('runs', f'{name}-{config.stem}')}")


def data_sets() -> str:
    """Return the names of the data sets, and what they are made of."""
    return "data sets:\n" + "\n".join(f"  {name}: {data.licence}" for name, data in DATA_SETS.items())


def init(manifest: Path, out: Path | None, overwrite: bool) -> None:
    """Write a configuration to be edited: what a manifest's columns tell, and useful defaults as comments."""
    place = out or manifest.with_suffix(".yaml")
    _must_be_free(place, overwrite, manifest)
    rows = sources.read(manifest)
    data = Data(manifest=os.path.relpath(manifest, place.parent))
    config, notes = infer.complete(Config(title=manifest.stem, data=data), rows)
    task, note = infer.task(config, rows)
    place.write_text(template(replace(config, task=task), [*notes, note]), encoding="utf-8")
    print(f"fusionsum train {place}")


def train(
    config: Path,
    out: Path | None,
    manifest: Path | None,
    overrides: list[str],
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> None:
    """Train all models that a configuration names, into a run's folder."""
    out = out or run_of(config)
    MultimodalPredictor(load(config, overrides)).fit(manifest, out, resume, overwrite, progress)
    print(f"fusionsum evaluate {out}")


def run_of(config: Path) -> Path:
    """Return the folder of a configuration's run where none is named: after its file, or its folder."""
    name = config.resolve().parent.name if config.stem in ("config", "fusionsum") else config.stem
    return Path("runs", name)


def evaluate(run: Path, manifest: Path | None, out: Path | None, trust_encoder: bool, progress: bool) -> None:
    """Measure a run's models; write metrics, plots and the report."""
    evaluation = MultimodalPredictor.load(run, trust_encoder).evaluate(manifest, progress)
    if out is None:
        out = run
        if manifest is not None:  # the run's own metrics and report stay
            out = run / "evaluations" / f"{manifest.stem}-{hashlib.sha256(manifest.read_bytes()).hexdigest()[:8]}"
    words = ["fusionsum", "evaluate", str(run), *(["--manifest", str(manifest)] if manifest else [])]
    if here().rank:
        return
    write_report(out, evaluation, command=shlex.join(words))
    print("\n".join(verdicts(evaluation)))
    print(f"Written to {out / 'report.html'}.")


def predict(
    run: Path,
    manifest: Path,
    out: Path | None,
    on_error: str,
    model: str,
    seed: int | None,
    trust_encoder: bool,
    overwrite: bool,
    progress: bool,
) -> None:
    """Write the predictions of one of a run's models for a manifest's rows."""
    place = out or run / "predictions.csv"
    here().first(lambda: _must_be_free(place, overwrite or out is None, manifest))
    predictor = MultimodalPredictor.load(run, trust_encoder)
    model, seed, reason = predictor.chosen(model, seed)
    count = predictor.write_predictions(manifest, place, model, seed, on_error, progress)
    print(f"{count} predictions of {model!r}, seed {seed} ({reason}), written to {place}.")


def _must_be_free(place: Path, overwrite: bool, manifest: Path) -> None:
    """Raise ConfigError unless a file may be written there: over no manifest, and over another file if that is said."""
    if place.exists() and manifest.exists() and place.samefile(manifest):
        raise ConfigError(f"--out: {place} is the manifest: name another file")
    if place.is_dir() or not place.parent.is_dir():
        raise ConfigError(f"--out: expected a file's name in a folder that is there, got {place}")
    if place.exists() and not overwrite:
        raise ConfigError(f"--out: {place} is there already: replace it (--overwrite), or name another file")


def retrieve(
    run: Path, queries: Path, gallery: Path, k: int, out: Path | None, trust_encoder: bool, progress: bool
) -> None:
    """Write what a run's fused model finds in a gallery for queries: a table, and a page that shows both."""
    place = out or run
    retrieved = MultimodalPredictor.load(run, trust_encoder).retrieve(queries, gallery, k, progress)
    if here().rank:
        return
    write_retrieved(place, retrieved)
    print(f"Written to {place / 'retrieved.csv'} and {place / 'retrieved.html'}.")


def export(run: Path, out: Path, form: str, model: str, seed: int | None, trust_encoder: bool) -> None:
    """Write one of a run's models for other programs, and the description of its inputs."""
    predictor = MultimodalPredictor.load(run, trust_encoder)
    chosen, seed, reason = predictor.chosen(model, seed)
    written = predictor.export(out, form, chosen, seed)
    print(f"{chosen!r}, seed {seed} ({reason}), written to {' and '.join(map(str, written))}.")


def cache(folder: Path, clear: bool, limit: float | None) -> None:
    """Show what a cache holds, after clearing it or making it smaller."""
    held = Cache(folder) if limit is None else Cache(folder, round(limit * 2**30))
    if clear:
        print(f"{held.clear() / 2**20:,.1f} MiB freed.")
    elif limit is not None:
        held.summary()
        held.close()  # which brings it under its limit
    for what, count, size in held.summary():
        print(f"{what}: {count:,} items, {size / 2**20:,.1f} MiB")
    print(f"{held.path}: {held.size() / 2**20:,.1f} MiB")
    held.close()
