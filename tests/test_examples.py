"""The scripts in ``examples/``: each runs, its own comparison holds, and it prints what it compared.

What lives elsewhere: the losses and ranks that they use, by formula (``test_nn_losses.py``, ``test_nn_scores.py``). The
packages that scripts compare with are not among the tests' own: without one its script's test is skipped, or fails where
FUSIONSUM_REQUIRE_EXAMPLES=1, as in CI.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from conftest import missing, source

SCRIPTS = {
    "open_clip_losses": ("open_clip", ["ClipLoss -> ContrastiveLoss", "SigLipLoss -> SigmoidLoss"]),
    "open_clip_ranks": ("open_clip", ["ClipLoss -> contrastive_loss, 2 ranks", "SigLipLoss -> sigmoid_loss, 2 ranks"]),
    "sentence_transformers_losses": (
        "sentence_transformers",
        ["\nCachedMultipleNegativesRankingLoss, 512 anchors", "MultipleNegativesRankingLoss, 512 anchors"],
    ),
    "knowledge_graph": ("pykeen", ["MRR      PyKEEN", "hits@10  PyKEEN"]),
    "missing_modalities": ("torch", ["\nall there, zeros", "\n30% withheld, present="]),
    "hard_negatives": ("torch", ["mined negatives: R@1, R@10\n", "\n    6 "]),
    "interaction": ("torch", ["\nLateFusion (a sum)", "\nMUTAN", "\nthose at chance, the rest right"]),
}


def test_every_script_is_run():
    assert {path.stem for path in source("examples").glob("*.py")} == SCRIPTS.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, tmp_path):
    package, lines = SCRIPTS[name]
    for needed in ("torch", package):
        if find_spec(needed) is None:
            missing(needed, "FUSIONSUM_REQUIRE_EXAMPLES")
    places = {name: str(tmp_path) for name in ("PYSTOW_HOME", "HF_HOME")}  # what the packages may write goes here
    command = [sys.executable, "-W", "ignore", str(source("examples") / f"{name}.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | places | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for line in lines:
        assert line in done.stdout
