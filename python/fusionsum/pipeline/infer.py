"""What a configuration does not say, the data does: the kinds of the columns, whether they hold the splits, the task.

What lives here: the rules by which columns become modalities, and labels a task. Whatever a configuration says is left as
it is. What lives elsewhere: the kinds and their options (``kinds.py``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import soundfile
from PIL import Image as PillowImage

from .config import Config, Task, from_mapping, to_mapping
from .errors import ConfigError, ManifestError, near, unknown
from .kinds import Table, as_array, encoded, is_number
from .manifest import Manifest

LOOKED_AT = 1000  # cells of a column: the first that are there
CATEGORIES = 50  # different values of a column of categories, at most
REPEATED = 5  # times that each of them occurs, on average, at least
WORDS = 3  # in a category, on average, at most
TABLE = "table"  # the name of the modality that all columns of numbers and categories make
NUMBER, CATEGORY = "number", "category"
SOUNDS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}


def complete(config: Config, manifest: Manifest) -> tuple[Config, list[str]]:
    """Return a configuration with everything filled in that the rows to train on can tell.

    Parameters
    ----------
    config : Config
    manifest : Manifest

    Returns
    -------
    config : Config
        Without modalities, every column but ``id``, ``label``, ``split`` and ``group`` becomes one; all columns of numbers
        and categories together become the modality ``table``. ``data.split: auto`` and tables' ``categories`` are resolved.
    notes : list of str
        What was inferred.

    Raises
    ------
    ConfigError, ManifestError
        If no column can be a modality; if there is no column ``split``, but one that is nearly called so.

    Examples
    --------
    >>> from fusionsum.pipeline.sources import read
    >>> rows = [{"label": "x", "comment": f"a text of {i} words", "size": i / 7, "colour": "red"} for i in range(60)]
    >>> config, notes = complete(Config(), read(rows))
    >>> {name: modality.kind for name, modality in config.modalities.items()}
    {'comment': 'text', 'table': 'table'}
    >>> notes[1:]
    ["column 'comment' is text", "column 'size' is a number", "column 'colour' is left out: always 'red'"]
    """
    notes: list[str] = []
    if config.data.split == "auto":
        divided = "split" in manifest.columns
        if not divided:
            used = {column for names in config.columns.values() for column in names}
            if slip := near("split", [column for column in manifest.columns if column not in used]):
                reason = f"has no column 'split', but {slip!r}: rename it, or set data.split: by-seed"
                raise ManifestError([f"{manifest.name}: {reason}"])
            notes.append("no column 'split': each seed draws its own (data.split: by-seed)")
        config = replace(config, data=replace(config.data, split="manifest" if divided else "by-seed"))
    modalities = dict(config.modalities)
    if not modalities:
        given, found = _modalities(manifest)
        notes += found
        if not given:
            raise ConfigError("\n".join(["modalities: none is given, and no column can be one", *found]))
        return from_mapping(to_mapping(config) | {"modalities": given}), notes
    for name, modality in modalities.items():
        if isinstance(modality, Table) and modality.categories is None:
            found = [c for c in modality.columns if c in manifest.columns and not _numeric(_sample(manifest, c))]
            notes += [f"column {column!r} is a category (modalities.{name}.categories)" for column in found]
            modalities[name] = replace(modality, categories=tuple(found))
    return replace(config, modalities=modalities), notes


def task(config: Config, manifest: Manifest) -> tuple[Task, str]:
    """Return the task that rows seem to be for, and why; training takes the configuration's, whatever the rows hold.

    Parameters
    ----------
    config : Config
        With all modalities.
    manifest : Manifest

    Raises
    ------
    ManifestError
        If there are neither labels nor two modalities, of which one can be found by the other.

    Examples
    --------
    >>> from fusionsum.pipeline.sources import read
    >>> rows = read([{"label": f"{i / 7}", "comment": f"a text of {i} words"} for i in range(60)])
    >>> task(complete(Config(), rows)[0], rows)[1]
    'the labels are numbers (task.kind: regression)'
    """
    if "label" not in manifest.columns:
        if len(config.modalities) < 2:
            raise ManifestError([f"{manifest.name}: {unknown('column', 'label', manifest.columns)}"])
        there = {name: np.any([manifest.present(c) for c in of], axis=0) for name, of in config.columns.items()}
        whole = [name for name in there if there[name].all()]  # a row without its target cannot be trained on
        texts = [name for name in whole if config.modalities[name].kind == "text"]
        target = (texts or whole or list(there))[-1]
        return Task("retrieval", (target,)), f"no column 'label': {target} is to be found (task.kind: retrieval)"
    sample = _sample(manifest, "label")
    if any(not isinstance(cell, str) or Task.separator in cell for cell in sample):
        return Task("multilabel"), f"some labels hold {Task.separator!r} (task.kind: multilabel)"
    if sample and _numeric(sample) and not _repeated(manifest.column("label")):
        return Task("regression"), "the labels are numbers (task.kind: regression)"
    return Task(), "the labels are classes (task.kind: classification)"


def _modalities(manifest: Manifest) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the section ``modalities`` of a configuration, and a note for each column."""
    found: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    table: dict[str, list[str]] = {"columns": [], "categories": []}
    for column in manifest.columns:
        if column in ("id", "label", "split", "group"):
            continue
        kind, reason = _kind(manifest, column)
        if not kind:
            notes.append(f"column {column!r} is left out: {reason}")
            continue
        notes.append(f"column {column!r} is {dict.fromkeys((NUMBER, CATEGORY), f'a {kind}').get(kind, kind)}")
        if kind in (NUMBER, CATEGORY):
            table["columns"].append(column)
            table["categories"] += [column] * (kind == CATEGORY)
        else:
            # Modules are registered by these names.
            name = re.sub(r"\W", "_", column)
            found[name if name.isidentifier() else f"_{name}"] = {"kind": kind, "column": column}
    if table["columns"]:
        found[TABLE if TABLE not in found else f"{TABLE}_"] = {"kind": "table", **table}
    return found, notes


def _sample(manifest: Manifest, column: str) -> list[Any]:
    cells, present = manifest.column(column), np.flatnonzero(manifest.present(column))
    return [cells[row] for row in present[:LOOKED_AT].tolist()]


def _kind(manifest: Manifest, column: str) -> tuple[str, str]:
    """Return the kind of a column, or "" and the reason why it is no modality."""
    sample = _sample(manifest, column)
    if not sample:
        return "", "it is empty"
    if not all(isinstance(cell, str) for cell in sample):
        return _of_object(manifest.folder, next(cell for cell in sample if not isinstance(cell, str)))
    suffixes = {PurePath(cell).suffix.lower() for cell in sample}
    for kind, known in (("image", PillowImage.registered_extensions()), ("audio", SOUNDS), ("vector", {".npy"})):
        if suffixes <= set(known):
            return kind, ""
    if all(cell.startswith("[") for cell in sample):
        return "vector", ""
    cells = manifest.column(column)
    if len(set(cells)) == 1:
        return "", f"always {sample[0]!r}"
    if _numeric(sample):
        counted = [list(map(str, range(k, k + len(cells)))) for k in (0, 1)]
        return ("", "it numbers the rows") if list(cells) in counted else (NUMBER, "")
    words = sum(len(cell.split()) for cell in sample) / len(sample)
    return (CATEGORY if _repeated(cells) and words <= WORDS else "text"), ""


def _repeated(cells: Sequence[str]) -> bool:
    """Return whether cells are of few values, each of which occurs often."""
    distinct = len(set(cells))
    return len(cells) >= REPEATED * distinct and distinct <= CATEGORIES


def _numeric(sample: Sequence[Any]) -> bool:
    """Return whether at least half of the cells are numbers: the others are then mistakes."""
    return 2 * sum(isinstance(cell, str) and is_number(cell) for cell in sample) >= len(sample)


def _of_object(folder: Path, given: Any) -> tuple[str, str]:
    """Return the kind of an object in memory."""
    if isinstance(given, PillowImage.Image):
        return "image", ""
    if hasattr(given, "get_all_samples") or (isinstance(given, Mapping) and "array" in given):
        return "audio", ""
    if isinstance(given, tuple) and len(given) == 2 and np.ndim(given[0]):
        return "audio", ""
    try:
        if (content := encoded(folder, given)) is not None:
            return _of_bytes(content), ""
        return ("vector" if as_array(given).ndim == 1 else "image"), ""
    except (OSError, ValueError) as error:
        return "", str(error)


def _of_bytes(content: bytes) -> str:
    """Return the kind of a file's content; raise ValueError if it is neither a picture nor a sound."""
    try:
        PillowImage.open(io.BytesIO(content)).close()
        return "image"
    except PillowImage.DecompressionBombError:  # the rows of such pictures are named when they are read
        return "image"
    except OSError:
        pass
    try:
        soundfile.SoundFile(io.BytesIO(content)).close()
        return "audio"
    except soundfile.LibsndfileError:
        raise ValueError("it holds neither pictures nor sounds") from None
