"""Rows L1 to L4: a training step of layers of `fusionsum.nn` against the published code's form in plain torch.

What lives here: sizes, the contenders' code, the floors. What lives elsewhere: timing (``measure.py``), parity with the
published formulas to the last digits (``tests/test_nn.py``). A new row is one entry of `LAYERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fusionsum import nn

from .rows import BOTH, FORWARD, Floor, Row

Parameters = dict[str, Tensor]
REGIONS, BATCH = 36, 16  # of an image, as published for VQA 2.0; of a training step, there 64


@dataclass(frozen=True)
class LayerRow(Row):
    """A layer of the published sizes in training mode, and the contenders' code for the same computation."""

    layer: Callable[[], torch.nn.Module]
    parameters: dict[str, tuple[int, ...]]  # shapes, by the published names
    codes: dict[str, Callable[..., Tensor]]  # (parameters, training, *inputs), by the contender's name
    trained: tuple[bool, ...]  # which inputs come from an encoder that is trained, and so need their gradient

    memory_floor = 0  # a layer keeps its projections for backward
    phases: ClassVar[tuple[str, ...]] = (FORWARD, BOTH)
    unlimited: ClassVar[str] = "matrix products are most of it"

    @property
    def bytes(self) -> dict[str, int]:
        """Compulsory traffic: forward reads parameters and inputs, backward reads and writes as much."""
        forward = 4 * sum(math.prod(shape) for shape in (*self.parameters.values(), *self.shapes))
        return {FORWARD: forward, BOTH: 3 * forward}

    @property
    def flop(self) -> dict[str, int]:
        """Operations of the published code's matrix products, a question's once per region; backward has twice as many."""
        matrices = sum(math.prod(shape) for name, shape in self.parameters.items() if not name.startswith("fusion_"))
        forward = 2 * matrices * math.prod(self.shapes[-1][:-1])
        return {FORWARD: forward, BOTH: 3 * forward}

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Parameters, list[Tensor]]:
        """Make the layer, the same parameters by their published names, and the inputs; seeded."""
        generator = torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        parameters = {name: draw(shape) / shape[-1] ** 0.5 for name, shape in self.parameters.items()}
        layer = self.layer().to(dtype)
        if isinstance(layer, nn.CPBilinear):
            layer.load_state_dict(parameters)  # no published code: the row has the layer's own names
            first, second, weight = (parameters[f"{own}weight"] for own in ("linears.0.", "linears.1.", ""))
            parameters["dense"] = torch.einsum("or,ri,rj->oij", weight, first, second)
        else:
            layer.load_reference_state_dict(parameters)
        inputs = [draw(shape).requires_grad_(trained) for shape, trained in zip(self.shapes, self.trained, strict=True)]
        return layer, {name: p.requires_grad_() for name, p in parameters.items()}, inputs


# ---- L1: github.com/Justin1904/Low-rank-Multimodal-Fusion, model.py ---------------------------------------------------


def _lmf(p: Parameters, training: bool, *inputs: Tensor) -> Tensor:
    fused: Any = 1
    for name, x in zip(("audio", "video", "text"), inputs, strict=True):
        with_one = torch.cat((torch.ones(x.shape[0], 1, dtype=x.dtype), x), dim=1)
        fused = fused * torch.matmul(with_one, p[f"{name}_factor"])
    return torch.matmul(p["fusion_weights"], fused.permute(1, 0, 2)).squeeze() + p["fusion_bias"]


def _lmf_row(rank: int, outputs: int) -> LayerRow:
    dims, rows = (300, 74, 35), 256
    factors = zip(("audio", "video", "text"), dims, strict=True)
    return LayerRow(
        f"L1 R={rank} O={outputs}",
        f"LMF, B={rows}, d={'/'.join(map(str, dims))}, R={rank}, O={outputs}",
        tuple((rows, d) for d in dims),
        (Floor(BOTH, "naive", 1.5),),
        lambda: nn.LowRankFusion(dims, outputs, rank),
        {f"{name}_factor": (rank, d + 1, outputs) for name, d in factors}
        | {"fusion_weights": (1, rank), "fusion_bias": (1, outputs)},
        {"naive": _lmf},
        (True, True, True),
    )


# ---- L2: github.com/Cadene/block.bootstrap.pytorch, fusions.py; attention as in vqa_net.py ------------------------------


def _linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def _normalized(z: Tensor) -> Tensor:
    z = torch.sqrt(functional.relu(z)) - torch.sqrt(functional.relu(-z))
    return functional.normalize(z, p=2)


def _pooled(terms: int, normalize: bool, rate: float) -> Callable[..., Tensor]:
    """Return the code of MLB (one term) and of MFB."""

    def code(p: Parameters, training: bool, x0: Tensor, x1: Tensor) -> Tensor:
        x0, x1 = functional.relu(_linear(p, "linear0", x0)), functional.relu(_linear(p, "linear1", x1))
        if rate > 0:
            x0, x1 = functional.dropout(x0, rate, training), functional.dropout(x1, rate, training)
        z = x0 * x1
        if terms > 1:
            z = z.view(z.size(0), -1, terms).sum(2)
        return functional.relu(_linear(p, "linear_out", _normalized(z) if normalize else z))

    return code


def _mutan(rank: int, rate: float) -> Callable[..., Tensor]:
    def code(p: Parameters, training: bool, x0: Tensor, x1: Tensor) -> Tensor:
        x0, x1 = _linear(p, "linear0", x0), _linear(p, "linear1", x1)
        if rate > 0:
            x0, x1 = functional.dropout(x0, rate, training), functional.dropout(x1, rate, training)
        m = _linear(p, "merge_linear0", x0) * _linear(p, "merge_linear1", x1)
        return _linear(p, "linear_out", m.view(m.size(0), rank, -1).sum(1))

    return code


def _attention(code: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the code that fuses every region with the question, repeated for each region."""

    def attend(p: Parameters, training: bool, question: Tensor, regions: Tensor) -> Tensor:
        batch, count, _ = regions.shape
        question = question.expand(batch, count, question.size(2))
        fused = code(
            p, training, question.contiguous().view(batch * count, -1), regions.contiguous().view(batch * count, -1)
        )
        return fused.view(batch, count, -1)

    return attend


def _maps(**sizes: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of linear maps from (inputs, outputs)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (inputs, outputs) in sizes.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return shapes


def _pooling_rows(name: str, pairs: dict[str, Any], attention: dict[str, Any]) -> tuple[LayerRow, ...]:
    """Two uses of one layer: pairs of 100 numbers in VRD, and the attention of VQA 2.0."""

    def row(work: str, dims: tuple[int, int], outputs: int, o: dict[str, Any], **kind: Any) -> LayerRow:
        mm, terms, rate = o["mm_dim"], o.get("factor", o.get("rank", 1)), o.get("dropout_input", 0.0)
        if name == "MUTAN":
            code = _mutan(terms, rate)
            maps = {"linear0": (dims[0], mm), "linear1": (dims[1], mm)}
            maps |= {"merge_linear0": (mm, mm * terms), "merge_linear1": (mm, mm * terms), "linear_out": (mm, outputs)}
        else:
            code = _pooled(terms, o.get("normalize", False), rate)
            maps = {"linear0": (dims[0], mm * terms), "linear1": (dims[1], mm * terms), "linear_out": (mm, outputs)}
        if work == "attention":
            code = _attention(code)
        sizes = f"{dims[0]}+{dims[1]} → {mm}{'·' + str(terms) if terms > 1 else ''} → {outputs}"
        return LayerRow(
            f"L2 {name} {work}",
            f"{name}, {kind.pop('use')}, {sizes}",
            floors=(Floor(BOTH, "naive", 1.3),),
            layer=lambda: getattr(nn, name)(dims, outputs, **o),
            parameters=_maps(**maps),
            codes={"naive": code},
            **kind,
        )

    rows = 4096
    return (
        row(
            "pairs",
            (100, 100),
            200,
            pairs,
            use=f"VRD's classes, B={rows}",
            shapes=((rows, 100),) * 2,
            trained=(True, True),
        ),
        row(
            "attention",
            (4800, 2048),
            1000,
            attention,
            use=f"VQA's attention, {BATCH} questions, {REGIONS} regions each",
            shapes=((BATCH, 1, 4800), (BATCH, REGIONS, 2048)),
            trained=(True, False),
        ),
    )


# ---- L3: torch.nn.Bilinear of the dense weights, and the factors as a user of torch writes them -------------------------


def _dense(p: Parameters, training: bool, x: Tensor, y: Tensor) -> Tensor:
    return functional.bilinear(x, y, p["dense"], p["bias"])


def _einsum(p: Parameters, training: bool, x: Tensor, y: Tensor) -> Tensor:
    factors = p["linears.0.weight"], p["linears.1.weight"]
    return torch.einsum("bi,ri,bj,rj,or->bo", x, factors[0], y, factors[1], p["weight"]) + p["bias"]


def _by_hand(p: Parameters, training: bool, x: Tensor, y: Tensor) -> Tensor:
    product = (x @ p["linears.0.weight"].T) * (y @ p["linears.1.weight"].T)
    return functional.linear(product, p["weight"], p["bias"])


def _bilinear_row(rank: int, in1: int, in2: int, outputs: int, rows: int) -> LayerRow:
    factors = {"linears.0.weight": (rank, in1), "linears.1.weight": (rank, in2), "weight": (outputs, rank)}
    return LayerRow(
        f"L3 R={rank}",
        f"CPBilinear({in1}, {in2}, {outputs}, rank={rank}), B={rows}; naive: nn.Bilinear",
        ((rows, in1), (rows, in2)),
        (Floor(BOTH, "naive", 10), Floor(BOTH, "einsum", 1.2)),
        lambda: nn.CPBilinear(in1, in2, outputs, rank),
        factors | {"bias": (outputs,)},
        {"naive": _dense, "einsum": _einsum, "by hand": _by_hand},
        (True, True),
    )


# ---- L4: github.com/Justin1904/TensorFusionNetworks, model.py --------------------------------------------------------


def _tfn(p: Parameters, training: bool, *inputs: Tensor) -> Tensor:
    rows = inputs[0].shape[0]
    outer, *others = (torch.cat((torch.ones(rows, 1, dtype=x.dtype), x), dim=1) for x in inputs)
    for x in others:
        outer = torch.bmm(outer.view(rows, -1, 1), x.unsqueeze(1)).view(rows, -1)
    return _linear(p, "post_fusion_layer_1", outer)


def _tensor_row(dims: tuple[int, ...], outputs: int, rows: int) -> LayerRow:
    sizes = "/".join(map(str, dims))
    return LayerRow(
        f"L4 d={sizes}",
        f"TFN, B={rows}, d={sizes}, O={outputs}",
        tuple((rows, d) for d in dims),
        (Floor(BOTH, "naive", 1.0),),
        layer=lambda: nn.TensorFusion(dims, outputs),
        parameters=_maps(post_fusion_layer_1=(math.prod(d + 1 for d in dims), outputs)),
        codes={"naive": _tfn},
        trained=(True,) * len(dims),
    )


_VQA = {"normalize": True, "dropout_input": 0.1}

LAYERS = (
    *(_lmf_row(rank, outputs) for rank, outputs in ((4, 64), (8, 128), (16, 256))),
    *_pooling_rows("MLB", {"mm_dim": 500}, {"mm_dim": 1200} | _VQA),
    *_pooling_rows("MUTAN", {"mm_dim": 700, "rank": 10}, {"mm_dim": 700, "rank": 10, "dropout_input": 0.1}),
    *_pooling_rows("MFB", {"mm_dim": 700, "factor": 5, "normalize": True}, {"mm_dim": 1000, "factor": 5} | _VQA),
    *(_bilinear_row(rank, 512, 512, 128, 128) for rank in (16, 64)),
    *(_tensor_row(dims, 64, 128) for dims in ((4, 16, 128), (128, 16, 4), (32, 32, 32))),
)
