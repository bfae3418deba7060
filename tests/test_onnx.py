"""Sums and layers exported to ONNX, without a table of translations, and run by onnxruntime.

What lives elsewhere: compilers and ``torch.export``, which keep the operation whole (``test_autograd_registration.py``).
"""

from __future__ import annotations

import itertools

import pytest
import torch

from conftest import TABLE as README_FORMS
from conftest import missing
from eager import MASKS, cases, fused, to_torch
from fusionsum import nn as fnn
from published import FEATURES, ONE_EACH, ROWS, TABLE

try:
    import onnx  # noqa: F401
    import onnxruntime
    import onnxscript  # noqa: F401
except ModuleNotFoundError as error:
    missing(f"{error.name}, to export to ONNX and run it")

# torch's own and onnxscript's
pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def check(module: torch.nn.Module, inputs: dict, others: dict | None = None, **options) -> None:
    """Export with inputs, run with others of other sizes, if any, and compare."""
    with torch.no_grad():
        program = torch.onnx.export(module.eval(), kwargs=inputs, dynamo=True, verbose=False, **options)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        inputs = others or inputs
        given = [x for x in torch.utils._pytree.tree_leaves(inputs) if x is not None]
        names = [x.name for x in session.get_inputs()]
        found = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        for (name, wanted), got in zip(module(**inputs).items(), found, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(got), wanted, rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
            )


class Layers(torch.nn.Module):
    """Layers by name, each with inputs and masks (or None) of its own: one export instead of one a layer."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleDict(layers)

    def forward(self, inputs, masks):
        return {
            name: self.layers[name](*x) if masks[name] is None else self.layers[name](*x, present=masks[name])
            for name, x in inputs.items()
        }


@pytest.mark.parametrize("masked", [False, True])
def test_every_layer(masked):
    names = [name for name in ONE_EACH if name in FEATURES or not masked]
    known = {name for name in fnn.__all__ if not name.endswith("Loss")}
    assert masked or {TABLE[name].layer.__name__ for name in names} == known
    inputs = {name: TABLE[name].inputs(torch.float32) for name in names}
    masks = {name: [torch.arange(ROWS) % 3 != m for m in range(len(x))] for name, x in inputs.items()}
    layers = Layers({name: TABLE[name].make() for name in names})
    check(layers, {"inputs": inputs, "masks": masks if masked else dict.fromkeys(names)})


class Sums(torch.nn.Module):
    """Sums by name, each with operands of its own."""

    def __init__(self, sums):
        super().__init__()
        self.sums = sums

    def forward(self, operands):
        return {name: self.sums[name](*x) for name, x in operands.items()}


def test_every_form_and_activation(rng):
    sums, operands = {}, {}
    for form, masks in itertools.product((*README_FORMS, "no weights", "terms first"), MASKS):
        for case in itertools.islice(cases(rng, form, masks), None if form == "paired" else 1):
            name = f"{form}, {masks}, {' '.join(map(str, case.activations))}"
            x, options = to_torch(case)
            operands[name] = [a.float() for a in x]
            sums[name] = fused(options, case.weights is not None)
    check(Sums(sums), {"operands": operands})


def test_any_number_of_rows():
    rows = torch.export.Dim("rows", min=2)

    def inputs(count):
        mask = torch.arange(count) % 2 == 0
        return {"first": torch.randn(count, 4), "second": torch.randn(count, 5), "mask": mask}

    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fnn.LowRankFusion((4, 5), 6, 3, activations="gelu")

        def forward(self, first, second, mask):
            return {"fused": self.layer(first, second, present=[mask, None])}

    check(Fused(), inputs(3), inputs(7), dynamic_shapes={name: {0: rows} for name in inputs(3)})
