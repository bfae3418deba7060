"""The report of the first run on a GPU: what was predicted beside what was measured, below what passed.

    python -m tests.cuda.report FOLDER          writes FOLDER/report.md

The folder is that of ``on_gpu.sh``: ``summary.txt`` and ``bench/bench.json``, of which either may be missing. What lives
elsewhere: the predictions (``predictions.py``), the measurements (``bench``).
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

PREDICTIONS = pathlib.Path(__file__).with_name("predictions.json")


def beside(predictions: dict[str, Any], bench: dict[str, Any]) -> str:
    """Return the table of all rows that were measured.

    A row that is launched one by one takes at least the time of its launches; one in a CUDA graph need not.
    """
    name = bench["machine"]["gpu"]["name"]
    gpu = next((known for known in predictions["gpus"] if known in name.replace("-", " ").split()), None)
    lines = [f"{name}: " + (f"predictions are for the {gpu} (SXM)." if gpu else "nothing is predicted for it."), ""]
    lines += ["| row | phase | predicted, the GPU | launches | measured | by the longer |", "|---|---|---|---|---|---|"]
    for row in bench["rows"]:
        for phase, found in row["phases"].items():
            predicted, launches, ratio = ["–"] * 3
            of_phase = predictions["rows"].get(row["name"], {}).get(phase)
            if gpu and of_phase:
                seconds, least = of_phase["seconds"][gpu], of_phase["launches"] * predictions["launch"]
                predicted, launches = _time(seconds), f"{of_phase['launches']}: {_time(least)}"
                longer = seconds if row["name"].endswith("graph") else max(seconds, least)
                ratio = f"{found['seconds'] / longer:.2f}×"
            lines.append(f"| {' | '.join([row['name'], phase, predicted, launches, _time(found['seconds']), ratio])} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def report(folder: pathlib.Path) -> str:
    """Return the report's Markdown."""
    summary, bench = folder / "summary.txt", folder / "bench" / "bench.json"
    lines = ["# The CUDA kernels on a GPU", ""]
    lines += ["```", summary.read_text().rstrip(), "```", ""] if summary.exists() else ["No summary.", ""]
    if bench.exists():
        lines += ["## Predicted and measured", "", beside(*(json.loads(x.read_text()) for x in (PREDICTIONS, bench)))]
        lines += [
            "",
            "Predictions leave out latency, and launches are taken to be 2 µs apart (docs/cuda_predictions.md).",
        ]
    else:
        lines.append("Nothing was measured.")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Write the report of a folder."""
    folder = pathlib.Path(arguments[0])
    (folder / "report.md").write_text(report(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
