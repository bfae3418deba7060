"""A run: the folder of one training. Its files are named, written and read here.

``config.yaml`` (resolved), ``checkpoints/MODEL-SEED.pt`` and ``.csv`` (its log), ``checkpoints/SEED.fitted`` (statistics
of the seed's training rows), ``log.csv`` (of all models). What lives elsewhere: TensorBoard's files (``train.py``);
``metrics.json``, ``plots/`` and ``report.html`` (``report.py``).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .config import Config, differences, load, to_yaml
from .errors import CheckpointError
from .manifest import write_csv

History = list[dict[str, float]]  # an entry for each epoch


def write_checkpoint(
    path: Path,
    identity: Mapping[str, Any] | None,
    weights: Mapping[str, Any],
    history: History,
    done: bool,
    loop: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's checkpoint, and its log beside it.

    Parameters
    ----------
    path : pathlib.Path
        ``MODEL-SEED.pt``.
    identity : mapping
        The configuration and the manifest's hash: a resumed training must have the same.
    weights : mapping
        The model's ``state_dict``.
    history : list of dict
    done : bool
        Whether the training is complete.
    loop : mapping, optional
        The state of an incomplete training's loop: ``optimizer``, ``schedule``, ``generator``, ``best``.
    """
    _save(path, {"identity": identity, "model": weights, "history": history, "done": done} | dict(loop or {}))
    write_csv(path.with_suffix(".csv"), history)


def read_checkpoint(path: Path, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a model's checkpoint; if `identity` is given, require the checkpoint's to equal it.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is of another configuration, or does not say of which.
    """
    state = _read(path)
    if identity is not None:
        if state.get("identity") is None:  # files of `MultimodalPredictor.save` once lacked it
            raise CheckpointError(f"{path}: does not say of which configuration it is, so it cannot be resumed")
        if different := differences(state["identity"], identity):
            raise CheckpointError(f"{path}: is of another configuration (there, and here): {'; '.join(different)}")
    return state


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _save(path: Path, state: Any) -> None:
    """Save so that an interruption leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


class Run:
    """The folder of one training."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def checkpoint(self, model: str, seed: int) -> Path:
        """Return the file of a model's checkpoint."""
        return self.folder / "checkpoints" / f"{model.replace(' ', '-')}-{seed}.pt"

    def _fitted(self, seed: int) -> Path:
        return self.folder / "checkpoints" / f"{seed}.fitted"

    def must_be_new(self) -> None:
        """Raise CheckpointError if the folder is a run already."""
        if (self.folder / "config.yaml").exists():
            raise CheckpointError(f"{self.folder} is a run already: continue it (--resume), or choose another folder")

    def must_be_of(self, identity: Mapping[str, Any]) -> None:
        """Raise CheckpointError if the folder holds checkpoints of another `identity`."""
        for earlier in sorted((self.folder / "checkpoints").glob("*.pt"))[:1]:
            read_checkpoint(earlier, identity)

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    def write_fitted(self, seed: int, fitted: Mapping[str, Any]) -> None:
        """Write the statistics of a seed's training rows: ``task`` and, by modality, ``fitted``."""
        _save(self._fitted(seed), dict(fitted))

    def write_log(self, histories: Mapping[tuple[str, int], History]) -> None:
        """Write the epochs of all models and seeds as one table."""
        entries = [{"model": m, "seed": s} | entry for (m, s), history in histories.items() for entry in history]
        write_csv(self.folder / "log.csv", entries)

    def config(self) -> Config:
        """Read the configuration; raise ConfigError if there is none."""
        return load(self.folder / "config.yaml")

    def read(self, models: Sequence[str], seed: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Return the statistics of a seed's training rows, and the checkpoint of each model.

        Raises
        ------
        CheckpointError
            If a file cannot be read, or the training of a model is not done.
        """
        checkpoints = {model: read_checkpoint(self.checkpoint(model, seed)) for model in models}
        for model, state in checkpoints.items():
            if not state["done"]:
                raise CheckpointError(f"{self.folder}: the training of {model!r}, seed {seed}, is not done: --resume")
        return _read(self._fitted(seed)), checkpoints
