"""The sum's derivatives of every order, for every dtype, against naive torch.

What lives elsewhere: the kernels' arithmetic (``test_kernel.py``), the formulas (``test_reference.py``).
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fusionsum as fs
from conftest import ACTIVATIONS, DTYPES, FORMS, NARROW
from eager import MASKS, SMALL, cases, fused, naive, simple, to_torch

# torch's own, on its first use of forward AD and of inductor
pytestmark = [pytest.mark.usefixtures("seed"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, masks, rng):
    for case in cases(rng, form, masks):
        operands, options = to_torch(case, requires_grad=True)
        function = fused(options, case.weights is not None)
        assert gradcheck(function, operands, fast_mode=True, check_forward_ad=True)
        torch.testing.assert_close(function(*operands), naive(options, case.weights is not None)(*operands))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck(form, masks, rng):
    for case in cases(rng, form, masks):
        operands, options = to_torch(case, requires_grad=True)
        function = fused(options, case.weights is not None)
        assert gradgradcheck(function, operands, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", ["paired", "vector output", "mixing", "all pairs", "candidates", "no weights"])
def test_batched_gradients(form, masks, rng):
    case = next(itertools.islice(cases(rng, form, masks, {"B": 2, "n": 2, "O": 2, "C": 2, "K": 2}), 1, None))
    operands, options = to_torch(case, requires_grad=True)
    batched = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(fused(options, case.weights is not None), operands, **batched)
    assert gradgradcheck(fused(options, case.weights is not None), operands, check_batched_grad=True)
    jacobian = torch.autograd.functional.jacobian
    wanted = jacobian(naive(options, case.weights is not None), tuple(operands), vectorize=True)
    torch.testing.assert_close(
        jacobian(fused(options, case.weights is not None), tuple(operands), vectorize=True), wanted
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("masks", MASKS)
def test_gradient_function_is_differentiable(name, masks, rng):
    case = FORMS["paired"].case(rng, **SMALL, activations=[name, "tanh"])
    operands, options = to_torch(case if MASKS[masks] is None else case.masked(rng, *MASKS[masks]), requires_grad=True)
    u = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *x: fs.fusion_sum_grad(*x, **options), (u, *operands), check_forward_ad=True)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "relu"])  # whose derivative there is a choice
def test_derivatives_at_zero(name):
    w, _, g = simple(2, 3)
    options = {"activations": [name, None], "present": None, "absent": "one", "dim": -1}
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    ours, theirs = (lambda f, F=F: F(options)(w, f, g).exp().sum() for F in (fused, naive))
    torch.testing.assert_close(grad(ours)(zero.detach()), grad(theirs)(zero.detach()))
    torch.testing.assert_close(hessian(ours)(zero.detach()), hessian(theirs)(zero.detach()))
    for F in (ours, theirs):
        first = torch.autograd.grad(F(zero), zero, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), zero)[0]
        if F is ours:
            found = first, second
    torch.testing.assert_close(found, (first, second))


def test_what_is_absent_never_matters():
    w, f, g = simple(4, 3, requires_grad=True)
    present = [torch.tensor([True, False, True, False]), torch.tensor([False, False, True, True])]
    with torch.no_grad():
        f[~present[0]], g[~present[1]] = torch.nan, torch.inf
    for absent, names in itertools.product(("one", "zero"), (None, ["gelu", "sigmoid"])):
        options = {"activations": names, "present": present, "absent": absent, "dim": -1}
        output = fused(options)(w, f, g)
        first = torch.autograd.grad(output.square().sum(), (w, f, g), create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), (w, f, g))
        for order in (first, second):
            assert all(torch.isfinite(d).all() for d in order)
            assert not order[1][~present[0]].any()
            assert not order[2][~present[1]].any()
        tangent = jvp(fused(options), (w.detach(), f.detach(), g.detach()), tuple(simple(4, 3)))[1]
        assert torch.isfinite(tangent).all()
        assert torch.isfinite(jacrev(jacrev(fused(options), 1), 2)(w.detach(), f.detach(), g.detach())).all()


def test_third_order():
    w, f, g = simple(2, 3)
    for names in (None, ["tanh", "silu"]):
        options = {"activations": names, "present": None, "absent": "one", "dim": -1}
        ours, theirs = (
            [jacrev(jacfwd(jacrev(F(options), 1), 1), i)(w, f, g) for i in range(3)] for F in (fused, naive)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", ["paired", "vector output", "candidates", "no weights", "terms first"])
def test_func_transforms(form, masks, rng):
    case = next(itertools.islice(cases(rng, form, masks), 1, None))
    x, options = to_torch(case)
    ours, theirs = (F(options, case.weights is not None) for F in (fused, naive))
    tangents = tuple(torch.randn_like(a) for a in x)
    of_all = tuple(range(len(x)))
    for transform in (
        lambda F: grad(lambda *x: F(*x).square().sum(), of_all)(*x),
        lambda F: jvp(F, tuple(x), tangents),
        lambda F: vjp(F, *x)[1](torch.ones_like(F(*x))),
        lambda F: jacrev(F, of_all)(*x),
        lambda F: jacfwd(F, of_all)(*x),
        lambda F: hessian(lambda *x: F(*x).square().sum(), of_all)(*x),
        lambda F: grad(lambda a: grad(lambda a: F(a, *x[1:]).pow(3).sum())(a).square().sum())(x[0]),
        lambda F: jvp(lambda *x: vjp(F, *x)[1](torch.ones_like(F(*x))), tuple(x), tangents),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


@pytest.mark.parametrize("weights_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, weights_dtype):
    w, f, g = simple(5, 4)
    x = [w.to(getattr(torch, weights_dtype)), f.to(getattr(torch, dtype)), g.to(getattr(torch, dtype))]
    x = [a.requires_grad_() for a in x]
    output, wanted = fs.fusion_sum(*x), (x[0] * x[1] * x[2]).sum(-1)
    assert output.dtype == wanted.dtype
    torch.testing.assert_close(output, wanted, rtol=0.05, atol=0.05)
    output.backward(torch.ones_like(output))
    assert [a.grad.dtype for a in x] == [a.dtype for a in x]
    assert all(a.grad.shape == a.shape and a.grad.is_contiguous() for a in x)
    assert vmap(fs.fusion_sum, (None, 0, 0))(*(a.detach() for a in x)).dtype == output.dtype
    second = torch.autograd.grad(fs.fusion_sum(*x, activations="tanh").sum(), x, create_graph=True)
    assert [a.dtype for a in torch.autograd.grad(sum(d.float().sum() for d in second), x)] == [a.dtype for a in x]


@pytest.mark.parametrize("name", [None, "tanh"])
@pytest.mark.parametrize("weights", ["float32", "same"])
@pytest.mark.parametrize("dtype", NARROW)
def test_low_precision_gradients(dtype, weights, name):
    dtype = getattr(torch, dtype)
    w, f, g = simple(64, 48)
    given = [w.to(torch.float32 if weights == "float32" else dtype), f.to(dtype), g.to(dtype)]
    options = {"activations": [name] * 2, "present": None, "absent": "one", "dim": -1}
    u = torch.randn(64, dtype=torch.float64).to(dtype)
    results = []
    for F, of in ((fused, given), (naive, given), (naive, [a.double() for a in given])):
        x = [a.clone().requires_grad_() for a in of]
        output = F(options)(*x)
        results.append([d.double() for d in torch.autograd.grad(output, x, u.to(output.dtype))])
    for ours, eager, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 2 * (eager - exact).norm()
        assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()
