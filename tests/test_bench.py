"""The benchmark runs and reports. No test here looks at a time; what is measured is the bench's own business."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _bench_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1]))  # bench/ is not installed


def test_rows_are_those_of_the_floors():
    from bench import rows

    assert [row.name for row in rows.select("")] == [
        *"P1 P2 P3 P4".split(),
        "P5 bf16",
        "P5 f16",
        *"P6 P7 P8 P9 P10".split(),
    ]
    assert [row.name for row in rows.select("P10, P5")] == ["P5 bf16", "P5 f16", "P10"]
    with pytest.raises(SystemExit, match="P11"):
        rows.select("P11")
    for row in rows.ROWS:
        assert {floor.phase for floor in row.floors} <= set(row.phases)
        assert math.prod(np.broadcast_shapes(row.weights, *row.shapes)) == math.prod(np.broadcast_shapes(*row.shapes))


def test_traffic_and_work_are_those_of_the_formulas():
    from bench import rows

    paired, three = (next(row for row in rows.ROWS if row.name == name) for name in ("P5 bf16", "P6"))
    terms = 65536 * 512
    assert list(paired.bytes.values()) == [2 * 2 * terms, 4 * 2 * terms, 6 * 2 * terms]
    assert list(paired.flop.values()) == [3 * terms, 6 * terms, 9 * terms]
    assert three.flop[rows.BACKWARD] == 4 * 3 * 16384 * 512


def test_a_run_reports(tmp_path, monkeypatch):
    from bench import __main__, measure

    monkeypatch.setattr(measure, "BATCH_SECONDS", 1e-5)
    options = __main__.parse(["--quick", "--rows", "P4", "--threads", "1", "--out", str(tmp_path)])
    options.pairs = 1
    threads = torch.get_num_threads()
    try:
        path = __main__.run(options)
    finally:
        measure.set_threads(threads)
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert set(row["phases"]) == {"forward", "forward + backward"}
    assert set(row["skipped"]) == {"torch.compile", "limit"}
    assert all(phase["error"]["ours"] < 1e-5 for phase in row["phases"].values())
    table = path.read_text()
    assert table.count("| P4 |") == 2 and "≥ 1.80" in table
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_layer_is_measured_and_held_to_the_published_code(monkeypatch):
    from tqdm import tqdm

    from bench import layers, measure, rows

    row = rows.select("L1", layers.LAYERS)[0]
    assert {name.split()[0] for name in (row.name for row in layers.LAYERS)} == {"L1", "L2", "L3"}
    monkeypatch.setattr(measure, "BATCH_SECONDS", 1e-5)
    with tqdm(disable=True) as bar:
        found = measure.measure(row, 1, torch.get_num_threads(), False, bar)
    assert [floor["against"] for floor in found["floors"]] == ["naive"]
    assert all(phase["error"]["ours"] < 1e-5 for phase in found["phases"].values())
    wrong = dataclasses.replace(row, codes={"naive": lambda *given: row.codes["naive"](*given) * 1.001})
    with pytest.raises(AssertionError, match="ours differs from naive"):
        measure.layer_errors(wrong)


def test_a_contender_that_disagrees_is_not_timed():
    from bench import measure, rows

    (row,) = rows.select("P4")
    entered, _ = measure.contenders(row, compiled=False)
    measure.errors(row, entered)
    right = entered["einsum"].forward
    entered["einsum"].forward = lambda: right() * 1.001
    with pytest.raises(AssertionError, match="einsum and fusion_sum differ"):
        measure.errors(row, entered)
