"""fusionsum: the multiplicative fusion of modalities, and its gradient, as one fused operation.

    F[...] = sum_i  w[..., i] * prod_m  phi_m(z_m[..., i])
    S[b, c] = logit_scale * sum_i  w[i] * queries[b, i] * keys[c, i]

This file lists the public names; ``api.py``, ``losses.py`` and ``search.py`` document them. ``fusionsum.nn`` (layers) and
``fusionsum.pipeline`` need torch and are imported on request only.
"""

from . import autoload
from .api import fusion_sum, fusion_sum_grad
from .backend import backends, get_num_threads, set_num_threads
from .losses import contrastive_loss, sigmoid_loss
from .search import ranks, top_k

__version__ = "0.1.0"
__all__ = [
    "backends",
    "contrastive_loss",
    "fusion_sum",
    "fusion_sum_grad",
    "get_num_threads",
    "ranks",
    "set_num_threads",
    "sigmoid_loss",
    "top_k",
]

autoload.register_if_torch_is_imported()
