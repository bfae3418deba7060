"""A torch and a CUDA library that are made up, for a process of its own: what the bindings ask of them is taken down.

The tensors say through DLPack's exchange API that they lie on a GPU, and the library that it computes. Layouts are those
that ``csrc/bindings/dlpack.h`` and ``csrc/cuda/cuda.h`` fix. What lives elsewhere: the tests (``test_bindings.py``).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from ctypes import (
    POINTER,
    PYFUNCTYPE,
    Structure,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    cast,
    py_object,
)
from types import SimpleNamespace

from tests.cuda import interface

CUDA, DEVICE, CURRENT, STREAM = 2, 3, 5, 0x57
DTYPES = {"float64": (2, 64), "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "bool": (6, 8)}
asked = []  # of torch and of the library, in order
workspace_bytes = 100


def core():
    """Return the native module: the package's, or the one that a planted bug is in (``cuda/planted.py``)."""
    if path := os.environ.get("FUSIONSUM_TEST_CORE"):
        spec = importlib.util.spec_from_file_location("tests.cuda._core", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return importlib.import_module("fusionsum._core")


_core = core()

# ---- torch -----------------------------------------------------------------------------------------------------------


class Tensor:
    """Memory of the process that nobody has written to yet, and which is not zero."""

    everywhere: dict[int, Tensor] = {}  # noqa: RUF012  by address; a number in the order in which they were made

    def __init__(self, *shape, dtype="float64", device=DEVICE, name=None):
        self.size, self.dtype, self.device = 1, dtype, device
        self.shape, self.strides = (c_int64 * len(shape))(*shape), (c_int64 * len(shape))()
        for axis in reversed(range(len(shape))):
            self.strides[axis] = self.size
            self.size *= shape[axis]
        self.bytes = self.size * DTYPES[dtype][1] // 8
        self.memory = (c_uint8 * max(16, self.bytes))(*[0xA5] * max(16, self.bytes))
        self.name = name
        Tensor.everywhere[ctypes.addressof(self.memory)] = self

    def is_neg(self):
        return False

    def zero_(self):
        asked.append(["zero_", self.name])
        ctypes.memset(self.memory, 0, self.bytes)

    @property
    def is_zero(self):
        return not any(self.memory[: self.bytes])


class DLTensor(Structure):
    """One of dlpack.h's."""

    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


@PYFUNCTYPE(c_int, py_object, POINTER(DLTensor))
def from_object(tensor, out):
    to = out[0]
    to.data, to.device_type, to.device_id, to.ndim = (
        cast(tensor.memory, c_void_p),
        CUDA,
        tensor.device,
        len(tensor.shape),
    )
    (to.code, to.bits), to.lanes, to.byte_offset = DTYPES[tensor.dtype], 1, 0
    to.shape, to.strides = tensor.shape, tensor.strides
    return 0


@PYFUNCTYPE(c_int, c_int32, c_int32, POINTER(c_void_p))
def work_stream(kind, index, out):
    asked.append(["stream", kind, index])
    out[0] = STREAM
    return 0


class ExchangeApi(Structure):
    """One of dlpack.h's. A GPU's memory is torch.empty's: by this nothing is allocated, nor made a tensor of."""

    _fields_ = (
        ("major", c_uint32),
        ("minor", c_uint32),
        ("previous", c_void_p),
        ("allocate", c_void_p),
        ("managed_from_object", c_void_p),
        ("to_object", c_void_p),
        ("from_object", type(from_object)),
        ("work_stream", type(work_stream)),
    )


exchange_api = ExchangeApi(1, 3, None, None, None, None, from_object, work_stream)
CAPSULE = b"dlpack_exchange_api"  # by its address too, for as long as the capsule
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = py_object, [c_void_p, c_char_p, c_void_p]
Tensor.__dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(exchange_api), CAPSULE, None)


def empty(shape, dtype, device):
    made = sum((tensor.name or "").startswith("empty") for tensor in Tensor.everywhere.values())
    tensor = Tensor(*shape, dtype=dtype, device=device[1], name=f"empty {made}")
    asked.append(["empty", *device, dtype, *shape])
    return tensor


def _made_up():
    watchers = ("_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_is_tracing")
    c = SimpleNamespace(**dict.fromkeys(watchers, lambda: False))
    c._cuda_exchangeDevice = lambda device: asked.append(["device", device]) or CURRENT
    c._cuda_maybeExchangeDevice = lambda device: asked.append(["device back", device])
    torch = SimpleNamespace(**{name: name for name in DTYPES}, empty=empty, device=lambda kind, index: (kind, index))
    torch.Tensor, torch._C = Tensor, c
    torch.nn = SimpleNamespace(Parameter=type("Parameter", (), {}))
    torch.autograd = SimpleNamespace(forward_ad=SimpleNamespace(_current_level=-1))
    return torch


torch = _made_up()


def use_torch(load_cuda):
    """Hand the made-up torch to the bindings, and the function that hands them the library."""
    _core.use_torch(torch, None, None, load_cuda)


# ---- the library -----------------------------------------------------------------------------------------------------


def name_at(address):
    return address and Tensor.everywhere[address].name


def plan(problem, to, bytes_needed):
    problem = interface.Problem.from_address(problem)
    ctypes.memset(to, 7, library.plan_bytes)
    bytes_needed[0] = workspace_bytes
    operands = problem.operand[: problem.operands]
    asked.append(["plan", *([name_at(x) for x in (o.data, o.mask, o.grad)] for o in operands)])
    return None


def execute(of, device, stream, workspace):
    planned = set(ctypes.string_at(of, library.plan_bytes)) == {7}
    asked.append(["execute", planned, device, stream, name_at(workspace)])
    return None


library = interface.make(12_345, plan, execute)
address = interface.publish(library)


def use_cuda():
    return _core.use_cuda(address)


# ---- calls -----------------------------------------------------------------------------------------------------------


def call(*names, dtype="float64", devices=(), **options):
    """Call the forward function of two factors, "f" and "g", of shape (4, 6), and of weights where "w" is named."""
    tensors = operands(names or ("f", "g"), dtype, devices)
    weights = tensors.pop("w", None)
    present = options.get("present")
    return _core.fusion_sum(weights, tuple(tensors.values()), None, present, "one", -1, False)


def call_grad(*names, needs, dtype="float64", shape=(4, 6), grad_output_device=DEVICE):
    """Call the gradient likewise."""
    tensors = operands(names, dtype, (), shape)
    weights = tensors.pop("w", None)
    u = Tensor(*shape[:-1], dtype=dtype, name="u", device=grad_output_device)
    return _core.fusion_sum_grad(u, weights, tuple(tensors.values()), None, None, "one", -1, needs, False)


def operands(names, dtype, devices, shape=(4, 6)):
    placed = dict(zip(names, devices, strict=False))
    return {
        name: Tensor(*(shape[-1:] if name == "w" else shape), dtype=dtype, device=placed.get(name, DEVICE), name=name)
        for name in names
    }
