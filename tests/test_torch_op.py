"""The torch op against naive torch, under everything that torch can do to a function.

What lives elsewhere: the kernels' arithmetic (``test_kernel.py``), bad arguments that NumPy shares (``test_api.py``).
"""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fusionsum as fs
from conftest import ACTIVATIONS, DTYPES, FORMS, NARROW, Case, require_native, run_python
from fusionsum import reference, torch_op

# torch's own, on its first use of forward AD and of inductor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

PHI = {
    None: lambda z: z,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
SMALL = {"A": 2, "B": 2, "C": 2, "K": 2, "O": 2, "n": 3}
MASKS = {"present": None, "rows": ("rows", "one"), "full": ("full", "zero")}
sum_op, grad_op = torch.ops.fusionsum.fusion_sum.default, torch.ops.fusionsum.fusion_sum_grad.default


def to_torch(case: Case, requires_grad: bool = False) -> tuple[list, dict]:
    """Return the operands, the weights first where there are any, and the options of the call."""
    operands = [torch.from_numpy(np.array(x)).requires_grad_(requires_grad) for x in case.operands]
    masks = None if case.present is None else [None if m is None else torch.from_numpy(m) for m in case.present]
    return operands, case.options() | {"present": masks}


def fused(options: dict, weighted: bool = True):
    return lambda *x: fs.fusion_sum(*(x if weighted else (None, *x)), **options)


def naive(options: dict, weighted: bool = True):
    """Write what a user would, with ``torch.where`` for what is absent."""

    def function(*operands):
        product, factors = (operands[0], operands[1:]) if weighted else (1, operands)
        names = options["activations"] or [None] * len(factors)
        masks = options["present"] or [None] * len(factors)
        full = torch.broadcast_shapes(*(x.shape for x in operands))
        for z, name, mask in zip(factors, names, masks, strict=True):
            if mask is not None:
                mask = reference.align_mask(mask, z)
                z = torch.where(mask, PHI[name](torch.where(mask, z, 0)), float(options["absent"] == "one"))
            else:
                z = PHI[name](z)
            product = product * z
        return product.expand(full).sum(options["dim"])

    return function


def cases(rng, form: str, masks: str, sizes=SMALL):
    """As few cases as have every activation."""
    for shift in range(0, len(ACTIVATIONS), len(FORMS[form].factors)):
        names = [ACTIVATIONS[(m + shift) % len(ACTIVATIONS)] for m in range(len(FORMS[form].factors))]
        case = FORMS[form].case(rng, **sizes, activations=names)
        yield case if MASKS[masks] is None else case.masked(rng, *MASKS[masks])


def simple(*shape: int, requires_grad: bool = False, dtype=torch.float64) -> list[torch.Tensor]:
    """Weights (n,) and two factors (..., n)."""
    shapes = (shape[-1:], shape, shape)
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- values and derivatives ------------------------------------------------------------------------------------------


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


# ---- torch.func ------------------------------------------------------------------------------------------------------


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


# ---- the registered ops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("names", [["", ""], ["gelu", "sigmoid"]])
@pytest.mark.parametrize("masks", ["none", "one", "both"])
def test_opcheck(wants, names, masks):
    if masks == "one" and wants != (True, True, True):
        return
    w, f, g = (x.requires_grad_(want) for x, want in zip(simple(3, 4), wants, strict=True))
    mask = torch.tensor([True, False, True])
    present = {"none": [None, None], "one": [mask, None], "both": [mask, ~mask]}[masks]
    torch.library.opcheck(sum_op, (w, [f, g], present, names, "zero", -1))
    u = torch.randn(3, dtype=torch.float64, requires_grad=wants[0])
    torch.library.opcheck(grad_op, (u, w, [f, g], present, names, "zero", -1, [True, wants[1], True]))


def test_ops_differentiate_by_themselves():
    w, f, g = simple(2, 3, requires_grad=True)
    u = torch.randn(2, dtype=torch.float64, requires_grad=True)
    for names in (["", ""], ["silu", "gelu"]):
        assert gradcheck(lambda w, f, g, n=names: sum_op(w, [f, g], [None, None], n, "one", 1), (w, f, g))

        def double(*x, names=names):
            return tuple(grad_op(*x[:2], x[2:], [None, None], names, "one", 1, [True, True, False]))

        assert gradcheck(double, (u, w, f, g))
        assert gradgradcheck(double, (u, w, f, g), fast_mode=True)
        assert gradcheck(
            lambda f, n=names: grad_op(u.detach(), None, [f], [None], n[:1], "one", 1, [False, True]), (f,)
        )


def test_modes_and_jit_see_the_op():
    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list = []
    x = simple(3, 4, requires_grad=True)
    with Log():
        fs.fusion_sum(*x, activations="tanh").sum().backward()
    assert sum_op in seen
    assert grad_op in seen
    graph = torch.fx.experimental.proxy_tensor.make_fx(fs.fusion_sum)(*simple(3, 4)).graph
    assert sum_op in [node.target for node in graph.nodes]


def test_profiler_hooks_and_subclasses():
    class Marked(torch.Tensor):
        pass

    x = simple(3, 4)
    found = fs.fusion_sum(x[0], x[1].as_subclass(Marked), x[2])
    assert type(found) is Marked
    torch.testing.assert_close(found.as_subclass(torch.Tensor), fs.fusion_sum(*x))
    parameters = [torch.nn.Parameter(a) for a in x]
    with torch.autograd.graph.save_on_cpu():
        fs.fusion_sum(*parameters).sum().backward()
    torch.testing.assert_close(parameters[0].grad, (x[1] * x[2]).sum(0))


# ---- compile and export ----------------------------------------------------------------------------------------------


def options_for_compile() -> list[dict]:
    return [
        {"activations": names, "present": present, "absent": absent, "dim": dim}
        for names, present, absent, dim in (
            (None, None, "one", -1),
            ("tanh", None, "one", 1),
            ([None, "gelu"], "first", "zero", -1),
            (("silu", "relu"), "both", "one", -1),
        )
    ]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", range(4))
def test_compile(backend, case):
    if backend == "inductor" and case != 3:
        return
    torch._dynamo.reset()
    options = options_for_compile()[case]

    def step(w, f, g, mask):
        present = {None: None, "first": [mask, None], "both": [mask, mask.logical_not()]}[options["present"]]
        return fs.fusion_sum(w, f, g * 2, **{**options, "present": present}) * 3

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows, terms in ((3, 4), (5, 4), (7, 9), (2, 33)):
        x = simple(rows, terms, requires_grad=True)
        mask = torch.rand(rows) > 0.5
        found, wanted = (F(*x, mask) for F in (compiled, step))
        torch.testing.assert_close(found, wanted)
        u = torch.randn_like(found)
        torch.testing.assert_close(torch.autograd.grad(found, x, u), torch.autograd.grad(wanted, x, u))
    assert counter.frame_count == 1


def test_compile_transforms_and_gradient_function():
    torch._dynamo.reset()
    w, f, g = simple(3, 4)
    u = torch.randn(3, dtype=torch.float64)
    run = {"backend": "aot_eager", "fullgraph": True}
    wanted = vmap(lambda f, g: fs.fusion_sum(w, f, g, activations="tanh"))(f, g)
    mapped = torch.compile(lambda f, g: vmap(lambda f, g: fs.fusion_sum(w, f, g, activations="tanh"))(f, g), **run)
    torch.testing.assert_close(mapped(f, g), wanted)
    compiled = torch.compile(lambda *x: fs.fusion_sum_grad(*x, activations="silu"), **run)
    torch.testing.assert_close(compiled(u, w, f, g), fs.fusion_sum_grad(u, w, f, g, activations="silu"))
    u.requires_grad_()
    found, wanted = (
        sum(d.square().sum() for d in F(u, w, f, g))
        for F in (compiled, lambda *x: fs.fusion_sum_grad(*x, activations="silu"))
    )
    torch.testing.assert_close(torch.autograd.grad(found, u), torch.autograd.grad(wanted, u))


def test_compile_before_anything_else():
    code = """
    import torch, fusionsum as fs
    f = torch.compile(lambda w, f, g: fs.fusion_sum(w, f, g, activations="tanh"), backend="aot_eager", fullgraph=True)
    x = [torch.ones(3), torch.ones(2, 3), torch.ones(2, 3)]
    print(torch.equal(f(*x), fs.fusion_sum(*x, activations="tanh")))
    """
    assert run_python("\n".join(line[4:] for line in code.splitlines())).strip() == "True"


def test_compile_errors_name_the_argument():
    torch._dynamo.reset()
    w, f, g = simple(3, 4)
    compiled = torch.compile(fs.fusion_sum, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"fusion_weights: shape \(3,\) does not broadcast"):
        compiled(w[:3], f, g)
    with pytest.raises(Exception, match=r"activations\[0\]: expected one of"):
        compiled(w, f, g, activations="swish")
    with pytest.raises(Exception, match=r"factors\[1\]: expected one of the dtypes"):
        compiled(w, f, g.long())


class Fused(torch.nn.Module):
    """A layer as users write one."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(6))
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6)

    def forward(self, x):
        return fs.fusion_sum(self.weights, self.first(x), self.second(x), activations=["tanh", None])


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    module, rows = Fused(), torch.export.Dim("rows")
    exported = torch.export.export(module, (torch.randn(3, 4),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    assert sum_op in [node.target for node in exported.graph.nodes]
    torch.export.save(exported, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2").module()
    for x in (torch.randn(2, 4), torch.randn(17, 4)):
        torch.testing.assert_close(loaded(x), module(x))


# ---- how models are trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch._dynamo.reset()
    module, x = Fused(), torch.randn(5, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    grads = []
    for forward in (module, compiled):
        module.zero_grad()
        with torch.autocast("cpu", dtype):
            output = forward(x)
            assert output.dtype == torch.float32  # narrow factors of Linear, float32 weights
            assert fs.fusion_sum(None, module.first(x), module.second(x)).dtype == dtype
        output.sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    module, x = Fused(), torch.randn(5, 4, requires_grad=True)
    module(x).sum().backward()
    wanted, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, wanted)


def test_modules_are_copied_and_saved():
    module, x = Fused(), torch.randn(5, 4)
    wanted = module(x)
    other = Fused()
    other.load_state_dict(module.state_dict())
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(same(x), wanted)
    with torch.device("meta"):
        assert Fused()(torch.randn(5, 4)).shape == (5,)


def test_ddp(tmp_path):
    """Fresh interpreters, on the loopback interface: forking one that has threads, as torch's does, may hang."""
    code = """
import os, torch, torch.distributed as dist
from test_torch_op import Fused

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=2)
torch.manual_seed(0)
module, x = Fused().double(), torch.randn(4, 4, dtype=torch.float64)
parallel = torch.nn.parallel.DistributedDataParallel(module)
parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
found = [p.grad.clone() for p in module.parameters()]
module.zero_grad()
module(x).square().mean().backward()
torch.testing.assert_close(found, [p.grad for p in module.parameters()], rtol=1e-6, atol=1e-12)
dist.destroy_process_group()
print("equal")
"""
    environment = {"STORE": str(tmp_path / "store"), "GLOO_SOCKET_IFNAME": "lo"}
    with ThreadPoolExecutor(2) as ranks:
        printed = ranks.map(lambda rank: run_python(code, RANK=str(rank), **environment), range(2))
        assert [text.strip() for text in printed] == ["equal", "equal"]


def test_only_what_is_asked_for_is_computed(monkeypatch):
    native = require_native()
    asked = []

    def spy(*arguments):
        asked.append(tuple(arguments[-2]))
        return native.fusion_sum_grad(*arguments)

    monkeypatch.setattr(torch_op, "native", SimpleNamespace(fusion_sum=native.fusion_sum, fusion_sum_grad=spy))
    for wants in itertools.product([False, True], repeat=3):
        if not any(wants):
            continue
        x = [a.requires_grad_(want) for a, want in zip(simple(3, 4), wants, strict=True)]
        output = fs.fusion_sum(*x)
        output.sum().backward()
        assert asked.pop() == wants
        assert [a.grad is not None for a in x] == list(wants)
        one = wants.index(True)
        torch.autograd.grad(fs.fusion_sum(*x).sum(), x[one])  # asked for one of those recorded
        assert asked.pop()[one]


def test_nothing_recorded():
    x = simple(3, 4, requires_grad=True)
    wanted = fs.fusion_sum(*x).detach()
    with torch.no_grad():
        assert not fs.fusion_sum(*x).requires_grad
    with torch.inference_mode():
        found = fs.fusion_sum(*x)
        assert found.is_inference()
    assert torch.equal(found, wanted)
    assert not fs.fusion_sum(*(a.detach() for a in x)).requires_grad


def test_gradients_of_the_graph():
    w, f, g = simple(3, 4, requires_grad=True)
    names = ["tanh", None]
    output = fs.fusion_sum(w, f, g, activations=names)
    names[0] = "relu"  # the caller's list is the caller's
    wanted = torch.autograd.grad((w * torch.tanh(f) * g).sum(), (w, f, g))
    torch.testing.assert_close(torch.autograd.grad(output.sum(), (w, f, g), retain_graph=True), wanted)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), (w, f, g)), wanted)
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    mask = torch.tensor([True, False, True])
    for changed in (f.detach(), mask):
        output = fs.fusion_sum(w, f, g, present=[mask, None])
        changed.logical_not_() if changed is mask else changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


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


# ---- tensors of other kinds ------------------------------------------------------------------------------------------


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


def test_views_that_owe_something():
    z = torch.randn(3, 4, dtype=torch.complex128)
    negative, ones = z.conj().imag, torch.ones(3, 4, dtype=torch.float64)
    assert negative.is_neg()
    torch.testing.assert_close(fs.fusion_sum(None, negative, ones), -z.imag.sum(-1))
    zero = torch._efficientzerotensor((3, 4), dtype=torch.float64)
    assert not fs.fusion_sum(None, zero, ones).any()
    d_zero, d_ones = fs.fusion_sum_grad(ones[:, 0], None, zero, ones)[1:]
    assert d_zero.all()
    assert not d_ones.any()
    escaped = []
    grad(lambda x: (escaped.append(x * 1), x.sum())[1])(ones)
    torch.testing.assert_close(fs.fusion_sum(None, escaped[0]).detach(), ones.sum(-1))


def test_errors():
    w, f, g = simple(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will drop them
        quantised = torch.quantize_per_tensor(g.float(), 0.1, 0, torch.qint8)
    for bad, kind, message in (
        (g.to("meta"), ValueError, r"factors\[1\]: is on meta, expected cpu"),
        (g.long(), TypeError, r"factors\[1\]: expected one of the dtypes .* got int64"),
        (g.to(torch.complex64), TypeError, r"factors\[1\]: expected one of the dtypes .* got complex64"),
        (quantised, TypeError, r"factors\[1\]: expected one of the dtypes .* got qint8"),
        (g.to_sparse(), TypeError, "expected dense tensors, got one of layout torch.sparse_coo"),
        (g[:, :3], ValueError, r"factors\[1\]: shape \(3, 3\) does not broadcast with \(3, 4\)"),
        (g.numpy(), TypeError, r"factors\[1\]: expected a torch.Tensor"),
        ([1.0], TypeError, r"factors\[1\]: expected a numpy.ndarray or torch.Tensor, got list"),
    ):
        for first in (f, f.clone().requires_grad_()):
            with pytest.raises(kind, match=message):
                fs.fusion_sum(w, first, bad)
            with pytest.raises(kind, match=message):
                fs.fusion_sum_grad(f[:, 0], w, first, bad)
    with pytest.raises(TypeError, match=r"grad_output: expected .* of the output's shape, got None"):
        fs.fusion_sum_grad(None, w, f, g)
    with pytest.raises(ValueError, match=r"grad_output: expected shape \(3,\)"):
        fs.fusion_sum_grad(f, w, f, g)
    with pytest.raises(ValueError, match=r"present\[0\]: is on meta"):
        fs.fusion_sum(w, f, g, present=[torch.ones(3, dtype=torch.bool, device="meta"), None])
    with pytest.raises(ValueError, match="dim: expected -2 to 1"):
        vmap(lambda f: fs.fusion_sum(w, f, f, dim=2))(torch.stack([f, g]))
    with pytest.raises(TypeError, match="absent: expected 'one' or 'zero'"):
        fs.fusion_sum(w, f.requires_grad_(), g, absent=0)
    with pytest.raises(ValueError, match=r"activations: expected 2 entries"):
        sum_op(w, [f, g], [None, None], ["tanh"], "one", -1)
    with pytest.raises(ValueError, match=r"factors: expected 1 to 8 arrays, got 9"):
        fs.fusion_sum(w, *[f] * 9)
