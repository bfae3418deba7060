"""The five steps in a row, as an object: `MultimodalPredictor`, which the command line's verbs call too.

What lives here: which models, seeds and splits are trained and evaluated. What lives elsewhere: each step; the files of
a run (``run.py``); the report of an `Evaluation` (``report.py``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .checkpoint import Checkpoint, History
from .compare import clearly_less
from .config import Config, from_mapping, load
from .errors import ConfigError, unknown
from .evaluate import GIVEN, Evaluation, Measured, coverage, measure, tuned
from .export import export
from .fuse import (
    FUSED,
    SUM,
    build,
    checked,
    input_modalities,
    may_be_sum,
    parameter_count,
    trained_models,
    without_products,
)
from .labels import check_classes, encode, predicted, probabilities
from .plan import choose, numbered, own_rows, plan, resolved, trained_on
from .plan import identity as identity_of
from .prediction import embeddings, streamed, table, values, write_table
from .preprocess import Gathered, column, gather_rows
from .processes import here
from .retrieve import FOUND, Retrieved, among, retrieve
from .run import Run, begun, write_checkpoint
from .train import Rows, contained, loaded, loss_of, losses, row_losses, train

LOG = logging.getLogger("fusionsum")


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
    >>> from fusionsum.pipeline import write_report
    >>> folder = Path(tempfile.mkdtemp())
    >>> rows = [f"r{i},{'train' if i < 40 else 'test'},{'odd' if i % 2 else 'even'},n{i % 2},{i}" for i in range(60)]
    >>> _ = (folder / "m.csv").write_text("\n".join(["id,split,label,word,number", *rows]))
    >>> config = {
    ...     "modalities": {"word": {"kind": "text", "encoder": "cnn"}, "number": {"kind": "table"}},
    ...     "data": {"cache": str(folder / "cache")},
    ...     "train": {"seeds": 1, "epochs": 20, "learning_rate": 0.01, "patience": 0},
    ... }
    >>> predictor = MultimodalPredictor(config).fit(folder / "m.csv", out=folder / "run", progress=False)
    >>> evaluation = predictor.evaluate(progress=False)
    >>> evaluation.results["test"]["fused"]["all"]["accuracy"]
    [1.0]
    >>> write_report(folder / "run", evaluation)

    On other rows, later:

    >>> predictor = MultimodalPredictor.load(folder / "run")
    >>> new = [{"word": "n1", "number": 7}]
    >>> predictor.predict(new)[0]["predicted"]
    'odd'
    >>> predictor.predict_proba(new).shape, predictor.classes
    ((1, 2), ('even', 'odd'))
    >>> predictor.embed(new).shape
    (1, 128)
    >>> predictor.write_predictions(new, folder / "predictions.csv", model="best")
    1
    >>> [path.name for path in predictor.export(folder, form="torch")]
    ['model.pt2', 'preprocessing.json']
    >>> predictor.save(folder / "copy")

    Retrieval:

    >>> find = config | {"task": {"kind": "retrieval", "target": ["word"]}}
    >>> predictor = MultimodalPredictor(find).fit(folder / "m.csv", progress=False)
    >>> predictor.retrieve(new, [{"word": "n0"}, {"word": "n1"}], k=1).found.shape
    (1, 1)
    """

    def __init__(self, config: Config | Mapping[str, Any] | str | Path) -> None:
        if isinstance(config, str | Path):
            config = load(Path(config))
        elif not isinstance(config, Config):
            config = from_mapping(config)
        self.states: dict[tuple[str, int], dict[str, Any]] = {}
        self.histories: dict[tuple[str, int], History] = {}
        self.identity: dict[str, Any] | None = None
        self.gathered: Gathered | None = None
        self._configure(config)

    def _configure(self, config: Config) -> None:
        """Take a configuration and check what it names; one without modalities is completed by the rows of `fit`."""
        self.config = config
        self.modalities = checked(config)
        self.models = trained_models(config)

    # Step 1 ----------------------------------------------------------------------------------------------------------

    def _labels(self, gathered: Gathered, learnt: dict[str, Any], labelled: bool) -> torch.Tensor:
        """Return the labels as the task's numbers; of rows to predict, retrieval's targets only."""
        if labelled and self.config.task.positives == "label":
            return torch.from_numpy(np.unique(gathered.manifest.column("label"), return_inverse=True)[1])
        if self.config.task.kind == "retrieval" and gathered.items.keys() >= set(self.config.task.target):
            return torch.from_numpy(gathered.target_numbers(self.config.task.target))
        if not labelled:
            return torch.zeros(len(gathered.manifest))
        return encode(self.config.task, learnt, gathered.manifest.column("label"))

    def rows(self, gathered: Gathered, state: Mapping[str, Any], labelled: bool = True) -> Rows:
        """Return the tensors of gathered rows, scaled and coded by the statistics of the training rows in `state`."""
        columns = {
            name: column(name, self.modalities[name], items, state["fitted"][name])
            for name, items in gathered.items.items()
        }
        return Rows(columns, self._labels(gathered, state["task"], labelled))

    # Steps 2 to 4 ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        manifest: Any = None,
        out: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
    ) -> MultimodalPredictor:
        """Train every model with every seed.

        Parameters
        ----------
        manifest : optional
            Rows of any kind that `sources.read` takes, a file, a DataFrame, a data set, dicts, instead of the
            configuration's ``data.manifest``.
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
        with begun(out, resume, overwrite) as run:
            config, rows, notes = resolved(self.config, manifest)
            for note in notes:
                LOG.info("inferred: %s", note)
            self._configure(config)
            gathered = gather_rows(self.config, rows, progress=progress)
            identity = identity_of(self.config, rows)
            plans = here().first(lambda: self._planned(gathered, identity, run, resume))
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

    def _planned(
        self, gathered: Gathered, identity: dict[str, Any], run: Run | None, resume: bool
    ) -> dict[int, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """Plan the training of each seed; make the run's folder ready."""
        seeds = self.config.train.seeds
        drawn = {} if run is None or not resume else run.drawn(seeds)
        plans = {seed: plan(self.config, self.modalities, gathered, seed, drawn.get(seed)) for seed in seeds}
        if run is not None:
            if resume:
                run.must_be_of(identity, self.config.train)
            else:
                run.clear()
            run.write_config(self.config)
        return plans

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
                loss = loss_of(self.config.task.kind, state["task"].get("weights"))
                if run is not None:
                    run.write_seed(seed, state)
                models = {}
                for name in self.models:
                    bar.set_description(f"seed {seed}, {name}")
                    torch.manual_seed(seed)
                    models[name] = model = self.model(name, state)
                    place = None if run is None else run.checkpoint(name, seed)
                    query = list(getattr(model, "query", model).encoders)
                    try:
                        history = train(model, loss, rows, chosen, settings, identity, query, place, bar)
                    except ArithmeticError as error:
                        raise ArithmeticError(f"seed {seed}, {name}: {error}") from None
                    self.histories[name, seed] = history
                    self.states[name, seed] = state | {"model": model.state_dict()}
                    LOG.info("seed %s, %s: %s epochs, %s", seed, name, len(history), losses(history[-1]))
                helped = self._helped(models, rows, chosen["validation"], gathered.manifest.groups(), seed)
                self._settle(seed, helped)
                loaded(models[FUSED], self.states[FUSED, seed]["model"])
                offsets = tuned(self.config, models, rows, chosen["validation"])
                shared = state | {"products": helped, "offsets": offsets}
                for name in self.models:
                    self.states[name, seed] |= shared
                if run is not None:
                    run.write_seed(seed, shared)

    def _helped(
        self, models: Mapping[str, Any], rows: Rows, chosen: torch.Tensor, groups: np.ndarray, seed: int
    ) -> bool:
        """Tell whether the fused model's products make validation rows likelier than the sum of linear maps alone."""
        if not may_be_sum(self.config):
            return True
        weights = self.states[FUSED, seed]["task"].get("weights")
        loss, size = loss_of(self.config.task.kind, weights, reduction="none"), self.config.train.batch_size
        fused, summed = (row_losses(models[name], loss, rows, chosen, size).numpy() for name in (FUSED, SUM))
        helped = clearly_less(fused, summed, groups[chosen.numpy()])
        LOG.info("seed %s: the fused model %s", seed, "keeps its products" if helped else "is the sum alone")
        return helped

    def _settle(self, seed: int, helped: bool) -> None:
        """Make the fused model of a seed the sum of linear maps if its products have not `helped`."""
        if not helped:
            fused, summed = (self.states[name, seed]["model"] for name in (FUSED, SUM))
            self.states[FUSED, seed] |= {"model": without_products(fused, summed)}
            self.histories[FUSED, seed] = self.histories[SUM, seed]

    def model(self, name: str, state: Mapping[str, Any]) -> Any:
        """Make a model, with the weights of `state` if there are any."""
        kind = self.config.task.kind
        learnt = state["task"]
        dim = len(learnt["classes"]) if "classes" in learnt else 1 if kind == "regression" else self.config.task.dim
        try:
            model = build(self.config, name, self.modalities, state["fitted"], dim)
        except ValueError as error:  # an encoder of one's own cannot be made, or does not take the items
            raise ConfigError(str(error)) from None
        if "model" in state:
            loaded(model, state["model"])
        return model

    # Step 5 ----------------------------------------------------------------------------------------------------------

    def evaluate(self, manifest: Any = None, progress: bool = True) -> Evaluation:
        """Measure every model, with all modalities and with each withheld.

        Parameters
        ----------
        manifest : optional
            Other rows, as in `fit`, all of them for evaluation; without it, the test splits of the training's manifest.
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
        config, classes, split, notes = self.config, self.classes, GIVEN, []
        drawn = [self.states[FUSED, seed]["split"] for seed in config.train.seeds]
        if manifest is None:
            if not config.data.test:
                raise ConfigError("data.test: expected the name of a split or more to evaluate, got []")
            if self.gathered is None:
                self.gathered = gather_rows(config, own_rows(config, self.identity), progress=progress)
            gathered, tests, split = self.gathered, config.data.test, config.data.split
            parts = [numbered(gathered.manifest.column("id"), of_seed) for of_seed in drawn]
        else:
            gathered = gather_rows(config, manifest, training=False, progress=progress)
            if classes:
                check_classes(config.task, gathered.manifest, classes)
            notes = trained_on(gathered, drawn, self.identity or {})
            for note in notes:
                LOG.warning(note)
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
                        measure(config, models, rows, chosen, scale, state["offsets"], seed == config.train.seeds[0])
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
            notes=notes,
        )

    def predict(
        self,
        rows: Any,
        model: str = FUSED,
        seed: int | None = None,
        on_error: str = "raise",
        progress: bool = True,
    ) -> list[dict[str, Any]]:
        """Predict with one of the models.

        Parameters
        ----------
        rows
            Rows, as in `fit`, with modalities; they need no label and no split. Retrieval finds among their targets.
        model, seed
            As in `chosen`.
        on_error : str, optional
            ``skip`` for rows without a prediction, and with the reason in ``error``, where an item cannot be read.
        progress : bool, optional
            Whether to show bars, on a terminal.

        Returns
        -------
        list of dict
            For each row its ``id``, ``label`` and ``split`` if it has them, and: ``predicted`` and a probability per class
            or label, ``predicted``, or the ids and scores of the best targets.

        Raises
        ------
        ManifestError, ConfigError
            For bad rows; for an unknown model or seed.
        """
        return list(self._predictions(rows, *self.chosen(model, seed)[:2], on_error, progress))

    def write_predictions(
        self,
        rows: Any,
        out: str | Path,
        model: str = FUSED,
        seed: int | None = None,
        on_error: str = "raise",
        progress: bool = True,
    ) -> int:
        """Write predictions to a CSV file, a part of the rows at a time; return their number.

        Parameters
        ----------
        rows, model, seed, on_error, progress
            As in `predict`.
        out : str or pathlib.Path
            The file. Texts that a spreadsheet would execute begin with a ``'`` there.

        Raises
        ------
        ManifestError, ConfigError
            As `predict` does.
        """
        model, seed, _ = self.chosen(model, seed)
        found = self._predictions(rows, model, seed, on_error, progress)
        if self.config.task.kind == "retrieval":
            every = list(found)
            longest = max(map(list, every), key=len)  # a row with a prediction, which the first may not have
            return write_table(Path(out), every, longest)
        first = next(found)
        columns = ["id", *(name for name in ("label", "split") if name in first), "predicted"]
        columns += [f"p({name})" for name in self.states[model, seed]["task"].get("classes", ())]
        columns += ["error"] * (on_error == "skip")
        return write_table(Path(out), itertools.chain([first], found), columns)

    def _predictions(self, rows: Any, model: str, seed: int, on_error: str, progress: bool) -> Iterator[dict[str, Any]]:
        state, task, network = self.states[model, seed], self.config.task, self._network(model, seed)
        if task.kind == "retrieval":
            tensors = self._tensors(state)
            parts = streamed(
                self.config,
                rows,
                lambda part: among(network, tensors(part), part.manifest.column("id")),
                on_error=on_error,
                progress=progress,
                size=None,  # each row is searched for among all
            )
            return table(parts, list, on_error == "skip")
        offsets = state["offsets"].get(model)
        parts = self._streamed(rows, values(network), state, None, on_error, progress)
        return table(parts, lambda said: predicted(task, state["task"], said, offsets), on_error == "skip")

    def _tensors(self, state: Mapping[str, Any]) -> Callable[[Gathered], Rows]:
        return lambda part: self.rows(part, state, labelled=False)

    def _streamed(
        self,
        rows: Any,
        say: Callable[[Rows], np.ndarray],
        state: Mapping[str, Any],
        only: Sequence[str] | None,
        on_error: str,
        progress: bool,
    ) -> Iterator[tuple[Gathered, np.ndarray]]:
        tensors = self._tensors(state)
        return streamed(self.config, rows, lambda part: say(tensors(part)), only, on_error, progress)

    def predict_proba(
        self, rows: Any, model: str = FUSED, seed: int | None = None, progress: bool = True
    ) -> np.ndarray:
        """Return the probabilities of the `classes`, or of each label by itself: (N, C) float32.

        Parameters are those of `predict`.

        Raises
        ------
        ManifestError, ConfigError
            For bad rows; if the task has no classes.
        """
        model, seed, _ = self.chosen(model, seed)
        if not self.classes:
            raise ConfigError(f"task.kind: {self.config.task.kind} has no classes")
        state = self.states[model, seed]
        parts = self._streamed(rows, values(self._network(model, seed)), state, None, "raise", progress)
        return np.concatenate([probabilities(self.config.task, said) for _, said in parts])

    def embed(
        self,
        rows: Any,
        side: str = "query",
        model: str = FUSED,
        seed: int | None = None,
        progress: bool = True,
    ) -> np.ndarray:
        """Return a vector for each row: (N, features) float32.

        Parameters
        ----------
        rows, model, seed, progress
            As in `predict`.
        side : str, optional
            Retrieval's ``query`` or ``target``, as a vector of unit length. For other tasks the vector joins the features
            of all modalities that the model encodes, 0 for a modality that a row lacks.

        Raises
        ------
        ManifestError, ConfigError
            For bad rows; for an unknown side, model or seed.
        """
        if side not in ("query", "target"):
            raise ConfigError(f"side: {unknown('side', side, ['query', 'target'])}")
        model, seed, _ = self.chosen(model, seed)
        state, task = self.states[model, seed], self.config.task
        only = None
        if task.kind == "retrieval":
            only = list(task.target) if side == "target" else input_modalities(self.config)
        parts = self._streamed(rows, embeddings(self._network(model, seed), side), state, only, "raise", progress)
        return np.concatenate([said for _, said in parts])

    @property
    def classes(self) -> tuple[str, ...]:
        """Classification's classes or labels in the order of the probabilities; empty for other tasks."""
        self._must_be_fitted()
        return tuple(self.states[FUSED, self.config.train.seeds[0]]["task"].get("classes", ()))

    def retrieve(self, queries: Any, gallery: Any, k: int = FOUND, progress: bool = True) -> Retrieved:
        """Find a gallery's best targets for queries, by the fused model of the first seed.

        Parameters
        ----------
        queries, gallery
            Rows, as in `fit`: those with an id and the modalities to ask with, and those with an id and the modalities to
            find. One may serve as both.
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
        seed = self.config.train.seeds[0]
        tensors = self._tensors(self.states[FUSED, seed])
        return retrieve(self.config, self._network(FUSED, seed), tensors, queries, gallery, k, progress)

    def chosen(self, model: str = FUSED, seed: int | None = None) -> tuple[str, int, str]:
        """Choose one of the trained models by the validation loss: its name, its seed, and why.

        Parameters
        ----------
        model : str, optional
            ``fused``, a baseline's name, or ``best`` for that of the least validation loss, the mean over seeds.
        seed : int, optional
            One of its trainings; None for that of the least validation loss, the first without validation rows.

        Raises
        ------
        ConfigError
            For an unknown model or seed.
        """
        self._must_be_fitted()
        return choose(self.config, self.models, self.histories, model, seed)

    def _network(self, name: str, seed: int) -> Any:
        """Make a trained model; its initialisation draws no numbers of the caller's."""
        with contained(self.config.train.threads):
            return self.model(name, self.states[name, seed]).eval()

    def export(self, folder: str | Path, form: str = "onnx", model: str = FUSED, seed: int | None = None) -> list[Path]:
        """Write a model for other programs, and ``preprocessing.json``, which says how items become its inputs.

        Parameters
        ----------
        folder : str or pathlib.Path
            Made if it does not exist.
        form : str, optional
            ``onnx``, or ``torch`` for what `torch.export.load` reads.
        model, seed
            As in `chosen`.

        Returns
        -------
        list of pathlib.Path
            The files: one model, or retrieval's query and target; the description.
        """
        model, seed, _ = self.chosen(model, seed)
        state = self.states[model, seed]
        offsets = state["offsets"].get(model)
        with contained(self.config.train.threads):
            return export(Path(folder), form, self.config, self._network(model, seed), self.modalities, state, offsets)

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
        config = run.config(trust_encoder)
        predictor = cls(config)
        for seed in config.train.seeds:
            shared, checkpoints = run.read(predictor.models, seed)
            for name, checkpoint in checkpoints.items():
                predictor.states[name, seed] = shared | {"model": checkpoint.model}
                predictor.histories[name, seed] = checkpoint.history
                predictor.identity = checkpoint.identity
            predictor._settle(seed, shared.get("products", True))
        return predictor

    def _must_be_fitted(self) -> None:
        if not self.states:
            raise RuntimeError("the predictor is not trained: call fit or load first")
