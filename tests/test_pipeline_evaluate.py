"""`fusionsum.pipeline.evaluate`: every metric against its definition written out, combinations, withheld modalities."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import missing

try:
    import torch
    from torch import nn

    from fusionsum.pipeline import evaluate
    from fusionsum.pipeline.config import from_mapping
    from fusionsum.pipeline.fuse import FusionModel
    from fusionsum.pipeline.preprocess import Column
    from fusionsum.pipeline.train import Rows
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_combinations_are_products_and_sums_over_the_modalities_of_a_row():
    known = np.array([[True, True, False], [True, False, False]])
    logits = np.log([[[0.9, 0.1], [0.8, 0.2], [0.5, 0.5]], [[0.2, 0.8], [0.5, 0.5], [0.5, 0.5]]])
    galleries = [np.eye(2), np.eye(2) + 1]
    parts = [evaluate.Outputs(*part) for part in zip(logits, known, galleries, strict=True)]

    def probabilities(name):
        values = np.exp(evaluate.combine(name, "classification", parts).values)
        return values / values.sum(axis=1, keepdims=True)

    np.testing.assert_allclose(probabilities("late-product"), [[0.18 / 0.26, 0.08 / 0.26], [0.8, 0.2], [0.5, 0.5]])
    np.testing.assert_allclose(probabilities("score-sum"), [[0.55, 0.45], [0.8, 0.2], [0.5, 0.5]])
    summed = evaluate.combine("score-sum", "retrieval", parts)
    cosines = [part.values @ part.gallery.T for part in parts]
    np.testing.assert_allclose((summed.values @ summed.gallery.T)[:2], [cosines[0][0] + cosines[1][0], cosines[0][1]])
    assert summed.fusion_weights is None
    assert summed.known.tolist() == [True, True, False]
    mean = evaluate.combine("score-sum", "regression", parts).values
    np.testing.assert_allclose(mean[:2], [(logits[0, 0] + logits[1, 0]) / 2, logits[0, 1]])


class Told(nn.Module):
    """Adds the features of present modalities, and 100 for each modality that `present` says is missing."""

    def forward(self, *features, present=None):
        masks = present or [torch.ones(len(x), dtype=torch.bool) for x in features]
        return sum(torch.where(mask[:, None], x, 100.0) for x, mask in zip(features, masks, strict=True))


def test_a_withheld_modality_is_masked_or_zero():
    a, b = torch.arange(1.0, 7)[:, None], torch.arange(10.0, 70, 10)[:, None]
    index = torch.tensor([0, 1, 2, 3, 4, -1])
    rows = Rows({"a": Column(a, torch.arange(6)), "b": Column(b, index)}, torch.zeros(6))
    model = FusionModel({"a": nn.Identity(), "b": nn.Identity()}, Told())
    conditions = [evaluate.Condition(), evaluate.Condition("a"), evaluate.Condition("a", True), evaluate.Condition("c")]
    assert [str(c) for c in conditions[:3]] == ["all", "without a", "without a, zero-filled"]
    found = evaluate.outputs(model, rows, torch.tensor([5, 0, 1]), conditions=conditions)
    said = {str(c): (o.values[:, 0].tolist(), o.known.tolist()) for c, o in found.items()}
    assert said["all"] == ([106, 11, 22], [True, True, True])
    assert said["without a"] == ([200, 110, 120], [False, True, True])
    assert said["without a, zero-filled"] == ([0, 10, 20], [False, True, True])
    assert said["without c"] == said["all"]


@pytest.mark.parametrize(
    "task, metric",
    [
        ({}, "accuracy"),
        ({"metric": "macro_f1"}, "macro_f1"),
        ({"kind": "regression"}, "mae"),
        ({"kind": "retrieval", "target": ["c"]}, "a+b_to_c_R@10"),
    ],
)
def test_the_metric_that_models_are_compared_by(task, metric):
    config = from_mapping({"modalities": {name: {"kind": "text"} for name in "abc"}, "task": task})
    assert evaluate.headline(config) == metric
