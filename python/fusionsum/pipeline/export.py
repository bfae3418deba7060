"""A trained model for other programs: ONNX or ``torch.export``, and a JSON file that says how items become its inputs.

What lives here: the module that is exported, the files. What lives elsewhere: the model (``fuse.py``), the steps that the
description names (``kinds.py``).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import replace
from .config import Config
from .fuse import FusionModel, TwoTowers
from .kinds import Modality

SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
ROWS = 3  # of the example that is traced; any number of rows can be given


class Exported(nn.Module):
    """A model as a function of plain tensors: by modality, its items and whether each is there, ``(B, ...)`` and ``(B,)``.

    It returns the probabilities ``(B, C)`` of classes or labels, values ``(B, 1)`` in the labels' unit, or for a tower of
    retrieval vectors of unit length ``(B, dim)``.
    """

    def __init__(self, model: FusionModel, kind: str, learnt: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.mean, self.scale = learnt.get("mean", 0.0), learnt.get("scale", 1.0)

    def forward(self, items: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return what the model says of a batch."""
        values = self.model({name: (items[name], present[name]) for name in items})
        if self.kind == "classification":
            return values.softmax(dim=-1)
        if self.kind == "multilabel":
            return values.sigmoid()
        if self.kind == "regression":
            return values * self.scale + self.mean
        return nn.functional.normalize(values, dim=-1)


def export(
    folder: Path,
    form: str,
    config: Config,
    model: FusionModel | TwoTowers,
    modalities: Mapping[str, Modality],
    state: Mapping[str, Any],
    offsets: list[float] | None,
) -> list[Path]:
    """Write a model, or retrieval's two towers, and ``preprocessing.json``; return the files.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it does not exist.
    form : str
        ``onnx`` or ``torch``.
    config : Config
    model : FusionModel or TwoTowers
    modalities : mapping of str to Modality
        As the model's encoders get them.
    state : mapping
        What the seed's models have in common: ``task`` and ``fitted``.
    offsets : list of float or None
        Of the model's decisions.

    Raises
    ------
    ModuleNotFoundError
        If ONNX is asked for and its packages are missing.
    """
    if form == "onnx" and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise ModuleNotFoundError(f"the export to ONNX needs {', '.join(missing)}: pip install onnx onnxscript")
    folder.mkdir(parents=True, exist_ok=True)
    towers = {"query": model.query, "target": model.target} if isinstance(model, TwoTowers) else {"model": model}
    files, inputs = [], {}
    for name, tower in towers.items():
        files.append(folder / f"{name}{SUFFIX[form]}")
        used = list(tower.encoders)
        inputs[name] = [f"items_{m}" for m in used] + [f"present_{m}" for m in used]
        _write(files[-1], form, Exported(tower, config.task.kind, state["task"]).eval(), used, modalities, state)
    described = {
        "models": {
            file.name: {"inputs": inputs[name], "output": _output(config)}
            for name, file in zip(towers, files, strict=True)
        },
        "modalities": {
            name: _described(config, name, modality, state["fitted"][name]) for name, modality in modalities.items()
        },
        "missing": "a row that lacks a modality has present False, and any finite items, zeros say",
        "task": {"kind": config.task.kind}
        | {k: v for k, v in state["task"].items() if k in ("classes", "mean", "scale")},
        "decision_offsets": offsets,
    }
    if isinstance(model, TwoTowers):
        described["score"] = "sum over i of fusion_weights[i] * query[i] * target[i]"
        described["fusion_weights"] = model.fusion_weights.tolist()
    files.append(folder / "preprocessing.json")
    replace(files[-1], json.dumps(described, indent=1).encode())
    return files


def _write(
    path: Path,
    form: str,
    module: Exported,
    used: list[str],
    modalities: Mapping[str, Modality],
    state: Mapping[str, Any],
) -> None:
    items = {name: torch.zeros(ROWS, *state["fitted"][name]["shape"], dtype=modalities[name].dtype) for name in used}
    present = {name: torch.arange(ROWS) != k % ROWS for k, name in enumerate(used)}
    rows = torch.export.Dim("rows")
    shapes = {side: {name: {0: rows} for name in used} for side in ("items", "present")}
    with torch.no_grad():
        program = torch.export.export(module, (items, present), dynamic_shapes=shapes)
        if form == "torch":
            torch.export.save(program, path)
            return
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
        assert onnx is not None
        onnx.save(path, external_data=False)


def _output(config: Config) -> str:
    return {
        "classification": "probabilities of the classes (rows, classes); the class is that of the greatest log(p) + offset",
        "multilabel": "probabilities of the labels (rows, labels); a label is given where log(p / (1 - p)) + offset > 0",
        "regression": "values (rows, 1), in the labels' unit",
        "retrieval": f"vectors of unit length (rows, {config.task.dim})",
    }[config.task.kind]


def _described(config: Config, name: str, modality: Modality, fitted: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a modality's items become tensors: the kind's own words, its options, and what the training rows say."""
    given = config.modalities[name]
    said = {
        "kind": given.kind,
        "columns": list(given.columns_of(name)),
        "dtype": str(modality.dtype).removeprefix("torch."),
        "shape": ["rows", *fitted["shape"]],
        "steps": " ".join((inspect.getdoc(type(given)) or "").split()),
        "options": dataclasses.asdict(given),
        "statistics": dict(fitted),
    }
    if modality is not given:
        said["features_of"] = f"the frozen encoder {given.encoder!r} (fusionsum.pipeline.pretrained)"
        said["then"] = " ".join((inspect.getdoc(type(modality)) or "").split())
    return said
