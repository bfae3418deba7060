"""`fusionsum.pipeline.run`: the files of a training's folder, what is refused, checkpoints of before.

What lives elsewhere: checkpoints that a training resumes from (``test_pipeline_train.py``), whole runs
(``test_pipeline_predictor.py``).
"""

from __future__ import annotations

import csv

import pytest

from conftest import missing

try:
    import torch

    from fusionsum.pipeline import CheckpointError, ConfigError
    from fusionsum.pipeline.config import from_mapping
    from fusionsum.pipeline.run import Run, read_checkpoint, write_checkpoint
except ModuleNotFoundError as error:
    missing(str(error))

IDENTITY = {"train": {"epochs": 4}, "manifest": "m"}
WEIGHTS = {"weight": torch.arange(3.0)}
HISTORY = [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25}]


@pytest.fixture
def run(tmp_path):
    """Write a run of a model whose training is done and one whose is not."""
    found = Run(tmp_path / "run")
    write_checkpoint(found.checkpoint("image alone", 0), IDENTITY, WEIGHTS, HISTORY, True)
    write_checkpoint(
        found.checkpoint("fused", 0), IDENTITY, WEIGHTS, HISTORY[:1], False, {"generator": WEIGHTS["weight"]}
    )
    found.write_fitted(0, {"task": {"classes": ["a", "b"]}, "fitted": {}})
    found.write_config(from_mapping({"modalities": {"words": {"kind": "text"}}}))
    return found


def test_everything_comes_back_as_it_was_written(run):
    fitted, checkpoints = run.read(["image alone"], 0)
    assert fitted == {"task": {"classes": ["a", "b"]}, "fitted": {}}
    state = checkpoints["image alone"]
    assert (state["identity"], state["history"], state["done"]) == (IDENTITY, HISTORY, True)
    assert torch.equal(state["model"]["weight"], WEIGHTS["weight"])
    assert torch.equal(read_checkpoint(run.checkpoint("fused", 0), IDENTITY)["generator"], WEIGHTS["weight"])
    assert list(run.config().modalities) == ["words"]
    run.write_log({("fused", 0): HISTORY[:1], ("image alone", 0): HISTORY})
    for name, rows in (("log.csv", 3), ("checkpoints/image-alone-0.csv", 2)):
        with (run.folder / name).open(encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == rows
    assert not list(run.folder.rglob("*.partial"))


def test_a_run_that_is_not_done_or_not_there_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="the training of 'fused', seed 0, is not done: --resume"):
        run.read(["image alone", "fused"], 0)
    with pytest.raises(CheckpointError, match=r"fused-1\.pt: cannot be read"):
        run.read(["fused"], 1)
    with pytest.raises(CheckpointError, match="is a run already"):
        run.must_be_new()
    nowhere = Run(tmp_path / "nowhere")
    nowhere.must_be_new()
    nowhere.must_be_of(IDENTITY)
    with pytest.raises(ConfigError, match="nowhere"):
        nowhere.config()


def test_another_configuration_is_refused(run):
    run.must_be_of(IDENTITY)
    with pytest.raises(CheckpointError, match=r"another configuration .*manifest: 'm' and 'n'"):
        run.must_be_of(IDENTITY | {"manifest": "n"})


def test_a_checkpoint_without_identity_is_read_but_not_resumed(tmp_path):
    """`MultimodalPredictor.save` once wrote such files."""
    path = tmp_path / "fused-0.pt"
    torch.save({"model": WEIGHTS, "history": HISTORY, "done": True}, path)
    assert read_checkpoint(path)["history"] == HISTORY
    with pytest.raises(CheckpointError, match=r"fused-0\.pt: does not say of which configuration"):
        read_checkpoint(path, IDENTITY)
