"""Step 2: an encoder per modality, from step 1's tensors to a vector of features.

What lives here: the encoders that are trained end to end, and their look-up by name. What lives elsewhere: frozen
encoders (``pretrained.py``), on whose features a `Projection` is trained.

Each encoder ends in a LayerNorm: a product of features that start small has small gradients. Without the LayerNorm, one
of three seeds of the demo's fused model was still at chance after 800 steps, at a learning rate of 4e-3.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import unknown
from .kinds import Modality

HIDDEN = 64


class Encoder(Protocol):
    """An encoder: a `torch.nn.Module` made as ``Encoder(fitted, features, **encoder_options)``.

    ``fitted`` holds step 1's statistics of the training items: their ``shape``, and for texts the size of the
    ``vocabulary``. The encoder maps ``(B, *shape)`` to ``(B, features)``. A configuration in Python holds a class of one's
    own, or a module, of which every model gets a copy (pictures are floats in 0..1 for it), and a linear map behind it if
    it has another number of features;
    one in YAML names a class, as ``package.module:Class``.

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
    """Two convolutions over embedded characters (`SequenceCNN`): codes (B, T) int64 to (B, features)."""

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
    """Two convolutions over log-mel frames (`SequenceCNN`): (B, mels, T) to (B, features)."""

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


OWN: dict[str, Callable[..., nn.Module]] = {}  # the encoders that configurations in Python hold, by the name in YAML


def own(encoder: Any) -> Any:
    """Return the name by which an encoder of one's own, a class or module, is known from now on; names stay as they are."""
    if not isinstance(encoder, nn.Module) and not (isinstance(encoder, type) and issubclass(encoder, nn.Module)):
        return encoder
    kind = type(encoder) if isinstance(encoder, nn.Module) else encoder
    name = f"{kind.__module__}:{kind.__qualname__}"
    OWN[name] = encoder if isinstance(encoder, type) else partial(_copied, encoder)
    return name


class _Unit(nn.Module):
    """Pictures as floats in 0..1, which modules expect that were not written for this pipeline."""

    def forward(self, images: Tensor) -> Tensor:
        """Scale uint8 to floats."""
        return images.float() / 255


def _copied(module: nn.Module, fitted: Mapping[str, Any], features: int) -> nn.Module:
    """Return a copy of a module, with a linear map to the number of features if it has another."""
    copied = copy.deepcopy(module)
    if fitted["dtype"] == "uint8":
        copied = nn.Sequential(_Unit(), copied)
    width = _output(copied, fitted).shape[-1]
    return copied if width == features else nn.Sequential(copied, nn.Linear(width, features), nn.LayerNorm(features))


@torch.no_grad()
def _output(encoder: nn.Module, fitted: Mapping[str, Any]) -> Tensor:
    """Return what an encoder makes of two items of zeros."""
    encoder.eval()
    try:
        made = encoder(torch.zeros(2, *fitted["shape"], dtype=getattr(torch, fitted["dtype"])))
    finally:
        encoder.train()
    if not isinstance(made, Tensor) or made.ndim != 2 or len(made) != 2:
        shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"expected features of shape (2, features) of 2 items of shape {fitted['shape']}, got {shape}")
    return made


def encoder_class(kind: str, name: str, others: tuple[str, ...] = ()) -> Callable[..., nn.Module]:
    """Return the encoder class of a kind and a name, or the one of one's own that ``package.module:Class`` names.

    Of one's own are those that a configuration in Python held, those that `find` has found, and classes of modules that
    are imported already. Nothing is imported here.

    Raises
    ------
    ValueError
        If there is no such class; the message suggests the nearest name, of the kind's encoders and of `others`.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not known(name):
            raise ValueError(f"encoder {name!r}: its code is not loaded; import {module} first, if you trust it")
        return OWN.get(name) or getattr(sys.modules[module], attribute)
    if name not in ENCODERS[kind]:
        raise ValueError(unknown(f"{kind} encoder", name, [*ENCODERS[kind], *others, "package.module:Class"]))
    return ENCODERS[kind][name]


def known(name: str) -> bool:
    """Return whether the encoder of one's own that ``package.module:Class`` names is loaded already."""
    module, _, attribute = name.partition(":")
    return name in OWN or hasattr(sys.modules.get(module), attribute)


def find(name: str, folder: str | Path = ".") -> None:
    """Import the module that ``package.module:Class`` names, from a folder, the current one, or Python's path.

    Whoever calls it trusts the configuration that holds the name: importing a module runs it. Other names do nothing.

    Raises
    ------
    ValueError
        If there is no such module, or it has no such encoder.
    """
    if ":" not in name or known(name):
        return
    module, _, attribute = name.partition(":")
    before = list(sys.path)
    sys.path[:0] = [str(Path(folder).resolve()), str(Path.cwd())]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(f"encoder {name!r}: {type(error).__name__}: {error}") from None
    finally:
        sys.path[:] = before
    OWN[own(found)] = OWN.get(own(found), found)


def make(modality: Modality, fitted: Mapping[str, Any]) -> nn.Module:
    """Make the encoder of a modality.

    Raises
    ------
    ValueError
        If an encoder of one's own cannot be made, or does not give ``(B, features)``.
    """
    chosen = encoder_class(modality.kind, modality.encoder)
    if ":" not in modality.encoder:
        return chosen(fitted, modality.features)
    try:
        made = chosen(fitted, modality.features, **modality.encoder_options)
        if (width := _output(made, fitted).shape[1]) != modality.features:
            raise ValueError(f"expected {modality.features} features, got {width}")
    except Exception as error:  # whatever the encoder's own code raises
        raise ValueError(f"encoder {modality.encoder!r}: {type(error).__name__}: {error}") from error
    return made
