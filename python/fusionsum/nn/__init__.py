"""Fusion layers: `torch.nn` modules whose fusion step is `fusion_sum`.

This file lists them. ``layer.py`` is what all share: checks, missing modalities, the originals' checkpoints;
``low_rank.py`` the layers of one linear map per modality and one sum; ``pooling.py`` bilinear pooling, which normalises
what it fused and maps it once more; ``tensor.py`` layers with a full core tensor; ``scores.py`` scores of embedded
things; ``residual.py`` a sum and products; ``baselines.py`` fusion without a product; ``losses.py`` contrastive losses.
"""

from .baselines import ConcatMLP, LateFusion, LinearSum
from .losses import ContrastiveLoss, SigmoidLoss, SymileLoss
from .low_rank import CPBilinear, GatedFusion, LowRankFusion
from .pooling import BLOCK, MFB, MFH, MLB, MUTAN
from .residual import ResidualFusion
from .scores import GMF, ComplEx, DistMult
from .tensor import TensorFusion, TuckerFusion

__all__ = [
    "BLOCK",
    "GMF",
    "MFB",
    "MFH",
    "MLB",
    "MUTAN",
    "CPBilinear",
    "ComplEx",
    "ConcatMLP",
    "ContrastiveLoss",
    "DistMult",
    "GatedFusion",
    "LateFusion",
    "LinearSum",
    "LowRankFusion",
    "ResidualFusion",
    "SigmoidLoss",
    "SymileLoss",
    "TensorFusion",
    "TuckerFusion",
]
