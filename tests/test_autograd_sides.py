"""A side's product and the gradients of its factors, and the order of a call's arrays."""

from __future__ import annotations

import itertools

import pytest
import torch

import fusionsum as fs
from conftest import DTYPES
from eager import PHI, Passing
from fusionsum.autograd import sides
from fusionsum.scores import Scores, Search

pytestmark = pytest.mark.usefixtures("seed")


def naive(weights, factors, names, masks, absent):
    product = 1 if weights is None else weights
    for z, name, mask in zip(factors, names, masks, strict=True):
        held = PHI[name](z)
        product = product * (held if mask is None else torch.where(mask[:, None], held, float(absent == "one")))
    return product


@pytest.mark.parametrize("watching", [False, True])
@pytest.mark.parametrize("absent", ["one", "zero"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("names", [[None], ["tanh"], [None, "gelu"], [None] * 3, ["silu"] * 8], ids=str)
def test_products_and_gradients(names, masked, absent, watching):
    factors = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in names]
    masks = [torch.rand(5) > 0.5 if masked and i % 2 == 0 else None for i in range(len(names))]
    for weights in (None, torch.randn(3, dtype=torch.float64, requires_grad=True)):
        side = sides.Side(weights, factors, names, masks, absent)
        wanted, u = naive(*side), torch.randn(5, 3, dtype=torch.float64)
        operands = [*([] if weights is None else [weights]), *factors]
        grads = torch.autograd.grad(wanted, operands, u)
        with Passing() if watching else torch.no_grad():
            torch.testing.assert_close(side.product(torch.float64), wanted)
            found = side.grads(u, [True] * (1 + len(names)))
            torch.testing.assert_close(found[weights is None :], list(grads))
            some = side.grads(u, [False] * len(names) + [True])
            assert [d is None for d in some] == [True] * len(names) + [False]
            torch.testing.assert_close(some[-1], grads[-1])
        assert side.grads(None, [True] * (1 + len(names))) == [None] * (1 + len(names))


@pytest.mark.parametrize(("dtype", "count"), list(itertools.product(DTYPES, [1, 2])))
def test_dtypes(dtype, count):
    """Products are formed wide; gradients come in the dtype of their operand."""
    factors = [torch.randn(5, 3).to(getattr(torch, dtype)) for _ in range(count)]
    side = sides.Side(None, factors, [None] * count, [None] * count, "one")
    assert side.product(torch.float64).dtype == torch.float64
    torch.testing.assert_close(
        side.product(torch.float64), naive(None, [z.double() for z in factors], *side[2:]), rtol=0, atol=0
    )
    for wide in (torch.float32, torch.float64):
        assert side.grads(torch.randn(5, 3, dtype=wide), [False] + [True] * count)[1].dtype == factors[0].dtype


def test_arrays_are_put_back_in_their_places():
    q, r, k, mask = torch.randn(4, 3), torch.randn(4, 3), torch.randn(6, 3), torch.rand(4) > 0.5
    labels, key_labels = torch.arange(4), torch.arange(6)
    scores = fs.scores.check((q, r), k, present=[None, mask], labels=labels, key_labels=key_labels, logit_scale=2.0)
    given = sides.arrays(scores)
    assert sides.with_arrays(scores, given) == scores
    numbered = sides.with_arrays(scores, list(range(len(given))))
    assert (numbered.queries, numbered.keys, numbered.present, numbered.key_present) == ((0, 1), (2,), (3, 4), (5,))
    assert sides.with_arrays(scores, [x is scores.present[1] for x in given]).present == (False, True)
    search = fs.scores.check_search(q, (k, k), exclude=torch.zeros(4, 6, dtype=torch.bool))
    assert sides.with_arrays(search, sides.arrays(search)) == search
    assert sides.wide(scores) == torch.float32
    assert sides.wide(scores._replace(key_bias=torch.zeros(6, dtype=torch.float64))) == torch.float64


@pytest.mark.parametrize(
    ("name", "kind", "before", "after"),
    [
        ("contrastive_loss", Scores, 0, 5),
        ("softmax_grad", Scores, 3, 1),
        ("sigmoid_loss", Scores, 0, 2),
        ("sigmoid_grad", Scores, 1, 1),
        ("top_k", Search, 0, 1),
        ("ranks", Search, 0, 1),
    ],
)
def test_the_fields_have_one_order_in_the_registered_operations(name, kind, before, after):
    names = [a.name for a in getattr(torch.ops.fusionsum, name).default._schema.arguments]
    assert names[before : len(names) - after] == list(kind._fields)
