"""A run: the folder of one training. Its files are named and placed here, and it is locked while one trains in it.

``config.yaml`` (resolved), ``checkpoints/MODEL-SEED.safetensors`` and ``.csv`` (its log), ``checkpoints/SEED.json``
(the seed's split, the statistics of its training rows, its decision offsets), ``log.csv`` (of all models),
``failed.txt`` (why a training ended without a model). What lives elsewhere: what is in a checkpoint (``checkpoint.py``);
TensorBoard's files (``train.py``); ``metrics.json``, ``differences.json``, ``plots/`` and ``report.html`` (``report.py``);
``retrieved.csv`` and ``retrieved.html`` (``retrieve.py``); ``predictions.csv`` (``prediction.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import checkpoint as files
from .checkpoint import Checkpoint, History
from .config import Config, Train, load, to_yaml
from .errors import CheckpointError, ConfigError
from .features import known
from .manifest import write_csv
from .processes import here

MADE = ("checkpoints", "tensorboard", "plots", "evaluations")  # folders of a run
WRITTEN = (
    *("config.yaml", "log.csv", "failed.txt", "metrics.json", "differences.json", "report.html"),
    *("predictions.csv", "retrieved.csv", "retrieved.html"),
)


class Run:
    """The folder of one training."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def checkpoint(self, model: str, seed: int) -> Path:
        """Return the file of a model's checkpoint."""
        return self.folder / "checkpoints" / f"{model.replace(' ', '-')}-{seed}.safetensors"

    def _seed(self, seed: int) -> Path:
        return self.folder / "checkpoints" / f"{seed}.json"

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("*.safetensors"))

    @property
    def _failed(self) -> Path:
        return self.folder / "failed.txt"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep every other process from training in the folder; leave no folder behind that nothing was written to.

        Raises
        ------
        CheckpointError
            If another process trains in the folder, or it is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: is a file: a run needs a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / ".lock"
        lock = FileLock(place, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise CheckpointError(f"{self.folder}: another process is training in it: wait for it, or end it") from None
        try:
            yield
        finally:
            lock.release()
            place.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def must_be_new(self, overwrite: bool = False) -> None:
        """Raise CheckpointError if the folder is a run already, unless it may be overwritten.

        What a training has left that failed, or was interrupted in its first epoch, is no run.
        """
        if not (self.folder / "checkpoints").is_dir():
            if (self.folder / "config.yaml").exists():
                raise CheckpointError(f"{self.folder}: has a config.yaml, and is no run: choose another folder")
        elif any((self.folder / "checkpoints").glob("*-*")) and not overwrite and not self._failed.exists():
            raise CheckpointError(
                f"{self.folder} is a run already: continue it (--resume), replace it (--overwrite), or choose another"
            )

    def must_be_of(self, identity: Mapping[str, Any], settings: Train) -> None:
        """Raise CheckpointError if the folder holds checkpoints of another `identity`, or such as cannot be continued."""
        for path in self._checkpoints():
            files.read(path).checked(path, identity, settings)
        if not self._checkpoints() and (older := sorted((self.folder / "checkpoints").glob("*.pt"))):
            raise CheckpointError(
                f"{older[0]}: is of an earlier version, which wrote pickles; these are not read: train again (--overwrite)"
            )

    def clear(self) -> None:
        """Delete the files of a run, if the folder is one, and nothing else that is in it."""
        if not (self.folder / "checkpoints").is_dir():
            return
        for name in MADE:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in WRITTEN:
            (self.folder / name).unlink(missing_ok=True)

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration; its paths are relative to the folder, so that both can move together."""
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        files.replace(self.folder / "config.yaml", to_yaml(config, self.folder).encode())
        self._failed.unlink(missing_ok=True)

    def write_seed(self, seed: int, state: Mapping[str, Any]) -> None:
        """Write what a seed's models have in common: ``split``, ``task``, ``fitted``; ``offsets`` once all are trained."""
        files.write_json(self._seed(seed), state)

    def write_log(self, histories: Mapping[tuple[str, int], History]) -> None:
        """Write the epochs of all models and seeds as one table."""
        entries = [{"model": m, "seed": s} | entry for (m, s), history in histories.items() for entry in history]
        write_csv(self.folder / "log.csv", entries)

    def fail(self, reason: str) -> None:
        """Say that the training ended without a model: the folder is no run."""
        files.replace(self._failed, f"{reason}\n".encode())

    def config(self, trust_encoder: bool = False) -> Config:
        """Read the configuration.

        Raises
        ------
        ConfigError, CheckpointError
            If the folder is no run, or the configuration names a module to import that is not trusted.
        """
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"{self.folder}: is no run: it has no config.yaml")
        if self._failed.exists():
            reason = self._failed.read_text(encoding="utf-8", errors="replace").strip()
            raise CheckpointError(f"{self.folder}: is no run, for its training failed: {reason}")
        config = load(path)
        for name, modality in config.modalities.items():
            if ":" in modality.encoder and not (trust_encoder or known(modality.encoder)):
                raise ConfigError(
                    f"modalities.{name}.encoder: {self.folder} asks to import {modality.encoder!r}, which executes it: say "
                    f"so if you trust it (--trust-encoder, trust_encoder=True)"
                )
        return config

    def drawn(self, seeds: Sequence[int]) -> dict[int, dict[str, list[str]]]:
        """Return the splits that the run has drawn, ids by part, of those of the seeds that it has trained with."""
        return {seed: files.read_json(self._seed(seed))["split"] for seed in seeds if self._seed(seed).exists()}

    def read(self, models: Sequence[str], seed: int) -> tuple[dict[str, Any], dict[str, Checkpoint]]:
        """Return what a seed's models have in common, and the checkpoint of each.

        Raises
        ------
        CheckpointError
            If a file cannot be read, or the training of a model is not done.
        """
        checkpoints = {model: files.read(self.checkpoint(model, seed)) for model in models}
        for model, state in checkpoints.items():
            if not state.done:
                raise CheckpointError(f"{self.folder}: the training of {model!r}, seed {seed}, is not done: --resume")
        shared = files.read_json(self._seed(seed))
        if "offsets" not in shared:
            raise CheckpointError(f"{self.folder}: the training of seed {seed} is not done: --resume")
        return shared, checkpoints


@contextmanager
def begun(out: str | Path | None, resume: bool, overwrite: bool) -> Iterator[Run | None]:
    """Give the run of a training, claimed, if it has a folder and to the first rank; all raise if it may not begin."""
    ranks = here()
    run = None if out is None or ranks.rank else Run(out)
    with ExitStack() as stack:

        def claim() -> None:
            if run is not None:
                stack.enter_context(run.claimed())
                if not resume:
                    run.must_be_new(overwrite)

        ranks.first(claim)
        yield run


def write_checkpoint(path: Path, state: Checkpoint) -> None:
    """Write a model's checkpoint, and its log beside it as CSV."""
    files.write(path, state)
    write_csv(path.with_suffix(".csv"), state.history)
