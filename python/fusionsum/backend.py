"""Which backends are usable on this machine, and why one is not: CUDA, the CPU's kernels, NumPy.

What lives here: the one import of the native module, the environment's overrides, `backends()`. What lives elsewhere: the
choice of instruction set (``csrc/dispatch.cpp``), the routing of a call (``api.py``).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import warnings
from typing import Any

_BACKENDS = ("numpy", "cpu", "cuda")
_MAX_THREADS = 1024

_core: Any = None
missing = ""
try:
    _core = importlib.import_module("fusionsum._core")
except ImportError as error:
    missing = f"the native module is missing ({error}); it is built at install time and needs a C++17 compiler"

_override = os.environ.get("FUSIONSUM_BACKEND", "")
if _override not in ("", *_BACKENDS):
    raise ValueError(f"FUSIONSUM_BACKEND={_override!r}: expected one of {', '.join(_BACKENDS)}")
if _core is None:
    if os.environ.get("FUSIONSUM_REQUIRE_NATIVE", "0") not in ("", "0"):
        raise ImportError(f"FUSIONSUM_REQUIRE_NATIVE is set, but {missing}")
    if _override == "cpu":
        raise ImportError(f"FUSIONSUM_BACKEND=cpu asks for native kernels, but {missing}")
    if _override != "numpy":
        warnings.warn(f"fusionsum runs on NumPy, correct but slow: {missing}", RuntimeWarning, stacklevel=3)

#: The native module, or None where it is missing or FUSIONSUM_BACKEND=numpy asks for NumPy.
native: Any = None if _override == "numpy" else _core


@functools.cache
def load_cuda() -> str:
    """Load the CUDA library into the native module; return why it cannot be used, or nothing."""
    if native is None:
        return missing or "FUSIONSUM_BACKEND=numpy is set"
    path = os.path.join(os.path.dirname(_core.__file__), "libfusionsum_cuda.so")
    if not os.path.exists(path):
        return (
            "the CUDA kernels are not in this build; with nvcc on the PATH, "
            "pip install . -C cmake.define.FUSIONSUM_CUDA=ON builds them"
        )
    try:
        address = ctypes.cast(ctypes.CDLL(path).fusionsum_cuda, ctypes.c_void_p).value
    except OSError as error:
        return str(error)
    return native.use_cuda(address) or ""


if _override == "cuda" and load_cuda():
    raise ImportError(f"FUSIONSUM_BACKEND=cuda asks for CUDA kernels, but {load_cuda()}")


def adopt_torch(torch: Any) -> None:
    """Let the native module read tensors, and work on torch's threads where libtorch exports its pool.

    Raises
    ------
    ImportError
        For torch before 2.10, whose tensors do not offer DLPack's exchange API.
    """
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        raise ImportError(f"fusionsum takes tensors of torch 2.10 or newer, found torch {torch.__version__}")
    if native is None:
        return
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    pool: list[int | None] = [None, None]
    if os.path.exists(library):
        symbols = ctypes.CDLL(library)  # loaded already, by torch
        for i, name in enumerate(("torch_parallel_for", "torch_get_num_threads")):
            if hasattr(symbols, name):
                pool[i] = ctypes.cast(getattr(symbols, name), ctypes.c_void_p).value
    native.use_torch(torch, *(pool if all(pool) else (None, None)), load_cuda)


def backends() -> dict[str, str]:
    """Say which backends are usable and, where one is not, why.

    Returns
    -------
    dict of str to str
        ``"cuda"`` (asking for it initialises CUDA), ``"cpu"`` and ``"numpy"``, each with ``"usable"`` and its detail, or
        ``"not usable: <reason>"``.

    Examples
    --------
    >>> import fusionsum as fs
    >>> fs.backends()["numpy"]
    'usable'
    """
    if native is not None:
        cpu = f"usable: {native.isa()}"
    else:
        cpu = f"not usable: {missing or 'FUSIONSUM_BACKEND=numpy is set'}"
    reason = load_cuda()
    return {"cuda": f"not usable: {reason}" if reason else "usable", "cpu": cpu, "numpy": "usable"}


def set_num_threads(count: int) -> None:
    """Set how many threads the native kernels use; results do not depend on it.

    With torch imported, torch's pool does the work, and this function calls ``torch.set_num_threads``.

    Parameters
    ----------
    count : int
        From 1 to 1024.

    Raises
    ------
    TypeError
        If `count` is not an integer.
    ValueError
        If `count` is out of range.

    Examples
    --------
    >>> import fusionsum as fs
    >>> before = fs.get_num_threads()
    >>> fs.set_num_threads(1)
    >>> fs.get_num_threads()
    1
    >>> fs.set_num_threads(before)
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count: expected an integer, got {type(count).__name__}")
    if not 1 <= count <= _MAX_THREADS:
        raise ValueError(f"count: expected 1 to {_MAX_THREADS}, got {count}")
    if native is None:
        return
    if native.thread_backend() == "torch":
        sys.modules["torch"].set_num_threads(count)
    else:
        native.set_num_threads(count)


def get_num_threads() -> int:
    """Return how many threads the native kernels use (1 where there are none).

    Examples
    --------
    >>> import fusionsum as fs
    >>> fs.get_num_threads() >= 1
    True
    """
    return 1 if native is None else native.get_num_threads()
