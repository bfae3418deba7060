"""The five steps in a row, as an object: `MultimodalPredictor`, which the command line's verbs call too.

What lives here: which models, seeds and splits are trained and evaluated. What lives elsewhere: each step; the files of
a run (``run.py``); the report of an `Evaluation` (``report.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .checkpoint import Checkpoint, History
from .config import Config, from_mapping, load, to_mapping
from .errors import ConfigError, ManifestError
from .evaluate import GIVEN, Condition, Evaluation, Measured, coverage, measure, outputs
from .features import encoder_class
from .fuse import FUSED, build, input_modalities, layer, parameter_count, trained_models
from .kinds import Modality, Vector
from .manifest import Manifest, splits, write_csv
from .preprocess import Gathered, column, fit, gather_rows
from .pretrained import EXTRACTORS
from .retrieve import Retrieved, listed, search
from .run import Run, write_checkpoint
from .train import Rows, loaded, train

# Keys that may differ between the start of a training and its resumption: the weights do not depend on them, or, with
# more epochs, go on from what they were.
CIRCUMSTANCES = {"data": ("manifest", "workers", "cache"), "train": ("seeds", "epochs", "threads")}
LOG = logging.getLogger("fusionsum")
FOUND = 10  # targets that a prediction of retrieval lists


class MultimodalPredictor:
    r"""Train, evaluate and use a multimodal model that a configuration describes.

    Parameters
    ----------
    config : Config, mapping, str or pathlib.Path
        A configuration, a mapping like a YAML file's, or the path of one.

    Raises
    ------
    ConfigError
        If a key, choice, encoder, layer or option is unknown or wrong; the message suggests the nearest name.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> rows = [f"r{i},{'train' if i < 40 else 'test'},{'odd' if i % 2 else 'even'},n{i % 2},{i}" for i in range(60)]
    >>> _ = (folder / "m.csv").write_text("\n".join(["id,split,label,word,number", *rows]))
    >>> config = {
    ...     "modalities": {"word": {"kind": "text", "length": 2}, "number": {"kind": "table"}},
    ...     "data": {"cache": str(folder / "cache")},
    ...     "train": {"seeds": 1, "epochs": 20, "learning_rate": 0.01, "patience": 0},
    ... }
    >>> predictor = MultimodalPredictor(config).fit(folder / "m.csv", progress=False)
    >>> predictor.evaluate().results["test"]["fused"]["all"]["accuracy"]
    [1.0]
    """

    def __init__(self, config: Config | Mapping[str, Any] | str | Path) -> None:
        if isinstance(config, str | Path):
            config = load(Path(config))
        elif not isinstance(config, Config):
            config = from_mapping(config)
        self.config = config
        self.modalities: dict[str, Modality] = {}
        for name, modality in config.modalities.items():
            frozen = EXTRACTORS[modality.kind]
            try:
                if modality.encoder in frozen:
                    self.modalities[name] = Vector(features=modality.features)
                else:
                    encoder_class(modality.kind, modality.encoder, tuple(frozen))
                    self.modalities[name] = modality
            except ValueError as error:
                raise ConfigError(f"modalities.{name}: {error}") from None
        inputs = input_modalities(config)
        if len(inputs) > 1:
            try:
                with torch.device("meta"):  # where initialising a layer draws no random numbers
                    layer(config.fusion.layer, [2] * len(inputs), 2, config.fusion.options)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        self.models = trained_models(config)
        self.states: dict[tuple[str, int], dict[str, Any]] = {}
        self.histories: dict[tuple[str, int], History] = {}
        self.identity: dict[str, Any] | None = None
        self.gathered: Gathered | None = None

    # Step 1 ----------------------------------------------------------------------------------------------------------

    def _labels(self, gathered: Gathered, task: Mapping[str, Any], labelled: bool) -> torch.Tensor:
        """Return the labels as the task's numbers; of rows to predict, retrieval's targets only."""
        if self.config.task.kind == "retrieval" and gathered.items.keys() >= set(self.config.task.target):
            return torch.from_numpy(gathered.target_numbers(self.config.task.target))
        if not labelled:
            return torch.zeros(len(gathered.manifest))
        cells = gathered.manifest.column("label")
        if self.config.task.kind == "classification":
            number = {label: k for k, label in enumerate(task["classes"])}
            return torch.tensor([number[cell] for cell in cells])
        values = np.array(cells, dtype=np.float64)
        return torch.from_numpy((values - task["mean"]) / task["scale"]).float()

    def rows(self, gathered: Gathered, state: Mapping[str, Any], labelled: bool = True) -> Rows:
        """Return the tensors of gathered rows, scaled and coded by the statistics of the training rows in `state`."""
        columns = {
            name: column(self.modalities[name], items, state["fitted"][name]) for name, items in gathered.items.items()
        }
        return Rows(columns, self._labels(gathered, state["task"], labelled))

    # Steps 2 to 4 ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        manifest: str | Path | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
    ) -> MultimodalPredictor:
        """Train every model with every seed.

        Parameters
        ----------
        manifest : str or pathlib.Path, optional
            Instead of the configuration's ``data.manifest``.
        out : str or pathlib.Path, optional
            The run's folder. Without one nothing is written, and an interrupted training is lost.
        resume : bool, optional
            Whether `out` may be a run already, which is then continued: with the same final weights, to the bit. With
            more seeds or epochs than it has, it gets these too.
        overwrite : bool, optional
            Whether `out` may be a run already, whose files are then deleted once the rows are checked.
        progress : bool, optional
            Whether to show bars, on a terminal.

        Returns
        -------
        MultimodalPredictor
            Itself.

        Raises
        ------
        ManifestError, ConfigError, CheckpointError
            For bad input, before training starts; for a folder that is the run of another training, or another process's.
        ArithmeticError
            If a model's loss is not finite.
        """
        run = None if out is None else Run(out)
        with contextlib.nullcontext() if run is None else run.claimed():
            if run is not None and not resume:
                run.must_be_new(overwrite)
            path = Path(manifest or self.config.data.manifest).resolve()
            cache = str(Path(self.config.data.cache).resolve())
            data = dataclasses.replace(self.config.data, manifest=str(path), cache=cache)
            self.config = dataclasses.replace(self.config, data=data)
            gathered = gather_rows(self.config, path, progress=progress)
            identity = self._identity(path)
            drawn = {} if run is None or not resume else run.drawn(self.config.train.seeds)
            plans = {seed: self._plan(gathered, seed, drawn.get(seed)) for seed in self.config.train.seeds}
            if run is not None:
                if resume:
                    run.must_be_of(identity, self.config.train)
                else:
                    run.clear()
                run.write_config(self.config)
            try:
                self._train(gathered, plans, identity, run, progress)
            except ArithmeticError as error:
                if run is not None:
                    run.fail(str(error))
                raise
            self.gathered, self.identity = gathered, identity
            if run is not None:
                run.write_log(self.histories)
        return self

    def _train(
        self,
        gathered: Gathered,
        plans: Mapping[int, tuple[dict[str, Any], dict[str, torch.Tensor]]],
        identity: dict[str, Any],
        run: Run | None,
        progress: bool,
    ) -> None:
        """Train every model of every seed of `plans`."""
        settings = self.config.train
        steps = sum(settings.epochs * -(-len(chosen["train"]) // settings.batch_size) for _, chosen in plans.values())
        with (
            contained(settings.threads),
            logging_redirect_tqdm([LOG]),
            tqdm(total=len(self.models) * steps, unit="step", disable=None if progress else True) as bar,
        ):
            for seed, (state, chosen) in plans.items():
                rows = self.rows(gathered, state)
                if run is not None:
                    run.write_seed(seed, state)
                for name in self.models:
                    bar.set_description(f"seed {seed}, {name}")
                    torch.manual_seed(seed)
                    model = self.model(name, state)
                    place = None if run is None else run.checkpoint(name, seed)
                    query = [m for m in input_modalities(self.config) if m in _query_encoders(model)]
                    try:
                        history = train(
                            model, self.config.task.kind, rows, chosen, settings, identity, query, place, bar
                        )
                    except ArithmeticError as error:
                        raise ArithmeticError(f"seed {seed}, {name}: {error}") from None
                    self.histories[name, seed] = history
                    self.states[name, seed] = state | {"model": model.state_dict()}
                    losses = ", ".join(
                        f"{k.replace('_', ' ')} {history[-1][k]:.4g}" for k in history[-1] if "loss" in k
                    )
                    LOG.info("seed %s, %s: %s epochs, %s", seed, name, len(history), losses)

    def _identity(self, path: Path) -> dict[str, Any]:
        """Return everything that the weights depend on: the manifest's hash, and all keys but the `CIRCUMSTANCES`."""
        identity = to_mapping(self.config)
        for section, keys in CIRCUMSTANCES.items():
            identity[section] = {k: v for k, v in identity[section].items() if k not in keys}
        del identity["title"], identity["baselines"]
        return identity | {"manifest": hashlib.sha256(path.read_bytes()).hexdigest()}

    def _plan(
        self, gathered: Gathered, seed: int, drawn: Mapping[str, Sequence[str]] | None
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
        parts = splits(gathered.manifest, self.config.data, seed) if drawn is None else numbered(ids, drawn)
        for part in ("train", *self.config.data.test):
            if not len(parts[part]):
                raise ConfigError(f"data: no row is in the split {part!r}")
        if not len(parts["validation"]) and self.config.train.patience:
            raise ConfigError(
                "train.patience: there are no rows of the split 'validation' to stop early by; set it to 0"
            )
        labels = [gathered.manifest.rows[i].get("label", "") for i in parts["train"]]
        task: dict[str, Any] = {}
        if self.config.task.kind == "classification":
            # A drawn split may lack a rare class in training, so all labels count. In a manifest's split, a label that
            # training lacks is a mistake.
            every = gathered.manifest.column("label")
            task["classes"] = sorted(set(labels if self.config.data.split == "manifest" else every))
            _check_classes(gathered.manifest, task["classes"])
            if len(task["classes"]) < 2:
                raise ConfigError(f"task: classification needs two classes or more, got {task['classes']}")
        elif self.config.task.kind == "regression":
            values = np.array(labels, dtype=np.float64)
            task |= {"mean": float(values.mean()), "scale": float(values.std()) or 1.0}
        fitted = {
            name: fit(name, modality, gathered.items[name].of(parts["train"]))
            for name, modality in self.modalities.items()
        }
        split = {name: [ids[i] for i in part] for name, part in parts.items()}
        state = {"split": split, "task": task, "fitted": fitted}
        return state, {name: torch.from_numpy(part) for name, part in parts.items()}

    def model(self, name: str, state: Mapping[str, Any]) -> Any:
        """Make a model, with the weights of `state` if there are any."""
        kind = self.config.task.kind
        dims = {"classification": len(state["task"].get("classes", ())), "regression": 1}
        dim = dims.get(kind, self.config.task.dim)
        model = build(self.config, name, self.modalities, state["fitted"], dim)
        if "model" in state:
            loaded(model, state["model"])
        return model

    # Step 5 ----------------------------------------------------------------------------------------------------------

    def evaluate(self, manifest: str | Path | None = None, progress: bool = True) -> Evaluation:
        """Measure every model, with all modalities and with each withheld.

        Parameters
        ----------
        manifest : str or pathlib.Path, optional
            Other rows, all of them for evaluation; without it, the test splits of the training's manifest.
        progress : bool, optional
            Whether to show bars.

        Returns
        -------
        Evaluation
            Its ``results`` are ``[split][model][condition][metric]``: one value per seed. ``report.write_report`` writes
            it to a folder.

        Raises
        ------
        ManifestError, ConfigError
            For bad rows; for a configuration without test splits.
        """
        self._must_be_fitted()
        config, split = self.config, GIVEN
        classes = tuple(self.states[FUSED, config.train.seeds[0]]["task"].get("classes", ()))
        if manifest is None:
            if not config.data.test:
                raise ConfigError("data.test: expected the name of a split or more to evaluate, got []")
            gathered = self._own_rows(progress)
            tests, split = config.data.test, config.data.split
            ids = gathered.manifest.column("id")
            parts = [numbered(ids, self.states[FUSED, seed]["split"]) for seed in config.train.seeds]
        else:
            gathered = gather_rows(config, Path(manifest), progress=progress)
            if classes:
                _check_classes(gathered.manifest, classes)
            tests = (GIVEN,)
            parts = [{GIVEN: np.arange(len(gathered.manifest))}] * len(config.train.seeds)
        measured: dict[str, list[Measured]] = {test: [] for test in tests}
        with contained(config.train.threads):
            for seed, of_split in zip(config.train.seeds, parts, strict=True):
                state = self.states[FUSED, seed]
                rows, scale = self.rows(gathered, state), state["task"].get("scale", 1.0)
                models = {name: self.model(name, self.states[name, seed]) for name in self.models}
                for test in tests:
                    chosen = torch.from_numpy(of_split[test])
                    measured[test].append(
                        measure(config, models, rows, chosen, scale, explained=seed == config.train.seeds[0])
                    )
        return Evaluation(
            config=config,
            measured=measured,
            split=split,
            manifest=gathered.manifest,
            messages=gathered.messages,
            parameters={name: parameter_count(model) for name, model in models.items()},
            histories=dict(self.histories),
            classes=classes,
            coverage={name: coverage(items.index, parts[0], tests) for name, items in gathered.items.items()},
        )

    def _own_rows(self, progress: bool) -> Gathered:
        """Return the rows of the training; raise ManifestError if their manifest is gone or has changed since."""
        if self.gathered is None:
            path = Path(self.config.data.manifest)
            if not path.is_file():
                raise ManifestError(
                    [f"{path}: the manifest of the training is not there; give other rows (--manifest)"]
                )
            if self.identity is not None and hashlib.sha256(path.read_bytes()).hexdigest() != self.identity["manifest"]:
                raise ManifestError(
                    [
                        f"{path}: has changed since the training, whose splits and labels are the old one's: restore it, "
                        f"or evaluate all of its rows (--manifest {path.name})"
                    ]
                )
            self.gathered = gather_rows(self.config, path, progress=progress)
        return self.gathered

    @torch.no_grad()
    def predict(
        self, manifest: str | Path, out: str | Path | None = None, progress: bool = True
    ) -> list[dict[str, Any]]:
        """Predict with the fused model of the first seed.

        Parameters
        ----------
        manifest : str or pathlib.Path
            Rows with an id and modalities; they need no label and no split. Retrieval finds among their targets.
        out : str or pathlib.Path, optional
            A CSV file to write.
        progress : bool, optional
            Whether to show bars.

        Returns
        -------
        list of dict
            For each row its ``id`` and: ``predicted`` and a probability per class, ``predicted``, or the ids and scores of
            the best targets.
        """
        self._must_be_fitted()
        state = self.states[FUSED, self.config.train.seeds[0]]
        gathered = gather_rows(self.config, Path(manifest), labelled=False, progress=progress)
        rows = self.rows(gathered, state, labelled=False)
        everything = torch.arange(len(gathered.manifest))
        ids = gathered.manifest.column("id")
        gallery = None
        if self.config.task.kind == "retrieval":
            numbers, first = np.unique(rows.labels.numpy(), return_index=True)
            gallery = rows, torch.from_numpy(first[numbers >= 0])
        with contained(self.config.train.threads):
            output = outputs(self.model(FUSED, state), rows, everything, gallery)[Condition()]
        predictions: list[dict[str, Any]] = [{"id": name} for name in ids]
        if self.config.task.kind == "classification":
            classes = state["task"]["classes"]
            for row, probabilities in zip(predictions, softmax(output.values, axis=1), strict=True):
                row["predicted"] = classes[probabilities.argmax()]
                row |= {f"p({label})": round(float(p), 6) for label, p in zip(classes, probabilities, strict=True)}
        elif self.config.task.kind == "regression":
            for row, value in zip(predictions, output.values[:, 0].tolist(), strict=True):
                row["predicted"] = value * state["task"]["scale"] + state["task"]["mean"]
        elif gallery is not None and len(gallery[1]):
            scores, found = search(output, FOUND)
            for row, of_row in zip(predictions, listed([ids[i] for i in gallery[1]], scores, found), strict=True):
                row |= of_row
        if out is not None:
            write_csv(Path(out), predictions)
        return predictions

    @torch.no_grad()
    def retrieve(self, queries: str | Path, gallery: str | Path, k: int = FOUND, progress: bool = True) -> Retrieved:
        """Find a gallery's best targets for queries, by the fused model of the first seed.

        Parameters
        ----------
        queries, gallery : str or pathlib.Path
            Manifests: of rows with an id and the modalities to ask with, and of rows with an id and those to find. One may
            serve as both.
        k : int, optional
            How many to find: fewer if the gallery has fewer distinct targets.
        progress : bool, optional
            Whether to show bars.

        Returns
        -------
        Retrieved

        Raises
        ------
        ManifestError, ConfigError
            For bad rows; for a run whose task is not retrieval.
        """
        self._must_be_fitted()
        if self.config.task.kind != "retrieval":
            raise ConfigError(f"task.kind: expected 'retrieval', got {self.config.task.kind!r}")
        state, target = self.states[FUSED, self.config.train.seeds[0]], self.config.task.target
        asked, given = (
            gather_rows(self.config, Path(path), labelled=False, progress=progress, only=only)
            for path, only in ((queries, input_modalities(self.config)), (gallery, target))
        )
        _, first, number = np.unique(given.target_numbers(target), return_index=True, return_inverse=True)
        with contained(self.config.train.threads):
            output = outputs(
                self.model(FUSED, state),
                self.rows(asked, state, labelled=False),
                torch.arange(len(asked.manifest)),
                (self.rows(given, state, labelled=False), torch.from_numpy(first)),
            )[Condition()]
            scores, found = search(output, k)
        own = dict(zip(given.manifest.column("id"), number.tolist(), strict=True))
        return Retrieved(
            config=self.config,
            queries=asked.manifest,
            gallery=given.manifest.take(first),
            rows=len(given.manifest),
            scores=scores,
            found=found,
            own=np.array([own.get(name, -1) for name in asked.manifest.column("id")]),
        )

    # The folder ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the configuration and every model to a folder that `load` reads, as `fit` does with `out`.

        Raises
        ------
        CheckpointError
            If the folder is a run already, unless it may be overwritten.
        """
        self._must_be_fitted()
        run = Run(folder)
        with run.claimed():
            run.must_be_new(overwrite)
            run.clear()
            run.write_config(self.config)
            epochs = self.config.train.epochs
            for (name, seed), state in self.states.items():
                history = self.histories[name, seed]
                done = Checkpoint(self.identity, state["model"], history, epochs, True, len(history) < epochs)
                write_checkpoint(run.checkpoint(name, seed), done)
                run.write_seed(seed, {key: value for key, value in state.items() if key != "model"})
            run.write_log(self.histories)

    @classmethod
    def load(cls, folder: str | Path, trust_encoder: bool = False) -> MultimodalPredictor:
        """Read a run's folder.

        Parameters
        ----------
        folder : str or pathlib.Path
        trust_encoder : bool, optional
            Whether to import the modules that the run's configuration names, ``encoder: package.module:Class``, which
            executes them.

        Raises
        ------
        ConfigError, CheckpointError
            If the folder is not a run, its training is not done, or it names a module that is not trusted.
        """
        run = Run(folder)
        config = run.config()
        for name, modality in config.modalities.items():
            if ":" in modality.encoder and not trust_encoder:
                raise ConfigError(
                    f"modalities.{name}.encoder: {folder} asks to import {modality.encoder!r}, which executes it: say so "
                    f"if you trust it (--trust-encoder, trust_encoder=True)"
                )
        predictor = cls(config)
        for seed in config.train.seeds:
            shared, checkpoints = run.read(predictor.models, seed)
            for name, checkpoint in checkpoints.items():
                predictor.states[name, seed] = shared | {"model": checkpoint.model}
                predictor.histories[name, seed] = checkpoint.history
                predictor.identity = checkpoint.identity
        return predictor

    def _must_be_fitted(self) -> None:
        if not self.states:
            raise RuntimeError("the predictor is not trained: call fit or load first")


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


def _check_classes(manifest: Manifest, classes: Sequence[str]) -> None:
    labels = enumerate(manifest.column("label"))
    problems = [f"{manifest.where(i, 'label')}: no training row is {x!r}" for i, x in labels if x not in classes]
    if problems:
        raise ManifestError(problems)


@contextlib.contextmanager
def contained(threads: int) -> Iterator[None]:
    """Let torch use so many threads; restore its generator and its number of threads afterwards.

    On small batches a second thread saves nothing, and costs tenfold where another process wants its core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def _query_encoders(model: nn.Module) -> set[str]:
    """Return the modalities that a model encodes, of two towers only the query's."""
    return set(getattr(model, "query", model).encoders)
