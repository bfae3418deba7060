"""The kinds of modality: image, text, audio, table and vector, with their options (the configuration's too).

What lives here: for each kind its options, how an item is decoded, and how decoded items become a tensor. What lives
elsewhere: reading the items of a manifest, and the cache (``preprocess.py``); encoders (``features.py``).
"""

from __future__ import annotations

import io
import math
import struct
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from PIL import Image as PillowImage
from PIL import ImageOps
from scipy.signal import resample_poly
from torch import Tensor

VERSION = "1"  # of the cached arrays: raise it when a kind decodes the same bytes to another array


@dataclass(frozen=True)
class Modality:
    """The options that every kind of modality has: its encoder, the encoder's number of features, its column.

    A kind defines the bytes that identify an item (`content`), their decoding to an array (`decode`), the statistics of
    the training items (`fit`: plain values, kept with the model), and the tensor of some items (`tensor`).
    """

    encoder: str = ""
    features: int = 64
    column: str = ""

    kind: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.float32
    sizes: ClassVar[tuple[str, ...]] = ("features",)

    def columns_of(self, name: str) -> tuple[str, ...]:
        """Return the manifest's columns that hold this modality, whose name in the configuration is `name`."""
        return (self.column or name,)

    def content(self, folder: Path, cells: tuple[str, ...]) -> bytes:
        """Return the item's bytes: here, of the file that the cell names, relative to the manifest's folder."""
        return (folder / cells[0]).read_bytes()

    def decode(self, content: bytes) -> np.ndarray:
        """Return the item as an array; raise OSError or ValueError if it cannot be decoded."""
        raise NotImplementedError

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the statistics of the training items that `tensor` needs."""
        return {}

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Return the items as one tensor, ``(len(items), ...)``."""
        return torch.from_numpy(np.stack(items))

    def recipe(self) -> str:
        """Return the options that `decode` depends on as a string, part of the cache's key."""
        return f"{VERSION} {replace(self, encoder='', features=1, column='')!r}"


@dataclass(frozen=True)
class Image(Modality):
    """Pictures, turned as their EXIF says, on white, fitted into a white square; uint8 ``(channels, size, size)``."""

    encoder: str = "cnn"
    size: int = 64
    channels: int = 3

    kind = "image"
    dtype = torch.uint8
    sizes = ("features", "size", "channels")

    def decode(self, content: bytes) -> np.ndarray:
        """Decode any format that Pillow reads."""
        try:
            with PillowImage.open(io.BytesIO(content)) as file:
                picture = ImageOps.exif_transpose(file).convert("RGBA")
        except (SyntaxError, PillowImage.DecompressionBombError) as error:  # Pillow raises these for some broken files
            raise ValueError(str(error)) from None
        white = PillowImage.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        flat = white.convert("L" if self.channels == 1 else "RGB")
        shape = (self.size, self.size)
        fitted = ImageOps.pad(flat, shape, PillowImage.Resampling.BICUBIC, "white") if flat.size != shape else flat
        return np.asarray(fitted).reshape(*shape, self.channels).transpose(2, 0, 1).copy()


def normalise(text: str) -> str:
    r"""Return the text in Unicode NFKC, with one space for any white space, without control and format characters.

    Examples
    --------
    >>> normalise(" \ufb01re\u00a0\tengine ")
    'fire engine'
    """
    composed = " ".join(unicodedata.normalize("NFKC", text).split())
    return "".join(c for c in composed if unicodedata.category(c) not in ("Cc", "Cf"))


@dataclass(frozen=True)
class Text(Modality):
    """Texts, as codes of characters or of a Hugging Face tokenizer's tokens; int64, padded with 0 on the left.

    As wide as the longest training text, but at most `length`; the end of a longer text is cut off. Code 1 stands for
    every character that no training text has. `lower` folds case; without `accents`, diacritics are dropped.
    """

    encoder: str = "gru"
    length: int = 64
    lower: bool = True
    accents: bool = True
    tokenizer: str = ""

    kind = "text"
    dtype = torch.int64
    sizes = ("features", "length")

    def content(self, folder: Path, cells: tuple[str, ...]) -> bytes:
        """Return the normalised text in UTF-8."""
        text = normalise(cells[0])
        text = text.lower() if self.lower else text
        if not self.accents:
            text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        if not text:
            raise ValueError("is empty once normalised")
        return text.encode()

    def decode(self, content: bytes) -> np.ndarray:
        """Return Unicode code points, uint32."""
        return np.frombuffer(content.decode().encode("utf-32-le"), dtype="<u4")

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Collect the alphabet, or the size of the tokenizer's vocabulary, and the width."""
        alphabet = "".join(map(chr, np.unique(np.concatenate(items))))
        vocabulary = len(_tokenizer(self.tokenizer)) if self.tokenizer else len(alphabet) + 2
        fitted = {"alphabet": alphabet, "vocabulary": vocabulary}
        return fitted | {"width": min(self.length, max(map(len, self._codes(items, fitted))))}

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Code the texts, cut and padded."""
        width = fitted["width"]
        codes = np.zeros((len(items), width), dtype=np.int64)
        for row, code in zip(codes, self._codes(items, fitted), strict=True):
            row[max(0, width - len(code)) :] = code[:width]
        return torch.from_numpy(codes)

    def _codes(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> list[list[int]]:
        if self.tokenizer:
            return [_tokenizer(self.tokenizer).encode(string(item)) for item in items]
        place = {ord(c): k for k, c in enumerate(fitted["alphabet"], 2)}
        return [[place.get(c, 1) for c in item.tolist()] for item in items]


def string(item: np.ndarray) -> str:
    """Return the text whose code points `Text.decode` returned."""
    return item.astype("<u4").tobytes().decode("utf-32-le")


@cache
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


@dataclass(frozen=True)
class Audio(Modality):
    """Sound: one channel, resampled, its peak at 1, cut or padded to `seconds`; log-mel float32 ``(mels, frames)``."""

    encoder: str = "cnn"
    seconds: float = 3.0
    rate: int = 16000
    mels: int = 40

    kind = "audio"
    sizes = ("features", "seconds", "rate", "mels")

    def waveform(self, content: bytes) -> np.ndarray:
        """Return float32 ``(seconds * rate,)`` of any format that libsndfile reads."""
        try:
            sound, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(str(error)) from None
        if not len(sound):
            raise ValueError("holds no sound")
        mono = sound.mean(axis=1)
        if rate != self.rate:
            common = math.gcd(rate, self.rate)
            mono = resample_poly(mono, self.rate // common, rate // common)
        if not np.isfinite(mono).all():
            raise ValueError("holds samples that are not finite")
        fixed = np.zeros(round(self.seconds * self.rate), dtype=np.float32)
        mono = mono[: len(fixed)]
        fixed[: len(mono)] = mono / max(float(np.abs(mono).max()), 1e-6)
        return fixed

    def decode(self, content: bytes) -> np.ndarray:
        """Return log-mel energies of 25 ms windows, 10 ms apart."""
        window, hop = round(0.025 * self.rate), round(0.01 * self.rate)
        size = 1 << (window - 1).bit_length()
        sound = torch.from_numpy(self.waveform(content))
        spectrum = torch.stft(sound, size, hop, window, torch.hann_window(window), return_complex=True).abs().square()
        return torch.log(mel_filters(self.mels, size, self.rate) @ spectrum + 1e-6).numpy()

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Collect mean and spread over all training frames."""
        return _standard(np.stack(items).swapaxes(1, 2).reshape(-1, self.mels))

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Stack and standardise each band."""
        mean, scale = (np.array(fitted[key], dtype=np.float32)[:, None] for key in ("mean", "scale"))
        return torch.from_numpy((np.stack(items) - mean) / scale)


@cache
def mel_filters(mels: int, size: int, rate: int) -> Tensor:
    """Return triangular filters on the mel scale of O'Shaughnessy, ``2595 log10(1 + f / 700)``.

    Returns
    -------
    torch.Tensor
        ``(mels, size // 2 + 1)`` float32: each triangle's peak is 1, at its neighbours' feet.

    Examples
    --------
    >>> mel_filters(40, 512, 16000).shape
    torch.Size([40, 257])
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(size, 1 / rate)
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    triangles = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clip(min=0)
    return torch.from_numpy(triangles).float()


@dataclass(frozen=True)
class Table(Modality):
    """Numbers of one column or several (`columns`), standardised; float32 ``(len(columns),)``."""

    encoder: str = "mlp"
    columns: tuple[str, ...] = ()

    kind = "table"

    def columns_of(self, name: str) -> tuple[str, ...]:
        """Return the configured columns."""
        return self.columns or super().columns_of(name)

    def content(self, folder: Path, cells: tuple[str, ...]) -> bytes:
        """Return the numbers as float64; a row has all of them or none."""
        if "" in cells:
            raise ValueError("some numbers are there and some are missing: fill them in, or leave all empty")
        numbers = [float(cell) for cell in cells]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"expected finite numbers, got {', '.join(cells)}")
        return struct.pack(f"<{len(numbers)}d", *numbers)

    def decode(self, content: bytes) -> np.ndarray:
        """Return float64 numbers."""
        return np.frombuffer(content, dtype="<f8")

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Collect mean and spread of each column."""
        return _standard(np.stack(items))

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Stack and standardise."""
        return torch.from_numpy((np.stack(items) - fitted["mean"]) / fitted["scale"]).float()


def _standard(values: np.ndarray) -> dict[str, Any]:
    """Return mean and standard deviation of each column; the scale of a column that does not vary is 1."""
    spread = values.std(axis=0)
    return {"mean": values.mean(axis=0).tolist(), "scale": np.where(spread > 1e-6, spread, 1.0).tolist()}


@dataclass(frozen=True)
class Vector(Modality):
    """The features that a frozen encoder computed of another kind's items: float32 ``(width,)``, standardised."""

    encoder: str = "projection"

    kind = "vector"

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Collect mean and spread of each feature."""
        return _standard(np.stack(items))

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Stack and standardise."""
        mean, scale = (np.array(fitted[key], dtype=np.float32) for key in ("mean", "scale"))
        return torch.from_numpy((np.stack(items) - mean) / scale)


KINDS: dict[str, type[Modality]] = {kind.kind: kind for kind in (Image, Text, Audio, Table)}
