"""`fusionsum.nn.tensor`: the two ways in which `TensorFusion` meets the outer product, and what each has in memory.

What lives elsewhere: what holds of every layer (``test_nn.py``).
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

from torch.utils._python_dispatch import TorchDispatchMode

from fusionsum.nn import TensorFusion, tensor
from published import F64

pytestmark = pytest.mark.usefixtures("seed")
SIZES = [*itertools.permutations((2, 6, 9)), (5, 5, 5), (12, 2), (2, 12), (7, 7), (2, 3, 2, 3), (4,), (2,) * 5]
WAYS = pytest.mark.parametrize("least", [0, math.inf], ids=["cut where it saves", "whole"])


def upstream(dims, inputs, linear):
    """Fuse as the authors' code does."""
    rows = len(inputs[0])
    outer, *others = (torch.cat([torch.ones(rows, 1, dtype=x.dtype), x], dim=1) for x in inputs)
    for x in others:
        outer = torch.bmm(outer.view(rows, -1, 1), x.unsqueeze(1)).view(rows, -1)
    return linear(outer)


def pair(dims, outputs, rows, dtype=F64):
    """Make a layer, the original's last map with the same parameters, and inputs."""
    linear = torch.nn.Linear(math.prod(d + 1 for d in dims), outputs, dtype=dtype)
    fusion = TensorFusion(dims, outputs, dtype=dtype)
    fusion.load_reference_state_dict({f"post_fusion_layer_1.{name}": p for name, p in linear.state_dict().items()})
    return fusion, linear, [torch.randn(rows, d, dtype=dtype, requires_grad=True) for d in dims]


@WAYS
@pytest.mark.parametrize("outputs", [1, 5, 40])
@pytest.mark.parametrize("dims", SIZES)
def test_equals_the_authors_code_in_every_order(dims, outputs, least, monkeypatch):
    monkeypatch.setattr(tensor, "LEAST_SAVED", least)
    fusion, linear, inputs = pair(dims, outputs, rows=11)
    wanted, got = upstream(dims, inputs, linear), fusion(*inputs)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(fusion(*inputs), wanted)
    grad = torch.randn_like(wanted)
    theirs = torch.autograd.grad(wanted, [*inputs, linear.weight, linear.bias], grad)
    ours = torch.autograd.grad(got, [*inputs, fusion.core.weight, fusion.core.bias], grad)
    torch.testing.assert_close(ours[: len(dims)], theirs[: len(dims)])
    own = fusion._from_reference("post_fusion_layer_1.weight", theirs[-2])["core.weight"]
    torch.testing.assert_close(ours[-2:], (own, theirs[-1]))


@WAYS
def test_leading_dims_broadcast_either_way(least, monkeypatch):
    monkeypatch.setattr(tensor, "LEAST_SAVED", least)
    fusion, linear, (x, y, z) = pair((2, 6, 9), 3, rows=4)
    got = fusion(x[:, None], y[:1], z[:, None, None])
    assert got.shape == (4, 4, 1, 3)
    wanted = upstream((2, 6, 9), (x[[2]], y[:1], z[[1]]), linear)
    torch.testing.assert_close(got[1, 2], wanted)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [
            x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, torch.Tensor)
        ]
        self.size = max([self.size, *(x.numel() for x in tensors)])
        return result


MEASURED = [*itertools.permutations((4, 16, 128)), (32, 32, 32), (128, 4), (4, 128), (64, 64), (8, 8, 8, 8)]


@pytest.mark.parametrize("dims", MEASURED)
@pytest.mark.parametrize("rows", [1, 32, 128])
def test_never_more_in_memory_than_the_authors_code(dims, rows):
    fusion, linear, inputs = pair(dims, 64, rows, torch.float32)
    sizes = []
    for run in (lambda: upstream(dims, inputs, linear), lambda: fusion(*inputs)):
        with Largest() as largest:
            run().sum().backward()
        sizes.append(largest.size)
    assert sizes[1] <= sizes[0]


def test_the_cut_saves_what_it_says():
    for sizes, outputs in itertools.product([(5, 17, 129), (33, 33, 33), (65, 65), (9,) * 4, (3,)], (1, 64, 1000)):
        whole = math.prod(sizes)
        inner, saved = tensor.cheapest_cut(sizes, outputs)
        costs = {}
        for k in range(1, len(sizes)):
            joined, left = math.prod(sizes[-k:]), math.prod(sizes[:-k])
            costs[k] = joined + 2 * outputs * left
        if costs:
            assert costs[inner] == min(costs.values()) == whole - saved
        else:
            assert saved <= 0


def test_rows_decide_whether_the_outer_product_is_cut():
    """(4, 16, 128) to 64: 10,965 numbers a row whole, 2,193 + 2 * 320 cut, and 2**17 has to be saved."""
    fusion = TensorFusion((16, 128, 4), 64)
    assert (fusion._inner, fusion._saved) == (2, 10_965 - 2_833)
    for rows, cut in ((1, False), (16, False), (17, True), (128, True)):
        assert fusion._cut_pays([torch.empty(rows, d) for d in fusion.input_dims]) == cut


def test_exports_with_any_number_of_rows():
    fusion, _, inputs = pair((4, 6, 9), 5, rows=7)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(fusion, tuple(inputs), dynamic_shapes={"inputs": tuple({0: rows} for _ in inputs)})
    _, _, others = pair((4, 6, 9), 5, rows=3)
    torch.testing.assert_close(exported.module()(*others), fusion(*others))
