"""`fusionsum.pipeline.run`: the files of a training's folder, its lock, what is a run, what is refused.

What lives elsewhere: the checkpoints' format (``test_pipeline_checkpoint.py``), checkpoints that a training resumes from
(``test_pipeline_train.py``), whole runs (``test_pipeline_predictor.py``).
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import PACKAGE, missing

try:
    import torch

    from fusionsum.pipeline import CheckpointError, ConfigError
    from fusionsum.pipeline.checkpoint import Checkpoint
    from fusionsum.pipeline.config import Train, from_mapping
    from fusionsum.pipeline.run import Run, write_checkpoint
except ModuleNotFoundError as error:
    missing(str(error))

IDENTITY = {"train": {"patience": 4}, "manifest": "m"}
WEIGHTS = {"weight": torch.arange(3.0)}
HISTORY = [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25}]
SETTINGS = Train(epochs=2)
SEED = {"split": {"train": ["a"], "test": ["b"]}, "task": {"classes": ["a", "b"]}, "fitted": {}, "offsets": {}}


@pytest.fixture
def run(tmp_path):
    """Write a run of a model whose training is done and one whose is not."""
    found = Run(tmp_path / "run")
    found.write_config(from_mapping({"modalities": {"words": {"kind": "text"}}}))
    write_checkpoint(found.checkpoint("image alone", 0), Checkpoint(IDENTITY, WEIGHTS, HISTORY, 2, True))
    loop = {"generator": WEIGHTS["weight"]}
    write_checkpoint(found.checkpoint("fused", 0), Checkpoint(IDENTITY, WEIGHTS, HISTORY[:1], 2, loop=loop))
    found.write_seed(0, SEED)
    return found


def test_everything_comes_back_as_it_was_written(run):
    shared, checkpoints = run.read(["image alone"], 0)
    assert shared == SEED
    state = checkpoints["image alone"]
    assert (state.identity, state.history, state.done) == (IDENTITY, HISTORY, True)
    assert run.drawn([0, 1]) == {0: SEED["split"]}
    assert list(run.config().modalities) == ["words"]
    run.write_log({("fused", 0): HISTORY[:1], ("image alone", 0): HISTORY})
    for name, rows in (("log.csv", 3), ("checkpoints/image-alone-0.csv", 2)):
        with (run.folder / name).open(encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == rows
    assert not list(run.folder.rglob("*.partial"))


def test_its_paths_are_relative_so_that_a_run_can_move_with_its_data(tmp_path):
    config = from_mapping({"modalities": {"words": {"kind": "text"}}})
    data = replace(config.data, manifest=str(tmp_path / "data" / "m.csv"), cache=str(tmp_path / "cache"))
    Run(tmp_path / "runs" / "one").write_config(replace(config, data=data))
    assert str(tmp_path) not in (tmp_path / "runs" / "one" / "config.yaml").read_text(encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "runs").rename(tmp_path / "elsewhere" / "runs")
    found = Run(moved / "one").config().data
    assert os.path.normpath(found.manifest) == str(tmp_path / "elsewhere" / "data" / "m.csv")


def test_a_run_that_is_not_done_or_not_there_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="the training of 'fused', seed 0, is not done: --resume"):
        run.read(["image alone", "fused"], 0)
    with pytest.raises(CheckpointError, match=r"fused-1\.safetensors: cannot be read"):
        run.read(["fused"], 1)
    with pytest.raises(CheckpointError, match="is a run already"):
        run.must_be_new()
    run.must_be_new(overwrite=True)
    run.write_seed(0, {key: value for key, value in SEED.items() if key != "offsets"})  # the last thing of a seed
    with pytest.raises(CheckpointError, match="the training of seed 0 is not done: --resume"):
        run.read(["image alone"], 0)
    nowhere = Run(tmp_path / "nowhere")
    nowhere.must_be_new()
    nowhere.must_be_of(IDENTITY, SETTINGS)
    with pytest.raises(ConfigError, match="nowhere: is no run: it has no config"):
        nowhere.config()


def test_what_a_failed_training_left_is_no_run(run):
    run.fail("seed 0, fused: epoch 1: the loss is not finite")
    run.must_be_new()
    with pytest.raises(CheckpointError, match="is no run, for its training failed: seed 0, fused: epoch 1"):
        run.config()
    run.clear()
    run.write_config(from_mapping({"modalities": {"words": {"kind": "text"}}}))
    run.must_be_new()  # interrupted in its first epoch, say
    assert run.config()


def test_only_a_runs_own_files_are_deleted(run, tmp_path):
    for name in ("notes.txt", "manifest.csv"):
        (run.folder / name).write_text("mine")
    for name in ("report.html", "differences.json", "retrieved.csv", "retrieved.html"):
        (run.folder / name).write_text("")
    run.clear()
    assert {path.name for path in run.folder.iterdir()} == {"notes.txt", "manifest.csv"}
    (tmp_path / "config.yaml").write_text("mine")
    other = Run(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"has a config\.yaml, and is no run: choose another"):
            other.must_be_new(overwrite)
    other.clear()
    assert (tmp_path / "config.yaml").exists()


def test_another_configuration_is_refused(run):
    run.must_be_of(IDENTITY, SETTINGS)
    with pytest.raises(CheckpointError, match=r"another configuration .*manifest: 'm' and 'n'"):
        run.must_be_of(IDENTITY | {"manifest": "n"}, SETTINGS)
    with pytest.raises(CheckpointError, match=r"fused-0.*train\.epochs: the schedule .* spans 2; got 3"):
        run.must_be_of(IDENTITY, replace(SETTINGS, epochs=3, schedule="one-cycle"))


def test_runs_of_before_are_refused_by_name(tmp_path):
    run = Run(tmp_path / "run")
    run.write_config(from_mapping({"modalities": {"words": {"kind": "text"}}}))
    (run.folder / "checkpoints" / "fused-0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a run already"):
        run.must_be_new()
    with pytest.raises(CheckpointError, match=r"fused-0\.pt: is of an earlier version, which wrote pickles"):
        run.must_be_of(IDENTITY, SETTINGS)


def test_a_second_process_is_refused(tmp_path):
    run = Run(tmp_path / "run")
    code = f"""
from fusionsum.pipeline import CheckpointError
from fusionsum.pipeline.run import Run
try:
    with Run({str(run.folder)!r}).claimed():
        print("claimed")
except CheckpointError as error:
    print(error)
"""

    def other():
        environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    with run.claimed():
        (run.folder / "kept").touch()
        assert other().strip() == f"{run.folder}: another process is training in it: wait for it, or end it"
    assert other().strip() == "claimed"
    assert [path.name for path in run.folder.iterdir()] == ["kept"]


def test_a_folder_that_nothing_was_written_to_is_not_left_behind(tmp_path):
    with pytest.raises(ConfigError), Run(tmp_path / "run").claimed():
        raise ConfigError("bad")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="file: is a file: a run needs a folder"),
        Run(tmp_path / "file").claimed(),
    ):
        pass
