"""A checked call: one order of its fields everywhere, and what a valid call is normalised to.

What lives elsewhere: every invalid argument and its message (``test_api.py``).
"""

from __future__ import annotations

import ast
import inspect

import numpy as np
import pytest

import fusionsum as fs
from conftest import FORMS, PACKAGE, missing
from fusionsum import call, reference
from fusionsum.call import Call

FIELDS = list(Call._fields)
GRADIENT = ["grad_output", *FIELDS, "needs"]


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_fields_have_one_order_in_python():
    assert parameters(fs.fusion_sum) == FIELDS
    assert parameters(fs.fusion_sum_grad) == GRADIENT[:-1]
    assert parameters(call.check) == [*FIELDS, "grad_output"]
    assert parameters(call.spread) == FIELDS
    assert parameters(reference.fusion_sum) == FIELDS
    assert parameters(reference.fusion_sum_grad) == GRADIENT


def test_the_fields_have_one_order_in_the_native_module():
    stub = PACKAGE / "_core.pyi"
    if not stub.exists():
        missing("the stub of the native module")
    functions = {node.name: node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)}
    for name, wanted in (("fusion_sum", FIELDS), ("fusion_sum_grad", GRADIENT)):
        assert [a.arg for a in functions[name].args.args] == [*wanted, "trusted"]


def test_the_fields_have_one_order_in_the_registered_operations():
    torch = pytest.importorskip("torch")
    for name, wanted in (("fusion_sum", FIELDS), ("fusion_sum_grad", GRADIENT)):
        schema = getattr(torch.ops.fusionsum, name).default._schema
        assert [a.name for a in schema.arguments] == wanted


@pytest.mark.parametrize("form", FORMS)
def test_a_valid_call_is_normalised(form, rng):
    case = FORMS[form].case(rng, activations="tanh").masked(rng, "rows", "zero")
    case.dim %= len(case.shape)
    checked = call.check(case.weights, case.factors, "tanh", case.present, "zero", np.int64(case.dim))
    assert checked.activations == ("tanh",) * len(case.factors)
    assert type(checked.factors) is type(checked.present) is tuple
    assert (type(checked.dim), checked.dim) == (int, case.dim - len(case.shape))
    assert (checked.shape, checked.output_shape) == (case.shape, case.output_shape)
    assert all(a is b for a, b in zip(checked.arrays, case.operands, strict=True))
    again = call.check(*checked)
    assert all(a is b or a == b for a, b in zip(again[2:], checked[2:], strict=True))


def test_operands_and_masks_are_replaced_together(rng):
    case = FORMS["paired"].case(rng).masked(rng, "rows", "one")
    given = call.check(case.weights, case.factors, None, case.present, "one", -1)
    assert given.with_operands(given.operands, given.masks) == given
    assert len(given.operands) == len(given.masks) == 3
    other = given.with_operands((None, *given.factors[::-1]), (None, *given.present[::-1]))
    assert other.fusion_weights is None
    assert other.factors == given.factors[::-1]
    assert other.present == given.present[::-1]
    assert other[2:3] + other[4:] == given[2:3] + given[4:]
