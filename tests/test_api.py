"""Every bad argument, and the meaning of masks, dims of size 0 and dtypes, on the kernels and on the reference alike.

What lives elsewhere: accuracy (``test_kernel.py``), the formula (``test_reference.py``), tensors
(``test_autograd_routing.py``).
"""

from __future__ import annotations

import inspect
import re

import ml_dtypes
import numpy as np
import pytest

import fusionsum as fs
from conftest import (
    ACTIVATIONS,
    DTYPES,
    FORMS,
    MIXED,
    Case,
    check_backward,
    check_both,
    check_forward,
    random,
    run_python,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("both_backends")

ONES = np.ones((3, 5))
OTHER_DTYPES = sorted(
    {np.dtype(code).name for code in np.typecodes["All"] if np.dtype(code).name not in DTYPES}
    | {np.dtype(t).name for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.int4)}
    | {np.dtype(name).newbyteorder().str for name in DTYPES if name != "bfloat16"}
)


def given(**changes):
    """Return the arguments of a right call on shapes (3, 5), with some of them replaced."""
    right = {"grad_output": np.ones(3), "fusion_weights": np.ones(5), "factors": [ONES, ONES]}
    return right | {"activations": None, "present": None, "absent": "one", "dim": -1} | changes


def array_faults(name, place):
    """List what is wrong with any operand: its kind or its dtype. `place` puts a value where `name` says."""
    for value in (
        [1.0, 2.0],
        [[1.0], [1.0, 2.0]],
        (1.0,),
        1.0,
        1,
        "ones",
        b"ones",
        object(),
        *([] if name == "grad_output" else [np.float64(1)]),  # what a 1-D sum returns is a right gradient of one
        np.float32,
        {},
    ):
        yield f"{name} is {value!r:.20}", place(value), TypeError, name
    for dtype in OTHER_DTYPES:
        yield f"{name} is {dtype}", place(np.zeros((3, 5) if name != "grad_output" else 3, dtype)), TypeError, name
    yield f"{name} has fields", place(np.zeros(5, "f4,f4")), TypeError, name


def faults():
    """Yield (id, changes to a right call, the error, the argument its message begins with)."""
    for m in range(2):
        yield from array_faults(f"factors[{m}]", lambda x, m=m: {"factors": [x if k == m else ONES for k in range(2)]})
        yield (
            f"factors[{m}] is None",
            {"factors": [None if k == m else ONES for k in range(2)]},
            TypeError,
            f"factors[{m}]",
        )
    yield from array_faults("fusion_weights", lambda x: {"fusion_weights": x})
    yield "no factors", {"factors": []}, ValueError, "factors"
    yield "nine factors", {"factors": [ONES] * 9}, ValueError, "factors"
    yield "a hundred factors", {"factors": [ONES] * 100}, ValueError, "factors"
    yield "only arrays of no dims", {"factors": [np.ones(())], "fusion_weights": np.ones(())}, ValueError, "factors"
    for shape in ((3, 4), (2, 5), (5, 3), (0, 5), (3, 0), (4,), (2, 2, 5)):
        yield f"factors[1] of {shape}", {"factors": [ONES, np.ones(shape)]}, ValueError, "factors[1]"
        yield f"weights of {shape}", {"fusion_weights": np.ones(shape)}, ValueError, "fusion_weights"

    for dim in (2, -3, 100, 2**31, -(2**31) - 1, 2**63, 2**80, -(2**80)):
        yield f"dim {dim}", {"dim": dim}, ValueError, "dim"
    for dim in (None, 1.0, "1", True, np.True_, (1,), [1], np.ones(1, int), 1j, np.float32(1)):
        yield f"dim {dim!r}", {"dim": dim}, TypeError, "dim"

    for name in ("softplus", "Tanh", "tanh ", "", "identity", "None", "tanh\0", "\ud800", "ß" * 1000):
        yield f"activation {name[:20]!a}", {"activations": name}, ValueError, "activations"
        yield f"activation 1 {name[:20]!a}", {"activations": [None, name]}, ValueError, "activations[1]"
    for names in ([], ["tanh"], [None], ["tanh"] * 3, ("tanh",) * 9, ()):
        yield f"{len(names)} activations in {names!r:.6}", {"activations": names}, ValueError, "activations"
    for names in (1, b"tanh", np.tanh, {"tanh", "relu"}, {"tanh": 0}, np.array(["tanh"] * 2), True, iter(["tanh"] * 2)):
        yield f"activations {names!r:.15}", {"activations": names}, TypeError, "activations"
    for name in (1, b"tanh", np.tanh, ["tanh"], True, 0.0):
        yield f"activation 0 {name!r:.15}", {"activations": [name, None]}, TypeError, "activations[0]"

    for absent in ("two", "One", "", "zero ", "one\0", "\ud800"):
        yield f"absent {absent!a}", {"absent": absent}, ValueError, "absent"
    for absent in (None, 1, 0, b"one", ["one", "one"], np.ones(1)):
        yield f"absent {absent!r}", {"absent": absent}, TypeError, "absent"

    yes = np.ones(3, bool)
    for present in (yes, True, "one", {0: yes}, 1, iter([yes, yes])):
        yield f"present {present!r:.20}", {"present": present}, TypeError, "present"
    for present in ([], [yes], [yes] * 3, (None,), ()):
        yield f"{len(present)} masks in {present!r:.6}", {"present": present}, ValueError, "present"
    for mask in ([True, True, True], True, np.True_, "yes", 1):
        yield f"mask {mask!r}", {"present": [None, mask]}, TypeError, "present[1]"
    for dtype in (*DTYPES, *(set(OTHER_DTYPES) - {"bool"})):
        yield f"mask of {dtype}", {"present": [np.ones(3, dtype), None]}, TypeError, "present[0]"
    for shape in ((2,), (4,), (0,), (5,), (3, 5), (3, 2), (3, 0), (1, 5), (2, 1), (3, 1, 1), (1, 1, 1)):
        yield f"mask of {shape}", {"present": [None, np.ones(shape, bool)]}, ValueError, "present[1]"
    yield (
        "mask of the terms, dim=0",
        {"present": [yes, None], "dim": 0, "grad_output": np.ones(5)},
        ValueError,
        "present[0]",
    )


MOST_DIMS = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32


@pytest.mark.parametrize("ndim", [n for n in (13, 32, 33, 64) if n <= MOST_DIMS])
def test_many_dims_of_one(ndim):
    assert (fs.fusion_sum(None, ONES, np.ones((1,) * ndim)) == np.full((1,) * (ndim - 2) + (3,), 5.0)).all()


def test_a_sum_without_dims_is_a_right_gradient():
    output = fs.fusion_sum(None, ONES[0])
    assert isinstance(output, np.float64)
    assert (fs.fusion_sum_grad(output, None, ONES[0])[1] == np.full(5, 5.0)).all()


def grad_faults():
    yield from array_faults("grad_output", lambda x: {"grad_output": x})
    yield "grad_output is None", {"grad_output": None}, TypeError, "grad_output"
    for shape in ((), (1,), (2,), (4,), (0,), (5,), (3, 1), (1, 3), (3, 5)):
        yield f"grad_output of {shape}", {"grad_output": np.ones(shape)}, ValueError, "grad_output"


def call(function, arguments):
    arrays = [arguments.pop("fusion_weights"), *arguments.pop("factors")]
    grad_output = arguments.pop("grad_output")
    return function(*([grad_output] if function is fs.fusion_sum_grad else []), *arrays, **arguments)


def all_arrays(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from all_arrays(entry)


FAULTS = list(faults())
CALLS = [(fs.fusion_sum, *f) for f in FAULTS] + [(fs.fusion_sum_grad, *f) for f in [*FAULTS, *grad_faults()]]


def test_a_right_call_is_right():
    assert call(fs.fusion_sum, given()).tolist() == [5.0] * 3
    assert len(call(fs.fusion_sum_grad, given())) == 3


@pytest.mark.parametrize(
    ("function", "changes", "error", "argument"),
    [pytest.param(f, *rest, id=f"{f.__name__}: {name}") for f, name, *rest in CALLS],
)
def test_bad_argument(function, changes, error, argument):
    arrays = [a for value in given(**changes).values() for a in all_arrays(value)]
    before = [a.tobytes() for a in arrays]
    with pytest.raises(error) as caught:
        call(function, given(**changes))
    assert caught.type is error
    message = str(caught.value)
    assert re.match(re.escape(argument) + r"(\[\d+\])?: ", message), message
    assert re.search("expected|does not broadcast", message), message
    assert len(message) < 2000
    assert before == [a.tobytes() for a in arrays]


@pytest.mark.parametrize("function", [fs.fusion_sum, fs.fusion_sum_grad])
def test_wrong_keywords_are_python_s_own_error(function):
    for wrong in ({"activation": "tanh"}, {"axis": 0}, {"out": np.ones(3)}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            function(np.ones(3), np.ones(5), ONES, **wrong)
    with pytest.raises(TypeError, match="missing"):
        function()


def test_both_functions_take_the_same_options():
    forward, backward = (inspect.signature(f).parameters for f in (fs.fusion_sum, fs.fusion_sum_grad))
    assert list(backward) == ["grad_output", *forward]
    assert all(forward[name].default == backward[name].default for name in forward)


@pytest.mark.parametrize("where", ["fusion_weights", "factors[0]", "factors[1]", "present[0]", "grad_output"])
def test_frameworks_do_not_mix(where):
    torch = pytest.importorskip("torch")
    arguments = given(present=[np.ones(3, bool), None])
    if "[" in where:
        name, index = where[:-1].split("[")
        arguments[name] = list(arguments[name])
        arguments[name][int(index)] = torch.from_numpy(arguments[name][int(index)])
    else:
        arguments[where] = torch.from_numpy(arguments[where])
    with pytest.raises(TypeError, match=r"expected a|convert") as caught:
        call(fs.fusion_sum_grad, arguments)
    assert "numpy.ndarray" in str(caught.value)
    assert "torch.Tensor" in str(caught.value)


def test_integers_of_numpy_and_subclasses_of_str_are_taken():
    want = call(fs.fusion_sum, given(dim=0, activations="tanh", fusion_weights=None))
    got = call(fs.fusion_sum, given(dim=np.int8(-2), activations=np.str_("tanh"), fusion_weights=None))
    assert same_bits(got, want)
    assert same_bits(
        call(fs.fusion_sum, given(activations=("tanh", None))), call(fs.fusion_sum, given(activations=["tanh", None]))
    )


# Masks


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + list(MIXED), ids="-".join)
@pytest.mark.parametrize("absent", ["one", "zero"])
@pytest.mark.parametrize("masks", ["rows", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_absent_data_is_never_used(form, masks, absent, dtypes, rng):
    case = FORMS[form].case(rng, dtypes[1], dtypes[0]).masked(rng, masks, absent)
    poisoned = Case(case.weights, [z.copy() for z in case.factors], **case.options())
    unread = []  # of each factor, what is absent wherever it is broadcast to
    for z, mask in zip(poisoned.factors, case.present, strict=True):
        if mask is None:
            unread.append(np.zeros(z.shape, bool))
            continue
        full = np.broadcast_to(
            mask.reshape(mask.shape + (1,) * (z.ndim - mask.ndim)),
            np.broadcast_shapes(mask.shape + (1,) * (z.ndim - mask.ndim), z.shape),
        )
        repeated = tuple(i for i in range(z.ndim) if z.shape[i] == 1)
        unread.append(~full.any(axis=repeated, keepdims=True))
        z[unread[-1]] = rng.choice([np.nan, np.inf, -np.inf], z.shape).astype(z.dtype)[unread[-1]]

    check_forward(case)
    assert same_bits(np.asarray(poisoned.forward()), np.asarray(case.forward()))
    grad_output = random(rng, case.output_shape, dtypes[1])
    check_backward(case, grad_output)
    for got, want in zip(poisoned.backward(grad_output), case.backward(grad_output), strict=True):
        assert same_bits(np.asarray(got), np.asarray(want))
    spoilt = case.backward(np.full(case.output_shape, np.nan, dtypes[1]))
    for grad, nowhere in zip(spoilt[len(spoilt) - len(unread) :], unread, strict=True):
        assert (grad[nowhere] == 0).all()


@pytest.mark.parametrize("absent", ["one", "zero"])
def test_what_an_absent_factor_counts_as(absent, rng):
    f, g = random(rng, (3, 5), "float64"), random(rng, (3, 5), "float64")
    nobody = [np.zeros(3, bool), None]
    got = fs.fusion_sum(None, f, g, present=nobody, absent=absent)
    assert np.allclose(got, g.sum(-1) if absent == "one" else 0, rtol=1e-15)
    everybody = [np.ones(3, bool), np.ones((3, 1), bool)]
    assert np.allclose(fs.fusion_sum(None, f, g, present=everybody, absent=absent), (f * g).sum(-1), rtol=1e-15)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_absent_counts_as_one_after_the_activation(activation):
    """Not phi(1): an absent modality is one that multiplies by 1."""
    got = fs.fusion_sum(None, ONES, 3 * ONES, activations=[activation, None], present=[np.zeros(3, bool), None])
    assert got.tolist() == [15.0] * 3


# Shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0, 1])
def test_a_dim_of_size(size, form, dtype, rng):
    """Size 0 gives what NumPy gives: sums of nothing are 0, outputs of nothing are empty."""
    letters = sorted(set("".join([FORMS[form].weights or "", *FORMS[form].factors])) - {"1"})
    for letter in letters:
        case = FORMS[form].case(rng, dtype, **{letter: size})
        check_both(case, rng)
        check_both(case.masked(rng, "rows", "zero"), rng)
        if size == 0 and letter == "n":
            assert not np.asarray(case.forward()).any()
            assert not any(np.asarray(g).any() for g in case.backward(random(rng, case.output_shape, dtype)))
    check_both(FORMS[form].case(rng, dtype, **dict.fromkeys(letters, size)), rng)


@pytest.mark.parametrize("ndim", [16, 17, 32])
def test_many_dims(ndim, rng):
    """More dims than a plan holds, none of which may be merged with its neighbour."""
    sizes = [2 if axis % max(1, ndim // 16) == 0 and axis < 17 * max(1, ndim // 16) else 1 for axis in range(ndim)]
    factor = random(rng, tuple(sizes[::-1]), "float64").T
    other = random(rng, tuple(n if axis % 3 else 1 for axis, n in enumerate(sizes)), "float64")
    check_both(Case(None, [factor, other], dim=0), rng)


@pytest.mark.parametrize("form", FORMS)
def test_dim_counts_from_either_end(form, rng):
    case = FORMS[form].case(rng)
    want, case.dim = case.forward(), case.dim % len(case.shape)
    assert same_bits(np.asarray(case.forward()), np.asarray(want))
    case.dim = np.int64(case.dim - len(case.shape))
    assert same_bits(np.asarray(case.forward()), np.asarray(want))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids="-".join)
def test_dtypes_mix(form, dtypes, rng):
    """The promoted dtype and the bounds; a gradient keeps its operand's dtype, whatever that of grad_output is."""
    case = FORMS[form].case(rng, dtypes[1], dtypes[0])
    check_forward(case)
    check_backward(case, random(rng, case.output_shape, dtypes[0]))
    case.factors[0] = case.factors[0].astype(dtypes[0])
    check_both(case, rng)


def test_inputs_are_left_alone_and_results_are_the_caller_s(rng):
    case = FORMS["M=3"].case(rng, "float32").masked(rng, "rows", "one")
    kept = [a.copy() for a in (*case.operands, *case.present)]
    for a in (*case.operands, *case.present):
        a.flags.writeable = False
    results = [case.forward(), *case.backward(np.ones(case.output_shape, "float32"))]
    for a, b in zip((*case.operands, *case.present), kept, strict=True):
        assert same_bits(a, b)
    for result in results:
        assert result.flags.writeable
        assert result.flags.c_contiguous
        assert not any(np.shares_memory(result, a) for a in case.operands)


def test_subclasses_of_ndarray_and_numpy_without_ml_dtypes(both_backends):
    """A memmap is an array; float16 and float32 need no ml_dtypes."""
    view = ONES.view(np.memmap)
    assert np.asarray(fs.fusion_sum(None, view, view)).tolist() == [5.0] * 3
    code = """
import sys; sys.modules["ml_dtypes"] = None
import numpy as np, fusionsum as fs
for dtype in ("float16", "float32", "float64"):
    z = np.ones((3, 5), dtype)
    assert fs.fusion_sum(None, z, z).tolist() == [5] * 3
    assert [g.sum() for g in fs.fusion_sum_grad(np.ones(3, dtype), None, z, z)[1:]] == [15, 15]
"""
    run_python(code, FUSIONSUM_BACKEND={"native": "", "numpy": "numpy"}[both_backends])
