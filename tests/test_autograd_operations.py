"""The registered operations, called by hand, and on tensors without data."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck

import fusionsum as fs
from eager import simple

# torch's own, on its first use of forward AD and of inductor
pytestmark = [pytest.mark.usefixtures("seed"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
sum_op, grad_op = torch.ops.fusionsum.fusion_sum.default, torch.ops.fusionsum.fusion_sum_grad.default


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("names", [["", ""], ["gelu", "sigmoid"]])
@pytest.mark.parametrize("masks", ["none", "one", "both"])
def test_opcheck(wants, names, masks):
    if masks == "one" and wants != (True, True, True):
        return
    w, f, g = (x.requires_grad_(want) for x, want in zip(simple(3, 4), wants, strict=True))
    mask = torch.tensor([True, False, True])
    present = {"none": [None, None], "one": [mask, None], "both": [mask, ~mask]}[masks]
    torch.library.opcheck(sum_op, (w, [f, g], names, present, "zero", -1))
    u = torch.randn(3, dtype=torch.float64, requires_grad=wants[0])
    torch.library.opcheck(grad_op, (u, w, [f, g], names, present, "zero", -1, [True, wants[1], True]))


def test_ops_differentiate_by_themselves():
    w, f, g = simple(2, 3, requires_grad=True)
    u = torch.randn(2, dtype=torch.float64, requires_grad=True)
    for names in (["", ""], ["silu", "gelu"]):
        assert gradcheck(lambda w, f, g, n=names: sum_op(w, [f, g], n, [None, None], "one", 1), (w, f, g))

        def double(*x, names=names):
            return tuple(grad_op(*x[:2], x[2:], names, [None, None], "one", 1, [True, True, False]))

        assert gradcheck(double, (u, w, f, g))
        assert gradgradcheck(double, (u, w, f, g), fast_mode=True)
        assert gradcheck(
            lambda f, n=names: grad_op(u.detach(), None, [f], n[:1], [None], "one", 1, [False, True]), (f,)
        )


def test_meta_and_fake_tensors():
    x = [a.to("meta").requires_grad_() for a in simple(3, 4)]
    output = fs.fusion_sum(*x, activations="tanh")
    assert (output.shape, output.device.type, output.dtype) == ((3,), "meta", torch.float64)
    output.sum().backward()
    assert [a.grad.shape for a in x] == [a.shape for a in x]
    with torch._subclasses.FakeTensorMode():
        w, f, g = (torch.empty(s, dtype=torch.bfloat16) for s in ((4,), (3, 4), (3, 4)))
        assert fs.fusion_sum(w, f, g).shape == (3,)
        assert [d.shape for d in fs.fusion_sum_grad(torch.empty(3), w, f, g)] == [(4,), (3, 4), (3, 4)]
        with pytest.raises(ValueError, match=r"factors\[1\]: shape \(3, 3\) does not broadcast"):
            fs.fusion_sum(w, f, g[:, :3])
    fake = torch._subclasses.FakeTensorMode().from_tensor(torch.ones(3, 4, requires_grad=True))
    assert fs.fusion_sum(None, fake, fake).sum().requires_grad  # outside its mode
