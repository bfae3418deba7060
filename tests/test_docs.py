"""The pages' code runs: every block of Python in README.md and docs/; commands are parsed, configurations read.

A page is one program: its blocks run in order, in one namespace and an empty folder. A comment before a block tells what is
particular about it:

    <!-- needs: faiss -->       it runs where this package is: a page runs without such blocks, and its section with them
    <!-- runs: test_x.py -->    that test file runs it, among processes (``ranks.samples``)
    <!-- run -->                of a block of shell: its ``fusionsum`` commands run; those of all others are parsed only

The data set that docs/pipeline.md begins with is a tiny made-up one here. Without a package that is not among the tests'
own its blocks are skipped, or fail where FUSIONSUM_REQUIRE_EXAMPLES=1, as in CI. What lives elsewhere: the scripts of
examples/ (``test_examples.py``), the site (``test_site.py``).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import made_up
from conftest import TESTS, missing, source
from fusionsum import __main__ as command_line
from fusionsum.pipeline import config

ROOT = source("docs").parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]+?) -->\n)?^```(?P<language>python|bash|yaml)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of forward mode
UNTRIED = ("autogluon.multimodal",)  # needs torchvision (pyproject.toml), and weights from the web: run nowhere


@dataclass(frozen=True)
class Block:
    """A block of code: its page, line and section, its language, and what the comment before it says."""

    page: Path
    line: int
    section: int  # 0 before the first
    language: str
    mark: str
    code: str

    @property
    def needs(self) -> str:
        """The package without which it cannot run."""
        return self.mark.removeprefix("needs: ") if self.mark.startswith("needs: ") else ""

    def commands(self) -> list[list[str]]:
        """Return the arguments of the ``fusionsum`` commands of a block of shell, also of those that torchrun starts."""
        if self.language != "bash":
            return []
        lines = re.sub(r"\\\n", " ", self.code).splitlines()
        words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
        return [line[line.index("fusionsum") + 1 :] for line in words if "fusionsum" in line]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    text, found = page.read_text(encoding="utf-8"), []
    for m in FENCE.finditer(text):
        before = text[: m.start("code")]
        place = before.count("\n") + 1, before.count("\n## ")
        found.append(Block(page, *place, m["language"], m["mark"] or "", m["code"]))
    return found


def program(page: Path, need: str) -> list[Block]:
    """Return what runs of a page: all that needs nothing; or what comes before its sections, and those with the need."""
    given = [block for block in blocks(page) if not block.mark.startswith("runs: ") and block.needs in ("", need)]
    sections = {block.section for block in given if block.needs == need}
    return [block for block in given if not need or block.section in {0, *sections}]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PROGRAMS = [
    pytest.param(page, need, id=f"{name(page)}{need and f', {need}'}")
    for page in PAGES
    for need in dict.fromkeys(["", *(block.needs for block in blocks(page))])
    if any(block.language == "python" for block in program(page, need))
]


def load_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip be its losses' file, which needs torch only, where torchvision is not there."""
    package = importlib.util.find_spec("open_clip")
    if importlib.util.find_spec("torchvision") is None:
        spec = importlib.util.spec_from_file_location("open_clip", Path(package.origin).with_name("loss.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "open_clip", module)


def is_installed(package: str) -> bool:
    top, _, rest = package.partition(".")
    return importlib.util.find_spec(top) is not None and (not rest or importlib.util.find_spec(package) is not None)


def execute(block: Block, namespace: dict) -> None:
    """Run a block; a traceback names the page and the line."""
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), namespace)
    elif block.mark == "run":
        for arguments in block.commands():
            assert command_line.main(arguments) == 0, f"{name(block.page)}:{block.line}: {shlex.join(arguments)}"


def stand_in(folder: Path) -> None:
    """Write what is called data/tuxpaint, and rows to predict."""
    place = folder / "data" / "tuxpaint"
    place.mkdir(parents=True)
    made_up.folder(place)
    (place / "classification.csv").rename(place / "category.csv")
    train = {"seeds": 1, "epochs": 1}
    config = {"data": {"manifest": "category.csv"}, "modalities": made_up.MODALITIES, "train": train, "baselines": []}
    (place / "category.yaml").write_text(json.dumps(config))
    lines = (place / "category.csv").read_text().replace("row", "new").splitlines(keepends=True)
    (folder / "new.csv").write_text("".join(lines[:5]))
    for file in [*place.glob("*.png"), *place.glob("*.wav")]:
        (folder / file.name).symlink_to(file)


@pytest.mark.parametrize(("page", "need"), PROGRAMS)
def test_page_runs(page, need, tmp_path, monkeypatch, seed):
    if need and not is_installed(need):
        if need in UNTRIED:
            pytest.skip(f"missing: {need}")
        missing(need, "FUSIONSUM_REQUIRE_EXAMPLES")
    if need == "open_clip":
        load_open_clip(monkeypatch)
    if page.name == "pipeline.md":
        stand_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYSTOW_HOME", str(tmp_path / "pystow"))
    namespace = {"__name__": "__page__"}
    with warnings.catch_warnings():
        if need:
            warnings.simplefilter("ignore")  # what other libraries have to say
        for block in program(page, need):
            execute(block, namespace)


def test_commands_are_parsed():
    found = [(block, arguments) for page in PAGES for block in blocks(page) for arguments in block.commands()]
    assert len(found) > 10
    for block, arguments in found:
        try:
            command_line._parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{name(block.page)}:{block.line}: fusionsum {shlex.join(arguments)}")


def test_commands_of_the_bench_are_parsed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import __main__, layers, rows, scores

    found = [
        line for page in PAGES for line in re.findall(r"python -m bench(?![.\w])([^`\n]*)", page.read_text("utf-8"))
    ]
    assert len(found) > 5
    for line in found:
        options = __main__.parse(line.split())
        assert rows.select(options.rows, (*rows.ROWS, *layers.LAYERS, *scores.SCORES))


def test_configurations_are_read(tmp_path):
    found = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert len(found) > 1
    for block in found:
        path = tmp_path / "config.yaml"
        path.write_text(block.code, encoding="utf-8")
        assert config.load(path).modalities, f"{name(block.page)}:{block.line}"


def test_marks_are_known():
    for page in PAGES:
        for block in blocks(page):
            assert re.fullmatch(r"|run|needs: [\w.]+|runs: test_\w+\.py", block.mark), f"{name(page)}:{block.line}"
            if block.mark.startswith("runs: "):
                assert "samples(__file__)" in (TESTS / block.mark[6:]).read_text(), block.mark


def test_every_fence_is_closed_and_found():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^```(\S*)", text, re.MULTILINE)
        opened, closed = fences[::2], fences[1::2]
        assert not any(closed) and len(opened) == len(closed), name(page)
        assert sum(language in ("python", "bash", "yaml") for language in opened) == len(blocks(page)), name(page)


def test_links_to_files_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
            assert (page.parent / link).exists(), f"{name(page)}: {link}"


def test_the_first_page_lists_all_others():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = re.findall(r"^(?!:)\w+$", "".join(re.findall(r"```{toctree}(.*?)```", text, re.DOTALL)), re.MULTILINE)
    assert len(pages) > 15
    assert [page for page in pages if f"({page}.md)" not in text] == []


def test_drawings_are_those_of_their_program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pictures

    drawn = dict(pictures.drawings())
    assert drawn.keys() == set(pictures.FOLDER.glob("*.svg"))
    for path, content in drawn.items():
        assert path.read_text(encoding="utf-8") == content, f"python docs/pictures.py: {path.name}"
