"""What torch does with the registered operations: compile, export, save and load, ONNX, a second operation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.func import vmap

import fusionsum as fs
from conftest import run_python
from eager import Fused, simple

# torch's own, on its first use of forward AD and of inductor
pytestmark = [pytest.mark.usefixtures("seed"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
sum_op, grad_op = torch.ops.fusionsum.fusion_sum.default, torch.ops.fusionsum.fusion_sum_grad.default


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


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    module, rows = Fused(), torch.export.Dim("rows")
    exported = torch.export.export(module, (torch.randn(3, 4),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    assert sum_op in [node.target for node in exported.graph.nodes]
    torch.export.save(exported, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2").module()
    for x in (torch.randn(2, 4), torch.randn(17, 4)):
        torch.testing.assert_close(loaded(x), module(x))
