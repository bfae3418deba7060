"""`fusionsum.pipeline.charts`: that marks stand where their values are, text is text, and files are whole."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from conftest import missing

try:
    from fusionsum.pipeline import charts
except ModuleNotFoundError as error:
    missing(str(error))

ODD = "under $5 & $5_$10 <b> 猫"
SVG = "{http://www.w3.org/2000/svg}"


def percent(element, name):
    return float(element.get(name).removesuffix("%"))


def test_marks_of_strips_stand_where_their_values_are():
    rows = [
        charts.Strip(ODD, "0.5", thick=(0.4, 0.6), thin=(0.0, 1.0), dot=0.5),
        charts.Strip("short", bar=(0.25, 0), dot=1.0, certain=False),
    ]
    tree = ElementTree.fromstring(charts.strips("A title", rows, {0.2: "chance"}, 0, 1))
    assert tree.find(f"{SVG}title").text == "A title" and tree.get("role") == "img"
    assert ODD in [text.text for text in tree.iter(f"{SVG}text")]
    axis = [percent(x, "x1") for x in tree.iter(f"{SVG}line") if x.get("class") == "grid"]
    low, high = axis[0], axis[-1]  # at 0 and 1
    place = {value: low + (high - low) * value for value in (0, 0.2, 0.25, 0.4, 0.5, 0.6, 1)}
    lines = {x.get("class"): x for x in tree.iter(f"{SVG}line")}
    for name, ends in {"thick other": (0.4, 0.6), "thin other": (0, 1), "level": (0.2, 0.2)}.items():
        for key, value in zip(("x1", "x2"), ends, strict=True):
            assert abs(percent(lines[name], key) - place[value]) <= 0.01
    first, second = tree.iter(f"{SVG}circle")
    assert abs(percent(first, "cx") - place[0.5]) <= 0.01 and "unsure" not in first.get("class")
    assert abs(percent(second, "cx") - place[1]) <= 0.01 and "unsure" in second.get("class")
    (bar,) = tree.iter(f"{SVG}rect")
    assert abs(percent(bar, "x") - place[0]) <= 0.01
    assert abs(percent(bar, "width") - (place[0.25] - place[0])) <= 0.01


def test_an_axis_holds_all_marks():
    rows = [charts.Strip("a", dot=-3.0), charts.Strip("b", thin=(-5.0, 7.0))]
    for element in ElementTree.fromstring(charts.strips("t", rows, {9: "far"}, 0, 1)).iter():
        for name in ("x1", "x2", "cx"):
            if name in element.attrib and element.get("class") != "grid":
                assert 0 <= percent(element, name) <= 100


def test_curves_go_through_their_points_and_bands_hold_them():
    given = charts.Curves(
        "t", "x", "y", [0, 1, 2], {"a": [[1.0], [2.0, 4.0], [5.0]], ODD: [None, [3.0], None]}, bounds=(0, 5)
    )
    tree = ElementTree.fromstring(charts.lines(given, height=100))
    first, second = [x.get("points").split() for x in tree.iter(f"{SVG}polyline")]
    assert first == ["0.00,80.00", "50.00,40.00", "100.00,0.00"] and second == ["50.00,40.00"]
    (band,) = tree.iter(f"{SVG}polygon")
    assert {"50.00,60.00", "50.00,20.00"} <= set(band.get("points").split())
    assert len(list(tree.iter(f"{SVG}circle"))) == 4


def test_curves_that_share_a_colour_are_told_apart_by_dashes():
    names = [f"curve {k}" for k in range(charts.COLOURS + 2)]
    tree = ElementTree.fromstring(charts.lines(charts.Curves("t", "x", "y", [0, 1], {n: [[0], [1]] for n in names})))
    kinds = [line.get("class") for line in tree.iter(f"{SVG}polyline")]
    assert len(set(kinds)) == len(names)


@pytest.mark.parametrize("low, high", [(0, 1), (0.26, 0.94), (-3, 1200), (1e-6, 3e-6), (5, 5), (-1, 1e12)])
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 * abs(high) <= value <= high + 1e-9 * abs(high) for value in found)
    assert np.allclose(np.diff(found, 2), 0, atol=1e-9 * abs(high))


def test_the_diagram_of_calibration_and_the_matrix():
    count, confidence, accuracy = np.array([0, 10, 40]), np.array([np.nan, 0.5, 0.9]), np.array([np.nan, 0.5, 0.6])
    tree = ElementTree.fromstring(charts.reliability("t", count, confidence, accuracy))
    small, large = tree.iter(f"{SVG}circle")
    assert float(small.get("r")) < float(large.get("r"))
    assert "40 rows: confidence 0.900, accuracy 0.600" in large.find(f"{SVG}title").text
    shares = np.array([[0.9, 0.1], [0.004, 0.996]])
    tree = ElementTree.fromstring(charts.matrix("t", shares, [ODD, "b" * 100]))
    assert [float(x.get("style").split(":")[1]) for x in tree.iter(f"{SVG}rect")] == [0.9, 0.1, 0.004, 0.996]
    numbers = [x.text for x in tree.iter(f"{SVG}text") if x.get("class") in ("on", "off")]
    assert numbers == ["90", "10", "100"]


def test_a_file_is_a_drawing_with_its_colours(tmp_path):
    charts.write(tmp_path / "a.svg", charts.strips("t", [charts.Strip(ODD, dot=1.0)], {}, 0, 1))
    tree = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert tree.get("width") == "720"
    used = set(re.findall(r"var\((--\w+)", tree.find(f"{SVG}style").text))
    assert used and all(f"{name}:" in tree.find(f"{SVG}style").text for name in used - {"--share"})
