"""The CUDA kernels on a GPU, as torch's users meet them: autograd, streams, devices, graphs, errors, bits, sizes.

What lives elsewhere: losses and searches (``test_on_gpu_scores.py``); arithmetic and layouts, whose tests run on a GPU with
FUSIONSUM_TEST_DEVICE=cuda (``test_kernel.py``, ``test_formula.py``, ``test_layouts.py``); all that needs no GPU
(``test_emulated.py``); the script that runs everything (``on_gpu.sh``).
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import device
import fusionsum as fs
from bench.gpu import captured
from conftest import DTYPES, FORMS, MIXED, TABLE, check_backward, check_both, check_forward, random, run_python
from eager import MASKS, fused, to_torch
from fusionsum import api, backend, reference
from tests.cuda import cases
from tests.cuda.gpu import ONE_SECOND, leave_dirt, require, same_bits

require()

# torch's own, on its first use of inductor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:TensorFloat32:UserWarning")

LARGE = {
    "B": 2000,
    "n": 257,
    "O": 7,
    "K": 3,
    "C": 7,
}  # sums of several blocks, below what goes to a product of matrices


def sent(case, where="cuda"):
    """Return the operands as leaves on a device, and the function of them."""
    operands, options = to_torch(case)
    masks = options["present"] and [mask if mask is None else mask.to(where) for mask in options["present"]]
    return [x.to(where).requires_grad_() for x in operands], fused(
        options | {"present": masks}, case.weights is not None
    )


def both(function, operands, u):
    """Return output and gradients without their graph, whose leaves would hold on to the stream it was made on."""
    output = function(*operands)
    return [output.detach(), *torch.autograd.grad(output, operands, u)]


def check(case, rng, where="cuda"):
    """Compare with float64 on the CPU, within the bounds that the CPU's kernels keep."""
    operands, function = sent(case, where)
    u = random(rng, case.output_shape, reference.result_dtype(*case.operands).name)
    found = both(function, operands, torch.from_numpy(u).to(where))
    assert all(x.device == operands[0].device for x in found)
    output, *grads = (x.cpu().numpy() for x in found)
    check_forward(case, output)
    check_backward(case, u, grads)


def masked(form, rng, **sizes):
    return FORMS[form].case(rng, "float32", activations="tanh", **sizes).masked(rng, "rows", "one")


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + list(MIXED), ids="-".join)
def test_every_kernel(dtypes, rng, monkeypatch):
    """Small calls that launch all there are, by the way of NumPy arrays; what the sanitizers run."""
    monkeypatch.setattr(device, "DEVICE", "cuda")
    monkeypatch.setattr(api, "native", device.placed(backend._core))
    for _, case in cases.cases([dtypes]):
        check_both(case, rng)


def test_sums_of_several_blocks(rng, monkeypatch):
    monkeypatch.setattr(device, "DEVICE", "cuda")
    monkeypatch.setattr(api, "native", device.placed(backend._core))
    for _, case in cases.large_cases():
        check_both(case, rng)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_autograd(form, dtype, masks, rng):
    for activations in (None, "tanh", "gelu"):
        case = FORMS[form].case(rng, dtype, activations=activations, kind="uniform", B=9, n=67, O=33, C=5)
        check(case if MASKS[masks] is None else case.masked(rng, *MASKS[masks]), rng)


@pytest.mark.parametrize("form", ["all pairs", "mixing"])
def test_products_of_matrices(form, rng):
    check(FORMS[form].case(rng, "float32", B=300, C=300, O=300, n=64), rng)


@pytest.mark.parametrize("sizes", [{"n": 0}, {"B": 0}, {"n": 0, "B": 0}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_empty_sums(form, sizes, rng):
    leave_dirt()
    check(FORMS[form].case(rng, "float32", **sizes), rng)


@pytest.mark.parametrize("form", [*TABLE, "one weight per row", "one weight"])
def test_the_same_bits_in_100_runs(form, rng):
    case = masked(form, rng, **LARGE)
    operands, function = sent(case)
    u = torch.randn(case.output_shape, device="cuda")
    first = both(function, operands, u)
    assert all(x.isfinite().all() for x in first)
    for _ in range(99):
        leave_dirt()  # which workspace that is read before it is written would find
        assert same_bits(both(function, operands, u), first)


def test_more_than_two_to_the_31_elements():
    terms, rows, needed = 64, 2**31 // 64 + 5, 14 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"missing: {needed // 2**30} GiB of free GPU memory")
    w, g, f = (torch.randn(shape, device="cuda", dtype=torch.float16) for shape in (terms, terms, (rows, terms)))
    u = torch.randn(rows, device="cuda", dtype=torch.float16)
    output, d_f = both(lambda f: fs.fusion_sum(w, f, g), [f.requires_grad_()], u)
    for part in (slice(0, 9), slice(rows - 9, None)):
        factor = w.double() * g.double()
        torch.testing.assert_close(
            output[part], (factor * f[part].detach().double()).sum(-1).half(), rtol=2e-3, atol=1e-3
        )
        torch.testing.assert_close(d_f[part], (factor * u[part, None].double()).half(), rtol=2e-3, atol=1e-3)


# ---- streams, devices, graphs, compilers -----------------------------------------------------------------------------


def test_the_callers_stream_is_used_and_not_waited_for(rng):
    """Operands are NaN until a stream has slept a second; on any other stream the kernels would see that."""
    case, stream = masked("paired", rng, **LARGE), torch.cuda.Stream()
    operands, function = sent(case)
    values, u = [x.detach().clone() for x in operands], torch.randn(case.output_shape, device="cuda")
    wanted = both(function, operands, u)
    for cycles in (1, ONE_SECOND):  # the first time kernels are loaded and memory is allocated, which may wait
        found = None
        with torch.no_grad():
            for x in operands:
                x.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            with torch.no_grad():
                for x, value in zip(operands, values, strict=True):
                    x.copy_(value)
            found = both(function, operands, u)
            waiting = not stream.query()
        torch.cuda.synchronize()
        assert same_bits(found, wanted)
    assert waiting


@pytest.mark.parametrize("recorded", [True, False])
def test_an_output_that_another_stream_reads(recorded):
    """By record_stream torch keeps its memory until that stream has passed; without it, the next to allocate gets it."""
    f, g = (torch.randn(2**18, 4, device="cuda") for _ in range(2))
    wanted = fs.fusion_sum(None, f, g)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # so that there is little else to give out
    output, stream = fs.fusion_sum(None, f, g), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(ONE_SECOND)
        read = output.clone()
    if recorded:
        output.record_stream(stream)
    place = output.data_ptr()
    del output
    others = [torch.full_like(wanted, torch.nan) for _ in range(32)]
    assert not stream.query()
    assert (place in {x.data_ptr() for x in others}) == (not recorded)
    torch.cuda.synchronize()
    assert same_bits([read], [wanted]) == recorded


def test_backward_runs_on_the_stream_of_forward(rng):
    """Autograd goes back to it: the gradient that arrives there is NaN until that stream has slept a second."""
    case, stream = masked("paired", rng, **LARGE), torch.cuda.Stream()
    operands, function = sent(case)
    u = torch.randn(case.output_shape, device="cuda")
    wanted = both(function, operands, u)
    for cycles in (1, ONE_SECOND):  # the first time kernels are loaded and memory is allocated, which may wait

        def late(gradient, cycles=cycles):
            arriving = torch.full_like(gradient, torch.nan)
            torch.cuda._sleep(cycles)
            return arriving.copy_(gradient)

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = function(*operands)
        output.register_hook(late)
        torch.cuda.current_stream().wait_stream(stream)
        grads = torch.autograd.grad(output, operands, u)
        waiting = not stream.query()
        assert same_bits([output.detach(), *grads], wanted)
    assert waiting


def test_an_output_can_be_resized():
    output = fs.fusion_sum(None, *(torch.ones(5, 3, device="cuda") for _ in range(2)))
    assert output.untyped_storage().resizable()
    assert output.resize_(5000)[:5].tolist() == [3] * 5


@pytest.mark.parametrize("current", [0, 1])
def test_the_device_of_the_operands_is_used(current, rng):
    if torch.cuda.device_count() < 2:
        pytest.skip("missing: a second GPU")
    with torch.cuda.device(current):
        for index in (0, 1):
            check(masked("paired", rng, **LARGE), rng, f"cuda:{index}")
            assert torch.cuda.current_device() == current


@pytest.mark.parametrize("form", TABLE)
def test_a_cuda_graph_of_forward_and_backward(form, rng):
    case, found = masked(form, rng, **LARGE), []
    operands, function = sent(case)
    u = torch.randn(case.output_shape, device="cuda")

    def step():
        found[:] = both(function, operands, u)

    replay = captured(lambda: step, torch.cuda.Stream())
    for _ in range(3):
        with torch.no_grad():
            for x in (*operands, u):
                x.normal_()
        wanted = both(function, operands, u)
        assert not same_bits(found, wanted)
        replay()
        assert same_bits(found, wanted)


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_the_first_use_is_in_a_capture(mode):
    """In a process of its own: the library and its kernels are loaded meanwhile, the kernels of sums in parts too."""
    code = f"""
import torch
import fusionsum as fs
f, g, u = (torch.randn(shape, device="cuda") for shape in ((3000, 40), (3000, 40), 3000))
w = torch.ones(40, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode={mode!r}):
    output = fs.fusion_sum(w, f, g)
    grads = fs.fusion_sum_grad(u, w, f, g)
graph.replay()
torch.cuda.synchronize()
for found, wanted in zip((output, *grads), ((f * g).sum(1), u @ (f * g), u[:, None] * g, u[:, None] * f)):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
print("right")
"""
    assert run_python(code) == "right\n"


def test_compile_with_cuda_graphs(rng):
    """Of mode="reduce-overhead", whose trees keep the outputs' memory: none may be skipped."""
    case = masked("paired", rng)
    operands, function = sent(case)
    u = torch.randn(case.output_shape, device="cuda")

    def surrounded(*x):
        return function(*(z.sin() for z in x)).exp()

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(surrounded, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # one to warm up, one to record, and replays
        with torch.no_grad():
            for x in (*operands, u):
                x.normal_()
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in both(compiled, operands, u)]
        for got, want in zip(found, both(surrounded, operands, u), strict=True):
            torch.testing.assert_close(got, want)
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("form", TABLE)
def test_compile(form, rng):
    case = masked(form, rng)
    operands, function = sent(case)
    u = torch.randn(case.output_shape, device="cuda")

    def surrounded(*x):
        return function(*(z.sin() for z in x)).exp()

    torch.compiler.reset()
    found = both(torch.compile(surrounded, fullgraph=True), operands, u)
    for got, want in zip(found, both(surrounded, operands, u), strict=True):
        torch.testing.assert_close(got, want)


# ---- errors ----------------------------------------------------------------------------------------------------------

NAMES = ("fusion_weights", "factors[0]", "factors[1]")


def test_an_error_from_before_is_told_as_such():
    """A kernel of torch has failed: no later call can do anything on the GPU, and ours says so. In a process of its own."""
    code = """
import torch
import fusionsum as fs
f, g = (torch.randn(300, 40, device="cuda") for _ in range(2))
fs.fusion_sum(None, f, g)  # whose memory is free for the next: torch, too, would tell of the error, if it asked for more
torch._assert_async(torch.zeros(1, device="cuda"))
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    fs.fusion_sum(None, f, g)
except RuntimeError as error:
    print(error)
"""
    assert "cudaErrorAssert, device-side assert triggered (left behind by earlier work" in run_python(code)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("left_behind", NAMES)
def test_operands_on_different_devices(left_behind, records):
    operands = {name: torch.randn(5, device="cpu" if name == left_behind else "cuda") for name in NAMES}
    for x in operands.values():
        x.requires_grad_(records)
    with pytest.raises(ValueError, match=r"is on (cpu, expected cuda:0|cuda:0, expected cpu), where factors\[0\] is"):
        fs.fusion_sum(*operands.values())


@pytest.mark.parametrize("records", [False, True])
def test_a_mask_on_the_cpu(records):
    w, f, g = (torch.randn(shape, device="cuda", requires_grad=records) for shape in (5, (3, 5), (3, 5)))
    with pytest.raises(ValueError, match=r"present\[1\]: is on cpu, expected cuda:0, where factors\[1\] is"):
        fs.fusion_sum(w, f, g, present=[None, torch.ones(3, dtype=torch.bool)])


def test_a_grad_output_on_the_cpu():
    w, f, g = (torch.randn(shape, device="cuda") for shape in (5, (3, 5), (3, 5)))
    with pytest.raises(ValueError, match=r"grad_output: is on cpu, expected cuda:0"):
        fs.fusion_sum_grad(torch.ones(3), w, f, g)
