"""`fusionsum.nn.scores`: indices of any number of dims, complex products, sides for losses, ranks and search.

What lives elsewhere: the formulas, and what holds of every layer (``test_nn.py``).
"""

from __future__ import annotations

import math
import re

import pytest

from conftest import missing, run_python

try:
    import torch
except ModuleNotFoundError:
    missing("torch")

from torch.nn.functional import cross_entropy

import fusionsum as fs
from fusionsum.nn import GMF, ComplEx, DistMult
from fusionsum.nn.scores import complex_product
from published import F64

pytestmark = [pytest.mark.usefixtures("seed"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
MODELS = {
    "GMF": (lambda: GMF(7, 7, 4, dtype=F64), 2),
    "DistMult": (lambda: DistMult(7, 7, 4, dtype=F64), 3),
    "ComplEx": (lambda: ComplEx(7, 7, 4, dtype=F64), 3),
}
CALLS = [(name, every) for name, (_, count) in MODELS.items() for every in (None, *range(0, count, 2)) if every != 1]
CALLS = [(name, every) for name, every in CALLS if not (name == "GMF" and every == 0)] + [("GMF", 1)]


@pytest.mark.parametrize("name, every", CALLS)
def test_indices_of_no_dims(name, every):
    """As of torch.nn.Embedding: the result has no batch dim either. `every` is the argument left out, for all of them."""
    make, count = MODELS[name]
    model = make()
    single = [torch.tensor(k + 1) for k in range(count)]
    batch = [index.unsqueeze(0) for index in single]
    if every is not None:
        single[every] = batch[every] = None
    got, wanted = model(*single), model(*batch)
    assert got.shape == wanted.shape[1:]
    torch.testing.assert_close(got, wanted[0])
    parameters = list(model.parameters())
    grad = torch.randn_like(got)
    ours, theirs = torch.autograd.grad(got, parameters, grad), torch.autograd.grad(wanted, parameters, grad[None])
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(model(*single), got)


@pytest.mark.parametrize("name", MODELS)
def test_one_user_or_triple_for_many_candidates(name):
    make, count = MODELS[name]
    model, known = make(), [torch.tensor(k + 1) for k in range(count - 1)]
    candidates = torch.tensor([3, 0, 5])
    got = model(*known, candidates)
    assert got.shape == (3,)
    torch.testing.assert_close(got, torch.stack([model(*known, candidate) for candidate in candidates]))


# ---- complex products ------------------------------------------------------------------------------------------------


def complex_of(x):
    return torch.complex(*x.chunk(2, -1))


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("shapes", [((5, 6), (5, 6)), ((6,), (6,)), ((5, 1, 6), (4, 6)), ((0, 6), (0, 6))])
def test_complex_product(shapes, recorded, conjugate):
    a, b = (torch.randn(shape, dtype=F64) for shape in shapes)
    given = a.clone(), b.clone()
    wanted = complex_of(a) * (complex_of(b).conj() if conjugate else complex_of(b))
    with torch.set_grad_enabled(recorded):
        got = complex_product(a, b, conjugate)
    torch.testing.assert_close(complex_of(got), wanted)
    assert torch.equal(a, given[0])
    assert torch.equal(b, given[1])


@pytest.mark.parametrize("conjugate", [False, True])
def test_complex_product_where_something_watches(conjugate):
    """Without recording it is computed in place, which transforms and forward mode do not take."""
    a, b = torch.randn(5, 6, dtype=F64), torch.randn(5, 6, dtype=F64)
    wanted = complex_product(a, b, conjugate)
    with torch.no_grad():
        for in_dims in ((0, 0), (0, None), (None, 0)):
            rows = [x if axis is None else x.unsqueeze(1) for x, axis in zip((a, b), in_dims, strict=True)]
            got = torch.vmap(lambda x, y: complex_product(x, y, conjugate), in_dims)(*rows)
            single = wanted if None not in in_dims else complex_product(rows[0], rows[1], conjugate)
            torch.testing.assert_close(got.reshape(single.shape), single)
        tangent = torch.func.jvp(lambda x: complex_product(x, b, conjugate), (a,), (torch.ones_like(a),))[1]
    torch.testing.assert_close(tangent, complex_product(torch.ones_like(a), b, conjugate))
    compiled = torch.compile(complex_product, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(a, b, conjugate), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recorded", [False, True])
def test_complex_product_of_16_bits_is_rounded_once(dtype, recorded):
    a, b = torch.randn(50, 6).to(dtype), torch.randn(50, 6).to(dtype)
    with torch.set_grad_enabled(recorded):
        got = complex_product(a, b, False)
        assert torch.equal(got, complex_product(a.float(), b.float(), False).to(dtype))


def test_scores_without_recording_are_those_recorded():
    for name, (make, count) in MODELS.items():
        model, indices = make(), [torch.randint(7, (9,)) for _ in range(count)]
        for every in (None, 0, count - 1):
            given = [None if k == every else index for k, index in enumerate(indices)]
            if name == "GMF" and every == 0:
                continue
            with torch.no_grad():
                got = model(*given)
            torch.testing.assert_close(got, model(*given))


# ---- sides -----------------------------------------------------------------------------------------------------------

ENTITIES, RELATIONS, WIDTH = 23, 3, 6
each_of_triples = pytest.mark.parametrize("model", [DistMult, ComplEx])
each_side = pytest.mark.parametrize("side", ["heads", "tails"])


def triples(count):
    """Draw (heads, relations, tails)."""
    return [torch.randint(high, (count,)) for high in (ENTITIES, RELATIONS, ENTITIES)]


def asked(side, heads, relations, tails):
    """Return the arguments that leave a side open, and its true entities."""
    return ((None, relations, tails), heads) if side == "heads" else ((heads, relations, None), tails)


@each_of_triples
@each_side
def test_training_against_all_entities_is_their_cross_entropy(model, side):
    embeddings = model(ENTITIES, RELATIONS, WIDTH, dtype=F64)
    known, true = asked(side, *triples(17))
    parameters = list(embeddings.parameters())
    for smoothing in (0.0, 0.1):
        wanted = cross_entropy(embeddings(*known), true, label_smoothing=smoothing)
        got = fs.contrastive_loss(
            *embeddings.sides(*known),
            labels=true,
            key_labels=torch.arange(ENTITIES),
            symmetric=False,
            label_smoothing=smoothing,
        )
        torch.testing.assert_close(got, wanted)
        ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (got, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model, loss", [(DistMult, "contrastive_loss")])
def test_training_against_all_entities_stores_no_scores(model, loss):
    """A step takes less memory than the scores alone would, 98 MiB; the first step, with few entities, is not counted."""
    code = f"""
    import pathlib, re, torch, fusionsum as fs
    from fusionsum.nn import {model.__name__}
    def peak():  # of this program; what getrusage tells begins with the peak of the process that started it
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
    def step(batch, entities):
        embeddings = {model.__name__}(entities, 9, 64)
        heads, relations, tails = (torch.randint(high, (batch,)) for high in (entities, 9, entities))
        before = peak()
        labels = dict(labels=tails, key_labels=torch.arange(entities))
        fs.{loss}(*embeddings.sides(heads, relations, None), **labels).backward()
        assert all(p.grad.isfinite().all() for p in embeddings.parameters())
        return peak() - before
    step(8, 16)
    print(step(512, 50_000))
    """
    assert 0 < int(run_python("\n".join(line[4:] for line in code.splitlines()))) < 512 * 50_000 * 4


@each_of_triples
@each_side
def test_search_among_all_entities(model, side):
    embeddings = model(ENTITIES, RELATIONS, WIDTH, dtype=F64)
    known, _ = asked(side, *triples(17))
    with torch.no_grad():
        values, found = fs.top_k(*embeddings.sides(*known), 5)
        wanted = embeddings(*known).topk(5)
    torch.testing.assert_close(torch.as_tensor(values), wanted.values)
    assert torch.equal(torch.as_tensor(found), wanted.indices)


def filtered_ranks(scores, true, others):
    """Return PyKEEN's filtered ranks: scores of other true entities are NaN, and compare as not greater and not equal.

    References: pykeen.evaluation, `filter_scores_` and `RankBatch`; M. Berrendorf et al., "On the Ambiguity of Rank-Based
    Evaluation of Entity Alignment or Link Prediction Methods", 2020.
    """
    own = scores.gather(1, true[:, None])
    scores = scores.clone()
    for row, ids in zip(scores, others, strict=True):
        row[ids] = math.nan
    scores.scatter_(1, true[:, None], own)
    optimistic, pessimistic = 1 + (scores > own).sum(dim=1), (scores >= own).sum(dim=1)
    return {"optimistic": optimistic, "pessimistic": pessimistic, "mean": (optimistic + pessimistic) / 2}


@each_of_triples
@each_side
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_are_those_of_filtered_evaluation(model, side, tied):
    embeddings, (heads, relations, tails) = model(ENTITIES, RELATIONS, WIDTH, dtype=F64), triples(60)
    if tied:
        with torch.no_grad():  # small integers: many entities score the same, exactly
            for p in embeddings.parameters():
                p.copy_(torch.randint(-1, 2, p.shape))
    known, true = asked(side, heads, relations, tails)
    entity = tails if side == "heads" else heads
    alike = (entity[:, None] == entity) & (relations[:, None] == relations)
    others = [sorted({int(e) for e in true[row]} - {int(own)}) for row, own in zip(alike, true, strict=True)]
    assert max(map(len, others)) > 0
    with torch.no_grad():
        queries, keys = embeddings.sides(*known)
        for ties, wanted in filtered_ranks(embeddings(*known), true, others).items():
            got = torch.as_tensor(fs.ranks(queries, keys, true, exclude=others, ties=ties))
            assert torch.equal(got.double(), wanted.double()), ties


INDEX = torch.tensor([1, 2])


@pytest.mark.parametrize(
    "given, error, message",
    [
        ((None, INDEX), ValueError, "heads, tails: expected one to be None, which means all entities"),
        ((INDEX, INDEX, INDEX), ValueError, "heads, tails: expected one to be None, which means all entities"),
        ((INDEX.float(), INDEX), TypeError, "heads: expected a tensor of integers, got torch.float32"),
        ((None, INDEX.bool(), INDEX), TypeError, "relations: expected a tensor of integers, got torch.bool"),
        ((INDEX, INDEX[:1]), ValueError, "heads, relations: expected one shape (B,), got (2,) and (1,)"),
        (
            (None, INDEX[None], INDEX[None]),
            ValueError,
            "tails, relations: expected one shape (B,), got (1, 2) and (1, 2)",
        ),
    ],
)
@each_of_triples
def test_sides_of_bad_indices(model, given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        model(ENTITIES, RELATIONS, WIDTH).sides(*given)
