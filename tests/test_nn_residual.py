"""`fusionsum.nn.residual`: where it starts, what it can represent, and what a missing modality leaves.

What lives elsewhere: its values and gradients against the formula, and what every torch module has to bear, enumerated
with all layers (``published.py``, ``test_nn.py``).
"""

from __future__ import annotations

import itertools
import math

import pytest

from conftest import missing

try:
    import torch
except ModuleNotFoundError:
    missing("torch")

from fusionsum.nn import LateFusion, ResidualFusion
from fusionsum.nn.residual import DECAY, SCALE, WEIGHT

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("seed")


def drawn(layer):
    """Return the layer with all parameters drawn at random."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def by_hand(layer, xs):
    """Loop over terms and modalities."""
    out = 0
    for linear, x in zip(layer.linears, xs, strict=True):
        out = out + x @ linear.weight.T + linear.bias
    for i in range(layer.rank):
        term = layer.fusion_weights[i]
        for factor, x in zip(layer.factors, xs, strict=True):
            rows = slice(i * layer.output_dim, (i + 1) * layer.output_dim)
            term = term * (x @ factor.weight[rows].T + factor.bias[rows])
        out = out + term
    return out


@pytest.mark.parametrize("count", range(1, 9))
def test_equals_the_formula_for_any_number_of_modalities(count):
    dims = range(2, count + 2)
    layer = drawn(ResidualFusion(dims, 3, 4, dtype=F64))
    xs = [torch.randn(5, d, dtype=F64, requires_grad=True) for d in dims]
    got, wanted = layer(*xs), by_hand(layer, xs)
    torch.testing.assert_close(got, wanted)
    leaves, grad = [*xs, *layer.parameters()], torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_terms_start_as_every_order_of_interaction(count):
    """Each set of two modalities or more has as many terms as any other: all biases of a term outside of it are 1."""
    sets = [s for size in range(2, count + 1) for s in itertools.combinations(range(count), size)]
    layer = ResidualFusion([8] * count, 3, 2 * len(sets))
    biases = torch.stack([factor.bias.view(layer.rank, 3) for factor in layer.factors], dim=-1)
    found = [tuple((row == 0).nonzero().flatten().tolist()) for row in biases[:, 0]]
    assert (biases == biases[:, :1]).all()
    assert sorted(found) == sorted(sets * 2)


def test_starts_as_late_fusion_with_small_products():
    layer, late = ResidualFusion((64, 32), 50, dtype=F64), LateFusion((64, 32), 50, dtype=F64)
    late.linears.load_state_dict(layer.linears.state_dict())
    x, y = torch.randn(256, 64, dtype=F64), torch.randn(256, 32, dtype=F64)
    products = (layer(x, y) - late(x, y)).std()
    assert 0.5 < products / (WEIGHT * SCALE**2 * math.sqrt(layer.rank)) < 2
    assert products < late(x, y).std() / 3
    fresh = [LateFusion((64, 32), 50).linears[m].weight.std() for m in range(2)]
    assert all(abs(linear.weight.std() / std - 1) < 0.1 for linear, std in zip(layer.linears, fresh, strict=True))


def test_groups_have_every_parameter_once():
    layer = ResidualFusion((4, 3, 5), 6)
    decayed, rest = layer.param_groups()
    assert [id(p) for p in decayed["params"]] == [id(p) for p in layer.linears.parameters()]
    assert decayed["weight_decay"] == DECAY
    ids = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(ids) == sorted(map(id, layer.parameters()))


def test_a_missing_modality_leaves_the_layer_of_the_others():
    """Without the third of three modalities, terms that hold it are scaled by their bias for it."""
    three, two = drawn(ResidualFusion((4, 3, 5), 6, 7, dtype=F64)), ResidualFusion((4, 3), 6, 7, dtype=F64)
    state = {name: value for name, value in three.state_dict().items() if ".2." not in name}
    state["factors.1.weight"] = three.factors[1].weight * three.factors[2].bias[:, None]
    state["factors.1.bias"] = three.factors[1].bias * three.factors[2].bias
    two.load_state_dict(state)
    x, y, unknown = torch.randn(9, 4, dtype=F64), torch.randn(9, 3, dtype=F64), torch.full((9, 5), torch.nan, dtype=F64)
    got = three(x, y, unknown, present=[None, None, torch.zeros(9, dtype=torch.bool)])
    torch.testing.assert_close(got, two(x, y))


@pytest.mark.parametrize("label", ["sum", "product"])
def test_learns_a_sum_and_a_product(label):
    """From the default initialisation, where products alone or a sum alone fail at one of the two."""
    x, y = torch.randn(2, 512, 4)
    score = x[:, 0] + y[:, 0] if label == "sum" else x[:, 0] * y[:, 0]
    layer = ResidualFusion((4, 4), 1, 4)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(layer(x, y)[:, 0], score)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
