"""The losses of tensors: gradients of all arguments, and the graph that keeps what they are made of.

What lives elsewhere: transforms, compilers and whatever else watches (``test_autograd_losses_watched.py``), the values over
every option (``test_losses.py``), invalid arguments (``test_scores.py``), the naive formulas (``pairs.py``, ``steps.py``).
"""

from __future__ import annotations

import itertools
import os
import warnings

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import fusionsum as fs
import pairs
from conftest import DTYPES, NARROW
from eager import Passing
from fusionsum import tensors
from steps import LOSSES, Step, gradients, simple

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's own
]
SIDES = list(itertools.product([1, 2, 3], [None, "one", "zero"], [False, True]))  # factors, masks, activations
# labels, exclude, C > B
TARGETS = list(itertools.product([False, True], [None, "ids", "mask"], [False, True]))
OPTIONS = [
    {"positives": p, "symmetric": s, "label_smoothing": e, "reduction": r}
    for p, s, e, r in itertools.product(["mean", "any"], [False, True], [0.0, 0.3], ["mean", "sum", "none"])
]
REDUCTIONS = [{"reduction": r} for r in ("mean", "sum", "none")]


def steps(rng, sides, name="contrastive_loss", count=24):
    """Make steps over all that a loss can be asked for: so many of them drawn, or with FUSIONSUM_FULL=1 every one."""
    factors, masks, activations = sides
    every = list(itertools.product(TARGETS, OPTIONS if name == "contrastive_loss" else REDUCTIONS))
    whole = os.environ.get("FUSIONSUM_FULL") == "1"
    for i in range(len(every)) if whole else rng.permutation(len(every))[:count]:
        (labels, exclude, more), options = every[i]
        case = pairs.sides(rng, 3, 5 if more else 3, 4, factors, masks=masks, activations=activations)
        case = case.but(logit_scale=1.7)
        case = pairs.with_labels(case, rng) if labels else case
        case = pairs.with_exclusions(case, rng, exclude)
        if name == "sigmoid_loss":
            yield Step(case.but(logit_bias=-0.4), name, **options)
        else:
            case = case.but(key_bias=rng.standard_normal(len(case.keys[0])))
            yield Step(case, name, **options, return_lse=bool(rng.integers(2)))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_gradcheck(sides, name, rng):
    for step in steps(rng, sides, name):
        assert gradcheck(step, step.leaves(), fast_mode=True)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients(name, reduction):
    step = simple(name, 2, 3, 2, reduction=reduction)
    assert gradcheck(step, step.leaves(), check_batched_grad=True)


@pytest.mark.parametrize("way", ["recorded", "watched", "not recorded"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sides", SIDES[::4], ids=str)
def test_equal_to_naive_torch(sides, name, way, rng):
    """In float32, by torch's own tolerances."""
    for step in steps(rng, sides, name):
        leaves = step.leaves(torch.float32, requires_grad=way != "not recorded")
        with Passing() if way == "watched" else torch.enable_grad():
            found = step(*leaves)
            wanted = step.naive(*leaves)
            torch.testing.assert_close(found, wanted)
            if way != "not recorded" and wanted[0].requires_grad:  # else nothing is positive
                torch.testing.assert_close(gradients(step, leaves), gradients(step.naive, leaves))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_gradients(name, dtype, rng):
    dtype = getattr(torch, dtype)
    case = pairs.sides(rng, 48, 64, 40, factors=2, kind="uniform").but(logit_scale=4.0)
    step = Step(case.but(logit_bias=-2.0) if name == "sigmoid_loss" else case, name, reduction="mean")
    given = [x.detach() for x in step.leaves(dtype)]
    results = []
    for function, of in ((step, given), (step.naive, given), (step.naive, [x.double() for x in given])):
        leaves = [x.clone().requires_grad_() for x in of]
        found = gradients(function, leaves)
        assert [d.dtype for d in found] == [x.dtype for x in leaves]
        results.append([function(*leaves)[0].double(), *(d.double() for d in found)])
    for ours, eager, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 2 * (eager - exact).norm() + torch.finfo(dtype).eps * exact.norm() / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes_and_shapes_of_gradients(name, dtype, rng):
    """Each is its argument's, whatever the others are; factors broadcast, and a scalar may be of any dtype."""
    q, r, k = torch.randn(4, 3), torch.randn(3), torch.randn(6, 3)
    leaves = [x.to(getattr(torch, dtype)).requires_grad_() for x in (q, r, k)]
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    weights = torch.ones(3, requires_grad=True)
    loss = getattr(fs, name)((leaves[0], leaves[1]), leaves[2], fusion_weights=weights, logit_scale=scale)
    assert loss.dtype == torch.promote_types(leaves[0].dtype, torch.float32)
    loss.backward()
    for x in (*leaves, scale, weights):
        assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)
        assert x.grad.isfinite().all()
    assert getattr(fs, name)(leaves[0], leaves[2]).dtype == leaves[0].dtype


@pytest.mark.parametrize("scale", [2, 2.0, np.float32(2), np.float64(2), torch.tensor(2.0)], ids=repr)
def test_scalars_of_any_kind(scale):
    q, k = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    for name in LOSSES:
        wanted = getattr(fs, name)(2 * q, k)
        for watching in (False, True):
            with Passing() if watching else torch.enable_grad():
                found = getattr(fs, name)(q, k, logit_scale=scale)
                torch.testing.assert_close(found, wanted)
                torch.testing.assert_close(*(torch.autograd.grad(x, q, retain_graph=True) for x in (found, wanted)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_positive_and_nothing_left(options, rng):
    case = pairs.sides(rng).but(logit_scale=1.7, key_bias=np.zeros(6))
    for nothing in (
        case.but(labels=np.arange(4), key_labels=np.arange(10, 16)),
        case.but(exclude=np.ones((4, 6), bool)),
        Step(pairs.sides(rng, 0, 0)).case.but(logit_scale=1.7),
    ):
        for watching in (False, True):
            step = Step(nothing, **options)
            leaves = step.leaves()
            with Passing() if watching else torch.enable_grad():
                assert not any(x.any() for x in step(*leaves))
                assert not any(d.any() for d in gradients(step, leaves))


def test_infinities_and_nan_are_no_warnings(rng):
    case = pairs.sides(rng).but(logit_scale=1e38, key_bias=np.array([np.inf, -np.inf, np.nan, 0, 0, 0]))
    for name, options in itertools.product(LOSSES, ({}, {"reduction": "none"})):
        kind = case if name == "contrastive_loss" else case.but(logit_bias=np.inf)
        if name == "sigmoid_loss":
            kind.options.pop("key_bias")
        step = Step(kind, name, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradients(step, step.leaves(torch.float32))


@pytest.mark.parametrize("name", LOSSES)
def test_only_what_is_asked_for_is_computed(name, monkeypatch):
    asked = []
    evaluated = tensors._evaluated

    def spy(function, *arguments):
        asked.append((function, arguments[-1]))
        return evaluated(function, *arguments)

    monkeypatch.setattr(tensors, "_evaluated", spy)
    step = simple(name, reduction="none")
    of = [0, 0, 1, 0, 3, 2]  # queries' side twice, keys', weights, and what the options have in their order
    of = {"contrastive_loss": [0, 0, 1, 0, 3, 2], "sigmoid_loss": [0, 0, 1, 0, 2, 3]}[name]
    for wants in itertools.product([False, True], repeat=len(of)):
        if not any(wants):
            continue
        leaves = [x.requires_grad_(want) for x, want in zip(step.leaves(), wants, strict=True)]
        loss = sum(x.sum() for x in step(*leaves))
        asked.clear()
        loss.backward()
        needs = tuple(any(w for w, place in zip(wants, of, strict=True) if place == i) for i in range(4))
        assert asked == [({"contrastive_loss": "softmax_grad", "sigmoid_loss": "sigmoid_grad"}[name], needs)]
        assert [x.grad is not None for x in leaves] == list(wants)


@pytest.mark.parametrize("watching", [False, True])
@pytest.mark.parametrize(
    ("reduction", "recorded", "forward", "backward"),
    [
        ("mean", True, ["sigmoid_grad"], []),  # and a second backward takes a pass of its own
        ("sum", True, ["sigmoid_grad"], []),
        ("none", True, ["sigmoid_stats"], ["sigmoid_grad"]),
        ("mean", False, ["sigmoid_stats"], None),
    ],
)
def test_a_summed_sigmoid_loss_takes_one_pass(reduction, recorded, forward, backward, watching, monkeypatch):
    asked = []
    evaluated = tensors._evaluated
    monkeypatch.setattr(tensors, "_evaluated", lambda name, *rest: (asked.append(name), evaluated(name, *rest))[1])
    step = simple("sigmoid_loss", reduction=reduction)
    leaves = step.leaves(requires_grad=recorded)
    with Passing() if watching else torch.enable_grad():
        loss = step(*leaves)[0].sum()
        assert asked == forward
        if recorded:
            loss.backward(retain_graph=True)
            assert asked == forward + backward
            first = [x.grad.clone() for x in leaves]
            loss.backward(3 * torch.ones_like(loss), retain_graph=True)
            again = [] if watching and reduction != "none" else ["sigmoid_grad"]  # operations scale copies
            assert asked == forward + backward + again
            loss.backward(-2 * torch.ones_like(loss))
            torch.testing.assert_close([x.grad for x in leaves], [2 * d for d in first])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kept_gradients_are_handed_over_without_a_copy(reduction, monkeypatch):
    found = []
    evaluated = tensors.sigmoid_stats_and_grad

    def spy(*arguments):
        losses, grads = evaluated(*arguments)
        found.extend(grads)
        return losses, grads

    monkeypatch.setattr(tensors, "sigmoid_stats_and_grad", spy)
    q, k = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    loss = fs.sigmoid_loss(q, k, reduction=reduction)
    one = [d.clone() for d in found]
    first = torch.autograd.grad(loss, q, 3 * torch.ones(()), retain_graph=True)[0]
    assert first.data_ptr() == found[0].data_ptr()
    torch.testing.assert_close(first, 3 * one[0])
    first.fill_(7)  # the user's own
    loss.backward(2 * torch.ones(()))
    torch.testing.assert_close([q.grad, k.grad], [2 * d for d in one])


# ---- the graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_recorded(name):
    step = simple(name)
    leaves = step.leaves()
    wanted = step(*leaves)[0]
    assert wanted.requires_grad
    with torch.no_grad():
        assert not step(*leaves)[0].requires_grad
    with torch.inference_mode():
        found = step(*leaves)[0]
        assert found.is_inference()
    assert torch.equal(found, wanted)
    assert not step(*(x.detach() for x in leaves))[0].requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_the_graph(name):
    step = simple(name, reduction="none")
    leaves = step.leaves()
    loss = step(*leaves)[0].sum()
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), wanted)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    q, k, exclude = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), torch.zeros(4, 4, dtype=torch.bool)
    for changed in (k, exclude):
        loss = getattr(fs, name)(q, k, exclude=exclude, reduction="none")
        changed.logical_not_() if changed is exclude else changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss[0] if isinstance(loss, tuple) else loss).sum().backward()
    labels = torch.arange(4)
    loss = getattr(fs, name)(q, k, labels=labels, key_labels=labels)
    wanted = torch.autograd.grad(loss, q, retain_graph=True)
    labels.zero_()  # integers are read once
    assert torch.equal(torch.autograd.grad(loss, q)[0], wanted[0])


def test_one_output_of_several():
    """Where only a log-sum-exp is differentiated, and where an output is not used at all."""
    q, k = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(6, 3, dtype=torch.float64)
    _, lse, key_lse = fs.contrastive_loss(q, k, return_lse=True)
    torch.testing.assert_close(
        torch.autograd.grad(lse.sum(), q, retain_graph=True)[0],
        torch.autograd.grad((q @ k.T).logsumexp(1).sum(), q)[0],
    )
    torch.testing.assert_close(
        torch.autograd.grad(key_lse[2], q)[0], torch.autograd.grad((q @ k.T).logsumexp(0)[2], q)[0]
    )


def test_devices_without_kernels_are_named():
    class Elsewhere:
        type = "cuda"

        def __str__(self):
            return "cuda:0"

    scores = fs.scores.check(torch.randn(2, 3), torch.randn(2, 3)).read()
    first = type("OnCuda", (), {"device": Elsewhere(), "shape": (2, 3)})()
    with pytest.raises(ValueError, match="queries: are on cuda:0, expected cpu"):
        tensors.softmax_stats(scores._replace(queries=(first,)), False, True, False)


def test_views_and_subclasses():
    q, k = torch.randn(4, 3, dtype=torch.complex128), torch.randn(4, 3, dtype=torch.float64)
    negative = q.conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(fs.contrastive_loss(negative, k), fs.contrastive_loss(-q.imag.clone(), k))

    class Marked(torch.Tensor):
        pass

    found = fs.contrastive_loss(k.as_subclass(Marked), k)
    assert type(found) is Marked
    torch.testing.assert_close(found.as_subclass(torch.Tensor), fs.contrastive_loss(k, k))
    leaf = k.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        fs.contrastive_loss(leaf.T, leaf.T).backward()
    other = k.clone().requires_grad_()
    fs.contrastive_loss(other.T.contiguous(), other.T.contiguous()).backward()
    torch.testing.assert_close(leaf.grad, other.grad)
