"""Data sets: ``fusionsum prepare NAME`` makes a folder with manifests and the configurations that go with them.

What lives here: fetching Debian packages (or taking files that are there already), and turning their files into rows.
What lives elsewhere: reading manifests (``manifest.py``) and files (``preprocess.py``). ``docs/pipeline.md`` says what
each data set can and cannot show. No data set is part of this package; their licences are printed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from num2words import num2words
from PIL import Image
from sklearn.datasets import load_digits

from .errors import PrepareError, unknown
from .manifest import write_csv

# digits-sum: languages in Latin script, whose number words are below 22 letters: the GRU's time grows with the letters.
# Each held-out language has a relative among the others, without which no model could read its words.
NUMBERS = range(100)
LANGUAGES = "cs da de en eo es fr is it nl pt ro sl sr sv tr".split()
HELD_OUT_LANGUAGES = "ca no sk".split()
TEST_PAIRS = 4096
# openclipart: folders of mixed subjects, and of pictures without a subject.
NOT_SUBJECTS = ("computer", "shapes", "signs_and_symbols", "special", "unsorted")
MOST_PIXELS = 2**25  # a few clip arts have 170 to 620 million pixels: Pillow takes seconds for one, or refuses it
LEAST = 30  # rows of a class; smaller classes are left out


@dataclass(frozen=True)
class DataSet:
    """How a data set is made: from the files of Debian packages, or of installed Python packages; its licence."""

    make: Callable[[Path, Path], Sequence[str]]
    packages: tuple[str, ...]
    licence: str


def prepare(name: str, out: Path, source: Path | None = None) -> list[Path]:
    """Make a data set's folder and return the configurations in it.

    Parameters
    ----------
    name : str
        One of `DATA_SETS`.
    out : pathlib.Path
        The folder, made if it does not exist.
    source : pathlib.Path, optional
        A folder with the unpacked packages (it holds ``usr/share``), or the ``.deb`` files; without it,
        ``apt-get download`` fetches them.

    Raises
    ------
    PrepareError
        If `name` is unknown, or the files cannot be found or fetched.
    """
    if name not in DATA_SETS:
        raise PrepareError(unknown("data set", name, DATA_SETS))
    chosen = DATA_SETS[name]
    out.mkdir(parents=True, exist_ok=True)
    files = out / "files"
    if chosen.packages:
        unpack(chosen.packages, files, source)
    print(f"{name}: {chosen.licence}")
    for package in chosen.packages:
        print(f"  terms of {package}: {files / 'usr/share/doc' / package / 'copyright'}")
    return [out / config for config in chosen.make(out, files)]


def unpack(packages: Sequence[str], files: Path, source: Path | None) -> None:
    """Unpack Debian packages below a folder, without root; packages that are unpacked there already stay."""
    wanted = [p for p in packages if not (files / "usr/share/doc" / p).exists()]
    if source is not None and (source / "usr/share").exists():
        absent = [p for p in packages if not (source / "usr/share/doc" / p).exists()]
        if absent:
            raise PrepareError(f"{source}: has usr/share, but not {', '.join(absent)}")
        if wanted:
            shutil.copytree(source / "usr/share", files / "usr/share", dirs_exist_ok=True)
        return
    files.mkdir(parents=True, exist_ok=True)
    folder = files if source is None else source
    for package in wanted:
        if source is None:
            _call(["apt-get", "download", package], files)
        archives = sorted(folder.glob(f"{package}_*.deb"))
        if not archives:
            raise PrepareError(f"{folder}: has neither usr/share nor {package}_*.deb")
        _call(["dpkg", "-x", str(archives[-1].resolve()), "."], files)
        if source is None:
            archives[-1].unlink()


def _call(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PrepareError(
            f"{command[0]} is not on this machine: download the packages elsewhere, use --from"
        ) from None
    if done.returncode:
        raise PrepareError(f"{' '.join(command)}: {done.stderr.strip()}")


def _configure(out: Path, name: str, given: Mapping[str, Any]) -> str:
    (out / name).write_text(yaml.safe_dump(dict(given), sort_keys=False), encoding="utf-8")
    return name


# digits-sum ----------------------------------------------------------------------------------------------------------


def spell(number: int, language: str) -> str:
    """Write a number in words, in lower case and without diacritics, in which related languages often differ.

    Examples
    --------
    >>> spell(22, "fr"), spell(22, "sv")
    ('vingt-deux', 'tjugotva')
    """
    folded = unicodedata.normalize("NFKD", num2words(number, lang=language).lower())
    return "".join(c for c in folded if not unicodedata.combining(c))


def digits_sum(out: Path, files: Path, pairs: int = 51200, test_share: float = 0.2) -> Sequence[str]:
    """Pair scans of handwritten digits with written-out numbers; the label is (digit + number) mod 10.

    Inputs are real. The label is constructed, so that neither modality alone, nor any sum of scores of the modalities,
    tells anything about it. Train and test share no item: images are split, words are split, and whole languages are
    held out. A word of several languages counts once, and as unseen if a held-out language has it.
    """
    unseen = {spell(n, language): n for language in HELD_OUT_LANGUAGES for n in NUMBERS}
    known = {spell(n, language): n for language in LANGUAGES for n in NUMBERS}
    words = [(word, n) for word, n in sorted(known.items()) if word not in unseen]
    rng = np.random.default_rng(0)
    digits, (test_images, train_images) = _handwriting(out, rng, [test_share])
    test_words, train_words = np.split(rng.permutation(len(words)), [int(test_share * len(words))])
    parts: list[tuple[str, int, np.ndarray, list[tuple[str, int]]]] = [
        ("train", pairs, train_images, [words[i] for i in train_words]),
        ("unseen words", TEST_PAIRS, test_images, [words[i] for i in test_words]),
        ("unseen languages", TEST_PAIRS, test_images, list(unseen.items())),
    ]
    rows: list[dict[str, Any]] = []
    for split, count, images, texts in parts:
        for i, w in zip(rng.choice(images, count), rng.integers(len(texts), size=count), strict=True):
            word, number = texts[w]
            label = (int(digits[i]) + number) % 10
            rows.append({"id": len(rows), "split": split, "label": label, "image": f"digits/{i}.png", "text": word})
    write_csv(out / "manifest.csv", rows)
    config = {
        "title": "digits-sum: (handwritten digit + number word) mod 10",
        "data": {"test": ["unseen words", "unseen languages"]},
        "modalities": {
            "image": {"kind": "image", "size": 8, "channels": 1, "features": 32},
            "text": {"kind": "text", "length": 24, "features": 32},
        },
        "train": {"seeds": 3, "epochs": 1, "learning_rate": 4e-3, "schedule": "one-cycle", "patience": 0},
    }
    return [_configure(out, "digits-sum.yaml", config)]


def _handwriting(out: Path, rng: np.random.Generator, shares: Sequence[float]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Write scikit-learn's scans; return their digits, and their numbers in parts of these shares and the rest."""
    scans = load_digits()
    (out / "digits").mkdir(exist_ok=True)
    for i, scan in enumerate(scans.images):
        Image.fromarray((255 - scan * 255 / 16).astype(np.uint8)).save(out / "digits" / f"{i}.png")
    ends = (np.cumsum(shares) * len(scans.images)).astype(int)
    return scans.target, np.split(rng.permutation(len(scans.images)), ends)


# digits-rules and digits-dial ------------------------------------------------------------------------------------------

RULES: dict[str, Callable[[int, int], int | str]] = {
    "sum": lambda a, b: (a + b) % 10,
    "equal": lambda a, b: "same" if a == b else "different",
    "product": lambda a, b: a * b,
}
DIALS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
COUNTS = {"test": 4096, "validation": 2048, "train": 16384}  # pairs


def dialled(digit: int, number: int, dial: float) -> int:
    """Return the label of a digit and a number below 100: a share of `dial` of the numbers needs both.

    The numbers below ``100 * dial`` are added, mod 10. Of the others every second ten is the label alone (its units), and
    the rest leaves it to the digit alone: a sum of scores can weigh these right, as the number's scores can outvote
    the digit's or hold back.

    Examples
    --------
    >>> dialled(7, 45, dial=0.5), dialled(7, 55, dial=0.5), dialled(7, 65, dial=0.5)
    (2, 5, 7)
    """
    if number < 100 * dial:
        return (digit + number) % 10
    return number % 10 if number // 10 % 2 else digit


def _pairs(out: Path, seconds: int) -> tuple[np.ndarray, dict[str, list[tuple[int, int]]]]:
    """Write scans; return the digits, and for each split pairs of a scan and another (or one of `seconds`, if not 0)."""
    rng = np.random.default_rng(0)
    digits, parts = _handwriting(out, rng, [0.2, 0.15])
    pairs = {}
    for (split, count), images in zip(COUNTS.items(), parts, strict=True):
        second = rng.integers(seconds, size=count) if seconds else rng.choice(images, count)
        pairs[split] = list(zip(rng.choice(images, count).tolist(), second.tolist(), strict=True))
    return digits, pairs


_SCAN = {"kind": "image", "size": 8, "channels": 1, "features": 32}
_DIGITS_TRAIN = {"seeds": 3, "epochs": 2, "learning_rate": 4e-3, "schedule": "one-cycle", "patience": 0}


def digits_rules(out: Path, files: Path) -> Sequence[str]:
    """Pair two scans of handwritten digits; label them by sum mod 10, by equality, and by product, a number.

    No scan is in two splits. For equality, the second scan of every other pair is drawn among those of the first's digit.
    """
    digits, pairs = _pairs(out, 0)
    rng = np.random.default_rng(1)
    configs = []
    for rule, label in RULES.items():
        rows: list[dict[str, Any]] = []
        for split, of_split in pairs.items():
            scans = np.array([i for i, _ in of_split])
            for k, (i, j) in enumerate(of_split):
                if rule == "equal" and k % 2:
                    j = rng.choice(scans[digits[scans] == digits[i]])
                row = {"id": len(rows), "split": split, "label": label(int(digits[i]), int(digits[j]))}
                rows.append(row | {"left": f"digits/{i}.png", "right": f"digits/{j}.png"})
        write_csv(out / f"{rule}.csv", rows)
        config = {
            "title": f"digits-rules: the {rule} of two handwritten digits".replace("the equal", "whether equal"),
            "data": {"manifest": f"{rule}.csv"},
            "modalities": {"left": _SCAN, "right": _SCAN},
            "task": {"kind": "regression" if rule == "product" else "classification"},
            "train": _DIGITS_TRAIN,
        }
        configs.append(_configure(out, f"{rule}.yaml", config))
    return configs


def digits_dial(out: Path, files: Path) -> Sequence[str]:
    """Pair scans of digits with English number words; `dialled` says how the label follows, for each of `DIALS`.

    No scan is in two splits. Scans and words of a row are the same at every dial.
    """
    digits, pairs = _pairs(out, len(NUMBERS))
    configs = []
    for dial in DIALS:
        rows = [
            {
                "split": split,
                "label": dialled(int(digits[i]), n, dial),
                "image": f"digits/{i}.png",
                "text": spell(n, "en"),
            }
            for split, of_split in pairs.items()
            for i, n in of_split
        ]
        write_csv(out / f"dial-{dial}.csv", [{"id": k} | row for k, row in enumerate(rows)])
        config = {
            "title": f"digits-dial: {dial:.0%} of the rows need a handwritten digit and a number word together",
            "data": {"manifest": f"dial-{dial}.csv"},
            "modalities": {"image": _SCAN, "text": {"kind": "text", "encoder": "ngrams", "length": 24, "features": 32}},
            "train": _DIGITS_TRAIN,
        }
        configs.append(_configure(out, f"dial-{dial}.yaml", config))
    return configs


# openclipart ---------------------------------------------------------------------------------------------------------

_DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
_RDF_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"


def _clipart_metadata(path: Path) -> tuple[str, str, str] | None:
    """Return title, author and keywords of an SVG, or None if it is not well-formed XML."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError:
        return None

    def text(tag: str) -> str:
        return next(("".join(e.itertext()).strip() for e in root.iter(_DUBLIN_CORE + tag)), "")

    subjects = [item.text or "" for subject in root.iter(f"{_DUBLIN_CORE}subject") for item in subject.iter(_RDF_ITEM)]
    return text("title"), text("creator"), " ".join(word.strip() for word in subjects)


def openclipart(out: Path, files: Path) -> Sequence[str]:
    """Rows of clip art: picture, title, keywords; the category is its folder, the group its author."""
    png, svg = files / "usr/share/openclipart/png", files / "usr/share/openclipart/svg"
    rows: list[dict[str, Any]] = []
    seen, malformed = set(), 0
    for picture in sorted(png.rglob("*.png")):
        place = picture.relative_to(png)
        drawing = svg / place.with_suffix(".svg")
        if place.parts[0] in NOT_SUBJECTS or not drawing.exists():
            continue
        found = _clipart_metadata(drawing)
        malformed += found is None
        content = picture.read_bytes()
        digest = hashlib.md5(content, usedforsecurity=False).digest()
        width, height = struct.unpack(">II", content[16:24])  # of PNG's header
        if found is None or not all(found) or digest in seen or width * height > MOST_PIXELS:
            continue
        seen.add(digest)
        title, author, keywords = (" ".join(value.split()) for value in found)
        rows.append(
            {
                "id": place.with_suffix("").as_posix(),
                "group": author,
                "label": place.parts[0],
                "image": picture.relative_to(out).as_posix(),
                "title": title,
                "description": f"{title}: {keywords}",
            }
        )
    rows = _frequent(rows)
    print(
        f"openclipart: {len(rows)} pictures of {len({r['group'] for r in rows})} authors; {malformed} SVG not well-formed"
    )
    write_csv(out / "manifest.csv", rows)
    image = {"kind": "image", "encoder": "efficientnet-lite0"}
    data = {"split": "by-seed"}
    category = {
        "title": "openclipart: category from picture and title, authors disjoint",
        "data": data,
        "modalities": {"image": image, "title": {"kind": "text", "encoder": "minilm"}},
        "train": {"epochs": 60, "learning_rate": 1e-3, "modality_dropout": 0.1},
    }
    retrieval = {
        "title": "openclipart: pictures and descriptions find each other, authors disjoint",
        "data": data,
        "modalities": {"image": image, "text": {"kind": "text", "encoder": "minilm", "column": "description"}},
        "task": {"kind": "retrieval", "target": ["text"], "dim": 128},
        "train": {"epochs": 60, "learning_rate": 1e-3, "batch_size": 128},
    }
    return [_configure(out, "category.yaml", category), _configure(out, "retrieval.yaml", retrieval)]


def _frequent(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    count = Counter(row["label"] for row in rows)
    return [row for row in rows if count[row["label"]] >= LEAST]


# tuxpaint ------------------------------------------------------------------------------------------------------------

_TRANSLATION = re.compile(r"([\w@]+)\.utf8=(.*)")


def _stamps(stamps: Path) -> Iterable[tuple[Path, dict[str, str], dict[str, Path]]]:
    """Yield each stamp's picture, its texts and its spoken descriptions by language."""
    for picture in sorted(stamps.rglob("*.png")):
        caption = picture.with_suffix(".txt")
        if re.search(r"_(mirror|flip)$", picture.stem) or not caption.exists():
            continue
        first, *others = caption.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        texts = {"en": first} | {m[1]: m[2] for line in others if (m := _TRANSLATION.match(line))}
        pattern = re.compile(re.escape(picture.stem) + r"_desc(?:_([A-Za-z_]+))?\.(?:ogg|wav)")
        found = ((pattern.fullmatch(path.name), path) for path in picture.parent.iterdir())
        yield picture, texts, {match.group(1) or "en": path for match, path in found if match}


def tuxpaint(out: Path, files: Path) -> Sequence[str]:
    """Rows of stamps: picture, caption and spoken description in each of some languages; the group is the caption.

    Letters and digits (``symbols``) are left out: with them categories are easy and captions alike.
    """
    stamps = files / "usr/share/tuxpaint/stamps"
    rows = []
    for picture, texts, spoken in _stamps(stamps):
        place = picture.relative_to(stamps)
        caption = texts["en"].strip()
        if place.parts[0] == "symbols" or not caption:
            continue
        row = {"id": place.with_suffix("").as_posix(), "group": caption.lower(), "label": place.parts[0]}
        row |= {"image": picture.relative_to(out).as_posix(), "text": caption}
        row |= {f"text_{language}": texts.get(language, "").strip() for language in SPOKEN if language != "en"}
        row |= {f"speech_{x}": spoken[x].relative_to(out).as_posix() if x in spoken else "" for x in SPOKEN}
        rows.append(row)
    there = ", ".join(f"{x} {sum(bool(row[f'speech_{x}']) for row in rows)}" for x in SPOKEN)
    print(f"tuxpaint: {len(rows)} stamps; with a spoken description: {there}")
    write_csv(out / "manifest.csv", rows)
    write_csv(out / "category.csv", _frequent(rows))
    image = {"kind": "image", "encoder": "efficientnet-lite0"}
    text = {"kind": "text", "encoder": "minilm"}
    speech = {"kind": "audio", "encoder": "speech-embedding"}
    data = {"split": "by-seed"}
    category = {
        "title": "tuxpaint: category from picture, caption and Danish speech (half of it missing)",
        "data": data | {"manifest": "category.csv"},
        "modalities": {"image": image, "text": text, "speech_da": speech},
        "train": {"epochs": 100, "modality_dropout": 0.2},
    }
    retrieval = {
        "title": "tuxpaint: picture and French speech find the captions in English and French",
        "data": data,
        "modalities": {
            "image": image,
            "speech": speech | {"column": "speech_fr"},
            "text": text,
            "french": {"kind": "text", "encoder": "ngrams", "column": "text_fr"},
        },
        "task": {"kind": "retrieval", "target": ["text", "french"], "dim": 64},
        "train": {"epochs": 100, "batch_size": 128, "modality_dropout": 0.2},
    }
    return [_configure(out, "category.yaml", category), _configure(out, "retrieval.yaml", retrieval)]


SPOKEN = ("fr", "ru", "ro", "ca", "bg", "es", "el", "be", "da", "nl", "en")

_DIGITS = "digits of scikit-learn (UCI, E. Alpaydin and C. Kaynak; CC BY 4.0), words of num2words"

DATA_SETS = {
    "digits-sum": DataSet(digits_sum, (), _DIGITS),
    "digits-rules": DataSet(digits_rules, (), _DIGITS),
    "digits-dial": DataSet(digits_dial, (), _DIGITS),
    "openclipart": DataSet(openclipart, ("openclipart-png", "openclipart-svg"), "dedicated to the public domain"),
    "tuxpaint": DataSet(tuxpaint, ("tuxpaint-stamps-default",), "GPL-2 or later: pictures, texts and voices"),
}
