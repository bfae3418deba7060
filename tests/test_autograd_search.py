"""`top_k` and `ranks` of tensors: the values' gradients, and all that may watch, record or compile them.

What lives elsewhere: which keys are found, and ranks, over every option (``test_search.py``), invalid arguments
(``test_scores.py``).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import fusionsum as fs
from conftest import DTYPES, NARROW, require_compiler
from eager import PHI, Passing
from fusionsum.autograd import schema, search

# torch's own, on its first use of forward AD and of inductor
pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`isinstance:FutureWarning"),
]
FACTORS = [(1, 1), (2, 1), (1, 2), (5, 6)]  # of the queries and of the keys; eleven are more than a fusion sum takes
EXCLUSIONS = (None, "mask", "lists", "arrays")


def sides(factors=(1, 1), rows=3, columns=7, terms=4, dtype=torch.float64, requires_grad=True):
    """Make the factors of both sides, weights and a bias of the keys."""
    shapes = [(rows, terms)] * factors[0] + [(columns, terms)] * factors[1] + [(terms,), (columns,)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def exclusion(kind, rows=3, columns=7):
    """Make what is excluded, of which a whole query but one key, in one form and as a boolean mask."""
    mask = torch.rand(rows, columns) > 0.6
    mask[0, 1:] = True
    lists = [torch.flatten(torch.nonzero(row)).tolist() for row in mask]
    if kind == "lists":
        return lists, mask
    if kind == "arrays":
        offsets = torch.tensor([0, *itertools.accumulate(map(len, lists))])
        return (offsets, torch.tensor([c for ids in lists for c in ids])), mask
    return (None, torch.zeros_like(mask)) if kind is None else (mask, mask)


class Best:
    """`top_k` as a function of its floating tensors: its finite values."""

    def __init__(self, factors, k=3, **options):
        self.factors, self.k, self.options = factors, k, options

    def split(self, leaves):
        queries, keys = leaves[: self.factors[0]], leaves[self.factors[0] : -2]
        return queries, keys, {"fusion_weights": leaves[-2], "key_bias": leaves[-1]}

    def both(self, *leaves):
        queries, keys, named = self.split(leaves)
        return fs.top_k(tuple(queries), tuple(keys), self.k, **named, **self.options)

    def __call__(self, *leaves):
        values = self.both(*leaves)[0]
        return torch.where(values.isfinite(), values, 0)

    def scores(self, *leaves):
        """Evaluate all scores."""
        queries, keys, named = self.split(leaves)
        products = []
        for prefix, factors in (("", queries), ("key_", keys)):
            names = self.options.get(f"{prefix}activations") or [None] * len(factors)
            masks = self.options.get(f"{prefix}present") or [None] * len(factors)
            product = 1
            for z, name, mask in zip(factors, names, masks, strict=True):
                held = PHI[name](z)
                product = product * (held if mask is None else torch.where(mask[:, None], held, 1))
            products.append(product)
        return (products[0] * named["fusion_weights"]) @ products[1].T + named["key_bias"]

    def naive(self, mask, *leaves):
        scores = self.scores(*leaves).masked_fill(mask, -torch.inf)
        values, indices = scores.topk(self.k)
        finite = values.isfinite()
        return torch.where(finite, values, 0), torch.where(finite, indices, -1)


def gradients(function, leaves):
    return torch.autograd.grad(function(*leaves).pow(2).sum(), leaves)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("exclude", EXCLUSIONS)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_gradients_of_the_values(factors, exclude, masked):
    given, mask = exclusion(exclude)
    options = {"exclude": given}
    if masked:
        options["activations"] = ["tanh", *[None] * (factors[0] - 1)]
        options["key_activations"] = [*[None] * (factors[1] - 1), "gelu"]
        options["present"] = [*[None] * (factors[0] - 1), torch.tensor([True, False, True])]
        options["key_present"] = [torch.rand(7) > 0.3, *[None] * (factors[1] - 1)]
    for k in (0, 1, 4, 7):
        best, leaves = Best(factors, k, **options), sides(factors)
        values, indices = best.naive(mask, *leaves)
        assert torch.equal(best.both(*leaves)[1], indices)
        torch.testing.assert_close(best(*leaves), values)
        if k:
            assert gradcheck(best, leaves, fast_mode=True)
            wanted = gradients(lambda *x, best=best: best.naive(mask, *x)[0], leaves)
            torch.testing.assert_close(gradients(best, leaves), wanted)


@pytest.mark.parametrize("factors", FACTORS[:3], ids=str)
def test_second_derivatives(factors):
    """The keys found do not depend on the arguments, so the gradient is differentiable in turn."""
    best, leaves = Best(factors, activations="tanh"), sides(factors)
    assert gradgradcheck(best, leaves, fast_mode=True)
    assert gradcheck(best, leaves, check_batched_grad=True)
    with pytest.raises(NotImplementedError, match="top_k: has first derivatives in reverse mode only"):
        jvp(best, tuple(x.detach() for x in leaves), tuple(x.detach() for x in leaves))


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_what_records_has_a_gradient(wants):
    leaves = [x.requires_grad_(want) for x, want in zip(sides(requires_grad=False), wants, strict=True)]
    values, indices = Best((1, 1)).both(*leaves)
    assert values.requires_grad == any(wants)
    assert not indices.requires_grad
    if any(wants):
        values.sum().backward()
    assert [x.grad is not None for x in leaves] == list(wants)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    dtype = getattr(torch, dtype)
    leaves = sides((2, 1), dtype=dtype)
    values, indices = Best((2, 1)).both(*leaves)
    assert values.dtype == torch.promote_types(dtype, torch.float32)  # in which scores are accumulated
    assert indices.dtype == torch.int64
    values.sum().backward()
    assert [(x.grad.dtype, x.grad.shape) for x in leaves] == [(x.dtype, x.shape) for x in leaves]


@pytest.mark.parametrize("dtype", NARROW)
def test_low_precision_gradients(dtype):
    """A key that is found many times: its gradient is summed before it is rounded."""
    dtype = getattr(torch, dtype)
    best = Best((2, 1), 5)
    given = sides((2, 1), 200, 9, 16, dtype, requires_grad=False)
    indices = best.both(*given)[1]
    results = []
    for found, of in ((False, given), (True, given), (True, [x.double() for x in given])):
        leaves = [x.clone().requires_grad_() for x in of]
        values = best.scores(*leaves).gather(1, indices) if found else best(*leaves)
        results.append([d.double() for d in torch.autograd.grad(values.sum(), leaves)])
    for ours, eager, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("exclude", EXCLUSIONS)
def test_every_way_finds_the_same(exclude):
    given, _ = exclusion(exclude)
    leaves = sides((2, 1))
    best = Best((2, 1), exclude=given)
    targets = torch.tensor([2, 0, 6])

    def ranks(*leaves, ties="mean"):
        queries, keys, named = best.split(leaves)
        return fs.ranks(tuple(queries), tuple(keys), targets, **named, ties=ties, exclude=given)

    wanted = best.both(*(x.detach() for x in leaves))
    places = {ties: ranks(*(x.detach() for x in leaves), ties=ties) for ties in ("mean", "optimistic", "pessimistic")}
    for x in (leaves, [x.detach() for x in leaves]):
        with Passing():
            assert all(map(torch.equal, best.both(*x), wanted))
            assert all(torch.equal(ranks(*x, ties=ties), found) for ties, found in places.items())
        assert all(map(torch.equal, best.both(*x), wanted))
        assert all(torch.equal(ranks(*x, ties=ties), found) for ties, found in places.items())
    assert places["mean"].dtype == torch.float64
    assert places["optimistic"].dtype == torch.int64
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, best.both(*leaves), wanted))
    with torch.inference_mode():
        assert best.both(*leaves)[0].is_inference()


@pytest.mark.parametrize("exclude", [None, "mask"])
def test_transforms(exclude):
    given, _ = exclusion(exclude)
    best, leaves = Best((2, 1), exclude=given), sides((2, 1))
    x = [a.detach() for a in leaves]

    def total(*x):
        return best(*x).pow(2).sum()

    all_of = tuple(range(len(x)))
    wanted = gradients(best, leaves)
    torch.testing.assert_close(grad(total, all_of)(*x), wanted)
    batch = [torch.stack([a, 2 * a]) for a in x]
    values, indices = vmap(best.both)(*batch)
    for i in range(2):
        for found, one in zip((values, indices), best.both(*(a[i] for a in batch)), strict=True):
            torch.testing.assert_close(found[i], one)
    torch.testing.assert_close([d[0] for d in vmap(grad(total, all_of))(*batch)], list(wanted))
    targets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    found = vmap(lambda t: fs.ranks(x[0], x[2], t))(targets)
    assert torch.equal(found, torch.stack([fs.ranks(x[0], x[2], t) for t in targets]))
    hessian = grad(lambda q: grad(total)(q, *x[1:]).sum())(x[0])
    first = torch.autograd.grad(total(*leaves), leaves[0], create_graph=True)[0]
    torch.testing.assert_close(hessian, torch.autograd.grad(first.sum(), leaves[0])[0])


@pytest.mark.parametrize("exclude", [None, "mask", "arrays"])
@pytest.mark.parametrize("wants", [(), (0,), (1,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_opcheck(wants, exclude):
    given, _ = exclusion(exclude)
    leaves = [x.requires_grad_(i in wants) for i, x in enumerate(sides(requires_grad=False))]
    checked = fs.scores.check_search(*leaves[:2], fusion_weights=leaves[2], key_bias=leaves[3], exclude=given)
    arguments = schema.side_arguments(checked)
    torch.library.opcheck(torch.ops.fusionsum.top_k.default, (*arguments, 3))
    torch.library.opcheck(torch.ops.fusionsum.ranks.default, (*arguments, torch.tensor([2, 0, 6])))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    if backend == "inductor":
        require_compiler()
    torch._dynamo.reset()

    def step(w, q, k, bias, mask, targets):
        also = {"fusion_weights": w, "key_bias": bias, "exclude": mask}
        values, indices = fs.top_k((q * 2, q), k, 2, **also)
        return values.exp().sum(), indices + 1, fs.ranks((q, q), k, targets, **also)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows, columns, terms in ((3, 5, 4), (6, 8, 9), (7, 31, 2)):
        x = [
            torch.randn(shape, requires_grad=True) for shape in ((terms,), (rows, terms), (columns, terms), (columns,))
        ]
        given = *x, torch.rand(rows, columns) > 0.8, torch.randint(columns, (rows,))
        with torch._dynamo.config.patch(error_on_recompile=True):
            found, wanted = compiled(*given), step(*given)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found[0], x), torch.autograd.grad(wanted[0], x))


@pytest.mark.parametrize(
    "given",
    [
        [[1, 2], [], [0]],
        ((1,), range(2, 4), ()),
        [torch.tensor([1]), torch.tensor([2, 3], dtype=torch.int16), torch.tensor([])],
        [np.array([1]), np.array([3, 2]), [4, 4]],
    ],
    ids=["lists", "tuples", "tensors", "arrays"],
)
def test_compile_with_ids_per_query(given):
    torch._dynamo.reset()
    targets = torch.tensor([2, 0, 6])

    def step(q, k):
        values, indices = fs.top_k(q, k, 6, exclude=given)
        return torch.where(values.isfinite(), values, 0), indices, fs.ranks(q, k, targets, exclude=given)

    x = [torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)]
    found, wanted = torch.compile(step, backend="aot_eager", fullgraph=True)(*x), step(*x)
    assert all(map(torch.equal, found, wanted))
    for grads in zip(torch.autograd.grad(found[0].sum(), x), torch.autograd.grad(wanted[0].sum(), x), strict=True):
        torch.testing.assert_close(*grads)


class Index(torch.nn.Module):
    """A model as users write one."""

    def __init__(self):
        super().__init__()
        self.tower = torch.nn.Linear(4, 6)
        self.items = torch.nn.Parameter(torch.randn(9, 6))

    def forward(self, x):
        return fs.top_k(self.tower(x), self.items, 3)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    module, rows = Index(), torch.export.Dim("rows")
    exported = torch.export.export(module, (torch.randn(3, 4),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    for program in (exported, exported.run_decompositions()):
        assert torch.ops.fusionsum.top_k.default in [node.target for node in program.graph.nodes]
    torch.export.save(exported, tmp_path / "index.pt2")
    loaded = torch.export.load(tmp_path / "index.pt2").module()
    for n in (2, 17):
        x = torch.randn(n, 4)
        torch.testing.assert_close(loaded(x), module(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    module, x = Index(), torch.randn(5, 4, requires_grad=True)
    module(x)[0].sum().backward()
    wanted, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)[0].sum().backward()
    torch.testing.assert_close(x.grad, wanted)


def test_meta_and_fake_tensors():
    x = [a.detach().to("meta").requires_grad_() for a in sides((2, 1))]
    values, indices = Best((2, 1)).both(*x)
    assert [(a.shape, a.device.type) for a in (values, indices)] == [((3, 3), "meta")] * 2
    values.sum().backward()
    assert [a.grad.shape for a in x] == [a.shape for a in x]
    with torch._subclasses.FakeTensorMode():
        q, k = torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(7, 4)
        values, indices = fs.top_k(q, k, 2)
        assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
        assert fs.ranks(q, k, torch.zeros(3, dtype=torch.int64)).shape == (3,)


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)], ids=str)
def test_sizes_of_zero(shape):
    rows, columns, terms = shape
    leaves = sides(rows=rows, columns=columns, terms=terms)
    values, indices = Best((1, 1), columns).both(*leaves)
    assert values.shape == indices.shape == (rows, columns)
    values.sum().backward()
    assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]
    assert fs.ranks(
        leaves[0][:0], torch.ones(1, terms, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    ).shape == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_excluded_keys_have_no_part_in_gradients(value):
    q, k = torch.ones(1, 3, requires_grad=True), torch.ones(3, 3)
    k[0] = value
    k.requires_grad_()
    values, indices = fs.top_k(q, k, 3, exclude=[[0, 2]])
    assert indices.tolist() == [[1, -1, -1]]
    values.sum().backward()
    assert q.grad.tolist() == [[1] * 3]
    assert k.grad.tolist() == [[0] * 3, [1] * 3, [0] * 3]


def test_the_gradient_of_many_equal_keys_goes_to_those_found():
    q, k = torch.ones(2, 3, requires_grad=True), torch.ones(6, 3, requires_grad=True)
    values, indices = fs.top_k(q, k, 2)
    assert indices.tolist() == [[0, 1]] * 2
    values.sum().backward()
    assert k.grad.sum(1).tolist() == [6, 6, 0, 0, 0, 0]
    assert np.array_equal(q.grad.numpy(), np.full((2, 3), 2))


# ---- some queries at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", EXCLUSIONS)
@pytest.mark.parametrize("most", [1, 40, 10**6])
def test_gradients_do_not_depend_on_how_many_keys_are_gathered(most, exclude, monkeypatch):
    """Nor on the number of threads: the same bits."""
    leaves = sides((2, 1), 33, 7, 4, dtype=torch.float32)
    given, _ = exclusion(exclude, 33)
    best = Best((2, 1), 5, exclude=given, key_activations="tanh")
    wanted = gradients(best, leaves)
    monkeypatch.setattr(search, "MOST_GATHERED", most)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(gradients(best, leaves))
            torch.testing.assert_close(found[-1], wanted)
            assert all(map(torch.equal, found[-1], found[0]))
    finally:
        torch.set_num_threads(before)


def test_the_gradient_gathers_few_keys_at_a_time(monkeypatch):
    """No tensor that it makes is larger than the limit or an argument."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            made = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
            self.entries = max([self.entries, *(x.numel() for x in made)])
            return found

    leaves = sides((1, 1), 50, 30, 16)
    loss = Best((1, 1), 20)(*leaves).sum()
    monkeypatch.setattr(search, "MOST_GATHERED", 900)
    with Largest() as mode:
        loss.backward()
    assert 800 <= mode.entries <= 50 * 20  # not 50 x 20 x 16
