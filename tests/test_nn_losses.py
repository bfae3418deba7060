"""`fusionsum.nn.losses`: open_clip's and Symile's published formulae, the learned scale, what every module has to bear.

What lives elsewhere: the losses' semantics and edges (``test_losses.py``), constructors' checks of numbers in general
(``test_nn_checks.py``), open_clip's own code (``examples/``, ``test_examples.py``).
"""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import re

import pytest

from conftest import missing

try:
    import torch
except ModuleNotFoundError:
    missing("torch")

from torch.nn.functional import cross_entropy, logsigmoid, normalize

import fusionsum as fs
from fusionsum.nn import ContrastiveLoss, SigmoidLoss, SymileLoss

pytestmark = pytest.mark.usefixtures("seed")
F64 = torch.float64
B, N = 7, 5


def unit(*shape):
    return normalize(torch.randn(*shape, N, dtype=F64), dim=-1).requires_grad_()


def clip(x, y, logit_scale):
    """Return the loss of CLIP's figure 3, of a scale that is no logarithm."""
    logits, labels = logit_scale * x @ y.T, torch.arange(len(x))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def siglip(x, y, logit_scale, logit_bias):
    """Return the loss of SigLIP's algorithm 1."""
    signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -logsigmoid(signs * (logit_scale * x @ y.T + logit_bias)).sum() / len(x)


def symile(embeddings, logit_scale, shuffle):
    """Return the loss of Symile's algorithm 1; its negatives are products of rows, each modality's shuffled for itself."""
    losses = []
    for m, anchor in enumerate(embeddings):
        own, keys = anchor, 1
        for k, x in enumerate(embeddings):
            if k != m:
                own, keys = own * x, keys * (x[torch.randperm(len(x))] if shuffle else x)
        logits = anchor @ keys.T
        logits = torch.where(torch.eye(len(anchor), dtype=torch.bool), own.sum(dim=1), logits)
        losses.append(cross_entropy(logit_scale * logits, torch.arange(len(anchor))))
    return sum(losses) / len(losses)


CASES = {
    "ContrastiveLoss": (ContrastiveLoss, 2, lambda xs, module: clip(*xs, module.logit_scale.exp())),
    "SigmoidLoss": (SigmoidLoss, 2, lambda xs, module: siglip(*xs, module.logit_scale.exp(), module.logit_bias)),
    **{
        f"SymileLoss, {count}, shuffle={shuffle}": (
            lambda shuffle=shuffle, **options: SymileLoss(shuffle=shuffle, **options),
            count,
            lambda xs, module, shuffle=shuffle: symile(xs, module.logit_scale.exp(), shuffle),
        )
        for count in (2, 3, 4)
        for shuffle in (True, False)
    },
}
each = pytest.mark.parametrize("name", CASES)


def made(name, dtype=F64, rows=B):
    make, count, formula = CASES[name]
    return make(dtype=dtype), [unit(rows).to(dtype).detach().requires_grad_() for _ in range(count)], formula


def with_gradients(loss, leaves):
    return loss, *torch.autograd.grad(loss, leaves)


# ---- values ----------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("rows", [1, 2, B])
def test_value_and_gradients_are_the_published_formulas(name, rows):
    module, xs, formula = made(name, rows=rows)
    leaves = [*xs, *module.parameters()]
    torch.manual_seed(3)
    got = with_gradients(module(*xs), leaves)
    torch.manual_seed(3)
    torch.testing.assert_close(got, with_gradients(formula(xs, module), leaves), rtol=1e-9, atol=1e-12)


@each
def test_float32_as_torch(name):
    module, xs, formula = made(name, torch.float32)
    leaves = [*xs, *module.parameters()]
    torch.manual_seed(3)
    got = with_gradients(module(*xs), leaves)
    torch.manual_seed(3)
    torch.testing.assert_close(got, with_gradients(formula(xs, module), leaves), rtol=1e-4, atol=1e-5)
    assert got[0].dtype == torch.float32


@pytest.mark.parametrize("count", [2, 3, 4])
def test_symile_is_the_authors(count):
    """Their package, with the same draws."""
    try:
        theirs = importlib.import_module("symile").Symile(negative_sampling="n")
    except ModuleNotFoundError:
        missing("symile (the package of Symile's authors)")
    module, xs = SymileLoss(dtype=F64), [unit(B) for _ in range(count)]
    leaves = [*xs, module.logit_scale]
    torch.manual_seed(3)
    got = with_gradients(module(*xs), leaves)
    torch.manual_seed(3)
    wanted = with_gradients(theirs(xs, module.logit_scale.exp()), leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_initial_values_are_open_clips():
    assert ContrastiveLoss(dtype=F64).logit_scale.item() == math.log(1 / 0.07)
    sigmoid = SigmoidLoss(dtype=F64)
    assert (sigmoid.logit_scale.item(), sigmoid.logit_bias.item()) == (math.log(10), -10)
    assert list(ContrastiveLoss().state_dict()) == ["logit_scale"]
    assert list(sigmoid.state_dict()) == ["logit_scale", "logit_bias"]
    clip_state = {"logit_scale": torch.tensor(3.5, dtype=F64), "logit_bias": torch.tensor(-9.0, dtype=F64)}
    sigmoid.load_state_dict(clip_state)
    assert {name: p.item() for name, p in sigmoid.named_parameters()} == {"logit_scale": 3.5, "logit_bias": -9}
    sigmoid.reset_parameters()
    assert (sigmoid.logit_scale.item(), sigmoid.logit_bias.item()) == (math.log(10), -10)


SETTINGS = {
    "positives": "any",
    "symmetric": False,
    "label_smoothing": 0.1,
    "reduction": "sum",
}


@pytest.mark.parametrize("name, value", SETTINGS.items())
def test_settings_are_those_of_the_loss(name, value):
    x, y, labels = unit(B), unit(B), torch.arange(B) // 2
    module = ContrastiveLoss(**{name: value}, dtype=F64)
    scale = module.logit_scale.exp()
    given = {"labels": labels, "key_labels": labels}
    wanted = fs.contrastive_loss(x, y, logit_scale=scale, **given, **{name: value})
    assert torch.equal(module(x, y, **given), wanted)
    assert not torch.allclose(wanted, fs.contrastive_loss(x, y, logit_scale=scale, **given))
    assert f"{name}={value!r}" in repr(module)


def test_sides_of_several_modalities_and_what_belongs_to_a_batch():
    x, y, z = unit(B), unit(B), unit(B)
    ids, weights = torch.arange(B) // 2, torch.rand(N, dtype=F64)
    given = {"exclude": (ids, ids), "fusion_weights": weights}
    for module, loss in ((ContrastiveLoss(dtype=F64), fs.contrastive_loss), (SigmoidLoss(dtype=F64), fs.sigmoid_loss)):
        own = {name: p.exp() if name == "logit_scale" else p for name, p in module.named_parameters()}
        assert torch.equal(module(x, (y, z), **given), loss(x, (y, z), **own, **given))
    _, lse, _ = ContrastiveLoss(dtype=F64)(x, y, return_lse=True)
    torch.testing.assert_close(lse, (x @ y.T / 0.07).logsumexp(dim=1))


# ---- the scale -------------------------------------------------------------------------------------------------------


@each
def test_the_scale_stays_within_its_maximum_and_comes_down_again(name):
    module, xs, formula = made(name)
    with torch.no_grad():
        module.logit_scale.fill_(math.log(5000))
    torch.manual_seed(3)
    loss = module(*xs)
    torch.testing.assert_close(module.logit_scale.exp().item(), 100.0)
    torch.manual_seed(3)
    torch.testing.assert_close(loss, formula(xs, module), rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(loss, [module.logit_scale])
    assert grad != 0


def test_without_a_maximum_the_scale_is_free():
    module, xs = ContrastiveLoss(max_logit_scale=None, dtype=F64), [unit(B), unit(B)]
    with torch.no_grad():
        module.logit_scale.fill_(math.log(5000))
    torch.testing.assert_close(module(*xs), clip(*xs, 5000.0))


@each
def test_training_finds_the_pairs(name):
    module, xs, _ = made(name, torch.float32, rows=16)
    optimizer = torch.optim.Adam([*xs, *module.parameters()], lr=0.05)
    first = None
    for _ in range(60):
        loss = module(*(normalize(x, dim=-1) for x in xs))
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() <= 0.6 * first


# ---- what every module has to bear -----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same(name, copied):
    module, xs, _ = made(name)
    with torch.no_grad():
        module.logit_scale.add_(0.25)
    twin, fresh = copied(module), made(name)[0]
    fresh.load_state_dict(module.state_dict())
    values = []
    for each_module in (module, twin, fresh):
        torch.manual_seed(3)
        values.append(each_module(*xs))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@each
def test_compiles_to_one_graph(name):
    module, xs, _ = made(name)
    leaves = [*xs, *module.parameters()]
    torch.manual_seed(3)
    wanted = with_gradients(module(*xs), leaves)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    torch.testing.assert_close(with_gradients(compiled(*xs), leaves), wanted)


@each
def test_names_its_settings_and_fits_on_any_device(name):
    module = CASES[name][0](device="meta")
    assert repr(module).startswith(f"{type(module).__name__}(logit_scale=1")
    assert "max_logit_scale=100.0" in repr(module)
    assert all(p.is_meta and p.shape == () for p in module.parameters())


def test_float16_parameters_of_module_half():
    module = ContrastiveLoss().half()
    assert module.logit_scale.dtype == torch.float16
    assert module(unit(B).half(), unit(B).half()).isfinite()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ContrastiveLoss(0.0), ValueError, "logit_scale: expected a finite number more than 0, got 0.0"),
        (lambda: ContrastiveLoss("1"), TypeError, "logit_scale: expected a finite number more than 0, got str"),
        (lambda: SigmoidLoss(math.inf), ValueError, "logit_scale: expected a finite number more than 0, got inf"),
        (lambda: SymileLoss(max_logit_scale=-1), ValueError, "max_logit_scale: expected a finite number more than 0"),
        (lambda: ContrastiveLoss(200), ValueError, "logit_scale: expected at most max_logit_scale, 100.0, got 200"),
        (lambda: SigmoidLoss(logit_bias=math.nan), ValueError, "logit_bias: expected a finite number, got nan"),
        (lambda: SigmoidLoss(reduction="max"), ValueError, "reduction: expected one of 'mean', 'sum', 'none'"),
        (lambda: ContrastiveLoss(positives="all"), ValueError, "positives: expected 'mean' or 'any', got 'all'"),
        (
            lambda: ContrastiveLoss(label_smoothing=1),
            ValueError,
            "label_smoothing: expected at least 0 and less than 1, got 1",
        ),
        (lambda: ContrastiveLoss(symmetric="no"), TypeError, "symmetric: expected a bool, got str"),
        (lambda: SymileLoss(shuffle=None), TypeError, "shuffle: expected a bool, got NoneType"),
        (lambda: SymileLoss()(unit(B)), ValueError, "embeddings: expected 2 to 8, one per modality, got 1"),
        (
            lambda: SymileLoss()(unit(B), 3),
            TypeError,
            "embeddings[1]: expected a torch.Tensor of shape (B, n), got int",
        ),
        (lambda: SymileLoss()(unit(B), unit(3)), ValueError, "embeddings[1]: expected shape (7, 5), got (3, 5)"),
        (lambda: SymileLoss()(unit(), unit()), ValueError, "embeddings[0]: expected shape (B, n), got (5,)"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
