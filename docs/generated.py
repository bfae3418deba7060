"""What pages take from elsewhere when the site is built, so that no fact is written twice.

    ```{bench} FILE PHASE    the ratios of a committed result of ``python -m bench``, drawn or, with ``table``, listed
    ```{commands}            the options of every ``fusionsum`` command
    ```{names} MODULE        the names that a module makes public
    ```{config} WHAT         the keys of a section of the configuration or of a kind of modality; encoders, metrics, layers

and drawings by file name, which become part of the page: then their colours follow its light or dark theme.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from markupsafe import Markup, escape
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

from fusionsum import __main__ as command_line
from fusionsum.pipeline import config
from fusionsum.pipeline.charts import STYLE, Strip, strips
from fusionsum.pipeline.features import ENCODERS
from fusionsum.pipeline.kinds import KINDS, Modality
from fusionsum.pipeline.pretrained import EXTRACTORS
from fusionsum.pipeline.report import readable

FORWARD, BOTH = "forward", "forward + backward"


def read(path: Path) -> dict[str, Any]:
    """Return a result of the bench."""
    return json.loads(path.read_text(encoding="utf-8"))


def machine(result: dict[str, Any]) -> str:
    """Name the machine and the versions that a result is of."""
    found, versions = result["machine"], result["machine"]["versions"]
    threads = result["settings"]["threads"]
    others = "".join(f" ({row['name']}: {row['threads']})" for row in result["rows"] if row["threads"] != threads)
    return (
        f"{found['cpu']}, {found['cores']} cores, {threads} threads{others}, kernels "
        f"{found['backend'].removeprefix('usable: ')}; torch {versions['torch']}, NumPy {versions['numpy']}, Python "
        f"{versions['python']}. Medians of {result['settings']['pairs']} interleaved pairs"
    )


def ratio(row: dict[str, Any], phase: str, contender: str) -> float | None:
    """Return how many times faster than a contender a phase of a row is."""
    found = row["phases"].get(phase, {}).get("contenders", {}).get(contender)
    return None if found is None else found["ratio"]["median"]


def times(value: float | None) -> str:
    """Write a ratio: two digits where they tell something."""
    return "–" if value is None else f"{value:,.0f}×" if value >= 100 else f"{value:.1f}×"


def figure(drawing: str, caption: str) -> nodes.raw:
    """Make a figure of a drawing."""
    below = Markup("<figcaption>{}</figcaption>").format(caption) if caption else ""
    return nodes.raw("", f'<figure class="drawing">{drawing}{below}</figure>', format="html")


class Bench(SphinxDirective):
    """The ratios of a result: ``FILE PHASE`` draws them against naive torch, ``FILE table`` lists all."""

    required_arguments = 2
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the drawing, or a table, with the machine."""
        name, what = self.arguments
        path = (Path(self.env.doc2path(self.env.docname)).parent / name).resolve()
        self.env.note_dependency(str(path))
        result = read(path)
        if what == "table":
            found = self.parse_text_to_nodes("\n".join(_table(result)))
            for table in found:
                table["classes"].append("figures")
            return found
        rows = [row for row in result["rows"] if ratio(row, what, "naive") is not None]
        marks = [
            Strip(
                f"{row['name']}: {row['work']}" if row["name"] not in row["work"] else row["work"],
                times(ratio(row, what, "naive")),
                bar=(1.0, ratio(row, what, "naive")),
                dot=ratio(row, what, "torch.compile"),
                certain=False,
                ours=ratio(row, what, "naive") > 1.05,
            )
            for row in rows
        ]
        caption = (
            f"{what}: times faster than naive torch (bars) and than torch.compile of it (circles). {machine(result)}."
        )
        return [figure(str(strips(caption, marks, {1.0: "as fast"}, 0, 2, longest=60)), caption)]


def _table(result: dict[str, Any]) -> Iterator[str]:
    """Write a line for each row: both phases' times and ratios, and what memory the last takes beside its results."""
    yield f"{machine(result)}."
    yield ""
    columns = [["row", *(f"{row['name']}: {row['work']}" for row in result["rows"])]]
    for phase, name in ((FORWARD, "forward"), (BOTH, "and back")):
        found = [row["phases"].get(phase) for row in result["rows"]]
        columns.append([name, *("–" if of is None else _duration(of["seconds"]) for of in found)])
        for contender, short in (("naive", "× naive"), ("torch.compile", "× compiled")):
            columns.append([short, *(times(ratio(row, phase, contender)) for row in result["rows"])])
        if phase == FORWARD:
            limits = [ratio(row, phase, "limit") for row in result["rows"]]
            columns.append(["of the limit", *("–" if limit is None else f"{limit:.0%}" for limit in limits)])
    columns.append(["× others", *(_others(row) for row in result["rows"])])
    columns.append(["MiB: ours, naive", *map(_extra, result["rows"])])
    columns = [column for column in columns if {*column[1:]} != {"–"}]
    head, *lines = zip(*columns, strict=True)
    for line in (head, ["---"] * len(head), *lines):
        yield f"| {' | '.join(line)} |"


def _others(row: dict[str, Any]) -> str:
    """List the contenders that are neither naive nor compiled nor our own, with the ratios of both phases."""
    found = [row["phases"].get(phase, {}).get("contenders", {}) for phase in (FORWARD, BOTH)]
    named = dict.fromkeys(
        name for of in found for name in of if not name.startswith(("our ", "naive", "torch.", "limit"))
    )
    ratios = ((name, [times(ratio(row, phase, name)) for phase in (FORWARD, BOTH)]) for name in named)
    return "; ".join(f"{name} {', '.join(x for x in both if x != '–')}" for name, both in ratios) or "–"


def _extra(row: dict[str, Any]) -> str:
    found = list(row["phases"].values())[-1]["extra_bytes"]
    mib = (found[who] / 2**20 for who in ("ours", "naive") if who in found)
    return ", ".join(f"{x:.0f}" if x >= 10 else f"{x:.1f}" for x in mib)


def _duration(seconds: float) -> str:
    unit, name = next(((unit, name) for unit, name in ((1, "s"), (1e-3, "ms")) if seconds >= unit), (1e-6, "µs"))
    return f"{seconds / unit:.3g} {name}"


class Commands(SphinxDirective):
    """The help of every command."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each command."""
        os.environ["COLUMNS"] = "90"  # argparse wraps at the width of the terminal
        (verbs,) = (a for a in command_line._parser()._actions if isinstance(a, argparse._SubParsersAction))
        found: list[nodes.Node] = []
        for name, verb in verbs.choices.items():
            section = nodes.section("", nodes.title("", f"fusionsum {name}"), ids=[f"fusionsum-{name}"])
            section += nodes.literal_block("", verb.format_help(), language="none")
            found.append(section)
        return found


SECTIONS = {"": config.Config, "data": config.Data, "task": config.Task, "train": config.Train}
ATTRIBUTE = re.compile(r"^(\w+(?:, \w+)*) : .*\n((?:    .*(?:\n|$))+)", re.MULTILINE)


def attributes(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each attribute and, as "", of the class: Markdown."""
    found = {}
    for base in reversed(cls.__mro__):
        about, _, section = (
            inspect.cleandoc(base.__doc__ or "").replace("``", "`").partition("Attributes\n----------\n")
        )
        found[""] = about
        for names, text in ATTRIBUTE.findall(section):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def keys(what: str) -> Iterator[tuple[str, str, str]]:
    """Give the name, the default and the meaning of each key of a section, of a kind of modality or of all kinds."""
    cls = SECTIONS.get(what) or (Modality if what == "modality" else KINDS[what])
    about, own = attributes(cls), inspect.get_annotations(cls)
    for field in dataclasses.fields(cls):
        if field.name in own and (what != "modality" or field.name != "encoder"):
            value = getattr(cls(), field.name)
            yield f"`{field.name}`", "–" if dataclasses.is_dataclass(value) else f"`{_yaml(value)}`", about[field.name]


def _yaml(value: Any) -> str:
    """Write a value as in YAML, and so that it may stand in a table."""
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text.replace("|", "\\|")


def _encoders() -> Iterator[tuple[str, str, str]]:
    for kind in KINDS:
        for encoders in (ENCODERS, EXTRACTORS):
            for name, cls in encoders[kind].items():
                yield kind, f"`{name}`", inspect.cleandoc(cls.__doc__ or "").splitlines()[0].replace("`", "")


def _metrics() -> Iterator[tuple[str, str]]:
    for kind, metrics in config.METRICS.items():
        yield kind, ", ".join(f"`{name}` ({readable(name)})" for name in metrics) or "none: R@10"


def _layers() -> Iterator[tuple[str, str]]:
    for name, options in config.LAYER_OPTIONS.items():
        yield f"`{name}`", ", ".join(f"`{key}: {_yaml(value)}`" for key, value in options.items())


TABLES = {
    "encoders": (("kind", "encoder", "what it is"), _encoders),
    "metrics": (("`task.kind`", "`task.metric`, the first is the default (in the report)"), _metrics),
    "layers": (("layer", "options"), _layers),
}


class Keys(SphinxDirective):
    """A table of what a configuration may say."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        what = "".join(self.arguments)
        head, rows = TABLES.get(what) or (("key", "default", "meaning"), lambda: keys(what))
        lines = [head, ["---"] * len(head), *rows()]
        about = attributes(KINDS[what])[""] if what in KINDS else ""
        return self.parse_text_to_nodes("\n".join([about, "", *(f"| {' | '.join(line)} |" for line in lines)]))


class Names(SphinxDirective):
    """The public names of a module, each a link to its documentation, with the first line of it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a list."""
        module = importlib.import_module(self.arguments[0])
        lines = []
        for name in sorted(module.__all__, key=str.lower):
            about = (getattr(module, name).__doc__ or "").strip().splitlines()
            lines.append(f"* {{py:obj}}`{name} <{module.__name__}.{name}>`: {about[0] if about else ''}")
        return [*self.parse_text_to_nodes("\n".join(lines))]


class Inlined(SphinxPostTransform):
    """Put a drawing of pictures/ into the page that shows it."""

    default_priority = 5
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Replace the images."""
        for image in list(self.document.findall(nodes.image)):
            path = Path(self.env.srcdir) / image["uri"]
            if path.suffix != ".svg":
                continue
            text = path.read_text(encoding="utf-8")
            head, _, rest = text.partition("<style>")
            label = f"<title>{escape(image.get('alt', ''))}</title>"
            image.replace_self(figure(head + label + rest.partition("</style>")[2], ""))


def themed(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Let the drawings' colours, which follow the system, follow the theme's switch where it is set."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), re.DOTALL)
    rules = (f'body[data-theme="{theme}"]{{{rule}}}' for theme, rule in (("light", light), ("dark", dark)))
    context["metatags"] = context.get("metatags", "") + f"<style>{' '.join(rules)}</style>"


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx of all this."""
    for name, directive in {"bench": Bench, "commands": Commands, "config": Keys, "names": Names}.items():
        app.add_directive(name, directive)
    app.add_post_transform(Inlined)
    app.connect("html-page-context", themed)
    return {"parallel_read_safe": True}
