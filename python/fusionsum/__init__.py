"""fusionsum: the multiplicative fusion of modalities, and its gradient, as one fused operation.

    F[...] = sum_i  w[..., i] * prod_m  phi_m(z_m[..., i])

This file lists the public names; ``api.py`` documents them. ``fusionsum.nn`` (layers) and ``fusionsum.pipeline`` need
torch and are imported on request only.
"""

from . import autoload
from .api import fusion_sum, fusion_sum_grad
from .backend import backends, get_num_threads, set_num_threads

__version__ = "0.1.0"
__all__ = ["backends", "fusion_sum", "fusion_sum_grad", "get_num_threads", "set_num_threads"]

autoload.register_if_torch_is_imported()
