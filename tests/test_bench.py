"""The benchmark measures and reports. No test here looks at a time.

A GPU's part is tested here on a stand-in for ``torch.cuda``, with tensors of the CPU, and on a GPU by ``cuda/on_gpu.sh``.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import source

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _bench_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(source("bench").parent))  # bench/ is not installed


def test_rows_are_those_of_the_floors():
    from bench import rows

    assert [row.name for row in rows.select("")] == [
        *"P1 P2 P3 P4".split(),
        "P5 bf16",
        "P5 f16",
        *"P6 P7 P8 P9 P10".split(),
    ]
    assert [row.name for row in rows.select("P10, P5")] == ["P5 bf16", "P5 f16", "P10"]
    with pytest.raises(SystemExit, match="P11"):
        rows.select("P11")
    on_gpu = rows.select("", rows.CUDA_ROWS)
    assert [row.name for row in on_gpu] == ["P1", "P4", "P5 bf16", "P5 f16", *"P6 P7 P8 P9".split(), "P4 graph"]
    assert [row.name for row in on_gpu if row.floors] == ["P1", "P5 bf16", "P5 f16", "P6"]
    for row in (*rows.ROWS, *on_gpu):
        assert {floor.phase for floor in row.floors} <= set(row.phases)
        assert math.prod(np.broadcast_shapes(row.weights, *row.shapes)) == math.prod(np.broadcast_shapes(*row.shapes))


def test_traffic_and_work_are_those_of_the_formulas():
    from bench import rows

    paired, three = (next(row for row in rows.ROWS if row.name == name) for name in ("P5 bf16", "P6"))
    terms = 65536 * 512
    assert list(paired.bytes.values()) == [2 * 2 * terms, 4 * 2 * terms, 6 * 2 * terms]
    assert list(paired.flop.values()) == [3 * terms, 6 * terms, 9 * terms]
    assert three.flop[rows.BACKWARD] == 4 * 3 * 16384 * 512


def test_layers_and_scores_are_rows_too():
    """All that is timed is a `Row`, whose fields are declared once."""
    from bench import layers, rows, scores

    for row in (*rows.ROWS, *layers.LAYERS, *scores.SCORES):
        assert isinstance(row, rows.Row)
        assert set(row.bytes) == set(row.flop) >= set(row.phases)
    for kind in (rows.SumRow, layers.LayerRow, scores.ScoreRow):
        assert not vars(kind)["__annotations__"].keys() & {field.name for field in dataclasses.fields(rows.Row)} - {"_"}


@pytest.mark.parametrize("machine", ["machine", "gpu"])
def test_machines_know_no_rows(machine):
    tree = ast.parse((source("bench") / f"{machine}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert imported <= {"machine"}


PHASES = ["forward", "backward", "forward + backward"]


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Benchmark in short; return the result and the table."""
    from bench import __main__, machine, measure

    def short(*arguments):
        options = __main__.parse(["--quick", "--threads", "1", "--out", str(tmp_path), *arguments])
        options.pairs = 1
        threads = torch.get_num_threads()
        try:
            path = __main__.benchmark(options)
        finally:
            measure.set_threads(threads)
        return json.loads((tmp_path / "bench.json").read_text()), path.read_text()

    rates = machine.Cpu.rates
    monkeypatch.setattr(machine.Cpu, "rates", lambda self, count, side: rates(self, 2**12, 2**5))
    monkeypatch.setattr(measure, "BATCH_SECONDS", 1e-5)
    return short


def test_a_benchmark_reports(benchmark, tmp_path):
    result, table = benchmark("--rows", "P4")
    (row,) = result["rows"]
    assert list(row["phases"]) == PHASES
    assert set(row["skipped"]) == {"torch.compile", "limit"}
    assert all(set(phase["contenders"]) == {"naive", "einsum"} for phase in row["phases"].values())
    assert all(row["phases"][phase]["error"]["ours"] < 1e-5 for phase in ("forward", "forward + backward"))
    assert table.count("\n| P4 |") == 3 and table.count("\n| copy |") == 1 and "≥ 1.80" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_layer_is_measured_and_held_to_the_published_code(monkeypatch):
    from tqdm import tqdm

    from bench import layers, machine, measure, rows

    row = rows.select("L1", layers.LAYERS)[0]
    assert {name.split()[0] for name in (row.name for row in layers.LAYERS)} == {"L1", "L2", "L3", "L4"}
    monkeypatch.setattr(measure, "BATCH_SECONDS", 1e-5)
    with tqdm(disable=True) as bar:
        found = measure.measure(row, machine.Cpu(), 1, torch.get_num_threads(), False, bar)
    assert [floor["against"] for floor in found["floors"]] == ["naive"]
    assert all(phase["error"]["ours"] < 1e-5 for phase in found["phases"].values())
    wrong = dataclasses.replace(row, codes={"naive": lambda *given: row.codes["naive"](*given) * 1.001})
    with pytest.raises(AssertionError, match="ours differs from naive"):
        measure.layer_errors(wrong)


SCORES = {
    **{f"C1 n={n}": (4096, 4096, n) for n in (64, 256, 512)},
    "C2": (8192, 256, 512),
    **{f"C3 n={n}": (4096, 4096, n) for n in (64, 256, 512)},
    **{f"C4 n={n}": (4096, 4096, n) for n in (64, 512)},
    **{f"C5 k={k}": (256, 1_000_000, 128) for k in (10, 100)},
    "C6": (1, 1_000_000, 128),
    "C7": (4096, 100_000, 128),
    "C9": (32768, 32768, 256),
    "C10": (1024, 14541, 200),
}
IN_16_BITS = ("C1 n=64", "C1 n=512", "C3 n=64", "C3 n=512", "C5 k=10")


def test_scores_are_those_of_the_floors():
    from bench import rows, scores

    found = {row.name: row.pairs for row in scores.SCORES}
    low = {f"C8 {dtype}, {name}": SCORES[name] for name in IN_16_BITS for dtype in ("bf16", "f16")}
    assert found == SCORES | low
    assert list(found) == [row.name for row in scores.QUICK_SCORES]
    assert not any(row.floors or row.memory for row in scores.QUICK_SCORES)
    by_name = {row.name: row for row in scores.SCORES}
    for row in scores.SCORES:
        assert {floor.phase for floor in row.floors} <= set(row.phases)
        assert row.rate == ("GB/s" if row.name == "C6" else "GFLOP/s")
    megabytes = {row.name: row.memory >> 20 for row in scores.SCORES if row.memory and not row.name.startswith("C8")}
    assert megabytes == {
        name: floor for name in SCORES if (floor := {"C3": 16, "C4": 16, "C5": 64, "C9": 64}.get(name[:2]))
    }
    assert by_name["C3 n=64"].flop == {rows.FORWARD: 2 * 4096**2 * 64, rows.BOTH: 8 * 4096**2 * 64}


@pytest.mark.parametrize(
    "name, against, traits, ratio",
    [
        ("C1 n=64", "naive", ("Zen 5", "AVX-512"), 1.8),
        ("C1 n=64", "naive", ("Intel", "AVX-512"), 1.2),
        ("C5 k=10", "FAISS", ("Zen 5", "AVX-512"), 2),
        ("C5 k=10", "FAISS", ("Zen 3", "AVX2"), 1),
        ("C8 bf16, C3 n=64", "our float32", ("Zen 5", "AVX-512", "AVX512_BF16"), 1.5),
        ("C8 bf16, C3 n=64", "our float32", ("Zen 3", "AVX2"), 0.9),
        ("C8 f16, C3 n=64", "our float32", ("Zen 5", "AVX-512", "AVX512_BF16"), 0.9),
    ],
)
def test_a_floor_is_that_of_the_machine(name, against, traits, ratio):
    from bench import scores

    row = next(row for row in scores.SCORES if row.name == name)
    last = row.phases[-1]
    floors = [floor for floor in row.floors_on(traits) if (floor.phase, floor.against) == (last, against)]
    assert [floor.ratio for floor in floors] == [ratio]


@pytest.mark.parametrize(
    "vendor, family, flags, traits",
    [
        ("AuthenticAMD", "26", "avx2 avx512f avx512_bf16", ("Zen 5", "AVX-512", "AVX512_BF16")),
        ("AuthenticAMD", "25", "avx2 avx512f avx512_bf16", ("Zen 4", "AVX-512", "AVX512_BF16")),
        ("AuthenticAMD", "25", "avx avx2", ("Zen 3", "AVX2")),
        ("GenuineIntel", "6", "avx2 avx512f avx512_bf16", ("Intel", "AVX-512")),
        ("", "", "", ("riscv64",)),
    ],
)
def test_the_kind_of_a_machine(monkeypatch, vendor, family, flags, traits):
    from bench import machine

    fields = {"vendor_id": vendor, "cpu family": family, "flags": flags}
    monkeypatch.setattr(machine, "_cpuinfo", fields.__getitem__)
    monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
    assert machine._traits.__wrapped__() == traits


def test_the_loop_of_multiply_adds_does_what_it_counts():
    from bench import machine

    here = machine.Cpu()
    if not shutil.which(here.compiler):
        pytest.skip(f"no compiler ({here.compiler})")
    loop = machine._multiplier(here.compiler)
    elements = loop.multiply(1, 0.0, 1.0)  # each is 0 * x + 1
    assert loop.flop_per_round() == 2 * elements
    assert loop.multiply(8, 1.0, 1.0) - loop.multiply(5, 1.0, 1.0) == 3 * elements
    assert len(here.multiplier(1)()) == torch.get_num_threads()


def test_the_loss_by_slices_is_the_naive_one():
    from bench import scores

    row = next(row for row in scores.QUICK_SCORES if row.name == "C9")
    small = replace(row, shapes=((1100, 8), (1100, 8)))  # two slices, of which one is short
    operands = [x.double().requires_grad_() for x in small.build()]
    loss = scores._clip(*operands)
    gradients = torch.autograd.grad(loss, operands, torch.tensor(0.7, dtype=torch.float64))
    with torch.no_grad():
        sliced = scores._sliced_clip(torch.tensor(0.7, dtype=torch.float64), *operands)
    for one, other in zip(sliced, (loss, *gradients), strict=True):
        torch.testing.assert_close(one, other.detach())


def test_scores_are_measured(benchmark):
    """A row of each kind, in small: that it is timed means that all contenders agree with ours."""
    from bench import scores

    kinds = ("C2", "C4", "C5", "C7", "C9")
    result, table = benchmark("--rows", ",".join(kinds))
    found = {row["name"]: row for row in result["rows"]}
    rows = [row for row in scores.QUICK_SCORES if row.name.split()[0] in kinds]
    assert list(found) == [row.name for row in rows]
    for row in rows:
        phases = found[row.name]["phases"]
        assert tuple(phases) == row.phases
        names = {*row.codes, "torch.compile", "limit", *(name for name, _ in (*row.arrays, *row.omitted))} - {"ours"}
        names |= {"our float32"} if row.dtype != torch.float32 else set()
        names |= {"64 × B=64"} if row.parts else set()
        timed = {name for phase in phases.values() for name in phase["contenders"]}
        assert timed | found[row.name]["skipped"].keys() == names
        assert all(phase["error"]["ours"] < row.tolerance for phase in phases.values())
        assert table.count(f"\n| {row.name} |") == len(phases)
    assert set(found["C9"]["phases"]["forward + backward"]["extra_bytes"]) == {"ours"}
    assert all(trait in table for trait in result["machine"]["traits"])
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_nothing_holds_openblas_back(monkeypatch):
    from bench import __main__

    class Replaced(Exception):
        pass

    def execve(path, arguments, environment):
        raise Replaced(environment)

    monkeypatch.setattr(__main__.os, "execve", execve)
    for name in __main__.HELD_BACK:
        monkeypatch.setenv(name, "512")
    with pytest.raises(Replaced) as replaced:
        __main__.main(["--threads", "1"])
    (environment,) = replaced.value.args
    assert environment.items() >= (__main__.KEEP_MEMORY | {"OPENBLAS_NUM_THREADS": "1"}).items()
    assert not environment.keys() & set(__main__.HELD_BACK)


def test_keys_in_a_file_are_searched_under_a_limit_of_memory(monkeypatch, capsys):
    if sys.platform != "linux":
        pytest.skip("/proc and ulimit -d are Linux's")
    from bench import memory_map

    assert memory_map.main(["--mib", "64"]) == 0
    assert ": right" in capsys.readouterr().out
    write = memory_map.write
    monkeypatch.setattr(memory_map, "write", lambda *given: write(*given) + 1)
    assert memory_map.main(["--mib", "64"]) == 1
    assert ": WRONG" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        memory_map.main(["--mib", "65"])


class _Clock:
    """Stands for an event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


@pytest.fixture
def stand_in(monkeypatch):
    """Let the CPU stand for a GPU; return the graphs that were made, each with the number of its replays."""
    from bench import gpu

    graphs = []

    class Graph:
        def __init__(self):
            self.replays = 0
            graphs.append(self)

        def replay(self):
            self.replays += 1

    properties = {"name": "Stand-in", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 2**34}
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_properties=lambda: SimpleNamespace(**properties),
        Event=_Clock,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=nullcontext,
        CUDAGraph=Graph,
        graph=lambda graph, stream: nullcontext(),
        memory_allocated=lambda: 1000,
        max_memory_allocated=lambda: 2**30,
        reset_peak_memory_stats=lambda: None,
    )
    monkeypatch.setattr(gpu, "cuda", cuda)
    monkeypatch.setattr(gpu.Gpu, "device", "cpu")
    monkeypatch.setattr(gpu.fs, "backends", lambda: {"cuda": "usable", "cpu": "usable"})
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "580.1\n580.1\n"))
    return graphs


def test_a_benchmark_of_a_gpu_reports(benchmark, stand_in, monkeypatch):
    from bench import rows, scores

    monkeypatch.setattr(scores, "on_gpu", lambda scored: ())
    paired, graph = (next(row for row in rows.CUDA_ROWS if row.name == name) for name in ("P5 bf16", "P4 graph"))
    monkeypatch.setattr(rows, "CUDA_ROWS", (replace(paired, shapes=((1024, 512),) * 2), graph))
    result, table = benchmark("--device", "cuda")
    eager, graphed = result["rows"]
    assert list(eager["phases"]) == list(graphed["phases"]) == PHASES
    assert all("limit" in phase["contenders"] for phase in eager["phases"].values())
    assert [(floor["phase"], floor["against"]) for floor in eager["floors"]] == [(p, "limit") for p in PHASES[:2]]
    assert len(stand_in) == 3 * len(PHASES)  # ours, naive, einsum
    assert all(graph.replays > 200 for graph in stand_in)
    assert all(phase["extra_bytes"]["ours"] is None for phase in graphed["phases"].values())
    assert 0 < eager["phases"]["forward"]["extra_bytes"]["ours"] < 2**30 - 1000
    assert "Stand-in, compute capability 9.0, 132 multiprocessors, 16 GiB; driver 580.1" in table
    assert table.count("\n| P5 bf16 |") == table.count("\n| P4 graph |") == 3


def test_scores_are_measured_on_a_gpu(benchmark, stand_in):
    """Without what a GPU cannot run, which is said, and against products of matrices of the row's dtype."""
    from bench import scores

    kinds = ("C3", "C5", "C7")
    result, table = benchmark("--device", "cuda", "--rows", ",".join(kinds))
    found = {row["name"]: row for row in result["rows"]}
    assert list(found) == [row.name for row in scores.on_gpu(scores.QUICK_SCORES) if row.name.split()[0] in kinds]
    for row in found.values():
        assert all({"naive", "limit"} <= set(phase["contenders"]) for phase in row["phases"].values())
    assert found["C5 k=10"]["skipped"]["FAISS"] == "it runs on the CPU"
    assert len(stand_in) == 2 * 2  # ours and naive, both phases of the row in a graph
    assert "multiply-adds by `torch.mm` of square matrices" in table


def test_scores_of_a_gpu_need_nothing_of_the_cpu():
    """Each contender's code, on tensors of a device that has no data."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from bench import scores

    class Elsewhere(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            made = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
            assert all(x.is_meta or not x.ndim for x in made), func
            return found

    rows = scores.on_gpu(scores.SCORES)
    assert [row.name for row in rows] == [*(row.name for row in scores.SCORES), "C3 n=64 graph"]
    assert [row.name for row in rows if row.graphed] == ["C3 n=64 graph"]
    for row in rows:
        assert not (row.arrays or row.floors or row.apart)
        codes = {**row.codes, **({"exact": partial(row.exact, torch.empty((), device="meta"))} if row.exact else {})}
        small = replace(row, shapes=tuple(tuple(min(n, 512) for n in shape) for shape in row.shapes))
        for name, code in codes.items():
            operands = small.build("meta")
            assert all(x.is_meta for x in operands)
            with Elsewhere():
                found = code(*operands)
            results = found if isinstance(found, (tuple, list)) else [found]
            assert all(x.is_meta for x in results), (row.name, name)


def test_the_limit_of_a_gpus_scores_multiplies_as_often(stand_in, monkeypatch):
    from bench import gpu

    multiplied = []
    monkeypatch.setattr(gpu.torch, "mm", lambda a, b, out: multiplied.append((a.dtype, 2 * len(a) ** 3)))
    for flop in (2 * 10**9, 3 * 10**9):
        gpu.Gpu().multiplier(flop, torch.bfloat16)()
        dtype, done = multiplied.pop()
        assert dtype == torch.bfloat16
        assert abs(done - flop) < 0.02 * flop


def test_the_limit_of_a_gpu_moves_as_many_bytes_as_a_row(stand_in, monkeypatch):
    from bench import gpu, measure

    moved = []

    def copier(self, arrays):
        size = 2 * sum(x.nbytes for x in arrays)  # read and written
        return 0.0, lambda: moved.append(size)

    monkeypatch.setattr(gpu.Gpu, "copier", copier)
    factors = [torch.randn(64, 1, 16), torch.randn(64, 32, 16)]
    size = sum(x.nbytes for x in factors)
    limits = measure.transfers(gpu.Gpu(), factors)
    for phase, times in zip(PHASES, (1, 2, 3), strict=True):
        moved.clear()
        limits[phase]()
        assert sum(moved) == times * size


def test_without_a_gpu_it_says_why(monkeypatch, tmp_path):
    from bench import __main__, gpu

    monkeypatch.setattr(gpu.fs, "backends", lambda: {"cuda": "not usable: there is none"})
    with pytest.raises(SystemExit, match="--device cuda: not usable: there is none"):
        __main__.benchmark(__main__.parse(["--device", "cuda", "--out", str(tmp_path)]))


def test_results_of_a_gpu_have_a_folder_of_their_own():
    from bench import __main__

    assert [__main__.parse(["--device", device]).out.name for device in ("cpu", "cuda")] == ["results", "cuda"]


def test_a_contender_that_disagrees_is_not_timed():
    from bench import machine, measure, rows

    (row,), here = rows.select("P4"), machine.Cpu()
    entered, _ = measure.contenders(row, here, compiled=False)
    measure.errors(row, here, entered)
    right = entered["einsum"].forward
    entered["einsum"].forward = lambda: right() * 1.001
    with pytest.raises(AssertionError, match="einsum and fusion_sum differ"):
        measure.errors(row, here, entered)
