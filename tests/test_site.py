"""The site: it builds without a warning, no link or anchor leads nowhere, and every public name is documented on it.

What lives elsewhere: the code on the pages (``test_docs.py``). Without the ``docs`` extra the tests are skipped, or fail
where FUSIONSUM_REQUIRE_SITE=1, as in CI. Addresses on the web are not asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from conftest import PACKAGE, missing, source

for package in ("torch", "sphinx", "myst_parser", "furo"):
    if find_spec(package) is None:
        missing(package, "FUSIONSUM_REQUIRE_SITE")

DOCS = source("docs")
MODULES = ("fusionsum", "fusionsum.nn", "fusionsum.distributed", "fusionsum.pipeline")


class Page(HTMLParser):
    """The links, anchors, text and drawings of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.drawings: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Note what a tag links to and is called."""
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found[key] for key in ("href", "src") if found.get(key)]
        if tag == "svg" and "chart" in found.get("class", ""):
            self.drawings.append(found["class"])

    def handle_data(self, data):
        """Collect the text."""
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site by the command of README.md; return its pages by their paths."""
    out = tmp_path_factory.mktemp("site").resolve()
    paths = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in sorted(out.rglob("*.html"))}


def test_there_is_a_page_for_each_source(site):
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in site}


def test_links_and_anchors_lead_somewhere(site):
    checked = 0
    for path, page in site.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if target.partition(":")[0] in ("http", "https", "mailto", "data"):
                continue
            place = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            assert place.exists(), f"{path.name}: {link}"
            if anchor and place in site:
                assert unquote(anchor) in site[place].anchors, f"{path.name}: {link}"
            checked += 1
    assert checked > 1000


def test_nothing_is_loaded_from_the_web(site):
    for path in site:
        for tag in ("<script", "<link"):
            for part in path.read_text(encoding="utf-8").split(tag)[1:]:
                assert "http" not in part.partition(">")[0], f"{path.name}: {tag}{part.partition('>')[0]}"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(site, module):
    anchors = set().union(*(page.anchors for page in site.values()))
    found = importlib.import_module(module)
    for name in found.__all__:
        if callable(getattr(found, name)) or inspect.isclass(getattr(found, name)):
            assert f"{module}.{name}" in anchors


def test_every_key_of_a_configuration_is_documented(site):
    from fusionsum.pipeline import config, kinds

    (page,) = (page for path, page in site.items() if path.stem == "configuration")
    words = set(re.findall(r"[\w-]+", page.text))
    for cls in (config.Config, config.Data, config.Task, config.Train, *kinds.KINDS.values()):
        assert {field.name for field in dataclasses.fields(cls)} | choices(cls) <= words
    assert {"layer", *kinds.KINDS, *config.LAYER_OPTIONS, *config.BASELINES}.union(*config.METRICS.values()) <= words


def choices(cls):
    """Return what the keys of a section may be of which there is a list."""
    hints = typing.get_type_hints(cls).values()
    return {str(one) for hint in hints if typing.get_origin(hint) is typing.Literal for one in typing.get_args(hint)}


def test_drawings_are_part_of_the_pages(site):
    drawn = {path.stem: page.drawings for path, page in site.items()}
    assert len(drawn["formula"]) == 5
    assert len(drawn["performance"]) == 2


def test_the_machine_is_named_where_figures_are(site):
    (performance,) = (page for path, page in site.items() if path.stem == "performance")
    assert performance.text.count("Intel(R) Xeon(R) Processor") >= 3
    result = json.loads((source("bench") / "results" / "bench.json").read_text(encoding="utf-8"))
    threads = result["settings"]["threads"]
    for row in result["rows"]:
        assert (f"({row['name']}: {row['threads']})" in performance.text) == (row["threads"] != threads)
        assert row["work"] in performance.text
    assert "…" not in performance.text


def test_signatures_and_types_say_what_is_known(site):
    for path, page in site.items():
        if path.stem.startswith("api"):
            assert re.findall(r"\w+=[A-Z]{2,}\b|Type:.*\[", page.text) == [], path.name


def test_search_needs_no_server(site):
    """Its index is a script, which a page may load from a disk, and knows what pages say."""
    (index,) = {path.parent / "searchindex.js" for path in site if path.name == "search.html"}
    text = index.read_text(encoding="utf-8")
    assert text.startswith("Search.setIndex(")
    for word in ("infonc", "siglip", "manifest", "mutan"):  # stemmed
        assert word in text
