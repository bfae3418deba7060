"""The losses of tensors under all that may watch, map, trace, export or compile them.

What lives elsewhere: gradients and the graph (``test_autograd_losses.py``), invalid arguments (``test_scores.py``).
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.func import grad, jvp, vmap

import fusionsum as fs
import pairs
from conftest import require_compiler, run_python
from eager import Passing
from steps import LOSSES, gradients, pairs_flat, simple

# torch's own, on its first use of forward AD and of inductor
pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`isinstance:FutureWarning"),
]
CASES = [
    ("contrastive_loss", {}),
    ("contrastive_loss", {"return_lse": True, "positives": "any", "reduction": "none", "label_smoothing": 0.1}),
    ("contrastive_loss", {"symmetric": False, "reduction": "sum"}),
    ("sigmoid_loss", {}),
    ("sigmoid_loss", {"reduction": "none"}),
]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_transforms(name, options, labels, rng):
    step = simple(name, **options)
    if labels:
        step.case = pairs.with_exclusions(pairs.with_labels(step.case, rng), rng, "ids")
    leaves = step.leaves()
    wanted, found = gradients(step, leaves), step(*leaves)
    x, all_of = [a.detach() for a in leaves], tuple(range(len(leaves)))

    def total(*x):
        return sum(part.sum() for part in step(*x))

    torch.testing.assert_close(grad(total, all_of)(*x), wanted)
    batch = [torch.stack([a, 2 * a]) for a in x]
    twice = gradients(step, [2 * a for a in leaves])
    for i, part in enumerate(vmap(step)(*batch)):
        torch.testing.assert_close(part[0], found[i])
        torch.testing.assert_close(part[1], step(*(2 * a for a in x))[i])
    found_grads = vmap(grad(total, all_of))(*batch)
    torch.testing.assert_close([d[0] for d in found_grads], list(wanted))
    torch.testing.assert_close([d[1] for d in found_grads], list(twice))
    some = [0, *[None] * (len(x) - 1)]
    shared = vmap(step, tuple(some))(batch[0], *x[1:])
    torch.testing.assert_close([part[0] for part in shared], list(found))
    summed = grad(lambda *x: vmap(total)(*x).sum(), all_of)(*batch)
    torch.testing.assert_close([d[0] for d in summed], list(wanted))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_forward_mode_are_errors(name, reduction):
    step = simple(name, reduction=reduction)
    leaves = step.leaves()
    x = [a.detach() for a in leaves]
    message = f"{name}: has first derivatives in reverse mode only"
    wanted = gradients(step, leaves)
    loss = sum(part.sum() for part in step(*leaves))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.testing.assert_close(first, wanted)
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(first[0].sum(), leaves)
    with pytest.raises(NotImplementedError, match=message):
        grad(lambda q: grad(lambda q: step(q, *x[1:])[0].sum())(q).sum())(x[0])
    with pytest.raises(NotImplementedError, match=message):
        jvp(lambda q: step(q, *x[1:]), (x[0],), (x[0],))


def arguments(step, leaves):
    """Return the arguments of the registered operation, seen where it is called."""
    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fusionsum":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Log():
        gradients(step, leaves)
    return {func: args for func, args in seen}


@pytest.mark.parametrize("wants", [(), (0,), (1, 2), (3, 4, 5), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_opcheck(name, options, wants):
    step = simple(name, **options)
    given = arguments(step, step.leaves())
    for function, args in given.items():
        if function.name().split("::")[1] in (name, "softmax_grad", "sigmoid_grad"):
            names = itertools.count()
            args = [
                [x.detach().requires_grad_(next(names) in wants) if is_leaf(x) else x for x in a]
                if isinstance(a, (list, tuple))
                else a.detach().requires_grad_(next(names) in wants)
                if is_leaf(a)
                else a
                for a in args
            ]
            if function.name().endswith("_grad"):  # these have no gradients
                args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
            torch.library.opcheck(function, tuple(args))


def is_leaf(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_compile(backend, case):
    if backend == "inductor":
        if case not in (1, 3):
            return
        require_compiler()
    torch._dynamo.reset()
    name, options = CASES[case]

    def step(w, q, k, scale, bias, labels, key_labels, present):
        also = {"logit_bias": bias[0]} if name == "sigmoid_loss" else {"key_bias": bias}
        found = getattr(fs, name)(
            (q * 2, q),
            k,
            fusion_weights=w,
            logit_scale=scale.exp(),
            labels=labels,
            key_labels=key_labels,
            exclude=(labels * 2, key_labels * 2),
            activations=["tanh", None],
            present=[present, None],
            **also,
            **options,
        )
        return sum(x.sum() for x in pairs_flat(found)) * 3

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows, columns, terms in ((3, 5, 4), (6, 8, 9), (7, 31, 2)):
        shapes = (terms,), (rows, terms), (columns, terms), (), (columns,)
        x = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        labels, key_labels = torch.randint(3, (rows,)), torch.randint(3, (columns,))
        given = *x, labels, key_labels, torch.rand(rows) > 0.5
        with torch._dynamo.config.patch(error_on_recompile=True):
            found, wanted = compiled(*given), step(*given)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(wanted, x))


def test_compile_where_ci_is_set():
    """Inductor then refuses operations that decompose."""
    require_compiler()
    code = """
    import torch, fusionsum as fs
    q, k = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    for loss in (fs.contrastive_loss, fs.sigmoid_loss):
        found = torch.compile(loss, fullgraph=True)(q, k)
        print(torch.allclose(torch.autograd.grad(found, q)[0], torch.autograd.grad(loss(q, k), q)[0]))
    """
    printed = run_python("\n".join(line[4:] for line in code.splitlines()), CI="true")
    assert printed.split() == ["True", "True"]


def test_compile_errors_name_the_argument():
    torch._dynamo.reset()
    q, k = torch.randn(4, 3), torch.randn(5, 3)
    compiled = torch.compile(fs.contrastive_loss, backend="aot_eager", fullgraph=True)
    for given, options, message in (
        ((q, k[:2]), {}, "keys: expected at least 4 rows"),
        ((q, k[:, :2]), {}, "keys: expected "),
        ((q, k), {"label_smoothing": 2.0}, "label_smoothing: expected at least 0"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(*given, **options)


class Towers(torch.nn.Module):
    """A model as users write one."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x, y):
        return getattr(fs, self.name)(self.first(x), self.second(y), logit_scale=self.scale.exp())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_export(name, strict, tmp_path):
    module, rows = Towers(name), torch.export.Dim("rows")
    dims = {"x": {0: rows}, "y": {0: rows}}
    exported = torch.export.export(module, (torch.randn(3, 4), torch.randn(3, 4)), dynamic_shapes=dims, strict=strict)
    operation = getattr(torch.ops.fusionsum, name).default
    for program in (exported, exported.run_decompositions()):
        assert operation in [node.target for node in program.graph.nodes]
    torch.export.save(exported, tmp_path / "towers.pt2")
    loaded = torch.export.load(tmp_path / "towers.pt2").module()
    for n in (2, 17):
        x, y = torch.randn(n, 4), torch.randn(n, 4)
        torch.testing.assert_close(loaded(x, y), module(x, y))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_checkpoint(name, reentrant):
    module, x, y = Towers(name), torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    module(x, y).backward()
    wanted, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(module, x, y, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name, dtype):
    torch._dynamo.reset()
    step = simple(name, factors=2)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for function, watching in ((step, False), (step, True), (compiled, False)):
        results = []
        for enabled in (False, True):
            leaves = step.leaves(torch.float32)
            with torch.autocast("cpu", dtype, enabled=enabled), Passing() if watching else torch.enable_grad():
                found = function(*leaves)
                results.append([*found, *torch.autograd.grad(sum(x.sum() for x in found), leaves)])
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", dtype):
        assert Towers(name)(torch.randn(5, 4), torch.randn(5, 4)).dtype == dtype  # that of the projections


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_meta_and_fake_tensors(name, options):
    step = simple(name, **options)
    real = step(*step.leaves())

    def found(q, r, k, weights, scale, bias):
        also = {"logit_bias": bias} if name == "sigmoid_loss" else {"key_bias": bias}
        return pairs_flat(getattr(fs, name)((q, r), k, fusion_weights=weights, logit_scale=scale, **also, **options))

    shapes = [x.shape for x in step.leaves()[:4]]
    last = [(), ()] if name == "sigmoid_loss" else [(), (6,)]
    x = [torch.empty(shape, device="meta", requires_grad=True) for shape in (*shapes, *last)]
    outputs = found(*x)
    assert [(o.shape, o.device.type) for o in outputs] == [(o.shape, "meta") for o in real]
    sum(o.sum() for o in outputs).backward()
    assert [a.grad.shape for a in x] == [a.shape for a in x]
    with torch._subclasses.FakeTensorMode():
        x = [torch.empty(shape, dtype=torch.bfloat16) for shape in (*shapes, *last)]
        assert [(o.shape, o.dtype) for o in found(*x)] == [(o.shape, torch.bfloat16) for o in real]


@pytest.mark.parametrize("name", LOSSES)
def test_operations_take_nothing_of_another_device(name):
    """Numbers neither: of what takes a tensor of the CPU a compiler makes no CUDA graph."""
    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fusionsum":
                seen.extend(x.device.type for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    queries, keys = (torch.empty(count, 3, device="meta") for count in (4, 5))
    with Log():
        getattr(fs, name)(queries, keys, logit_scale=2.0)
    assert set(seen) == {"meta"}
