"""The losses of tensors: gradients of all arguments, and all that may watch, record or compile them.

What lives elsewhere: the values over every option (``test_losses.py``), invalid arguments (``test_scores.py``), the naive
formulas (``pairs.py``).
"""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck
from torch.func import grad, jvp, vmap

import fusionsum as fs
import pairs
from conftest import DTYPES, NARROW, run_python
from eager import PHI, Passing
from fusionsum import tensors

# torch's own, on its first use of forward AD and of inductor
pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`isinstance:FutureWarning"),
]
LOSSES = ("contrastive_loss", "sigmoid_loss")
SIDES = list(itertools.product([1, 2, 3], [None, "one", "zero"], [False, True]))  # factors, masks, activations
# labels, exclude, C > B
TARGETS = list(itertools.product([False, True], [None, "ids", "mask"], [False, True]))
OPTIONS = [
    {"positives": p, "symmetric": s, "label_smoothing": e, "reduction": r}
    for p, s, e, r in itertools.product(["mean", "any"], [False, True], [0.0, 0.3], ["mean", "sum", "none"])
]


class Step:
    """A case of a loss as a function of its floating tensors."""

    def __init__(self, case: pairs.Pairs, name: str = "contrastive_loss", **options):
        self.case, self.name, self.more = case, name, options
        self.places = [*case.queries, *case.keys]
        self.scalars = [x for x in ("fusion_weights", "key_bias", "logit_scale", "logit_bias") if x in case.options]

    def leaves(self, dtype=None, requires_grad=True):
        """Return new tensors of the case's arrays, in the order in which the step takes them."""
        given = self.places + [self.case.options[name] for name in self.scalars]
        found = [torch.tensor(np.asarray(x, np.float64), dtype=dtype or torch.float64) for x in given]
        return [x.requires_grad_(requires_grad) for x in found]

    def _split(self, leaves):
        count, both = len(self.case.queries), len(self.places)
        return leaves[:count], leaves[count:both], dict(zip(self.scalars, leaves[both:], strict=True))

    def __call__(self, *leaves):
        queries, keys, named = self._split(leaves)
        options = {name: as_tensors(x) for name, x in self.case.options.items()} | named | self.more
        found = pairs_flat(getattr(fs, self.name)(tuple(queries), tuple(keys), **options))
        return tuple(torch.where(x.isfinite(), x, 0) for x in found)  # the log-sum-exp of nothing is -inf

    def naive(self, *leaves):
        """Evaluate the loss from stored scores, in the dtype of the leaves."""
        queries, keys, named = self._split(leaves)
        options, found = self.case.options, []
        for prefix, factors in (("", queries), ("key_", keys)):
            names = options.get(f"{prefix}activations")
            names = [names] * len(factors) if names is None or isinstance(names, str) else names
            product = 1
            for z, name, mask in zip(factors, names, options.get(f"{prefix}present", [None] * 9), strict=False):
                z = PHI[name](z)
                product = product * (z if mask is None else torch.where(torch.tensor(mask)[:, None], z, self.absent))
            found.append(product)
        weighted = found[0] * named.get("fusion_weights", 1)
        naive = pairs.Naive(self.case)
        naive.scores = named["logit_scale"] * (weighted @ found[1].T) + named.get("key_bias", 0)
        naive.scores = naive.scores + named.get("logit_bias", 0)
        if self.name == "contrastive_loss":
            found = naive.contrastive(**self.more)
        else:
            found = [naive.sigmoid(self.more.get("reduction", "mean"))]
        return tuple(torch.where(x.isfinite(), x, 0) for x in found)

    @property
    def absent(self):
        return {"one": 1.0, "zero": 0.0}[self.case.options["absent"]]


def pairs_flat(found):
    return [x for part in found for x in pairs_flat(part)] if isinstance(found, tuple) else [found]


def as_tensors(x):
    if isinstance(x, (list, tuple)) and not isinstance(x, str):
        return type(x)(map(as_tensors, x))
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def steps(rng, sides, name="contrastive_loss", **sizes):
    """Make a step for each kind of labels, exclusions and number of keys; the options go round as the sides do."""
    factors, masks, activations = sides
    shift = SIDES.index(sides)
    for i, (labels, exclude, more) in enumerate(TARGETS):
        case = pairs.sides(rng, 3, 5 if more else 3, 4, factors, masks=masks, activations=activations, **sizes)
        case = case.but(logit_scale=1.7)
        case = pairs.with_labels(case, rng) if labels else case
        case = pairs.with_exclusions(case, rng, exclude)
        if name == "sigmoid_loss":
            yield Step(case.but(logit_bias=-0.4), name, reduction=("mean", "sum", "none")[(i + shift) % 3])
            continue
        case = case.but(key_bias=rng.standard_normal(len(case.keys[0])))
        for j in range(2):
            options = OPTIONS[(2 * (i + shift) + j) % len(OPTIONS)]
            yield Step(case, name, **options, return_lse=bool(j))


def simple(name="contrastive_loss", rows=4, columns=6, terms=3, factors=3, **options):
    """Make a step with all that has a gradient, masks and activations."""
    rng = np.random.default_rng(7)
    case = pairs.sides(rng, rows, columns, terms, factors, masks="one", activations=True).but(logit_scale=1.7)
    bias = {"logit_bias": -0.4} if name == "sigmoid_loss" else {"key_bias": rng.standard_normal(columns)}
    return Step(case.but(**bias), name, **options)


def gradients(function, leaves):
    return torch.autograd.grad(sum(x.sum() for x in function(*leaves)), leaves)


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
        ("mean", True, ["sigmoid_grad"], []),
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
            loss.backward(3 * torch.ones_like(loss))  # what was kept is intact
            torch.testing.assert_close([x.grad for x in leaves], [4 * d for d in first])


# ---- who watches -----------------------------------------------------------------------------------------------------

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
    if backend == "inductor" and case not in (1, 3):
        return
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
