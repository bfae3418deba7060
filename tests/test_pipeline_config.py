"""`fusionsum.pipeline.config`: defaults, YAML and overrides, and errors that suggest the right name.

What lives elsewhere: unknown encoders (``test_pipeline_predictor.py``), a layer's options (``test_pipeline_fuse.py``).
"""

from __future__ import annotations

import contextlib

import pytest

from conftest import missing

try:
    from fusionsum.pipeline import ConfigError, config
except ModuleNotFoundError as error:
    missing(str(error))

IMAGE = {"modalities": {"photo": {"kind": "image"}}}
BOTH = {"modalities": {"photo": {"kind": "image"}, "words": {"kind": "text"}}}


def of(kind, **options):
    return {"modalities": {"x": {"kind": kind} | options}}


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "expected a mapping of sections"),
        ({"modalities": []}, "modalities: expected a mapping"),
        (IMAGE | {"trian": {}}, "unknown section 'trian'; did you mean 'train'?"),
        (IMAGE | {"train": {"epoch": 3}}, "train: unknown key 'epoch'; did you mean 'epochs'?"),
        (IMAGE | {"train": {"epochs": "many"}}, "train.epochs: expected int, got 'many'"),
        (IMAGE | {"train": {"epochs": True}}, "train.epochs: expected int, got True"),
        (IMAGE | {"train": {"epochs": 0}}, "train.epochs: expected more than 0, got 0"),
        (IMAGE | {"train": {"seeds": 0}}, "train.seeds: expected more than 0, or a list of seeds, got 0"),
        (IMAGE | {"train": {"seeds": []}}, "train.seeds: expected different numbers, none negative, got ()"),
        (IMAGE | {"train": {"seeds": [3, 3]}}, "train.seeds: expected different numbers"),
        (IMAGE | {"train": {"seeds": [-1]}}, "train.seeds: expected different numbers, none negative"),
        (IMAGE | {"train": {"seeds": "many"}}, "train.seeds[0]: expected int, got 'many'"),
        (IMAGE | {"train": {"learning_rate": True}}, "train.learning_rate: expected float"),
        (IMAGE | {"train": {"modality_dropout": 1.0}}, "train.modality_dropout: expected at least 0 and less than 1"),
        (IMAGE | {"data": {"test_share": -0.1}}, "data.test_share: expected at least 0 and less than 1, got -0.1"),
        (IMAGE | {"train": {"weight_decay": -1}}, "train.weight_decay: expected at least 0 and finite, got -1.0"),
        (IMAGE | {"train": {"weight_decay": "nan"}}, "train.weight_decay: expected at least 0 and finite, got nan"),
        (IMAGE | {"train": {"learning_rate": "nan"}}, "train.learning_rate: expected more than 0, got nan"),
        (IMAGE | {"train": {"learning_rate": "inf"}}, "train.learning_rate: expected a finite number, got inf"),
        (IMAGE | {"train": {"patience": -1}}, "train.patience: expected at least 0, got -1"),
        (IMAGE | {"fusion": "MLB"}, "fusion: expected a mapping of a layer and its options, like {layer: MLB"),
        (IMAGE | {"fusion": ["MLB"]}, "fusion: expected a mapping of a layer and its options"),
        (IMAGE | {"fusion": {"layer": 3}}, "fusion.layer: expected str, got 3"),
        (IMAGE | {"fusion": {3: 4}}, "fusion: expected names of options, got 3"),
        (
            IMAGE | {"data": {"split": "by-seed", "test": ["unseen"]}},
            "data.test: expected [test], for data.split: by-seed draws train, validation, test; got ['unseen']",
        ),
        (IMAGE | {"train": 3}, "train: expected a mapping, got 3"),
        (IMAGE | {"data": {"on_error": "skp"}}, "data.on_error: unknown choice 'skp'; did you mean 'skip'?"),
        (IMAGE | {"data": {"test": 3}}, "data.test: expected a list, got 3"),
        (IMAGE | {"baselines": ["mpl"]}, "baselines: unknown baseline 'mpl'; did you mean 'mlp'?"),
        (IMAGE | {"task": {"kind": "retrieval"}}, "task.target: retrieval needs one modality or more to find"),
        (BOTH | {"task": {"kind": "retrieval", "target": ["photo", "words"]}}, "task.target: retrieval needs"),
        (BOTH | {"task": {"kind": "retrieval", "target": ["word"]}}, "did you mean 'words'?"),
        (BOTH | {"task": {"target": ["words"]}}, "task.target: classification has none"),
        (BOTH | {"task": {"positives": "label"}}, "task.positives: classification has none"),
        (
            {"modalities": {"photo": {"kind": "imag"}}},
            "modalities.photo.kind: unknown kind 'imag'; did you mean 'image'?",
        ),
        ({"modalities": {"photo": {"size": 3}}}, "modalities.photo: expected a mapping with a kind"),
        (
            {"modalities": {"photo": {"kind": "image", "sise": 3}}},
            "modalities.photo: unknown key 'sise'; did you mean 'size'?",
        ),
        (of("image", size=0), "modalities.x.size: expected 1 to 4096, got 0"),
        (of("image", size=100000), "modalities.x.size: expected 1 to 4096, got 100000"),
        (of("image", size=8.5), "modalities.x.size: expected int, got 8.5"),
        (of("image", channels=2), "modalities.x.channels: unknown choice '2'; There are: 1, 3"),
        (of("image", channels="3"), "modalities.x.channels: expected int, got '3'"),
        (of("image", channels=True), "modalities.x.channels: expected int, got True"),
        (of("image", range=[1, 0]), "modalities.x.range: expected the least and the greatest value, got [1.0, 0.0]"),
        (
            of("image", range=[0, "inf"]),
            "modalities.x.range: expected the least and the greatest value, got [0.0, inf]",
        ),
        (of("audio", rate=1), "modalities.x.rate: expected 1000 to 384000, got 1"),
        (of("audio", seconds="nan"), "modalities.x.seconds: expected 0.05 to 3600, got nan"),
        (of("audio", mels=1000), "modalities.x.mels: expected 1 to 512, got 1000"),
        (of("text", length=0), "modalities.x.length: expected 1 to 65536, got 0"),
        (of("vector", features=0), "modalities.x.features: expected 1 to 65536, got 0"),
        ({"modalities": {"a photo": {"kind": "image"}}}, "modalities: expected names of letters"),
    ],
)
def test_a_wrong_configuration_is_an_error_that_names_the_key(given, message):
    with pytest.raises(ConfigError) as raised:
        config.from_mapping(given)
    assert message in str(raised.value)


NAMES = {"id": "key", "label": "price", "group": "lot"}
READING = {
    "name": lambda column: {column: {"kind": "text"}},
    "column": lambda column: {"x": {"kind": "text", "column": column}},
    "columns": lambda column: {"x": {"kind": "table", "columns": ["width", column]}},
}


@pytest.mark.parametrize("reading", READING)
@pytest.mark.parametrize("column", ["id", "label", "split", "group", *NAMES.values()])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "retrieval"])
def test_no_modality_reads_the_answer(task, column, reading):
    """Nor by the manifest's own name for it. Retrieval's answer is not the label, which may be a text to find."""
    modalities = READING[reading](column) | BOTH["modalities"]
    given = {"modalities": modalities, "data": NAMES, "task": {"kind": task}}
    if task == "retrieval":
        given["task"]["target"] = ["words"]
    allowed = task == "retrieval" and column in ("label", "price")
    message = rf"^modalities\.\w+: reads the column '{column}', which is no input"
    with contextlib.nullcontext() if allowed else pytest.raises(ConfigError, match=message):
        assert config.from_mapping(given).modalities.keys() == modalities.keys()


def test_a_configuration_comes_back_from_its_yaml(tmp_path):
    """Of every kind of modality, with values that are not the defaults; YAML reads 1e-2 as a string."""
    modalities = {name: {"kind": name, "features": 7} for name in config.KINDS}
    given = {"modalities": modalities, "train": {"learning_rate": "1e-2"}, "fusion": {"layer": "MLB", "mm_dim": 3}}
    made = config.from_mapping(given)
    assert made.train.learning_rate == 0.01
    assert made.fusion.options == {"mm_dim": 3}
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(made), encoding="utf-8")
    again = config.load(path)
    assert again.modalities == made.modalities
    assert config.differences(config.to_mapping(made), config.to_mapping(again)) == [
        f"data.manifest: 'manifest.csv' and {str(tmp_path / 'manifest.csv')!r}",
        f"data.cache: '.fusionsum-cache' and {str(tmp_path / '.fusionsum-cache')!r}",
        f"data.code: '.' and {str(tmp_path)!r}",
    ]


def test_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("modalities: {photo: {kind: image, size: 16}}", encoding="utf-8")
    made = config.load(path, ["modalities.photo.size=32", "train.seeds=2", "baselines=[mlp]", "fusion.rank=3"])
    assert (made.modalities["photo"].size, made.train.seeds, made.baselines) == (32, (0, 1), ("mlp",))
    assert made.fusion == config.Fusion("ResidualFusion", {"rank": 3})
    assert "size: 16" in path.read_text()
    with pytest.raises(ConfigError, match=r"expected a\.b=value, got 'train.seeds'"):
        config.load(path, ["train.seeds"])
    with pytest.raises(ConfigError, match="unknown key 'seed'; did you mean 'seeds'"):
        config.load(path, ["train.seed=3"])
    assert config.load(path, ["train.seeds=[7, 11]"]).train.seeds == (7, 11)
    with pytest.raises(ConfigError, match=r"--set train\.epochs: '\[' is no YAML"):
        config.load(path, ["train.epochs=["])


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\xff", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        config.load(path)
