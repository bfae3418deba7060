"""`fusionsum.pipeline.cache`: what is stored is found; corruption costs no row; the limit; refusal."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest

from conftest import missing

try:
    from fusionsum.pipeline.cache import Cache
except ModuleNotFoundError as error:
    missing(str(error))

ARRAYS = {bytes([k]) * 20: np.full((3, 4), k, dtype=np.float32) for k in range(5)}


def filled(folder):
    with Cache(folder) as cache:
        cache.store("image", ARRAYS)
        cache.remember([("a.png", "1 2 3", b"digest")])
    return folder


def test_what_is_stored_is_found_by_another(tmp_path):
    with Cache(filled(tmp_path)) as cache:
        found = cache.find([*ARRAYS, b"other"])
        assert found.keys() == ARRAYS.keys()
        assert all(np.array_equal(found[key], ARRAYS[key]) and found[key].dtype == np.float32 for key in ARRAYS)
        assert cache.digests({"a.png": "1 2 3"}) == {"a.png": b"digest"}
        assert cache.digests({"a.png": "1 2 4"}) == {}
        assert cache.summary() == [("image", 5, 5 * 48)]
    assert [path.name for path in tmp_path.iterdir()] == ["items.sqlite"]


def test_a_flipped_bit_is_noticed_and_the_array_made_anew(tmp_path):
    database = sqlite3.connect(filled(tmp_path) / "items.sqlite")
    (data,) = database.execute("SELECT data FROM arrays WHERE id = 2").fetchone()
    database.execute("UPDATE arrays SET data = ? WHERE id = 2", (bytes([data[0] ^ 1]) + data[1:],))
    database.commit()
    database.close()
    with Cache(tmp_path) as cache:
        assert cache.find(list(ARRAYS)).keys() == ARRAYS.keys() - {bytes([1]) * 20}
        cache.store("image", ARRAYS)
        assert cache.find(list(ARRAYS)).keys() == ARRAYS.keys()


@pytest.mark.parametrize("content", [b"no database at all, but longer than a header" * 99, b""])
def test_a_file_that_is_no_cache_is_made_anew(tmp_path, content):
    (tmp_path / "items.sqlite").write_bytes(content)
    with Cache(tmp_path) as cache:
        assert cache.find(list(ARRAYS)) == {}
        cache.store("image", ARRAYS)
        assert cache.find(list(ARRAYS)).keys() == ARRAYS.keys() and not cache.trouble


def test_the_least_recently_used_go_when_the_limit_is_reached(tmp_path):
    many = {bytes([k]) * 20: np.zeros(100_000, dtype=np.uint8) for k in range(50)}
    with Cache(tmp_path, limit=2_000_000) as cache:
        cache.store("image", many)
    with Cache(tmp_path, limit=2_000_000) as cache:
        assert cache.size() <= 2_000_000
        left = list(cache.find(list(many)))
    assert sorted(left) == sorted(many)[-len(left) :] and 10 <= len(left) <= 20


def test_a_limit_of_nothing_and_a_folder_that_cannot_be_made(tmp_path):
    with Cache(tmp_path, limit=0) as cache:
        cache.store("image", ARRAYS)
        assert cache.find(list(ARRAYS)) == {} and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("no folder")
    with Cache(tmp_path / "file") as cache:
        cache.store("image", ARRAYS)
        assert cache.find(list(ARRAYS)) == {} and "file" in cache.trouble


def test_clearing(tmp_path):
    cache = Cache(filled(tmp_path))
    assert cache.clear() > 0 and not list(tmp_path.iterdir())
