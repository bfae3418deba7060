"""Multimodal learning in five steps, one small file each, on a task that needs both modalities.

1. ``preprocess.py``: raw items to tensors, and the splits of train and test.
2. ``features.py``: an encoder per modality.
3. ``fuse.py``: a model is encoders and a head; the heads that are compared.
4. ``train.py``: the training loop.
5. ``evaluate.py``: accuracy, step time, the report and its plot.

``demo.py`` runs them (``fusionsum demo``). What lives elsewhere: the fusion layer itself (``fusionsum.nn``).
"""

from importlib.util import find_spec

_missing = [name for name in ("torch", "sklearn", "num2words", "tqdm", "matplotlib") if find_spec(name) is None]
if _missing:
    needs = f"fusionsum.pipeline needs {', '.join(_missing)}: pip install 'fusionsum[pipeline]'"
    raise ModuleNotFoundError(needs, name=_missing[0])
