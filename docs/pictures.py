"""The drawings of the pages: ``python docs/pictures.py`` writes pictures/*.svg, and a test holds the files to it.

What lives here: grids of cells, arrows and words, and the drawings made of them. What lives elsewhere: the colours, light
and dark, which are the reports' (``fusionsum/pipeline/charts.css``); how a page takes a drawing in (``generated.py``).

In every drawing what is strong makes what is strong: the highlighted entries of the operands are those that the
highlighted entry of the output is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from markupsafe import Markup, escape

from fusionsum.pipeline.charts import STYLE

FOLDER = Path(__file__).parent / "pictures"
CELL, WIDTH = 16, 480  # pixels; on a telephone a drawing is two thirds as wide
WEIGHT, FIRST, SECOND, THIRD, OUT = "--c6", "--c0", "--c1", "--c3", "--c2"
TERMS, ROWS = 5, 3


def cells(x: float, y: float, rows: int, columns: int, colour: str, strong: Collection[tuple[int, int]] = ()) -> str:
    """Draw a matrix, of which some entries are strong."""
    return "".join(
        f'<rect x="{x + CELL * j:g}" y="{y + CELL * i:g}" width="{CELL - 1}" height="{CELL - 1}" '
        f'style="fill:var({colour});opacity:{1 if (i, j) in strong else 0.25}"/>'
        for i in range(rows)
        for j in range(columns)
    )


def text(x: float, y: float, words: str, kind: str = "other", anchor: str = "start") -> str:
    """Write words in the ink of text, or `soft`."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, arrow: bool = False) -> str:
    """Draw a line, or an arrow to the right or downwards."""
    drawn = f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" style="stroke:var(--soft);fill:none"/>'
    if arrow:
        tip = f"M{x2:g} {y2:g}l-7 -4v8z" if y1 == y2 else f"M{x2:g} {y2:g}l-4 -7h8z"
        drawn += f'<path d="{tip}" style="fill:var(--soft)"/>'
    return drawn


def summed(x: float, y: float) -> str:
    """Draw the arrow from operands to the output, and say what is summed."""
    return line(x, y, x + 40, y, arrow=True) + text(x + 20, y - 8, "Σ n", "soft", "middle")


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float = 0.25) -> str:
    """Draw a rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
        f'style="fill:var({colour});opacity:{opacity:g}"/>'
    )


def matrix(
    x: float, y: float, rows: int, columns: int, colour: str, strong: Collection[tuple[int, int]], *names: str
) -> str:
    """Draw a matrix, its name and shape above it."""
    name, shape = names
    return text(x, y - 20, name) + text(x, y - 6, shape, "soft") + cells(x, y, rows, columns, colour, strong)


def row(i: int, columns: int = TERMS) -> set[tuple[int, int]]:
    """Return the entries of a row."""
    return {(i, j) for j in range(columns)}


def paired() -> tuple[int, str]:
    """Draw one sum a row."""
    wide, top = CELL * TERMS, 42
    drawn = [
        matrix(0, top + CELL, 1, TERMS, WEIGHT, row(0), "weights", "(n)"),
        matrix(120, top, ROWS, TERMS, FIRST, row(1), "f", "(B, n)"),
        text(120 + wide + 14, top + 30, "×", "other", "middle"),
        matrix(230, top, ROWS, TERMS, SECOND, row(1), "g", "(B, n)"),
        summed(230 + wide + 16, top + 24),
        matrix(380, top, ROWS, 1, OUT, {(1, 0)}, "F", "(B)"),
    ]
    return top + CELL * ROWS + 4, "".join(drawn)


def vector() -> tuple[int, str]:
    """Draw as many sums a row as there are outputs, each of terms of its own."""
    top, outputs, sheets = 50, 4, 3
    drawn = [matrix(0, top, 4, 1, WEIGHT, {(i, 0) for i in range(4)}, "weights", "(n, 1)")]
    for x, colour, name in ((90, FIRST, "f"), (230, SECOND, "g")):
        for sheet in reversed(range(sheets)):  # the sheet behind the first is drawn first
            strong = {(i, 1) for i in range(4)} if sheet == 0 else set()
            at = x + 9 * sheet, top - 9 * sheet + 9
            drawn.append(f'<rect x="{at[0] - 1}" y="{at[1] - 1}" width="66" height="66" style="fill:var(--card)"/>')
            drawn.append(cells(*at, 4, outputs, colour, strong))
        drawn += [text(x, top - 26, name), text(x + 16, top - 26, "(B, n, O)", "soft")]
    drawn += [
        text(200, top + 44, "×", "other", "middle"),
        summed(326, top + 40),
        matrix(384, top + 16, sheets, outputs, OUT, {(0, 1)}, "F", "(B, O)"),
        text(90, top + 92, "a sheet a row b; down it the terms, across it the outputs", "soft"),
    ]
    return top + 100, "".join(drawn)


def mixing() -> tuple[int, str]:
    """Draw the same terms summed for every output, with weights of its own."""
    top, outputs, wide = 42, 4, CELL * TERMS
    drawn = [
        matrix(0, top, ROWS, TERMS, FIRST, row(1), "f", "(B, 1, n)"),
        text(wide + 14, top + 30, "×", "other", "middle"),
        matrix(wide + 30, top, ROWS, TERMS, SECOND, row(1), "g", "(B, 1, n)"),
        text(2 * wide + 44, top + 30, "×", "other", "middle"),
        matrix(2 * wide + 60, top, outputs, TERMS, WEIGHT, row(2), "weights", "(O, n)"),
        summed(316, top + 24),
        matrix(374, top, ROWS, outputs, OUT, {(1, 2)}, "F", "(B, O)"),
    ]
    return top + CELL * outputs + 4, "".join(drawn)


def all_pairs() -> tuple[int, str]:
    """Draw every row of one side with every row of the other."""
    top, keys, wide = 42, 6, CELL * TERMS
    drawn = [
        matrix(0, top + CELL, 1, TERMS, WEIGHT, row(0), "weights", "(n)"),
        matrix(110, top, ROWS, TERMS, FIRST, row(1), "f", "(B, 1, n)"),
        text(110 + wide + 12, top + 30, "×", "other", "middle"),
        matrix(216, top, keys, TERMS, SECOND, row(4), "g", "(C, n)"),
        summed(216 + wide + 10, top + 24),
        matrix(364, top, ROWS, keys, OUT, {(1, 4)}, "F", "(B, C)"),
    ]
    return top + CELL * keys + 4, "".join(drawn)


def candidates() -> tuple[int, str]:
    """Draw every row with rows of its own."""
    top, count, wide, gap = 42, 3, CELL * TERMS, 8
    drawn = [
        matrix(0, top, ROWS, TERMS, FIRST, row(1), "h", "(B, 1, n)"),
        text(wide + 12, top + 30, "×", "other", "middle"),
        matrix(wide + 26, top, ROWS, TERMS, THIRD, row(1), "r", "(B, 1, n)"),
        text(2 * wide + 38, top + 30, "×", "other", "middle"),
        text(212, top - 20, "t"),
        text(212, top - 6, "(B, K, n)", "soft"),
    ]
    for b in range(ROWS):
        drawn.append(cells(212, top + b * (CELL * count + gap), count, TERMS, SECOND, row(2) if b == 1 else ()))
    drawn += [
        summed(302, top + 24),
        matrix(362, top, ROWS, count, OUT, {(1, 2)}, "F", "(B, K)"),
    ]
    return top + ROWS * (CELL * count + gap) - 4, "".join(drawn)


def missing() -> tuple[int, str]:
    """Draw what a sum is without a modality, by either meaning of absence."""
    top, height = 40, 26
    kinds = (("image", FIRST), ("text", SECOND), ("sound", THIRD))
    drawn = [text(100 * m, 14, name) for m, (name, _) in enumerate(kinds)]
    drawn += [text(300, 14, 'absent="one"'), text(405, 14, '"zero"')]
    rows = ((True, True, True), (True, False, True), (True, False, False), (False, False, False))
    letters = "f", "g", "h"
    for k, there in enumerate(rows):
        y = top + 36 * k
        for m, (known, (_, colour)) in enumerate(zip(there, kinds, strict=True)):
            if known:
                drawn += [box(100 * m, y - 14, 80, height, colour, 0.8)]
            else:
                drawn.append(
                    f'<rect x="{100 * m + 0.5}" y="{y - 13.5}" width="79" height="{height - 1}" rx="3" '
                    'style="fill:none;stroke:var(--soft);stroke-dasharray:3 3"/>'
                )
                drawn.append(text(100 * m + 40, y + 4, "absent", "soft", "middle"))
        left = [letter for letter, known in zip(letters, there, strict=True) if known]
        drawn.append(text(300, y + 4, "Σ w" + "".join(f" · {letter}" for letter in left)))
        drawn.append(text(405, y + 4, "Σ w·f·g·h" if all(there) else "0", "other" if all(there) else "soft"))
    return top + 36 * len(rows) - 14, "".join(drawn)


def strips() -> tuple[int, str]:
    """Draw a block of scores, of which a few numbers a row are kept."""
    left, top, side, tall = 108, 56, 176, 128
    drawn = [
        text(0, 16, "queries"),
        text(0, 32, "(B, n)", "soft"),
        box(0, top, 64, tall, FIRST),
        box(0, top + 48, 64, 24, FIRST, 1),
        text(left, 16, "keys"),
        text(left + 36, 16, "(C, n), read block by block", "soft"),
        box(left, 24, side, 20, SECOND),
        box(left + 64, 24, 40, 20, SECOND, 1),
        f'<rect x="{left + 0.5}" y="{top + 0.5}" width="{side - 1}" height="{tall - 1}" '
        'style="fill:none;stroke:var(--soft);stroke-dasharray:3 3"/>',
        box(left + 64, top + 48, 40, 24, OUT, 1),
        text(left + side / 2, top + 92, "scores (B, C): never stored", "soft", "middle"),
        line(72, top + 60, left - 8, top + 60, arrow=True),
        line(left + side + 8, top + 60, left + side + 40, top + 60, arrow=True),
    ]
    kept = ("log-sum-exp", "loss, Γ = ∂L/∂S", "k best so far", "scores above target")
    for k, words in enumerate(kept):
        y = top + 8 + 30 * k
        drawn += [box(left + side + 46, y, 12, 20, OUT, 0.6), text(left + side + 63, y + 14, words, "soft")]
    return top + tall + 4, "".join(drawn)


def tasks() -> tuple[int, str]:
    """Draw the same tasks on one thread and on three, and their sums in one order."""
    drawn, count = [], 6
    for y, threads in ((34, ("--c0",) * 6), (104, ("--c0", "--c1", "--c0", "--c3", "--c1", "--c3"))):
        number = len(set(threads))
        drawn.append(text(0, y - 10, f"{number} thread{'s' if number > 1 else ''}"))
        for k, colour in enumerate(threads):
            drawn.append(box(60 * k, y, 54, 26, colour, 0.7))
            drawn.append(text(60 * k + 27, y + 18, f"{k + 1}", "other", "middle"))
        drawn.append(line(60 * count + 2, y + 13, 60 * count + 34, y + 13, arrow=True))
        drawn.append(text(60 * count + 40, y + 17, "1+2+…+6", "other"))
    drawn.append(text(0, 154, "tasks are cut by the shapes alone; their sums are added in order", "soft"))
    return 162, "".join(drawn)


DRAWINGS: dict[str, Callable[[], tuple[int, str]]] = {
    "paired": paired,
    "vector": vector,
    "mixing": mixing,
    "all_pairs": all_pairs,
    "candidates": candidates,
    "missing": missing,
    "strips": strips,
    "tasks": tasks,
}


def drawings() -> Iterator[tuple[Path, str]]:
    """Yield each drawing's file and what is in it."""
    style = STYLE.read_text(encoding="utf-8")
    for name, draw in DRAWINGS.items():
        height, body = draw()
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart picture" role="img" viewBox="0 0 {WIDTH} {height}" '
            f'style="max-width:{WIDTH}px">'
        )
        yield FOLDER / f"{name}.svg", Markup(f"{head}<style>{style}</style>{body}</svg>\n")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, content in drawings():
        path.write_text(content, encoding="utf-8")
