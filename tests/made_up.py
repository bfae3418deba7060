"""Tiny made-up data for the tests of the pipeline: coloured squares, words, tones and numbers, each of a colour.

What lives here too: reading a page, interrupting a training. What lives elsewhere: the tests,
``test_pipeline_<file>.py`` for each file of `fusionsum.pipeline`.
"""

from __future__ import annotations

import contextlib
import csv
import io
from html.parser import HTMLParser

import numpy as np
import soundfile
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
ROWS = 36
MODALITIES = {
    "image": {"kind": "image", "size": 8, "features": 8},
    "text": {"kind": "text", "length": 12, "features": 8},
    "sound": {"kind": "audio", "seconds": 0.2, "rate": 8000, "mels": 16, "features": 8},
    "size": {"kind": "table", "columns": ["width", "height"], "features": 8},
}


TASKS = {
    "classification": {},
    "regression": {"task": {"kind": "regression"}},
    "retrieval": {"task": {"kind": "retrieval", "target": ["text"], "dim": 8}},
}


def folder(place):
    """Write the files of the rows, and a manifest for each task, ``TASK.csv``; return the folder."""
    given = rows(place)
    write(place / "classification.csv", given)
    write(place / "regression.csv", [row | {"label": row["value"]} for row in given])
    write(place / "retrieval.csv", [row | {"text": row["text"] or f"thing {row['id']}"} for row in given])
    return place


def rows(folder, count=ROWS):
    """Write the files of some rows and return the rows; every fifth has no sound, every seventh no text."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        k = i % len(COLOURS)
        name = list(COLOURS)[k]
        pixels = np.clip(rng.normal(0, 20, (10, 10, 3)) + COLOURS[name], 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        time = np.arange(2000) / 8000
        soundfile.write(folder / f"{i}.wav", 0.3 * np.sin(2 * np.pi * (400 + 700 * k + rng.normal(0, 10)) * time), 8000)
        found.append(
            {
                "id": f"row{i}",
                "split": ["train", "train", "validation", "test"][i // len(COLOURS) % 4],
                "group": f"g{i}",
                "label": name,
                "image": f"{i}.png",
                "text": "" if i % 7 == 0 else f"a {name} thing {i % 4}",
                "sound": "" if i % 5 == 0 else f"{i}.wav",
                "width": str(k + rng.normal(0, 0.1)),
                "height": str(rng.normal()),
                "value": str(10 * k + 5 + rng.normal(0, 0.1)),
            }
        )
    return found


def png(picture, **options):
    """Return the bytes of a picture's file."""
    file = io.BytesIO()
    picture.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def wav(samples, rate):
    """Return the bytes of a sound's file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def flac(samples, rate):
    """Return the bytes of a sound's compressed file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    return file.getvalue()


def write(path, given):
    """Write rows as CSV and return the path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(given[0]))
        writer.writeheader()
        writer.writerows(given)
    return path


def config(folder, **sections):
    """Return a configuration that trains in a moment; `sections` are merged into its own."""
    given = {
        "data": {"manifest": str(folder / "classification.csv"), "cache": str(folder / "cache")},
        "modalities": MODALITIES,
        "fusion": {"layer": "LowRankFusion", "rank": 4},
        "train": {"seeds": 2, "epochs": 3, "batch_size": 6, "learning_rate": 0.01, "patience": 2},
    }
    for name, value in sections.items():
        given[name] = given[name] | value if name in ("data", "modalities", "train") else value
    return given


@contextlib.contextmanager
def interrupted(monkeypatch, train, after):
    """Raise what Ctrl-C does in the step of a training, whose module is `train`, after so many."""
    real, taken = train.step, []

    def step(*arguments):
        taken.append(1)
        if len(taken) > after:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as context:
        context.setattr(train, "step", step)
        yield


class Page(HTMLParser):
    """A page of a run: collects the tags that are open, the text, and what the page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img", "path", "use"):
            self.open.append(tag)
        self.loads += [
            v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))
        ]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
