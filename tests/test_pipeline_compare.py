"""`fusionsum.pipeline.compare`: how often intervals hold the truth and tests are wrong, and the tests' definitions."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import missing

try:
    from scipy.stats import binomtest, ttest_rel

    from fusionsum.pipeline import compare
except ModuleNotFoundError as error:
    missing(str(error))


def test_intervals_hold_the_mean_of_95_of_100_samples(rng):
    inside = 0
    for _ in range(2000):
        found = compare.interval(rng.normal(3, 2, size=5).tolist())
        inside += found.low <= 3 <= found.high
    assert 0.935 <= inside / 2000 <= 0.965
    assert compare.interval([0.25]) == compare.Interval(0.25)
    assert str(compare.interval([0.25])) == "0.250"


def test_no_interval_leaves_the_range_of_its_metric():
    found = compare.interval([0.1, 0.9], (0, 1))
    assert (found.low, found.high) == (0, 1)
    assert str(found) == "0.500 ± 0.500"
    assert str(compare.interval([0.98, 0.99, 1.0], (0, 1))) == "0.990 (0.965 to 1.000)"
    rows = np.arange(1000)
    right = (rows < 900).astype(float)
    found = compare.difference([right], [(rows < 102).astype(float)], [rows])
    assert abs(found.mean - 0.798) <= 1e-12 and found.certain and found.seeds is None
    assert 0.77 <= found.rows.interval.low < 0.798 < found.rows.interval.high <= 0.83


def test_one_seed_is_mcnemars_test(rng):
    ours, theirs = (rng.random((2, 200)) < [[0.8], [0.75]]).astype(float)
    found = compare.difference([ours], [theirs], [np.arange(200)])
    won, lost = (ours > theirs).sum(), (ours < theirs).sum()
    assert found.rows.p == binomtest(won, won + lost).pvalue


@pytest.mark.parametrize("size", [60, 2 * compare.MANY])
@pytest.mark.parametrize("shape", ["right or wrong", "numbers", "groups", "seeds"])
def test_equal_models_differ_in_one_of_twenty_data_sets(size, shape, rng, monkeypatch):
    monkeypatch.setattr(compare, "RESAMPLED", 400)
    count = 200 if size == 60 else 100
    wrong = inside = 0
    for _ in range(count):
        seeds = 3 if shape == "seeds" else 1
        units = [np.arange(size) // 3 if shape == "groups" else np.arange(size)] * seeds
        alike = rng.normal(size=size)[units[0]]
        ours, theirs = ([alike * k + rng.normal(size=size) for _ in range(seeds)] for k in (1, -1))
        if shape == "right or wrong":
            ours, theirs = ([(x > 0).astype(float) for x in side] for side in (ours, theirs))
        found = compare.difference(ours, theirs, units).rows
        wrong += found.certain
        inside += found.interval.low <= 0 <= found.interval.high
    assert wrong / count <= 0.09
    assert inside / count >= 0.88


def test_seeds_are_a_paired_t_test(rng):
    ours, theirs = rng.normal(size=(2, 5, 40)) + np.array([[[0.3]], [[0]]])
    rows = [np.arange(40)] * 5
    found = compare.difference(list(ours), list(theirs), rows).seeds
    expected = ttest_rel(ours.mean(axis=1), theirs.mean(axis=1))
    ends = expected.confidence_interval()
    assert abs(found.p - expected.pvalue) <= 1e-12
    np.testing.assert_allclose([found.interval.low, found.interval.high], [ends.low, ends.high])
    wider = compare.difference(list(ours), list(theirs), rows, overlap=0.3).seeds.interval
    ratio = (wider.high - wider.low) / (ends.high - ends.low)
    assert abs(ratio - np.sqrt((1 / 5 + 0.3) / (1 / 5))) <= 1e-9


def test_models_that_answer_alike_are_not_told_apart():
    scores, rows = np.array([0.0, 1, 1]), np.arange(3)
    for seeds in (1, 2):
        found = compare.difference([scores] * seeds, [scores] * seeds, [rows] * seeds)
        assert found.mean == 0 and found.rows.p == 1 and not found.certain
        assert found.rows.interval.low is None


def test_what_one_of_the_two_sources_leaves_open_is_not_certain(rng):
    rows, better = np.arange(400), (np.arange(400) < 300).astype(float)
    worse = (rows < 200).astype(float)
    assert compare.difference([better], [worse], [rows]).certain
    unsure = compare.difference([better, worse], [worse, better], [rows, rows])
    assert not unsure.certain and not unsure.seeds.certain
