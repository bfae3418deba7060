"""`fusionsum.nn.pooling`: the normalisation and its derivatives at 0, the sizes of `BLOCK`'s parts.

What lives elsewhere: the formulas, and what holds of every layer (``test_nn.py``).
"""

from __future__ import annotations

import pytest

from conftest import missing

try:
    import torch
except ModuleNotFoundError:
    missing("torch")

from fusionsum.nn import BLOCK, MLB
from fusionsum.nn.pooling import chunk_sizes, normalized
from published import F64, TABLE, Entry, block, parity, published_sizes, unit

pytestmark = [pytest.mark.usefixtures("seed"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
NORMALISED = [name for name, entry in TABLE.items() if getattr(entry.make(), "normalize", False)]


def rows_with_zeros():
    """Rows of signed numbers: without a 0, with one, with one number only, of zeros; and one of tiny numbers."""
    z = torch.randn(5, 6, dtype=F64)
    z[1, 2], z[2, 1:], z[3], z[4] = 0, 0, 0, z[4] * 1e-30
    return z


def test_normalized_is_the_originals_formula():
    """The sum under the root is that of absolute values, not of their roots' squares: the last digits may differ."""
    z, theirs = (x.requires_grad_() for x in [rows_with_zeros()] * 2)
    wanted, got = unit(theirs), normalized(z)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-15)
    grad = torch.randn_like(wanted)
    (expected,), (found,) = torch.autograd.grad(wanted, theirs, grad), torch.autograd.grad(got, z, grad)
    assert expected.isfinite().all()
    scale = 2 * (z.abs() * z.abs().sum(-1, keepdim=True)).sqrt()  # its inverse is the derivative by the number alone
    assert ((found - expected).abs() * scale)[z != 0].max() <= 1e-14
    assert (found[z == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalized_in_other_dtypes(dtype):
    z = (100 * torch.randn(7, 3000)).to(dtype)  # the sum of their sizes exceeds the range of float16
    got = normalized(z)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), unit(z.double()), rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    assert (normalized(torch.zeros(2, 3, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_normalized_of_what_is_not_finite(value):
    z = torch.tensor([[1.0, value, 0.0]])
    torch.testing.assert_close(normalized(z), unit(z), equal_nan=True)


def test_derivatives_of_normalized_are_the_formulas_away_from_zero():
    z = torch.randn(3, 4, dtype=F64).sign().mul_(torch.rand(3, 4, dtype=F64) + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(normalized, z, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(normalized, z)


def test_derivatives_of_normalized_are_finite_at_zero():
    z = rows_with_zeros()[:4].requires_grad_()
    tangent = torch.func.jvp(normalized, (z.detach(),), (torch.ones_like(z),))[1]
    assert tangent.isfinite().all()
    assert (tangent[z == 0] == 0).all()
    (first,) = torch.autograd.grad(normalized(z).square().sum(-1).mul(z[:, 0]).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.randn_like(first)).sum(), z, create_graph=True)
    (third,) = torch.autograd.grad((second * torch.randn_like(second)).sum(), z)
    for derivative in (first, second, third):
        assert derivative.isfinite().all()


@pytest.mark.parametrize("name", NORMALISED)
def test_layers_have_finite_derivatives_at_zero(name):
    """A gradient penalty, and forward mode, where the pooled vector is 0 in half of the rows."""
    entry = TABLE[name]
    layer = entry.make(dtype=F64)
    with torch.no_grad():
        for parameter, value in layer.named_parameters():
            if parameter.endswith("bias"):
                value.zero_()
    inputs = entry.inputs()
    with torch.no_grad():
        for x in inputs:
            x[::2] = 0
    first = torch.autograd.grad(layer(*inputs).square().sum(), inputs, create_graph=True)
    assert all(grad.isfinite().all() for grad in first)
    sum(grad.square().sum() for grad in first).backward()
    grads = [x.grad for x in (*inputs, *layer.parameters()) if x.grad is not None]
    assert len(grads) > len(inputs)
    assert all(grad.isfinite().all() for grad in grads)
    points = tuple(x.detach() for x in inputs)
    tangent = torch.func.jvp(layer, points, tuple(torch.ones_like(x) for x in points))[1]
    assert tangent.isfinite().all()


def test_rows_of_equal_signed_roots_have_finite_gradients_at_zero():
    fusion = MLB((3, 3), 4, 5, normalize=True)
    with torch.no_grad():
        for linear in fusion.linears:
            linear.bias.zero_()
    fusion(torch.zeros(2, 3), torch.zeros(2, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in fusion.parameters())


# ---- the parts of BLOCK ----------------------------------------------------------------------------------------------


def test_parts_are_cut_by_the_originals_rule():
    for dim in range(1, 65):
        for chunks in range(1, 33):
            try:
                wanted = published_sizes(dim, chunks)
            except AssertionError:
                with pytest.raises(ValueError, match=rf"chunks: expected at most mm_dim \+ 1, {dim + 1}, got {chunks}"):
                    chunk_sizes(dim, chunks)
            else:
                assert chunk_sizes(dim, chunks) == wanted, (dim, chunks)


@pytest.mark.parametrize("pos_norm", ["before_cat", "after_cat"])
@pytest.mark.parametrize("dim, chunks", [(24, 7), (9, 4)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")  # torch's, of the original too
def test_an_empty_part_is_the_originals(dim, chunks, pos_norm):
    entry = Entry(BLOCK, block, {"mm_dim": dim, "chunks": chunks, "rank": 2, "pos_norm": pos_norm})
    assert entry.make().sizes[-1] == 0
    forward, gradient = parity(entry)
    assert forward <= 1e-12
    assert gradient <= 1e-11
