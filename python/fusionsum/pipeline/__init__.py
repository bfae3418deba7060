"""From raw files of several kinds to a trained, evaluated multimodal model, in five steps of a small file or two each.

1. ``preprocess.py``: a manifest's files and texts become uniform tensors, by the kinds of ``kinds.py``; ``manifest.py``
   reads and checks the manifest.
2. ``features.py``: an encoder per modality, trained end to end; ``pretrained.py``: frozen encoders from wheels.
3. ``fuse.py``: any layer of `fusionsum.nn` by name, and the baselines it is compared with.
4. ``train.py``: the training loop; ``run.py``: the folder of a training; ``checkpoint.py``: its files' format.
5. ``evaluate.py``: outputs, metrics and the record of an evaluation; ``report.py``: its plots and report;
   ``retrieve.py``: search, and its page.

``predictor.py`` takes these steps (`MultimodalPredictor`); ``config.py`` defines the configuration, ``errors.py`` the
exceptions; ``datasets.py`` fetches data, ``demo.py`` is ``fusionsum demo``; ``processes.py`` shares the steps among
several processes.
"""

from importlib.util import find_spec

_PACKAGES = (
    *(
        "torch",
        "safetensors",
        "filelock",
        "sklearn",
        "scipy",
        "num2words",
        "tqdm",
        "yaml",
        "PIL",
        "soundfile",
    ),
    "jinja2",
)
_missing = [name for name in _PACKAGES if find_spec(name) is None]
if _missing:
    needs = f"fusionsum.pipeline needs {', '.join(_missing)}: pip install 'fusionsum[pipeline]'"
    raise ModuleNotFoundError(needs, name=_missing[0])

# After the packages that they need are known to be there.
from .errors import CheckpointError, ConfigError, ManifestError, PrepareError, RankError  # noqa: E402
from .evaluate import Evaluation  # noqa: E402
from .predictor import MultimodalPredictor  # noqa: E402
from .report import write_report  # noqa: E402

# The exceptions of bad input, whose message is enough without a traceback; ModuleNotFoundError: a frozen encoder's wheel.
ERRORS = (ConfigError, ManifestError, CheckpointError, PrepareError, RankError, ArithmeticError, ModuleNotFoundError)

__all__ = [
    "ERRORS",
    "CheckpointError",
    "ConfigError",
    "Evaluation",
    "ManifestError",
    "MultimodalPredictor",
    "PrepareError",
    "RankError",
    "write_report",
]
