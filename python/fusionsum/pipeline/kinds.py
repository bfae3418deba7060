"""The kinds of modality: image, text, audio, table and vector, with their options (the configuration's too).

What lives here: for each kind its options, how an item is decoded, and how decoded items become a tensor. What lives
elsewhere: reading the items of a manifest, and the cache (``preprocess.py``); encoders (``features.py``).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import soundfile
import torch
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError
from scipy.signal import resample_poly
from torch import Tensor

from . import files

VERSION = "3"  # of the cached arrays: raise it when a kind decodes the same bytes to another array


LARGE = 1 << 24  # pixels: larger pictures are shrunk before anything else, and decoded one at a time
SPARE = 4  # times the wanted size: what a picture is shrunk to by averaging, before it is resampled
CATEGORIES = 256  # of a column of a table: the rarer ones count as unknown
_large = threading.Lock()


def encoded(folder: Path, given: Any) -> bytes | None:
    """Return the bytes of the file that a cell names or holds; None if it is another object.

    Bytes, or a dict of ``bytes`` or ``path``, as Hugging Face data sets hold files.
    """
    if isinstance(given, Mapping) and given.keys() & {"bytes", "path"} and "array" not in given:
        given = given.get("bytes") or given.get("path") or b""
    if isinstance(given, str):
        return files.content(folder / given)
    return given if isinstance(given, bytes) else None


def as_array(given: Any) -> np.ndarray:
    """Return an array or tensor in memory as a NumPy array."""
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    array = np.asarray(given)
    if array.dtype.kind not in "biuf" or not array.size:
        raise ValueError(f"expected numbers, got {type(given).__name__} of {array.dtype}")
    return array


@dataclass(frozen=True)
class Modality:
    """The options that every kind of modality has, and what a kind defines.

    That is the bytes that identify an item (`content`), their decoding to an array (`decode`), the statistics of the
    training items (`fit`: plain values, kept with the model), and the tensor of some items (`tensor`).

    Attributes
    ----------
    encoder : str
        One of the kind's, a frozen one, or ``package.module:Class``.
    features : int
        How many the encoder gives to the fusion layer.
    column : str
        The manifest's, if its name is not the modality's.
    encoder_options : dict
        Of an encoder of one's own.
    """

    encoder: str = ""
    features: int = 64
    column: str = ""
    encoder_options: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.float32
    limits: ClassVar[dict[str, tuple[float, float]]] = {"features": (1, 65536)}  # least and most
    decoded: ClassVar[tuple[str, ...]] = ()  # the options that `decode` depends on
    slow: ClassVar[bool] = False  # whether decoding is worth a cache and threads
    fixed: ClassVar[bool] = True  # whether all decoded items are of one shape
    scaled: ClassVar[bool] = False  # whether `tensor` is so cheap that batches are made of items when they are needed

    def columns_of(self, name: str) -> tuple[str, ...]:
        """Return the manifest's columns that hold this modality, whose name in the configuration is `name`."""
        return (self.column or name,)

    def content(self, folder: Path, cells: tuple[Any, ...]) -> bytes:
        """Return the item's bytes; raise OSError or ValueError if it cannot be read."""
        raise NotImplementedError

    def decode(self, content: bytes) -> np.ndarray:
        """Return the item as an array; raise OSError or ValueError if it cannot be decoded."""
        raise NotImplementedError

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the statistics of the training items that `tensor` needs."""
        return {}

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Return the items as one tensor, ``(len(items), ...)``."""
        return torch.from_numpy(np.asarray(items))

    def notes(self, items: Sequence[np.ndarray]) -> list[str]:
        """Return what is worth saying of the items."""
        return []

    def nbytes(self) -> int:
        """Return about how many bytes an item takes."""
        return 1024

    def recipe(self) -> str:
        """Return the options that `decode` depends on as a string, part of the cache's key."""
        return f"{VERSION} {self.kind} { {name: getattr(self, name) for name in self.decoded} }"


@dataclass(frozen=True)
class Image(Modality):
    """Pictures, turned as their EXIF says, on white, fitted into a white square; uint8 ``(channels, size, size)``.

    Files, bytes, PIL images, arrays of uint8 or uint16, or of floats in 0..1 or 0..255, ``(H, W)``, ``(H, W, C)`` or
    ``(C, H, W)``. Pictures of 16 or 32 bits are scaled to 8: uint16 by its whole range, others from their least to their
    greatest value, or all from `range`.

    Attributes
    ----------
    size : int
        Pixels of a side.
    channels : int
        3, or 1 for grey.
    range : list of float
        ``[low, high]``, the values of pictures of 16 or 32 bits that become black and white.
    """

    encoder: str = "cnn"
    size: int = 64
    channels: Literal[1, 3] = 3
    range: tuple[float, ...] = ()

    kind = "image"
    dtype = torch.uint8
    limits: ClassVar = Modality.limits | {"size": (1, 4096)}
    decoded = ("size", "channels", "range")
    slow = True

    def content(self, folder: Path, cells: tuple[Any, ...]) -> bytes:
        """Return the file's bytes, or those of a TIFF of the picture in memory."""
        given = cells[0]
        if (content := encoded(folder, given)) is not None:
            return content
        picture = given if isinstance(given, PillowImage.Image) else _picture(given)
        picture, file = ImageOps.exif_transpose(picture), io.BytesIO()
        try:
            picture.save(file, "TIFF")
        except OSError:  # a mode that TIFF does not have
            picture.convert("RGBA").save(file, "TIFF")
        return file.getvalue()

    def decode(self, content: bytes) -> np.ndarray:
        """Decode any format that Pillow reads."""
        picture = self.picture(content)
        white = PillowImage.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        flat = white.convert("L" if self.channels == 1 else "RGB")
        shape = (self.size, self.size)
        fitted = ImageOps.pad(flat, shape, PillowImage.Resampling.BICUBIC, "white") if flat.size != shape else flat
        return np.asarray(fitted).reshape(*shape, self.channels).transpose(2, 0, 1).copy()

    def picture(self, content: bytes) -> PillowImage.Image:
        """Return the picture upright, in RGBA of 8 bits; a large one shrunk to some times `size`."""
        try:
            with PillowImage.open(io.BytesIO(content)) as file:
                with _large if file.width * file.height > LARGE else contextlib.nullcontext():
                    return ImageOps.exif_transpose(self._shrunk(file)).convert("RGBA")
        except UnidentifiedImageError:
            raise ValueError("is no picture of a format that Pillow reads") from None
        except (SyntaxError, PillowImage.DecompressionBombError) as error:  # Pillow raises these for some broken files
            raise ValueError(str(error)) from None

    def _shrunk(self, file: PillowImage.Image) -> PillowImage.Image:
        """Load a picture, with 8 bits a channel; a large one no larger than it takes."""
        large = file.width * file.height > LARGE
        enough = SPARE * self.size
        file.draft("RGB", (enough, enough))  # JPEGs only: a half, a quarter or an eighth of the size is decoded
        file.load()
        deep = file.mode.startswith(("I", "F"))
        factor = max(1, min(max(file.size) // enough, *file.size)) if large else 1
        if not deep and factor == 1:
            return file
        rows = factor * max(1, LARGE // (file.width * factor))  # at a time, for each conversion is a copy
        low, high = self._limits(map(np.asarray, _strips(file, rows)), file.mode) if deep else (0.0, 0.0)
        parts = []
        for strip in _strips(file, rows):
            if deep:
                strip = PillowImage.fromarray(_eight_bits(np.asarray(strip), low, high))
            elif strip.mode in ("P", "PA", "1") or "transparency" in strip.info:
                strip = strip.convert("RGBA")
            parts.append(strip.reduce(factor))
        picture = PillowImage.new(parts[0].mode, (parts[0].width, sum(part.height for part in parts)))
        for k, part in enumerate(parts):
            picture.paste(part, (0, k * parts[0].height))
        picture.getexif().update(file.getexif())
        return picture

    def _limits(self, parts: Iterable[np.ndarray], mode: str) -> tuple[float, ...]:
        """Return the values of 16 or 32 bits that become 0 and 255."""
        if self.range:
            return self.range
        known = (values[np.isfinite(values)] for values in parts)
        extremes = [(float(values.min()), float(values.max())) for values in known if values.size] or [(0.0, 0.0)]
        low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
        for top in (1.0, 255.0) if mode == "F" else (65535.0,):
            if low >= 0 and high <= top:
                return 0.0, top
        return low, high

    def nbytes(self) -> int:
        """Return the bytes of the decoded picture."""
        return self.channels * self.size**2


def _strips(picture: PillowImage.Image, rows: int) -> Iterator[PillowImage.Image]:
    """Give a picture's rows, some at a time."""
    for top in range(0, picture.height, rows):
        yield picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def _eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values of 16 or 32 bits to uint8."""
    scale = 255 / (high - low) if high > low else 0.0
    return np.nan_to_num((values.astype(np.float32) - low) * scale).clip(0, 255).round().astype(np.uint8)


def _picture(given: Any) -> PillowImage.Image:
    """Return an array or tensor as a picture of 8 bits, or of one channel of 16 bits or of floats."""
    array = as_array(given)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"expected a picture of shape (H, W), (H, W, C) or (C, H, W), got {array.shape}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        floats = array.dtype.kind == "f"
        if array.ndim == 2 and (floats or array.dtype == np.uint16):
            array = array.astype(np.float32) if floats else array
        elif floats and 0 <= low and high <= 1:
            array = (array * 255).round().astype(np.uint8)
        elif 0 <= low and high <= 255:
            array = array.round().astype(np.uint8)
        else:
            raise ValueError(f"expected values in 0..255, or floats in 0..1, got {low:g} to {high:g}")
    return PillowImage.fromarray(np.ascontiguousarray(array))


def normalise(text: str) -> str:
    r"""Return the text in Unicode NFKC, with one space for any white space, without control and format characters.

    Examples
    --------
    >>> normalise(" \ufb01re\u00a0\tengine ")
    'fire engine'
    """
    composed = " ".join(unicodedata.normalize("NFKC", text).split())
    if composed.isprintable():
        return composed
    return "".join(c for c in composed if unicodedata.category(c) not in ("Cc", "Cf"))


@dataclass(frozen=True)
class Text(Modality):
    """Texts, as codes of characters or of a Hugging Face tokenizer's tokens; int64, padded with 0 on the left.

    As wide as the longest training text, but at most `length`; how many are cut is said. Code 1 stands for every character
    that no training text has.

    Attributes
    ----------
    length : int
        The most characters, or tokens, of a text; the end of a longer one is cut off.
    lower : bool
        Whether capitals become small letters.
    accents : bool
        Whether diacritics stay.
    tokenizer : str
        The name or folder of a Hugging Face tokenizer (needs ``transformers``); empty: characters.
    """

    encoder: str = "gru"
    length: int = 256
    lower: bool = True
    accents: bool = True
    tokenizer: str = ""

    kind = "text"
    dtype = torch.int64
    fixed = False
    limits: ClassVar = Modality.limits | {"length": (1, 65536)}

    def content(self, folder: Path, cells: tuple[Any, ...]) -> bytes:
        """Return the normalised text in UTF-8."""
        given = cells[0]
        if not isinstance(given, str | bytes):
            raise ValueError(f"expected text, got {type(given).__name__}")
        text = normalise(given if isinstance(given, str) else given.decode())
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

    def notes(self, items: Sequence[np.ndarray]) -> list[str]:
        """Count the texts that are cut."""
        lengths = [len(item) for item in items]
        cut = sum(length > self.length for length in lengths)
        if not cut or self.tokenizer:
            return []
        return [
            f"{cut:,} of {len(items):,} texts are cut to their first {self.length} characters"
            f" (length: {self.length}); the longest has {max(lengths):,}"
        ]

    def _codes(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Sequence[Any]:
        if self.tokenizer:
            return [_tokenizer(self.tokenizer).encode(string(item)) for item in items]
        if not len(items):
            return []
        alphabet = np.array([*map(ord, fitted["alphabet"])], dtype="<u4")  # in order, as `fit` made it
        characters = np.concatenate(items)
        place = np.searchsorted(alphabet, characters).clip(max=len(alphabet) - 1)
        codes = np.where(alphabet[place] == characters, place + 2, 1)
        return np.split(codes, np.cumsum([len(item) for item in items])[:-1])


def string(item: np.ndarray) -> str:
    """Return the text whose code points `Text.decode` returned."""
    return item.astype("<u4").tobytes().decode("utf-32-le")


@cache
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


@dataclass(frozen=True)
class Audio(Modality):
    """Sound: one channel, resampled, its peak at 1, cut or padded to `seconds`; log-mel float32 ``(mels, frames)``.

    Files, bytes, dicts of ``array`` and ``sampling_rate``, pairs of an array and its rate, or arrays at `rate`: ``(N,)``,
    or with channels, of which there are fewer than samples.

    Attributes
    ----------
    seconds : float
        What is kept, from the start; shorter sounds are padded.
    rate : int
        Hz, to which sounds are resampled.
    mels : int
        Bands of the spectrum.
    """

    encoder: str = "cnn"
    seconds: float = 3.0
    rate: int = 16000
    mels: int = 40

    kind = "audio"
    limits: ClassVar = Modality.limits | {"seconds": (0.05, 3600), "rate": (1000, 384000), "mels": (1, 512)}
    decoded = ("seconds", "rate", "mels")
    slow = True
    scaled = True

    def content(self, folder: Path, cells: tuple[Any, ...]) -> bytes:
        """Return the file's bytes, or those of a WAV of the sound in memory."""
        given = cells[0]
        if (content := encoded(folder, given)) is not None:
            return content
        rate: Any = self.rate
        if hasattr(given, "get_all_samples"):  # torchcodec's decoder, as in Hugging Face data sets
            samples = given.get_all_samples()
            given, rate = samples.data, samples.sample_rate
        elif isinstance(given, Mapping) and "array" in given:
            given, rate = given["array"], given.get("sampling_rate", rate)
        elif isinstance(given, tuple) and len(given) == 2:
            given, rate = given
        array, file = as_array(given), io.BytesIO()
        if array.ndim == 2 and array.shape[0] < array.shape[1]:
            array = array.T
        if array.ndim not in (1, 2):
            raise ValueError(f"expected a sound of shape (N,) or (N, channels), got {array.shape}")
        if array.dtype.kind in "iu":
            array = array / np.float32(np.iinfo(array.dtype).max)
        soundfile.write(file, array.astype(np.float32), int(rate), format="WAV", subtype="FLOAT")
        return file.getvalue()

    def waveform(self, content: bytes) -> np.ndarray:
        """Return float32 ``(seconds * rate,)`` of any format that libsndfile reads; no more of the file is decoded."""
        _check_wav(content)
        try:
            with soundfile.SoundFile(io.BytesIO(content)) as file:
                rate, channels = file.samplerate, file.channels
                if not (RATES[0] <= rate <= RATES[1] and channels <= CHANNELS):
                    raise ValueError(f"has {channels} channels at {rate} Hz: expected up to {CHANNELS} at {RATES} Hz")
                # A tenth of a second more than is kept: the filter that resamples looks that far ahead.
                wanted = min(file.frames, math.ceil((self.seconds + 0.1) * rate))
                sound = file.read(wanted, dtype="float32", always_2d=True)
                cut = file.format == "FLAC" and len(sound) < wanted
        except soundfile.LibsndfileError as error:
            raise ValueError(f"is no sound that libsndfile reads: {error.error_string}") from None
        if cut:
            raise ValueError(f"is cut short: {len(sound):,} of {wanted:,} samples")
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
        return _standard(lambda part: part.swapaxes(1, 2).reshape(-1, self.mels), items)

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Stack and standardise each band."""
        mean, scale = (np.array(fitted[key], dtype=np.float32)[:, None] for key in ("mean", "scale"))
        return torch.from_numpy((np.asarray(items) - mean) / scale)

    def nbytes(self) -> int:
        """Return the bytes of the waveform."""
        return round(4 * self.seconds * self.rate)


RATES = (100, 768000)  # Hz: a filter that resamples others is out of all proportion
CHANNELS = 64


def _check_wav(content: bytes) -> None:
    """Raise ValueError for a WAV file with less sound than it says: libsndfile takes what is there, without a word."""
    place = 12
    while content[:4] == b"RIFF" and content[8:12] == b"WAVE" and place + 8 <= len(content):
        name, size = content[place : place + 4], int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8
        if name == b"data":
            there = len(content) - place
            if there < size < 0xFFFFFFFF:  # which is what a program writes that does not know the length yet
                raise ValueError(f"is cut short: {there:,} of {size:,} bytes of sound")
            return
        place += size + size % 2


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
    """Numbers and categories of one column or several (`columns`): float32 ``(width,)``.

    A number is standardised; where training rows lack it, it is 0, the mean, and a further entry is 1. A category, of the
    columns in `categories`, is one entry for each value that training has, all 0 for another.

    Attributes
    ----------
    columns : list of str
        The manifest's, where they are several.
    categories : list of str
        Those of the columns that hold categories; without it, columns of which most cells are no numbers.
    """

    encoder: str = "mlp"
    columns: tuple[str, ...] = ()
    categories: tuple[str, ...] | None = None

    kind = "table"
    fixed = False

    def columns_of(self, name: str) -> tuple[str, ...]:
        """Return the configured columns."""
        return self.columns or super().columns_of(name)

    def content(self, folder: Path, cells: tuple[Any, ...]) -> bytes:
        """Return the cells as JSON."""
        for column, given in zip(self.columns, cells, strict=True):
            if not isinstance(given, str):
                raise ValueError(f"column {column!r}: expected a number or a category, got {type(given).__name__}")
            if given and column not in (self.categories or ()) and not is_number(given):
                raise ValueError(f"column {column!r}: expected a finite number, got {given!r}")
        return json.dumps(cells).encode()

    def decode(self, content: bytes) -> np.ndarray:
        """Return the cells, text."""
        return np.array(json.loads(content))

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Collect mean and spread of each column of numbers, and the values of each column of categories."""
        fitted = []
        for column, cells in zip(self.columns, np.stack(items).T, strict=True):
            if column in (self.categories or ()):
                values, counts = np.unique(_categories(cells), return_counts=True)
                kept = np.sort(values[np.argsort(-counts, kind="stable")[:CATEGORIES]])
                fitted.append({"values": kept.tolist()})
            else:
                numbers = _numbers(cells)
                known = numbers[~np.isnan(numbers)]
                spread = float(known.std()) if len(known) else 0.0
                mean = float(known.mean()) if len(known) else 0.0
                fitted.append(
                    {"mean": mean, "scale": spread if spread > 1e-6 else 1.0, "gaps": len(known) < len(cells)}
                )
        return {"columns": fitted}

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Standardise the numbers, and code the categories."""
        parts = []
        for cells, column in zip(np.stack(items).T, fitted["columns"], strict=True):
            if "values" in column:
                parts.append(_categories(cells)[:, None] == np.array(column["values"]))
                continue
            numbers = _numbers(cells)
            missing = np.isnan(numbers)
            parts.append(np.where(missing, 0, (numbers - column["mean"]) / column["scale"])[:, None])
            if column["gaps"]:
                parts.append(missing[:, None])
        return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))


def is_number(text: str) -> bool:
    """Return whether a text is a finite number of float32's range."""
    try:
        return abs(float(text)) <= float(np.finfo(np.float32).max)
    except ValueError:
        return False


def _numbers(cells: np.ndarray) -> np.ndarray:
    return np.where(cells == "", "nan", cells).astype(np.float64)


def _categories(cells: np.ndarray) -> np.ndarray:
    """Return categories with whole numbers written as such: a column with gaps of a DataFrame holds 3.0 for 3."""
    return np.array([x[:-2] if x.endswith(".0") and is_number(x) else x for x in cells.tolist()])


def _standard(flat: Callable[[np.ndarray], np.ndarray], items: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return mean and standard deviation of each column of `flat` items, some items at a time.

    The scale of a column that does not vary is 1.
    """
    parts = [slice(k, k + 256) for k in range(0, len(items), 256)]

    def mean(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        sums = [(x.sum(axis=0), len(x)) for x in (of(flat(np.asarray(items[p])).astype(np.float64)) for p in parts)]
        return np.sum([s for s, _ in sums], axis=0) / sum(n for _, n in sums)

    centre = mean(lambda x: x)
    spread = np.sqrt(mean(lambda x: (x - centre) ** 2))
    return {"mean": centre.tolist(), "scale": np.where(spread > 1e-6, spread, 1.0).tolist()}


@dataclass(frozen=True)
class Vector(Modality):
    """Features that another program, or a frozen encoder, computed: float32 ``(width,)``, standardised.

    Arrays, tensors, lists, ``.npy`` files, or lists in JSON.
    """

    encoder: str = "projection"

    kind = "vector"
    scaled = True

    def content(self, folder: Path, cells: tuple[Any, ...]) -> bytes:
        """Return the numbers as float32."""
        given = cells[0]
        if isinstance(given, str) and given.startswith("["):
            given = json.loads(given)
        elif (content := encoded(folder, given)) is not None:
            given = np.load(io.BytesIO(content), allow_pickle=False)
        array = as_array(given).astype(np.float32)
        if array.ndim != 1 or not np.isfinite(array).all():
            raise ValueError(f"expected a list of finite numbers, got an array of shape {array.shape}")
        return array.tobytes()

    def decode(self, content: bytes) -> np.ndarray:
        """Return float32 numbers."""
        return np.frombuffer(content, dtype=np.float32)

    def fit(self, items: Sequence[np.ndarray]) -> dict[str, Any]:
        """Collect mean and spread of each feature."""
        return _standard(lambda part: part, items)

    def tensor(self, items: Sequence[np.ndarray], fitted: dict[str, Any]) -> Tensor:
        """Stack and standardise."""
        mean, scale = (np.array(fitted[key], dtype=np.float32) for key in ("mean", "scale"))
        return torch.from_numpy((np.asarray(items) - mean) / scale)


KINDS: dict[str, type[Modality]] = {kind.kind: kind for kind in (Image, Text, Audio, Table, Vector)}
