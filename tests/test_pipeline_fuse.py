"""`fusionsum.pipeline.fuse`: layers by name, missing modalities, retrieval's towers, the models that are compared.

What lives elsewhere: the layers (``test_nn.py``).
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import made_up
from conftest import missing

try:
    import torch

    import fusionsum.nn
    from fusionsum.pipeline import fuse
    from fusionsum.pipeline.config import from_mapping
except ModuleNotFoundError as error:
    missing(str(error))

SMALL = {"mm_dim": 8, "rank": 2, "chunks": 2, "dimensions": (8,)}
FITTED = {
    "image": {"shape": [3, 8, 8]},
    "text": {"shape": [12], "vocabulary": 20},
    "sound": {"shape": [16, 21]},
    "size": {"shape": [2]},
}


def options(name):
    return {k: v for k, v in SMALL.items() if k in inspect.signature(fuse.layers()[name]).parameters}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def model(**sections):
    config = from_mapping(made_up.config(Path(), **sections))
    return lambda name, dim=3: fuse.build(config, name, config.modalities, FITTED, dim)


def inputs(count=6):
    made = {
        "image": torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8),
        "text": torch.randint(20, (count, 12)),
        "sound": torch.randn(count, 16, 21),
        "size": torch.randn(count, 2),
    }
    return {name: (items, torch.ones(count, dtype=torch.bool)) for name, items in made.items()}


@pytest.mark.parametrize("name", sorted(fuse.layers()))
def test_every_layer_of_nn_is_found_and_ignores_missing_modalities(name):
    assert fuse.layers()[name] is getattr(fusionsum.nn, name)
    layer = fuse.layer(name, [4, 4], 6, options(name))
    fused = fuse.FusionModel({"a": torch.nn.Identity(), "b": torch.nn.Identity()}, layer).eval()
    there, half = torch.ones(5, dtype=torch.bool), torch.arange(5) < 2
    a, b, noise = torch.randn(3, 5, 4)
    whole = fused({"a": (a, there), "b": (b, there)})
    one = fused({"a": (a, there), "b": (b, half)})
    other = fused({"a": (a, there), "b": (torch.where(half[:, None], b, noise), half)})
    assert whole.shape == (5, 6)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one[:2], whole[:2])


def test_the_look_up_suggests_names_and_checks_options():
    cases = [
        ("LowRankFusin", {}, "fusion.layer: unknown layer 'LowRankFusin'; did you mean 'LowRankFusion'?"),
        ("LowRankFusion", {"rnk": 3}, "fusion: unknown option of LowRankFusion 'rnk'; did you mean 'rank'?"),
        ("LowRankFusion", {"output_dim": 3}, "unknown option of LowRankFusion 'output_dim'"),
        ("LowRankFusion", {}, "fusion: LowRankFusion needs rank"),
        ("LowRankFusion", {"rank": 0}, "fusion: LowRankFusion: rank: expected at least 1, got 0"),
    ]
    for name, given, message in cases:
        with pytest.raises(ValueError) as raised:
            fuse.layer(name, [4, 4], 3, given)
        assert message in str(raised.value)


def test_zero_filling_does_not_tell_the_head_of_missing_modalities():
    fused = model()("fused").eval()
    given = inputs()
    items, there = given["sound"]
    given["sound"] = items, there & (torch.arange(6) < 3)
    features, masks = fused.encode(given)
    told, filled = fused.fuse(features, masks), fused.fuse(features, masks, zero_fill=True)
    torch.testing.assert_close(told[:3], filled[:3])
    assert (told[3:] - filled[3:]).abs().max() > 1e-4
    features[list(fused.encoders).index("sound")][3:] = 0
    torch.testing.assert_close(filled, fused.head(*features))


def test_the_models_that_are_compared():
    config = from_mapping(made_up.config(Path()))
    names = fuse.trained_models(config)
    assert names == ["fused", "image alone", "text alone", "sound alone", "size alone", "concat-linear", "mlp"]
    assert fuse.combined_models(config) == ["late-product", "score-sum"]
    made = {name: fuse.build(config, name, config.modalities, FITTED, 3) for name in names}
    assert all(m(inputs()).shape == (6, 3) for m in made.values())
    assert list(made["text alone"].encoders) == ["text"]
    sizes = {name: fuse.parameter_count(m.head) for name, m in made.items()}
    assert abs(sizes["mlp"] / sizes["fused"] - 1) < 0.1
    one = from_mapping({"modalities": {"size": {"kind": "table"}}})
    assert (fuse.trained_models(one), fuse.combined_models(one)) == (["fused"], [])


def test_two_towers_embed_both_sides_at_unit_length():
    towers = model(task={"kind": "retrieval", "target": ["text"]})("fused", 8).eval()
    query, target = towers(inputs())
    torch.testing.assert_close(query.norm(dim=-1), torch.ones(6))
    torch.testing.assert_close(target.norm(dim=-1), torch.ones(6))
    assert (query.shape, target.shape, towers.fusion_weights.shape) == ((6, 8), (6, 8), (8,))
    assert set(towers.query.encoders) == {"image", "sound", "size"}
    assert list(towers.target.encoders) == ["text"]


@pytest.mark.parametrize("retrieval", [False, True])
def test_a_fused_model_without_products_is_the_sum(retrieval):
    task = {"kind": "retrieval", "target": ["text", "size"]} if retrieval else {"kind": "classification"}
    make = model(task=task, fusion={"layer": "ResidualFusion", "rank": 2})
    fused, summed = make("fused", 8).eval(), make("concat-linear", 8).eval()
    given = inputs()
    before, wanted = fused(given), summed(given)
    fused.load_state_dict(fuse.without_products(fused.state_dict(), summed.state_dict()))
    torch.testing.assert_close(fused(given), wanted)
    assert not torch.allclose(before[0], wanted[0])


@pytest.mark.parametrize(
    ("sections", "may"),
    [
        ({"train": {"patience": 4}}, True),
        ({"train": {"patience": 0}}, False),
        ({"train": {"patience": 4}, "fusion": {"layer": "MLB"}}, False),
        ({"train": {"patience": 4}, "task": {"kind": "retrieval", "target": ["text", "sound", "size"]}}, False),
    ],
)
def test_the_sum_is_a_candidate_where_validation_rows_can_choose(sections, may):
    config = from_mapping(
        made_up.config(Path(), **{"fusion": {"layer": "ResidualFusion"}, "baselines": [], **sections})
    )
    assert fuse.may_be_sum(config) == may
    assert (fuse.SUM in fuse.trained_models(config)) == may
