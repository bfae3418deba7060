"""Sums that are matrix products: values, gradients, tiles, memory and bits against the float64 oracle.

What lives elsewhere: the operations around them (``test_autograd_*.py``), which calls split, and NumPy arrays
(``test_split.py``), the kernels that form the products (``test_kernel.py``).
"""

from __future__ import annotations

import itertools
import math
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fusionsum as fs
from conftest import (
    ACTIVATIONS,
    DTYPES,
    MIXED,
    SIZES,
    SPLIT,
    WHOLE,
    Case,
    Form,
    check_backward,
    check_forward,
    random,
    require_native,
    same_bits,
)
from eager import Passing, by_every_way
from fusionsum import contraction, reference, split, tensors

# torch's own, on its first use of inductor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def to_torch(array: np.ndarray | None) -> torch.Tensor | None:
    if array is None:
        return None
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(array))


def to_numpy(x: torch.Tensor, like: np.ndarray) -> np.ndarray:
    assert x.is_contiguous()
    return x.view(torch.int16).numpy().view(like.dtype) if x.dtype == torch.bfloat16 else x.numpy()


def arguments(case: Case) -> tuple:
    present = None if case.present is None else [to_torch(mask) for mask in case.present]
    return to_torch(case.weights), tuple(map(to_torch, case.factors)), case.activations, present, case.absent, case.dim


def forward(case: Case):
    call, found = contraction.route(*arguments(case))
    return NotImplemented if found is None else contraction.fusion_sum(call, found)


def backward(case: Case, u: torch.Tensor, needs=None):
    needs = needs or [case.weights is not None] + [True] * len(case.factors)
    call, found = contraction.route(*arguments(case), grad_output=u)
    return NotImplemented if found is None else contraction.fusion_sum_grad(u, call, found, needs)


def check_case(case: Case, rng, u_dtype: str | None = None) -> None:
    dtype = reference.result_dtype(*case.operands)
    check_forward(case, to_numpy(forward(case), np.empty(0, dtype)))
    u = random(rng, case.output_shape, u_dtype or dtype.name)
    found = [d for d in backward(case, to_torch(u)) if d is not None]
    check_backward(case, u, [to_numpy(d, x) for d, x in zip(found, case.operands, strict=True)])


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Let small cases through."""
    require_native()
    monkeypatch.setattr(split, "LEAST_WORK", 1)
    monkeypatch.setattr(split, "LEAST_EXTENT", 8)


@pytest.fixture
def by_torch(monkeypatch):
    """Take the road of tensors on CUDA, torch's own products of matrices."""
    monkeypatch.setattr(contraction, "_by_scores", lambda call: False)


@pytest.fixture(params=["scores", "one tile", "tiles"])
def road(request, monkeypatch):
    if request.param != "scores":
        request.getfixturevalue("by_torch")
    if request.param == "tiles":
        monkeypatch.setattr(contraction, "TILE_BYTES", 600)
        monkeypatch.setattr(contraction, "LEAST_ROWS", 1)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, *MIXED, ("float64", "float16"), ("bfloat16", "float16")], ids=str)
@pytest.mark.parametrize("form", SPLIT)
def test_values(form, dtype, road, rng):
    weights_dtype, dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    case = SPLIT[form].case(rng, dtype, weights_dtype, **SIZES)
    check_case(case, rng)


@pytest.mark.parametrize("form", SPLIT)
def test_tiles_of_one_row(form, by_torch, monkeypatch, rng):
    monkeypatch.setattr(contraction, "TILE_BYTES", 4 * SIZES["n"])
    monkeypatch.setattr(contraction, "LEAST_ROWS", 1)
    check_case(SPLIT[form].case(rng, "bfloat16", **SIZES), rng)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masks", [None, ("rows", "one"), ("rows", "zero")], ids=str)
@pytest.mark.parametrize("form", SPLIT)
def test_activations_and_masks(form, masks, dtype, road, rng):
    count = len(SPLIT[form].factors)
    for shift in range(0, len(ACTIVATIONS), count):
        names = [ACTIVATIONS[(m + shift) % len(ACTIVATIONS)] for m in range(count)]
        case = SPLIT[form].case(rng, dtype, **SIZES, activations=names)
        check_case(case if masks is None else case.masked(rng, *masks), rng)


def test_masks_wider_than_their_factor(road, rng):
    case = Form("n", ("B1n", "1n", "Cn")).case(rng, "float32", **SIZES)
    case.present = [None, rng.random((SIZES["C"], 1)) > 0.4, None]  # of the right side, as its factor then is
    check_case(case, rng)
    case.factors[1] = case.factors[1][None]
    case.present[1] = rng.random((SIZES["B"], SIZES["C"])) > 0.4
    assert forward(case) is NotImplemented


@pytest.mark.parametrize("absent", ["one", "zero"])
def test_what_is_absent_never_matters(absent, road, rng):
    case = SPLIT["all pairs"].case(rng, "float32", **SIZES).masked(rng, "rows", absent)
    for z, mask in zip(case.factors, case.present, strict=True):
        z[~mask] = np.nan
    assert torch.isfinite(forward(case)).all()
    grads = backward(case, torch.ones(case.output_shape))
    assert all(torch.isfinite(d).all() for d in grads)
    assert not any(grads[m + 1].numpy()[~mask].any() for m, mask in enumerate(case.present))


@pytest.mark.parametrize("form", SPLIT)
def test_wide_gradients_of_narrow_operands(form, road, rng):
    check_case(SPLIT[form].case(rng, "float32", **SIZES), rng, u_dtype="float64")
    check_case(SPLIT[form].case(rng, "float16", **SIZES), rng, u_dtype="float32")


def test_layouts(road, rng):
    """Transposed, expanded, strided, offset, and a gradient as ``sum().backward()`` gives it."""
    B, C, n = (SIZES[k] for k in "BCn")

    def expanded(shape, to):  # writeable, as torch wants arrays
        return np.lib.stride_tricks.as_strided(
            random(rng, shape, "float32"), to, [4 * (m > 1) * math.prod(shape[i + 1 :]) for i, m in enumerate(shape)]
        )

    for f, g in (
        (np.asfortranarray(random(rng, (B, n), "float32"))[:, None], random(rng, (n, C), "float32").T),
        (random(rng, (2 * B, 1, 2 * n), "float32")[::2, :, ::2], random(rng, (C, n + 1), "float32")[:, 1:]),
        (expanded((1, 1, n), (B, 1, n)), expanded((C, 1), (C, n))),
    ):
        for weights in (None, random(rng, (n,), "float32")):
            case = Case(weights, [f, g])
            check_forward(case, forward(case).numpy())
            found = backward(case, torch.ones(1, 1).expand(B, C))
            u = np.ones((B, C), "float32")
            check_backward(case, u, [d.numpy() for d in found if d is not None])


def test_only_what_is_needed(rng):
    case = SPLIT["all pairs"].case(rng, "float32", **SIZES)
    u = torch.randn(case.output_shape)
    wanted = backward(case, u)
    for needs in itertools.product([False, True], repeat=3):
        found = backward(case, u, list(needs))
        assert [d is not None for d in found] == list(needs)
        for d, whole in zip(found, wanted, strict=True):
            if d is not None:
                torch.testing.assert_close(d, whole)


# ---- which calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WHOLE)
def test_what_does_not_split(form, rng):
    case = WHOLE[form].case(rng, **SIZES)
    given = arguments(case)
    assert forward(case) is NotImplemented
    check_forward(case, fs.fusion_sum(given[0], *given[1], dim=case.dim).numpy())


def test_thresholds(by_torch, monkeypatch, rng):
    case = SPLIT["all pairs"].case(rng, **SIZES)
    work = SIZES["B"] * SIZES["C"] * SIZES["n"]
    for least in (work + 1, work):
        monkeypatch.setattr(split, "LEAST_WORK", least)
        assert (forward(case) is NotImplemented) == (least > work)
    for least in (SIZES["C"], SIZES["C"] + 1):
        monkeypatch.setattr(split, "LEAST_EXTENT", least)
        assert (forward(case) is NotImplemented) == (least > SIZES["C"])
    monkeypatch.setattr(split, "LEAST_EXTENT", 8)
    monkeypatch.setattr(contraction, "TILE_BYTES", 8 * SIZES["n"] * 4)
    for least in (4, 5):  # rows of a tile
        monkeypatch.setattr(contraction, "LEAST_ROWS", least)
        assert (forward(case) is NotImplemented) == (least > 4)


def test_bad_factors_are_errors():
    f = torch.ones(8, 1, 8)
    for bad in ([1.0], None, 3, "f", np.ones(3), torch.ones(8, 3)):
        with pytest.raises((TypeError, ValueError)):
            fs.fusion_sum(None, f, bad)
    with pytest.raises(TypeError, match="dense tensors"):
        fs.fusion_sum(None, f, torch.ones(8, 8).to_sparse())


# ---- ways in ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """Record every call of the native scores."""
    seen, native = [], contraction.native
    functions = {
        name: lambda *given, name=name: (seen.append(name), getattr(native, name)(*given))[1]
        for name in ("score_matrix", "score_matrix_grad")
    }
    monkeypatch.setattr(contraction, "native", SimpleNamespace(**functions))
    return seen


def test_every_way_leads_here(products, rng):
    w, (f, g), *_ = arguments(SPLIT["all pairs"].case(rng, **SIZES))
    op, op_grad = torch.ops.fusionsum.fusion_sum.default, torch.ops.fusionsum.fusion_sum_grad.default
    wanted = torch.einsum("n,bn,cn->bc", w, f[:, 0], g)
    u = torch.randn_like(wanted)

    def moded():
        with Passing():
            return fs.fusion_sum(w, f, g)

    compiled = torch.compile(fs.fusion_sum, backend="aot_eager", fullgraph=True)
    for way in (
        lambda: fs.fusion_sum(w, f, g),
        lambda: fs.fusion_sum(w.clone().requires_grad_(), f, g).detach(),
        lambda: op(w, [f, g], ["", ""], [None, None], "one", -1),
        moded,
        lambda: compiled(w, f, g),
    ):
        products.clear()
        torch.testing.assert_close(way(), wanted)
        assert products
    found = vmap(fs.fusion_sum, (None, 0, None))(w, torch.stack([f, 2 * f]), g)  # a batch, which does not split
    torch.testing.assert_close(found[0], wanted)
    for way in (
        lambda: fs.fusion_sum_grad(u, w, f, g),
        lambda: op_grad(u, w, [f, g], ["", ""], [None, None], "one", -1, [True] * 3),
    ):
        products.clear()
        torch.testing.assert_close(way()[1][:, 0], torch.einsum("bc,n,cn->bn", u, w, g))
        assert products == ["score_matrix_grad"]


@pytest.mark.parametrize("form", ["all pairs", "mixing", "two operands", "terms first"])
def test_derivatives_of_every_order(form, products, rng, monkeypatch):
    monkeypatch.setattr(split, "LEAST_EXTENT", 2)
    small = {"B": 3, "C": 2, "O": 2, "n": 3}
    for names in (None, ["tanh", "gelu"]):
        case = SPLIT[form].case(rng, **small, activations=names)
        weights, factors, *_ = arguments(case)
        given = [x.requires_grad_() for x in (weights, *factors) if x is not None]

        def function(*x, case=case):
            x = x if case.weights is not None else (None, *x)
            return fs.fusion_sum(*x, activations=case.activations, dim=case.dim)

        assert gradcheck(function, given, check_forward_ad=True)
        assert gradgradcheck(function, given)
        assert products


@pytest.mark.parametrize("form", ["all pairs", "mixing"])
@pytest.mark.parametrize("rows", [16, 17, 23])
def test_autocast_changes_nothing(rows, form, products, rng):
    torch._dynamo.reset()
    case = SPLIT[form].case(rng, "float32", **SIZES | {"B": rows, "O": 9})
    weights, factors, *_ = arguments(case)
    given = [partial(fs.fusion_sum, dim=case.dim), weights, *factors]
    wanted = by_every_way(*given)
    assert products
    with torch.autocast("cpu", torch.bfloat16):
        found = by_every_way(*given)
    assert all(same_bits(a.numpy(), b.numpy()) for a, b in zip(found, wanted, strict=True))


# ---- memory and bits -------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Follow the bytes of the storages that torch makes, and of those that a kernel returns through `counted`."""

    def __init__(self, *inputs):
        super().__init__()
        self.live = {x.untyped_storage().data_ptr() for x in inputs if x is not None}
        self.now = self.peak = self.largest = 0

    def count(self, found):
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.live:
                storage = x.untyped_storage()
                self.live.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.gone, storage.data_ptr(), storage.nbytes())
        return found

    def gone(self, address, size):
        self.live.discard(address)
        self.now -= size

    def counted(self, kernel):
        return lambda *given: self.count(kernel(*given))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.count(func(*args, **(kwargs or {})))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["all pairs", "mixing", "two axes a side"])
def test_memory_is_bounded_by_tiles(form, dtype, by_torch, rng, monkeypatch):
    tile = 2**12
    monkeypatch.setattr(contraction, "TILE_BYTES", tile)
    monkeypatch.setattr(contraction, "LEAST_ROWS", 8)
    case = SPLIT[form].case(rng, dtype, **{"A": 5, "B": 200, "C": 170, "K": 2, "O": 170, "n": 40})
    weights, factors, *_ = arguments(case)
    of_rows = 4 * 40 * 200
    assert of_rows > 4 * tile  # a whole product would show
    allocations = Allocations(weights, *factors)
    kernels = tensors.fusion_sum, tensors.fusion_sum_grad
    monkeypatch.setattr(tensors, "fusion_sum", allocations.counted(kernels[0]))
    with allocations:
        output = forward(case)
    assert allocations.largest == output.nbytes
    assert allocations.peak - output.nbytes <= 4 * tile

    u = torch.randn(case.output_shape).to(output.dtype)
    allocations = Allocations(u, weights, *factors)
    for kernel in kernels:
        monkeypatch.setattr(tensors, kernel.__name__, allocations.counted(kernel))
    with allocations:
        grads = backward(case, u)
    given_back = sum(d.nbytes for d in grads)
    assert allocations.peak - given_back <= 8 * tile


SHAPES = ((300, 70, 900), (1030, 33, 65), (64, 64, 2000), (16, 1500, 513), (2049, 17, 31), (130, 515, 260))


@pytest.mark.parametrize("form", ["all pairs", "mixing"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, form, rng):
    before = torch.get_num_threads()
    try:
        for left, right, terms in SHAPES:
            case = SPLIT[form].case(rng, dtype, **{"B": left, "C": right, "O": right, "n": terms})
            u = to_torch(random(rng, case.output_shape, dtype))
            found = []
            for threads in (1, 2, 3, 8, 1):
                torch.set_num_threads(threads)
                found.append([forward(case), *(d for d in backward(case, u) if d is not None)])
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), (left, right, terms)
    finally:
        torch.set_num_threads(before)
