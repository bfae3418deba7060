"""Batches of sums under vmap, against a loop over the batch."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.func import functional_call, grad, jacfwd, vmap

import fusionsum as fs
from eager import Fused, fused, simple

# torch's own, on its first use of forward AD and of inductor
pytestmark = [pytest.mark.usefixtures("seed"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]


@pytest.mark.parametrize("in_dims", [(None, 0, 0), (0, None, 1), (None, 1, None), (1, 2, 0), (0, None, None)])
def test_vmap(in_dims):
    options = {"activations": ["tanh", None], "present": None, "absent": "one", "dim": 1}
    x = [torch.randn(s, dtype=torch.float64) for s in ((4,), (3, 4), (2, 3, 4))]
    size = 5
    batches = [
        a if d is None else torch.stack([a + i for i in range(size)], d) for a, d in zip(x, in_dims, strict=True)
    ]
    single = [[a if d is None else a + i for a, d in zip(x, in_dims, strict=True)] for i in range(size)]
    of_all = (0, 1, 2)
    for F in (
        fused(options),
        grad(lambda *x: fused(options)(*x).square().sum(), of_all),
        jacfwd(fused(options), of_all),
    ):
        wanted = [F(*one) for one in single]
        wanted = (
            torch.stack(wanted) if torch.is_tensor(wanted[0]) else tuple(map(torch.stack, zip(*wanted, strict=True)))
        )
        torch.testing.assert_close(vmap(F, in_dims)(*batches), wanted)
    nested = vmap(vmap(fused(options), in_dims), (None, None, 0))(*batches[:2], torch.stack([batches[2]] * 2))
    torch.testing.assert_close(nested, torch.stack([vmap(fused(options), in_dims)(*batches)] * 2))


@pytest.mark.parametrize("mask_dim", [0, 1])
@pytest.mark.parametrize("factor_dim", [None, 0])
def test_vmap_over_masks(mask_dim, factor_dim):
    w, f, g = simple(4, 3)
    mask = torch.rand(6, 4) > 0.5

    def function(f, mask):
        return fs.fusion_sum(w, f, g, activations="tanh", present=[mask, None])

    batch = f if factor_dim is None else torch.stack([f + i for i in range(6)])
    found = vmap(function, (factor_dim, mask_dim))(batch, mask if mask_dim == 0 else mask.T)
    wanted = torch.stack([function(f if factor_dim is None else batch[i], mask[i]) for i in range(6)])
    torch.testing.assert_close(found, wanted)


def test_vmap_keeps_the_promotion_of_zero_dims():
    f, g = torch.randn(3, 4), torch.randn(3, 4)
    weights = torch.randn(5, dtype=torch.float64)  # of no dims within
    found = vmap(fs.fusion_sum, (0, None, None))(weights, f, g)
    assert found.dtype == torch.float32 == fs.fusion_sum(weights[0], f, g).dtype
    torch.testing.assert_close(found[2], fs.fusion_sum(weights[2], f, g))


def test_per_sample_gradients_of_a_module():
    module, x = Fused().double(), torch.randn(5, 4, dtype=torch.float64)
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(5):
        wanted = grad(loss)(parameters, x[i])
        torch.testing.assert_close({k: v[i] for k, v in found.items()}, wanted)


@pytest.mark.parametrize("axes", [(0, None), (1, 0), (None, 2), (2, 2)], ids=str)
def test_operations_that_map_one_by_one(axes):
    """Axes anywhere or nowhere, a batch of none, and one map within another."""
    shapes = [[4, 3], [6, 3]]
    sizes = [
        shape if axis is None else [*shape[:axis], 5, *shape[axis:]] for shape, axis in zip(shapes, axes, strict=True)
    ]
    x = [torch.randn(size, dtype=torch.float64) for size in sizes]

    def item(i):
        return [a if axis is None else a.select(axis, i) for a, axis in zip(x, axes, strict=True)]

    for function in (
        lambda q, k: fs.top_k(q, k, 2),
        lambda q, k: fs.contrastive_loss(q, k, return_lse=True),
        lambda q, k: (fs.ranks(q, k, torch.arange(4)),),
    ):
        found = vmap(function, axes)(*x)
        for i in range(5):
            torch.testing.assert_close(tuple(part[i] for part in found), tuple(function(*item(i))))
        empty = [a if axis is None else a.narrow(axis, 0, 0) for a, axis in zip(x, axes, strict=True)]
        assert [part.shape for part in vmap(function, axes)(*empty)] == [(0, *part.shape[1:]) for part in found]
        twice = vmap(vmap(function, axes), (None if axes[0] is None else 0, None if axes[1] is None else 0))
        again = twice(*(a if axis is None else torch.stack([a, a]) for a, axis in zip(x, axes, strict=True)))
        torch.testing.assert_close(tuple(part[1] for part in again), tuple(found))
