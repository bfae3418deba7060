"""How the items of a row are shown on a page: pictures as pictures, sound to play, text as text, numbers in a table.

What lives here: their contents for ``items.html``, whose macro writes them into a page. What lives elsewhere: how a model
gets them (``kinds.py``), the pages (``report.py``, ``retrieve.py``).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import soundfile

from .config import Config
from .kinds import Audio, Image, Table, Text, is_number
from .manifest import Manifest

SIDE = 240  # pixels of a picture on the page, at most
LONGEST = 600  # characters of a text


def shown(config: Config, manifest: Manifest, row: int, modalities: Sequence[str]) -> dict[str, Any]:
    """Return a row's id and the parts that it has: kind, name and content for the page."""
    parts = []
    for name in modalities:
        modality = config.modalities[name]
        columns = modality.columns_of(name)
        if not any(manifest.present(column)[row] for column in columns):
            continue
        cells = tuple(manifest.column(column)[row] for column in columns)
        content: Any = cells[0]
        if isinstance(modality, Image):
            content = _picture(modality.content(manifest.folder, cells), modality)
        elif isinstance(modality, Audio):
            content = _sound(modality.content(manifest.folder, cells), modality)
        elif isinstance(modality, Text):
            content = cells[0] if len(cells[0]) <= LONGEST else f"{cells[0][:LONGEST]}…"
        elif isinstance(modality, Table):
            content = [
                (column, f"{float(cell):.4g}" if is_number(cell) else cell)
                for column, cell in zip(columns, cells, strict=True)
            ]
        parts.append((modality.kind, name, content))
    return {"id": manifest.column("id")[row], "parts": parts}


def _picture(content: bytes, modality: Image) -> str:
    picture, file = replace(modality, size=SIDE).picture(content), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "WEBP", quality=85)
    return _address("image/webp", file)


def _sound(content: bytes, modality: Audio) -> str:
    """Return the sound as the model hears it: one channel, cut to its seconds, at its rate."""
    file = io.BytesIO()
    soundfile.write(file, modality.waveform(content), modality.rate, format="FLAC")
    return _address("audio/flac", file)


def _address(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
