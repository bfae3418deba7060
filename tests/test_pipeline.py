"""`fusionsum.pipeline` as a whole: the demo in a short form, and the message for missing packages.

What lives elsewhere: each file of it, ``test_pipeline_<file>.py``; the command line (``test_main.py``).
"""

from __future__ import annotations

import pytest

from conftest import missing, run_python

try:
    import torch

    from fusionsum.nn import ResidualFusion
    from fusionsum.pipeline import demo
except ModuleNotFoundError as error:
    missing(str(error))


def test_the_naive_head_computes_the_same():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fused = ResidualFusion((5, 4), 3, 6)
        features = [torch.randn(8, d, requires_grad=True) for d in (5, 4)]
    naive = demo.NaiveFusion(fused)
    leaves = [*features, *fused.parameters()]
    ours, theirs = fused(*features), naive(*features)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), leaves), torch.autograd.grad(theirs.square().sum(), leaves)
    )


def test_demo_writes_its_report(tmp_path, capsys):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    results = demo.demonstrate(tmp_path / "report", seeds=2, steps=3, timed_pairs=2).results
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert list(results) == ["unseen words", "unseen languages"]
    models = list(results["unseen words"])
    assert models == ["fused", "image alone", "text alone", "concat-linear", "mlp", "late-product", "score-sum"]
    said = capsys.readouterr().out
    assert "the label is constructed" in said
    assert "whole training step" in said
    assert said.count("\n| ") == 1 + len(models)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "the label is constructed" in page
    assert "whole training step" in page


@pytest.mark.parametrize(
    "command", [["demo"], ["prepare", "digits-sum"], ["train", "x.yaml", "--out", "y"], ["evaluate", "y"]]
)
def test_a_missing_package_is_named_with_the_remedy(command):
    code = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("num2words", "tqdm") else real(name, *a)
from fusionsum.__main__ import main
sys.stderr = sys.stdout
assert main({command!r}) == 1
"""
    assert (
        run_python(code).strip().endswith("fusionsum.pipeline needs num2words, tqdm: pip install 'fusionsum[pipeline]'")
    )
