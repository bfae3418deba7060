"""Step 1: the files and texts that a manifest names become uniform tensors.

What lives here: the kinds of modality with their options (the configuration's too), how each kind is decoded, the cache
by content, and columns: the distinct items of a modality and which row has which. What lives elsewhere: the manifest
and its checks (``manifest.py``), encoders (``features.py``), the frozen ones (``pretrained.py``).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from tqdm import tqdm

from .manifest import Manifest, ManifestError

CHUNK = 64  # items that are decoded, encoded and stored at a time
VERSION = "1"  # of everything that is cached: raise it when an item would come out different


@dataclass(frozen=True)
class Modality:
    """What every kind of modality has: its encoder, the number of features that it gives, its column.

    A kind says what identifies an item (`content`), how one is decoded (`decode`), what is learned from the training
    items (`fit`: plain values, kept with the model), and the tensor of the items given that (`tensor`).
    """

    encoder: str = ""
    features: int = 64
    column: str = ""

    kind: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.float32
    sizes: ClassVar[tuple[str, ...]] = ("features",)

    def columns_of(self, name: str) -> tuple[str, ...]:
        """Return the manifest's columns that hold this modality; `name` is its own."""
        return (self.column or name,)

    def content(self, folder: Path, cells: tuple[str, ...]) -> bytes:
        """Return the bytes that the item is made of: a file's, its name relative to the manifest's folder."""
        return (folder / cells[0]).read_bytes()

    def decode(self, content: bytes) -> np.ndarray:
        """Return the item as an array; raise OSError or ValueError if it cannot be decoded."""
        raise NotImplementedError

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Learn what `tensor` needs to know from the training items."""
        return {}

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Return the items as one tensor, ``(len(items), ...)``."""
        return torch.from_numpy(np.stack(items))

    def recipe(self) -> str:
        """Name what `decode` depends on, for the cache."""
        return f"{VERSION} {replace(self, encoder='', features=1, column='')!r}"


@dataclass(frozen=True)
class Image(Modality):
    """Pictures, turned as EXIF says, on white, fitted into a white square; uint8 ``(channels, size, size)``."""

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
        except (SyntaxError, PillowImage.DecompressionBombError) as error:  # what Pillow raises for some broken files
            raise ValueError(str(error)) from None
        white = PillowImage.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        flat = white.convert("L" if self.channels == 1 else "RGB")
        shape = (self.size, self.size)
        fitted = ImageOps.pad(flat, shape, PillowImage.Resampling.BICUBIC, "white") if flat.size != shape else flat
        return np.asarray(fitted).reshape(*shape, self.channels).transpose(2, 0, 1).copy()


def normalise(text: str) -> str:
    r"""Write the same text in the same way: Unicode NFKC, one space for any white space, nothing that is not printed.

    Examples
    --------
    >>> normalise(" \ufb01re\u00a0\tengine ")
    'fire engine'
    """
    composed = " ".join(unicodedata.normalize("NFKC", text).split())
    return "".join(c for c in composed if unicodedata.category(c) not in ("Cc", "Cf"))


@dataclass(frozen=True)
class Text(Modality):
    """Texts, as codes of characters or of a Hugging Face tokenizer's; int64, padded with 0 on the left.

    As wide as the longest training text, but at most `length`; what is beyond is cut off. Code 1 is any character that no
    training text has. `lower` and `accents` say whether case and diacritics count.
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
        """Return the normalised text itself."""
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
    """Return the text of code points, what `Text.decode` undoes."""
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
    """Return mean and standard deviation of each column; what does not vary is not scaled."""
    spread = values.std(axis=0)
    return {"mean": values.mean(axis=0).tolist(), "scale": np.where(spread > 1e-6, spread, 1.0).tolist()}


@dataclass(frozen=True)
class Vector(Modality):
    """What a frozen encoder made of another kind's items: float32 ``(width,)``, standardised."""

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


@dataclass(frozen=True)
class Items:
    """The distinct items of a modality as arrays, and for each row of the manifest its item, or -1: ``(N,)`` int64."""

    distinct: list[np.ndarray]
    index: np.ndarray

    def of(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the distinct items that some rows have."""
        return [self.distinct[k] for k in np.unique(self.index[rows]) if k >= 0]


@dataclass(frozen=True)
class Column:
    """The distinct items of a modality as a tensor ``(U, ...)``, and each row's item or -1: ``(N,)`` int64."""

    values: Tensor
    index: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows' items, and whether they are there: a missing one is some other's, or zeros."""
        index = self.index[rows]
        return self.values[index.clamp(min=0)], index >= 0


def fit(name: str, modality: Modality, items: Sequence[np.ndarray]) -> dict[str, Any]:
    """Learn from the training items all that tensors and encoders need to know, their ``shape`` included.

    Raises
    ------
    ValueError
        If there are no items.
    """
    if not items:
        raise ValueError(f"modality {name!r}: no training row has it")
    fitted = modality.fit(items)
    return fitted | {"shape": list(modality.tensor(items[:1], fitted).shape[1:])}


def column(modality: Modality, items: Items, fitted: dict[str, Any]) -> Column:
    """Make the tensor of a modality's items; where no row has one, of one item that is all zeros."""
    if items.distinct:
        values = modality.tensor(items.distinct, fitted)
    else:
        values = torch.zeros(1, *fitted["shape"], dtype=modality.dtype)
    return Column(values, torch.from_numpy(items.index))


class Cache:
    """Arrays by the hash of the content that they were made of and of the recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, recipe: str, content: bytes) -> Path:
        """Return the place of what a recipe makes of a content."""
        digest = hashlib.sha256(recipe.encode() + b"\0" + content).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.npy"

    def store(self, place: Path, array: np.ndarray) -> None:
        """Write so that no reader and no interruption ever sees a part of it."""
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(place)


@dataclass(frozen=True)
class Problem:
    """An item that cannot be used, and why."""

    row: int
    column: str
    reason: str


def gather(
    manifest: Manifest,
    name: str,
    modality: Modality,
    cache: Cache,
    workers: int = 2,
    extractor: Any = None,
    progress: bool = True,
) -> tuple[Items, list[Problem]]:
    """Decode one modality's items, each distinct one once, from the cache where it is there.

    Parameters
    ----------
    manifest, name, modality
        The rows, and which modality of them.
    cache : Cache
        Of decoded items, or with `extractor` of its features.
    workers : int, optional
        Threads that read and decode; Pillow, libsndfile and NumPy let go of the interpreter.
    extractor : pretrained.Extractor, optional
        Makes features of the items; they are then what is gathered.
    progress : bool, optional
        Whether to show a bar.

    Returns
    -------
    Items
    list of Problem
        One for each row whose item is missing from disk, corrupt or empty; its index is -1.
    """
    columns = modality.columns_of(name)
    cells = list(zip(*(manifest.column(c) for c in columns), strict=True))
    recipe = modality.recipe() if extractor is None else f"{extractor.recipe} {modality.recipe()}"
    decode: Callable[[bytes], Any] = modality.decode if extractor is None else extractor.reader(modality)
    folder = manifest.path.parent

    def read(cell: tuple[str, ...]) -> tuple[Path | None, Any, bool]:
        """Return the item's key, the item (or why there is none), and whether it came from the cache."""
        try:
            content = modality.content(folder, cell)
            place = cache.key(recipe, content)
            if place.exists():
                return place, np.load(place, allow_pickle=False), True
            return place, decode(content), False
        except (OSError, ValueError) as error:
            reason = f"no such file: {cell[0]}" if isinstance(error, FileNotFoundError) else f"{cell[0]!r}: {error}"
            return None, reason, False

    wanted = list(dict.fromkeys(cell for cell in cells if any(cell)))
    number_of: dict[tuple[str, ...], int] = {}
    number_at: dict[Path, int] = {}
    reasons: dict[tuple[str, ...], str] = {}
    distinct: list[np.ndarray] = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(wanted), desc=name, disable=not progress) as bar:
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            found = list(pool.map(read, chunk))
            fresh = [k for k, (place, _, cached) in enumerate(found) if place is not None and not cached]
            items: Iterable[np.ndarray] = [found[k][1] for k in fresh]
            made = dict(zip(fresh, extractor.encode(items) if extractor and fresh else items, strict=True))
            for k, (cell, (place, item, _)) in enumerate(zip(chunk, found, strict=True)):
                if place is None:
                    reasons[cell] = item
                    continue
                if k in made:
                    item = made[k]
                    cache.store(place, item)
                if place not in number_at:
                    number_at[place] = len(distinct)
                    distinct.append(item)
                number_of[cell] = number_at[place]
            bar.update(len(chunk))
    index = np.array([number_of.get(cell, -1) for cell in cells], dtype=np.int64)
    where = ", ".join(columns)
    return Items(distinct, index), [Problem(i, where, reasons[c]) for i, c in enumerate(cells) if c in reasons]


def without(manifest: Manifest, problems: Sequence[Problem], on_error: str) -> tuple[Manifest, np.ndarray, list[str]]:
    """Raise for the rows that have problems, or leave them out, as `on_error` says.

    Returns
    -------
    manifest : Manifest
        Without these rows.
    kept : ndarray
        The numbers of the rows that are left.
    messages : list of str
        A line for each problem, with file, line and column.

    Raises
    ------
    ManifestError
        If `on_error` is ``raise`` and there are problems, or if no row is left.
    """
    messages = [f"{manifest.where(p.row, p.column)}: {p.reason}" for p in problems]
    bad = {p.row for p in problems}
    kept = np.array([i for i in range(len(manifest)) if i not in bad], dtype=np.int64)
    if messages and (on_error == "raise" or not len(kept)):
        raise ManifestError(messages)
    return manifest.take(kept), kept, messages
