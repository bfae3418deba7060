"""Scores of tensors on a GPU (``chunks.py``): how they are cut, of which dtype sides are, errors.

What lives elsewhere: the steps, and all that they find, on an emulated GPU (``cuda/test_steps.py``).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fusionsum import chunks, scores  # noqa: E402

SIZES = (1, 2, 5, 31, 32, 33, 100, 257)


@pytest.mark.parametrize("alike", [False, True])
def test_chunks_cover_all_pairs_once(alike):
    for rows, cols, entries in itertools.product(SIZES, SIZES, (1, 32, 64, 1000, 2**20)):
        seen = np.zeros((rows, cols), int)
        found = chunks.cut(rows, cols, entries, alike=alike)
        for chunk in found:
            seen[chunk.rows, chunk.cols][:, chunk.skip :] += 1
            high, wide = chunk.rows.stop - chunk.rows.start, chunk.cols.stop - chunk.cols.start
            assert high <= found[0].rows.stop
            assert high * wide <= max(entries, chunks._ROUND)
            assert not alike or (wide == found[0].cols.stop and (high <= wide or wide == cols))
        assert (seen == 1).all()


def test_chunks_of_a_large_call_stay_in_the_cache():
    for rows, cols in ((65536, 65536), (4096, 10**6), (1, 10**7), (10**6, 3)):
        found = chunks.cut(rows, cols, chunks.CHUNK_BYTES // 4)
        assert (
            max((c.rows.stop - c.rows.start) * (c.cols.stop - c.cols.start) for c in found) <= chunks.CHUNK_BYTES // 4
        )
        assert len(found) <= 1.3 * (rows * cols / (chunks.CHUNK_BYTES // 4) + 1)


def of(*dtypes, searching=False, **options):
    """Form sides of factors of these dtypes, the last being the keys'."""
    *queries, keys = (torch.ones(3, 4, dtype=dtype) for dtype in dtypes)
    check = scores.check_search if searching else scores.check
    sides = chunks.form(check(tuple(queries), keys, **options))
    assert sides.queries.dtype == sides.keys.dtype
    return sides.queries.dtype, sides.wide


def test_sixteen_bits_are_multiplied_where_nothing_is_rounded_or_all_is_bfloat16():
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    assert of(f16, f16) == (f16, f32)
    assert of(bf16, bf16) == of(bf16, bf16, searching=True) == (bf16, f32)
    assert of(bf16, bf16, bf16) == (bf16, f32)
    assert of(bf16, bf16, fusion_weights=torch.ones(4, dtype=bf16)) == (bf16, f32)
    # What would be rounded is not: a search is exact, and float16 has no range for products.
    assert of(bf16, bf16, bf16, searching=True) == of(f16, f16, f16) == (f32, f32)
    assert of(bf16, bf16, activations="tanh", searching=True) == (f32, f32)
    assert of(bf16, bf16, fusion_weights=torch.ones(4)) == of(bf16, f16) == of(f32, bf16) == (f32, f32)
    assert of(f64, bf16) == of(bf16, bf16, key_bias=torch.ones(3, dtype=f64)) == (f64, f64)


def test_without_kernels_an_error_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(chunks, "load_cuda", lambda: "the kernels are not in this build")
    call = scores.check(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(
        ValueError, match=r"queries: are on cpu, but the kernels are not in this build; or move them to the"
    ):
        chunks.sigmoid_stats(call)


def test_more_keys_than_a_hit_can_number():
    far = torch.empty(1, 1).expand(chunks.MOST_KEYS + 1, 1)
    with pytest.raises(ValueError, match=r"keys: expected at most 4294967294 rows on cpu, got 4294967295"):
        chunks.top_k(scores.check_search(torch.ones(1, 1), far), 1)
