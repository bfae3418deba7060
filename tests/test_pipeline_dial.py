"""`fusionsum.pipeline.dial`: accuracies of layers on every dial's task, and their plot.

What lives elsewhere: the tasks (``test_pipeline_datasets.py``).
"""

from __future__ import annotations

import json

import pytest

from conftest import missing

try:
    from fusionsum.pipeline import datasets, dial
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Prepare a digits-dial of two dials and few rows."""
    monkeypatch.setattr(datasets, "COUNTS", {"test": 40, "validation": 20, "train": 64})
    monkeypatch.setattr(datasets, "DIALS", (0.0, 1.0))
    monkeypatch.setattr(dial, "DIALS", (0.0, 1.0))
    datasets.prepare("digits-dial", tmp_path)
    return tmp_path


def test_every_layer_is_measured_at_every_dial(few, monkeypatch, capsys):
    monkeypatch.setattr(dial, "LAYERS", {name: dial.LAYERS[name] for name in ("ResidualFusion", "concat linear")})
    dial.main([str(few), "--set", "train.seeds=2", "--set", "train.epochs=1"])
    curves = json.loads((few / "dial.json").read_text())
    assert {name: list(points) for name, points in curves.items()} == {name: ["0.0", "1.0"] for name in dial.LAYERS}
    assert all(0 <= v <= 1 for points in curves.values() for values in points.values() for v in values)
    assert all(len(values) == 2 for points in curves.values() for values in points.values())
    assert (few / "dial.svg").read_text().startswith("<svg")
    report = (few / "report.html").read_text()
    assert "Accuracy against the dial" in report
    assert "concat linear" in report
    assert "dial.json" in capsys.readouterr().out


def test_the_curves_have_a_value_for_each_seed_and_name_the_default():
    measured = {"ResidualFusion": {0.0: [0.8, 0.9], 1.0: [0.1, 0.2]}, "two": {0.0: [1.0, 1.0]}}
    curves = dial.drawing(measured)
    assert curves.x == [0.0, 1.0]
    assert curves.series["ResidualFusion"] == [[0.8, 0.9], [0.1, 0.2]]
    assert curves.series["two"] == [[1.0, 1.0], None]
    assert list(curves.marked) == ["ResidualFusion"]
