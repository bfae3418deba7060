"""`fusionsum.nn`: the layers against the formulas of their papers.

What lives elsewhere: the sum inside them (``test_kernel.py``), autograd (``test_torch_op.py``).
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import string

import pytest

from conftest import ACTIVATIONS, missing

try:
    import torch
except ModuleNotFoundError:
    missing("torch")

from fusionsum.nn import LowRankFusion

DIMS, OUTPUTS, RANK, ROWS = (5, 3, 4), 6, 7, 9


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def layer(dims=DIMS, **options):
    fusion = LowRankFusion(dims, OUTPUTS, RANK, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_()
    return fusion


def batch(dims=DIMS):
    return [torch.randn(ROWS, d, dtype=torch.float64, requires_grad=True) for d in dims]


def dense(fusion, inputs):
    """Liu et al. (2018), eq. 2-5: the weight tensor, from its factors, times the outer product of all [x, 1]."""
    letters = string.ascii_lowercase[: len(inputs)]
    factors = [
        torch.cat([linear.weight, linear.bias[:, None]], dim=1).view(RANK, OUTPUTS, -1) for linear in fusion.factors
    ]
    modes = ",".join(f"RO{letter}" for letter in letters)
    weight = torch.einsum(f"R,{modes}->O{letters}", fusion.fusion_weights[:, 0], *factors)
    ones = torch.ones(ROWS, 1, dtype=torch.float64)
    modes = ",".join(f"B{letter}" for letter in letters)
    outer = torch.einsum(f"{modes}->B{letters}", *(torch.cat([x, ones], dim=1) for x in inputs))
    return torch.einsum(f"O{letters},B{letters}->BO", weight, outer) + fusion.fusion_bias


@pytest.mark.parametrize("modalities", range(1, len(DIMS) + 1))
def test_equals_the_dense_tensor_of_the_paper(modalities):
    fusion, inputs = layer(DIMS[:modalities]), batch(DIMS[:modalities])
    wanted = dense(fusion, inputs)
    got = fusion(*inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    leaves = [*inputs, *fusion.parameters()]
    grad = torch.randn_like(got)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), wanted_grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_apply_to_the_projections(activation):
    fusion, inputs = layer(activations=[activation, None, activation]), batch()
    phi = getattr(torch.nn.functional, activation) if activation else lambda z: z
    factors = [linear(x).unflatten(-1, (RANK, OUTPUTS)) for linear, x in zip(fusion.factors, inputs, strict=True)]
    wanted = (fusion.fusion_weights * phi(factors[0]) * factors[1] * phi(factors[2])).sum(1) + fusion.fusion_bias
    torch.testing.assert_close(fusion(*inputs), wanted, rtol=1e-12, atol=1e-12)


def test_a_missing_modality_leaves_the_lower_order_terms():
    """Each row has the value of the layer of the modalities present, whatever the missing one's features are."""
    fusion, inputs = layer(), batch()
    heard = torch.arange(ROWS) % 2 == 0
    with torch.no_grad():
        inputs[1][~heard] = math.nan
    got = fusion(*inputs, present=[None, heard, None])
    without = layer((DIMS[0], DIMS[2]))
    state = {name: p for name, p in fusion.state_dict().items() if "factors.1" not in name}
    without.load_state_dict({name.replace("factors.2", "factors.1"): p for name, p in state.items()})
    torch.testing.assert_close(got[~heard], without(inputs[0], inputs[2])[~heard])
    torch.testing.assert_close(got[heard], fusion(*inputs)[heard])

    leaves = [*inputs, *fusion.parameters()]
    grads = torch.autograd.grad(got.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][~heard] == 0).all()
    assert (grads[1][heard] != 0).any()


def test_leading_dims_broadcast():
    fusion = layer(DIMS[:2])
    x, y = torch.randn(4, 1, DIMS[0], dtype=torch.float64), torch.randn(3, DIMS[1], dtype=torch.float64)
    pairs = fusion(x, y)
    assert pairs.shape == (4, 3, OUTPUTS)
    torch.testing.assert_close(pairs[2, 1], fusion(x[2, 0], y[1]))


def test_no_bias():
    fusion, inputs = layer(bias=False), batch()
    assert fusion.fusion_bias is None
    assert "fusion_bias" not in fusion.state_dict()
    biased = layer()
    biased.load_state_dict(fusion.state_dict() | {"fusion_bias": torch.ones(OUTPUTS)})
    torch.testing.assert_close(fusion(*inputs) + 1, biased(*inputs))


def test_initialisation_is_the_papers():
    """Deviations as `xavier_normal_` gives them for the paper's (rank, d + 1, output_dim) and (1, rank) tensors."""
    fusion = LowRankFusion((255, 127), 32, 64)
    for linear in fusion.factors:
        parameters = torch.cat([linear.weight, linear.bias[:, None]], dim=1)
        papers = torch.nn.init.xavier_normal_(torch.empty(64, linear.in_features + 1, 32))
        assert parameters.numel() == papers.numel()
        torch.testing.assert_close(parameters.std(), papers.std(), rtol=0.02, atol=0)
        torch.testing.assert_close(linear.bias.std(), papers.std(), rtol=0.1, atol=0)
    assert (fusion.fusion_bias == 0).all()
    assert 0.6 < fusion.fusion_weights.std() / math.sqrt(2 / 65) < 1.4


def test_every_parameter_moves_and_the_loss_falls():
    fusion = LowRankFusion(DIMS, OUTPUTS, RANK)
    inputs = [x.detach().float() for x in batch()]
    labels = torch.arange(ROWS) % OUTPUTS
    before = copy.deepcopy(fusion.state_dict())
    optim = torch.optim.AdamW(fusion.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optim.zero_grad()
        loss = torch.nn.functional.cross_entropy(fusion(*inputs), labels)
        loss.backward()
        optim.step()
        if not losses:
            assert all((p != before[name]).all() for name, p in fusion.named_parameters())
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def saved_and_loaded(fusion):
    file = io.BytesIO()
    torch.save(fusion.state_dict(), file)
    file.seek(0)
    fresh = LowRankFusion(DIMS, OUTPUTS, RANK, dtype=torch.float64)
    fresh.load_state_dict(torch.load(file))
    return fresh


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_compute_the_same_and_are_independent(copied):
    fusion, inputs = layer(), batch()
    wanted = fusion(*inputs)
    twin = copied(fusion)
    assert torch.equal(twin(*inputs), wanted)
    with torch.no_grad():
        twin.fusion_bias.add_(1)
    assert torch.equal(fusion(*inputs), wanted)


def test_follows_device_and_dtype():
    fusion = LowRankFusion(DIMS, OUTPUTS, RANK, device="meta")
    assert fusion(*(torch.empty(ROWS, d, device="meta") for d in DIMS)).shape == (ROWS, OUTPUTS)
    half = LowRankFusion(DIMS, OUTPUTS, RANK).bfloat16()
    assert half(*(x.bfloat16() for x in batch())).dtype == torch.bfloat16


def test_repr_names_the_sizes():
    sizes = "input_dims=(5, 3, 4), output_dim=6, rank=7, bias=True, activations='tanh'"
    assert sizes in repr(layer(activations="tanh"))


@pytest.mark.parametrize(
    "sizes, error, message",
    [
        (((), 6, 7), ValueError, "input_dims: expected 1 to 8 modalities, got 0"),
        (((2,) * 9, 6, 7), ValueError, "input_dims: expected 1 to 8 modalities, got 9"),
        (((5, 0), 6, 7), ValueError, r"input_dims\[1\]: expected at least 1, got 0"),
        (((5, 3.0), 6, 7), TypeError, r"input_dims\[1\]: expected an integer, got float"),
        (((5, 3), -1, 7), ValueError, "output_dim: expected at least 1, got -1"),
        (((5, 3), 6, True), TypeError, "rank: expected an integer, got bool"),
    ],
)
def test_wrong_sizes(sizes, error, message):
    with pytest.raises(error, match=message):
        LowRankFusion(*sizes)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x: (x[:2], None), ValueError, "inputs: expected 3, one per modality, got 2"),
        (lambda x: ([x[0], x[2], x[1]], None), ValueError, r"inputs\[1\]: expected shape \(..., 3\), got \(9, 4\)"),
        (lambda x: ([x[0], x[1], x[2][0, 0]], None), ValueError, r"inputs\[2\]: expected shape \(..., 4\), got \(\)"),
        (lambda x: (x, [None]), ValueError, "present: expected 3, one per modality, got 1"),
        (
            lambda x: (x, [None, torch.ones(9), None]),
            TypeError,
            r"present\[1\]: expected a boolean tensor, got torch",
        ),
        (lambda x: (x, [[True] * 9, None, None]), TypeError, r"present\[0\]: expected a boolean tensor, got list"),
        (
            lambda x: (x, [None, None, torch.ones(9, 1, dtype=torch.bool)]),
            ValueError,
            r"present\[2\]: expected shape \(9,\), got \(9, 1\)",
        ),
    ],
)
def test_wrong_inputs(change, error, message):
    inputs, present = change(batch())
    with pytest.raises(error, match=message):
        layer()(*inputs, present=present)


def test_compiles_without_a_graph_break():
    fusion, inputs = layer(), [x.detach() for x in batch()]
    heard = torch.arange(ROWS) % 2 == 0
    wanted = fusion(*inputs, present=[None, heard, None])
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, present=[None, heard, None]), wanted)
    compiled(*inputs).sum().backward()
    assert all(p.grad is not None for p in fusion.parameters())


def test_under_autocast():
    fusion = LowRankFusion(DIMS, OUTPUTS, RANK)
    inputs = [x.detach().float() for x in batch()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion(*inputs)
    torch.testing.assert_close(fused.float(), fusion(*inputs), rtol=0.05, atol=0.05)
    fused.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fusion.parameters())
