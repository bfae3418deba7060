"""What is predicted of the bench's rows on a GPU is what the code does now; and the report that has measurements beside.

What lives elsewhere: how it is predicted (``predictions.py``). Instructions, which take minutes to count, are not held.
"""

from __future__ import annotations

import json

import pytest
import torch

from bench import rows, scores
from tests.cuda import predictions, report

HELD = "launches", "bound", "flop"  # of the committed predictions


@pytest.fixture(scope="module")
def committed():
    return json.loads(predictions.JSON.read_text())


def test_what_is_cheap_to_count_is_what_was_committed(committed):
    """If not, `python -m tests.cuda.predictions` writes it anew."""
    found = dict(predictions.rows(predictions.costs(None)))
    assert list(found) == list(committed["rows"])
    assert {row.name for row in (*rows.CUDA_ROWS, *scores.on_gpu(scores.SCORES))} == set(found)
    for name, phases in found.items():
        for phase, p in phases.items():
            assert {key: getattr(p, key) for key in HELD} == {
                key: committed["rows"][name][phase][key] for key in HELD
            }, (name, phase)
            if name.startswith("C"):  # of the others they are the interpreter's
                assert p.bytes == committed["rows"][name][phase]["bytes"]
    assert predictions.TABLE.read_text() == predictions.table(committed)


def test_products_of_matrices_are_those_of_the_rows():
    """By another count of the same: what the bench says must be multiplied."""
    by_name = {row.name: row for row in scores.SCORES}
    for name in ("C1 n=64", "C3 n=512", "C4 n=64", "C8 bf16, C3 n=512", "C9", "C10"):
        for phase, flop in by_name[name].flop.items():
            done = sum(flop for _, _, flop, _, _ in predictions.record(by_name[name], phase).calls)
            assert done == flop, (name, phase)


def test_what_reads_a_value_of_a_gpu_is_an_error():
    row = next(row for row in scores.QUICK_SCORES if row.name == "C5 k=10")

    def reading(f, g):
        values, _ = row.codes["ours"](f, g)
        return values * float(values.sum())

    with pytest.raises(RuntimeError, match="meta"):
        predictions.record(rows.replace(row, codes={"ours": reading}), rows.FORWARD)


def test_the_longest_of_three_times():
    gpu = predictions.Gpu("made up", 1e9, 1e12, 1e10, multiprocessors=10, clock=1e6)
    launch = predictions.Launch("", bytes=2 * 10**6, flop=10**7, instructions=10**6, blocks=100)
    assert gpu.seconds(launch) == 2e-3
    assert gpu.seconds(launch._replace(flop=10**8)) == 1e-2
    assert gpu.seconds(launch._replace(flop=10**8, dtype=torch.bfloat16)) == 2e-3
    assert gpu.seconds(launch._replace(instructions=128 * 10**6)) == pytest.approx(0.1)
    assert gpu.seconds(launch._replace(instructions=128 * 10**6, blocks=2)) == pytest.approx(0.5)


MADE_UP = {
    "gpus": {"H100": {}},
    "launch": 2e-6,
    "rows": {
        "P1": {"forward": {"launches": 1, "seconds": {"H100": 1e-4}}},
        "C3": {"forward": {"launches": 100, "seconds": {"H100": 5e-5}}},
        "C3 graph": {"forward": {"launches": 100, "seconds": {"H100": 5e-5}}},
    },
}


def measured(gpu, **seconds):
    phases = {name.replace("_", " "): {"forward": {"seconds": x}} for name, x in seconds.items()}
    return {"machine": {"gpu": {"name": gpu}}, "rows": [{"name": name, "phases": x} for name, x in phases.items()]}


def test_predictions_beside_measurements():
    found = report.beside(MADE_UP, measured("NVIDIA H100 80GB HBM3", P1=1.5e-4, C3=3e-4, C3_graph=1e-4, C11=1.0))
    lines = [line.strip("| ").split(" | ") for line in found.splitlines()[4:]]
    assert lines == [
        ["P1", "forward", "100 µs", "1: 2 µs", "150 µs", "1.50×"],
        ["C3", "forward", "50 µs", "100: 200 µs", "300 µs", "1.50×"],
        ["C3 graph", "forward", "50 µs", "100: 200 µs", "100 µs", "2.00×"],
        ["C11", "forward", "–", "–", "1e+03 ms", "–"],
    ]
    assert "for the H100 (SXM)" in found
    of_another = report.beside(MADE_UP, measured("Tesla T4", P1=1.5e-4))
    assert "nothing is predicted for it" in of_another
    assert of_another.endswith("| P1 | forward | – | – | 150 µs | – |")


def test_a_report_of_what_there_is(tmp_path, committed):
    (tmp_path / "summary.txt").write_text("tools  passed\n")
    report.main([str(tmp_path)])
    assert "tools  passed" in (tmp_path / "report.md").read_text()
    assert "Nothing was measured" in (tmp_path / "report.md").read_text()
    (tmp_path / "bench").mkdir()
    every = {name: {phase: {"seconds": 1e-3} for phase in phases} for name, phases in committed["rows"].items()}
    given = {"machine": {"gpu": {"name": "NVIDIA A100-SXM4-80GB"}}}
    given["rows"] = [{"name": name, "phases": phases} for name, phases in every.items()]
    (tmp_path / "bench" / "bench.json").write_text(json.dumps(given))
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert text.count("×") == sum(map(len, every.values()))
