"""Losses and searches on a GPU, as torch's users meet them: results, bits, graphs, compilers, waiting, memory, errors.

What lives elsewhere: sums (``test_on_gpu.py``); random calls against the formula, which run on a GPU with
FUSIONSUM_TEST_DEVICE=cuda (``test_score_kernels.py``, ``test_losses.py``, ``test_search.py``); all that needs no GPU
(``test_steps.py``, ``test_emulated.py``).
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import fusionsum as fs
from bench.gpu import captured
from conftest import run_python
from fusionsum import chunks
from ranks import Ranks
from tests.cuda.gpu import ONE_SECOND, leave_dirt, require, same_bits
from tests.cuda.step_cases import OPTIONS

require()

# torch's own, on its first use of inductor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:TensorFloat32:UserWarning")

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Of the greatest value: n roundings of a product; and Gamma of bfloat16, which is rounded.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROWS, COLS, TERMS = 300, 517, 33
SIZES = {"one chunk": chunks.CHUNK_BYTES, "many chunks": 2**16}
LOSSES = ("contrastive_loss", "sigmoid_loss")

by_chunks = pytest.mark.parametrize("most", SIZES.values(), ids=SIZES)
by_option = pytest.mark.parametrize("option", OPTIONS)
by_loss = pytest.mark.parametrize("name", LOSSES)


def sent(x):
    if isinstance(x, dict):
        return {name: sent(y) for name, y in x.items()}
    return tuple(map(sent, x)) if isinstance(x, tuple) else x.cuda()


def sides(dtype, rows=ROWS, cols=COLS, terms=TERMS, whole=False):
    """Return both sides on the CPU; if whole, of integers whose products all dtypes have exactly."""
    if whole:
        return [torch.randint(-2, 3, (count, terms)).to(dtype) for count in (rows, cols)]
    return [(torch.randn(count, terms) / terms**0.5).to(dtype) for count in (rows, cols)]


def options_of(name, option, dtype):
    found = OPTIONS[option](ROWS, COLS)
    if name == "sigmoid_loss":
        found.pop("key_bias", None)  # which it has not
    return {key: x.to(dtype) if key == "key_bias" else x for key, x in found.items()}


def step(name, queries, keys, **options):
    """Return the loss and the gradients of both sides, logit_scale, and the bias."""
    scale = torch.full((), 7.0, device=queries.device)  # no copy from the CPU, which no graph takes
    leaves = [x.detach().requires_grad_() for x in (queries, keys, scale)]
    if "key_bias" in options:
        leaves.append(options["key_bias"].detach().requires_grad_())
        options = options | {"key_bias": leaves[-1]}
    loss = getattr(fs, name)(*leaves[:2], logit_scale=leaves[2], **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def near(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=tolerance * float(y.abs().max()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@contextlib.contextmanager
def nothing_waits():
    """Make an error of all in which this thread waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- results ---------------------------------------------------------------------------------------------------------


@by_chunks
@by_option
@by_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_are_those_of_the_cpu(dtype, name, option, most, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", most)
    queries, keys = sides(dtype)
    options = options_of(name, option, dtype)
    near(
        step(name, queries.cuda(), keys.cuda(), **sent(options)),
        step(name, queries, keys, **options),
        TOLERANCE[dtype],
    )


@by_chunks
@pytest.mark.parametrize("positives", ["mean", "any"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_that_a_contrastive_loss_has(symmetric, positives, most, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", most)
    queries, keys = sides(torch.float32)
    options = {**OPTIONS["labels"](ROWS, COLS), "exclude": torch.rand(ROWS, COLS) < 0.2}
    named = {"positives": positives, "symmetric": symmetric, "label_smoothing": 0.1, "activations": "tanh"}
    near(
        step("contrastive_loss", queries.cuda(), keys.cuda(), **sent(options), **named),
        step("contrastive_loss", queries, keys, **options, **named),
        TOLERANCE[torch.float32],
    )


@by_chunks
@pytest.mark.parametrize("excluded", [None, "mask", "lists"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_searches_are_those_of_the_cpu(dtype, excluded, most, monkeypatch):
    """To the bit, and with the same key of those that score alike: all scores are integers."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", most)
    queries, keys = sides(dtype, whole=True)
    bias = torch.randint(-2, 3, (COLS,)).to(dtype)
    exclude, on_gpu = None, None
    if excluded == "mask":
        exclude = torch.rand(ROWS, COLS) < 0.2
        on_gpu = exclude.cuda()
    elif excluded == "lists":
        exclude = on_gpu = [list(range(b % 4)) * 2 for b in range(ROWS)]
    for k in (0, 1, 10, 300, COLS):
        found = fs.top_k(queries.cuda(), keys.cuda(), k, key_bias=bias.cuda(), exclude=on_gpu)
        wanted = fs.top_k(queries, keys, k, key_bias=bias, exclude=exclude)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(found, wanted, strict=True)), k
    targets = torch.randint(0, COLS, (ROWS,))
    for ties in ("mean", "optimistic", "pessimistic"):
        given = {"key_bias": bias, "exclude": exclude, "ties": ties}
        wanted = fs.ranks(queries, keys, targets, **given)
        found = fs.ranks(
            queries.cuda(), keys.cuda(), targets.cuda(), **given | {"key_bias": bias.cuda(), "exclude": on_gpu}
        )
        assert torch.equal(found.cpu(), wanted)


def test_more_than_the_kernel_selects():
    queries, keys = sides(torch.float32, rows=3, cols=5000, whole=True)
    k = chunks.MOST_SELECTED + 1
    found, wanted = fs.top_k(queries.cuda(), keys.cuda(), k), fs.top_k(queries, keys, k)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, wanted, strict=True))


def test_every_step_several_chunks(monkeypatch):
    """In small, what the sanitizers run."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**14)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        queries, keys = sides(dtype, 40, 300, 8)
        for option in OPTIONS:
            options = sent(OPTIONS[option](40, 300))
            bias = {"key_bias": options.pop("key_bias").to(dtype)} if "key_bias" in options else {}
            step("contrastive_loss", queries.cuda(), keys.cuda(), **options, **bias)
            step("sigmoid_loss", queries.cuda(), keys.cuda(), **options)
        lists = [list(range(b % 4)) * 2 for b in range(40)]
        for k in (3, 260):
            fs.top_k(queries.cuda(), keys.cuda(), k, exclude=lists)
        fs.ranks(queries.cuda(), keys.cuda(), torch.arange(40, device="cuda"), exclude=lists)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "cols", "terms"), [(257, 30_001, 64), (33, 9_999, 77), (1, 50_000, 128)])
def test_equal_keys_score_alike(rows, cols, terms, dtype, monkeypatch):
    """In whichever chunk they are, and wherever in it: what cuBLAS is relied on for (``chunks.py``)."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**20)
    queries, few = (x.cuda() for x in sides(dtype, rows, 97, terms))
    kind = torch.randint(0, 97, (cols,), device="cuda")
    values, indices = fs.top_k(queries, few[kind], 1000)
    kinds = kind[indices]
    for of_kind in range(97):
        of_one = torch.where(kinds == of_kind, values, torch.nan)
        low, high = of_one.nan_to_num(torch.inf).amin(1), of_one.nan_to_num(-torch.inf).amax(1)
        assert ((low == high) | low.isinf()).all()
    assert (values[:, 1:] <= values[:, :-1]).all()
    ties = (values[:, 1:] == values[:, :-1]) & (kinds[:, 1:] == kinds[:, :-1])
    assert (indices[:, 1:] > indices[:, :-1])[ties].all()

    targets = torch.randint(0, cols, (rows,), device="cuda")
    first, last = (fs.ranks(queries, few[kind], targets, ties=ties) for ties in ("optimistic", "pessimistic"))
    alike = (kind == kind[targets, None]).sum(1)
    assert (last - first + 1 >= alike).all()


def test_a_rank_out_of_range_is_the_last_and_an_id_leaves_out_nothing():
    queries, keys = (x.cuda() for x in sides(torch.float32, 4, 50))
    targets = torch.tensor([0, -1, 50, 2**40], device="cuda")
    found = fs.ranks(queries, keys, targets)
    assert found[0] <= 50
    assert (found[1:] == 51).all()  # behind all keys
    offsets, ids = torch.tensor([0, 1, 2, 4, 5]), torch.tensor([-1, 50, 2**40, 7, 3])
    some = fs.top_k(queries, keys, 50, exclude=(offsets.cuda(), ids.cuda()))[1]
    assert [sorted(set(range(50)) - set(row)) for row in some.tolist()] == [[], [], [7], [3]]
    with pytest.raises(ValueError, match="exclude: expected integers from 0 to less than 50"):
        fs.top_k(queries, keys, 1, exclude=[[-1], [], [], []])


@by_chunks
@by_option
@by_loss
def test_two_runs_give_the_same_bits(name, option, most, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", most)
    for dtype in (torch.float32, torch.bfloat16):
        queries, keys = sent(tuple(sides(dtype)))
        options = sent(options_of(name, option, dtype))
        first = step(name, queries, keys, **options)
        searched = fs.top_k(queries, keys, 20)
        for _ in range(10):
            leave_dirt()
            assert same_bits(step(name, queries, keys, **options), first)
            assert same_bits(fs.top_k(queries, keys, 20), searched)


# ---- streams, graphs, compilers, waiting -----------------------------------------------------------------------------


@by_option
@by_loss
def test_losses_do_not_wait(name, option):
    queries, keys = sent(tuple(sides(torch.float32)))
    options = sent(options_of(name, option, torch.float32))
    scale = torch.tensor(7.0, device="cuda")
    leaves = [x.requires_grad_() for x in (queries, keys, scale)]
    for warm in (True, False):  # the first time kernels are loaded and memory is allocated
        with contextlib.nullcontext() if warm else nothing_waits():
            getattr(fs, name)(queries, keys, logit_scale=scale, **options).backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_searches_do_not_wait():
    queries, keys = sent(tuple(sides(torch.float32)))
    targets, mask = torch.arange(ROWS, device="cuda"), torch.rand(ROWS, COLS, device="cuda") < 0.2
    offsets, ids = torch.arange(ROWS + 1, device="cuda"), torch.arange(ROWS, device="cuda")
    for warm in (True, False):
        with contextlib.nullcontext() if warm else nothing_waits():
            for exclude in (None, mask, (offsets, ids)):
                fs.top_k(queries, keys, 10, exclude=exclude)
                fs.ranks(queries, keys, targets, exclude=exclude)


@by_loss
def test_the_callers_stream_is_used_and_not_waited_for(name):
    """The queries are NaN until a stream has slept a second; on any other stream the kernels would see that."""
    (queries, keys), stream = sent(tuple(sides(torch.float32))), torch.cuda.Stream()
    wanted = step(name, queries, keys)
    late, waiting = torch.empty_like(queries), False
    for cycles in (1, ONE_SECOND):
        late.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            late.copy_(queries)
            found = step(name, late, keys)
            waiting = not stream.query()
        torch.cuda.synchronize()
        assert same_bits(found, wanted)
    assert waiting


def test_results_that_another_stream_reads():
    """By record_stream torch keeps their memory until that stream has passed."""
    queries, keys = sent(tuple(sides(torch.float32)))
    values, indices = wanted = fs.top_k(queries, keys, 10)
    stream = torch.cuda.Stream()
    values, indices = fs.top_k(queries, keys, 10)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(ONE_SECOND)
        read = [values.clone(), indices.clone()]
    for x in (values, indices):
        x.record_stream(stream)
    place = values.data_ptr()
    del values, indices
    others = [torch.full((ROWS, 10), torch.nan, device="cuda") for _ in range(32)]
    assert not stream.query()
    assert place not in {x.data_ptr() for x in others}
    torch.cuda.synchronize()
    assert same_bits(read, wanted)


@by_chunks
@by_option
@by_loss
def test_a_cuda_graph_of_a_step(name, option, most, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", most)
    queries, keys = sent(tuple(sides(torch.float32)))
    options, found = sent(options_of(name, option, torch.float32)), []

    def call():
        found[:] = step(name, queries, keys, **options)

    replay = captured(lambda: call, torch.cuda.Stream())
    for _ in range(3):
        queries.normal_()
        keys.normal_()
        wanted = step(name, queries, keys, **options)
        assert not same_bits(found, wanted)
        replay()
        assert same_bits(found, wanted)


@by_chunks
def test_a_cuda_graph_of_a_search(most, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", most)
    queries, keys = sent(tuple(sides(torch.float32)))
    targets, found = torch.arange(ROWS, device="cuda"), []

    def call():
        found[:] = [*fs.top_k(queries, keys, 10), fs.ranks(queries, keys, targets)]

    replay = captured(lambda: call, torch.cuda.Stream())
    for _ in range(3):
        queries.normal_()
        wanted = [*fs.top_k(queries, keys, 10), fs.ranks(queries, keys, targets)]
        replay()
        assert same_bits(found, wanted)


def test_the_first_use_is_in_a_capture():
    """In a process of its own: the library and the kernels of all steps are loaded meanwhile."""
    code = """
import torch
import fusionsum as fs
f, g = (torch.randn(300, 40, device="cuda", requires_grad=True) for _ in range(2))
torch.mm(f, g.T)  # cuBLAS sets itself up
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = fs.contrastive_loss(f, g, logit_scale=5.0)
    grads = torch.autograd.grad(loss, (f, g))
    best = fs.top_k(f.detach(), g.detach(), 3)
graph.replay()
torch.cuda.synchronize()
scores, own = 5 * f @ g.T, torch.arange(300, device="cuda")
wanted = (torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)) / 2
torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
for got, want in zip(grads, torch.autograd.grad(wanted, (f, g))):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
torch.testing.assert_close(best[0], torch.topk(f @ g.T, 3)[0], rtol=1e-4, atol=1e-4)
print("right")
"""
    assert run_python(code) == "right\n"


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@by_option
@by_loss
def test_compile(name, option, mode):
    """Of mode="reduce-overhead", whose trees keep the outputs' memory, none may be skipped."""
    queries, keys = (x.requires_grad_() for x in sent(tuple(sides(torch.float32))))
    scale = torch.tensor(7.0, device="cuda", requires_grad=True)
    options = sent(options_of(name, option, torch.float32))

    def surrounded(queries, keys, scale):
        return getattr(fs, name)(queries.sin(), keys, logit_scale=scale.exp() / 100, **options) * 2

    torch.compiler.reset()
    counters.clear()
    compiled, leaves = torch.compile(surrounded, fullgraph=True, mode=mode), (queries, keys, scale)
    for _ in range(4):  # one to warm up, one to record, and replays
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(*leaves)
        found = [x.clone() for x in (found.detach(), *torch.autograd.grad(found, leaves))]
        wanted = surrounded(*leaves)
        for got, want in zip(found, (wanted.detach(), *torch.autograd.grad(wanted, leaves)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile_a_search(mode):
    queries, keys = sent(tuple(sides(torch.float32)))
    targets = torch.arange(ROWS, device="cuda")

    def search(queries, keys, targets):
        values, indices = fs.top_k(queries * 2, keys, 10)
        return values + 1, indices, fs.ranks(queries, keys, targets)

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(search, fullgraph=True, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in compiled(queries, keys, targets)]
        for got, want in zip(found, search(queries, keys, targets), strict=True):
            torch.testing.assert_close(got, want)
    assert not counters["inductor"]["cudagraph_skips"]


# ---- memory and errors -----------------------------------------------------------------------------------------------


def test_memory_of_a_step_is_linear():
    """Beyond sides and gradients, a few chunks; all scores would take 1 GiB."""
    batch, terms = 16384, 256
    few = torch.randn(2, 4096, terms, device="cuda").requires_grad_()
    fs.contrastive_loss(*few, logit_scale=0.1).backward()  # cuBLAS takes its workspace at its first product
    queries, keys = (torch.randn(batch, terms, device="cuda").requires_grad_() for _ in range(2))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fs.contrastive_loss(queries, keys, logit_scale=0.1).backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= queries.grad.nbytes + keys.grad.nbytes + 4 * chunks.CHUNK_BYTES


def test_less_memory_makes_smaller_chunks_and_too_little_an_error():
    """In a process of its own, which is allowed so little of the GPU's memory that a chunk of 16 MiB does not fit."""
    code = """
import torch
import fusionsum as fs
from fusionsum import chunks
f, g = (torch.randn(4096, 16, device="cuda") for _ in range(2))
wanted = fs.contrastive_loss(f, g)
torch.cuda.synchronize()
asked, real = [], torch.Tensor.new_empty
def new_empty(self, *given, **options):
    if isinstance(given[0], tuple) and len(given[0]) == 2:
        asked.append(given[0])
    return real(self, *given, **options)
torch.Tensor.new_empty = new_empty
torch.cuda.empty_cache()
used, whole = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction((used + (12 << 20)) / whole)
torch.testing.assert_close(fs.contrastive_loss(f, g), wanted)
assert max(rows * cols for rows, cols in asked) * 4 > 12 << 20 > asked[-1][0] * asked[-1][1] * 4, asked
torch.cuda.empty_cache()
torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / whole)
blocks = []
try:
    while True:
        blocks.append(torch.empty(2 ** 16, device="cuda"))
except torch.cuda.OutOfMemoryError:
    pass
try:
    fs.contrastive_loss(f, g)
except torch.cuda.OutOfMemoryError as error:
    print(error)
"""
    assert "4096 queries and 4096 keys: no memory for a chunk of" in run_python(code)


@pytest.mark.parametrize("left_behind", ["keys", "logit_scale", "labels", "key_labels", "key_bias"])
def test_tensors_on_different_devices(left_behind):
    given = {
        "keys": torch.randn(5, 3),
        "logit_scale": torch.tensor(2.0),
        "labels": torch.arange(5),
        "key_labels": torch.arange(5),
        "key_bias": torch.randn(5),
    }
    given = {name: x if name == left_behind else x.cuda() for name, x in given.items()}
    with pytest.raises(ValueError, match=f"{left_behind}: is on cpu, expected cuda:0, where queries is"):
        fs.contrastive_loss(torch.randn(5, 3, device="cuda"), given.pop("keys"), **given)


def test_targets_and_exclusions_on_the_cpu():
    queries, keys = torch.randn(4, 3, device="cuda"), torch.randn(9, 3, device="cuda")
    with pytest.raises(ValueError, match="targets: is on cpu, expected cuda:0"):
        fs.ranks(queries, keys, torch.arange(4))
    with pytest.raises(ValueError, match="exclude: is on cpu, expected cuda:0"):
        fs.top_k(queries, keys, 1, exclude=torch.ones(4, 9, dtype=torch.bool))


# ---- several processes -----------------------------------------------------------------------------------------------


def on_a_rank(rank):
    """Hold this rank's losses, gradients and searches to those of one process; integers' products are exact."""
    world, group = dist.get_world_size(), dist.group.WORLD
    torch.manual_seed(0)
    all_rows = [x.cuda() for x in sides(torch.float32, cols=ROWS, whole=True)]
    queries, keys = (x.tensor_split(world)[rank] for x in all_rows)
    for name in LOSSES:
        of_all, (mean, *found) = step(name, *all_rows), step(name, queries, keys, group=group)
        for x in (mean, found[2]):
            dist.all_reduce(x)
        # The ranks' means average; their gradients are those of the sum.
        expected = [of_all[0] * world, *(x.tensor_split(world)[rank] * world for x in of_all[1:3]), of_all[3] * world]
        near([mean, *found], [x.cpu() for x in expected], TOLERANCE[torch.float32])
    targets = torch.arange(len(queries), device="cuda")
    for search in (
        lambda *given, **of: fs.top_k(*given, 9, **of),
        lambda *given, **of: (fs.ranks(*given, targets, **of),),
    ):
        assert same_bits(search(queries, keys, group=group), search(queries, all_rows[1]))


def test_ranks_are_one_process():
    """As many as there are GPUs, two at most: with one, nothing travels."""
    Ranks(min(2, torch.cuda.device_count()), backend="cpu:gloo,cuda:nccl").run(on_a_rank)
