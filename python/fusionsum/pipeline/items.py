"""How the items of a row are shown on a page: pictures as pictures, sound to play, text as text, numbers in a table.

What lives here: their contents for ``items.html``, whose macro writes them into a page. What lives elsewhere: how a model
gets them (``kinds.py``), the pages (``report.py``, ``retrieve.py``).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
from PIL import Image as PillowImage
from PIL import ImageOps

from .config import Config
from .kinds import Audio, Image, Text
from .manifest import Manifest

SIDE = 240  # pixels of a picture on the page, at most
LONGEST = 600  # characters of a text


def shown(config: Config, manifest: Manifest, row: int, modalities: Sequence[str]) -> dict[str, Any]:
    """Return a row's id and the parts that it has: kind, name and content for the page."""
    parts = []
    for name in modalities:
        modality = config.modalities[name]
        columns = modality.columns_of(name)
        cells = [manifest.rows[row][column] for column in columns]
        if not any(cells):
            continue
        path = manifest.path.parent / cells[0]
        content: Any = None
        if isinstance(modality, Image):
            content = _picture(path)
        elif isinstance(modality, Audio):
            content = _sound(path, modality)
        elif isinstance(modality, Text):
            content = cells[0] if len(cells[0]) <= LONGEST else f"{cells[0][:LONGEST]}…"
        else:
            content = [(column, f"{float(cell):.4g}") for column, cell in zip(columns, cells, strict=True)]
        parts.append((modality.kind, name, content))
    return {"id": manifest.rows[row]["id"], "parts": parts}


def _picture(path: Path) -> str:
    with PillowImage.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGBA")
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=85)
    return _address("image/webp", file)


def _sound(path: Path, modality: Audio) -> str:
    """Return the sound as the model hears it: one channel, cut to its seconds, at its rate."""
    file = io.BytesIO()
    soundfile.write(file, modality.waveform(path.read_bytes()), modality.rate, format="FLAC")
    return _address("audio/flac", file)


def _address(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
