"""Step 3: a model is an encoder per modality and a head that fuses their features.

What lives here: the model, and the heads that are compared. What lives elsewhere: the fusion layer (``fusionsum.nn``),
the encoders (``features.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import LowRankFusion
from .features import ImageCNN, TextGRU
from .preprocess import CLASSES

FEATURES = 32
# Each output is a bilinear form of its own; that of "digit + number = k (mod 10)" is a permutation matrix, of rank 10.
RANK = 16
MODELS = ("image alone", "text alone", "late fusion", "concat + MLP", "fused")


class Model(nn.Module):
    """Encode each modality, then fuse. Inputs by name: those that have no encoder here are not looked at."""

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.head = head

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, classes)."""
        return self.head(*(encoder(inputs[name]) for name, encoder in self.encoders.items()))


class LateFusion(nn.Module):
    """The sum of the logits that each modality gives alone: cannot express that they interact."""

    def __init__(self, input_dims: list[int], output_dim: int) -> None:
        super().__init__()
        self.logits = nn.ModuleList(nn.Linear(d, output_dim) for d in input_dims)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits (B, output_dim)."""
        return sum(linear(x) for linear, x in zip(self.logits, inputs, strict=True))


class ConcatMLP(nn.Module):
    """Concatenation and one hidden layer, as wide as a number of parameters allows."""

    def __init__(self, input_dims: list[int], output_dim: int, parameters: int) -> None:
        super().__init__()
        hidden = (parameters - output_dim) // (sum(input_dims) + 1 + output_dim)
        self.mlp = nn.Sequential(nn.Linear(sum(input_dims), hidden), nn.ReLU(), nn.Linear(hidden, output_dim))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits (B, output_dim)."""
        return self.mlp(torch.cat(inputs, dim=-1))


class NaiveFusion(nn.Module):
    """The computation and the parameters of a `LowRankFusion` as one would write it in torch, to time against."""

    def __init__(self, fusion: LowRankFusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits (B, output_dim)."""
        product = self.fusion.fusion_weights
        for linear, x in zip(self.fusion.factors, inputs, strict=True):
            product = product * linear(x).unflatten(-1, (self.fusion.rank, self.fusion.output_dim))
        return product.sum(dim=-2) + self.fusion.fusion_bias


def parameter_count(module: nn.Module) -> int:
    """Count the trainable numbers of a module."""
    return sum(p.numel() for p in module.parameters())


def build(name: str, vocabulary: int) -> Model:
    """Make one of the `MODELS`, freshly initialised."""
    encoders: dict[str, nn.Module] = {"image": ImageCNN(FEATURES), "text": TextGRU(vocabulary, FEATURES)}
    if name.endswith(" alone"):
        modality = name.removesuffix(" alone")
        return Model({modality: encoders[modality]}, nn.Linear(FEATURES, CLASSES))
    input_dims = [FEATURES] * len(encoders)
    if name == "late fusion":
        return Model(encoders, LateFusion(input_dims, CLASSES))
    fused = LowRankFusion(input_dims, CLASSES, RANK)
    return Model(encoders, fused if name == "fused" else ConcatMLP(input_dims, CLASSES, parameter_count(fused)))
