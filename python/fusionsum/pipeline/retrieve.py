"""Search with a trained model: what it finds in a gallery, as ``retrieved.csv`` and as ``retrieved.html``, one file.

What lives here: the search, in a gallery or among the rows themselves, and its record. What lives elsewhere: the embeddings
(``evaluate.py``), how items are shown (``items.py``), the page (``retrieved.html``, a Jinja template, and ``page.html``
around it).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..search import top_k
from .config import Config
from .evaluate import Condition, outputs
from .fuse import TwoTowers, input_modalities, sides
from .items import shown
from .manifest import Manifest, write_csv
from .preprocess import Gathered, gather_rows
from .report import rendered
from .train import Rows, contained

FOUND = 10  # targets that a prediction lists
SHOWN = 50  # queries on the page


@dataclass(frozen=True, eq=False)
class Retrieved:
    """What `MultimodalPredictor.retrieve` found.

    Attributes
    ----------
    config : Config
    queries : Manifest
        The Q rows asked with.
    gallery : Manifest
        The first row of each of the G distinct targets.
    rows : int
        How many rows the gallery had.
    scores : numpy.ndarray
        ``(Q, k)``, best first.
    found : numpy.ndarray
        ``(Q, k)``: which of the gallery.
    own : numpy.ndarray
        ``(Q,)``: the target of the gallery's row of the query's id, or -1.
    """

    config: Config
    queries: Manifest
    gallery: Manifest
    rows: int
    scores: np.ndarray
    found: np.ndarray
    own: np.ndarray


def search(model: TwoTowers, rows: Rows, gallery: Rows, chosen: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores and the numbers of the k best of a gallery's `chosen` rows, or of all if fewer: (Q, k) each."""
    output = outputs(model, rows, torch.arange(len(rows.labels)), (gallery, torch.from_numpy(chosen)))[Condition()]
    assert output.gallery is not None
    k = min(k, len(output.gallery))
    return top_k(output.values, output.gallery, k, fusion_weights=output.fusion_weights)


def listed(ids: Sequence[str], scores: np.ndarray, found: np.ndarray) -> list[dict[str, Any]]:
    """Return for each query ``found_1``, ``score_1``, ``found_2``, ...: the ids of what was found, and the scores."""
    return [
        {
            key: value
            for place, (score, j) in enumerate(zip(of_query, numbers, strict=True), 1)
            for key, value in ((f"found_{place}", ids[j]), (f"score_{place}", round(float(score), 6)))
        }
        for of_query, numbers in zip(scores, found, strict=True)
    ]


def among(model: TwoTowers, rows: Rows, ids: Sequence[str], k: int = FOUND) -> list[dict[str, Any]]:
    """Return for each row what is found among the distinct targets of the rows themselves, as `listed`."""
    numbers, first = np.unique(rows.labels.numpy(), return_index=True)
    first = first[numbers >= 0]
    if not len(first):
        return [{} for _ in ids]
    return listed([ids[i] for i in first], *search(model, rows, rows, first, k))


def retrieve(
    config: Config,
    model: TwoTowers,
    tensors: Callable[[Gathered], Rows],
    queries: Any,
    gallery: Any,
    k: int = FOUND,
    progress: bool = True,
) -> Retrieved:
    """Find a gallery's best targets for queries: `MultimodalPredictor.retrieve`, whose `tensors` are the model's inputs."""
    target = config.task.target
    asked, given = (
        gather_rows(config, rows, labelled=False, training=False, only=only, progress=progress)
        for rows, only in ((queries, input_modalities(config)), (gallery, target))
    )
    _, first, number = np.unique(given.target_numbers(target), return_index=True, return_inverse=True)
    with contained(config.train.threads):
        scores, found = search(model, tensors(asked), tensors(given), first, k)
    own = dict(zip(given.manifest.column("id"), number.tolist(), strict=True))
    return Retrieved(
        config=config,
        queries=asked.manifest,
        gallery=given.manifest.take(first),
        rows=len(given.manifest),
        scores=scores,
        found=found,
        own=np.array([own.get(name, -1) for name in asked.manifest.column("id")]),
    )


def write_retrieved(folder: str | Path, retrieved: Retrieved) -> None:
    """Write ``retrieved.csv``, a row for each query, and ``retrieved.html``, which shows the first `SHOWN`.

    Parameters
    ----------
    folder : str or pathlib.Path
        Made if it does not exist.
    retrieved : Retrieved
        As `MultimodalPredictor.retrieve` returns it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    queries, gallery, config = retrieved.queries, retrieved.gallery, retrieved.config
    found = listed(gallery.column("id"), retrieved.scores, retrieved.found)
    table = [{"id": name} | row for name, row in zip(queries.column("id"), found, strict=True)]
    write_csv(folder / "retrieved.csv", table)

    count = min(SHOWN, len(queries))
    items = {j: shown(config, gallery, j, config.task.target) for j in np.unique(retrieved.found[:count]).tolist()}
    asked = [shown(config, queries, row, input_modalities(config)) for row in range(count)]
    answers = [
        [
            {"number": j, "item": items[j], "score": f"{score:.3f}", "own": j == retrieved.own[row]}
            for score, j in zip(retrieved.scores[row].tolist(), retrieved.found[row].tolist(), strict=True)
        ]
        for row in range(count)
    ]
    page = rendered(
        "retrieved.html",
        title=f"{config.title}: what is found",
        facts=_facts(retrieved),
        results=list(zip(asked, _first(answers), strict=True)),
        hidden=len(queries) - count,
    )
    (folder / "retrieved.html").write_text(page, encoding="utf-8")


def _first(answers: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Mark the first answer of each item: the page has its picture and sound there, and copies them to the others."""
    seen: set[int] = set()
    for answer in itertools.chain.from_iterable(answers):
        answer["first"] = answer["number"] not in seen
        seen.add(answer["number"])
    return answers


def _facts(retrieved: Retrieved) -> list[tuple[str, str]]:
    query, target = sides(retrieved.config)
    known = retrieved.own >= 0
    hits = (retrieved.found == retrieved.own[:, None]).any(axis=1)[known]
    distinct = len(retrieved.gallery)
    facts = [
        ("task", f"{query} → {target}"),
        ("queries", f"{len(known):,} of {retrieved.queries.name}"),
        ("gallery", f"{distinct:,} different items in {retrieved.rows:,} rows of {retrieved.gallery.name}"),
    ]
    if len(hits):
        k = retrieved.found.shape[1]
        facts.append((f"own item among the first {k}", f"{hits.sum():,} of {len(hits):,} queries ({hits.mean():.1%})"))
    return facts
