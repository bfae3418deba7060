"""The choice of backend: what importing does and does not do, in which order, and what the environment may override.

What lives elsewhere: the instruction sets' results (``test_kernel.py``), pools and forks (``test_parallel.py``).
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

import fusionsum as fs
from conftest import ACTIVATIONS, DTYPES, backend, require_native, run_python

WITHOUT_NATIVE = "import sys; sys.modules['fusionsum._core'] = None\n"
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"
SUM = """
import numpy as np, fusionsum as fs
assert fs.fusion_sum(np.ones(5), np.ones((3, 5)), np.ones((3, 5))).tolist() == [5.0] * 3
assert [d.tolist() for d in fs.fusion_sum_grad(np.ones(1), None, np.full((1, 2), 3.0))[1:]] == [[[1.0, 1.0]]]
"""
SUM_OF_TENSORS = """
z = torch.ones(3, 5, requires_grad=True)
fs.fusion_sum(torch.ones(5), z, z).sum().backward()
assert z.grad.tolist() == [[2.0] * 5] * 3
"""
DEFAULTS = {"FUSIONSUM_BACKEND": "", "FUSIONSUM_REQUIRE_NATIVE": "", "FUSIONSUM_ISA": "", "FUSIONSUM_NUM_THREADS": ""}
WARNED = "import warnings; caught = warnings.catch_warnings(record=True).__enter__(); warnings.simplefilter('always')\n"


def error_of(code: str, **environment: str) -> str:
    """Return the error that the code ends with, as Python words it."""
    indented = "\n".join("    " + line for line in code.splitlines())
    caught = f"try:\n{indented}\nexcept Exception as error:\n    print(type(error).__name__ + ':', error)"
    return run_python(caught, **DEFAULTS | environment)


# Imports


@pytest.mark.parametrize("order", [("torch", "fusionsum"), ("fusionsum", "torch")], ids=" ".join)
def test_any_order_of_imports(order):
    run_python("".join(f"import {name}\n" for name in order) + SUM + SUM_OF_TENSORS)


def test_torch_after_use():
    run_python(SUM + "import torch\n" + SUM_OF_TENSORS + SUM)


def test_no_torch():
    run_python(WITHOUT_TORCH + SUM)


def test_torch_is_not_imported_for_a_user_of_numpy():
    run_python(
        SUM + "import sys; assert not {'torch', 'ml_dtypes', 'sklearn', 'matplotlib', 'tqdm'} & set(sys.modules)"
    )


def test_no_native_module_works_and_says_so():
    said = run_python(WITHOUT_NATIVE + WARNED + SUM + "print([str(w.message) for w in caught])", **DEFAULTS)
    assert said.count("fusionsum runs on NumPy") == 1
    assert "compiler" in said
    assert "not usable" in run_python(
        WITHOUT_NATIVE + WARNED + "import fusionsum as fs; print(fs.backends()['cpu'])", **DEFAULTS
    )
    run_python(WITHOUT_NATIVE + WARNED + "import torch\n" + SUM + SUM_OF_TENSORS, **DEFAULTS)


def test_no_native_module_is_silent_where_numpy_is_asked_for():
    code = WITHOUT_NATIVE + WARNED + SUM + "assert not caught"
    run_python(code, **DEFAULTS | {"FUSIONSUM_BACKEND": "numpy"})


@pytest.mark.parametrize("setting", ["FUSIONSUM_REQUIRE_NATIVE=1", "FUSIONSUM_BACKEND=cpu", "FUSIONSUM_BACKEND=cuda"])
def test_no_native_module_is_an_error_where_it_is_required(setting):
    said = error_of(WITHOUT_NATIVE + "import fusionsum", **dict([setting.split("=")]))
    assert said.startswith("ImportError:")
    assert setting.split("=")[0] in said


def test_an_unknown_backend_is_an_error():
    said = error_of("import fusionsum", FUSIONSUM_BACKEND="gpu")
    assert said.startswith("ValueError: FUSIONSUM_BACKEND='gpu': expected one of")


def test_importing_and_calling_change_nothing_process_wide():
    code = """
import decimal, gc, locale, os, random, resource, signal, sys, threading, warnings
import numpy as np
random.seed(0); np.random.seed(0)
def state():
    tiny = np.float64(5e-324)
    return {
        "signals": [signal.getsignal(s) for s in sorted(signal.valid_signals())],
        "flags of the processor": (tiny * np.float64(1) == tiny, np.float32(1e-40) * np.float32(1) != 0),
        "rounding": (np.float64(1) + np.float64(1.2e-16), np.float32(1) / np.float32(3), np.float32(2) / np.float32(3)),
        "numpy": (np.geterr(), str(np.get_printoptions()), np.random.get_state()[1].tolist()),
        "random": random.getstate(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "limits": [resource.getrlimit(r) for r in (resource.RLIMIT_STACK, resource.RLIMIT_AS)],
        "affinity": os.sched_getaffinity(0),
        "hooks": (sys.excepthook, sys.meta_path[:], threading.excepthook, sys.getrecursionlimit(), gc.get_threshold()),
        "warnings": warnings.filters[:],
        "precision": decimal.getcontext().prec,
        "streams": (sys.stdout, sys.stderr),
    }
def same(after, before):
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, changed
start, tasks = state(), len(os.listdir("/proc/self/task"))
import fusionsum as fs
same(state(), start)
assert len(os.listdir("/proc/self/task")) == tasks
z = np.random.default_rng(0).standard_normal((3000, 257)).astype("f4")
fs.fusion_sum_grad(fs.fusion_sum(None, z, z, activations="gelu"), None, z, z, activations="tanh")
same(state(), start)
import torch
now, threads, default = state(), torch.get_num_threads(), torch.get_default_dtype()
seed = torch.random.get_rng_state()
fs.fusion_sum(None, torch.from_numpy(z), torch.from_numpy(z).requires_grad_()).sum().backward()
same(state(), now)
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, default)
assert torch.equal(torch.random.get_rng_state(), seed)
assert torch.is_grad_enabled()
"""
    run_python(code)


# Settings


def test_backends_says_what_is_usable(monkeypatch):
    said = fs.backends()
    assert list(said) == ["cuda", "cpu", "numpy"]
    assert all(line.startswith(("usable", "not usable: ")) for line in said.values())
    monkeypatch.setattr(backend, "native", None)
    assert fs.backends()["cpu"].startswith("not usable: ")
    assert fs.get_num_threads() == 1
    fs.set_num_threads(3)
    assert fs.get_num_threads() == 1


def test_the_native_module_is_used_unless_numpy_is_asked_for():
    require_native()
    show = "import fusionsum as fs; print(fs.backends()['cpu'])"
    assert run_python(show, **DEFAULTS).startswith("usable: ")
    assert "FUSIONSUM_BACKEND=numpy" in run_python(show, **DEFAULTS | {"FUSIONSUM_BACKEND": "numpy"})


@pytest.mark.parametrize("count", [0, -1, -(2**40), 2**31, 2**63, 2**80])
def test_a_wrong_number_of_threads(count):
    with pytest.raises(ValueError, match=r"^count: expected"):
        fs.set_num_threads(count)


@pytest.mark.parametrize("count", [None, 1.0, "2", True, [1]])
def test_a_number_of_threads_that_is_none(count):
    with pytest.raises(TypeError, match=r"^count: expected an integer"):
        fs.set_num_threads(count)


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({"FUSIONSUM_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": ""}, len(os.sched_getaffinity(0))),
        ({"FUSIONSUM_NUM_THREADS": "none", "OMP_NUM_THREADS": "0"}, len(os.sched_getaffinity(0))),
    ],
    ids=str,
)
def test_the_number_of_threads_from_the_environment(environment, want):
    require_native()
    show = "import fusionsum as fs; print(fs.get_num_threads())"
    assert int(run_python(show, **DEFAULTS | environment)) == want


def test_the_number_of_threads_from_the_affinity():
    require_native()
    show = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nimport fusionsum as fs\n"
    assert run_python(show + "print(fs.get_num_threads())", **DEFAULTS | {"OMP_NUM_THREADS": ""}).strip() == "1"


def test_torch_s_number_of_threads_is_the_number():
    require_native()
    code = """
import torch, fusionsum as fs
fs.fusion_sum(None, torch.ones(2, 2))
for count in (1, 2):
    torch.set_num_threads(count)
    assert fs.get_num_threads() == count
fs.set_num_threads(3)
assert torch.get_num_threads() == fs.get_num_threads() == 3
"""
    run_python(code)


def test_the_lists_of_python_are_those_of_lists_h():
    native = require_native()
    assert native.dtypes == DTYPES
    assert native.activations == tuple(name for name in ACTIVATIONS if name)


def test_a_torch_without_the_exchange_api_is_an_error_that_says_which_is_needed():
    native = require_native()
    old = SimpleNamespace(Tensor=type("Tensor", (), {}), __version__="2.9.1")
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, .*; this is torch 2\.9\.1$"):
        native.use_torch(old, None, None, None)
    torch = pytest.importorskip("torch")
    assert fs.fusion_sum(None, torch.ones(3)) == 3  # the torch that there was is kept


# CUDA, on machines without it


def test_why_cuda_is_off_is_said():
    require_native()
    reason = backend.load_cuda()
    assert reason == "" or "FUSIONSUM_CUDA=ON" in reason or reason.startswith("CUDA finds no")
    assert fs.backends()["cuda"] == (f"not usable: {reason}" if reason else "usable")


def test_a_cuda_library_that_cannot_be_loaded_is_no_error_until_it_is_needed(tmp_path):
    code = """
import ctypes, sys
class Broken(ctypes.CDLL):
    def __init__(self, name, *rest, **options):
        if "fusionsum_cuda" in str(name):
            raise OSError("it is broken")
        super().__init__(name, *rest, **options)
ctypes.CDLL = Broken
import os
exists = os.path.exists
os.path.exists = lambda path: "fusionsum_cuda" in str(path) or exists(path)
import fusionsum as fs
print(fs.backends()["cuda"])
"""
    assert run_python(code + SUM, **DEFAULTS).strip() == "not usable: it is broken"
