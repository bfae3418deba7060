"""`fusionsum.pipeline.processes`: several ranks do what one process does, say one error, and end together.

What lives here: ranks over gloo that stay for all tests (``ranks.py``), and a few runs of torchrun. What lives elsewhere:
the loss of rows on several ranks (``test_distributed.py``), each step in one process (``test_pipeline_<file>.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import made_up
from conftest import PACKAGE, missing
from fusionsum import __main__ as command
from ranks import LIMIT, ranks

try:
    import torch
    import yaml
    from torch import nn
    from torch.distributed import HashStore

    from fusionsum.pipeline import (
        CheckpointError,
        ConfigError,
        ManifestError,
        MultimodalPredictor,
        checkpoint,
        processes,
        train,
    )
    from fusionsum.pipeline.config import Train
    from fusionsum.pipeline.fuse import FusionModel, TwoTowers
    from fusionsum.pipeline.preprocess import Column
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_up.folder(tmp_path_factory.mktemp("made-up"))


def together(function):
    """Return a function of a rank that calls another inside `joined`."""

    def called(rank, *given):
        with processes.joined() as ours:
            assert ours.rank == rank
            return function(ours, *given)

    return called


# What ranks have in common -------------------------------------------------------------------------------------------


def _exchanges(ours):
    alone = ours.each(lambda: processes.here().count)
    turns = list(ours.merged(f"{ours.rank}{letter}" for letter in "abc"[: 3 - (ours.rank > 0)]))
    uneven = [ours.share(total) for total in (0, 1, 7)]
    return (
        ours.each(lambda: ours.rank),
        ours.first(lambda: f"of {ours.rank}"),
        ours.mapped(lambda x: x * x, [1, 2, 3, 4]),
        ours.mean(ours.rank),
        turns,
        alone,
        [(share.start, share.stop) for share in uneven],
    )


def exchanges(rank):
    return together(_exchanges)(rank)


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_get_what_each_gives(count):
    found = ranks(count).run(exchanges)
    for every, first, squares, mean, turns, alone, _ in found:
        assert every == list(range(count))
        assert (first, squares, mean) == ("of 0", [1, 4, 9, 16], (count - 1) / 2)
        assert turns == [f"{r}{letter}" for letter in "ab" for r in range(count)] + ["0c"]
        assert alone == [1] * count  # a function that each calls by itself cannot wait for the others
    for k, total in enumerate((0, 1, 7)):
        bounds = [of_rank[-1][k] for of_rank in found]
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])] and bounds[-1][1] == total
        assert max(b - a for a, b in bounds) - min(b - a for a, b in bounds) <= 1


def _raising(ours, how):
    def fail():
        raise ManifestError([f"row {k}" for k in range(30)])

    if how == "each":
        ours.each(fail if ours.rank == 1 else list)
    elif how == "first":
        ours.first(fail)
    else:
        list(ours.merged(fail() if k == ours.rank == 1 else k for k in range(3)))


def raising(rank, how):
    try:
        together(_raising)(rank, how)
    except ManifestError as error:
        return error.problems


@pytest.mark.parametrize("how", ["each", "first", "merged"])
def test_what_one_rank_finds_wrong_is_raised_on_all(how):
    assert ranks(2).run(raising, how) == [[f"row {k}" for k in range(30)]] * 2


def _array(ours, place):
    found = ours.array((3, 2), np.int64, Path(place))
    if ours.leads:
        found[:] = np.arange(6).reshape(3, 2)
    ours.wait()
    return found.tolist(), os.listdir(place)


def array(rank, place):
    return together(_array)(rank, place)


def test_an_array_is_one_for_all_and_leaves_no_file(tmp_path):
    assert ranks(2).run(array, str(tmp_path)) == [([[0, 1], [2, 3], [4, 5]], [])] * 2


# Training ------------------------------------------------------------------------------------------------------------

SETTINGS = Train(
    epochs=4, batch_size=8, learning_rate=0.05, modality_dropout=0.3, patience=3, schedule="constant", weight_decay=0.01
)
LOSSES = {
    "classification": train.Loss("classification", torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)),
    "multilabel": train.Loss("multilabel", torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
    "regression": train.Loss("regression"),
    "retrieval": train.Loss("retrieval"),
    "retrieval by label": train.Loss("retrieval"),
}


class Encoder(nn.Sequential):
    """Dropout and a linear map: uses the generator in training."""

    def __init__(self):
        super().__init__(nn.Dropout(0.3), nn.Linear(4, 4))


class Head(nn.Module):
    """A head without ``present``, with a parameter that no loss depends on."""

    def __init__(self, outputs):
        super().__init__()
        self.linear = nn.Linear(4, outputs)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, a, b):
        return self.linear(a + b)


def trained(kind, settings=SETTINGS, place=None, rows=29, stop=None):
    """Train in float64, where rounding does not hide a wrong share; stop after so many steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labels = torch.arange(40) % 3
        values = (torch.randn(40, 4) * 0.3 + nn.functional.one_hot(labels, 4)).double()
        if kind == "multilabel":
            labels = nn.functional.one_hot(labels, 3).double()
        elif kind == "regression":
            labels = labels.double()
        elif kind == "retrieval":  # pairs of the same target
            labels = torch.arange(40) // 2
        columns = {"a": Column(values, torch.arange(40)), "b": Column(values.flip(1), torch.arange(40))}
        columns["b"].index[::4] = -1
        chosen = {"train": torch.arange(rows), "validation": torch.arange(30, 40)}
        torch.manual_seed(1)
        head = Head(1 if kind == "regression" else 3)
        model = FusionModel({"a": Encoder(), "b": Encoder()}, head)
        if kind.startswith("retrieval"):
            model = TwoTowers(model, FusionModel({"a": Encoder()}, nn.Linear(4, 3)), 3, kind.endswith("label"))
        model.double()
        real, taken = train.step, []

        def step(*given):
            taken.append(1)
            if len(taken) == stop:
                raise KeyboardInterrupt
            return real(*given)

        train.step = step
        try:
            history = train.train(
                model, LOSSES[kind], train.Rows(columns, labels), chosen, settings, {}, ["a", "b"], place
            )
        except KeyboardInterrupt:
            history = []
        finally:
            train.step = real
    return {name: value.numpy() for name, value in model.state_dict().items()}, history


def _trained(ours, kind, settings, place, rows, stop):
    place = Path(place) if place and not ours.rank else None
    return trained(kind, settings, place, rows, stop)


def trained_together(rank, *given):
    return together(_trained)(rank, *given)


def test_ranks_train_the_model_of_one_process():
    """Uneven shares, a last batch of fewer rows than ranks, class weights, dropout, missing modalities."""
    for kind in LOSSES:
        wanted, history = trained(kind)
        for count in (2, 3):
            (found, again), *others = ranks(count).run(trained_together, kind, SETTINGS, None, 29, None)
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-7, atol=1e-9)
                assert all(np.array_equal(found[name], other[name]) for other, _ in others)
            assert all(other == again for _, other in others)
            for ours, theirs in zip(again, history, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_batch_of_one_row_is_trained_on_by_three_ranks():
    for kind in LOSSES:
        wanted, _ = trained(kind, rows=1)
        for found, _ in ranks(3).run(trained_together, kind, SETTINGS, None, 1, None):
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
def test_a_training_that_is_resumed_ends_in_the_same_bits(tmp_path, schedule):
    """Of three ranks, whose sums of gradients depend on their order."""
    settings = dataclasses.replace(SETTINGS, schedule=schedule)
    place = str(tmp_path / "model.safetensors")
    whole = ranks(3).run(trained_together, "classification", settings, None, 29, None)
    ranks(3).run(trained_together, "classification", settings, place, 29, 7)
    assert len(checkpoint.read(Path(place)).history) == 1
    resumed = ranks(3).run(trained_together, "classification", settings, place, 29, None)
    for (wanted, history), (found, again) in zip(whole, resumed, strict=True):
        assert again == history
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dropout_of_a_share_is_that_of_the_batch(rate):
    given, drop = torch.randn(10, 3, 2), nn.Dropout(rate)

    def dropped(share):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            if share is None:
                return drop(given), torch.rand(3)
            with processes.AsOne(share):
                taken = given[share.taken].flatten(0, 1)  # an encoder of each word of a row
                return drop(taken).unflatten(0, (-1, 3)), torch.rand(3)

    whole, after = dropped(None)
    for share in (processes.Share(0, 4, 10), processes.Share(4, 10, 10), processes.Share(4, 4, 10)):
        found, left = dropped(share)
        assert torch.equal(found, whole[share.taken]) and torch.equal(left, after)


# The pipeline --------------------------------------------------------------------------------------------------------


def _pipeline(ours, folder, task, out):
    """Train, then use the run of one process: on the same weights all results are the same."""
    folder, out = Path(folder), Path(out)
    given = made_up.config(folder, **made_up.TASKS[task], train={"seeds": 1})
    manifest = folder / f"{task}.csv"
    fitted = MultimodalPredictor(given).fit(manifest, out / "two", progress=False)
    predictor = MultimodalPredictor.load(out / "one")
    count = predictor.write_predictions(manifest, out / "two.csv", progress=False)
    return (
        fitted.histories,
        predictor.evaluate(progress=False).results,
        predictor.embed(manifest, progress=False),
        count,
    )


def pipeline(rank, *given):
    return together(_pipeline)(rank, *given)


@pytest.mark.parametrize("task", made_up.TASKS)
def test_from_files_to_predictions(folder, tmp_path, task):
    given = made_up.config(folder, **made_up.TASKS[task], train={"seeds": 1})
    one = MultimodalPredictor(given).fit(folder / f"{task}.csv", tmp_path / "one", progress=False)
    assert one.write_predictions(folder / f"{task}.csv", tmp_path / "one.csv", progress=False) == made_up.ROWS
    found = ranks(2).run(pipeline, str(folder), task, str(tmp_path))
    for histories, results, vectors, count in found:
        for model, history in one.histories.items():  # Adam makes much of weights whose gradients are near 0
            assert histories[model] == [pytest.approx(epoch, rel=1e-4) for epoch in history]
        assert results == one.evaluate(progress=False).results
        np.testing.assert_array_equal(vectors, one.embed(folder / f"{task}.csv", progress=False))
        assert count == made_up.ROWS
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    names = [{path.relative_to(tmp_path / n) for path in (tmp_path / n).rglob("*")} for n in ("one", "two")]
    assert names[0] == names[1]


def _predicted(ours, run, path, on_error, size):
    predictor = MultimodalPredictor.load(run)
    from fusionsum.pipeline import prediction
    from fusionsum.pipeline import predictor as module

    real = module.streamed
    module.streamed = lambda *given: prediction.streamed(*given, size=size)
    try:
        return predictor.predict(path, on_error=on_error, progress=False)
    except ManifestError as error:
        return str(error)
    finally:
        module.streamed = real


def predicted(rank, *given):
    return together(_predicted)(rank, *given)


def test_parts_of_a_stream_are_merged_in_order(folder, tmp_path):
    """Fewer rows than ranks, parts that no row is usable of, bad rows."""
    rows = made_up.rows(folder)
    for k in (9, 10, 11, 20):
        rows[k] = rows[k] | {"image": "nowhere.png"}
    given = made_up.config(folder, train={"seeds": 1, "epochs": 1, "patience": 0}, baselines=[])
    predictor = MultimodalPredictor(given).fit(out=tmp_path / "run", progress=False)
    path = made_up.write(folder / "new.csv", rows)
    wanted = predictor.predict(path, on_error="skip", progress=False)
    for found in ranks(3).run(predicted, str(tmp_path / "run"), str(path), "skip", 3):
        assert [row["error"] for row in found] == [row["error"] for row in wanted]
        assert [(row["id"], row.get("predicted")) for row in found] == [(r["id"], r.get("predicted")) for r in wanted]
    for found in ranks(3).run(predicted, str(tmp_path / "run"), str(path), "raise", 3):
        assert found.startswith("new.csv:11, column 'image': no such file: nowhere.png")
    path = made_up.write(folder / "two.csv", rows[:2])
    for found in ranks(3).run(predicted, str(tmp_path / "run"), str(path), "raise", 1):
        assert [row["id"] for row in found] == ["row0", "row1"]


def _refused(ours, folder, out):
    given = made_up.config(Path(folder), train={"seeds": 1, "epochs": 1, "patience": 0}, baselines=[])
    found = []
    for manifest, place in (("bad.csv", None), ("classification.csv", out)):
        try:
            MultimodalPredictor(given).fit(Path(folder) / manifest, place, progress=False)
        except (ManifestError, CheckpointError) as error:
            found.append(str(error))
    return found


def refused(rank, *given):
    return together(_refused)(rank, *given)


def test_bad_rows_and_a_folder_that_is_taken_are_one_error(folder, tmp_path):
    """Items that different ranks read, and what only the first looks at."""
    rows = made_up.rows(folder)
    rows[5] |= {"image": "none.png"}
    rows[30] |= {"sound": "none.wav"}
    made_up.write(folder / "bad.csv", rows)
    run = tmp_path / "run"
    given = made_up.config(folder, train={"seeds": 1, "epochs": 1, "patience": 0}, baselines=[])
    MultimodalPredictor(given).fit(out=run, progress=False)
    wanted = _refused(None, folder, run)
    assert len(wanted) == 2 and "bad.csv:7, column 'image'" in wanted[0] and "bad.csv:32, column 'sound'" in wanted[0]
    assert ranks(2).run(refused, str(folder), str(run)) == [wanted] * 2


# The command line ----------------------------------------------------------------------------------------------------


def test_an_environment_that_names_processes_that_are_not_there(monkeypatch, tmp_path, capsys):
    assert command.main(["train", str(tmp_path / "x.yaml")]) == 1
    assert "No such file" in capsys.readouterr().err
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is '2', but MASTER_PORT: not set: start with torchrun"):
        processes.joined().__enter__()
    monkeypatch.setenv("MASTER_PORT", "9")  # where nothing answers
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but the processes do not meet at 127\.0\.0\.1:9"):
        processes.joined().__enter__()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match=r"'many', but expected the number of processes"):
        processes.joined().__enter__()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes.joined() as ours:
        assert ours == processes.ALONE


@pytest.mark.parametrize("rank", [0, 1])
def test_verbs_of_one_process_are_the_first_ranks(folder, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    place = tmp_path / "config.yaml"
    assert command.main(["init", str(folder / "classification.csv"), "--out", str(place)]) == 0
    said = capsys.readouterr()
    assert place.exists() == (not rank) and bool(said.out) == (not rank)
    assert ("fusionsum init: one process does it, the first of 2" in said.err) == (not rank)


def test_a_rank_says_why_it_ends():
    """Unless the first says the same; where the connection is lost, it is another's fault."""
    store, ours = HashStore(), ("host", os.getpid())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    assert processes._reason(lost, store, 0, [ours, ("host", gone.pid)]) == "rank 1 has died"
    assert processes._reason(KeyError("x"), store, 0, [ours, ours]) == "KeyError: 'x'"
    assert processes._told("no disk", store, 1) is False
    assert processes._reason(lost, store, 0, [ours, ours]) == "rank 1 has failed: no disk"
    assert processes._told("no disk", store, 0) is False
    assert processes._told("no disk", store, 1) is True
    assert processes._told("another", store, 1) is False


@contextlib.contextmanager
def torchrun(count, *arguments):
    """Give a process of torchrun that starts so many of ``fusionsum``; it does not outlive the test."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "fusionsum"]
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ends = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([*start, *map(str, arguments)], **ends) as process:
        try:
            yield process
        finally:
            process.terminate()


def _fitted(ours, config, out):
    MultimodalPredictor(config).fit(out=out, progress=False)


def fitted(rank, *given):
    return together(_fitted)(rank, *given)


def test_torchrun_trains_a_killed_rank_ends_the_run_and_it_resumes(folder, tmp_path):
    """To the same bits, of one model that is trained for so long that a rank can be killed."""
    config, run = folder / "task.yaml", tmp_path / "run"
    given = made_up.config(folder, train={"seeds": 1, "epochs": 100, "patience": 0, "batch_size": 18}, baselines=[])
    given["modalities"] = {name: made_up.MODALITIES[name] for name in ("image", "size")}
    config.write_text(yaml.safe_dump(given), encoding="utf-8")
    place = run / "checkpoints" / "fused-0.safetensors"
    with torchrun(2, "train", config, "--out", run) as killed:
        _until(place.exists)
        (second,) = (p for p in _children(killed.pid) if "RANK=1" in Path(f"/proc/{p}/environ").read_text().split("\0"))
        os.kill(second, signal.SIGKILL)
        said = killed.communicate(timeout=2 * LIMIT)[1]
    assert killed.returncode == 1
    cause = said[said.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in cause and "SIGKILL" in cause
    assert not checkpoint.read(place).done
    with torchrun(2, "train", config, "--out", run, "--resume") as again:
        ranks(2).run(fitted, str(config), str(tmp_path / "whole"))
        out, said = again.communicate(timeout=2 * LIMIT)
    assert again.returncode == 0, said
    assert out == f"fusionsum evaluate {run}\n" and said.count("seed 0, fused: 100 epochs") == 1  # once
    one, other = (checkpoint.read(tmp_path / name / place.relative_to(run)) for name in ("whole", "run"))
    assert one.history == other.history
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)


def test_torchrun_says_an_error_once_and_names_the_rank(tmp_path):
    with torchrun(2, "train", tmp_path / "nothing.yaml") as failed:
        said = failed.communicate(timeout=2 * LIMIT)[1]
    assert failed.returncode == 1
    assert said.count("nothing.yaml: [Errno 2]") == 1 and "rank 0: " in said


def _until(condition):
    end = time.monotonic() + 2 * LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def _children(process):
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append(int(place.parent.name))
    return found
