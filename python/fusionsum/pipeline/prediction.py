"""Predictions of one trained model, a part of the rows at a time: memory does not grow with their number.

What lives here: batches of rows and what a model says of them, embeddings, the table of predictions. What lives elsewhere:
reading and decoding (``preprocess.py``), decisions and probabilities (``labels.py``), search (``retrieve.py``).
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import Config
from .evaluate import EVALUATED, Condition, outputs
from .fuse import FusionModel, TwoTowers
from .labels import safe
from .preprocess import STREAMED, Gathered, stream_rows
from .processes import ALONE, here
from .train import Rows, contained

LOG = logging.getLogger("fusionsum")


def streamed(
    config: Config,
    source: Any,
    say: Callable[[Gathered], Any],
    only: Sequence[str] | None = None,
    on_error: str = "raise",
    progress: bool = True,
    size: int | None = STREAMED,
) -> Iterator[tuple[Gathered, Any]]:
    """Give what a model says of the usable rows of each part of a source, all parts on all ranks.

    Parameters
    ----------
    config, source, only, on_error, size
        As in `preprocess.stream_rows`.
    say : callable
        Returns what the model says of the usable rows of a part, an array or list with an entry for each.
    progress : bool, optional
        Whether to show a bar, on a terminal.
    """

    def answered(part: Gathered) -> tuple[Gathered, Any]:
        if not len(part.manifest):
            return part, []
        with contained(config.train.threads), torch.no_grad():
            said = say(part)
        return (replace(part, items={}) if ranks.count > 1 else part), said

    ranks = here() if size is not None else ALONE
    noted: set[str] = set()
    parts = stream_rows(config, source, on_error, size, only, progress and size is None, ranks)
    with tqdm(unit="row", disable=None if progress else True) as bar:
        for part, said in ranks.merged(map(answered, parts)):
            for note in part.notes:
                if note not in noted:
                    LOG.warning(note)
            noted.update(part.notes)
            yield part, said
            bar.update(len(part.every))


def values(model: nn.Module) -> Callable[[Rows], np.ndarray]:
    """Return the function that computes a model's outputs: logits, or standardised values."""
    return lambda rows: outputs(model, rows, torch.arange(len(rows.labels)))[Condition()].values


def embeddings(model: FusionModel | TwoTowers, side: str) -> Callable[[Rows], np.ndarray]:
    """Return the function that embeds rows: one side of retrieval, of unit length, or all encoders' features, joined.

    The features of a modality that a row lacks are 0.
    """
    tower = getattr(model, side) if isinstance(model, TwoTowers) else model
    model.eval()

    def embed(inputs: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        if isinstance(model, TwoTowers):
            return nn.functional.normalize(tower(inputs), dim=-1)
        features, masks = tower.encode(inputs)
        return torch.cat([x * mask[:, None] for x, mask in zip(features, masks, strict=True)], dim=1)

    def of_rows(rows: Rows) -> np.ndarray:
        parts = torch.arange(len(rows.labels)).split(EVALUATED)
        return torch.cat([embed(rows.batch(part)[0]) for part in parts]).numpy()

    return of_rows


def table(
    parts: Iterable[tuple[Gathered, Any]], predicted: Callable[[Any], list[dict[str, Any]]], errors: bool
) -> Iterator[dict[str, Any]]:
    """Give for every row its ``id``, ``label`` and ``split`` if there are any, and what is predicted, in the rows' order.

    With `errors` there is a column ``error``: the reason why a row has no prediction, empty if it has one.
    """
    for part, said in parts:
        found = dict(zip(part.kept.tolist(), predicted(said) if len(said) else [], strict=True))
        reasons: dict[int, str] = {}
        for problem in part.problems:
            reasons.setdefault(problem.row, f"column {problem.column!r}: {problem.reason}")
        given = {name: part.every.column(name) for name in ("id", "label", "split") if name in part.every.columns}
        for i in range(len(part.every)):
            row = {name: column[i] for name, column in given.items()} | found.get(i, {})
            yield row | {"error": reasons.get(i, "")} if errors else row


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> int:
    """Write rows as they come to a CSV file that no spreadsheet takes for formulas; return their number.

    A cell that a row lacks is empty. The file is there once it is whole. Of several ranks the first writes it.
    """
    if here().rank:
        return sum(1 for _ in rows)
    partial, count = path.with_name(f"{path.name}.partial"), 0
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writerow({name: safe(name) for name in columns})
            for row in rows:
                writer.writerow({name: safe(cell) for name, cell in row.items()})
                count += 1
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count
