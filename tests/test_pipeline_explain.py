"""`fusionsum.pipeline.explain`: contributions against outputs without them, and the rows that are shown."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import missing

try:
    import torch
    from torch import nn

    from fusionsum.nn import GatedFusion, LowRankFusion, ResidualFusion
    from fusionsum.pipeline import explain
    from fusionsum.pipeline.evaluate import outputs
    from fusionsum.pipeline.fuse import FusionModel, TwoTowers
    from fusionsum.pipeline.preprocess import Column
    from fusionsum.pipeline.train import Rows
except ModuleNotFoundError as error:
    missing(str(error))

pytestmark = pytest.mark.usefixtures("seed")
ROWS = 80


def column(width):
    return Column(torch.randn(ROWS, width), torch.where(torch.rand(ROWS) < 0.2, -1, torch.arange(ROWS)))


@pytest.fixture
def rows():
    """Rows of two modalities, of which a fifth is missing, and labels of three classes."""
    return Rows({"a": column(3), "b": column(4), "c": column(5)}, torch.randint(3, (ROWS,)))


def tower(head):
    return FusionModel({"a": nn.Identity(), "b": nn.Identity()}, head)


@pytest.mark.parametrize(
    "layer",
    [LowRankFusion((3, 4), 3, 5), ResidualFusion((3, 4), 3, 5), GatedFusion((3, 4), 3)],
    ids=["terms", "terms beside a sum", "no terms"],
)
def test_parts_add_up_to_the_answer_and_are_what_changes_without_them(rows, layer, monkeypatch):
    monkeypatch.setattr(explain, "AT_ONCE", 7)
    chosen = torch.arange(5, ROWS)
    model = tower(layer)
    (output,) = outputs(model, rows, chosen).values()
    labels = rows.labels[chosen].numpy()
    answered = explain.answers("classification", chosen.numpy(), output.values, labels)
    found = explain.explain(model, rows, chosen, answered)
    assert found.rows == len(chosen)
    assert {part.names for part in found.parts} - {()} == {("a",), ("b",), ("a", "b")}
    margins = (output.values * answered.directions).sum(axis=1)
    average = output.values.mean(axis=0)
    wrong = [example for example in found.examples if not example.joint]
    confidence = np.exp(output.values).max(axis=1) / np.exp(output.values).sum(axis=1)
    assert [e.row for e in wrong] == sorted(
        5 + np.flatnonzero(output.values.argmax(axis=1) != labels), key=lambda row: -confidence[row - 5]
    )[: explain.WORST]
    for example in found.examples:
        place = example.row - 5
        assert example.predicted == output.values[place].argmax()
        assert (example.predicted == labels[place]) == example.joint
        whole = sum(value for _, value in example.parts) + average @ answered.directions[place]
        assert abs(whole - margins[place]) <= 1e-4
        joint = sum(value for names, value in example.parts if len(names) > 1)
        if found.terms:
            assert abs(sum(value for _, value in example.terms) - joint) <= 1e-4
        if example.joint:
            without = [
                (p.sum(axis=1) - p.sum(axis=1).mean(axis=0))[place]
                for key, p in joined(model, rows, chosen).items()
                if len(key) > 1
            ]
            assert (output.values[place] - sum(without)).argmax() != labels[place]
    parts = joined(model, rows, chosen)
    for part in found.parts:
        whole = parts[tuple("ab".index(name) for name in part.names)].sum(axis=1)
        centred = whole - whole.mean(axis=0)
        assert abs(part.size - np.abs((centred * answered.directions).sum(axis=1)).mean()) <= 1e-4
        assert abs(part.without - ((output.values - centred).argmax(axis=1) == labels).mean()) <= 1e-9
    assert len(found.terms) == (0 if isinstance(layer, GatedFusion) else 5)
    for term in found.terms:
        assert abs(term.weight - layer.fusion_weights[term.term].item()) <= 1e-7


def test_products_that_were_dropped_are_no_terms(rows):
    layer, chosen = ResidualFusion((3, 4), 3, 5), torch.arange(ROWS)
    nn.init.zeros_(layer.fusion_weights)
    (output,) = outputs(tower(layer), rows, chosen).values()
    answered = explain.answers("classification", chosen.numpy(), output.values, rows.labels.numpy())
    found = explain.explain(tower(layer), rows, chosen, answered)
    assert not found.terms and not any(example.terms for example in found.examples)
    assert {part.names: part.size for part in found.parts}[("a", "b")] == 0


def joined(model, rows, chosen):
    """Return all contributions, by modalities."""
    every = [parts for _, parts in explain._contributions(model, rows, chosen, np.arange(len(chosen)))]
    return {key: np.concatenate([parts[key] for parts in every]) for key in every[0]}


def test_numbers_are_explained_in_their_unit(rows):
    model, chosen = tower(LowRankFusion((3, 4), 1, 2)), torch.arange(ROWS)
    (output,) = outputs(model, rows, chosen).values()
    labels = torch.randn(ROWS).numpy()
    found = explain.explain(
        model, rows, chosen, explain.answers("regression", chosen.numpy(), output.values, labels, 10.0)
    )
    errors = 10 * (output.values[:, 0] - labels)
    assert [e.row for e in found.examples] == np.argsort(-np.abs(errors))[: explain.WORST].tolist()
    for example in found.examples:
        assert abs(example.error - errors[example.row]) <= 1e-4
        added = sum(value for _, value in example.parts)
        assert abs(added - 10 * (output.values[example.row, 0] - output.values[:, 0].mean())) <= 1e-3


def test_a_search_is_explained_by_its_lead(rows):
    chosen = torch.arange(ROWS)
    model = TwoTowers(tower(LowRankFusion((3, 4), 6, 2)), FusionModel({"c": nn.Identity()}, nn.Linear(5, 6)), 6)
    (output,) = outputs(model, rows, chosen, (rows, chosen)).values()
    numbers = np.arange(ROWS)
    target = (output.gallery, numbers, numbers, output.fusion_weights)
    found = explain.explain(
        model, rows, chosen, explain.answers("retrieval", numbers, output.values, numbers, target=target)
    )
    scores = (output.values * output.fusion_weights) @ output.gallery.T
    rank = (scores >= scores[numbers, numbers][:, None]).sum(axis=1)
    assert [e.rank for e in found.examples] == np.sort(rank)[::-1][: explain.WORST].tolist()
    for example in found.examples:
        of_row = scores[example.row]  # where rows without the modality score alike
        np.testing.assert_allclose(of_row[list(example.found)], np.sort(of_row)[::-1][: explain.FOUND], rtol=1e-5)
    assert all(part.without is None and part.size > 0 for part in found.parts)


def test_a_head_that_is_no_fusion_layer_has_examples_only(rows):
    model = FusionModel({"a": nn.Identity()}, nn.Linear(3, 3))
    (output,) = outputs(model, rows, torch.arange(ROWS)).values()
    answered = explain.answers("classification", np.arange(ROWS), output.values, rows.labels.numpy())
    found = explain.explain(model, rows, torch.arange(ROWS), answered)
    assert found.parts == found.terms == () and len(found.examples) == explain.WORST


def test_labels_of_several_are_explained_by_the_worst_of_each_row(rows):
    model, chosen = tower(LowRankFusion((3, 4), 3, 2)), torch.arange(ROWS)
    (output,) = outputs(model, rows, chosen).values()
    labels = (torch.rand(ROWS, 3) < 0.4).float().numpy()
    found = explain.explain(model, rows, chosen, explain.answers("multilabel", chosen.numpy(), output.values, labels))
    assert len(found.examples) == explain.WORST
    for example in found.examples:
        losses = np.logaddexp(0, np.where(labels[example.row] > 0, -1, 1) * output.values[example.row])
        assert example.predicted == losses.argmax()
