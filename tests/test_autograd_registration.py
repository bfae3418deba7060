"""What torch does with the registered operations: compile, export, save and load, ONNX, a second operation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck
from torch.func import jacfwd, jacrev, vmap

import fusionsum as fs
from conftest import FORMS, require_compiler, run_python
from eager import MASKS, Fused, cases, simple, to_torch
from fusionsum import call
from fusionsum.autograd import registration, schema

# torch's own, on its first use of forward AD and of inductor
pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`isinstance:FutureWarning"),
]
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


@pytest.fixture
def kept_whole(monkeypatch):
    """Fail where anything evaluates the operation by its decomposition, which is for ONNX."""

    def decomposed(*given):
        raise AssertionError("the operation was decomposed")

    monkeypatch.setitem(torch._decomp.decomposition_table, sum_op, decomposed)


@pytest.mark.usefixtures("kept_whole")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", range(4))
def test_compile(backend, case):
    if backend == "inductor":
        if case != 3:
            return
        require_compiler()
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
    torch._dynamo.config.error_on_recompile = True
    f = torch.compile(lambda w, f, g: fs.fusion_sum(w, f, g, activations="tanh"), backend="aot_eager", fullgraph=True)
    x = [torch.ones(3), torch.ones(2, 3), torch.ones(2, 3)]
    print(all(torch.equal(f(*x), fs.fusion_sum(*x, activations="tanh")) for _ in range(2)))
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


@pytest.mark.usefixtures("kept_whole")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    module, rows = Fused(), torch.export.Dim("rows")
    exported = torch.export.export(module, (torch.randn(3, 4),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    for program in (exported, exported.run_decompositions()):
        assert sum_op in [node.target for node in program.graph.nodes]
    torch.export.save(exported, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2").module()
    for x in (torch.randn(2, 4), torch.randn(17, 4)):
        torch.testing.assert_close(loaded(x), module(x))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_the_decomposition_is_the_sum(form, masks, rng):
    for case in cases(rng, form, masks):
        operands, options = to_torch(case)
        weights = None if case.weights is None else operands.pop(0)
        given = schema.arguments(call.check(weights, operands, **options))
        found = torch._decomp.decomposition_table[sum_op](*given)
        torch.testing.assert_close(found, fs.fusion_sum(weights, *operands, **options))


def test_a_second_operation_needs_one_record_only():
    """Outputs of two kinds, a list among the inputs, an option: registered, watched and differentiated like the sum."""

    def backward(grad, needs, scale, factors, power):
        slope = power * scale ** (power - 1) * grad
        return (slope * sum(factors)).sum(), [scale**power * grad for _ in factors], None

    def jvp(tangents, scale, factors, power):
        along = [v for v in tangents[1] if v is not None]
        found = scale**power * sum(along) if along else torch.zeros_like(factors[0])
        return found if tangents[0] is None else found + power * scale ** (power - 1) * tangents[0] * sum(factors)

    def vmap_rule(size, in_dims, scale, factors, power):
        scale = scale if in_dims[0] is None else scale.movedim(in_dims[0], 0)[:, None]
        factors = [z if axis is None else z.movedim(axis, 0) for z, axis in zip(factors, in_dims[1], strict=True)]
        return (scale**power * sum(factors)).expand(size, factors[0].shape[-1]), 0

    record = registration.Operation(
        name="scaled_total",
        schema="(Tensor scale, Tensor[] factors, int power) -> Tensor",
        kernel=lambda scale, factors, power: scale**power * sum(factors),
        fake=lambda scale, factors, power: torch.empty_like(factors[0]),
        backward=backward,
        jvp=jvp,
        vmap=vmap_rule,
    )
    registration.register(record)
    operation = torch.ops.fusionsum.scaled_total.default
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    f, g = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(operation, (scale, [f, g], 3))

    def function(scale, f, g):
        return registration.apply("scaled_total", scale, [f, g], 3)

    assert gradcheck(function, (scale, f, g), check_forward_ad=True, check_batched_grad=True)
    x = [a.detach() for a in (scale, f, g)]
    torch.testing.assert_close(jacrev(function, (0, 1, 2))(*x), jacfwd(lambda s, f, g: s**3 * (f + g), (0, 1, 2))(*x))
    torch.testing.assert_close(jacfwd(function, (0, 1, 2))(*x), jacrev(function, (0, 1, 2))(*x))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scale, f, g), function(scale, f, g))


def test_what_an_operation_keeps():
    """The last tensors of an output may be there for backward: they have no gradient, and what is unused has None."""
    seen = []

    def backward(grads, needs, x, count, kept):
        seen.append((grads, needs))
        return sum(d for d in grads[:2] if d is not None) * 2 * kept[0], None

    record = registration.Operation(
        name="squares",
        schema="(Tensor x, int count) -> Tensor[]",
        kernel=lambda x, count: [x * x, x * x + 1, *(x.clone() for _ in range(count))],
        fake=lambda x, count: [torch.empty_like(x) for _ in range(2 + count)],
        backward=backward,
        jvp=lambda tangents, x, count: None,
        vmap=lambda size, in_dims, x, count: (squares(x, count), [in_dims[0]] * (2 + count)),
        keeps=lambda x, count: count,
    )
    registration.register(record)

    def squares(x, count=1):
        return registration.apply("squares", x, count)

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.fusionsum.squares.default, (x, 1))
    first, second, kept = squares(x)
    assert [a.requires_grad for a in (first, second, kept)] == [True, True, False]
    seen.clear()
    torch.testing.assert_close(torch.autograd.grad(second.sum(), x)[0], 2 * x)
    ((grads, needs),) = seen
    assert (grads[0], grads[2], needs[0]) == (None, None, True)
    torch.testing.assert_close(torch.func.grad(lambda x: squares(x, 2)[0].sum())(x.detach()), 2 * x.detach())
    assert gradcheck(lambda x: squares(x)[0], (x,), check_batched_grad=True)
