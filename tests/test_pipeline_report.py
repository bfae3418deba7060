"""`fusionsum.pipeline.report`: the page, its sentences and its tables, of the run's own rows and of other rows.

What lives elsewhere: the numbers (``test_pipeline_evaluate.py``), the training before (``test_pipeline_predictor.py``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    from fusionsum.pipeline import Evaluation, MultimodalPredictor, write_report
    from fusionsum.pipeline.charts import Curves
    from fusionsum.pipeline.config import from_mapping
    from fusionsum.pipeline.evaluate import Coverage, Measured
    from fusionsum.pipeline.manifest import Manifest
    from fusionsum.pipeline.report import readable, verdicts
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the made-up rows, and a manifest for each task."""
    return made_up.folder(tmp_path_factory.mktemp("made-up"))


def written(evaluation, place):
    """Write the report; return its page, parsed, and its source."""
    write_report(place, evaluation)
    page, html = made_up.Page(), (place / "report.html").read_text(encoding="utf-8")
    page.feed(html)
    return page, html


@pytest.mark.parametrize("task", made_up.TASKS)
def test_the_report_of_a_run(folder, tmp_path, task):
    given = made_up.config(folder, **made_up.TASKS[task], train={"epochs": 1})
    evaluation = MultimodalPredictor(given).fit(folder / f"{task}.csv", progress=False).evaluate(progress=False)
    page, html = written(evaluation, tmp_path)
    assert not page.open and not page.loads
    assert "http" not in html.replace('xmlns="http://www.w3.org/2000/svg"', "")
    for sentence in verdicts(evaluation):
        assert sentence in page.text
    metrics = evaluation.results["test"]["fused"]["all"]
    for name in metrics:
        assert readable(name).split(" ")[-1] in page.text
    for expected in (
        f"{made_up.ROWS} of {task}.csv",
        "the manifest’s",
        "items in both train and test",
        "Test split “test”",
    ):
        assert expected in page.text
    found = json.loads((tmp_path / "metrics.json").read_text())["test"]["fused"]["all"]
    assert {name: summary["seeds"] for name, summary in found.items()} == metrics
    plots = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert {"training-train", "training-validation", "models-test", "differences-test", "parts-test"} <= plots
    assert ("confusion-test" in plots) == (task == "classification")


@pytest.mark.parametrize("split", ["manifest", "by-seed"])
def test_the_report_of_other_rows_tells_of_no_split_of_theirs(folder, tmp_path, split):
    given = made_up.config(folder, data={"split": split, "test_share": 0.3}, train={"epochs": 1}, baselines=[])
    predictor = MultimodalPredictor(given).fit(folder / "classification.csv", progress=False)
    rows = made_up.write(tmp_path / "other.csv", made_up.rows(tmp_path, 12))
    page, html = written(predictor.evaluate(rows, progress=False), tmp_path)
    assert "12 of other.csv" in page.text and "none: every row is evaluated" in page.text
    data = re.search(r">Data</h2>.*?</table>", html, re.DOTALL)[0]
    cells = re.findall(r"<t[hd] [^>]*>(?:<span>)?(.*?)(?:</span>)?</t[hd]>", data)
    assert cells[:3] == ["modality", "kind", "given"]
    assert cells[3:6] == ["image", "image", "12 of 12"] and len(cells) == 3 * (1 + len(made_up.MODALITIES))
    for invented in ("Test split", "splits of the first seed", "drawn by group", "the manifest’s", "test rows overlap"):
        assert invented not in page.text


def test_rows_that_were_left_out_are_listed(folder, tmp_path):
    rows = made_up.rows(tmp_path)
    (tmp_path / "0.png").write_bytes(b"broken")
    path = made_up.write(tmp_path / "m.csv", rows)
    given = made_up.config(tmp_path, data={"on_error": "skip"}, train={"seeds": 1, "epochs": 1}, baselines=[])
    evaluation = MultimodalPredictor(given).fit(path, progress=False).evaluate(progress=False)
    page, _ = written(evaluation, tmp_path / "report")
    assert "1 rows were left out" in page.text and "m.csv:2, column 'image'" in page.text


def made(scores, kind="classification", split="manifest", groups=None, metric="accuracy", classes=("a", "b"), **task):
    """Make an evaluation of rows whose scores are given: by model, for each seed."""
    config = from_mapping({"modalities": {"a": {"kind": "text"}, "b": {"kind": "text"}}, "task": {"kind": kind} | task})
    sign = -1 if metric == "mae" else 1
    size, seeds = len(scores["fused"][0]), len(scores["fused"])
    cells = {"id": [f"r{i}" for i in range(size)], "label": ["a"] * size}
    cells["group"] = [""] * size if groups is None else list(map(str, groups))
    manifest = Manifest("m.csv", Path(), cells, range(2, size + 2))
    measured = [
        Measured(
            {
                name: {"all": {metric: sign * float(np.mean(values[s]))}}
                for name, values in scores.items()
                if name != "chance"
            },
            np.arange(size),
            np.zeros(size, dtype=int),
            {name: np.asarray(values[s], dtype=float) for name, values in scores.items()},
            {},
        )
        for s in range(seeds)
    ]
    coverage = {"a": Coverage({"train": (size, size), "test": (size, size)}, 0)}
    names = [name for name in scores if name != "chance"]
    counts = dict.fromkeys((name for name in names if name != "score-sum"), 7)
    logs = {(name, s): [{"train_loss": 1.0}] for name in counts for s in range(seeds)}
    return Evaluation(config, {"test": measured}, split, manifest, [], counts, logs, classes, coverage)


def right(share, size=1000):
    return (np.arange(size) < share * size).astype(float)


def test_one_seed_is_judged_by_its_rows():
    """As found by a user: 1,000 rows, .874 against .102, and the headline was that it cannot be told from it."""
    evaluation = made({"fused": [right(0.874)], "a alone": [right(0.102)], "chance": [right(0.1)]})
    first, second = verdicts(evaluation)
    assert first == "On “test” (1,000 rows, one seed), fused: ResidualFusion has the best accuracy: 0.874."
    assert second == "Fused: ResidualFusion is better than a alone (by 0.772)."


def test_who_is_worse_is_said():
    half = [right(0.5), np.roll(right(0.5), 7)]
    little = [right(0.502), np.roll(right(0.502), 7)]
    said = made(
        {"fused": half, "mlp": little, "score-sum": [right(0.9)] * 2, "a alone": [right(0.1)] * 2, "chance": half}
    )
    first, second, third, fourth, fifth = verdicts(said)
    assert "score sum has the best accuracy, 0.900 ± 0.000; fused: ResidualFusion reaches 0.500 ± 0.000." in first
    assert second == "That score sum is better than fused: ResidualFusion is certain."
    assert third == (
        "Fused: ResidualFusion is better than a alone (by 0.400); it is worse than score sum (by 0.400); it cannot be told "
        "from concat-MLP, equal parameters (which is 0.002 better)."
    )
    assert "It is not certain that fused: ResidualFusion is better than no model at all" in fourth
    assert fifth == "On “test” a simple sum of the unimodal models’ scores is better than learned fusion."


def test_of_errors_less_is_better():
    small, large = -np.full(50, 0.1) - right(0.5, 50), -np.full(50, 3.0) - right(0.5, 50)
    first, second = verdicts(made({"fused": [small], "mlp": [large], "chance": [large]}, "regression", metric="mae"))
    assert "fused: ResidualFusion has the best mean absolute error: 0.600" in first
    assert "is better than concat-MLP, equal parameters (by 2.900)" in second


def test_rows_of_a_group_count_as_one():
    ours, theirs = right(0.6, 300), right(0.4, 300)
    rows = {"fused": [ours], "mlp": [theirs]}
    assert made(rows).differences("test")["mlp"].certain
    assert not made(rows, groups=np.arange(300) // 60).differences("test")["mlp"].certain


def test_drawn_splits_overlap():
    rng = np.random.default_rng(0)
    rows = {name: list(rng.random((3, 200)) < share) for name, share in (("fused", 0.8), ("mlp", 0.6))}
    plain, drawn = (made(rows, split=split).differences("test")["mlp"].seeds for split in ("manifest", "by-seed"))
    assert drawn.p > plain.p
    assert made(rows)._compared == {} and made(rows).contenders == {"test": ["fused"]}


def test_imbalance_is_a_warning():
    evaluation = made({"fused": [right(0.95)], "chance": [right(0.95)]})
    measured = evaluation.measured["test"][0]
    for level, warned in ((0.95, True), (0.6, False)):
        measured.levels["accuracy"] = level
        assert any(
            sentence.startswith("Beware: 95% of the rows are of one class") for sentence in verdicts(evaluation)
        ) == (warned)


def test_the_best_calibration_is_no_model_at_chance(tmp_path):
    evaluation = made({"fused": [right(0.8)], "mlp": [right(0.1)], "chance": [right(0.1)]})
    for name, gap in (("fused", 0.1), ("mlp", 0.001)):
        evaluation.measured["test"][0].metrics[name]["all"]["ece"] = gap
    _, html = written(evaluation, tmp_path)
    assert '<span class="best">0.100</span>' in html and '<span class="best">0.001</span>' not in html
    assert all(f'data-label="parameters"><span>{n}</span>' in html for n in ("7",))


def test_differences_are_written_with_both_tests(tmp_path):
    evaluation = made({"fused": [right(0.8)] * 2, "mlp": [right(0.1)] * 2})
    write_report(tmp_path, evaluation)
    found = json.loads((tmp_path / "differences.json").read_text())["test"]["mlp"]
    assert abs(found["mean"] - 0.7) <= 1e-9 and found["certain"]
    assert found["rows"]["low"] < 0.7 < found["rows"]["high"] and found["rows"]["p"] < 0.01
    assert found["seeds"]["p"] == 0


def test_curves_of_ones_own_and_the_command_are_shown(tmp_path):
    evaluation = made({"fused": [right(0.8)], "mlp": [right(0.1)]})
    dial = Curves(
        "The dial", "share of interaction", "accuracy", [0, 0.5, 1], {"sum": [[0.9], [0.5, 0.6], None]}, "Note."
    )
    write_report(tmp_path, evaluation, ["A last word."], [dial], "fusionsum evaluate run")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for expected in ("<h2>The dial</h2>", "Note.", "A last word.", "fusionsum evaluate run", " UTC</dd>"):
        assert expected in html
    assert (tmp_path / "plots" / "The-dial.svg").exists()


def test_the_report_of_several_labels(folder, tmp_path):
    rows = [
        row | {"label": f"{row['label']}|{'odd' if i % 2 else 'even'}"} for i, row in enumerate(made_up.rows(tmp_path))
    ]
    rows[0]["label"] = ""
    path = made_up.write(tmp_path / "m.csv", rows)
    config = made_up.config(tmp_path, task={"kind": "multilabel"}, train={"epochs": 1})
    evaluation = MultimodalPredictor(config).fit(path, progress=False).evaluate(progress=False)
    page, html = written(evaluation, tmp_path / "report")
    assert not page.open and not page.loads
    for sentence in verdicts(evaluation):
        assert sentence in page.text
    for name in evaluation.results["test"]["fused"]["all"]:
        assert readable(name).split(" ")[-1] in page.text
    for label in (*made_up.COLOURS, "odd", "even"):
        assert re.search(rf"<th[^>]*>(<span>)?{label}", html)


ODD = ["under $5", "$5_$10", "<b>&", "猫が好き", "a" * 300]


def test_labels_of_any_characters(folder, tmp_path):
    rows = made_up.rows(tmp_path)
    for i, row in enumerate(rows):
        number = (i % len(made_up.COLOURS) + 3 * (i // 12 % 2)) % len(ODD)  # each split has all of them
        row |= {"label": ODD[number], "text": f"{row['text']} $x_{{1}} <i>"}
    path = made_up.write(tmp_path / "m.csv", rows)
    config = made_up.config(tmp_path, train={"seeds": 1, "epochs": 1}, baselines=[])
    evaluation = MultimodalPredictor(config).fit(path, progress=False).evaluate(progress=False)
    page, html = written(evaluation, tmp_path / "report")
    assert "<b>&" in page.text and "<i>" in page.text and "<b>&" not in html and "<i>" not in html
    for name in ODD[:4]:
        assert name in page.text
    for path in (tmp_path / "report" / "plots").iterdir():
        ElementTree.parse(path)
