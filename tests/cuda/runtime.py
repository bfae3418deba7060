"""The CUDA library as nvcc builds it, on a runtime of ours that needs no driver and launches nothing (``runtime.cpp``).

    runtime = Runtime(build())
    native.use_cuda(runtime.address)
    with runtime.failing(2, 700): ...       # the third of the calls within that can fail, with that error
    runtime.calls, runtime.launches

What lives elsewhere: the library that computes (``emulation.py``), what launches have to be (``test_launches.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
from collections.abc import Iterator, Sequence

from tests import compiled
from tests.cuda import ptx, sass
from tests.cuda.emulation import Launch
from tests.cuda.planted import Bug, plant

__all__ = ["Runtime", "build"]

_HERE = pathlib.Path(__file__).parent
_BUILD = sass.ROOT / "build" / "cuda-runtime"


def build(sources: Sequence[pathlib.Path], bug: Bug | None = None) -> pathlib.Path:
    """
    Compile the library by nvcc and link it to our runtime.

    Parameters
    ----------
    sources
        Relative paths are from csrc, or from its copy with the bug.
    bug
        Planted into the sources.

    Returns
    -------
    pathlib.Path
        The shared library. It holds PTX and no code of a GPU: no host's code depends on that.

    Raises
    ------
    RuntimeError
        If a compiler or the linker fails, as for a function of the runtime that ours lacks; the message is quoted.
    """
    nvcc = sass.require_tool("nvcc")
    folder = _BUILD / (bug.name if bug else "product")
    with compiled.locked(folder):
        root = sass.ROOT / "csrc"
        if bug:
            plant(bug, root, folder / "csrc")
            root = folder / "csrc"
        flags = (
            *(root / "cuda" / "nvcc.options").read_text().split(),
            *("-arch=compute_80", "-Xcompiler=-fPIC", '-DFUSIONSUM_CUDA_ARCHITECTURES="80"', "-I", str(root)),
        )
        return compiled.link(
            folder / "libfusionsum_cuda.so",
            {root / source: flags for source in sources} | {_HERE / "runtime.cpp": (*flags, "-I", str(_HERE))},
            ("-shared", "-cudart=none", "-Xlinker=-z,defs"),
            nvcc,
        )


class _Call(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_char_p),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("parameters", ctypes.c_void_p),
        ("shared", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int32),
    )


class Runtime:
    """
    The library, loaded; its records and the state of its runtime are of the process.

    Parameters
    ----------
    path
        Of :func:`build`.

    Attributes
    ----------
    calls : list of str
        The runtime's functions that were called and can fail.
    launches : list of Launch
        Those that were not made to fail.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.calls: list[str] = []
        self.launches: list[Launch] = []
        self.kernels = {
            name: module.kernel(name) for module in map(ptx.parse, sass.ptx_of(path)) for name in module.entries
        }
        self._failing: dict[int, int] = {}
        self._library = ctypes.CDLL(str(path))
        self._answer = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Call))(self._answered)
        self._library.runtime_answer_by(self._answer)

    def _answered(self, asked: ctypes._Pointer[_Call]) -> int:
        call = asked[0]
        if error := self._failing.get(len(self.calls), self._failing.get(-1, 0)):
            self.calls.append(call.function.decode())
            return error
        self.calls.append(call.function.decode())
        if call.function == b"cudaLaunchKernel":
            name = call.kernel.decode()
            parameters = ctypes.string_at(call.parameters, self.kernels[name].parameters.size)
            place = (call.stream or 0, call.shared, call.device)
            self.launches.append(Launch(name, tuple(call.grid), tuple(call.block), parameters, *place))
        return 0

    @property
    def address(self) -> int:
        """Where ``fusionsum_cuda`` is."""
        address = ctypes.cast(self._library.fusionsum_cuda, ctypes.c_void_p).value
        assert address is not None
        return address

    @property
    def left(self) -> tuple[int, int]:
        """What a call must leave as it was: the thread's mode of capture, and CUDA's last error."""
        return self._library.runtime_capture_mode(), self._library.runtime_last_error()

    def on_device(self, device: int) -> None:
        """Make a device current."""
        self._library.runtime_set_device(device)

    def clear(self) -> None:
        """Forget the records."""
        del self.calls[:], self.launches[:]

    @contextlib.contextmanager
    def failing(self, call: int, error: int) -> Iterator[None]:
        """Let a call, counted from here, return an error; -1: every call, as after a kernel that failed."""
        self.clear()
        self._failing = {call: error}
        try:
            yield
        finally:
            self._failing = {}
