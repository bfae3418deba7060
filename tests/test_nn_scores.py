"""`fusionsum.nn.scores`: indices of any number of dims, complex products.

What lives elsewhere: the formulas, and what holds of every layer (``test_nn.py``).
"""

from __future__ import annotations

import pytest

from conftest import missing

try:
    import torch
except ModuleNotFoundError:
    missing("torch")

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
