"""Which way a call of tensors takes, how often it is checked, and all that may watch it.

What lives elsewhere: bad arguments that NumPy shares (``test_api.py``).
"""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from torch.func import grad, vmap

import fusionsum as fs
from conftest import FORMS, require_native, run_python
from eager import Fused, by_every_way, fused, simple, to_torch
from fusionsum import call, contraction
from fusionsum.autograd import routing

# torch's own, on its first use of forward AD and of inductor
pytestmark = [pytest.mark.usefixtures("seed"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
sum_op, grad_op = torch.ops.fusionsum.fusion_sum.default, torch.ops.fusionsum.fusion_sum_grad.default


# ---- one check, one decision -----------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Count checks and decisions, under whichever name a module has bound them."""
    counts = Counter()
    for function in (call.check, contraction.route, contraction._split):

        def counting(*given, function=function, **also):
            counts[function.__name__] += 1
            return function(*given, **also)

        for module in [module for name, module in sys.modules.items() if name.startswith("fusionsum")]:
            for name in [name for name, bound in vars(module).items() if bound is function]:
                monkeypatch.setattr(module, name, counting)
    return counts


STEPS = {  # shapes; what a forward pass may do
    "all pairs": ((256,), (64, 1, 256), (256, 256), {"route": 1, "check": 1, "_split": 1}),
    "mixing": ((64, 256), (256, 1, 256), (256, 1, 256), {"route": 1, "check": 1, "_split": 1}),
    "all pairs, small": ((16,), (3, 1, 16), (4, 16), {"route": 1}),
    "paired": ((16,), (3, 16), (3, 16), {"route": 1}),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_call_is_checked_once_and_routed_once(step, masked, counted):
    require_native()
    *shapes, allowed = STEPS[step]
    x = [torch.randn(shape, requires_grad=True) for shape in shapes]
    present = [torch.rand(shape[0]) > 0.5 for shape in shapes[1:]] if masked else None
    output = fs.fusion_sum(*x, activations=["tanh", None], present=present)
    assert counted == allowed
    counted.clear()
    output.sum().backward()
    assert counted == {}  # autograd has made the gradient's shape, device and dtype the output's
    with torch.no_grad():
        fs.fusion_sum(*x, activations=["tanh", None], present=present)
        assert counted == allowed
        counted.clear()
        fs.fusion_sum_grad(torch.ones_like(output), *x, activations=["tanh", None], present=present)
        assert counted == allowed


def test_a_recorded_step_that_something_watches_is_checked_at_most_once_more(counted):
    x = simple(3, 4, requires_grad=True)
    output = fs.fusion_sum(*x, activations="tanh")
    counted.clear()
    torch.autograd.grad(output.sum(), x, create_graph=True)
    assert counted["check"] <= 1


# ---- who watches -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("form", ["paired", "vector output", "mixing", "all pairs", "candidates"])
def test_autocast_changes_nothing(form, rng):
    torch._dynamo.reset()
    operands, options = to_torch(FORMS[form].case(rng, "float32", activations="gelu"))
    wanted = by_every_way(fused(options), *operands)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_every_way(fused(options), *operands)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


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
from eager import by_every_way, fused, to_torch, Fused

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
        assert [text.split()[-1] for text in printed] == ["equal", "equal"]


def test_only_what_is_asked_for_is_computed(monkeypatch):
    native = require_native()
    asked = []

    def spy(*arguments):
        asked.append(tuple(arguments[-2]))
        return native.fusion_sum_grad(*arguments)

    monkeypatch.setattr(routing, "native", SimpleNamespace(fusion_sum=native.fusion_sum, fusion_sum_grad=spy))
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
        sum_op(w, [f, g], ["tanh"], [None, None], "one", -1)
    with pytest.raises(ValueError, match=r"factors: expected 1 to 8 arrays, got 9"):
        fs.fusion_sum(w, *[f] * 9)
