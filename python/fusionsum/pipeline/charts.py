"""The drawings of the reports, as SVG: text stays text, colours follow the page, and widths are shares of what there is.

What lives here: four kinds of drawing, which know nothing of models, and the file of one. What lives elsewhere: what is
drawn (``report.py``), the colours, light and dark (``charts.css``, which pages include too).

A drawing is as wide as its place. Where positions are percentages, text and dots keep their size on a telephone as on a
wide screen; curves, which cannot be given in percentages, lie in a box that is stretched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from markupsafe import Markup

COLOURS = 8  # of curves in charts.css
LONGEST = 34  # characters of a name
ROW = 40  # pixels: a line of text and, below it, the marks
STYLE = Path(__file__).with_name("charts.css")


@dataclass(frozen=True)
class Strip:
    """A row of `strips`: its name, a text at its right, and marks at values: a bar, thick or thin lines, a dot.

    `certain` tells a filled dot from a hollow one, `ours` the row that is the page's own.
    """

    name: str
    text: str = ""
    bar: tuple[float, float] | None = None
    thick: tuple[float, float] | None = None
    thin: tuple[float, float] | None = None
    dot: float | None = None
    certain: bool = True
    ours: bool = False

    def ends(self) -> list[float]:
        """Return all values of its marks."""
        dot = [] if self.dot is None else [self.dot]
        return [value for ends in (self.bar, self.thick, self.thin, dot) for value in ends or ()]


@dataclass(frozen=True)
class Curves:
    """Numbers along an axis, for `lines`: of each name, at each place of `x`, one value or one a seed; None where none is.

    `bounds` of y, as far as values need them; `note` says below the drawing what there is to know.
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[Sequence[float] | None]]
    note: str = ""
    bounds: tuple[float, float] | None = None
    marked: Sequence[str] = field(default=())


def _cut(name: str, most: int = LONGEST) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _drawing(title: str, height: float, body: Sequence[Markup], width: str = "100%") -> Markup:
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" width="{}" height="{:.0f}">')
    return (
        head.format(width, height)
        + Markup("<title>{}</title>").format(title)
        + Markup("").join(body)
        + Markup("</svg>")
    )


def _text(x: str, y: float, text: str, kind: str = "", anchor: str = "start") -> Markup:
    return Markup('<text x="{}" y="{:.0f}" class="{}" text-anchor="{}">{}</text>').format(x, y, kind, anchor, text)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most` steps.

    Examples
    --------
    >>> ticks(0.03, 1.0)
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def strips(
    title: str, rows: Sequence[Strip], at: Mapping[float, str], low: float, high: float, longest: int = LONGEST
) -> Markup:
    """Draw a row of marks for each name, on one axis.

    Parameters
    ----------
    title : str
        For those who hear the page.
    rows : sequence of Strip
    at : mapping of float to str
        Values to draw a line at through all rows, and their names.
    low, high : float
        The axis, which is made longer where a mark needs it.
    longest : int, optional
        The characters at which names are cut.
    """
    values = [value for row in rows for value in row.ends()] + list(at)
    low, high = min([low, *values]), max([high, *values])
    span = (high - low) or 1.0

    def place(value: float) -> str:
        return f"{1.5 + 97 * (value - low) / span:.2f}%"

    above = 20 if at else 0
    bottom = above + ROW * len(rows)
    body = []
    for value in ticks(low, high):
        edge = (value - low) / span
        anchor = "start" if edge < 0.03 else "end" if edge > 0.97 else "middle"
        body.append(_text(place(value), bottom + 16, f"{value:g}".replace("-", "−"), "soft", anchor))
    for value, name in at.items():
        anchor = "start" if value - low < 0.2 * span else "end" if high - value < 0.2 * span else "middle"
        body.append(_text(place(value), 12, name, "soft", anchor))
    verticals = [("grid", place(value)) for value in ticks(low, high)] + [("level", place(value)) for value in at]
    for k, row in enumerate(rows):
        top = above + ROW * k
        kind = "ours" if row.ours else "other"
        for name, x in verticals:  # beside the marks only: a line through letters makes them hard to read
            mark = Markup('<line class="{}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>')
            body.append(mark.format(name, top + 18, top + ROW - 4, x=x))
        body.append(_text("0", top + 14, _cut(row.name, longest), kind))
        body.append(_text("100%", top + 14, row.text, kind, "end"))
        if row.bar is not None:
            first, last = sorted(row.bar)
            wide = f"{97 * (last - first) / span:.2f}%"
            mark = Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="9"/>')
            body.append(mark.format(kind, place(first), top + 21, wide))
        for ends, weight in ((row.thin, "thin"), (row.thick, "thick")):
            if ends is not None:
                mark = Markup('<line class="{} {}" x1="{}" x2="{}" y1="{y}" y2="{y}"/>')
                body.append(mark.format(weight, kind, place(ends[0]), place(ends[1]), y=top + 26))
        if row.dot is not None:
            mark = Markup('<circle class="dot {} {}" cx="{}" cy="{}" r="5"/>')
            body.append(mark.format(kind, "sure" if row.certain else "unsure", place(row.dot), top + 26))
    return _drawing(title, bottom + 22, body)


def _stroke(k: int) -> str:
    """Return the classes of a curve: once all colours are taken, dashes tell it from the one that shares its colour."""
    return f"c{k % COLOURS}{' dashed' if k >= COLOURS else ''}"


def lines(curves: Curves, height: int = 220) -> Markup:
    """Draw curves: the mean at each place and, of several values, the band from the least to the greatest."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, values in curves.series.items():
        there = [(x, v) for x, v in zip(curves.x, values, strict=True) if v is not None]
        points[name] = [(x, min(v), float(np.mean(v)), max(v)) for x, v in there]
    every = [value for found in points.values() for _, *ends in found for value in ends]
    low, high = min(every), max(every)
    if curves.bounds is not None:
        low, high = curves.bounds
    pad = 0 if curves.bounds is not None else 0.04 * ((high - low) or 1.0)
    low, high = low - pad, high + pad
    left, right = min(curves.x), max(curves.x)
    keys = -(-len(points) // 2)
    top = 30 + 20 * keys
    bottom = top + height

    def across(x: float) -> float:
        return 100 * (x - left) / ((right - left) or 1.0)

    def down(y: float) -> float:
        return 100 * (high - y) / ((high - low) or 1.0)

    body = [_text("0", 14, curves.y_label, "soft")]
    for k, name in enumerate(points):
        x, y = ("0", "50%")[k % 2], 34 + 20 * (k // 2)
        body.append(
            Markup('<svg x="{}" y="{}" width="22" height="8" overflow="visible">').format(x, y - 8)
            + Markup('<line class="curve {}" x1="0" x2="18" y1="4" y2="4"/>').format(_stroke(k))
            + Markup('<text x="24" y="8" class="{}">{}</text></svg>').format(
                "ours" if name in curves.marked else "other", _cut(name, 24)
            )
        )
    for value in ticks(low, high, 4):
        level = top + height * down(value) / 100
        body.append(Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(level))
        body.append(_text("0", level - 3, f"{value:g}".replace("-", "−"), "soft"))
    box = '<svg x="0" y="{}" width="100%" height="{}" viewBox="0 0 100 100" preserveAspectRatio="none" overflow="visible">'
    body.append(Markup(box).format(top, height))
    for k, found in enumerate(points.values()):
        if any(least < greatest for _, least, _, greatest in found):
            band = [(x, least) for x, least, _, _ in found] + [(x, greatest) for x, _, _, greatest in reversed(found)]
            corners = " ".join(f"{across(x):.2f},{down(y):.2f}" for x, y in band)
            body.append(Markup('<polygon class="band c{}" points="{}"/>').format(k % COLOURS, corners))
    for k, found in enumerate(points.values()):
        places = " ".join(f"{across(x):.2f},{down(mean):.2f}" for x, _, mean, _ in found)
        body.append(Markup('<polyline class="curve {}" points="{}"/>').format(_stroke(k), places))
    body.append(Markup("</svg>"))
    for k, found in enumerate(points.values()):
        if len(found) <= 12:  # few enough to show each
            mark = Markup('<circle class="point c{}" cx="{:.2f}%" cy="{:.1f}" r="3.5"/>')
            body += [mark.format(k % COLOURS, across(x), top + height * down(m) / 100) for x, _, m, _ in found]
    for value in ticks(left, right):
        edge = across(value)
        anchor = "start" if edge < 5 else "end" if edge > 95 else "middle"
        body.append(_text(f"{edge:.2f}%", bottom + 16, f"{value:g}", "soft", anchor))
    body.append(_text("100%", bottom + 34, curves.x_label, "soft", "end"))
    return _drawing(curves.title, bottom + 40, body)


def reliability(title: str, count: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray) -> Markup:
    """Draw the accuracy over the confidence of each bin, with the gap to the diagonal; a dot's area is its rows'."""
    side, left, top = 250, 40, 12

    def at(x: float, y: float) -> tuple[float, float]:
        return left + side * x, top + side * (1 - y)

    body = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(value, value)
        line = Markup('<line class="grid" x1="{:.0f}" x2="{:.0f}" y1="{:.0f}" y2="{:.0f}"/>')
        body += [line.format(left, left + side, y, y), line.format(x, x, top, top + side)]
        body.append(_text(str(left - 6), y + 4, f"{value:g}", "soft", "end"))
        body.append(_text(f"{x:.0f}", top + side + 16, f"{value:g}", "soft", "middle"))
    (x1, y1), (x2, y2) = at(0, 0), at(1, 1)
    body.append(Markup('<line class="level" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x1, y1, x2, y2))
    for n, c, a in zip(count, confidence, accuracy, strict=True):
        if n:
            (x, y), (_, even) = at(c, a), at(c, c)
            body.append(
                Markup('<line class="gap" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>').format(x, y, even)
            )
            mark = Markup('<circle class="dot ours sure" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>')
            said = f"{n:,} rows: confidence {c:.3f}, accuracy {a:.3f}"
            body.append(mark.format(x, y, 2.5 + 9 * math.sqrt(n / count.max()), said))
    body.append(_text(str(left + side // 2), top + side + 36, "confidence", "soft", "middle"))
    body.append(_text(str(left + 6), top + 14, "accuracy", "soft"))
    return _drawing(title, top + side + 44, body, width=f"{left + side + 14}")


def matrix(title: str, shares: np.ndarray, names: Sequence[str], numbers: bool = True) -> Markup:
    """Draw a square of shares from 0 to 1, a row and a column for each name; with `numbers`, as percentages too."""
    size = len(names)
    cell = 30 if size <= 12 else 24 if size <= 24 else 16
    short = [_cut(name, 14) for name in names]
    left = 22 + 7 * max(map(len, short))
    body = [_text("0", 12, "true ↓   predicted →", "soft")]
    top = 20 + left - 16
    for k, name in enumerate(short):
        y, x = top + cell * k + cell / 2 + 4, left + cell * k + cell / 2 + 4
        body.append(_text(str(left - 6), y, name, "other", "end"))
        turned = Markup('<text class="other" transform="translate({:.0f} {}) rotate(-90)">{}</text>')
        body.append(turned.format(x, top - 6, name))
    for i, j in np.ndindex(shares.shape):
        share = shares[i, j]
        square = Markup('<rect class="cell" x="{}" y="{}" width="{s}" height="{s}" style="--share:{:.3f}"/>')
        body.append(square.format(left + cell * j, top + cell * i, share, s=cell - 1))
        if numbers and share >= 0.005 and cell >= 24:
            strong = "on" if share > 0.5 else "off"
            body.append(
                _text(
                    str(left + cell * j + cell // 2),
                    top + cell * i + cell / 2 + 4,
                    f"{100 * share:.0f}",
                    strong,
                    "middle",
                )
            )
    return _drawing(title, top + cell * size + 4, body, width=str(left + cell * size + 4))


def write(path: Path, drawing: Markup) -> None:
    """Write a drawing to a file of its own, with its style; as wide as a column of text, where it would fill its place."""
    text = str(drawing).replace('width="100%"', 'width="720"', 1)
    head, rest = text.split(">", 1)
    style = STYLE.read_text(encoding="utf-8")
    path.write_text(f"{head}><style>:root{{background:var(--page)}}{style}</style>{rest}\n", encoding="utf-8")
