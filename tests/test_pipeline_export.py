"""`fusionsum.pipeline.export`: what other programs compute is what `predict` says, for any number of rows, all tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import onnxruntime
    import torch

    from fusionsum.pipeline import MultimodalPredictor, evaluate
    from fusionsum.pipeline.preprocess import gather_rows
except ModuleNotFoundError as error:
    missing(str(error))

# torch's own and onnxscript's
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("task, form", [("classification", "onnx"), ("regression", "torch"), ("retrieval", "torch")])
def test_exported_models_say_the_same(tmp_path, task, form):
    folder = made_up.folder(tmp_path)
    given = made_up.config(folder, **made_up.TASKS[task], train={"seeds": 1, "epochs": 1}, baselines=[])
    path = folder / f"{task}.csv"
    predictor = MultimodalPredictor(given).fit(path, progress=False)
    *files, description = predictor.export(tmp_path / "exported", form)
    said = json.loads(description.read_text(encoding="utf-8"))
    state = predictor.states["fused", 0]
    rows = predictor.rows(gather_rows(predictor.config, path, progress=False), state)
    model = predictor.model("fused", state).eval()
    everything = torch.arange(made_up.ROWS)
    output = evaluate.outputs(model, rows, everything, (rows, everything))[evaluate.Condition()]
    if task == "classification":
        wanted = [torch.from_numpy(output.values).softmax(dim=1).numpy()]
    elif task == "regression":
        wanted = [output.values * state["task"]["scale"] + state["task"]["mean"]]
    else:
        wanted = [output.values, output.gallery]
    assert [file.name for file in files] == list(said["models"])
    for count in (1, 7, made_up.ROWS):
        inputs, _ = rows.batch(everything[:count])
        for file, values in zip(files, wanted, strict=True):
            names = [name.removeprefix("items_") for name in said["models"][file.name]["inputs"] if "items_" in name]
            items, present = ({name: inputs[name][k] for name in names} for k in (0, 1))
            for name in names:
                described = said["modalities"][name]
                assert list(items[name].shape[1:]) == described["shape"][1:]
                assert str(items[name].dtype) == f"torch.{described['dtype']}"
            if form == "torch":
                found = torch.export.load(file).module()(items, present).detach().numpy()
            else:
                session = onnxruntime.InferenceSession(file)
                fed = {f"items_{n}": x.numpy() for n, x in items.items()}
                fed |= {f"present_{n}": x.numpy() for n, x in present.items()}
                assert [x.name for x in session.get_inputs()] == said["models"][file.name]["inputs"]
                (found,) = session.run(None, fed)
            np.testing.assert_allclose(found, values[:count], rtol=1e-4, atol=1e-5)
    assert said["modalities"]["text"]["statistics"]["alphabet"]
    assert "white square" in said["modalities"]["image"]["steps"]
    if task == "classification":
        assert said["task"]["classes"] == sorted(made_up.COLOURS)
    if task == "retrieval":
        assert said["fusion_weights"] == model.fusion_weights.tolist()
