"""Bugs planted into copies of the CUDA sources, to test the tests: what each changes, and which stages must notice.

    python -m tests.cuda.planted                the table in docs/cuda_verification.md

The product's sources know nothing of them. ``emulation.build`` and the PTX stage take a bug by name.
"""

from __future__ import annotations

import pathlib
import shutil
from dataclasses import dataclass

__all__ = ["BUGS", "STAGES", "Bug", "plant", "table"]


STAGES = ("plain", "address", "thread", "ptx", "sizes", "launches")


@dataclass(frozen=True)
class Bug:
    """One replacement in one file; `stages` are those that catch it, each with a part of what it says then."""

    name: str
    file: str  # relative to csrc
    old: str  # found exactly once
    new: str
    stages: tuple[tuple[str, str], ...]  # the first is the one to run where time is short


_KERNEL, _PLAN, _LAUNCH = "cuda/sum/kernel.cuh", "cuda/sum/plan.cpp", "cuda/launch.cu"
BUGS = (
    Bug(
        "no barrier between the steps of strided_sum",
        _KERNEL,
        "half /= 2) {\n    __syncthreads();",
        "half /= 2) {",
        (("thread", "data race"), ("plain", "wrong results"), ("ptx", "race"), ("sizes", "wrong results")),
    ),
    Bug(
        "no second barrier in segment_sum",
        _KERNEL,
        "    __syncthreads();\n  }\n  return x;",
        "  }\n  return x;",
        (("thread", "data race"), ("ptx", "race")),
    ),
    Bug(
        "a packet too many",
        _KERNEL,
        ": p.packets_per_tile;",
        ": p.packets_per_tile + 1;",
        (
            ("address", "heap-buffer-overflow"),
            ("plain", "wrong results"),
            ("ptx", "out of bounds"),
            ("sizes", "wrong results"),
            ("launches", "exit code -"),
        ),
    ),
    Bug(
        "a scale read one row past the end",
        _KERNEL,
        "row < end ? splat_product",
        "row <= end ? splat_product",
        (("address", "heap-buffer-overflow"), ("ptx", "out of bounds")),
    ),
    Bug(
        "a shuffle in a divergent branch",
        _KERNEL,
        "if (!each) continue;",
        "if (!each || !here) continue;",
        (
            ("ptx", "sync mask"),
            ("plain", "a lane exits that is named in the mask"),
            ("sizes", "names a lane that has exited"),
            ("launches", "a lane exits that is named in the mask"),
        ),
    ),
    Bug(
        "the last level of a run not added",
        _KERNEL,
        "if ((terms += U) < kSummed && row0 + U * t.groups < t.end) continue;",
        "if ((terms += U) < kSummed) continue;",
        (("plain", "wrong results"), ("ptx", "different bits"), ("sizes", "wrong results")),
    ),
    Bug(
        "the last columns in no tile",
        _PLAN,
        "tiles = divide_up(packets, lanes);",
        "tiles = std::max<int64_t>(1, packets / lanes);",
        (("plain", "wrong results"), ("ptx", "different bits"), ("sizes", "wrong results")),
    ),
    Bug(
        "derivatives stored with another operand",
        _KERNEL,
        "put(out[k], i, partial[k]);",
        "put(out[k], i, partial[N - 1 - k]);",
        (("ptx", "different bits"), ("plain", "wrong results"), ("sizes", "wrong results")),
    ),
    Bug(
        "splits that store the same partial sum",
        _KERNEL,
        "o.sums[(t.split * p.units + unit) * p.cols + col + i]",
        "o.sums[unit * p.cols + col + i]",
        (("thread", "data race"), ("plain", "wrong results"), ("ptx", "block race"), ("sizes", "wrong results")),
    ),
    Bug(
        "tiles that store the same partial sum",
        _KERNEL,
        "o.sums[(t.tile * p.units + unit) * p.run + r]",
        "o.sums[unit * p.run + r]",
        (("ptx", "block race"), ("plain", "wrong results"), ("thread", "data race")),
    ),
    Bug(
        "sums that do not start at zero",
        _KERNEL,
        "    FUSIONSUM_UNROLL(8)\n    for (int i = 0; i < W; ++i) own[i * kThreads] = 0;\n",
        "",
        (("ptx", "uninitialised"), ("plain", "wrong results"), ("sizes", "wrong results")),
    ),
    Bug(
        "the first stride for all dims in combine",
        "cuda/sum/combine.cu",
        "* c.stride[d];",
        "* c.stride[0];",
        (("address", "heap-buffer-overflow"), ("plain", "exit code -"), ("ptx", "out of bounds")),
    ),
    Bug(
        "a derivative where a factor is absent",
        _KERNEL,
        "partial[k] = is_present[k] ? partial[k] * slope[k] : T(0);",
        "partial[k] = partial[k] * slope[k];",
        (("plain", "wrong results"), ("ptx", "different bits")),
    ),
    Bug(
        "packets of arrays that are not aligned",
        _PLAN,
        "reinterpret_cast<uintptr_t>(data) % 16 == 0",
        "reinterpret_cast<uintptr_t>(data) % 4 == 0",
        (("plain", "a misaligned access"),),
    ),
    # A foreigner's, which every stage before missed.
    Bug(
        "a quotient that is one too small",
        _KERNEL,
        "return estimate + (rest >= size) - (rest < 0);",
        "return estimate - (rest < 0);",
        (("sizes", "wrong results: rows whose quotient is off by one"),),
    ),
    Bug(
        "a sum that goes on into the next unit",
        _KERNEL,
        "      total = 0;\n      if (unit_here",
        "      if (unit_here",
        (("sizes", "wrong results: a sum for each of many units"),),
    ),
    Bug(
        "a wrong word stored past the caches",
        "cuda/sum/packet.cuh",
        "__stcs(to, v);",
        "__stcs(to, make_uint4(v.x, v.y, v.w, v.z));",
        (("sizes", "wrong results: gradients stored past the caches"),),
    ),
    Bug(
        "the wrong reciprocal of the fifth dim",
        _PLAN,
        "pass.inverse_size[d] = 1.0 / static_cast<double>(pass.size[d]);",
        "pass.inverse_size[d] = 1.0 / static_cast<double>(pass.size[d < 4 ? d : 0]);",
        (("sizes", "wrong results: five dims of rows"), ("launches", "the reciprocal of")),
    ),
    Bug(
        "a sum over all units that forgets the earlier",
        _KERNEL,
        "*to = first ? value : *to + value;",
        "*to = value;",
        (("sizes", "wrong results: a sum over all units"),),
    ),
    Bug(
        "reciprocals in float32",
        _PLAN,
        "pass.inverse_size[d] = 1.0 / static_cast<double>(pass.size[d]);",
        "pass.inverse_size[d] = 1.0f / static_cast<float>(pass.size[d]);",
        (("launches", "the reciprocal of"),),
    ),
    Bug(
        "combine compiled for smaller blocks",
        "cuda/sum/combine.cu",
        "__launch_bounds__(kThreads) combine",
        "__launch_bounds__(kThreads / 2) combine",
        (("ptx", "launch bounds"),),
    ),
    Bug(
        "combine on the default stream",
        _LAUNCH,
        "kCombined))), block, on, sums);",
        "kCombined))), block, nullptr, sums);",
        (("launches", "another stream: combine"),),
    ),
    Bug(
        "every kernel on the default stream",
        _LAUNCH,
        "static_cast<cudaStream_t>(stream);",
        "static_cast<cudaStream_t>(stream ? nullptr : stream);",
        (("launches", "another stream: rows"),),
    ),
    Bug(
        "combine is not checked",
        _LAUNCH,
        '      if (error != cudaSuccess) return failed("kernel combine", error);\n',
        "",
        (("launches", "is told as success"),),
    ),
    Bug(
        "whatever device is current",
        _LAUNCH,
        "if (error == cudaSuccess && current != device) {",
        "if (error == cudaSuccess && current < 0) {",
        (("launches", "another device is told as success"),),
    ),
)


def plant(bug: Bug, sources: pathlib.Path, copy: pathlib.Path) -> None:
    """
    Copy the sources, with the bug.

    Parameters
    ----------
    bug
        What to replace.
    sources
        The folder ``csrc``.
    copy
        The folder to write; what was there is removed.

    Raises
    ------
    ValueError
        If the file does not contain the old text exactly once.
    """
    text = (sources / bug.file).read_text()
    if (found := text.count(bug.old)) != 1:
        raise ValueError(f"planted bug {bug.name!r}: {bug.file} contains its old text {found} times, expected once")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sources, copy)
    (copy / bug.file).write_text(text.replace(bug.old, bug.new))


def table() -> str:
    """Return the bugs and what each stage says of them, in Markdown; in bold, the stage that CI runs."""
    rows = [("planted bug", *STAGES), ("---",) * (1 + len(STAGES))]
    for bug in BUGS:
        says = dict(bug.stages)
        ours = bug.stages[0][0]
        cells = [f"**{says[stage]}**" if stage == ours else says.get(stage, "–") for stage in STAGES]
        rows.append((bug.name, *cells))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")
