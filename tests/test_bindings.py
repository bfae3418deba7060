"""The bindings' way to the CUDA library, with neither GPU nor torch: tensors and a library that these tests make up.

What lives elsewhere: what arrays and tensors of the CPU may look like (``test_layouts.py``,
``test_autograd_routing.py``), the CUDA
kernels (``tests/cuda``).
"""

from __future__ import annotations

import json

import pytest

from conftest import require_native, run_python

require_native()

# A torch whose tensors say through DLPack's exchange API that they lie on CUDA device 3, and a CUDA library: both of the
# layouts that csrc/bindings/dlpack.h and csrc/cuda/cuda.h fix. Their functions take down what they are asked for.
MADE_UP = """
import ctypes, json, threading, time
from ctypes import CFUNCTYPE, POINTER, PYFUNCTYPE, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_uint8, c_uint16
from ctypes import c_uint32, c_uint64, c_void_p, cast, py_object
from types import SimpleNamespace
from fusionsum import _core

CUDA, DEVICE, FLOAT, STREAM = 2, 3, 2, 0x57
asked = []

class Tensor:
    def __init__(self, *shape):
        size = 1
        for extent in shape:
            size *= extent
        self.shape, self.memory = (c_int64 * len(shape))(*shape), (c_uint64 * size)()
        self.strides = (c_int64 * len(shape))()
        step = 1
        for axis in reversed(range(len(shape))):
            self.strides[axis], step = step, step * shape[axis]
    def is_neg(self):
        return False

class DLTensor(Structure):
    _fields_ = [("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
                ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16),
                ("shape", POINTER(c_int64)), ("strides", POINTER(c_int64)), ("byte_offset", c_uint64)]
class Managed(Structure):
    _fields_ = [("major", c_uint32), ("minor", c_uint32), ("manager", c_void_p), ("deleter", c_void_p),
                ("flags", c_uint64), ("tensor", DLTensor)]

made = {}  # what is allocated by DLPack, by address
allocated = []  # by torch.empty

def write(tensor, to):
    to.data, to.device_type, to.device_id, to.ndim = cast(tensor.memory, c_void_p), CUDA, DEVICE, len(tensor.shape)
    to.code, to.bits, to.lanes, to.byte_offset = FLOAT, 64, 1, 0
    to.shape, to.strides = tensor.shape, tensor.strides

@PYFUNCTYPE(c_int, POINTER(DLTensor), POINTER(POINTER(Managed)), c_void_p, c_void_p)
def allocate(prototype, out, context, set_error):
    wanted = prototype[0]
    tensor, managed = Tensor(*wanted.shape[: wanted.ndim]), Managed()
    asked.append(["allocate", wanted.device_type, wanted.device_id, wanted.code, wanted.bits, *tensor.shape])
    write(tensor, managed.tensor)
    made[ctypes.addressof(managed)] = tensor, managed
    out[0] = ctypes.pointer(managed)
    return 0

@PYFUNCTYPE(c_int, c_void_p, POINTER(c_void_p))
def to_object(managed, out):
    tensor = made[managed][0]
    ctypes.pythonapi.Py_IncRef(py_object(tensor))
    out[0] = id(tensor)
    return 0

@PYFUNCTYPE(c_int, py_object, POINTER(DLTensor))
def from_object(tensor, out):
    write(tensor, out[0])
    return 0

@PYFUNCTYPE(c_int, c_int32, c_int32, POINTER(c_void_p))
def work_stream(kind, index, out):
    out[0] = STREAM
    return 0

class ExchangeApi(Structure):
    _fields_ = [("major", c_uint32), ("minor", c_uint32), ("previous", c_void_p), ("allocate", type(allocate)),
                ("managed_from_object", c_void_p), ("to_object", type(to_object)), ("from_object", type(from_object)),
                ("work_stream", type(work_stream))]

exchange_api = ExchangeApi(1, 3, None, allocate, None, to_object, from_object, work_stream)
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = py_object, [c_void_p, c_char_p, c_void_p]
Tensor.__dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(exchange_api), b"dlpack_exchange_api", None)

@PYFUNCTYPE(c_char_p)
def unavailable():
    return None

@PYFUNCTYPE(c_char_p, c_void_p, c_void_p, POINTER(c_int64))
def plan(problem, to, workspace_bytes):
    ctypes.memset(to, 7, library.plan_bytes)
    workspace_bytes[0] = WORKSPACE
    return None

@PYFUNCTYPE(c_char_p, c_void_p, c_int, c_void_p, c_void_p)
def execute(of, device, stream, workspace):
    planned = set(ctypes.string_at(of, library.plan_bytes)) == {7}
    ours = [tensor for tensor in allocated if ctypes.addressof(tensor.memory) == workspace]
    asked.append(["execute", planned, device, stream, len(ours), workspace is None])
    return None

class CudaLibrary(Structure):
    _fields_ = [("unavailable", type(unavailable)), ("plan_bytes", c_int64), ("plan", type(plan)),
                ("execute", type(execute))]

library = CudaLibrary(unavailable, 12_345, plan, execute)
WORKSPACE = 100

@PYFUNCTYPE(c_void_p)
def fusionsum_cuda():
    return ctypes.addressof(library)

def use_cuda():
    return _core.use_cuda(cast(fusionsum_cuda, c_void_p).value)

def use_torch(load_cuda):
    c = SimpleNamespace(**dict.fromkeys(
        ("_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_is_tracing"), lambda: False))
    c._cuda_exchangeDevice = lambda device: asked.append(["device", device]) or 5
    c._cuda_maybeExchangeDevice = lambda device: asked.append(["device back", device])
    def empty(shape, dtype, device):
        asked.append(["empty", *device, dtype, *shape])
        tensor = Tensor(*shape)
        allocated.append(tensor)
        return tensor
    _core.use_torch(SimpleNamespace(
        empty=empty, device=lambda kind, index: (kind, index), float64="float64",
        Tensor=Tensor, nn=SimpleNamespace(Parameter=type("Parameter", (), {})), _C=c,
        autograd=SimpleNamespace(forward_ad=SimpleNamespace(_current_level=-1))), None, None, load_cuda)

def call():
    return _core.fusion_sum(None, (Tensor(4, 6), Tensor(4, 6)), None, None, "one", -1, False)
"""


def asked_for(code):
    """Run code that ends by printing JSON."""
    return json.loads(run_python(MADE_UP + code))


def test_the_first_call_on_two_threads():
    """While one thread loads the library, which takes as long as the other needs to arrive, neither call is declined."""
    code = """
loads = []
def load_cuda():
    loads.append(time.monotonic())
    deadline = time.monotonic() + 20
    while len(arrived) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    use_cuda()
use_torch(load_cuda)
arrived, results = [], []
def first():
    arrived.append(None)
    results.append(call())
threads = [threading.Thread(target=first) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([type(result).__name__ for result in results]))
"""
    assert asked_for(code) == ["Tensor", "Tensor"]


def test_without_a_library_calls_are_declined():
    code = """
use_torch(lambda: "there is none")
print(json.dumps([call() is NotImplemented for _ in range(2)]))
"""
    assert asked_for(code) == [True, True]


@pytest.mark.parametrize("workspace", [0, 100])
def test_the_caller_allocates_what_the_plan_needs(workspace):
    """By torch.empty, on the tensors' device, as float64; launches go to torch's stream of the device, which is current."""
    code = f"""
WORKSPACE = {workspace}
use_torch(use_cuda)
call()
print(json.dumps(asked))
"""
    output, *between, executed, back = asked_for(code)
    assert output == ["empty", "cuda", 3, "float64", 4]
    *scratch, device = between
    assert scratch == ([["empty", "cuda", 3, "float64", 13]] if workspace else [])  # ceil(100 / 8)
    assert device == ["device", 3]
    assert executed == ["execute", True, 3, 0x57, int(bool(workspace)), not workspace]
    assert back == ["device back", 5]


@pytest.mark.parametrize("step", ["plan", "execute"])
def test_an_error_of_the_library_is_a_python_error(step):
    code = f"""
use_torch(use_cuda)
failing = {step}
library.{step} = type(failing)(lambda *arguments: b"it is too hot")
try:
    call()
except RuntimeError as error:
    print(json.dumps([str(error), asked[1:]]))
"""
    # an error of a launch leaves torch's device as it was
    between = [] if step == "plan" else [["empty", "cuda", 3, "float64", 13], ["device", 3], ["device back", 5]]
    assert asked_for(code) == ["it is too hot", between]
