"""Bugs planted into copies of the CUDA sources, to test the tests: what each changes, and which stages must notice.

    python -m tests.cuda.planted                the table in docs/cuda_verification.md

The product's sources know nothing of them. ``emulation.build`` and the PTX stage take a bug by name.
"""

from __future__ import annotations

import pathlib
import shutil
from dataclasses import dataclass

__all__ = ["BUGS", "STAGES", "Bug", "plant", "table"]


STAGES = ("plain", "address", "thread", "ptx", "sizes", "launches", "nvcc", "bindings")


@dataclass(frozen=True)
class Bug:
    """One replacement, or `also` others; `stages` are those that catch it, each with a part of what it says then."""

    name: str
    file: str  # relative to csrc
    old: str  # found exactly once
    new: str
    stages: tuple[tuple[str, str], ...]  # the first is the one to run where time is short
    also: tuple[tuple[str, str, str], ...] = ()  # more of file, old and new
    by_scores: bool = False

    def reaches(self, stage: str) -> bool:
        """Say whether the stage compiles the file: the bindings' alone compiles theirs, and that alone."""
        if self.of_scores and stage in ("sizes", "nvcc"):  # calls of sums; and launches, by gpu_launch there too
            return False
        return self.file.startswith("bindings/") == (stage == "bindings")

    @property
    def of_scores(self) -> bool:
        """Say whether calls of scores look for it, as for all that is in their steps."""
        return self.by_scores or self.file.startswith("cuda/scores/")


_THREADS = "cuda/threads.cuh"
_TILE, _STATISTICS, _GAMMA, _SELECT, _MERGE, _STEPS = (
    f"cuda/scores/{name}" for name in ("tile.cuh", "statistics.cu", "gamma.cu", "select.cu", "merge.cu", "steps.cu")
)
_KERNEL, _PACKET, _PLAN = "cuda/sum/kernel.cuh", "cuda/sum/packet.cuh", "cuda/sum/plan.cpp"
_LAUNCH, _GPU = "cuda/launch.cu", "cuda/gpu.h"
BUGS = (
    Bug(
        "no barrier between the steps of strided_sum",
        _THREADS,
        "half /= 2) {\n    __syncthreads();",
        "half /= 2) {",
        (("thread", "data race"), ("plain", "wrong results"), ("ptx", "race"), ("sizes", "wrong results")),
    ),
    Bug(
        "a packet too many",
        _KERNEL,
        ": most_cols;",
        ": most_cols + W;",
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
        "by_columns ? divide_up(packets, lanes) : 1",
        "by_columns ? std::max<int64_t>(1, packets / lanes) : 1",
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
        "o.sums[(t.split * p.units + unit) * p.cols + place]",
        "o.sums[unit * p.cols + place]",
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
    # In what loads and stores operands that are not packed, and in the cut.
    Bug(
        "loose values read past the end",
        _PACKET,
        "packet.value[i] = c.has(i) ? value(place, i) : T(0);",
        "packet.value[i] = value(place, i);",
        (("address", "heap-buffer-overflow"), ("ptx", "out of bounds")),
    ),
    Bug(
        "loose values stored past the end",
        _PACKET,
        "if (c.has(i)) store_one(i);",
        "store_one(i);",
        (("ptx", "out of bounds"), ("address", "heap-buffer-overflow")),
    ),
    Bug(
        "the last of a thread's loose columns left out",
        _PACKET,
        "static_cast<int>(left + step - 1) >> lanes_log2",
        "static_cast<int>(left) >> lanes_log2",
        (("plain", "wrong results"),),
    ),
    Bug(
        "loose columns that lanes have twice",
        _PACKET,
        "return col * (int64_t{1} << log2);",
        "return col;",
        (("plain", "wrong results"),),
    ),
    Bug(
        "what lies past the end counts as 1",
        _KERNEL,
        "x[i] = T(c.has(i));",
        "x[i] = T(1);",
        (("plain", "wrong results: absent"),),
    ),
    Bug(
        "bfloat16 taken for float16",
        _PACKET,
        "o.dtype == DType::bf16 ? widen_from(Bf16{}) : widen_from(F16{});",
        "o.dtype == DType::f16 ? widen_from(Bf16{}) : widen_from(F16{});",
        (("plain", "wrong results"),),
    ),
    Bug(
        "derivatives stored at strides in elements",
        _PLAN,
        "    o.grad_row[d] *= item;\n",
        "",
        (("plain", "wrong results"),),
    ),
    Bug(
        "the last rows in no split",
        _PLAN,
        "static_cast<int>(divide_up(pass.run, pass.rows_per_split))",
        "static_cast<int>(std::max<int64_t>(1, pass.run / pass.rows_per_split))",
        (("plain", "wrong results"),),
    ),
    Bug(
        "a shuffle that threads of the last rows leave out",
        _KERNEL,
        "u < U && row0 + u * t.groups < t.end; ++u",
        "u < U && row0 + u * t.groups + t.group < t.end; ++u",
        (("ptx", "sync mask"),),
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
        _PACKET,
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
        (("ptx", "launch bounds"), ("nvcc", "launch bounds")),
    ),
    Bug(
        "combine on the default stream",
        _LAUNCH,
        "kCombined))), block, on, sums);",
        "kCombined))), block, nullptr, sums);",
        (("launches", "another stream: combine"), ("nvcc", "another stream: combine")),
    ),
    Bug(
        "every kernel on the default stream",
        _LAUNCH,
        "static_cast<cudaStream_t>(stream);",
        "static_cast<cudaStream_t>(stream ? nullptr : stream);",
        (("launches", "another stream: rows"), ("nvcc", "another stream: rows")),
    ),
    Bug(
        "combine is not checked",
        _LAUNCH,
        '      if (error != cudaSuccess) return failed("kernel combine", error);\n',
        "",
        (("launches", "is told as success"), ("nvcc", "is told as success")),
    ),
    Bug(
        "whatever device is current",
        _LAUNCH,
        "if (current != device) {",
        "if (current < 0) {",
        (("launches", "another device is told as success"), ("nvcc", "another device is told as success")),
    ),
    Bug(
        "32-bit offsets of gradients",
        _KERNEL,
        "at[k].grad += digit * o.grad_row[d];",
        "at[k].grad = static_cast<int32_t>(at[k].grad + digit * o.grad_row[d]);",
        (("sizes", "wrong results: spread over memory"),),
    ),
    Bug(
        "32-bit offsets of sums in combine",
        "cuda/sum/combine.cu",
        "int64_t rest = entry, at = 0;",
        "int64_t rest = entry;\n  int32_t at = 0;",
        (("sizes", "wrong results: spread over memory"),),
    ),
    Bug(
        "a 32-bit first column of a tile",
        _KERNEL,
        "const int64_t first_col = static_cast<int64_t>(t.tile) * p.packets_per_tile * W, cols_left",
        "const int64_t first_col = t.tile * p.packets_per_tile * W, cols_left",
        (("sizes", "wrong results: columns beyond 2^32, summed"),),
    ),
    Bug(
        "32-bit columns of a thread",
        _KERNEL,
        "const int64_t col = static_cast<int64_t>(t.tile) * W * t.lanes",
        "const int64_t col = t.tile * W * t.lanes",
        (("sizes", "wrong results: columns beyond 2^32, each by itself"),),
    ),
    Bug(
        "float64 rounded to bfloat16 by way of float32",
        "dtype.h",
        "narrow(double x, Bf16* to) { narrow(round_to_odd(x), to); }",
        "narrow(double x, Bf16* to) { narrow(static_cast<float>(x), to); }",
        (("sizes", "wrong results: bfloat16 rounded once, n=13"), ("ptx", "different bits")),
    ),
    Bug(
        "100 KiB of dynamic shared memory",
        _GPU,
        "arguments, 0, stream);",
        "arguments, 100 << 10, stream);",
        (
            ("nvcc", "more shared memory than 48 KiB"),
            ("launches", "shared memory of an impossible size"),
            ("plain", "shared memory of an impossible size"),
            ("sizes", "shared memory of an impossible size"),
        ),
    ),
    Bug(
        "a grid along its second dim",
        _LAUNCH,
        "grid(static_cast<unsigned>(launch.blocks)), block",
        "grid(1, static_cast<unsigned>(launch.blocks)), block",
        (("launches", "a grid of an impossible size"), ("nvcc", "a grid of an impossible size")),
        also=(
            (
                _KERNEL,
                """    part = static_cast<int>(blockIdx.x) / p.tiles;
    tile = static_cast<int>(blockIdx.x) - part""",
                """    part = static_cast<int>(blockIdx.y) / p.tiles;
    tile = static_cast<int>(blockIdx.y) - part""",
            ),
        ),
    ),
    # Ours, in what the launches ask of the runtime.
    Bug(
        "the first use is not let into a capture",
        _LAUNCH,
        "(from);\n  const Relaxed relaxed;\n",
        "(from);\n",
        (
            ("nvcc", "cudaErrorStreamCaptureUnsupported"),
            ("launches", "cudaErrorStreamCaptureUnsupported"),
            ("plain", "cudaErrorStreamCaptureUnsupported"),
            ("sizes", "cudaErrorStreamCaptureUnsupported"),
        ),
    ),
    Bug(
        "the mode of capture is not put back",
        _LAUNCH,
        "  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }\n",
        "",
        (("nvcc", "the mode of capture"), ("launches", "the mode of capture is left at 2")),
    ),
    Bug(
        "an error that was told stays the last",
        _GPU,
        "  cudaGetLastError();  // or the next to ask, torch, would be told of it again\n",
        "",
        (("nvcc", "the mode of capture and the last error are"),),
    ),
    Bug(
        "errors of earlier work are taken for those of the device",
        _LAUNCH,
        '  if (is_left_behind(error)) return failed("the device", error);\n',
        "",
        (("nvcc", "error 700 of call 1, "),),
    ),
    Bug(
        "the first launch goes on after an error",
        _LAUNCH,
        '    if (error != cudaSuccess) return failed(launch.by_columns ? "kernel columns" : "kernel rows", error);\n',
        "    static_cast<void>(error);\n",
        (("launches", "is told as success"), ("nvcc", "is told as success")),
    ),
    # In the bindings: kernels and launches are as they should be.
    Bug(
        "the stream of torch is not asked for",
        "bindings/execute.cpp",
        "execute(plan.get(), device.id, current_stream(device)",
        "execute(plan.get(), device.id, nullptr",
        (("bindings", "test_forward"),),
    ),
    Bug(
        "empty sums are left as they are",
        "bindings/parse.cpp",
        "    clear(array, home.device, dtype, ndim, shape, to.grad);\n",
        "",
        (("bindings", "test_empty_sums_are_zero"),),
    ),
    Bug(
        "the device of the arrays is not made current",
        "bindings/execute.cpp",
        "  const OnDevice guard(device);\n  check(cuda.execute(",
        "  check(cuda.execute(",
        (("bindings", "test_forward"),),
    ),
    Bug(
        "outputs on the first device",
        "bindings/torch.cpp",
        'module.attr("device")("cuda", device.id)',
        'module.attr("device")("cuda", 0)',
        (("bindings", "test_forward"),),
    ),
    Bug(
        "the device of a mask is not looked at",
        "bindings/parse.cpp",
        " || !(mask.device == home.device)",
        "",
        (("bindings", "test_tensors_on_different_devices"),),
    ),
    # In the steps of scores.
    Bug(
        "no second barrier in segment_sum",
        _THREADS,
        "    __syncthreads();\n  }\n  return x;",
        "  }\n  return x;",
        (("thread", "data race"),),
        by_scores=True,
    ),
    Bug(
        "a packet of scores past the last column",
        _TILE,
        "if (at + W <= c.cols) {",
        "if (at < c.cols) {",
        (("address", "heap-buffer-overflow"),),
    ),
    Bug(
        "no barrier after columns are summed",
        _TILE,
        "* values + value] = sum;\n  }\n  __syncthreads();",
        "* values + value] = sum;\n  }",
        (("thread", "data race"),),
    ),
    Bug(
        "an excluded pair stays positive",
        _TILE,
        "        to.positive &= ~bit;\n",
        "",
        (("plain", "wrong results"),),
    ),
    Bug(
        "a column's sum keeps its old reference",
        _STATISTICS,
        "        sum[j] = sum[j] * fast_exp(reference[j] - raised);\n",
        "",
        (("plain", "wrong results"),),
    ),
    Bug(
        "no barrier before columns are merged",
        _STATISTICS,
        "  put_columns(w, sum, sums);\n  __syncthreads();",
        "  put_columns(w, sum, sums);",
        (("thread", "data race"),),
    ),
    Bug(
        "a target counts among the others",
        _STATISTICS,
        "(e.here >> j & 1) && w.col(j) != own;",
        "(e.here >> j & 1);",
        (("plain", "wrong results"),),
    ),
    Bug(
        "positives of the sigmoid loss pull the wrong way",
        _GAMMA,
        "g[j] = z * coef *",
        "g[j] = coef *",
        (("plain", "wrong results"),),
    ),
    Bug(
        "Gamma stored past the last column",
        _GAMMA,
        "        if (at + j < w.c.cols) to[at + j] = narrowed[j];",
        "        to[at + j] = narrowed[j];",
        (("address", "heap-buffer-overflow"),),
    ),
    Bug(
        "the coefficients of a chunk's first columns for all",
        _GAMMA,
        "c.col_coefs[i * c.all_cols + c.first_col + col]",
        "c.col_coefs[i * c.all_cols + col]",
        (("plain", "wrong results"),),
    ),
    Bug(
        "a room with one hit too many",
        _SELECT,
        "min(kSize - 32 * kAtOnce, max(32 * kAtOnce, 2 * k));",
        "max(kSize, 2 * k);",
        (("ptx", "race"),),
    ),
    Bug(
        "columns that the chunk before has had",
        _SELECT,
        "} else if (i >= c.skip) {",
        "} else {",
        (("plain", "wrong results"),),
    ),
    Bug(
        "hits of equal scores in any order",
        "cuda/scores/select.cuh",
        "(score == other.score && place < other.place)",
        "(score == other.score && place > other.place)",
        (("plain", "wrong results"),),
    ),
    Bug(
        "no barrier of the warp between steps of the sort",
        _SELECT,
        "      __syncwarp();\n      GPU_LOOP",
        "      GPU_LOOP",
        (("thread", "data race"),),
    ),
    Bug(
        "the place after a row's last is left out",
        _SELECT,
        "c.places[i] < first + c.cols; i += 32",
        "c.places[i] <= first + c.cols; i += 32",
        (("plain", "wrong results"),),
    ),
    Bug(
        "all lanes read what one writes",
        _MERGE,
        "lane == 0 ? *to : -kHighest<double>",
        "*to",
        (("thread", "data race"),),
    ),
    Bug(
        "what is known keeps its old reference",
        _MERGE,
        "to[m.step] * exp_or_zero(*to - top) + sum",
        "to[m.step] + sum",
        (("plain", "wrong results"),),
    ),
    Bug(
        "parts of rows and of columns in one place",
        _STEPS,
        "reinterpret_cast<double*>(workspace + bytes)",
        "reinterpret_cast<double*>(workspace)",
        (("thread", "data race"),),
    ),
    Bug(
        "steps on the default stream",
        _STEPS,
        "dim3(static_cast<unsigned>(threads)), stream,",
        "dim3(static_cast<unsigned>(threads)), nullptr,",
        (("launches", "another stream: log_sum_exp"),),
    ),
    Bug(
        "merge is not checked",
        _STEPS,
        'return to.merge_all(p) ? nullptr : "merge";',
        "to.merge_all(p);\n  return nullptr;",
        (("launches", "merge, is told as success"),),
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
        If a file does not contain its old text exactly once.
    """
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sources, copy)
    for file, old, new in ((bug.file, bug.old, bug.new), *bug.also):
        text = (copy / file).read_text()
        if (found := text.count(old)) != 1:
            raise ValueError(f"planted bug {bug.name!r}: {file} contains its old text {found} times, expected once")
        (copy / file).write_text(text.replace(old, new))


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
