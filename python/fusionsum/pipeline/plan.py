"""What is trained on which rows: the splits of the seeds, what a resumed training must have in common, the model to use.

What lives here: decisions that need no model's weights. What lives elsewhere: the training of what is planned
(``predictor.py``), how a split is drawn (``manifest.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import sources
from .checkpoint import History
from .config import Config, to_mapping
from .errors import ConfigError, ManifestError, unknown
from .fuse import FUSED
from .infer import complete
from .kinds import Modality
from .labels import check_classes, learn
from .manifest import Manifest, splits
from .preprocess import Gathered, fit

IN_MEMORY = ""  # the manifest of a training on rows in memory
# Keys that may differ between the start of a training and its resumption: the weights do not depend on them, or, with
# more epochs, go on from what they were.
CIRCUMSTANCES = {
    "data": ("manifest", "workers", "cache", "cache_limit", "code"),
    "task": ("metric", "threshold"),
    "train": ("seeds", "epochs", "threads"),
}


def resolved(config: Config, manifest: Any = None) -> tuple[Config, Manifest, list[str]]:
    """Return the configuration of a training with all paths absolute and all that rows tell, the rows, and what they told.

    The rows are those of the configuration, or of a `manifest` in its place.
    """
    source = Path(config.data.manifest) if manifest is None else manifest
    named = str(Path(source).resolve()) if isinstance(source, str | Path) else IN_MEMORY
    cache, code = (str(Path(folder).resolve()) for folder in (config.data.cache, config.data.code))
    data = replace(config.data, manifest=named, cache=cache, code=code)
    rows = sources.read(source, data.names)
    completed, notes = complete(replace(config, data=data), rows)
    return completed, rows, notes


def identity(config: Config, rows: Manifest) -> dict[str, Any]:
    """Return everything that the weights depend on: the manifest's hash, and all keys but the `CIRCUMSTANCES`."""
    found = to_mapping(config)
    for section, keys in CIRCUMSTANCES.items():
        found[section] = {k: v for k, v in found[section].items() if k not in keys}
    del found["title"], found["baselines"]
    return found | {"manifest": rows.digest()}


def own_rows(config: Config, identity: Mapping[str, Any] | None) -> Manifest:
    """Return the rows of a training; raise ManifestError if their manifest is gone or has changed since."""
    path = Path(config.data.manifest)
    if not path.is_file():
        raise ManifestError(
            [f"{path}: the manifest of the training is not there; give other rows (--manifest)"]
            if config.data.manifest
            else ["the rows of the training were in memory: give them, or others, to evaluate"]
        )
    rows = sources.read(path, config.data.names)
    if identity is not None and rows.digest() != identity["manifest"]:
        raise ManifestError(
            [
                f"{path}: has changed since the training, whose splits and labels are the old one's: restore it, "
                f"or evaluate all of its rows (--manifest {path.name})"
            ]
        )
    return rows


def plan(
    config: Config,
    modalities: Mapping[str, Modality],
    gathered: Gathered,
    seed: int,
    drawn: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Split the rows for a seed, or take the split that its run has `drawn`.

    Returns
    -------
    dict
        What the seed's models have in common: the ids of its ``split``, and the statistics of its training rows.
    dict of str to Tensor
        The numbers of the rows by split.
    """
    ids = gathered.manifest.column("id")
    parts = splits(gathered.manifest, config.data, seed) if drawn is None else numbered(ids, drawn)
    for part in ("train", *config.data.test):
        if not len(parts[part]):
            raise ConfigError(f"data: no row is in the split {part!r}")
    if not len(parts["validation"]) and config.train.patience:
        raise ConfigError("train.patience: there are no rows of the split 'validation' to stop early by; set it to 0")
    cells = gathered.manifest.column("label")
    trained = [cells[i] for i in parts["train"]]
    # A drawn split may lack a rare class in training, so all labels count. In a manifest's split, a label that training
    # lacks is a mistake.
    task = learn(config.task, trained, trained if config.data.split == "manifest" else cells)
    if "classes" in task:
        check_classes(config.task, gathered.manifest, task["classes"])
    fitted = {
        name: fit(name, modality, gathered.items[name].of(parts["train"])) for name, modality in modalities.items()
    }
    split = {name: [ids[i] for i in part] for name, part in parts.items()}
    state = {"split": split, "task": task, "fitted": fitted}
    return state, {name: torch.from_numpy(part) for name, part in parts.items()}


def numbered(ids: Sequence[str], split: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Return the numbers of the rows of each part of a split, int64; ids that no row has are left out.

    Examples
    --------
    >>> numbered(["a", "b", "c"], {"train": ["a", "c"], "test": ["b", "gone"]})["test"]
    array([1])
    """
    number = {name: i for i, name in enumerate(ids)}
    return {
        part: np.array([number[name] for name in names if name in number], dtype=np.int64)
        for part, names in split.items()
    }


def trained_on(rows: Gathered, drawn: Iterable[Mapping[str, Sequence[str]]], identity: Mapping[str, Any]) -> list[str]:
    """Say how many of the usable rows have ids that a seed trained on, by the splits that the seeds have `drawn`, if any.

    Ids that only number the rows say something of the training's own rows alone, by its `identity`.
    """
    if rows.every.numbered and rows.every.digest() != identity.get("manifest"):
        return []
    trained = {name for split in drawn for name in split["train"]}
    count = sum(name in trained for name in rows.manifest.column("id"))
    said = f"Beware: {count:,} of {len(rows.manifest):,} rows were trained on, by their ids"
    return [f"{said}: this is no measure of what the models say of new rows."] if count else []


def choose(
    config: Config,
    models: Sequence[str],
    histories: Mapping[tuple[str, int], History],
    model: str = FUSED,
    seed: int | None = None,
) -> tuple[str, int, str]:
    """Choose one of the trained models by the validation loss.

    Parameters
    ----------
    config, models, histories
        What was trained, and the epochs by model and seed.
    model : str, optional
        A model's name; ``best`` for that of the least validation loss, the mean over seeds.
    seed : int, optional
        None for that of the model's least validation loss, or the first if there are no validation rows.

    Returns
    -------
    model : str
    seed : int
    reason : str
        Why this one, in words.
    """
    seeds = config.train.seeds
    loss = {key: _validation_loss(history, config.train.patience) for key, history in histories.items()}
    means = {name: sum(loss[name, s] for s in seeds) / len(seeds) for name in models}
    known = all(map(math.isfinite, means.values()))
    best = min(means, key=means.__getitem__) if known else FUSED
    reasons = []
    if model == "best":
        model = best
        reasons.append("the model of the least validation loss" if known else "no validation rows to choose by")
    elif model not in models:
        raise ConfigError(f"--model: {unknown('model', model, [*models, 'best'])}")
    elif best != model:
        reasons.append(f"{best!r} has a lower validation loss, {means[best]:.4g} against {means[model]:.4g}")
    if seed is None:
        seed = min(seeds, key=lambda s: loss[model, s]) if known else seeds[0]
        if len(seeds) > 1:
            reasons.append(f"{'the best' if known else 'the first'} of {len(seeds)} seeds")
    elif seed not in seeds:
        raise ConfigError(f"--seed: expected one of {', '.join(map(str, seeds))}, got {seed}")
    return model, seed, "; ".join(reasons) or "as it was asked for"


def _validation_loss(history: History, patience: int) -> float:
    """Return the validation loss of a training's final weights, the best ones if it has patience; inf without rows."""
    losses = [entry.get("validation_loss", math.inf) for entry in history]
    return min(losses) if patience else losses[-1]
