"""The bindings' way to the CUDA library, with neither GPU nor torch: tensors and a library that these tests make up.

What lives elsewhere: what is made up (``made_up_gpu.py``), what arrays and tensors of the CPU may look like
(``test_layouts.py``, ``test_autograd_routing.py``), the CUDA kernels (``tests/cuda``).
"""

from __future__ import annotations

import json
import os
import sys

import pytest

from conftest import require_native, run_python

require_native()

OUTPUT = ["empty", "cuda", 3, "float64", 4]
WORKSPACE = ["empty", "cuda", 3, "float64", 13]  # ceil(100 / 8)
AROUND = [["device", 3], ["stream", 2, 3]], [["device back", 5]]


def asked_for(code):
    """Run code that ends by printing JSON."""
    code = f"import json, threading, time\nimport made_up_gpu as gpu\n{code}"
    return json.loads(run_python(code, PYTHONPATH=os.pathsep.join(sys.path)))


def test_the_first_call_on_two_threads():
    """While one thread loads the library, which takes as long as the other needs to arrive, neither call is declined."""
    code = """
def load_cuda():
    deadline = time.monotonic() + 20
    while len(arrived) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    gpu.use_cuda()
gpu.use_torch(load_cuda)
arrived, results = [], []
def first():
    arrived.append(None)
    results.append(gpu.call())
threads = [threading.Thread(target=first) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([type(result).__name__ for result in results]))
"""
    assert asked_for(code) == ["Tensor", "Tensor"]


def test_without_a_library_calls_are_declined():
    code = """
gpu.use_torch(lambda: "there is none")
results = [gpu.call(), gpu.call(), gpu.call_grad("f", "g", needs=(False, True, True))]
print(json.dumps([[result is NotImplemented for result in results], gpu.asked]))
"""
    assert asked_for(code) == [[True] * 3, []]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_forward(dtype):
    """The arrays go to the library as they lie; it is asked on torch's stream of their device, which is made current."""
    code = f"""
gpu.use_torch(gpu.use_cuda)
output = gpu.call("w", "f", "g", dtype={dtype!r})
print(json.dumps([output.name, output.dtype, gpu.asked]))
"""
    output = ["empty", "cuda", 3, dtype, 4]
    planned = ["plan", [None, None, "empty 0"], ["w", None, None], ["f", None, None], ["g", None, None]]
    before, after = AROUND
    executed = ["execute", True, 3, 0x57, "empty 1"]
    assert asked_for(code) == ["empty 0", dtype, [output, planned, WORKSPACE, *before, executed, *after]]


def test_masks():
    code = """
gpu.use_torch(gpu.use_cuda)
gpu.call("f", "g", present=(None, gpu.Tensor(4, dtype="bool", name="m")))
print(json.dumps([entry for entry in gpu.asked if entry[0] == "plan"]))
"""
    assert asked_for(code) == [["plan", [None, None, "empty 0"], ["f", None, None], ["g", "m", None]]]


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)])
def test_backward(needs):
    """A gradient for each operand that needs one, and no memory for the others."""
    code = f"""
gpu.use_torch(gpu.use_cuda)
grads = gpu.call_grad("w", "f", "g", needs={needs})
print(json.dumps([[grad and grad.name for grad in grads], gpu.asked]))
"""
    names = iter(f"empty {k}" for k in range(4))
    wanted = [next(names) if need else None for need in needs]
    allocated = [
        ["empty", "cuda", 3, "float64", *shape]
        for shape, need in zip([(6,), (4, 6), (4, 6)], needs, strict=True)
        if need
    ]
    planned = ["plan", ["u", None, None], *([name, None, grad] for name, grad in zip("wfg", wanted, strict=True))]
    before, after = AROUND
    executed = ["execute", True, 3, 0x57, next(names)]
    assert asked_for(code) == [wanted, [*allocated, planned, WORKSPACE, *before, executed, *after]]


def test_nothing_is_computed_that_nobody_needs():
    code = """
gpu.use_torch(gpu.use_cuda)
print(json.dumps([gpu.call_grad("w", "f", "g", needs=(False, False, False)), gpu.asked]))
"""
    assert asked_for(code) == [[None] * 3, []]


def test_no_workspace_where_the_plan_needs_none():
    code = """
gpu.workspace_bytes = 0
gpu.use_torch(gpu.use_cuda)
gpu.call()
print(json.dumps(gpu.asked))
"""
    before, after = AROUND
    asked = asked_for(code)
    assert asked[:1] + asked[2:] == [OUTPUT, *before, ["execute", True, 3, 0x57, None], *after]


def test_empty_sums_are_zero():
    """What nothing is added to is 0, on memory that held something else; and the library is not asked."""
    code = """
gpu.use_torch(gpu.use_cuda)
f, g = (gpu.Tensor(4, 0) for _ in range(2))
output = gpu._core.fusion_sum(None, (f, g), None, None, "one", -1, False)
grads = gpu.call_grad("w", "f", "g", shape=(0, 6), needs=(True, True, True))
print(json.dumps([[output.is_zero, output.size], [[x.is_zero, x.size] for x in grads], [entry[0] for entry in gpu.asked]]))
"""
    output, grads, asked = asked_for(code)
    assert output == [True, 4]
    assert grads == [[True, 6], [True, 0], [True, 0]]
    assert asked == ["empty", "zero_"] * 4


@pytest.mark.parametrize("left_behind", ["w", "f", "g", "u", "m"])
def test_tensors_on_different_devices_are_declined(left_behind):
    """Before anything is allocated: Python's side words the error."""
    call = {
        "u": 'gpu.call_grad("w", "f", "g", needs=(True, True, True), grad_output_device=4)',
        "m": 'gpu.call("f", "g", present=(None, gpu.Tensor(4, dtype="bool", device=4)))',
    }.get(left_behind, f'gpu.call("w", "f", "g", devices=[3 + (name == {left_behind!r}) for name in "wfg"])')
    code = f"""
gpu.use_torch(gpu.use_cuda)
print(json.dumps([{call} is NotImplemented, gpu.asked]))
"""
    assert asked_for(code) == [True, []]


@pytest.mark.parametrize("call", ["gpu.call()", 'gpu.call_grad("f", "g", needs=(False, True, True))'])
@pytest.mark.parametrize("step", ["plan", "execute"])
def test_an_error_of_the_library_is_a_python_error(step, call):
    """And torch's device is what it was, also then."""
    code = f"""
gpu.use_torch(gpu.use_cuda)
failing = gpu.library.{step}
gpu.library.{step} = type(failing)(lambda *arguments: gpu.interface.error("it is too hot"))
try:
    {call}
except RuntimeError as error:
    print(json.dumps([str(error), [entry for entry in gpu.asked if entry[0] != "empty"]]))
"""
    before, after = AROUND
    between = [] if step == "plan" else [*before, *after]
    said, asked = asked_for(code)
    assert (said, [entry for entry in asked if entry[0] != "plan"]) == ("it is too hot", between)


@pytest.mark.parametrize("step", ["empty", "_C._cuda_exchangeDevice"])
def test_an_error_of_torch_is_passed_on(step):
    """No memory, no device: as torch says it, and the library launches nothing."""
    code = f"""
def fail(*arguments, **options):
    raise MemoryError("there is no more")
gpu.use_torch(gpu.use_cuda)
*path, name = {step!r}.split(".")
setattr(getattr(gpu.torch, *path) if path else gpu.torch, name, fail)
try:
    gpu.call()
except MemoryError as error:
    print(json.dumps([str(error), [entry[0] for entry in gpu.asked]]))
"""
    said, asked = asked_for(code)
    assert said == "there is no more"
    assert "execute" not in asked
    assert asked.count("device") == asked.count("device back")
