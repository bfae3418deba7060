"""`fusionsum.pipeline.report`: the page, its sentences and its tables, of the run's own rows and of other rows.

What lives elsewhere: the numbers (``test_pipeline_evaluate.py``), the training before (``test_pipeline_predictor.py``).
"""

from __future__ import annotations

import json
import re

import pytest

import made_up
from conftest import missing

try:
    from fusionsum.pipeline import Evaluation, MultimodalPredictor, write_report
    from fusionsum.pipeline.config import from_mapping
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
    assert "http" not in re.sub(r'(xmlns(:\w+)?|rdf:resource)="[^"]*"|http://\S+\.dtd|http\S*matplotlib\S*', "", html)
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
    assert {"training", "models-test"} <= plots
    assert ("confusion-test" in plots) == (task == "classification")


@pytest.mark.parametrize("split", ["manifest", "by-seed"])
def test_the_report_of_other_rows_tells_of_no_split_of_theirs(folder, tmp_path, split):
    given = made_up.config(folder, data={"split": split, "test_share": 0.3}, train={"epochs": 1}, baselines=[])
    predictor = MultimodalPredictor(given).fit(folder / "classification.csv", progress=False)
    rows = made_up.write(tmp_path / "other.csv", made_up.rows(tmp_path, 12))
    page, html = written(predictor.evaluate(rows, progress=False), tmp_path)
    assert "12 of other.csv" in page.text and "none: every row is evaluated" in page.text
    data = re.search(r"<h2>Data</h2>.*?</table>", html, re.DOTALL)[0]
    cells = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", data)
    assert cells[:3] == ["", "kind", "given"]
    assert cells[3:6] == ["image", "image", "12 of 12"] and len(cells) == 3 * (1 + len(made_up.MODALITIES))
    for invented in ("Test split", "first seed", "drawn by group", "the manifest’s", "test rows overlap"):
        assert invented not in page.text


def test_rows_that_were_left_out_are_listed(folder, tmp_path):
    rows = made_up.rows(tmp_path)
    (tmp_path / "0.png").write_bytes(b"broken")
    path = made_up.write(tmp_path / "m.csv", rows)
    given = made_up.config(tmp_path, data={"on_error": "skip"}, train={"seeds": 1, "epochs": 1}, baselines=[])
    evaluation = MultimodalPredictor(given).fit(path, progress=False).evaluate(progress=False)
    page, _ = written(evaluation, tmp_path / "report")
    assert "1 rows were left out" in page.text and "m.csv:2, column 'image'" in page.text


def test_verdicts_say_who_wins_and_by_how_much():
    said = {
        "fused": [0.5, 0.6, 0.7],
        "mlp": [0.4, 0.5, 0.6],
        "score-sum": [0.7, 0.8, 0.9],
        "concat-linear": [0.7, 0.5, 0.9],
        "late-product": [0.2, 0.7, 0.6],
    }
    results = {"test": {name: {"all": {"accuracy": values}} for name, values in said.items()}}
    config = from_mapping({"modalities": {"a": {"kind": "text"}, "b": {"kind": "text"}}})
    evaluation = Evaluation(config, results, "manifest", "m.csv", 3, [], {}, {}, (), {}, {}, {})
    first, second = verdicts(evaluation)
    assert "; it beats concat-MLP, equal parameters (by 0.100); loses to score sum (by 0.200); " in first
    assert first.endswith("cannot be told from concat linear (better by 0.100), late product (worse by 0.100).")
    assert second == "On “test” a simple sum of the unimodal models’ scores is better than learned fusion."
    results["test"]["score-sum"]["all"]["accuracy"] = said["concat-linear"]
    (only,) = verdicts(evaluation)
    assert "loses" not in only
