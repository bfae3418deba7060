"""Step 2: an encoder per modality, from step 1's tensors to a vector of features.

What lives here: the encoders that are trained end to end, and their look-up by name. What lives elsewhere: frozen
encoders (``pretrained.py``), on whose features a `Projection` is trained.

Each encoder ends in a LayerNorm: a product of features that start small has small gradients. Without the LayerNorm, one
of three seeds of the demo's fused model was still at chance after 800 steps, at a learning rate of 4e-3.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import unknown

HIDDEN = 64


class Encoder(Protocol):
    """An encoder: a `torch.nn.Module` made as ``Encoder(fitted, features)``.

    ``fitted`` holds step 1's statistics of the training items: their ``shape``, and for texts the size of the
    ``vocabulary``. The encoder maps ``(B, *shape)`` to ``(B, features)``. A configuration names a class of one's own as
    ``package.module:Class``.

    Examples
    --------
    >>> class Brightness(torch.nn.Module):
    ...     def __init__(self, fitted, features):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(1, features)
    ...
    ...     def forward(self, images):
    ...         return self.linear(images.float().mean(dim=(1, 2, 3))[:, None])
    >>> Brightness({"shape": [3, 64, 64]}, 8)(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
    torch.Size([2, 8])
    """

    def __call__(self, items: Tensor, /) -> Tensor:
        """Return the features (B, features) of a batch of items."""
        ...


class ImageCNN(nn.Module):
    """Convolutions that halve the size down to 4 (at least two), and a projection: uint8 (B, C, S, S) to (B, features)."""

    def __init__(self, fitted: Mapping[str, Any], features: int) -> None:
        super().__init__()
        channels, size, _ = fitted["shape"]
        blocks: list[nn.Module] = []
        width = 16
        while size > 4 or len(blocks) < 6:
            blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            channels, width, size = width, min(2 * width, 64), (size + 1) // 2
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.projection = nn.Sequential(nn.Linear(channels * size * size, features), nn.LayerNorm(features))

    def forward(self, images: Tensor) -> Tensor:
        """Encode a batch of images."""
        return self.projection(self.blocks(1 - images.float() / 255))  # paper is 0: most pictures are on white


class TextGRU(nn.Module):
    """A character GRU: left-padded codes (B, T) int64 to features (B, features), its state after the last letter."""

    def __init__(self, fitted: Mapping[str, Any], features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(fitted["vocabulary"], 24, padding_idx=0)
        self.gru = nn.GRU(24, HIDDEN, batch_first=True)
        self.projection = nn.Sequential(nn.Linear(HIDDEN, features), nn.LayerNorm(features))

    def forward(self, text: Tensor) -> Tensor:
        """Encode a batch of texts."""
        _, state = self.gru(self.embedding(text))
        return self.projection(state[-1])


class SequenceCNN(nn.Module):
    """Two convolutions over time and the greatest of each channel: (B, channels, T) to (B, features)."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(channels, HIDDEN, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(HIDDEN, HIDDEN, 5, padding=2),
            nn.ReLU(),
            nn.AdaptiveMaxPool1d(1),
            nn.Flatten(),
        )
        self.projection = nn.Sequential(nn.Linear(HIDDEN, features), nn.LayerNorm(features))

    def forward(self, sequence: Tensor) -> Tensor:
        """Encode a batch of sequences."""
        return self.projection(self.convolutions(sequence))


class TextCNN(SequenceCNN):
    """A `SequenceCNN` over embedded characters: codes (B, T) int64 to (B, features)."""

    def __init__(self, fitted: Mapping[str, Any], features: int) -> None:
        super().__init__(24, features)
        self.embedding = nn.Embedding(fitted["vocabulary"], 24, padding_idx=0)

    def forward(self, text: Tensor) -> Tensor:
        """Encode a batch of texts."""
        return super().forward(self.embedding(text).transpose(1, 2))


class TextNgrams(nn.Module):
    """The mean of embedded n-grams of 1 to 4 codes, hashed: codes (B, T) int64 to (B, features).

    References
    ----------
    P. Bojanowski et al., "Enriching Word Vectors with Subword Information", TACL 2017, section 3.2.
    """

    BUCKETS = 2048

    def __init__(self, fitted: Mapping[str, Any], features: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(self.BUCKETS + 1, HIDDEN, mode="mean", padding_idx=self.BUCKETS)
        self.projection = nn.Sequential(nn.Linear(HIDDEN, features), nn.LayerNorm(features))

    def forward(self, text: Tensor) -> Tensor:
        """Encode a batch of texts."""
        grams, value = [], torch.zeros_like(text)
        for n in range(min(4, text.shape[1])):
            starts = text.shape[1] - n
            value = value[:, :starts] * 1000003 + text[:, n:]  # wraps around: a hash
            grams.append((value % self.BUCKETS).masked_fill(text[:, :starts] == 0, self.BUCKETS))
        return self.projection(self.embedding(torch.cat(grams, dim=1)))


class AudioCNN(SequenceCNN):
    """A `SequenceCNN` over log-mel frames: (B, mels, T) to (B, features)."""

    def __init__(self, fitted: Mapping[str, Any], features: int) -> None:
        super().__init__(fitted["shape"][0], features)


class AudioGRU(nn.Module):
    """A GRU over log-mel frames, four at a time, and its mean state: (B, mels, T) to (B, features)."""

    STRIDE = 4

    def __init__(self, fitted: Mapping[str, Any], features: int) -> None:
        super().__init__()
        self.gru = nn.GRU(fitted["shape"][0], HIDDEN, batch_first=True)
        self.projection = nn.Sequential(nn.Linear(HIDDEN, features), nn.LayerNorm(features))

    def forward(self, sound: Tensor) -> Tensor:
        """Encode a batch of log-mel spectrograms."""
        frames = nn.functional.avg_pool1d(sound, self.STRIDE, ceil_mode=True).transpose(1, 2)
        states, _ = self.gru(frames)
        return self.projection(states.mean(dim=1))


class TableMLP(nn.Sequential):
    """One hidden layer: (B, columns) to (B, features)."""

    def __init__(self, fitted: Mapping[str, Any], features: int) -> None:
        hidden = nn.Linear(fitted["shape"][0], HIDDEN)
        super().__init__(hidden, nn.ReLU(), nn.Linear(HIDDEN, features), nn.LayerNorm(features))


class Projection(nn.Sequential):
    """A linear map of frozen features: (B, width) to (B, features). In training, half of the frozen features drop out."""

    def __init__(self, fitted: Mapping[str, Any], features: int) -> None:
        super().__init__(nn.Dropout(0.5), nn.Linear(fitted["shape"][0], features), nn.LayerNorm(features))


ENCODERS: dict[str, dict[str, Callable[[Mapping[str, Any], int], nn.Module]]] = {
    "image": {"cnn": ImageCNN},
    "text": {"gru": TextGRU, "cnn": TextCNN, "ngrams": TextNgrams},
    "audio": {"cnn": AudioCNN, "gru": AudioGRU},
    "table": {"mlp": TableMLP},
    "vector": {"projection": Projection},
}


def encoder_class(kind: str, name: str, others: tuple[str, ...] = ()) -> Callable[[Mapping[str, Any], int], nn.Module]:
    """Return the encoder class of a kind and a name, or import the class that ``package.module:Class`` names.

    Raises
    ------
    ValueError
        If there is no such class; the message suggests the nearest name, of the kind's encoders and of `others`.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"encoder {name!r}: {error}") from None
    if name not in ENCODERS[kind]:
        raise ValueError(unknown(f"{kind} encoder", name, [*ENCODERS[kind], *others, "package.module:Class"]))
    return ENCODERS[kind][name]
