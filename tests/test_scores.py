"""A checked call of scores: the order of its fields, every invalid argument with its message, the codes of integers.

What lives elsewhere: what valid calls give (``test_losses.py``, ``test_search.py``).
"""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest

import fusionsum as fs
import pairs
from conftest import DTYPES, check_within, in_pairs
from fusionsum import losses, reference, scores, search
from fusionsum.scores import Scores, Search

LOSSES = ("contrastive_loss", "sigmoid_loss")
SEARCHES = ("top_k", "ranks")
EVERY = LOSSES + SEARCHES
B, C, N = 3, 4, 5


def f(*shape, dtype="float64"):
    return np.ones(shape, dtype)


def i(*values, dtype="int64"):
    return np.array(values, dtype)


@pytest.fixture
def nothing_is_evaluated(monkeypatch):
    def evaluated(*arguments):
        raise AssertionError("an invalid call was evaluated")

    for module in (losses, search):
        monkeypatch.setattr(module, "evaluate", evaluated)


def call(name, queries=None, keys=None, **options):
    """Call a public function with valid arguments but for these."""
    queries, keys = f(B, N) if queries is None else queries, f(C, N) if keys is None else keys
    if name == "top_k":
        return fs.top_k(queries, keys, **{"k": 2} | options)
    if name == "ranks":
        return fs.ranks(queries, keys, **{"targets": i(0, 1, 2)} | options)
    return getattr(fs, name)(queries, keys, **options)


# (functions, arguments, error, message)
INVALID = [
    # sides
    (EVERY, {"queries": [[1.0]]}, TypeError, "queries[0]: expected a numpy.ndarray or torch.Tensor, got list"),
    (EVERY, {"queries": "abc"}, TypeError, "queries: expected a numpy.ndarray or torch.Tensor, got str"),
    (EVERY, {"keys": 1.0}, TypeError, "keys: expected a numpy.ndarray or torch.Tensor, got float"),
    (EVERY, {"keys": (f(C, N), None)}, TypeError, "keys[1]: expected a numpy.ndarray or torch.Tensor, got NoneType"),
    (EVERY, {"queries": ()}, ValueError, "queries: expected 1 to 8 arrays, got 0"),
    (EVERY, {"keys": (f(C, N),) * 9}, ValueError, "keys: expected 1 to 8 arrays, got 9"),
    (EVERY, {"queries": np.ma.masked_array(f(B, N))}, TypeError, "queries: expected a plain array, got a masked one"),
    (EVERY, {"queries": f(N)}, ValueError, "queries: expected two dims, rows and terms, got shape (5,)"),
    (EVERY, {"queries": f(2, B, N)}, ValueError, "queries: expected two dims, rows and terms, got shape (2, 3, 5)"),
    (EVERY, {"keys": (f(C, N), f())}, ValueError, "keys[1]: expected two dims, rows and terms, got shape ()"),
    (EVERY, {"keys": (f(C, N), f(3, N))}, ValueError, "keys[1]: shape (3, 5) does not broadcast with (4, 5)"),
    (EVERY, {"keys": f(C, 6)}, ValueError, "keys: expected 5 terms, as queries of shape (3, 5) have, got shape (4, 6)"),
    (EVERY, {"keys": f(C, 1)}, ValueError, "keys: expected 5 terms, as queries of shape (3, 5) have, got shape (4, 1)"),
    (
        EVERY,
        {"keys": f(C, N).astype(int)},
        TypeError,
        "keys: expected one of the dtypes float64, float32, bfloat16, float16, got int64",
    ),
    (EVERY, {"queries": f(B, N).astype(complex)}, TypeError, "queries: expected one of the dtypes"),
    (EVERY, {"queries": f(B, N).astype(">f8")}, TypeError, "queries: expected one of the dtypes"),
    # weights and biases
    (EVERY, {"fusion_weights": f(4)}, ValueError, "fusion_weights: expected shape (5,), one per term, got (4,)"),
    (EVERY, {"fusion_weights": f()}, ValueError, "fusion_weights: expected shape (5,), one per term, got ()"),
    (
        EVERY,
        {"fusion_weights": [1.0] * 5},
        TypeError,
        "fusion_weights: expected a numpy.ndarray or torch.Tensor, got list",
    ),
    (EVERY, {"fusion_weights": np.ones(5, int)}, TypeError, "fusion_weights: expected one of the dtypes"),
    (
        ("contrastive_loss", *SEARCHES),
        {"key_bias": f(B)},
        ValueError,
        "key_bias: expected shape (4,), one per key, got (3,)",
    ),
    (LOSSES, {"logit_scale": "1"}, TypeError, "logit_scale: expected a number or an array of no dims, got str"),
    (LOSSES, {"logit_scale": None}, TypeError, "logit_scale: expected a number or an array of no dims, got NoneType"),
    (LOSSES, {"logit_scale": True}, TypeError, "logit_scale: expected a number or an array of no dims, got bool"),
    (LOSSES, {"logit_scale": 1j}, TypeError, "logit_scale: expected a number or an array of no dims, got complex"),
    (LOSSES, {"logit_scale": float("nan")}, ValueError, "logit_scale: expected a finite number, got nan"),
    (LOSSES, {"logit_scale": np.float32("inf")}, ValueError, "logit_scale: expected a finite number, got inf"),
    (LOSSES, {"logit_scale": np.array(-np.inf)}, ValueError, "logit_scale: expected a finite number, got -inf"),
    (
        LOSSES,
        {"logit_scale": f(1)},
        ValueError,
        "logit_scale: expected a number or an array of no dims, got shape (1,)",
    ),
    (LOSSES, {"logit_scale": np.array(1)}, TypeError, "logit_scale: expected one of the dtypes"),
    (
        ("sigmoid_loss",),
        {"logit_bias": f(2)},
        ValueError,
        "logit_bias: expected a number or an array of no dims, got shape (2,)",
    ),
    (("sigmoid_loss",), {"logit_bias": float("inf")}, ValueError, "logit_bias: expected a finite number, got inf"),
    # labels
    (
        LOSSES,
        {"keys": f(2, N)},
        ValueError,
        "keys: expected at least 3 rows, for key b is the positive of query b, got 2; or say by `labels`",
    ),
    (LOSSES, {"labels": i(0, 1, 2)}, ValueError, "key_labels: expected integers, for labels are given, got None"),
    (
        LOSSES,
        {"key_labels": i(0, 1, 2, 3)},
        ValueError,
        "labels: expected integers, for key_labels are given, got None",
    ),
    (
        LOSSES,
        {"labels": f(B), "key_labels": i(0, 1, 2, 3)},
        TypeError,
        "labels: expected an integer dtype, got float64",
    ),
    (
        LOSSES,
        {"labels": i(0, 1, 2), "key_labels": f(C) > 0},
        TypeError,
        "key_labels: expected an integer dtype, got bool",
    ),
    (
        LOSSES,
        {"labels": i(0, 1), "key_labels": i(0, 1, 2, 3)},
        ValueError,
        "labels: expected shape (3,), as many as queries, got (2,)",
    ),
    (
        LOSSES,
        {"labels": i(0, 1, 2), "key_labels": i([0] * 4)},
        ValueError,
        "key_labels: expected shape (4,), as many as keys, got (1, 4)",
    ),
    (
        LOSSES,
        {"labels": [0, 1, 2], "key_labels": i(0, 1, 2, 3)},
        TypeError,
        "labels: expected a numpy.ndarray or torch.Tensor, got list",
    ),
    (
        LOSSES,
        {"labels": i(-1, 0, 0), "key_labels": i(0, 0, 0, 2**64 - 1, dtype="uint64")},
        TypeError,
        "labels: expected one integer dtype on both sides, got int64 and uint64",
    ),
    # exclude, in losses
    (LOSSES, {"exclude": "ids"}, TypeError, "exclude: expected a pair of integer vectors or a boolean array, got str"),
    (
        LOSSES,
        {"exclude": f(B, C)},
        TypeError,
        "exclude: expected a pair of integer vectors or a boolean array, got an array of the dtype float64",
    ),
    (
        LOSSES,
        {"exclude": np.ones((C, B), bool)},
        ValueError,
        "exclude: expected shape (3, 4), queries by keys, got (4, 3)",
    ),
    (
        LOSSES,
        {"exclude": (i(0, 1, 2),)},
        ValueError,
        "exclude: expected a pair of integer vectors or a boolean array, got 1 entries",
    ),
    (LOSSES, {"exclude": (i(0, 1, 2), f(C))}, TypeError, "exclude[1]: expected an integer dtype, got float64"),
    (
        LOSSES,
        {"exclude": (i(0, 1), i(0, 1, 2, 3))},
        ValueError,
        "exclude[0]: expected shape (3,), as many as queries, got (2,)",
    ),
    # exclude, in searches
    (
        SEARCHES,
        {"exclude": 3},
        TypeError,
        "exclude: expected a boolean array, a list of ids per query or a pair of arrays (offsets, ids), got int",
    ),
    (SEARCHES, {"exclude": i(0, 1, 2)}, TypeError, "got an array of the dtype int64"),
    (
        SEARCHES,
        {"exclude": np.ones((B, N), bool)},
        ValueError,
        "exclude: expected shape (3, 4), queries by keys, got (3, 5)",
    ),
    (SEARCHES, {"exclude": [[0], [1]]}, ValueError, "exclude: expected 3 sequences of ids, one per query, got 2"),
    (
        SEARCHES,
        {"exclude": [[0], [4], []]},
        ValueError,
        "exclude: expected integers from 0 to less than 4, the number of keys, got 4",
    ),
    (
        SEARCHES,
        {"exclude": [[0], [-1], []]},
        ValueError,
        "exclude: expected integers from 0 to less than 4, the number of keys, got -1",
    ),
    (SEARCHES, {"exclude": [[0], [1.5], []]}, TypeError, "exclude[1]: expected integers, the ids of keys, got float64"),
    (
        SEARCHES,
        {"exclude": [[0], 7, []]},
        TypeError,
        "exclude[1]: expected a sequence of integers, the ids of keys, got int",
    ),
    (SEARCHES, {"exclude": [[0], [[1, 2]], []]}, ValueError, "exclude[1]: expected one dim, got shape (1, 2)"),
    (
        SEARCHES,
        {"exclude": (i(0, 0, 0), i(1))},
        ValueError,
        "exclude[0], the offsets: expected shape (4,), one more than the queries, got (3,)",
    ),
    (
        SEARCHES,
        {"exclude": (i(0, 0, 0, 1), f(1))},
        TypeError,
        "exclude[1], the ids: expected an integer dtype, got float64",
    ),
    (
        SEARCHES,
        {"exclude": (i(0, 0, 0, 1), i([1]))},
        ValueError,
        "exclude[1], the ids: expected one dim, got shape (1, 1)",
    ),
    (
        SEARCHES,
        {"exclude": (i(0, 0, 0, 1), i(1, 2))},
        ValueError,
        "exclude: expected offsets that ascend from 0 to 2, the number of ids",
    ),
    (SEARCHES, {"exclude": (i(0, 2, 1, 2), i(1, 2))}, ValueError, "exclude: expected offsets that ascend from 0 to 2"),
    (SEARCHES, {"exclude": (i(1, 1, 1, 2), i(1, 2))}, ValueError, "exclude: expected offsets that ascend from 0 to 2"),
    (
        SEARCHES,
        {"exclude": (i(0, 0, 0, 1), i(4))},
        ValueError,
        "exclude: expected integers from 0 to less than 4, the number of keys, got 4",
    ),
    # activations and masks
    (EVERY, {"activations": "cube"}, ValueError, "activations[0]: expected one of None, 'tanh'"),
    (EVERY, {"activations": [1]}, TypeError, "activations[0]: expected one of None, 'tanh'"),
    (
        EVERY,
        {"key_activations": ["tanh", None]},
        ValueError,
        "key_activations: expected 1 entries, one per factor, got 2",
    ),
    (EVERY, {"key_activations": 7}, TypeError, "key_activations: expected None, a name or a sequence of them, got int"),
    (EVERY, {"present": f(B) > 0}, TypeError, "present: expected None or a sequence of boolean arrays, got ndarray"),
    (EVERY, {"present": [f(B)]}, TypeError, "present[0]: expected the dtype bool, got float64"),
    (
        EVERY,
        {"key_present": [f(B) > 0]},
        ValueError,
        "key_present[0]: shape (3,) does not fit the leading dims of keys[0], shape (4, 5)",
    ),
    (EVERY, {"key_present": [f(C, N) > 0]}, ValueError, "the terms are present or absent together"),
    (EVERY, {"absent": "two"}, ValueError, "absent: expected 'one' or 'zero', got 'two'"),
    (EVERY, {"absent": 1}, TypeError, "absent: expected 'one' or 'zero', got int"),
    # options
    (LOSSES, {"reduction": "avg"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
    (LOSSES, {"reduction": None}, TypeError, "reduction: expected 'mean', 'sum' or 'none', got NoneType"),
    (("contrastive_loss",), {"positives": "all"}, ValueError, "positives: expected 'mean' or 'any', got 'all'"),
    (("contrastive_loss",), {"symmetric": 1}, TypeError, "symmetric: expected a bool, got int"),
    (("contrastive_loss",), {"return_lse": None}, TypeError, "return_lse: expected a bool, got NoneType"),
    (
        ("contrastive_loss",),
        {"label_smoothing": 1.0},
        ValueError,
        "label_smoothing: expected at least 0 and less than 1, got 1.0",
    ),
    (
        ("contrastive_loss",),
        {"label_smoothing": -0.1},
        ValueError,
        "label_smoothing: expected at least 0 and less than 1, got -0.1",
    ),
    (
        ("contrastive_loss",),
        {"label_smoothing": float("nan")},
        ValueError,
        "label_smoothing: expected at least 0 and less than 1, got nan",
    ),
    (("contrastive_loss",), {"label_smoothing": "0"}, TypeError, "label_smoothing: expected a number, got str"),
    (("top_k",), {"k": -1}, ValueError, "k: expected 0 to 4, the number of keys, got -1"),
    (("top_k",), {"k": 5}, ValueError, "k: expected 0 to 4, the number of keys, got 5"),
    (("top_k",), {"k": True}, TypeError, "k: expected an integer, got bool"),
    (("top_k",), {"k": 2.0}, TypeError, "k: expected an integer, got float"),
    (("ranks",), {"ties": "best"}, ValueError, "ties: expected 'mean', 'optimistic' or 'pessimistic', got 'best'"),
    (("ranks",), {"targets": f(B)}, TypeError, "targets: expected an integer dtype, got float64"),
    (("ranks",), {"targets": [0, 1, 2]}, TypeError, "targets: expected a numpy.ndarray or torch.Tensor, got list"),
    (("ranks",), {"targets": i(0, 1)}, ValueError, "targets: expected shape (3,), as many as queries, got (2,)"),
    (
        ("ranks",),
        {"targets": i(0, 1, 4)},
        ValueError,
        "targets: expected integers from 0 to less than 4, the number of keys, got 4",
    ),
    (
        ("ranks",),
        {"targets": i(0, -1, 1)},
        ValueError,
        "targets: expected integers from 0 to less than 4, the number of keys, got -1",
    ),
    (
        EVERY,
        {"group": object()},
        ValueError,
        "group: expected an initialised process group, got object before torch.distributed.init_process_group",
    ),
]


@pytest.mark.usefixtures("nothing_is_evaluated")
@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [(name, *rest) for names, *rest in INVALID for name in names],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_invalid_argument_is_named_before_anything_is_evaluated(name, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(name, **arguments)


@pytest.mark.usefixtures("nothing_is_evaluated")
@pytest.mark.parametrize("name", EVERY)
def test_frameworks_and_devices_do_not_mix(name):
    torch = pytest.importorskip("torch")
    tensors = {"queries": torch.ones(B, N), "keys": torch.ones(C, N)}
    mixed = [
        ({"keys": torch.ones(C, N)}, TypeError, "keys: expected a numpy.ndarray like queries, got a torch.Tensor"),
        ({"queries": (f(B, N), torch.ones(N))}, TypeError, r"queries\[1\]: expected a numpy.ndarray like queries\[0\]"),
        ({"fusion_weights": torch.ones(N)}, TypeError, "fusion_weights: expected a numpy.ndarray"),
        ({"present": [torch.ones(B) > 0]}, TypeError, r"present\[0\]: expected a numpy.ndarray like queries\[0\]"),
        (tensors | {"fusion_weights": f(N)}, TypeError, "fusion_weights: expected a torch.Tensor like queries"),
        (
            tensors | {"keys": torch.ones(C, N, device="meta")},
            ValueError,
            "keys: is on meta, expected cpu, where queries is",
        ),
        (tensors | {"exclude": np.ones((B, C), bool)}, TypeError, "exclude: expected a torch.Tensor like queries"),
        (tensors | {"keys": torch.ones(C, N).int()}, TypeError, "keys: expected one of the dtypes"),
    ]
    if name in LOSSES:
        labels = {"labels": torch.zeros(B).int(), "key_labels": torch.zeros(C).int()}
        mixed += [
            ({"logit_scale": torch.ones(())}, TypeError, "logit_scale: expected a numpy.ndarray like queries"),
            (tensors | {"logit_scale": f()}, TypeError, "logit_scale: expected a torch.Tensor like queries"),
            (tensors | labels | {"labels": i(0, 0, 0)}, TypeError, "labels: expected a torch.Tensor like queries"),
            (
                tensors | {"exclude": (i(0, 0, 0), labels["key_labels"])},
                TypeError,
                r"exclude\[0\]: expected a torch.Tensor",
            ),
        ]
    for arguments, error, message in mixed:
        with pytest.raises(error, match=message):
            call(name, **arguments)


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_score_matrix_and_its_gradient(backend, dtype, factors, rng, monkeypatch):
    torch = pytest.importorskip("torch")
    pairs.use_backend(backend, monkeypatch, "score_matrix", "score_matrix_grad")
    wide = "float64" if dtype == "float64" else "float32"
    case = pairs.sides(rng, 9, 13, 20, factors, dtype, "uniform", masks="one", activations=True)
    case = case.but(logit_scale=-1.5, logit_bias=0.25, key_bias=rng.standard_normal(13).astype(wide))
    naive, read = pairs.Naive(case), case.read()
    eps = 60 * np.finfo(wide).eps
    got = scores.evaluate("score_matrix", *read)
    assert got.dtype.name == dtype
    rounding = {"float64": 0, "float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    want = naive.scores.detach().numpy()
    a, k = (abs(side.detach().numpy()) for side in (naive.query_side, naive.key_side))
    of_sides = 1.5 * 2.0**-8 if backend == "native" and in_pairs([got, *case.queries, *case.keys]) else 0.0
    check_within(got, want, 10 * eps + rounding * abs(want) + 2.02 * of_sides * (a @ k.T))
    grad = rng.standard_normal((9, 13)).astype(got.dtype)
    wanted = torch.autograd.grad(
        naive.scores, [naive.query_side, naive.key_side], torch.tensor(grad.astype(np.float64))
    )
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        found = scores.evaluate("score_matrix_grad", grad, *read, needs)
        sizes = abs(grad.astype(np.float64)) @ k, abs(grad.astype(np.float64)).T @ a
        for got, want, size, need in zip(found, wanted, sizes, needs, strict=True):
            assert (got is not None) == need
            if need:
                assert got.dtype.name == wide
                check_within(-1.5 * got, want.numpy(), 40 * eps + of_sides * size)


# ---- fields ----------------------------------------------------------------------------------------------------------


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_fields_have_one_order():
    assert parameters(reference._Pairs) == list(Scores._fields)
    assert parameters(reference._blocks) == list(Search._fields)
    assert Scores._fields[:9] == Search._fields[:9]
    assert parameters(scores.check)[:11] == list(Scores._fields[:11])
    assert parameters(scores.check_search)[:10] == list(Search._fields[:10])


def test_the_public_functions_share_their_arguments():
    """Each has those of the two checks, and what is its own; the defaults are one."""
    own = {
        "contrastive_loss": {"positives", "symmetric", "label_smoothing", "reduction", "return_lse"},
        "sigmoid_loss": {"reduction"},
        "top_k": {"k"},
        "ranks": {"targets", "ties"},
    }
    lacking = {"contrastive_loss": {"logit_bias"}, "sigmoid_loss": {"key_bias"}, "top_k": set(), "ranks": set()}
    for name in EVERY:
        check = scores.check if name in LOSSES else scores.check_search
        wanted, found = inspect.signature(check).parameters, inspect.signature(getattr(fs, name)).parameters
        assert set(found) == set(wanted) - {"elsewhere"} - lacking[name] | own[name] | {"group"}
        for shared in set(found) & set(wanted):
            assert found[shared].default == wanted[shared].default
        for given, argument in found.items():  # the checks take them by their places
            of_place = given in ("queries", "keys") or given in own[name] & {"k", "targets"}
            assert (argument.kind is argument.KEYWORD_ONLY) == (not of_place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_valid_call_is_normalised(dtype, tmp_path):
    mapped = np.memmap(tmp_path / "keys", np.float64, "w+", shape=(C, N))
    queries = [f(B, N, dtype=dtype), f(N, dtype=dtype), f(B, 1, dtype=dtype)]
    checked = scores.check(
        queries,
        mapped,
        logit_scale=np.array(2.0),
        activations="tanh",
        present=(None, np.array([True]), f(B, 1) > 0),
        key_present=[np.array(True)],
        exclude=[i(5, 6, 7), i(7, 6, 5, 4, dtype="uint8")],
    )
    read = checked.read()
    assert [x.shape for x in read.queries] == [(B, N)] * 3
    assert all(np.shares_memory(x, y) for x, y in zip(read.queries, queries, strict=True))
    assert [x if x is None else x.shape for x in read.present] == [None, (B,), (B,)]
    assert [x.shape for x in read.key_present] == [(C,)]
    assert type(read.keys[0]) is np.ndarray
    assert np.shares_memory(read.keys[0], mapped)
    assert read.activations == ("tanh",) * 3
    assert read.key_activations == (None,)
    assert (read.logit_scale, read.logit_bias, type(read.logit_scale)) == (2.0, 0.0, float)
    assert (read.query_labels, read.key_labels, read.exclude) == (None, None, None)
    assert read.query_ids.dtype == read.key_ids.dtype == np.int32
    assert ((read.query_ids[:, None] == read.key_ids) == (i(5, 6, 7)[:, None] == i(7, 6, 5, 4))).all()
    assert len(read.operands) == 4


def test_checks_read_no_values():
    """So tensors of compilers, which have none, pass; what has no array is checked as far as types go."""
    torch = pytest.importorskip("torch")
    queries, keys = torch.ones(B, N, device="meta"), torch.ones(C, N, device="meta")
    labels = torch.zeros(B, dtype=torch.int64, device="meta"), torch.zeros(C, dtype=torch.int64, device="meta")
    scale = torch.ones((), device="meta")
    checked = scores.check(
        queries, (keys, keys[:1]), logit_scale=scale, labels=labels[0], key_labels=labels[1], exclude=labels
    )
    assert [x.shape for x in checked.keys] == [(C, N)] * 2
    assert checked.logit_scale is scale
    offsets = torch.zeros(B + 1, dtype=torch.int64, device="meta")
    assert scores.check_search(queries, keys, exclude=(offsets, offsets)).excluded_offsets is offsets


def test_tensors_are_read():
    torch = pytest.importorskip("torch")
    labels = torch.tensor([3, 1, -1]), torch.tensor([1, 1, 3, 0])
    scale = torch.tensor(2.5, requires_grad=True)
    read = scores.check(
        torch.ones(B, N), torch.ones(C, N), labels=labels[0], key_labels=labels[1], logit_scale=scale
    ).read()
    assert read.logit_scale == 2.5
    assert (read.query_labels[:, None] == read.key_labels).tolist() == (labels[0][:, None] == labels[1]).tolist()
    lists = [torch.tensor([2, 0, 2]), torch.tensor([], dtype=torch.int32), [1]]
    found = scores.check_search(torch.ones(B, N), torch.ones(C, N), exclude=lists).read()
    assert found.excluded_offsets.tolist() == [0, 2, 2, 3]
    assert found.excluded_ids.tolist() == [0, 2, 1]


# ---- codes -----------------------------------------------------------------------------------------------------------

INTEGERS = {
    "small": (i(0, 5, 3), i(5, 5, 0, 2)),
    "negative": (i(-1, 5, -3), i(5, -1, 0, 2)),
    "large": (i(2**62, -(2**62), 7), i(2**62, 7, 7, 2**62 - 1)),
    "at the limit": (i(2**24, 0, 2**24 - 1), i(0, 2**24, 2**24 - 1, 1)),
    "uint64": (i(2**64 - 1, 0, 1, dtype="uint64"), i(2**64 - 2, 2**64 - 1, 1, 0, dtype="uint64")),
    "of two dtypes": (i(-1, 2, 127, dtype="int8"), i(255, 2, 127, 1, dtype="uint8")),
    "none": (i(), i(1, 2)),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_equal_integers_have_equal_codes(kind):
    queries, keys = INTEGERS[kind]
    codes, key_codes = scores._codes("labels", queries, keys)
    equal = [[int(a) == int(b) for b in keys] for a in queries]
    assert (codes[:, None] == key_codes).tolist() == equal
    for found, given in ((codes, queries), (key_codes, keys)):
        assert found.dtype == np.int32
        assert found.shape == given.shape
        assert ((found >= 0) & (found < 2**24)).all()


def test_too_many_distinct_integers(monkeypatch):
    monkeypatch.setattr(scores, "MAX_CODES", 3)
    scores._codes("labels", i(-1, -2), i(-2, -3))
    with pytest.raises(ValueError, match="labels: expected at most 3 distinct integers, got 4"):
        scores._codes("labels", i(-1, -2), i(-4, -3))
