"""The five steps in a row, as an object: `MultimodalPredictor`, which the command line's verbs call too.

What lives here: which models, seeds and splits a run has, and its folder. What lives elsewhere: each step; the report
of what `evaluate` found (``report.py``).

A run's folder: ``config.yaml`` (resolved), ``checkpoints/MODEL-SEED.pt`` and ``.csv`` (its log), ``tensorboard/`` where it
is installed, ``log.csv`` (all of them), ``metrics.json``, ``plots/``, ``report.html``, ``predictions.csv``.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.metrics import confusion_matrix
from torch import nn
from tqdm import tqdm

from . import evaluate as step5
from . import train as step4
from .config import Config, ConfigError, from_mapping, load, to_mapping, to_yaml
from .evaluate import Condition, Results
from .features import encoder_class
from .fuse import ALONE, FUSED, build, combined_models, input_modalities, layer, parameter_count, trained_models
from .manifest import Manifest, ManifestError, check, read, splits
from .preprocess import Cache, Items, Modality, Problem, Vector, column, fit, gather, without
from .pretrained import EXTRACTORS, extractor
from .report import write_report

# What may change between the start of a run and its resumption.
CIRCUMSTANCES = {"data": ("manifest", "workers", "cache"), "train": ("seeds", "threads")}
FOUND = 10  # targets that a prediction of retrieval lists


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Step 1's result: the rows that are left, their items by modality, and a line for each row left out."""

    manifest: Manifest
    items: dict[str, Items]
    messages: list[str]


class MultimodalPredictor:
    r"""Train, evaluate and use a multimodal model that a configuration describes.

    Parameters
    ----------
    config : Config, mapping, str or pathlib.Path
        A configuration, a mapping like a YAML file's, or the path of one.

    Raises
    ------
    ConfigError
        If a key, choice, encoder, layer or option is unknown or wrong; it suggests the nearest name.

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
    >>> predictor.evaluate()["test"]["fused"]["all"]["accuracy"]
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
                with torch.device("meta"):  # draws no random numbers
                    layer(config.fusion.layer, [2] * len(inputs), 2, config.fusion.options)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        self.models = trained_models(config)
        self.states: dict[tuple[str, int], dict[str, Any]] = {}
        self.histories: dict[tuple[str, int], list[dict[str, float]]] = {}
        self.gathered: Gathered | None = None
        self.details: dict[str, Any] = {}

    # Step 1 ----------------------------------------------------------------------------------------------------------

    def gather(self, path: Path, labelled: bool = True, progress: bool = True) -> Gathered:
        """Read and check a manifest and decode what it names.

        Raises
        ------
        ManifestError
            If a row is bad and ``data.on_error`` is ``raise``, with a line for each.
        """
        config = self.config
        manifest = read(path)
        check(manifest, config, labelled)
        items: dict[str, Items] = {}
        problems: list[Problem] = []
        for name, modality in config.modalities.items():
            chosen = None
            if modality.encoder in EXTRACTORS[modality.kind]:
                chosen = extractor(modality.kind, modality.encoder)
            store = Cache(Path(config.data.cache))
            items[name], bad = gather(manifest, name, modality, store, config.data.workers, chosen, progress)
            problems += bad
        manifest, kept, messages = without(manifest, problems, config.data.on_error)
        for message in messages:
            print(f"skipped: {message}")
        return Gathered(manifest, {name: Items(i.distinct, i.index[kept]) for name, i in items.items()}, messages)

    def _labels(self, gathered: Gathered, task: Mapping[str, Any], labelled: bool) -> torch.Tensor:
        """Return the labels as the task's numbers; of rows to predict, retrieval's targets only."""
        if self.config.task.kind == "retrieval":
            return torch.from_numpy(self.target_numbers(gathered))
        if not labelled:
            return torch.zeros(len(gathered.manifest))
        cells = gathered.manifest.column("label")
        if self.config.task.kind == "classification":
            number = {label: k for k, label in enumerate(task["classes"])}
            return torch.tensor([number[cell] for cell in cells])
        values = np.array(cells, dtype=np.float64)
        return torch.from_numpy((values - task["mean"]) / task["scale"]).float()

    def target_numbers(self, gathered: Gathered) -> np.ndarray:
        """Return each row's number of its target, the same for the same content, or -1 where it is missing."""
        indices = np.stack([gathered.items[name].index for name in self.config.task.target], axis=1)
        _, numbers = np.unique(indices, axis=0, return_inverse=True)
        return np.where((indices < 0).all(axis=1), -1, numbers.reshape(-1))

    def rows(self, gathered: Gathered, state: Mapping[str, Any], labelled: bool = True) -> step4.Rows:
        """Make the tensors of gathered rows, as what training learned of its own items has it."""
        columns = {
            name: column(modality, gathered.items[name], state["fitted"][name])
            for name, modality in self.modalities.items()
        }
        return step4.Rows(columns, self._labels(gathered, state["task"], labelled))

    # Steps 2 to 4 ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        manifest: str | Path | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> MultimodalPredictor:
        """Train every model with every seed.

        Parameters
        ----------
        manifest : str or pathlib.Path, optional
            Instead of the configuration's ``data.manifest``.
        out : str or pathlib.Path, optional
            The run's folder. Without one nothing is written, and an interrupted run is lost.
        resume : bool, optional
            Whether `out` may be a run already, which is then continued: with the same final weights, to the bit.
        progress : bool, optional
            Whether to show bars.

        Returns
        -------
        MultimodalPredictor
            Itself.

        Raises
        ------
        ManifestError, ConfigError, CheckpointError
            For bad input, before training starts; for a folder that is another run's.
        """
        folder = None if out is None else Path(out)
        path = Path(manifest or self.config.data.manifest).resolve()
        data = dataclasses.replace(
            self.config.data, manifest=str(path), cache=str(Path(self.config.data.cache).resolve())
        )
        self.config = dataclasses.replace(self.config, data=data)
        if folder is not None and (folder / "config.yaml").exists() and not resume:
            raise step4.CheckpointError(f"{folder} is a run already: continue it (--resume), or choose another folder")
        gathered = self.gather(path, progress=progress)
        plans = [self._plan(gathered, seed) for seed in range(self.config.train.seeds)]
        identity = self._identity(path)
        if folder is not None:
            for earlier in sorted((folder / "checkpoints").glob("*.pt"))[:1]:
                step4.read_checkpoint(earlier, identity)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        epochs = self.config.train.epochs
        settings = self.config.train
        steps = sum(epochs * -(-len(chosen["train"]) // settings.batch_size) for _, chosen in plans)
        with (
            contained(settings.threads),
            tqdm(total=len(self.models) * steps, unit="step", disable=not progress) as bar,
        ):
            for seed, (state, chosen) in enumerate(plans):
                rows = self.rows(gathered, state)
                for name in self.models:
                    bar.set_description(f"seed {seed}, {name}")
                    torch.manual_seed(seed)
                    model = self.model(name, state)
                    place = None if folder is None else _checkpoint(folder, name, seed)
                    query = [m for m in input_modalities(self.config) if m in _towers(model)]
                    self.histories[name, seed] = step4.train(
                        model, self.config.task.kind, rows, chosen, settings, identity, query, place, bar
                    )
                    self.states[name, seed] = state | {"model": model.state_dict()}
                if folder is not None:
                    step4.write(folder / "checkpoints" / f"{seed}.fitted", state)
        self.gathered = gathered
        if folder is not None:
            self._write_log(folder)
        return self

    def _identity(self, path: Path) -> dict[str, Any]:
        """Return all that the weights depend on."""
        identity = to_mapping(self.config)
        for section, keys in CIRCUMSTANCES.items():
            identity[section] = {k: v for k, v in identity[section].items() if k not in keys}
        del identity["title"], identity["baselines"]
        return identity | {"manifest": hashlib.sha256(path.read_bytes()).hexdigest()}

    def _plan(self, gathered: Gathered, seed: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Split the rows for a seed, and learn from its training rows what step 1 needs to know."""
        parts = splits(gathered.manifest, self.config, seed)
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
            # A split drawn at random may leave a rare class out of training; a manifest's split that does is a mistake.
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
        return {"task": task, "fitted": fitted}, {name: torch.from_numpy(part) for name, part in parts.items()}

    def model(self, name: str, state: Mapping[str, Any]) -> Any:
        """Make a model, with the weights of `state` if it has any."""
        kind = self.config.task.kind
        outputs = {"classification": len(state["task"].get("classes", ())), "regression": 1}
        dim = outputs.get(kind, self.config.task.dim)
        model = build(self.config, name, self.modalities, state["fitted"], dim)
        if "model" in state:
            model.load_state_dict(state["model"])
        return model

    def _write_log(self, folder: Path) -> None:
        entries = [{"model": m, "seed": s} | entry for (m, s), log in self.histories.items() for entry in log]
        with (folder / "log.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)

    # Step 5 ----------------------------------------------------------------------------------------------------------

    def evaluate(
        self, manifest: str | Path | None = None, out: str | Path | None = None, progress: bool = True
    ) -> Results:
        """Measure every model, with all modalities and with each withheld.

        Parameters
        ----------
        manifest : str or pathlib.Path, optional
            Other rows, all of them for evaluation; without it, the test splits of the run's own.
        out : str or pathlib.Path, optional
            A folder to write ``metrics.json``, ``plots/`` and ``report.html`` to.
        progress : bool, optional
            Whether to show bars.

        Returns
        -------
        dict
            ``[split][model][condition][metric]``: one value per seed.
        """
        self._must_be_fitted()
        if manifest is None and self.gathered is None:
            self.gathered = self.gather(Path(self.config.data.manifest), progress=progress)
        gathered = self.gathered if manifest is None else self.gather(Path(manifest), progress=progress)
        assert gathered is not None
        if manifest is not None and self.config.task.kind == "classification":
            _check_classes(gathered.manifest, self.states[FUSED, 0]["task"]["classes"])
        results: Results = {}
        self.details = {"confusion": {}, "calibration": {}, "chance": {}, "rows": {}}
        with contained(self.config.train.threads):
            for seed in range(self.config.train.seeds):
                parts = {"given": np.arange(len(gathered.manifest))}
                if manifest is None:
                    every = splits(gathered.manifest, self.config, seed)
                    parts = {split: every[split] for split in self.config.data.test}
                rows = self.rows(gathered, self.states[FUSED, seed])
                models = {name: self.model(name, self.states[name, seed]) for name in self.models}
                for split, part in parts.items():
                    self._measure(split, torch.from_numpy(part), rows, models, results)
        self.details["parameters"] = {name: parameter_count(model) for name, model in models.items()}
        if out is not None:
            write_report(Path(out), self, gathered, results)
        return results

    def _measure(
        self,
        split: str,
        chosen: torch.Tensor,
        rows: step4.Rows,
        models: Mapping[str, nn.Module],
        results: Results,
    ) -> None:
        """Measure all models of a seed on a split."""
        kind = self.config.task.kind
        labels = rows.labels[chosen].numpy()
        gallery = None
        if kind == "retrieval":
            _, first = np.unique(labels, return_index=True)
            gallery = chosen[torch.from_numpy(first)]
        inputs = input_modalities(self.config)
        withheld = inputs if len(inputs) > 1 else []
        conditions = [Condition(), *(Condition(name, zero_fill) for name in withheld for zero_fill in (False, True))]
        every = {name: step5.outputs(model, rows, chosen, gallery, conditions) for name, model in models.items()}
        for condition in conditions:
            said = {name: found[condition] for name, found in every.items()}
            # Of unimodal models only what they say of all is of interest; their combinations leave one out, not zero.
            alone = [said[name] for name in said if name.endswith(ALONE) and name != f"{condition.withheld}{ALONE}"]
            if alone and not condition.zero_fill:
                said |= {name: step5.combine(name, kind, alone) for name in combined_models(self.config)}
            for name, output in said.items():
                if condition.withheld and name.endswith(ALONE):
                    continue
                metrics = self._metrics(output, labels, rows.labels[gallery].numpy() if gallery is not None else None)
                place = results.setdefault(split, {}).setdefault(name, {}).setdefault(str(condition), {})
                for metric, value in metrics.items():
                    place.setdefault(metric, []).append(value)
            if condition == Condition():
                self._detail(split, said[FUSED], labels)

    def _metrics(self, output: step5.Outputs, labels: np.ndarray, gallery: np.ndarray | None) -> dict[str, float]:
        kind = self.config.task.kind
        if kind == "classification":
            return step5.classification_metrics(output.values, labels)
        if kind == "regression":
            task = self.states[FUSED, 0]["task"]
            found = step5.regression_metrics(output.values[:, 0].astype(np.float64), labels.astype(np.float64))
            return found | {"mae": found["mae"] * task["scale"]}
        assert gallery is not None
        query, target = self.sides()
        return step5.retrieval_metrics(output.values, labels[:, None] == gallery, query, target)

    def sides(self) -> tuple[str, str]:
        """Return what retrieval's query and target are called."""
        return "+".join(input_modalities(self.config)), "+".join(self.config.task.target)

    def _detail(self, split: str, fused: step5.Outputs, labels: np.ndarray) -> None:
        """Keep what the plots need of the fused model, summed over seeds."""
        self.details["rows"].setdefault(split, []).append(len(labels))
        if self.config.task.kind != "regression":
            self.details["chance"].setdefault(split, []).append(labels)
        if self.config.task.kind == "classification":
            probabilities = softmax(fused.values, axis=1)
            classes = range(probabilities.shape[1])
            matrix = confusion_matrix(labels, probabilities.argmax(axis=1), labels=classes)
            self.details["confusion"][split] = self.details["confusion"].get(split, 0) + matrix
            self.details["calibration"].setdefault(split, []).append((probabilities, labels))

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
        state = self.states[FUSED, 0]
        gathered = self.gather(Path(manifest), labelled=False, progress=progress)
        rows = self.rows(gathered, state, labelled=False)
        everything = torch.arange(len(gathered.manifest))
        ids = gathered.manifest.column("id")
        gallery = None
        if self.config.task.kind == "retrieval":
            numbers, first = np.unique(rows.labels.numpy(), return_index=True)
            gallery = torch.from_numpy(first[numbers >= 0])
        with contained(self.config.train.threads):
            output = step5.outputs(self.model(FUSED, state), rows, everything, gallery)[Condition()]
        predictions: list[dict[str, Any]] = [{"id": name} for name in ids]
        if self.config.task.kind == "classification":
            classes = state["task"]["classes"]
            for row, probabilities in zip(predictions, softmax(output.values, axis=1), strict=True):
                row["predicted"] = classes[probabilities.argmax()]
                row |= {f"p({label})": round(float(p), 6) for label, p in zip(classes, probabilities, strict=True)}
        elif self.config.task.kind == "regression":
            for row, value in zip(predictions, output.values[:, 0].tolist(), strict=True):
                row["predicted"] = value * state["task"]["scale"] + state["task"]["mean"]
        elif gallery is not None:
            for row, scores in zip(predictions, output.values, strict=True):
                for k, j in enumerate(np.argsort(-scores, kind="stable")[:FOUND], 1):
                    row |= {f"found_{k}": ids[gallery[j]], f"score_{k}": round(float(scores[j]), 6)}
        if out is not None:
            with Path(out).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(predictions[0]))
                writer.writeheader()
                writer.writerows(predictions)
        return predictions

    # The folder ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the configuration and every model to a folder that `load` reads, as `fit` does with `out`."""
        self._must_be_fitted()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        for (name, seed), state in self.states.items():
            done = {"model": state["model"], "history": self.histories[name, seed], "done": True}
            step4.write(_checkpoint(folder, name, seed), done)
            fitted = {key: state[key] for key in ("task", "fitted")}
            step4.write(folder / "checkpoints" / f"{seed}.fitted", fitted)

    @classmethod
    def load(cls, folder: str | Path) -> MultimodalPredictor:
        """Read a run's folder.

        Raises
        ------
        ConfigError, CheckpointError
            If it is not one, or its training is not done.
        """
        folder = Path(folder)
        predictor = cls(load(folder / "config.yaml"))
        for seed in range(predictor.config.train.seeds):
            for name in predictor.models:
                state = step4.read_checkpoint(_checkpoint(folder, name, seed))
                if not state["done"]:
                    raise step4.CheckpointError(
                        f"{folder}: the training of {name!r}, seed {seed}, is not done: --resume"
                    )
                fitted = step4.read_checkpoint(folder / "checkpoints" / f"{seed}.fitted")
                predictor.states[name, seed] = fitted | {"model": state["model"]}
                predictor.histories[name, seed] = state["history"]
        return predictor

    def _must_be_fitted(self) -> None:
        if not self.states:
            raise RuntimeError("the predictor is not trained: call fit or load first")


def _check_classes(manifest: Manifest, classes: Sequence[str]) -> None:
    labels = enumerate(manifest.column("label"))
    problems = [f"{manifest.where(i, 'label')}: no training row is {x!r}" for i, x in labels if x not in classes]
    if problems:
        raise ManifestError(problems)


@contextmanager
def contained(threads: int) -> Iterator[None]:
    """Leave torch's generator and its threads as they were, and let it use so many in between.

    On small batches a second thread saves nothing, and costs tenfold where another process wants its core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def _checkpoint(folder: Path, name: str, seed: int) -> Path:
    return folder / "checkpoints" / f"{name.replace(' ', '-')}-{seed}.pt"


def _towers(model: nn.Module) -> set[str]:
    """Return the modalities that a model asks with."""
    return set(getattr(model, "query", model).encoders)
