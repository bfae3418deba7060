"""Registering the operations with torch as soon as both torch and this package are imported.

Files of ``torch.export`` and AOTInductor name the operations and load only where they are registered. `import fusionsum`
registers them if torch is imported already, and does not import torch for users of NumPy. If torch is imported later, torch
calls ``fusionsum_autoload``, an entry point of this distribution (not where TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set; the
first call with a tensor registers them there).
"""

from __future__ import annotations

import sys
import warnings

from . import api


def register_if_torch_is_imported() -> None:
    """Register the operations unless torch is missing, or only half imported: at its end, torch itself calls."""
    torch = sys.modules.get("torch")
    if torch is not None and not getattr(torch.__spec__, "_initializing", False):
        register()


def register() -> None:
    """Register the operations; an error becomes a warning, for neither import may fail by it."""
    try:
        api.adopt_autograd()
    except Exception as error:
        warnings.warn(
            f"fusionsum could not register its operations with torch: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
