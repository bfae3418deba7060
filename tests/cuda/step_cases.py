"""Calls of scores that between them launch every kernel of csrc/cuda/scores.

What lives elsewhere: random calls and what they should find (``score_cases.py``), the same of sums (``cases.py``), the loop
over chunks (``fusionsum/chunks.py``).
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

import device
from fusionsum import chunks, scores
from tests.cuda import emulation

KERNELS = re.compile(
    r"_ZN9fusionsum4cuda(?:11log_sum_exp|9pair_sums|4rank|5gamma|6select|9leave_out)I\w+|\w+5mergeE\w+"
)
DTYPES = torch.float32, torch.bfloat16, torch.float64  # which there are kernels for
OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "diagonal": lambda rows, cols: {},
    "labels": lambda rows, cols: {"labels": _codes(rows), "key_labels": _codes(cols)},
    "ids": lambda rows, cols: {"exclude": (_codes(rows), _codes(cols))},
    "excluded": lambda rows, cols: {"exclude": torch.rand(rows, cols) < 0.2, "key_bias": torch.randn(cols)},
}
# Rows and columns: less than a tile; tiles with ends; so many columns that a row is cut into segments; so many rows that
# a warp has several of a tile.
_SMALL, _ENDS, _LONG, _TALL = (5, 7), (9, 300), (3, 2100), (4300, 5)
CALLS = [
    *((dtype, option, _SMALL) for dtype in DTYPES for option in OPTIONS),
    *((dtype, option, _ENDS) for dtype in DTYPES[::2] for option in ("labels", "excluded")),
    (torch.bfloat16, "diagonal", _ENDS),
    (torch.float32, "excluded", _LONG),
    (torch.float64, "diagonal", _LONG),
    (torch.float32, "labels", _TALL),
]
PLANTED = [  # what bugs are looked for with
    *((torch.float32, option, _SMALL) for option in OPTIONS),
    (torch.float32, "labels", _ENDS),
    (torch.bfloat16, "diagonal", _ENDS),
    (torch.float32, "ids", (40, 290)),
    (torch.float64, "diagonal", _LONG),
    (torch.float32, "labels", _TALL),
]
FEW = [(torch.float32, "diagonal", _SMALL), (torch.float64, "labels", _SMALL), (torch.bfloat16, "excluded", _ENDS)]


def _codes(count: int) -> torch.Tensor:
    return torch.randint(-4, 5, (count,))


@contextlib.contextmanager
def emulated(path: pathlib.Path, chunk_bytes: int = chunks.CHUNK_BYTES) -> Iterator[emulation.Library]:
    """Send scores of tensors to an emulated build of the CUDA library, in chunks of so many bytes."""
    library, before = emulation.Library(path), chunks.CHUNK_BYTES
    with device.pretending(device.emulated(library.address)):
        chunks.CHUNK_BYTES = chunk_bytes
        try:
            yield library
        finally:
            chunks.CHUNK_BYTES = before


def results(dtype: torch.dtype, option: str, size: tuple[int, int]) -> list[torch.Tensor]:
    """Call all functions; return what they find."""
    torch.manual_seed(0)
    rows, cols = size
    # Of "ids", small integers: many scores are equal.
    queries, keys = (
        torch.randint(-1, 2, (count, 5)).to(dtype) if option == "ids" else torch.randn(count, 5, dtype=dtype)
        for count in size
    )
    call = scores.check(
        queries, keys, logit_scale=torch.tensor(40.0 if size == _TALL else 0.7), **OPTIONS[option](rows, cols)
    ).read()
    of_queries, of_keys = torch.rand(5, rows, dtype=torch.float64), torch.rand(5, cols, dtype=torch.float64)
    found = [
        *chunks.softmax_stats(call, True, True, True),
        *chunks.softmax_stats(call, False, False, False)[:1],
        *chunks.softmax_grad(of_queries, of_keys, True, call, (True,) * 4),
        *chunks.softmax_grad(of_queries, None, False, call, (True, False, False, False))[:1],
        chunks.sigmoid_stats(call),
        *chunks.sigmoid_grad(of_queries[0], call, (True,) * 4),
    ]
    ids = [i for i in (0, 2, 31, 32, 64, 128, 256) if i < cols]  # ends of chunks among them
    exclude = call.exclude if option == "excluded" else [ids[b % 3 :] * 2 for b in range(rows)]
    search = scores.check_search(queries, keys, key_bias=call.key_bias, exclude=exclude).read()
    for k in (0, 3, min(cols, 260)):
        found += chunks.top_k(search, k)
    return [*found, chunks.ranks(search, torch.randint(0, cols, (rows,)))]
