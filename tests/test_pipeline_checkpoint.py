"""`fusionsum.pipeline.checkpoint`: what is written comes back; junk, changes and malice are refused by name.

What lives elsewhere: checkpoints that a training resumes from (``test_pipeline_train.py``), their folder
(``test_pipeline_run.py``).
"""

from __future__ import annotations

import json
import os
import pickle

import pytest

from conftest import missing

try:
    import torch
    from safetensors.torch import save

    from fusionsum.pipeline import CheckpointError, checkpoint
    from fusionsum.pipeline.checkpoint import Checkpoint
    from fusionsum.pipeline.config import Train
except ModuleNotFoundError as error:
    missing(str(error))

IDENTITY = {"train": {"patience": 4}, "manifest": "m"}


@pytest.fixture
def place(tmp_path):
    return tmp_path / "fused-0.safetensors"


def made(**changes):
    loop = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "generator": torch.get_rng_state(),
        "best": {"loss": 1 / 3, "epoch": 2, "weights": None},
    }
    history = [{"epoch": 1, "train_loss": 0.1 + 0.2}, {"epoch": 2, "train_loss": 1e-300}]
    model = {"w": torch.randn(3, 2).T, "tied": torch.zeros(0, 4), "half": torch.ones(2, dtype=torch.bfloat16)}
    return Checkpoint(**{"identity": IDENTITY, "model": model, "history": history, "epochs": 4, "loop": loop} | changes)


def test_everything_comes_back_to_the_bit(place):
    state = made()
    state.model["tied"] = state.model["w"]  # shared memory
    checkpoint.write(place, state)
    again = checkpoint.read(place)
    assert (again.identity, again.history, again.epochs) == (state.identity, state.history, state.epochs)
    assert not again.done and not again.stopped
    for name, weights in state.model.items():
        assert torch.equal(again.model[name], weights) and again.model[name].dtype == weights.dtype
    assert torch.equal(again.loop["generator"], state.loop["generator"])
    assert again.loop["best"] == state.loop["best"]
    assert again.loop["optimizer"]["state"] == {0: {"step": torch.tensor(3.0)}, 1: {}}
    assert again.loop["optimizer"]["param_groups"] == [{"betas": [0.9, 0.999]}]
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_every_flipped_bit_is_noticed(place):
    """In the header, in what is JSON, in the weights: one in every third byte of a small file."""
    checkpoint.write(place, made(model={"w": torch.arange(3.0)}, loop={}, history=[]))
    content = place.read_bytes()
    for k in range(0, len(content), 3):
        place.write_bytes(content[:k] + bytes([content[k] ^ (1 << k % 8)]) + content[k + 1 :])
        try:
            found = checkpoint.read(place)
        except CheckpointError as error:
            assert "fused-0.safetensors" in str(error)
        else:  # a name of the header's that nothing reads, in its padding say
            assert torch.equal(found.model["w"], torch.arange(3.0)), k
            assert (found.identity, found.epochs) == (IDENTITY, 4), k


class Executed:
    """A pickle of this creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def junk(place):
    """Return by name the contents of files that are no checkpoints."""
    whole = save({"model.w": torch.ones(2)}, {"fusionsum": "{}", "sha256": "0" * 64})
    deep = json.dumps({"identity": None}).replace("null", "[" * 100_000)
    header = b'{"__metadata__": {"a": "b"}}'
    return {
        "empty": b"",
        "text": b"not a checkpoint",
        "pickle": pickle.dumps(Executed(place.with_name("executed"))),
        "cut": whole[:-3],
        "no metadata": save({"w": torch.ones(2)}),
        "another program's": save({"w": torch.ones(2)}, {"format": "pt"}),
        "wrong checksum": whole,
        "header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
        "deep": save({}, {"fusionsum": deep, "sha256": checkpoint._digest(deep, {})}),
        "no keys": save({}, {"fusionsum": "{}", "sha256": checkpoint._digest("{}", {})}),
        "a list": save({}, {"fusionsum": "[]", "sha256": checkpoint._digest("[]", {})}),
        "no tensors": len(header).to_bytes(8, "little") + header,
    }


def test_junk_and_malice_are_refused_by_name_and_nothing_is_executed(place):
    with pytest.raises(CheckpointError, match=r"fused-0\.safetensors: cannot be read: there is no such file"):
        checkpoint.read(place)
    for name, content in junk(place).items():
        place.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"fused-0\.safetensors: ") as raised:
            checkpoint.read(place)
        assert "weights_only" not in str(raised.value), name
    assert not place.with_name("executed").exists()
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(CheckpointError, match="is no regular file"):
        checkpoint.read(place)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused(place, value):
    checkpoint.write(place, made(model={"w": torch.tensor([1.0, float(value)])}))
    with pytest.raises(CheckpointError, match="the weights 'w' are not finite"):
        checkpoint.read(place)


def test_json_comes_back_and_changes_are_noticed(tmp_path):
    place = tmp_path / "0.json"
    value = {"split": {"train": ["a", "é\ud800"]}, "task": {"mean": 0.1, "classes": ["1"]}, "fitted": None}
    checkpoint.write_json(place, value)
    assert checkpoint.read_json(place) == value
    text = place.read_text()
    for content in (text.replace("0.1", "0.2"), text[:-9], "[]", "null", "", "[" * 100_000):
        place.write_text(content)
        with pytest.raises(CheckpointError, match=r"0\.json: "):
            checkpoint.read_json(place)


@pytest.mark.parametrize(
    "state, settings, message",
    [
        ({"identity": None}, {}, "does not say of which configuration"),
        ({"identity": IDENTITY | {"manifest": "n"}}, {}, "another configuration .*manifest: 'n' and 'm'"),
        ({"done": True}, {"epochs": 1}, "train.epochs: expected 2 at least, its epochs; got 1"),
        ({}, {"epochs": 5, "schedule": "one-cycle"}, "which is not done, spans 4; got 5"),
        ({"done": True, "loop": {}}, {"epochs": 5}, "it holds no optimizer"),
        ({"loop": {}}, {}, "it holds no optimizer"),
        ({}, {"epochs": 5}, None),
        ({"done": True}, {"epochs": 5, "schedule": "one-cycle"}, None),
        ({"done": True, "loop": {}}, {}, None),
        ({"done": True, "stopped": True, "loop": {}}, {"epochs": 9}, None),
    ],
)
def test_what_can_be_continued(place, state, settings, message):
    found = made(**state)
    settings = Train(**{"epochs": 4, "schedule": "constant"} | settings)
    if message is None:
        assert found.checked(place, IDENTITY, settings) is found
    else:
        with pytest.raises(CheckpointError, match=message):
            found.checked(place, IDENTITY, settings)


def test_an_interrupted_or_failing_write_leaves_the_old_file(place, monkeypatch):
    checkpoint.write(place, made())
    before = place.read_bytes()

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(type(place), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(place, made())
    assert place.read_bytes() == before
    assert [path.name for path in place.parent.iterdir()] == [place.name]
