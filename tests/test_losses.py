"""The losses of NumPy arrays and their internal gradients, against every pair's score stored in torch.

What lives elsewhere: invalid arguments and their messages (``test_scores.py``), the naive formulas (``pairs.py``), tensors
(``test_autograd_losses.py``).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import pairs
from conftest import DTYPES, check_within, widened
from fusionsum import reference
from fusionsum.combination import Options, arrange, coefficients, coefficients_sigmoid, combine, combine_sigmoid
from fusionsum.scores import evaluate

torch = pytest.importorskip("torch")

REFERENCE = {name: getattr(reference, name) for name in ("softmax_stats", "softmax_grad")}
SIDES = list(itertools.product([1, 2, 3], [None, "one", "zero"], [False, True]))  # factors, masks, activations
# labels, exclude, C > B
TARGETS = list(itertools.product([False, True], [None, "ids", "mask"], [False, True]))


@pytest.fixture(params=["reference", "native"], autouse=True)
def evaluated_by(request, monkeypatch):
    pairs.use_backend(request.param, monkeypatch, "softmax_stats", "softmax_grad", "sigmoid_stats", "sigmoid_grad")
    return request.param


def all_targets(rng, **options):
    """Sides of these options with every kind of labels, exclusions and number of keys."""
    for labels, exclude, more in TARGETS:
        case = pairs.sides(rng, columns=7 if more else 4, **options)
        case = case.but(logit_scale=1.7, key_bias=rng.standard_normal(len(case.keys[0])))
        case = pairs.with_labels(case, rng) if labels else case
        yield pairs.with_exclusions(case, rng, exclude)


def close(got, want, tol=1e-12):
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True)
    check_within(got[finite], want[finite], tol * (1 + abs(want[finite])))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("positives", ["mean", "any"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_contrastive_loss_and_its_gradients(sides, positives, symmetric, rng):
    """Over labels, exclusions, C > B, label smoothing and reductions; the gradients are those of both sides' products."""
    factors, masks, activations = sides
    for case in all_targets(rng, factors=factors, masks=masks, activations=activations):
        given = case.read()
        for smoothing, reduction in itertools.product([0.0, 0.3], ["mean", "sum", "none"]):
            named = {"positives": positives, "symmetric": symmetric, "label_smoothing": smoothing}
            named |= {"reduction": reduction, "return_lse": True}
            options = Options(positives == "any", symmetric, smoothing, reduction, True)
            naive = pairs.Naive(case)
            wanted = naive.contrastive(**named)
            for got, want in zip(pairs.flat(case.loss(**named)), wanted, strict=True):
                close(got, want)

            upstream = [np.asarray(rng.standard_normal(w.shape)) for w in wanted]
            upstream = [np.where(np.isfinite(w.detach().numpy()), u, 0) for u, w in zip(upstream, wanted, strict=True)]
            leaves = [naive.query_side, naive.key_side, naive.scale, naive.key_bias]
            grads = torch.autograd.grad(
                sum(
                    (torch.tensor(u) * torch.where(w.isfinite(), w, 0)).sum()
                    for u, w in zip(upstream, wanted, strict=True)
                ),
                leaves,
            )
            stats = evaluate("softmax_stats", *given, options.any, symmetric, options.totals)
            coefs = coefficients(np, *stats, options, upstream)
            d_query, d_key, d_scale, d_bias = evaluate("softmax_grad", *given, options.any, *coefs, (True,) * 4)
            for got, want in zip((1.7 * d_query, 1.7 * d_key, d_scale, d_bias), grads, strict=True):
                close(got, want, 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_sigmoid_loss_and_its_gradients(sides, reduction, rng):
    factors, masks, activations = sides
    for case in all_targets(rng, factors=factors, masks=masks, activations=activations):
        case.options.pop("key_bias")
        case = case.but(logit_bias=-0.4)
        naive = pairs.Naive(case)
        wanted = naive.sigmoid(reduction)
        close(case.loss("sigmoid_loss", reduction=reduction), wanted)
        upstream = rng.standard_normal(wanted.shape)
        leaves = [naive.query_side, naive.key_side, naive.scale, naive.bias]
        grads = torch.autograd.grad(wanted, leaves, torch.tensor(upstream))
        coefs = coefficients_sigmoid(np, np.asarray(upstream), len(naive.scores), reduction)
        losses, d_query, d_key, d_scale, d_bias = evaluate("sigmoid_grad", *case.read(), coefs, (True,) * 4)
        close(combine_sigmoid(losses, reduction), wanted)
        for got, want in zip((1.7 * d_query, 1.7 * d_key, d_scale, d_bias), grads, strict=True):
            close(got, want, 1e-11)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_needed(needs, rng):
    case = pairs.sides(rng).read()
    stats = evaluate("softmax_stats", *case, False, True, False)
    coefs = coefficients(np, *stats, Options(False, True, 0.0, "mean", False), [np.float64(1)])
    every = evaluate("softmax_grad", *case, False, *coefs, (True,) * 4)
    some = evaluate("softmax_grad", *case, False, *coefs, needs)
    of_sigmoid = np.ones(len(case.queries[0]))
    all_of_sigmoid = evaluate("sigmoid_grad", *case, of_sigmoid, (True,) * 4)[1:]
    some_of_sigmoid = evaluate("sigmoid_grad", *case, of_sigmoid, needs)[1:]
    for i, need in enumerate(needs):
        for whole, part in ((every, some), (all_of_sigmoid, some_of_sigmoid)):
            if need:
                assert np.array_equal(part[i], whole[i])
            else:
                assert part[i] is None or part[i] == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["contrastive_loss", "sigmoid_loss"])
def test_dtypes(name, dtype, rng):
    case = pairs.sides(rng, rows=33, columns=40, terms=70, factors=3, dtype=dtype, kind="uniform")
    naive = pairs.Naive(case)
    eps = np.finfo("float64" if dtype == "float64" else "float32").eps
    for reduction in ("mean", "none"):
        wanted = naive.contrastive(reduction=reduction) if name == "contrastive_loss" else [naive.sigmoid(reduction)]
        rounding = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
        for got, want in zip(pairs.flat(case.loss(name, reduction=reduction)), wanted, strict=True):
            assert got.dtype.name == dtype
            want = want.detach().numpy()
            check_within(got, want, 40 * 80 * eps + rounding * abs(want))


def test_mixed_dtypes_promote_and_accumulate_wide(rng):
    case = pairs.sides(rng, dtype="float16", kind="uniform")
    assert case.loss().dtype == np.float16
    assert case.but(fusion_weights=case.options["fusion_weights"].astype(np.float32)).loss().dtype == np.float32
    wide = case.but(key_bias=np.zeros(6))  # a float64 bias makes the scores float64, not the result
    assert wide.loss().dtype == np.float16
    close(
        evaluate("softmax_stats", *wide.read(), False, False, False)[0][0],
        pairs.Naive(wide).contrastive(return_lse=True)[1],
    )


def test_results_are_scalars_arrays_and_tuples_of_them(rng):
    case = pairs.sides(rng)
    loss = case.loss()
    assert isinstance(loss, np.float64)
    assert isinstance(case.loss("sigmoid_loss"), np.float64)
    both = case.loss(reduction="none")
    assert isinstance(both, tuple)
    assert [x.shape for x in both] == [(4,), (6,)]
    assert case.loss(reduction="none", symmetric=False).shape == (4,)
    found, lse = case.loss(return_lse=True, symmetric=False)
    assert (found.shape, lse.shape) == ((), (4,))
    (queries, keys), lse, key_lse = case.loss(return_lse=True, reduction="none")
    assert [x.shape for x in (queries, keys, lse, key_lse)] == [(4,), (6,), (4,), (6,)]


def test_published_formulas(rng):
    """CLIP and SigLIP as their papers' listings have them."""
    case = pairs.sides(rng, rows=5, columns=5, weights=False).but(logit_scale=3.0)
    logits = torch.tensor(3.0 * case.queries[0] @ case.keys[0].T)
    labels = torch.arange(5)
    cross = torch.nn.functional.cross_entropy
    close(case.loss(), (cross(logits, labels) + cross(logits.T, labels)) / 2)
    close(case.loss(symmetric=False, label_smoothing=0.1), cross(logits, labels, label_smoothing=0.1))
    case = case.but(logit_bias=-1.0)
    signs = 2 * torch.eye(5, dtype=torch.float64) - 1
    close(case.loss("sigmoid_loss"), -torch.nn.functional.logsigmoid(signs * (logits - 1)).sum() / 5)


def test_supervised_positives_are_averaged_outside_the_logarithm(rng):
    case = pairs.sides(rng, weights=False).but(labels=np.array([1, 1, 2, 9]), key_labels=np.array([1, 2, 1, 1, 3, 2]))
    log_p = torch.log_softmax(torch.tensor(case.queries[0] @ case.keys[0].T), 1)
    outer = [-log_p[0, [0, 2, 3]].mean(), -log_p[1, [0, 2, 3]].mean(), -log_p[2, [1, 5]].mean()]
    close(case.loss(symmetric=False), torch.stack(outer).mean())  # the query of label 9 is not counted
    summed = [-log_p[0, [0, 2, 3]].logsumexp(0), -log_p[1, [0, 2, 3]].logsumexp(0), -log_p[2, [1, 5]].logsumexp(0)]
    close(case.loss(symmetric=False, positives="any"), torch.stack(summed).mean())


# ---- edges -----------------------------------------------------------------------------------------------------------

EVERY = [
    {"positives": p, "symmetric": s, "label_smoothing": e, "reduction": r}
    for p, s, e, r in itertools.product(["mean", "any"], [False, True], [0.0, 0.2], ["mean", "sum", "none"])
]


def gradients(case, options):
    given = case.read()
    checked = Options(
        options["positives"] == "any", options["symmetric"], options["label_smoothing"], options["reduction"], 0
    )
    stats = evaluate("softmax_stats", *given, checked.any, checked.symmetric, checked.totals)
    upstream = [np.ones(np.shape(x)) for x in combine(np, *stats, checked)]
    return evaluate("softmax_grad", *given, checked.any, *coefficients(np, *stats, checked, upstream), (True,) * 4)


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_nothing_is_positive(options, rng):
    """No label in common, or every pair excluded: losses and gradients are 0, and no NaN comes up."""
    case = pairs.sides(rng)
    for nothing in (
        case.but(labels=np.arange(4), key_labels=np.arange(10, 16)),
        case.but(exclude=np.ones((4, 6), bool)),
    ):
        for x in pairs.flat(nothing.loss(**options)) + [np.asarray(x) for x in gradients(nothing, options)]:
            assert (x == 0).all()


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_excluded_rows_and_columns_are_not_counted(options, rng):
    case = pairs.sides(rng, rows=5, columns=6)
    mask = np.zeros((5, 6), bool)
    mask[2], mask[:, 4] = True, True
    keep, key_keep = [0, 1, 3, 4], [0, 1, 2, 3, 5]
    less = pairs.Pairs([case.queries[0][keep]], [case.keys[0][key_keep]], case.options)
    less = less.but(labels=np.array([0, 1, 3, 4]), key_labels=np.array([0, 1, 2, 3, 5]))
    if options["reduction"] != "none":
        for got, want in zip(
            pairs.flat(case.but(exclude=mask).loss(**options)), pairs.flat(less.loss(**options)), strict=True
        ):
            check_within(got, want, 1e-12)
    got = gradients(case.but(exclude=mask), options)
    want = gradients(less, options)
    check_within(got[0][keep], want[0], 1e-12)
    check_within(got[1][key_keep], want[1], 1e-12)
    assert (got[0][2] == 0).all()
    assert (got[1][4] == 0).all()
    assert got[3][4] == 0


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 4, 3), (4, 4, 0), (0, 0, 0), (1, 1, 1), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("options", EVERY, ids=str)
def test_sizes_of_zero(options, shape, rng):
    """B = 0: loss 0; n = 0: all scores are equal; C = 0 only with labels, for no query then has a positive."""
    rows, columns, terms = shape
    case = pairs.sides(rng, rows=rows, columns=columns, terms=terms)
    if columns < rows:
        case = case.but(labels=np.arange(rows), key_labels=np.arange(columns))
    naive = pairs.Naive(case)
    for got, want in zip(
        pairs.flat(case.loss(**options, return_lse=True)), naive.contrastive(**options, return_lse=True), strict=True
    ):
        close(got, want)
    close(case.loss("sigmoid_loss", reduction=options["reduction"]), naive.sigmoid(options["reduction"]))
    assert [np.shape(x) for x in gradients(case, options)] == [(rows, terms), (columns, terms), (), (columns,)]


@pytest.mark.parametrize("scale", [0.0, -2.5, 1e-30, 1000.0, -1000.0, np.float32(7), np.array(7.0)], ids=repr)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_logit_scale(scale, dtype, rng):
    case = pairs.sides(rng, kind="integers", dtype=dtype).but(logit_scale=scale)  # their scores are exact in float32
    naive = pairs.Naive(case)
    tol = 1e-12 if dtype == "float64" else 3e-7
    for got, want in zip(pairs.flat(case.loss(return_lse=True)), naive.contrastive(return_lse=True), strict=True):
        close(got, want, tol)
    close(case.loss("sigmoid_loss"), naive.sigmoid(), tol)
    options = {"positives": "mean", "symmetric": True, "label_smoothing": 0.0, "reduction": "sum"}
    grads = torch.autograd.grad(naive.contrastive(reduction="sum")[0], [naive.query_side, naive.key_side])
    # A probability, exp(S - lse), has the error of its exponent, eps |S|; here |S| is up to 2e4.
    tol = 2 * np.finfo(dtype).eps * (8 + abs(naive.scores).max().item()) * abs(naive.key_side).max().item()
    for got, want in zip(gradients(case, options), grads, strict=False):
        check_within(float(scale) * got, want.numpy(), tol * (1 + abs(float(scale))))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_scores_of_minus_infinity_are_impossible_keys(dtype, rng):
    """A bias of -inf: the key's probability is 0, so the loss of its own query is infinite, and no other changes."""
    case = pairs.sides(rng, kind="integers", dtype=dtype)
    bias = np.zeros(6, dtype)
    bias[[1, 5]] = -np.inf
    case = case.but(key_bias=bias)
    tol = 1e-12 if dtype == "float64" else 3e-7
    for positives in ("mean", "any"):
        found = case.loss(reduction="none", positives=positives, symmetric=False, return_lse=True)
        wanted = pairs.Naive(case).contrastive(reduction="none", positives=positives, symmetric=False, return_lse=True)
        for got, want in zip(found, wanted, strict=True):
            close(got, want, tol)
        assert found[0][1] == np.inf
    _, key_lse = case.loss(return_lse=True)[1:]
    assert (key_lse[[1, 5]] == -np.inf).all()
    assert np.isfinite(np.delete(key_lse, [1, 5])).all()
    grads = gradients(case, {"positives": "mean", "symmetric": False, "label_smoothing": 0.0, "reduction": "sum"})
    assert np.isfinite(grads[0]).all()
    naive = pairs.Naive(case)
    loss = naive.contrastive(reduction="none", symmetric=False)[0]
    for got, want in zip(grads, torch.autograd.grad(loss[[0, 2, 3]].sum(), [naive.query_side]), strict=False):
        close(got[[0, 2, 3]], want[[0, 2, 3]], 10 * tol)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -1e38], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_bad_query_spoils_no_other(dtype, value, rng):
    """1e38 overflows in float32, where the other side is as large; the losses of the other queries are unaffected."""
    case = pairs.sides(rng, kind="positive", dtype=dtype, weights=False)
    case.keys[0][3] *= 1e3
    untouched = case.loss(reduction="none", symmetric=False, return_lse=True)
    case.queries[0][2, 1] = value
    with np.errstate(over="ignore"):
        naive = pairs.Naive(case)
    loss, lse = case.loss(reduction="none", symmetric=False, return_lse=True)
    others = [0, 1, 3]
    assert np.array_equal(loss[others], untouched[0][others])
    assert np.array_equal(lse[others], untouched[1][others])
    per_query = case.loss("sigmoid_loss", reduction="none")
    check_within(
        per_query[others], naive.sigmoid("none").detach().numpy()[others], 1e-2 if dtype == "float32" else 1e-9
    )
    if abs(value) == 1e38 and dtype == "float64":
        close(loss, naive.contrastive(reduction="none", symmetric=False)[0])
        assert np.isfinite(loss).all()
    elif abs(value) != 1e38:
        assert not np.isfinite(loss[2])
        assert not np.isfinite(per_query[2])
    assert not np.isnan(value) or np.isnan([loss[2], lse[2], per_query[2]]).all()


def test_large_sides_of_moderate_scores(rng):
    case = pairs.sides(rng, kind="positive", dtype="float32", weights=False)
    case.queries[0] *= np.float32(1e36)
    case.keys[0] *= np.float32(1e-36)
    for got, want in zip(
        pairs.flat(case.loss(return_lse=True)), pairs.Naive(case).contrastive(return_lse=True), strict=True
    ):
        close(got, want, 1e-5)


def test_no_warning_of_numpy_escapes(rng):
    """Infinities and NaN are results, not warnings; pytest makes errors of warnings."""
    case = pairs.sides(rng, dtype="float16")
    case.queries[0][0], case.keys[0][1] = np.inf, 6e4
    case.options["fusion_weights"][:] = 1e4
    for options in EVERY:
        case.loss(**options)
    case.loss("sigmoid_loss", logit_bias=1e30)


def test_broadcast_factors_and_views(rng):
    case = pairs.sides(rng, factors=3)
    relation = case.queries[1][:1]
    whole = pairs.Pairs([case.queries[0], np.repeat(relation, 4, 0)], case.keys, case.options)
    for row in (relation, relation[0]):
        close(pairs.Pairs([case.queries[0], row], case.keys, case.options).loss(), torch.tensor(whole.loss()), 1e-14)
    reversed_keys = pairs.Pairs(case.queries, [np.ascontiguousarray(case.keys[0][:, ::-1])[:, ::-1]], case.options)
    close(reversed_keys.loss(), torch.tensor(case.loss()), 1e-14)
    masked = case.but(present=[np.array([False]), None], absent="one")
    close(masked.loss(), torch.tensor(case.but(present=[np.zeros(4, bool), None], absent="one").loss()), 0)


def test_absent_data_is_never_used(rng):
    case = pairs.sides(rng, factors=3, masks="one", weights=False)
    clean = case.loss()
    for factors, masks in ((case.queries, case.options["present"]), (case.keys, case.options["key_present"])):
        for x, mask in zip(factors, masks, strict=True):
            x[~mask] = np.nan
    assert np.isfinite(clean)
    assert case.loss() == clean


def test_memory_maps_are_arrays(rng, tmp_path):
    case = pairs.sides(rng)
    keys = np.memmap(tmp_path / "keys", np.float64, "w+", shape=case.keys[0].shape)
    keys[:] = case.keys[0]
    assert pairs.Pairs(case.queries, [keys], case.options).loss() == case.loss()


# ---- scores that are not finite -------------------------------------------------------------------------------------


def infinite(rng, value, dtype="float64"):
    """Make a case of exact scores, some of which are `value`: all of key 1's, which is a positive, and all of key 5's."""
    case = pairs.sides(rng, kind="integers", dtype=dtype).but(logit_scale=-2.0)
    bias = np.zeros(6, dtype)
    bias[[1, 5]] = value
    return case.but(key_bias=bias)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("positives", ["mean", "any"])
@pytest.mark.parametrize("totals", [False, True])
def test_every_row_of_statistics_keeps_its_contract(totals, positives, dtype, value, rng):
    """That of reference.softmax_stats, from each score by itself."""
    given = pairs.with_exclusions(pairs.with_labels(infinite(rng, value, dtype), rng), rng, "mask")
    naive = pairs.Naive(given)
    sides = naive.scores.detach(), naive.valid, naive.positive
    found = evaluate("softmax_stats", *given.read(), positives == "any", True, totals)
    for stats, turned in zip(found, (sides, [x.T for x in sides]), strict=True):
        wanted = []
        for s, valid, positive in zip(*turned, strict=True):
            counted = valid & (s != -np.inf) & totals
            own = s[positive].logsumexp(0) if positives == "any" else s[positive].sum() / max(1, positive.sum())
            wanted.append([s[valid].logsumexp(0), own, positive.sum(), s[counted].sum(), counted.sum()])
        close(stats, torch.tensor(wanted, dtype=torch.float64).T, 1e-12 if dtype == "float64" else 3e-7)


@pytest.mark.parametrize("value", [np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("evaluated_by", ["native"], indirect=True)
def test_kernels_and_reference_agree_on_infinite_scores(options, value, rng):
    case = infinite(rng, value)
    for given in (case, pairs.with_labels(case, rng), pairs.with_exclusions(case, rng, "ids")):
        with np.errstate(all="ignore"):
            ours = [*pairs.flat(given.loss(**options, return_lse=True)), *gradients(given, options)]
            with pytest.MonkeyPatch.context() as patch:
                for name, function in REFERENCE.items():
                    patch.setattr(reference, name, function)
                pairs.use_backend("reference", patch)
                theirs = [*pairs.flat(given.loss(**options, return_lse=True)), *gradients(given, options)]
        for got, want in zip(ours, theirs, strict=True):
            close(got, torch.from_numpy(np.asarray(want)), 1e-11)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e38, -1e38], ids=str)
@pytest.mark.parametrize("scale", [0.0, -2.5, 1.0, 1000.0])
@pytest.mark.parametrize("nothing", [None, "excluded", "no positive"])
def test_losses_of_bad_sides(nothing, scale, value, rng):
    """Each row's log-sum-exp less its positive's score, in float64 with their infinities and NaN; the mean is theirs."""
    case = pairs.sides(rng, kind="integers", weights=False).but(logit_scale=scale)
    case.queries[0][2] = np.abs(case.queries[0][2]) + 1
    case.keys[0][[0, 4]], case.queries[0][2, 1] = np.abs(case.keys[0][[0, 4]]) + 1, value
    if nothing == "excluded":
        mask = np.zeros((4, 6), bool)
        mask[[0, 2]] = True
        case = case.but(exclude=mask)
    elif nothing == "no positive":
        case = case.but(labels=np.array([0, 1, 7, 3]), key_labels=np.arange(8, 2, -1))
    naive = pairs.Naive(case)
    s = naive.scores.detach()
    losses = s.masked_fill(~naive.valid, -np.inf).logsumexp(1) - torch.where(naive.positive, s, 0).sum(1)
    losses = torch.where(naive.positive.any(1), losses, 0)
    close(case.loss(symmetric=False, reduction="none"), losses)
    close(case.loss(symmetric=False), losses.sum() / naive.positive.any(1).sum().clip(1))
    for reduction in ("none", "mean"):
        close(case.loss("sigmoid_loss", reduction=reduction), naive.sigmoid(reduction))


# ---- the combination -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_coefficients_are_the_same_in_torch(options, rng):
    case = pairs.with_labels(pairs.sides(rng, rows=5, columns=9), rng)
    checked = Options(
        options["positives"] == "any", options["symmetric"], options["label_smoothing"], options["reduction"], 1
    )
    stats = evaluate("softmax_stats", *case.read(), checked.any, checked.symmetric, True)
    tensors = [None if x is None else torch.tensor(x) for x in stats]
    outputs = combine(np, *stats, checked)
    upstream = [np.asarray(rng.standard_normal(np.shape(x))) for x in outputs]
    upstream[-1] = None
    found = coefficients(torch, *tensors, checked, [None if u is None else torch.tensor(u) for u in upstream])
    for got, want in zip(found, coefficients(np, *stats, checked, upstream), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            close(got, torch.tensor(want))
    assert len(pairs.flat(arrange(outputs, checked))) == len(outputs)


def test_coefficients_of_nothing_are_finite():
    stats = np.array([[-np.inf, 1.0], [0.0, 0.5], [0, 1], [0, 2.0], [0, 3]])
    for positives, smoothing in itertools.product([False, True], [0.0, 0.2]):
        options = Options(positives, False, smoothing, "mean", True)
        coefs, none = coefficients(np, stats, None, options, [np.float64(1), np.ones(2)])
        assert none is None
        assert np.isfinite(coefs).all()
        assert (coefs[:, 0] == 0).all()
    assert widened(coefficients_sigmoid(np, np.float64(6), 3, "mean")).tolist() == [2, 2, 2]
    assert reference.MAX_FACTORS == 8


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_shortcut_of_the_diagonal_is_the_general_way(reduction, symmetric, rng):
    for columns in (5, 9):
        case = pairs.sides(rng, rows=5, columns=columns)
        assert case.read().diagonal
        options = Options(False, symmetric, 0.0, reduction, False)
        stats = evaluate("softmax_stats", *case.read(), False, symmetric, False)
        close(combine(np, *stats, options, True)[0], torch.tensor(combine(np, *stats, options)[0]), 1e-15)
        found = [coefficients(np, *stats, options, [np.float64(0.7)], diagonal) for diagonal in (True, False)]
        for got, want in zip(*found, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                rows = slice(5)  # of keys without a query the shortcut's rows 1 and 3 are 0 too
                assert np.array_equal(got[[1, 3]], want[[1, 3]])
                assert np.array_equal(got[:, rows], want[:, rows])
