"""The result as JSON, as a Markdown table with the floors beside the ratios, and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .rows import BOTH, FORWARD

OURS, PALE, THEIRS, GREY = "#1b6ca8", "#8bbbdd", "#d1495b", "#666666"
HEADER = (
    "| # | work | phase | time | vs naive | vs einsum | vs torch.compile | of the limit | other | rate "
    "| extra memory, MiB: ours / naive | error: ours / naive |"
)


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write bench.json, bench.md and bench.png to the folder; return the path of the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    path = folder / "bench.md"
    path.write_text(markdown(result))
    draw(result, folder / "bench.png")
    return path


def _malloc(settings: dict[str, Any]) -> str:
    if not settings["environment"]:
        return "Malloc returns large blocks to the system, its default, which clears their pages at every call."
    return f"Malloc keeps its memory in this process ({', '.join(settings['environment'])} set high)."


def markdown(result: dict[str, Any]) -> str:
    """Return the machine, the method, the table and the contenders that were left out."""
    machine, limits, settings = result["machine"], result["limits"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rates = f"read {limits['read_gb_per_s']:.1f} GB/s, {limits['gflop_per_s']:.0f} GFLOP/s (`torch.mm`)"
    if "fma_gflop_per_s" in limits:
        rates += f", {limits['fma_gflop_per_s']:.0f} (multiply-adds in registers)"
    if "exp_per_s" in limits:
        rates += f", {limits['exp_per_s'] / 1e9:.2f} G exp/s (`torch.exp`)"
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    floors = [floor for row in result["rows"] for floor in row["floors"]]
    others = [f" ({row['name']}: {row['threads']})" for row in result["rows"] if row["threads"] != settings["threads"]]
    lines = [
        "# fusionsum: benchmark",
        "",
        *([_gpu(machine["gpu"]), ""] if "gpu" in machine else []),
        f"{machine['cpu']} ({', '.join(machine['traits'])}), {machine['cores']} cores ({caches}); native module "
        f"{machine['backend']}; torch uses {machine['torch_isa']}. {versions}. Load {machine['load_before'][0]:.2f} "
        f"before, {machine['load_after'][0]:.2f} after.",
        "",
        f"{settings['threads']} threads{''.join(others)}. Limits measured in the same process: {rates}; copy, counting "
        "bytes read and bytes written, is the table's first row.",
        "",
        f"Ratios are the contender's time by ours: the median of {settings['pairs']} interleaved pairs (quartiles), "
        f"then the floor. *Of the limit*: the time in which {settings['limit']}, by ours; where the rate is in GFLOP/s, "
        f"the time of as many {settings['multiplied']}. GB/s count compulsory traffic only, GFLOP/s the matrix products "
        f"that must be formed where no score is kept. {_malloc(settings)} Extra memory is beyond "
        f"inputs, output and gradients, by the peak of {settings['memory']}. Errors are against float64, of the greatest "
        "value. ✓ and ✗ mark floors.",
        "",
        HEADER,
        "|" + "---|" * (HEADER.count("|") - 1),
        _copy_line(limits),
    ]
    for row in result["rows"]:
        for phase in row["phases"]:
            lines.append(_line(row, phase))
    lines += ["", f"Floors reached: {sum(floor['passed'] for floor in floors)} of {len(floors)} measured."]
    reasons = [(row["name"], left_out, why) for row in result["rows"] for left_out, why in row["skipped"].items()]
    lines += ["", *(f"* {name}: no {left_out}: {why}." for name, left_out, why in reasons)]
    return "\n".join(lines) + "\n"


def _gpu(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} multiprocessors, "
        f"{gpu['bytes'] / 2**30:.0f} GiB; driver {gpu['driver']}, torch's CUDA {gpu['cuda']}. The host:"
    )


def _copy_line(limits: dict[str, float]) -> str:
    rate, size = limits["copy_gb_per_s"], limits["bytes"]
    work, time = f"{size / 2**20:.0f} MiB, copied once", _seconds(2 * size / rate / 1e9)
    return "| " + " | ".join(["copy", work, "–", time, *"–––––", f"{rate:.1f} GB/s", "–", "–"]) + " |"


def _line(row: dict[str, Any], phase: str) -> str:
    found = row["phases"][phase]
    others = sorted(found["contenders"].keys() - {"naive", "einsum", "torch.compile", "limit"})
    extra = [_mebibytes(found["extra_bytes"].get(name)) for name in ("ours", "naive")]
    if found["extra_bytes"]["ours"] is not None and row["memory_floor"]:
        passed = found["extra_bytes"]["ours"] <= row["memory_floor"]
        extra[0] += f" ≤ {row['memory_floor'] >> 20} {'✓' if passed else '✗'}"
    error = [_error(found["error"].get(name)) for name in ("ours", "naive")]
    amount = found["bytes"] if row["rate"] == "GB/s" else found["flop"]
    cells = [
        row["name"],
        row["work"],
        phase,
        _seconds(found["seconds"]),
        *(_ratio(row, phase, name) for name in ("naive", "einsum", "torch.compile", "limit")),
        "; ".join(f"{name}: {_ratio(row, phase, name)}" for name in others) or "–",
        f"{amount / found['seconds'] / 1e9:.1f} {row['rate']}",
        " / ".join(extra),
        " / ".join(error),
    ]
    return "| " + " | ".join(cells) + " |"


def _ratio(row: dict[str, Any], phase: str, name: str) -> str:
    if name not in row["phases"][phase]["contenders"]:
        return "–"
    ratio = row["phases"][phase]["contenders"][name]["ratio"]
    floor = next((f for f in row["floors"] if (f["phase"], f["against"]) == (phase, name)), None)
    low, middle, high = ratio["q1"], ratio["median"], ratio["q3"]
    if floor and floor["at_most"]:
        low, middle, high = 1 / high, 1 / middle, 1 / low
    if name == "limit":
        text, unit = f"{middle:.0%} ({low:.0%}, {high:.0%})", ".0%"
    else:
        text, unit = f"{middle:.2f}× ({low:.2f}, {high:.2f})", ".2f"
    if floor:
        sign, mark = "≤" if floor["at_most"] else "≥", "✓" if floor["passed"] else "✗"
        text = f"{text} {sign} {floor['ratio']:{unit}} {mark}"
    return text


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.1f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the roofline, each row under the bandwidth of its own working set, and beside it the ratios with the floors.

    Layers are not in the roofline, for their operations and bytes are counted of the published code, not of ours; nor
    are scores, whose limit is one number, drawn beside their rates.
    """
    rows = result["rows"]
    sums, scores = [row for row in rows if row["roofline"]], [row for row in rows if row["rate"] == "GFLOP/s"]
    panels = [(panel, some) for panel, some in ((_draw_roofline, sums), (_draw_rates, scores)) if some]
    size = (6.5 * (len(panels) + 1), max(6, 0.25 * len(rows)))
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=size, layout="constrained", squeeze=False)
    for at, (panel, some) in enumerate(panels):
        panel(axes[0, at], result["limits"], some)
    _draw_ratios(axes[0, -1], rows[::-1])
    machine, threads = result["machine"], result["settings"]["threads"]
    name = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {threads} threads"
    figure.suptitle(f"fusion_sum on {name}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_roofline(axes: Any, limits: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    peak, roof = limits["gflop_per_s"], limits["read_gb_per_s"]
    low, high = 0.12, 4 * peak / roof
    axes.plot([low, peak / roof, high], [low * roof, peak, peak], color=GREY, lw=1)
    axes.annotate(
        f"memory {roof:.0f} GB/s",
        (peak / roof / 8, peak / 8),
        (-8, 8),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )
    axes.annotate(
        f"torch.mm {peak:.0f} GFLOP/s", (high, peak), (-4, 4), textcoords="offset points", ha="right", color=GREY
    )
    for i, (row, x) in enumerate(zip(rows, _apart([_intensity(row) for row in rows]), strict=True)):
        found = row["phases"][FORWARD]
        ours, naive = (found["flop"] / s / 1e9 for s in (found["seconds"], found["contenders"]["naive"]["seconds"]))
        axes.plot([x, x], [naive, ours], color=GREY, lw=0.6)
        axes.plot(x, ours, "o", color=OURS, label="fusion_sum" if i == 0 else None)
        axes.plot(x, naive, "o", color=THEIRS, mfc="white", label="naive" if i == 0 else None)
        if "limit" in found["contenders"]:
            roof = found["flop"] / found["contenders"]["limit"]["seconds"] / 1e9
            axes.plot(x, roof, "_", color="black", ms=10, label="limit of its working set" if i == 0 else None)
        label = row["name"]
        axes.annotate(
            label,
            (x, min(ours, naive)),
            (0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            rotation=90,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ymargin=0.1,
        xlabel="FLOP per byte of compulsory traffic",
        ylabel="GFLOP/s",
    )
    axes.set_title("Forward (rows of like intensity are drawn side by side)", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


def _intensity(row: dict[str, Any]) -> float:
    return row["phases"][FORWARD]["flop"] / row["phases"][FORWARD]["bytes"]


def _apart(values: list[float]) -> list[float]:
    """Spread values within 30% of each other round their middle, for most rows have one of two intensities."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and values[i] < 1.3 * values[groups[-1][-1]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    spread = list(values)
    for group in groups:
        middle = (values[group[0]] * values[group[-1]]) ** 0.5
        for position, i in enumerate(group):
            spread[i] = middle * 1.13 ** (position - (len(group) - 1) / 2)
    return spread


def _draw_rates(axes: Any, limits: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Draw the last phase's rate of ours and naive, and of the multiply-adds in registers that were timed beside it."""
    for i, row in enumerate(rows[::-1]):
        found = list(row["phases"].values())[-1]
        timed = {name: contender["seconds"] for name, contender in found["contenders"].items()}
        rates = {name: found["flop"] / s / 1e9 for name, s in (timed | {"ours": found["seconds"]}).items()}
        if "naive" in rates:
            axes.plot([rates["naive"], rates["ours"]], [i, i], color=GREY, lw=0.6)
            axes.plot(rates["naive"], i, "o", color=THEIRS, mfc="white", label="naive")
        if "limit" in rates:
            axes.plot(rates["limit"], i, "|", color="black", ms=10, label="the limit")
        axes.plot(rates["ours"], i, "o", color=OURS, label="fusionsum")
    if "fma_gflop_per_s" in limits:
        axes.axvline(limits["fma_gflop_per_s"], color=GREY, lw=0.6)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows[::-1]])
    axes.set(xlim=(0, None), xlabel="GFLOP/s")
    axes.set_title("Last phase, as many operations as must be done without storing scores", fontsize=10)
    legend = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(legend.values(), legend.keys(), fontsize=8, loc="lower right")


def _draw_ratios(axes: Any, rows: list[dict[str, Any]]) -> None:
    for offset, phase, against, colour in (
        (0.25, FORWARD, "naive", OURS),
        (0.0, BOTH, "naive", PALE),
        (-0.25, BOTH, "torch.compile", GREY),
        (-0.25, FORWARD, "FAISS", THEIRS),
    ):
        label: str | None = f"{phase}, vs {against}"
        for i, row in enumerate(rows):
            found = row["phases"].get(phase, {}).get("contenders", {}).get(against)
            if found is None:
                continue
            axes.barh(i + offset, found["ratio"]["median"] - 1, 0.22, left=1, color=colour, label=label)
            label = None
            for floor in row["floors"]:
                if (floor["phase"], floor["against"]) == (phase, against):
                    axes.plot([floor["ratio"]] * 2, [i + offset - 0.12, i + offset + 0.12], color="black", lw=1.5)
    if axes.dataLim.x1 > 100:  # on a linear scale the bar of torch.nn.Bilinear would hide all others
        axes.set_xscale("log")
    axes.axvline(1, color="black", lw=0.6)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("times as fast (black: the floor)")
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, handlelength=1)
