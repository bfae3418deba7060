"""The configuration of a training: its keys, their defaults, and errors that name the key and suggest the right one.

What lives here: the sections, YAML in and out, ``--set a.b=c``, the template that ``fusionsum init`` writes. What lives
elsewhere: the options of a kind of modality (``kinds.py``), the options of a fusion layer (its constructor, checked in
``fuse.py``), what a manifest tells (``infer.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import ConfigError, unknown
from .features import own
from .kinds import KINDS, Image, Modality, Table

BASELINES = ("alone", "concat-linear", "mlp", "late-product", "score-sum")
DRAWN = ("train", "validation", "test")  # the splits that `data.split: by-seed` draws


@dataclass(frozen=True)
class Data:
    """Where the rows come from and how they are split.

    Attributes
    ----------
    manifest : str
        The CSV or JSONL file of the rows. This path, ``cache`` and ``code`` are relative to the configuration's file.
    split : str
        ``manifest`` takes the manifest's column ``split``; ``by-seed`` draws a split for each seed, by group, so that the
        intervals over seeds include the variation between splits; ``auto`` takes the column if there is one.
    id, label, group : str
        The manifest's name of this column.
    validation_share, test_share : float
        The part of the rows, where splits are drawn.
    test : list of str
        The splits to evaluate, by their names in the manifest's column.
    on_error : str
        At a row whose items cannot be read: ``raise``, or ``skip`` the row, and say so.
    workers : int
        Threads that read and decode items.
    cache : str
        The folder of decoded items and frozen features.
    cache_limit : float
        GB that the cache keeps below; 0: nothing is cached.
    code : str
        The folder of encoders of one's own.
    """

    manifest: str = "manifest.csv"
    split: Literal["auto", "manifest", "by-seed"] = "auto"
    id: str = "id"
    label: str = "label"
    group: str = "group"
    validation_share: float = 0.15
    test_share: float = 0.2
    test: tuple[str, ...] = ("test",)
    on_error: Literal["raise", "skip"] = "raise"
    workers: int = 2
    cache: str = ".fusionsum-cache"
    cache_limit: float = 10.0
    code: str = "."

    @property
    def names(self) -> dict[str, str]:
        """The manifest's names of the columns that every manifest has."""
        return {"id": self.id, "label": self.label, "group": self.group}

    @property
    def splits(self) -> tuple[str, ...] | None:
        """The names that the manifest's column ``split`` may hold; None if the splits are drawn."""
        return None if self.split != "manifest" else tuple(dict.fromkeys(("train", "validation", *self.test)))


# By kind of task, the metrics that models can be compared by; the first is the default. Retrieval is compared by recall.
METRICS = {
    "classification": ("accuracy", "balanced_accuracy", "macro_f1", "average_precision"),
    "multilabel": ("macro_f1", "micro_f1", "average_precision", "subset_accuracy"),
    "regression": ("mae", "pearson"),
    "retrieval": (),
}
TUNED = ("balanced_accuracy", "macro_f1", "micro_f1")  # metrics that a decision threshold is tuned for


@dataclass(frozen=True)
class Task:
    """What is to be told or found.

    Attributes
    ----------
    kind : str
        ``classification``, ``multilabel``, ``regression`` or ``retrieval``.
    target : list of str
        Retrieval's: the modalities to find, by all others.
    dim : int
        Retrieval's: the dimensions of the space of both sides.
    positives : str
        Retrieval's: which targets are right for a query, in training and evaluation: the row's own ``item``, or those of
        all rows of its ``label``.
    metric : str
        What models are compared by, and a decision threshold is tuned for; empty: the first of the kind's.
    class_weights : str or dict
        Of the loss: ``none``; ``balanced``, by the inverse of a class's share; or weights by class, 1 for the others.
    threshold : str
        ``auto`` tunes the threshold of two classes, or of each label, on validation rows, if the metric is one that
        depends on it; ``half`` leaves it at 0.5.
    separator : str
        Between the labels of a cell of multi-label classification.
    """

    kind: Literal["classification", "multilabel", "regression", "retrieval"] = "classification"
    target: tuple[str, ...] = ()
    dim: int = 64
    positives: Literal["item", "label"] = "item"
    metric: str = ""
    class_weights: str | dict[str, float] = "none"
    threshold: Literal["auto", "half"] = "auto"
    separator: str = "|"

    @property
    def compared_by(self) -> str:
        """The metric that models are compared by, empty for retrieval's recall at 10."""
        return self.metric or next(iter(METRICS[self.kind]), "")

    @property
    def tuned(self) -> bool:
        """Whether a decision threshold is tuned."""
        return self.threshold == "auto" and self.kind in ("classification", "multilabel") and self.compared_by in TUNED


# Options that a layer needs or that suit features of 64 dimensions, where a configuration names none.
LAYER_OPTIONS: dict[str, dict[str, Any]] = {
    "LowRankFusion": {"rank": 16},
    "ConcatMLP": {"dimensions": [128]},
    "LinearSum": {"mm_dim": 128},
    "BLOCK": {"mm_dim": 64, "chunks": 8, "rank": 4},
    "MFB": {"mm_dim": 128},
    "MFH": {"mm_dim": 128},
    "MLB": {"mm_dim": 128},
    "MUTAN": {"mm_dim": 64, "rank": 8},
    "TuckerFusion": {"mm_dim": 64},
}


@dataclass(frozen=True)
class Fusion:
    """A layer of `fusionsum.nn` and the options of its constructor; those of `LAYER_OPTIONS` where it is given none."""

    layer: str = "ResidualFusion"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Train:
    """The loop: one training of every model per seed, by AdamW.

    Attributes
    ----------
    seeds : list of int
        Which, or how many: 3 stands for 0, 1, 2.
    epochs : int
        At most.
    batch_size : int
        Rows of a step, of all processes together.
    learning_rate : float
        Of AdamW; the greatest of a cycle.
    weight_decay : float
        Of AdamW, except where a layer has its own (``ResidualFusion``).
    schedule : str
        Of the learning rate: ``constant``, or ``one-cycle``, torch's ``OneCycleLR``, over all epochs.
    patience : int
        Epochs without a lower validation loss after which a training ends, with the weights of the best; 0: never.
    modality_dropout : float
        The probability with which a row's modality is withheld in a step, but never all of a row.
    clip : float
        The greatest norm of a step's gradient.
    threads : int
        Torch's, in training and evaluation. On small batches a second one gains nothing; large encoders want all cores.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["constant", "one-cycle"] = "constant"
    patience: int = 10
    modality_dropout: float = 0.0
    clip: float = 1.0
    threads: int = 1


# By section, the keys that a template shows even where they have their defaults.
USEFUL = {
    "data": ("label", "group", "validation_share", "test_share", "on_error"),
    "task": ("metric", "class_weights"),
    "fusion": ("layer",),
    "train": ("seeds", "epochs", "batch_size", "learning_rate", "patience", "modality_dropout"),
}


@dataclass(frozen=True)
class Config:
    """A whole configuration: every section with its defaults filled in.

    Without `modalities`, or with ``data.split: auto``, it is completed by the data (``infer.py``).

    Attributes
    ----------
    modalities : dict
        By name, the kind of each and its options; without them, the manifest's columns tell.
    title : str
        Of the report.
    data : Data
        Where the rows come from and how they are split.
    task : Task
        What is to be told or found.
    fusion : Fusion
        The layer that joins the modalities.
    baselines : list of str
        What is compared with it, of ``alone``, ``concat-linear``, ``mlp``, ``late-product`` and ``score-sum``.
    train : Train
        The loop.
    """

    modalities: dict[str, Modality] = field(default_factory=dict)
    title: str = "fusionsum"
    data: Data = field(default_factory=Data)
    task: Task = field(default_factory=Task)
    fusion: Fusion = field(default_factory=Fusion)
    baselines: tuple[str, ...] = BASELINES
    train: Train = field(default_factory=Train)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The manifest's columns that hold each modality."""
        return {name: modality.columns_of(name) for name, modality in self.modalities.items()}


def _convert(value: Any, kind: Any, key: str) -> Any:
    """Return `value` as the annotated type `kind`, or raise ConfigError with the type that was expected."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        _convert(value, type(options[0]), key)
        if value not in options:
            raise ConfigError(f"{key}: {unknown('choice', str(value), options)}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{key}: expected a mapping of names, got {value!r}")
        return {name: _convert(item, options[1], f"{key}.{name}") for name, item in value.items()}
    if origin is types.UnionType and type(None) in options:
        return None if value is None else _convert(value, options[0], key)
    if origin is types.UnionType:
        return _convert(value, options[isinstance(value, Mapping)], key)  # a name, or a mapping
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{key}: expected a list, got {value!r}")
        return tuple(_convert(item, options[0], f"{key}[{i}]") for i, item in enumerate(items))
    if kind is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3, which has no dot, as a string
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    raise ConfigError(f"{key}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def _section(cls: Any, given: Any, key: str) -> Any:
    """Build a dataclass of scalars from a mapping."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}: expected a mapping, got {given!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for name, value in given.items():
        if name not in names:
            raise ConfigError(f"{key}: {unknown('key', str(name), names)}")
        values[name] = _convert(value, hints[name], f"{key}.{name}")
    return cls(**values)


def _modality(given: Any, key: str) -> Modality:
    if not isinstance(given, Mapping) or "kind" not in given:
        raise ConfigError(f"{key}: expected a mapping with a kind, one of {', '.join(KINDS)}; got {given!r}")
    rest = dict(given)
    kind = rest.pop("kind")
    if kind not in KINDS:
        raise ConfigError(f"{key}.kind: {unknown('kind', str(kind), KINDS)}")
    rest["encoder"] = own(rest["encoder"]) if "encoder" in rest else KINDS[kind].encoder
    made = _section(KINDS[kind], rest, key)
    if isinstance(made, Table):
        made = dataclasses.replace(made, columns=made.columns_of(key.rpartition(".")[2]))
        for column in made.categories or ():
            if column not in made.columns:
                raise ConfigError(f"{key}.categories: {unknown('column', column, made.columns)}")
    if (
        isinstance(made, Image)
        and made.range
        and not (len(made.range) == 2 and -math.inf < made.range[0] < made.range[1] < math.inf)
    ):
        raise ConfigError(f"{key}.range: expected the least and the greatest value, got {list(made.range)}")
    return made


def _expect(condition: bool, section: Any, key: str, name: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}.{name}: expected {expected}, got {getattr(section, name)}")


def _positive(section: Any, key: str, names: Iterable[str]) -> None:
    for name in names:
        _expect(getattr(section, name) > 0, section, key, name, "more than 0")


def from_mapping(given: Mapping[str, Any]) -> Config:
    """Check a configuration and fill in its defaults.

    Parameters
    ----------
    given : mapping
        The sections, as `yaml.safe_load` reads them from a file.

    Returns
    -------
    Config

    Raises
    ------
    ConfigError
        If a key or a choice is unknown (the message suggests the nearest name), or a value is of the wrong type or out of
        range.

    Examples
    --------
    >>> config = from_mapping({"modalities": {"photo": {"kind": "image"}}, "train": {"seeds": 3}})
    >>> config.train.seeds, config.train.batch_size
    ((0, 1, 2), 64)
    >>> from_mapping({"modalities": {"photo": {"kind": "image"}}, "train": {"seed": 3}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fusionsum.pipeline.errors.ConfigError: train: unknown key 'seed'; did you mean 'seeds'? There are: ...
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"expected a mapping of sections, got {given!r}")
    names = [f.name for f in dataclasses.fields(Config)]
    for name in given:
        if name not in names:
            raise ConfigError(unknown("section", str(name), names))
    modalities = given.get("modalities", {})
    if not isinstance(modalities, Mapping):
        raise ConfigError(f"modalities: expected a mapping, name: {{kind: ...}}; got {modalities!r}")
    for name in modalities:
        # Modules are registered by these names.
        if not str(name).isidentifier():
            raise ConfigError(f"modalities: expected names of letters, digits and _, got {name!r}")
    config = Config(
        modalities={name: _modality(value, f"modalities.{name}") for name, value in modalities.items()},
        title=_convert(given.get("title", Config.title), str, "title"),
        data=_section(Data, given.get("data"), "data"),
        task=_section(Task, given.get("task"), "task"),
        fusion=_fusion(given["fusion"]) if "fusion" in given else Fusion(),
        baselines=_convert(given.get("baselines", BASELINES), tuple[str, ...], "baselines"),
        train=_section(Train, _with_seeds(given.get("train")), "train"),
    )
    _check(config)
    return config


def _with_seeds(given: Any) -> Any:
    """Return the section ``train`` with a list of seeds where it says how many."""
    if not isinstance(given, Mapping) or type(given.get("seeds")) is not int:
        return given
    if given["seeds"] < 1:
        raise ConfigError(f"train.seeds: expected more than 0, or a list of seeds, got {given['seeds']}")
    return {**given, "seeds": list(range(given["seeds"]))}


def _fusion(given: Any) -> Fusion:
    options = {} if given is None else given
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"fusion: expected a mapping of a layer and its options, like {{layer: MLB, mm_dim: 128}}; got {given!r}"
        )
    options = dict(options)
    layer = _convert(options.pop("layer", Fusion.layer), str, "fusion.layer")
    for option in options:
        if not isinstance(option, str):
            raise ConfigError(f"fusion: expected names of options, got {option!r}")
    return Fusion(layer, LAYER_OPTIONS.get(layer, {}) | options)


def _check(config: Config) -> None:
    """Check the ranges of values, and the keys that depend on each other."""
    for name in config.baselines:
        if name not in BASELINES:
            raise ConfigError(f"baselines: {unknown('baseline', name, BASELINES)}")
    for name in config.task.target:
        if config.modalities and name not in config.modalities:
            raise ConfigError(f"task.target: {unknown('modality', name, config.modalities)}")
    retrieval = config.task.kind == "retrieval"
    if retrieval and config.modalities and not 0 < len(set(config.task.target)) < len(config.modalities):
        raise ConfigError("task.target: retrieval needs one modality or more to find, and one or more to ask with")
    if config.task.target and not retrieval:
        raise ConfigError(f"task.target: {config.task.kind} has none")
    if config.data.split == "by-seed" and config.data.test != ("test",):
        raise ConfigError(
            f"data.test: expected [test], for data.split: by-seed draws {', '.join(DRAWN)}; got {list(config.data.test)}"
        )
    if config.task.positives == "label" and not retrieval:
        raise ConfigError(f"task.positives: {config.task.kind} has none")
    _positive(config.task, "task", ["dim"])
    if config.task.metric and config.task.metric not in METRICS[config.task.kind]:
        raise ConfigError(f"task.metric: {unknown('metric', config.task.metric, METRICS[config.task.kind])}")
    weights = config.task.class_weights
    if weights != "none":
        weighted = config.task.kind in ("classification", "multilabel")
        _expect(weighted, config.task, "task", "class_weights", f"none, for {config.task.kind} has no classes")
        known = isinstance(weights, dict) or weights == "balanced"
        _expect(known, config.task, "task", "class_weights", "none, balanced, or {class: weight}")
        for name, weight in weights.items() if isinstance(weights, dict) else ():
            if not 0 < weight < math.inf:
                raise ConfigError(f"task.class_weights.{name}: expected more than 0 and finite, got {weight}")
    _expect(len(config.task.separator) > 0, config.task, "task", "separator", "a character or more")
    train, data = config.train, config.data
    distinct = len(set(train.seeds)) == len(train.seeds) > 0 and min(train.seeds) >= 0
    _expect(distinct, train, "train", "seeds", "different numbers, none negative")
    _positive(train, "train", ["epochs", "batch_size", "learning_rate", "clip", "threads"])
    _expect(math.isfinite(train.learning_rate), train, "train", "learning_rate", "a finite number")
    _expect(0 <= train.weight_decay < math.inf, train, "train", "weight_decay", "at least 0 and finite")
    _expect(train.patience >= 0, train, "train", "patience", "at least 0")
    _positive(data, "data", ["workers"])
    _expect(0 <= data.cache_limit < math.inf, data, "data", "cache_limit", "at least 0 and finite")
    for section, key, name in (
        (train, "train", "modality_dropout"),
        (data, "data", "validation_share"),
        (data, "data", "test_share"),
    ):
        _expect(0 <= getattr(section, name) < 1, section, key, name, "at least 0 and less than 1")
    reserved = {"id", "group", "split", data.id, data.group} | (set() if retrieval else {"label", data.label})
    for name, modality in config.modalities.items():
        for option, (least, most) in modality.limits.items():
            expected = f"{least} to {most}"
            _expect(least <= getattr(modality, option) <= most, modality, f"modalities.{name}", option, expected)
        for column in modality.columns_of(name):
            if column in reserved:
                raise ConfigError(
                    f"modalities.{name}: reads the column {column!r}, which is no input: the model would see the answer"
                )


def to_mapping(config: Config) -> dict[str, Any]:
    """Return the mapping of plain values that `from_mapping` reads back, for YAML and for checkpoints."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    def section(value: Any) -> dict[str, Any]:
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}

    return {
        "title": config.title,
        "data": section(config.data),
        "modalities": {name: {"kind": m.kind} | section(m) for name, m in config.modalities.items()},
        "task": section(config.task),
        "fusion": {"layer": config.fusion.layer} | config.fusion.options,
        "baselines": list(config.baselines),
        "train": section(config.train),
    }


def to_yaml(config: Config, folder: Path | None = None) -> str:
    """Return a configuration as YAML, every default filled in; its paths relative to a folder, if one is given."""
    mapping = to_mapping(config)
    if folder is not None:
        for key in ("manifest", "cache", "code"):
            with contextlib.suppress(ValueError):  # on another drive, or empty
                mapping["data"][key] = os.path.relpath(mapping["data"][key], folder)
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)


def template(config: Config, notes: Iterable[str] = ()) -> str:
    """Return YAML to be edited: what is not the default, and the `USEFUL` keys that are, as comments.

    Parameters
    ----------
    config : Config
    notes : iterable of str, optional
        Comments to begin with.

    Examples
    --------
    >>> config = from_mapping({"modalities": {"photo": {"kind": "image"}}, "train": {"epochs": 3}})
    >>> print(template(config, ["column 'photo' is image"]))  # doctest: +ELLIPSIS
    # column 'photo' is image
    # Behind a # are defaults. Paths are relative to this file. All keys: docs/configuration.md.
    title: fusionsum
    modalities:
      photo: {kind: image, encoder: cnn}
    data:
      manifest: manifest.csv
      ...
      epochs: 3
      # batch_size: 64
      # learning_rate: 0.001
      # patience: 10
      # modality_dropout: 0.0
    # baselines: [alone, concat-linear, mlp, late-product, score-sum]
    <BLANKLINE>
    """
    task = Task(config.task.kind)
    given = to_mapping(config)
    usual = to_mapping(Config({name: type(m)() for name, m in config.modalities.items()}, task=task))
    given["task"]["metric"] = config.task.compared_by
    usual["task"] |= {"kind": "", "metric": task.compared_by}  # the kind and the manifest are no comments
    usual["data"]["manifest"] = ""

    def line(key: str, value: Any, default: bool = False) -> str:
        mapping = yaml.safe_dump(
            {key: value}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
        )
        return f"{'# ' * default}{mapping[1:-2]}"

    lines = [f"# {note}" for note in notes]
    lines += ["# Behind a # are defaults. Paths are relative to this file. All keys: docs/configuration.md."]
    lines += [line("title", config.title), "modalities:"]
    for name, options in given["modalities"].items():
        shown = {k: v for k, v in options.items() if k in ("kind", "encoder") or v != usual["modalities"][name][k]}
        lines.append(f"  {line(name, shown)}")
    for section, keys in USEFUL.items():
        lines.append(f"{section}:")
        for key, value in given[section].items():
            default = value == usual[section].get(key)
            if key in keys or not default:
                lines.append(f"  {line(key, value, default)}")
    lines.append(line("baselines", given["baselines"], config.baselines == BASELINES))
    return "\n".join(lines) + "\n"


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply ``a.b=c`` overrides; relative paths of ``data`` are relative to the file.

    Raises
    ------
    ConfigError
        If the file cannot be read or parsed, or as in `from_mapping`.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Unique)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        given = _override(given, override)
    config = from_mapping(given)
    folder = path.parent.resolve()
    places = {name: getattr(config.data, name) for name in ("manifest", "cache", "code")}
    paths: dict[str, Any] = {name: str(folder / place) for name, place in places.items() if place}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))


class _Unique(yaml.SafeLoader):
    """Reads mappings whose keys are all different: of two equal ones PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    "while constructing a mapping",
                    node.start_mark,
                    f"the key {key.value!r} occurs twice",
                    key.start_mark,
                )
        return super().construct_mapping(node, deep)


def _override(given: Any, override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set: expected a.b=value, got {override!r}")
    result = dict(given or {})
    *path, last = key.split(".")
    place = result
    for name in path:
        place[name] = dict(place[name]) if isinstance(place.get(name), Mapping) else {}
        place = place[name]
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is no YAML: {' '.join(str(error).split())}") from None
    return result


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys whose values differ, with both values."""
    found = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} and {b!r}")
    return found
