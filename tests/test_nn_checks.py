"""`fusionsum.nn.checks`: constructors' arguments, enumerated by the signatures of all layers.

What lives elsewhere: errors of calls and of states (``test_nn.py``).
"""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

from conftest import missing

try:
    import torch
except ModuleNotFoundError:
    missing("torch")

from fusionsum.nn import BLOCK, GMF, MFB, MLB, MUTAN, ConcatMLP, CPBilinear, LowRankFusion
from published import ONE_EACH, TABLE

UNCHECKED = {"bool", "torch.device | str | None", "torch.dtype | None"}  # annotations; and `gamma`, any number


def arguments(*annotations, but=()):
    """List (layer, argument) for all arguments that are annotated so."""
    return [
        (name, argument)
        for name in ONE_EACH
        for argument, parameter in inspect.signature(TABLE[name].layer).parameters.items()
        if parameter.annotation in annotations and argument not in but
    ]


SIZES = arguments("int")
SEQUENCES = arguments("Sequence[int]")
RATES = arguments("float", but=["gamma"])
ACTIVATIONS = arguments("str | None", "str | Sequence[str | None] | None")
CHOICES = arguments("str")


def test_every_argument_is_of_one_kind():
    listed = [*SIZES, *SEQUENCES, *RATES, *ACTIVATIONS, *CHOICES, *arguments(*UNCHECKED)]
    listed += [(name, "gamma") for name in ("DistMult", "ComplEx")]
    everything = [(name, argument) for name in ONE_EACH for argument in inspect.signature(TABLE[name].layer).parameters]
    assert sorted(listed) == sorted(everything)
    assert all(argument.startswith("dropout") for _, argument in RATES)


@pytest.mark.parametrize("name, argument", SIZES)
@pytest.mark.parametrize(
    "given, error, message",
    [
        (0, ValueError, "expected at least 1, got 0"),
        (np.int64(-2), ValueError, "expected at least 1, got -2"),
        (True, TypeError, "expected an integer, got bool"),
        (np.bool_(True), TypeError, "expected an integer, got bool"),
        (2.0, TypeError, "expected an integer, got float"),
        ("2", TypeError, "expected an integer, got str"),
        (None, TypeError, "expected an integer, got NoneType"),
    ],
)
def test_sizes_are_positive_integers(name, argument, given, error, message):
    named = rf"input_dims\[{int(argument[2]) - 1}\]|{argument}" if argument.startswith("in") else argument
    with pytest.raises(error, match=f"^({named}): {message}"):
        TABLE[name].make(**{argument: given})


@pytest.mark.parametrize("name, argument", SEQUENCES)
@pytest.mark.parametrize(
    "given, error, message",
    [
        ([4, 0], ValueError, r"\[1\]: expected at least 1, got 0"),
        ((True, 4), TypeError, r"\[0\]: expected an integer, got bool"),
        ((4, 2.5), TypeError, r"\[1\]: expected an integer, got float"),
        (4, TypeError, ": expected a sequence of integers, got int"),
        ("44", TypeError, ": expected a sequence of integers, got str"),
        (None, TypeError, ": expected a sequence of integers, got NoneType"),
    ],
)
def test_sequences_of_sizes(name, argument, given, error, message):
    with pytest.raises(error, match=f"^{argument}{message}"):
        TABLE[name].make(**{argument: given})


@pytest.mark.parametrize("name, argument", [*SIZES, *SEQUENCES])
@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor])
def test_integers_of_other_libraries_are_kept_as_pythons(name, argument, integer):
    layer = TABLE[name].make(**{argument: integer(6) if (name, argument) in SIZES else [integer(6), integer(6)]})
    kept = getattr(layer, argument)
    assert kept == (6 if (name, argument) in SIZES else (6, 6))
    assert {type(size) for size in (kept if isinstance(kept, tuple) else [kept])} == {int}
    for module in layer.modules():
        assert {type(getattr(module, size, 1)) for size in ("in_features", "out_features", "embedding_dim")} == {int}


@pytest.mark.parametrize("name, argument", RATES)
def test_rates_of_dropout_are_from_0_to_1(name, argument):
    for given, error, message in (
        (1.5, ValueError, "expected a number from 0 to 1, got 1.5"),
        (-0.1, ValueError, "expected a number from 0 to 1, got -0.1"),
        (math.nan, ValueError, "expected a number from 0 to 1, got nan"),
        (True, TypeError, "expected a number from 0 to 1, got bool"),
        ("0.5", TypeError, "expected a number from 0 to 1, got str"),
        (None, TypeError, "expected a number from 0 to 1, got NoneType"),
    ):
        with pytest.raises(error, match=f"^{argument}: {message}"):
            TABLE[name].make(**{argument: given})
    for given in (0, 1, 0.5, np.float32(0.5)):
        kept = getattr(TABLE[name].make(**{argument: given}), argument)
        assert type(kept) is float
        assert kept == given


@pytest.mark.parametrize("name, argument", [*ACTIVATIONS, *CHOICES])
def test_names_are_known(name, argument):
    for given in ("tan", 3, {"tanh"}, *([None] if (name, argument) in CHOICES else [])):
        with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
            TABLE[name].make(**{argument: given})
    if argument == "activations":
        with pytest.raises(ValueError, match=r"^activations\[1\]: expected one of None, 'tanh', .*got 'tan'"):
            TABLE[name].make(activations=["tanh", "tan", None])
        assert TABLE[name].make(activations=["tanh", None, "gelu"]).activations == ["tanh", None, "gelu"]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: LowRankFusion((), 6, 7), ValueError, "input_dims: expected 1 to 8 modalities, got 0"),
        (lambda: MLB((2,) * 9, 6, 7), ValueError, "input_dims: expected 1 to 8 modalities, got 9"),
        (lambda: LowRankFusion((5, 0), 6, 7), ValueError, r"input_dims\[1\]: expected at least 1, got 0"),
        (lambda: MUTAN((5, 3.0), 6, 7), TypeError, r"input_dims\[1\]: expected an integer, got float"),
        (lambda: LowRankFusion((5, 3), -1, 7), ValueError, "output_dim: expected at least 1, got -1"),
        (lambda: LowRankFusion((5, 3), 6, True), TypeError, "rank: expected an integer, got bool"),
        (lambda: LowRankFusion((5, 3), 6, 7, init="one"), ValueError, "init: expected 'published' or 'additive', got"),
        (lambda: CPBilinear(5, 3, 6, 0), ValueError, "rank: expected at least 1, got 0"),
        (lambda: MFB((5, 3), 6, 7, factor=0), ValueError, "factor: expected at least 1, got 0"),
        (lambda: MLB((5, 3), 6, 7, activ_input="selu"), ValueError, "activ_input: expected one of None, .*got 'selu'"),
        (lambda: MLB((5, 3), 6, 7, activ_output="selu"), ValueError, "activ_output: expected one of None, .*'selu'"),
        (lambda: ConcatMLP((5, 3), 6, (4, 0)), ValueError, r"dimensions\[1\]: expected at least 1, got 0"),
        (
            lambda: MUTAN((5, 3), 6, 7, shared=True),
            ValueError,
            r"shared: expected input_dims of one size, got \(5, 3\)",
        ),
        (lambda: BLOCK((5, 3), 6, 7, chunks=9), ValueError, r"chunks: expected at most mm_dim \+ 1, 8, got 9"),
        (lambda: BLOCK((5, 3), 6, 7, 2, pos_norm="mid"), ValueError, "pos_norm: expected 'before_cat' or 'after_cat'"),
        (
            lambda: LowRankFusion((5, 3), 6, 7, activations=["tanh"]),
            ValueError,
            "activations: expected 2 entries, one per modality, got 1",
        ),
        (lambda: LowRankFusion((5, 3), 6, 7, activations={"tanh"}), TypeError, "activations: expected None, a name or"),
        (lambda: GMF(0, 5), ValueError, "num_users: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
