"""`fusionsum.pipeline.train`: losses, modality dropout, early stopping, and checkpoints that resume to the same bits."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
import types

import pytest

import made_up
from conftest import missing

try:
    import torch
    from torch import nn
    from tqdm import tqdm

    from fusionsum.pipeline import CheckpointError, train
    from fusionsum.pipeline.config import Train
    from fusionsum.pipeline.fuse import FusionModel
    from fusionsum.pipeline.preprocess import Column
except ModuleNotFoundError as error:
    missing(str(error))

IDENTITY = {"train": {"patience": 4}, "manifest": "m"}
SETTINGS = Train(
    epochs=6, batch_size=8, learning_rate=0.05, modality_dropout=0.3, patience=0, schedule="constant", weight_decay=0.01
)


class Encoder(nn.Sequential):
    """Dropout and a linear map: uses the generator in training."""

    def __init__(self):
        super().__init__(nn.Dropout(0.3), nn.Linear(4, 4))


class Sum(nn.Module):
    """A head without ``present``."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, a, b):
        return self.linear(a + b)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def task():
    """Return rows whose label the first features tell, and their split."""
    labels = torch.arange(40) % 3
    values = torch.randn(40, 4) * 0.3 + nn.functional.one_hot(labels, 4)
    index = torch.arange(40)
    rows = train.Rows({"a": Column(values, index), "b": Column(values.flip(1), index.clone())}, labels)
    rows.columns["b"].index[::4] = -1
    return rows, {"train": index[:30], "validation": index[30:]}


def trained(settings=SETTINGS, checkpoint=None, identity=IDENTITY, bar=None):
    torch.manual_seed(1)
    rows, chosen = task()
    model = FusionModel({"a": Encoder(), "b": Encoder()}, Sum())
    history = train.train(
        model, train.loss_of("classification"), rows, chosen, settings, identity, ["a", "b"], checkpoint, bar
    )
    return model, history


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
@pytest.mark.parametrize("patience", [0, 3])
@pytest.mark.parametrize("killed_after", [1, 9, 13, 24])
def test_a_training_that_is_killed_and_resumed_ends_in_the_same_bits(
    tmp_path, monkeypatch, schedule, patience, killed_after
):
    """At any step: in the first epoch, amid one, at the end of one, after the last."""
    settings = dataclasses.replace(SETTINGS, schedule=schedule, patience=patience)
    whole, history = trained(settings)
    place = tmp_path / "checkpoints" / "model.safetensors"
    try:
        with made_up.interrupted(monkeypatch, train, killed_after):
            trained(settings, place)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == (len(history) * 4 > killed_after)
    torch.randn(7)  # in between, the process used the generator for something else
    resumed, again = trained(settings, place)
    assert same(whole, resumed)
    assert again == history
    with place.with_suffix(".csv").open(encoding="utf-8") as file:
        assert [float(row["train_loss"]) for row in csv.DictReader(file)] == [entry["train_loss"] for entry in history]
    third, _ = trained(settings, place)
    assert same(whole, third)


def test_early_stopping_keeps_the_best_weights(monkeypatch):
    values = iter([3.0, 1.0, 2.0, 1.5, 0.5])
    weights = []

    def loss(model, *arguments):
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(values)

    monkeypatch.setattr(train, "mean_loss", loss)
    with tqdm(total=6 * 4, file=io.StringIO(), disable=False) as bar:
        model, history = trained(dataclasses.replace(SETTINGS, patience=2), bar=bar)
        assert bar.n == bar.total == 4 * 4  # the steps that were saved would falsify its rate
    assert [entry["validation_loss"] for entry in history] == [3.0, 1.0, 2.0, 1.5]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights[1].items())
    assert not model.training


@pytest.mark.parametrize("patience", [0, 4])
@pytest.mark.parametrize("killed_after", [None, 14])
def test_a_training_that_is_extended_is_that_of_more_epochs(tmp_path, monkeypatch, patience, killed_after):
    """To the bit, even if the extension is killed; a training that stopped early stays as it is."""
    settings = dataclasses.replace(SETTINGS, epochs=3, patience=patience)
    more = dataclasses.replace(settings, epochs=40 if patience else 9)
    whole, history = trained(more)
    place = tmp_path / "model.safetensors"
    trained(settings, place)
    if killed_after:
        with made_up.interrupted(monkeypatch, train, killed_after), pytest.raises(KeyboardInterrupt):
            trained(more, place)
    longer, again = trained(more, place)
    assert again == history
    assert same(whole, longer)
    if patience:
        assert 3 < len(history) < 40
        assert len(trained(dataclasses.replace(settings, epochs=60), place)[1]) == len(history)


def test_a_cycle_that_is_extended_starts_again(tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, epochs=3, schedule="one-cycle")
    place = tmp_path / "model.safetensors"
    _, first = trained(settings, place)
    assert first[-1]["learning_rate"] < 0.1 * settings.learning_rate
    more = dataclasses.replace(settings, epochs=6)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(place.read_bytes())
    model, history = trained(more, place)
    assert history[:3] == first
    assert max(entry["learning_rate"] for entry in history[3:5]) > 0.3 * settings.learning_rate
    assert history[-1]["learning_rate"] < 0.1 * settings.learning_rate
    with made_up.interrupted(monkeypatch, train, 6), pytest.raises(KeyboardInterrupt):
        trained(more, copy)
    again, _ = trained(more, copy)
    assert same(model, again)


def test_checkpoints_of_another_configuration_and_broken_ones_are_refused(tmp_path):
    place = tmp_path / "model.safetensors"
    trained(checkpoint=place)
    with pytest.raises(CheckpointError, match=r"another configuration .*patience: 4 and 5; manifest: 'm' and 'n'"):
        trained(checkpoint=place, identity={"train": {"patience": 5}, "manifest": "n"})
    place.write_bytes(place.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        trained(checkpoint=place)


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(ArithmeticError, match="epoch 1: the loss is not finite"):
        trained(dataclasses.replace(SETTINGS, learning_rate=1e30))


def test_modality_dropout_never_takes_all_and_adds_none():
    a, b = torch.rand(2, 20000) < torch.tensor([[0.9], [0.6]])
    dropped = train.dropped({"a": a, "b": b}, 0.5)
    kept_a, kept_b = dropped["a"], dropped["b"]
    assert not (kept_a & ~a).any() and not (kept_b & ~b).any()
    assert torch.equal(kept_a | kept_b, a | b)
    both = a & b
    shares = [(kept_a & ~kept_b)[both].double().mean(), (kept_a & kept_b)[both].double().mean()]
    assert abs(shares[0] - 0.25) <= 0.02 and abs(shares[1] - 0.5) <= 0.02  # both dropped, a quarter, counts as none


@pytest.mark.parametrize("several", [False, True])
def test_the_contrastive_loss_is_that_of_its_formula(several):
    class Towers:
        fusion_weights = torch.full((4,), 3.0, dtype=torch.float64)

    Towers.several = several
    query, target = torch.randn(2, 5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 3])
    total = 0.0
    for one, other in ((query, target), (target, query)):
        for i in range(5):
            own = [j for j in range(5) if labels[j] == labels[i]] if several else [i]
            rivals = [j for j in range(5) if j in own or labels[j] != labels[i]]
            exponents = torch.stack([3 * one[i] @ other[j] for j in rivals])
            total += (exponents.logsumexp(0) - 3 * (one[i] @ other[own].T).mean()).item()
    assert abs(train.contrastive(Towers(), (query, target), labels).item() - total / 10) <= 1e-12


def test_regression_learns_the_mean_of_noise():
    loss = train.loss_of("regression")
    assert loss(None, torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0])).item() == 5.0


def test_the_mean_loss_counts_rows_not_batches():
    rows, chosen = task()
    model = FusionModel({"a": Encoder(), "b": Encoder()}, Sum())
    loss = train.loss_of("classification")
    whole = train.mean_loss(model, loss, rows, chosen["validation"], 100)
    assert abs(train.mean_loss(model, loss, rows, chosen["validation"], 7) - whole) <= 1e-6


def test_tensorboard_gets_every_epoch_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, epoch):
            written.append((self.folder, name, epoch))

        def close(self):
            written.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(train, "find_spec", lambda name: name == "tensorboard")
    _, history = trained(checkpoint=tmp_path / "checkpoints" / "model-0.safetensors")
    place = str(tmp_path / "tensorboard" / "model-0")
    expected = [(place, name, entry["epoch"]) for entry in history for name in entry]
    assert written == [*expected, "closed"]
