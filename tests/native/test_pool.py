"""csrc/cpu/parallel.cpp without Python, under ThreadSanitizer and under AddressSanitizer with its leak check.

What lives elsewhere: the scenes (``pool.cpp``), the same from Python, with torch's own pool (``tests/test_parallel.py``).
"""

from __future__ import annotations

import pytest

from tests.native import build

SCENES = ("nested", "nested in a second caller", "nested in torch's pool", "callers", "forks")


@pytest.mark.parametrize("variant", ["thread", "address"])
@pytest.mark.parametrize("scene", SCENES)
def test_sanitizers_have_nothing_to_say(scene, variant):
    done = build.run("pool", variant, scene)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize(
    ("scene", "variant", "report"), [("race", "thread", "data race"), ("leak", "address", "detected memory leaks")]
)
def test_sanitizers_see_what_is_wrong(scene, variant, report):
    done = build.run("pool", variant, scene)
    assert done.returncode == build.SANITIZER
    assert report in done.stderr
