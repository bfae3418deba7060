"""`fusionsum.nn`: the layers against the formulas of their papers, and what every torch module has to bear.

What lives elsewhere: the formulas and the table of layers (``published.py``), the sum inside them (``test_kernel.py``),
autograd (``test_autograd_derivatives.py``).
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from conftest import missing, run_python

try:
    import torch
except ModuleNotFoundError:
    missing("torch")

from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fusionsum.nn as fnn
from fusionsum.nn import GMF, MFB, MLB, CPBilinear, DistMult, LowRankFusion, ResidualFusion, TensorFusion, tensor
from fusionsum.nn.layer import mapped_twice, subsets
from published import DIMS, F64, FEATURES, MM, ONE_EACH, OUTPUTS, ROWS, TABLE, Parameters, moved, parity

pytestmark = pytest.mark.usefixtures("seed")
each = pytest.mark.parametrize("name", TABLE)
each_of_features = pytest.mark.parametrize("name", FEATURES)
each_layer = pytest.mark.parametrize("name", ONE_EACH)


@each
def test_equals_the_published_formula(name):
    forward, gradient = parity(TABLE[name])
    assert forward <= 1e-12
    assert gradient <= 1e-11


@each_of_features
def test_equals_the_formula_where_modalities_are_missing(name):
    entry = TABLE[name]
    masks = [(torch.arange(ROWS) + m) % 3 != 0 for m in range(len(entry.dims))]
    forward, gradient = parity(entry, masks)
    assert forward <= 1e-12
    assert gradient <= 1e-11


@each
def test_a_training_step_moves_every_parameter(name):
    entry = TABLE[name]
    registered, those = moved(entry)
    assert those == registered
    parameters = Parameters()
    entry.formula(parameters, entry.inputs(), entry.all_present(), entry.arguments())
    published = sum(p.numel() for name, p in parameters.items() if name not in ("gamma", "embedding_range"))
    assert sum(p.numel() for p in entry.make().parameters()) == published


def test_the_table_has_every_layer():
    layers = {name for name in fnn.__all__ if not name.endswith("Loss")}  # test_nn_losses.py
    assert {entry.layer.__name__ for entry in TABLE.values()} == layers


# ---- missing modalities and shapes -----------------------------------------------------------------------------------


@each_of_features
def test_what_is_missing_is_never_used(name):
    entry = TABLE[name]
    layer, inputs = entry.make(dtype=F64), entry.inputs()
    heard = torch.arange(ROWS) % 2 == 0
    present = [None] * (len(inputs) - 1) + [heard]
    wanted = layer(*inputs, present=present)
    with torch.no_grad():
        inputs[-1][~heard] = math.nan
    got = layer(*inputs, present=present)
    assert torch.equal(got, wanted)
    grads = torch.autograd.grad(got.sum(), [*inputs, *layer.parameters()])
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[len(inputs) - 1][~heard] == 0).all()
    assert (grads[len(inputs) - 1][heard] != 0).any()
    torch.testing.assert_close(layer(*inputs)[heard], got[heard])


@each_of_features
@pytest.mark.parametrize("masked", [False, True])
def test_contributions_add_up_to_the_output(name, masked):
    entry = TABLE[name]
    layer, inputs = entry.make(dtype=F64).eval(), entry.inputs()
    present = [(torch.arange(ROWS) + m) % 3 != 0 for m in range(len(inputs))] if masked else None
    parts = layer.contributions(*inputs, present=present)
    assert list(parts) == subsets(len(inputs))
    wanted = layer(*inputs, present=present)
    torch.testing.assert_close(sum(part.sum(dim=-2) for part in parts.values()), wanted, rtol=1e-12, atol=1e-12)
    for m, x in enumerate(inputs):
        changed = layer.contributions(*inputs[:m], 2 * x, *inputs[m + 1 :], present=present)
        for chosen, part in parts.items():
            assert m in chosen or torch.equal(changed[chosen], part)
            if present is not None and m in chosen:
                assert (part[~present[m]].abs() <= 1e-12).all()


@pytest.mark.parametrize("kind", [LowRankFusion, ResidualFusion])
def test_contributions_are_the_product_multiplied_out(kind):
    layer, x, y = kind((3, 4), 2, rank=5, dtype=F64), torch.randn(6, 3, dtype=F64), torch.randn(6, 4, dtype=F64)
    parts = layer.contributions(x, y)
    (wx, wy), (bx, by) = (
        [f(z).reshape(-1, 5, 2) for f, z in zip(maps, (x, y), strict=True)]
        for maps in (
            [lambda z, f=f: z @ f.weight.T for f in layer.factors],
            [lambda z, f=f: f.bias.expand(6, 10) for f in layer.factors],
        )
    )
    for chosen, product in {(0,): wx * by, (1,): bx * wy, (0, 1): wx * wy}.items():
        torch.testing.assert_close(parts[chosen][:, :5], layer.fusion_weights * product)
        if kind is ResidualFusion and len(chosen) == 1:
            torch.testing.assert_close(parts[chosen][:, 5], (x, y)[chosen[0]] @ layer.linears[chosen[0]].weight.T)
        else:
            assert parts[chosen].shape[1] == 5


@each_of_features
def test_leading_dims_broadcast(name):
    entry = TABLE[name]
    layer, (first, *others) = entry.make(dtype=F64), entry.inputs()
    wide = first.view(3, 3, -1)
    got = layer(wide, *(x[:3] for x in others))
    assert got.shape == (3, 3, OUTPUTS)
    torch.testing.assert_close(got[2, 1], layer(wide[2, 1], *(x[1] for x in others)))


@each_of_features
def test_takes_a_list_as_the_originals_do(name):
    entry = TABLE[name]
    if entry.layer is CPBilinear:
        return
    layer, inputs = entry.make(dtype=F64), entry.inputs()
    assert torch.equal(layer(inputs), layer(*inputs))


# ---- what every torch module has to bear -----------------------------------------------------------------------------


def saved_and_loaded(layer, entry):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = entry.make(dtype=F64)
    fresh.load_state_dict(torch.load(file))
    return fresh


@each
@pytest.mark.parametrize(
    "copied",
    [
        lambda layer, entry: copy.deepcopy(layer),
        lambda layer, entry: pickle.loads(pickle.dumps(layer)),
        saved_and_loaded,
    ],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_copies_compute_the_same_and_are_independent(name, copied):
    entry = TABLE[name]
    layer, inputs = entry.make(dtype=F64), entry.inputs()
    wanted = layer(*inputs)
    twin = copied(layer, entry)
    assert torch.equal(twin(*inputs), wanted)
    assert len(list(twin.parameters())) == len(list(layer.parameters()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.equal(twin(*inputs), wanted)
    assert torch.equal(layer(*inputs), wanted)


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, parameter):
        """Return what is used in the place of the parameter."""
        return 2 * parameter


@each
def test_parameters_can_be_parametrized(name):
    entry = TABLE[name]
    layer, inputs = entry.make(dtype=F64), entry.inputs()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    for module in list(layer.modules()):
        for parameter, value in list(module._parameters.items()):
            if value is not None:
                torch.nn.utils.parametrize.register_parametrization(module, parameter, Doubled())
    torch.testing.assert_close(layer(*inputs), twin(*inputs))


@each
def test_made_on_meta_and_drawn_later(name):
    entry = TABLE[name]
    layer, fresh = entry.make(device="meta"), entry.make()
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    layer.reset_parameters()
    for ours, theirs in zip(layer.parameters(), fresh.parameters(), strict=True):
        assert ours.isfinite().all()
        assert (ours == 0).all() == (theirs == 0).all()
        assert ours.numel() < 30 or 0.5 * theirs.std() <= ours.std() <= 2 * theirs.std()
    assert layer(*entry.inputs(torch.float32)).isfinite().all()


@each_layer
def test_compiles_without_a_graph_break(name):
    entry = TABLE[name]
    layer, inputs = entry.make(dtype=F64), entry.inputs()
    options = {} if entry.indices else {"present": [torch.arange(ROWS) % 2 == 0] + [None] * (len(inputs) - 1)}
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*inputs, **options), layer(*inputs, **options)
    torch.testing.assert_close(got, wanted)
    leaves = list(layer.parameters())
    grad = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad))


@each_layer
def test_under_autocast(name):
    entry = TABLE[name]
    layer, inputs = entry.make(), entry.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = layer(*inputs)
    torch.testing.assert_close(fused.float(), layer(*inputs), rtol=0.05, atol=0.05)
    fused.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@each_layer
def test_follows_device_and_dtype(name):
    entry = TABLE[name]
    inputs = [x if x is None or not x.is_floating_point() else x.detach().bfloat16() for x in entry.inputs()]
    half = entry.make().bfloat16()(*inputs)
    assert half.dtype == torch.bfloat16
    meta = entry.make(device="meta", dtype=torch.bfloat16)(*(x if x is None else x.to("meta") for x in inputs))
    assert meta.shape == half.shape


def test_ddp(tmp_path):
    """Two fresh interpreters, each with half the rows of every layer's batch, against one with all rows."""
    code = """
import copy, os, torch, torch.distributed as dist
from fusionsum.nn.layer import mapped_twice, subsets
from published import ONE_EACH, TABLE

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=2)
for name in ONE_EACH:
    torch.manual_seed(0)
    entry = TABLE[name]
    layer = entry.make(dtype=torch.float64)
    inputs = [x if x is None else x.detach()[:8] for x in entry.inputs()]
    parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
    parallel(*(x if x is None else x[4 * rank : 4 * rank + 4] for x in inputs)).square().mean().backward()
    layer(*inputs).square().mean().backward()
    found, wanted = ([p.grad for p in module.parameters()] for module in (parallel, layer))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)
dist.destroy_process_group()
print("equal")
"""
    environment = {"STORE": str(tmp_path / "store"), "GLOO_SOCKET_IFNAME": "lo"}
    with ThreadPoolExecutor(2) as ranks:
        printed = ranks.map(lambda rank: run_python(code, RANK=str(rank), **environment), range(2))
        assert [text.split()[-1] for text in printed] == ["equal", "equal"]


@each
def test_repr_names_the_arguments(name):
    entry = TABLE[name]
    shown = repr(entry.make())
    for argument, value in (entry.options if entry.indices else entry.options | {"input_dims": entry.dims}).items():
        assert f"{argument}={value!r}" in shown or entry.layer is CPBilinear


class Counter(TorchDispatchMode):
    """Counts the multiply-adds of matrix products. Torch's FlopCounterMode hooks all modules, which changes the layers."""

    def __init__(self):
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.work += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result) // 2
        return result


def counted(function, *arguments):
    """Return the result, and the multiply-adds of the matrix products that led to it."""
    with Counter() as counter:
        result = function(*arguments)
    return result, counter.work


@pytest.mark.parametrize("rows, size, hidden, width", [(50, 4, 20, 60), (3, 40, 20, 60), (3, 4, 20, 60)])
def test_two_maps_are_one_where_that_is_cheaper(rows, size, hidden, width):
    first, second = torch.nn.Linear(size, hidden, dtype=F64), torch.nn.Linear(hidden, width, dtype=F64)
    x = torch.randn(rows, size, dtype=F64, requires_grad=True)
    wanted, apart = counted(lambda: second(first(x)))
    got, work = counted(mapped_twice, x, first, second)
    torch.testing.assert_close(got, wanted)
    assert work <= apart
    assert (work < apart) == (rows == 50)
    leaves, grad = [x, *first.parameters(), *second.parameters()], torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad))


def called(count):
    """Return a hook that counts its calls and changes nothing."""

    def hook(*arguments):
        count[0] += 1

    return hook


MODULE_HOOKS = [name for name in dir(torch.nn.Module) if re.fullmatch(r"register_(forward|full_backward)_.*hook", name)]
GLOBAL_HOOKS = [
    name for name in dir(torch_module) if re.fullmatch(r"register_module_(forward|full_backward)_.*hook", name)
]


HOOKED = [*ONE_EACH, *(name for name in TABLE if ", all" in name)]  # the latter read the weight of an embedding
of_embeddings = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing when gradients are computed with respect"
)


def test_the_kinds_of_hooks():
    kinds = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    assert [f"register_{kind}" for kind in kinds] == MODULE_HOOKS
    assert [f"register_module_{kind}" for kind in kinds] == GLOBAL_HOOKS


def maps_of(layer):
    """Return the linear maps and embeddings of a layer, by name."""
    return {name: module for name, module in layer.named_modules() if list(module.parameters(recurse=False)) and name}


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", MODULE_HOOKS)
@of_embeddings
def test_a_map_that_is_hooked_is_called(name, kind, monkeypatch):
    """Layers that compute several maps as one, or read an embedding's weight, do not where a hook would be left out."""
    monkeypatch.setattr(tensor, "LEAST_SAVED", 0)
    for where in maps_of(TABLE[name].make()):
        entry, count = TABLE[name], [0]
        layer = entry.make(dtype=F64)
        inputs = entry.inputs()
        wanted = layer(*inputs)
        getattr(maps_of(layer)[where], kind)(called(count))
        got = layer(*inputs)
        torch.testing.assert_close(got, wanted)
        got.sum().backward()
        assert count[0] > 0, where


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
@of_embeddings
def test_maps_are_called_where_all_modules_are_hooked(name, kind, monkeypatch):
    monkeypatch.setattr(tensor, "LEAST_SAVED", 0)
    entry, seen = TABLE[name], set()
    layer, inputs = entry.make(dtype=F64), entry.inputs()
    handle = getattr(torch_module, kind)(lambda module, *arguments: seen.add(module))
    try:
        layer(*inputs).sum().backward()
    finally:
        handle.remove()
    assert set(maps_of(layer).values()) <= seen


@pytest.mark.parametrize("changed", ["forward", "weight"])
def test_a_map_that_is_patched_is_called(changed):
    first, second = torch.nn.Linear(4, 20), torch.nn.Linear(20, 60)
    x = torch.randn(50, 4)
    if changed == "forward":
        second.forward = lambda x: torch.zeros(50, 60)
    else:
        torch.nn.utils.parametrize.register_parametrization(second, "weight", Doubled())
    assert torch.equal(mapped_twice(x, first, second), second(first(x)))


# ---- initialisation and dropout --------------------------------------------------------------------------------------


def test_low_rank_initialisation_is_the_papers():
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


@pytest.mark.parametrize("init", ["published", "additive"])
def test_low_rank_fusion_starts_near_a_sum_only_if_additive(init):
    """Of what two modalities change in the output, little is their interaction, or nearly all."""
    fusion = LowRankFusion((32, 32), 64, 16, init=init, dtype=F64)
    x, y, nothing = torch.randn(256, 32, dtype=F64), torch.randn(256, 32, dtype=F64), torch.zeros(256, 32, dtype=F64)
    first, second = fusion(x, nothing) - fusion(nothing, nothing), fusion(nothing, y) - fusion(nothing, nothing)
    interaction = (fusion(x, y) - fusion(nothing, nothing) - first - second).std() / (first + second).std()
    assert interaction < 0.5 if init == "additive" else interaction > 2


def test_cp_bilinear_starts_with_the_variance_of_bilinear():
    inputs = torch.randn(512, 40), torch.randn(512, 90)
    ours, theirs = (layer(*inputs).std() for layer in (CPBilinear(40, 90, 64, 200), torch.nn.Bilinear(40, 90, 64)))
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0)


def test_the_other_initialisations_are_the_originals():
    for made, bound in (
        (DistMult(100, 50, 64, gamma=6.0).entities.weight, 8 / 64),
        (fnn.ComplEx(100, 50, 64).relations.weight, 14 / 64),
        (GMF(10, 10, 300).fusion_weights, 0.1),
        (fnn.TuckerFusion((3, 3), 2, 25).core.weight, 0.2),
        (fnn.TuckerFusion((3, 3), 2, 400).core_bias, 0.05),
        (TensorFusion((9, 4), 50).core.weight, 50**-0.5),
    ):
        assert 0.95 * bound < made.abs().max() <= bound
        torch.testing.assert_close(made.std(), torch.tensor(bound / 3**0.5), rtol=0.1, atol=0)
    torch.testing.assert_close(GMF(500, 10).users.weight.std(), torch.tensor(0.01), rtol=0.1, atol=0)


DROPOUTS = [
    (name, option)
    for name in ONE_EACH
    for option in inspect.signature(TABLE[name].layer).parameters
    if option.startswith("dropout")
]


@pytest.mark.parametrize("name, option", DROPOUTS)
def test_dropout_drops_in_training_only(name, option):
    entry = TABLE[name]
    layer = entry.make(**{option: 0.5}, dtype=F64)
    plain = entry.make(dtype=F64)
    plain.load_state_dict(layer.state_dict())
    inputs = entry.inputs()
    wanted = plain(*inputs)
    assert not torch.equal(layer(*inputs), wanted)
    assert torch.equal(layer.eval()(*inputs), wanted)


@pytest.mark.parametrize(
    "layer, rates, rate",
    [
        (MLB, {"dropout_input": 0.5}, 0.75),
        (MFB, {"dropout_input": 0.2, "dropout_pre_norm": 0.5}, 0.68),
        (fnn.MFH, {"dropout_input": 0.2, "dropout_pre_lin": 0.5}, 0.68),
    ],
)
def test_terms_are_dropped_as_by_dropout_of_each_factor(layer, rates, rate):
    """Of independent dropouts one after the other a term survives all or is dropped; those that stay grow by 1 / keep."""
    fusion = layer((3, 3), 4000, 4000, **{} if layer is MLB else {"factor": 1}, activ_output=None, dtype=F64, **rates)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            parameter.fill_(1 if name.endswith("bias") else 0)
        eye = torch.eye(4000, dtype=F64)
        fusion.linear_out.weight.copy_(torch.cat([eye, 0 * eye], 1) if layer is fnn.MFH else eye)
        fusion.linear_out.bias.zero_()
    terms = fusion(torch.zeros(1, 3, dtype=F64), torch.zeros(1, 3, dtype=F64))
    kept = terms[terms != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    assert abs((terms == 0).double().mean() - rate) < 0.04


def test_high_order_stages_drop_independently_of_what_they_share():
    """The second stage's terms are those the first kept, thinned once more."""
    fusion = fnn.MFH((3, 3), 4000, 2000, 1, activ_output=None, dropout_pre_lin=0.5, dtype=F64)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            parameter.fill_(1 if name.endswith("bias") else 0)
        fusion.linear_out.weight.copy_(torch.eye(4000, dtype=F64))
        fusion.linear_out.bias.zero_()
    first, second = fusion(torch.zeros(1, 3, dtype=F64), torch.zeros(1, 3, dtype=F64)).chunk(2, 1)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert set(second.unique().tolist()) == {0.0, 4.0}
    assert (first[second != 0] != 0).all()
    assert 0.4 < (second[first != 0] == 0).double().mean() < 0.6


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x: (x[:2], None), ValueError, "inputs: expected 3, one per modality, got 2"),
        (lambda x: ([x[0], x[2], x[1]], None), ValueError, r"inputs\[1\]: expected shape \(..., 3\), got \(9, 4\)"),
        (lambda x: ([x[0], x[1], x[2][0, 0]], None), ValueError, r"inputs\[2\]: expected shape \(..., 4\), got \(\)"),
        (
            lambda x: ([x[0], None, x[2]], None),
            TypeError,
            r"inputs\[1\]: expected a torch.Tensor of shape \(..., 3\), got NoneType; say what is missing by `present`",
        ),
        (lambda x: ([x[0].tolist(), *x[1:]], None), TypeError, r"inputs\[0\]: expected a torch.Tensor of .*, got list"),
        (lambda x: (x, [None]), ValueError, "present: expected 3, one per modality, got 1"),
        (lambda x: (x, [None, torch.ones(9), None]), TypeError, r"present\[1\]: expected a boolean tensor, got torch"),
        (lambda x: (x, [[True] * 9, None, None]), TypeError, r"present\[0\]: expected a boolean tensor, got list"),
        (
            lambda x: (x, [None, None, torch.ones(9, 1, dtype=torch.bool)]),
            ValueError,
            r"present\[2\]: expected shape \(9,\), got \(9, 1\)",
        ),
    ],
)
@pytest.mark.parametrize("name", [name for name in FEATURES if TABLE[name].dims == DIMS])
def test_wrong_inputs(name, change, error, message):
    inputs, present = change(TABLE[name].inputs())
    with pytest.raises(error, match=message):
        TABLE[name].make(dtype=F64)(*inputs, present=present)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: m(None, torch.tensor([1])), ValueError, "heads, tails: expected at most one to be None"),
        (
            lambda m: m(torch.tensor([1.0]), torch.tensor([1])),
            TypeError,
            "heads: expected a tensor of integers, got torch",
        ),
        (lambda m: m(torch.tensor([1]), [1]), TypeError, "relations: expected a tensor of integers, got list"),
    ],
)
def test_wrong_indices(call, error, message):
    with pytest.raises(error, match=message):
        call(DistMult(5, 3, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("linear1.bias"), "missing: linear1.bias; unexpected: none"),
        (
            lambda s: s.update({"fusion.linear0.bias": s["linear0.bias"]}),
            "missing: none; unexpected: fusion.linear0.bias",
        ),
        (
            lambda s: s.update({"linear0.bias": torch.ones(3)}),
            r"state\['linear0.bias'\]: expected shape \(8,\), got \(3,\)",
        ),
    ],
)
def test_wrong_reference_states(change, message):
    layer = MLB((5, 3), 6, 8)
    before = copy.deepcopy(layer.state_dict())
    names = ["linear0", "linear1", "linear_out"]
    modules = zip(names, [*layer.linears, layer.linear_out], strict=True)
    state = {f"{name}.{key}": value + 1 for name, linear in modules for key, value in linear.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        layer.load_reference_state_dict(state)
    assert all(torch.equal(p, before[name]) for name, p in layer.state_dict().items())


SHARED = [
    TABLE["MUTAN, shared"],
    TABLE["BLOCK, shared, uneven"],
    replace(TABLE["TuckerFusion"], options=MM | {"shared": True}, dims=(4, 4)),
]


@pytest.mark.parametrize("entry", SHARED, ids=lambda entry: entry.layer.__name__)
def test_states_of_two_maps_are_not_loaded_into_one(entry):
    """The original's Tucker(shared=True) keeps two maps, which differ; nothing says so but their values."""
    layer = entry.make(dtype=F64)
    before = copy.deepcopy(layer.state_dict())
    state = {name: torch.full(shape, 0.5, dtype=F64) for name, shape in layer._reference_shapes().items()}
    pairs = {
        name: re.sub(r"^((merge_)?linears?)0", r"\g<1>1", name) for name in state if re.match(r".*linears?0", name)
    }
    assert pairs
    for theirs, other in pairs.items():
        changed = {**state, other: state[other] + 0.25}
        message = rf"state\['{re.escape(theirs)}'\], state\['{re.escape(other)}'\]: expected equal .*difference of 0.25"
        with pytest.raises(ValueError, match=message):
            layer.load_reference_state_dict(changed)
        assert all(torch.equal(p, before[name]) for name, p in layer.state_dict().items())
    layer.load_reference_state_dict(state)
    assert all((p == 0.5).all() for p in layer.parameters())


def test_layers_without_an_original_say_so():
    with pytest.raises(NotImplementedError, match="LateFusion has no original implementation with a state dict"):
        fnn.LateFusion((5, 3), 6).load_reference_state_dict({})
    with pytest.raises(ValueError, match="the original fuses 3 modalities, this layer 2"):
        LowRankFusion((5, 3), 6, 7).load_reference_state_dict({})
