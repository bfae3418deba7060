"""The sum and the layers on DTensors, and in DDP and FSDP2, over two and four ranks against one process.

What lives elsewhere: the ranks (``ranks.py``), the forms (``conftest.py``), the table of layers (``published.py``),
steps of losses over ranks (``test_distributed_training.py``).
"""

from __future__ import annotations

import copy
import functools
import itertools

import numpy as np
import pytest
import torch

import fusionsum as fs
import fusionsum.nn as fnn
import published
from conftest import FORMS, TABLE, run_python
from eager import MASKS, fused, to_torch
from published import F64, FEATURES, ONE_EACH
from ranks import ranks, sample, samples

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="missing: torch.distributed")
MESHES = {"two": (2,), "two by two": (2, 2)}
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@functools.cache
def mesh_of(shape):
    return torch.distributed.device_mesh.init_device_mesh("cpu", shape)


def spread(x, mesh, placements):
    """Return a DTensor leaf of a tensor that all ranks have; the parts of a partial sum differ."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    whole = [Replicate() if p.is_partial() else p for p in placements]
    shard = distribute_tensor(x.detach(), mesh, whole, src_data_rank=None).to_local()
    for i, p in enumerate(placements):
        if p.is_partial():
            shard = shard * (0.25, 0.75)[mesh.get_local_rank(i)]
    return DTensor.from_local(shard, mesh, placements, shape=x.shape, stride=x.stride()).requires_grad_(x.requires_grad)


def case_of(form, masks, rng):
    case = FORMS[form].case(rng, activations=None if masks == "full" else "tanh")
    return case if MASKS[masks] is None else case.masked(rng, *MASKS[masks])


def alone(case, grad_output=None):
    """Return operands, options, output, its gradient and the operands', in one process."""
    operands, options = to_torch(case, requires_grad=True)
    output = fused(options, case.weights is not None)(*operands)
    grad_output = torch.linspace(-1, 1, output.numel(), dtype=F64).reshape(output.shape)
    return operands, options, output, grad_output, torch.autograd.grad(output, operands, grad_output)


def dims_of(x, operand):
    """Map the axes of the broadcast shape, from the last, to the dims of an operand or its mask."""
    return {d - operand.ndim: d for d, n in enumerate(x.shape) if n != 1}


# ---- the rules -------------------------------------------------------------------------------------------------------


def sum_of_shards(rank, shape, case):
    """Shard every axis in turn along each dim of the mesh, all tensors alike: nothing may be sent."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, (operands, options, wanted, grad_output, wanted_grads) = mesh_of(shape), alone(case)
    ndim = len(case.shape)
    summed = case.dim if case.dim < 0 else case.dim - ndim
    axes = [axis for axis in range(-ndim, 0) if case.shape[axis] != 1]
    left = [axis for axis in range(-ndim, 0) if axis != summed]
    of_output = {axis: d for d, axis in enumerate(left) if case.shape[axis] != 1}

    def given(dims):
        return [Shard(dims[axis]) if axis in dims else Replicate() for axis in chosen]

    def made(dims):
        return tuple(
            p if axis is None or axis in dims else Partial() for p, axis in zip(given(dims), chosen, strict=True)
        )

    for chosen in itertools.product([*axes, None], repeat=len(shape)):
        sharded = [spread(x, mesh, given(dims_of(x, x))) for x in operands]
        masks = options["present"] and [
            None if mask is None else spread(mask, mesh, given(dims_of(mask, x)))
            for mask, x in zip(options["present"], operands[-len(options["present"]) :], strict=True)
        ]
        upstream = spread(grad_output, mesh, given(of_output))
        with CommDebugMode() as communication:
            output = fused(options | {"present": masks}, case.weights is not None)(*sharded)
            grads = torch.autograd.grad(output, sharded, upstream)
        assert communication.get_total_counts() == 0, chosen
        assert output.placements == made(of_output), chosen
        assert [d.placements for d in grads] == [made(dims_of(x, x)) for x in operands], chosen
        close([x.full_tensor() for x in (output, *grads)], [wanted, *wanted_grads])


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_an_axis_sharded_alike_sends_nothing(form, masks, rng):
    ranks(2).run(sum_of_shards, MESHES["two"], case_of(form, masks, rng))


@pytest.mark.parametrize("form", TABLE)
def test_two_axes_sharded_alike_send_nothing(form, rng):
    ranks(4).run(sum_of_shards, MESHES["two by two"], case_of(form, "rows", rng))


def sum_however_placed(rank, shape, case, seed, tries):
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, (operands, options, wanted, grad_output, wanted_grads) = mesh_of(shape), alone(case)
    rng = np.random.default_rng(seed)

    def anyhow(x):
        if x is None:
            return None
        known = [Replicate(), *map(Shard, range(x.ndim)), *([] if x.dtype == torch.bool else [Partial()])]
        return spread(x, mesh, [known[rng.integers(len(known))] for _ in shape])

    weighted = case.weights is not None
    for _ in range(tries):
        sharded = list(map(anyhow, operands))
        also = {"present": options["present"] and list(map(anyhow, options["present"]))}
        output = fused(options | also, weighted)(*sharded)
        grads = torch.autograd.grad(output, sharded, anyhow(grad_output))
        close([x.full_tensor() for x in (output, *grads)], [wanted, *wanted_grads])
        found = fs.fusion_sum_grad(anyhow(grad_output), *([] if weighted else [None]), *sharded, **options | also)
        close([d.full_tensor() for d in found if d is not None], list(wanted_grads))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_any_placements_give_the_same_numbers(form, masks, rng):
    ranks(2).run(sum_however_placed, MESHES["two"], case_of(form, masks, rng), 0, 3)


@pytest.mark.parametrize("form", TABLE)
def test_any_placements_on_two_dims_give_the_same_numbers(form, rng):
    ranks(4).run(sum_however_placed, MESHES["two by two"], case_of(form, "full", rng), 0, 4)


def fewest_bytes(rank):
    """Return the placements of the output where the operands' differ."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, small, large = mesh_of((2,)), torch.ones(4, 1, 6), torch.ones(10, 6)
    together = [
        fs.fusion_sum(None, spread(small, mesh, [a]), spread(large, mesh, [b]))
        for a, b in ((Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(2), Replicate()), (Replicate(), Replicate()))
    ]
    return [str(x.placements[0]) for x in together]


def test_the_larger_operand_stays_where_it_is():
    assert ranks(2).run(fewest_bytes) == [[str(p) for p in ("S(1)", "P(sum)", "P(sum)", "R")]] * 2


def second_derivatives(rank):
    from torch.distributed.tensor import Replicate, Shard

    mesh, shapes = mesh_of((2,)), [(5,), (3, 5), (3, 5)]
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]

    def twice(*operands):
        first = torch.autograd.grad(
            fs.fusion_sum(*operands, activations="tanh").square().sum(), operands, create_graph=True
        )
        return torch.autograd.grad(sum((d**3).sum() for d in first), operands)

    wanted = twice(*leaves)
    for placed in (
        [Replicate(), Shard(0), Shard(0)],
        [Shard(0), Shard(1), Shard(1)],
        [Replicate(), Shard(1), Shard(0)],
    ):
        found = twice(*(spread(x, mesh, [p]) for x, p in zip(leaves, placed, strict=True)))
        close([d.full_tensor() for d in found], list(wanted))


def test_second_derivatives():
    ranks(2).run(second_derivatives)


def compiled(rank):
    from torch.distributed.tensor import Replicate, Shard

    mesh, shapes = mesh_of((2,)), [(7, 1), (5, 7, 3), (5, 7, 3)]
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]
    heard = torch.arange(5) % 2 == 0
    wanted = fs.fusion_sum(*leaves, present=[heard, None], activations="tanh", dim=1)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), leaves)

    def call(*given):
        *operands, mask = given
        return fs.fusion_sum(*operands, present=[mask, None], activations="tanh", dim=1)

    output_of = torch.compile(call, backend="aot_eager", fullgraph=True)
    loss_of = torch.compile(lambda *given: call(*given).square().sum(), backend="aot_eager", fullgraph=True)
    for placed in ([Replicate(), Shard(0), Shard(0)], [Replicate(), Shard(1), Shard(1)], [Replicate()] * 3):
        of_mask = placed[1] if placed[1] == Shard(0) else Replicate()
        operands = [spread(x, mesh, [p]) for x, p in zip(leaves, placed, strict=True)]
        given = *operands, spread(heard, mesh, [of_mask])
        output = output_of(*given)
        close(output.full_tensor(), wanted)
        for loss in (output.square().sum(), loss_of(*given)):
            close([d.full_tensor() for d in torch.autograd.grad(loss, operands)], list(wanted_grads))


def test_compiled():
    ranks(2).run(compiled)


# ---- errors, and who pays --------------------------------------------------------------------------------------------


def errors(rank):
    """Return what calls that nobody can evaluate raise."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, other = mesh_of((2,)), torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2))
    plain = torch.ones(4, 3)
    rows = spread(plain, mesh, [Shard(0)])
    elsewhere = spread(plain, other, [Shard(0), Shard(0)])

    calls = [
        lambda: fs.fusion_sum(None, rows, plain),
        lambda: fs.fusion_sum(plain[0], rows, rows),
        lambda: fs.fusion_sum(None, rows, rows, present=[None, plain[:, 0] > 0]),
        lambda: fs.fusion_sum_grad(plain[:, 0], None, rows, rows),
        lambda: fs.fusion_sum(None, rows, elsewhere),
        lambda: fs.fusion_sum(None, rows, rows[:, :2]),
        lambda: torch.func.grad(lambda x: fs.fusion_sum(None, x, rows).to_local().sum())(rows),
        lambda: fs.contrastive_loss(rows, rows),
        lambda: fs.sigmoid_loss(plain, plain, logit_scale=spread(torch.ones(()), mesh, [Replicate()])),
        lambda: fs.top_k(rows, rows, 2),
        lambda: fs.ranks(rows, rows, torch.arange(4)),
        lambda: fnn.ContrastiveLoss()(rows.requires_grad_(), rows),
    ]
    with pytest.raises(RuntimeError, match="fusion_sum"):  # torch's own: what functorch has wrapped is no DTensor
        torch.func.vmap(lambda x: fs.fusion_sum(None, x, x))(rows)
    found = []
    for function in calls:
        try:
            found.append(f"no error: {function()}")
        except (TypeError, ValueError, NotImplementedError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_errors():
    wanted = [
        "TypeError: factors[1]: expected a DTensor like factors[0], got a plain tensor",
        "TypeError: fusion_weights: expected a DTensor like factors[0], got a plain tensor",
        "TypeError: present[1]: expected a DTensor like factors[0], got a plain tensor",
        "TypeError: grad_output: expected a DTensor like factors[0], got a plain tensor",
        "ValueError: factors[1]: is on DeviceMesh(",
        "ValueError: factors[1]: shape (4, 2) does not broadcast with (4, 3)",
        "NotImplementedError: fusion_sum: DTensors have gradients in reverse mode only",
        "NotImplementedError: contrastive_loss: expected plain tensors, got a DTensor",
        "NotImplementedError: sigmoid_loss: expected plain tensors, got a DTensor",
        "NotImplementedError: top_k: expected plain tensors, got a DTensor",
        "NotImplementedError: ranks: expected plain tensors, got a DTensor",
        "NotImplementedError: contrastive_loss: expected plain tensors, got a DTensor",
    ]
    for found in ranks(2).run(errors):
        assert [error[: len(start)] for error, start in zip(found, wanted, strict=True)] == wanted


def test_who_has_no_dtensor_imports_none():
    run_python(
        "import sys, torch, fusionsum as fs, fusionsum.nn\n"
        "x = torch.ones(4, 3, requires_grad=True)\n"
        "fs.fusion_sum(None, x, x).sum().backward(create_graph=True)\n"
        "torch.func.vmap(lambda x: fs.fusion_sum(None, x, x))(x)\n"
        "assert 'torch.distributed.tensor' not in sys.modules"
    )


# ---- layers ----------------------------------------------------------------------------------------------------------


def step(layer, inputs, share=1.0, **options):
    """Take a training step; `share` scales the loss, a mean over the rows."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = share * (layer(*inputs, **options) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def whole(x):
    return x.detach().full_tensor() if hasattr(x, "full_tensor") else x.detach()


def same_parameters(layer, other):
    close([whole(p) for p in other.parameters()], [p.detach() for p in layer.parameters()])


def two_of(name, **options):
    """Return a layer of the table, another alike, and inputs."""
    torch.manual_seed(0)
    entry = published.TABLE[name]
    layer = entry.make(dtype=F64, **options)
    return layer, copy.deepcopy(layer), [x if x is None else x.detach() for x in entry.inputs()]


def data_parallel(rank, names):
    """Shard the rows, of which there are nine for two ranks, with the parameters replicated, and with masks."""
    from torch.distributed.tensor import Shard, distribute_module

    mesh = mesh_of((2,))
    for name in names:
        layer, other, inputs = two_of(name)
        distribute_module(other, mesh)
        rows = [x if x is None else spread(x, mesh, [Shard(0)]) for x in inputs]
        heard = [None] * (len(inputs) - 1) + [torch.arange(published.ROWS) % 2 == 0]
        for masks in (None, heard) if name in FEATURES else (None,):
            options = {} if masks is None else {"present": masks}
            shards = (
                {} if masks is None else {"present": [m if m is None else spread(m, mesh, [Shard(0)]) for m in masks]}
            )
            close(step(other, rows, **shards).full_tensor(), step(layer, inputs, **options))
            same_parameters(layer, other)


# Of torch 2.10, DTensors have no addmv, stack uneven shards wrong and mix up the shapes of two embeddings' gradients.
of_layers = pytest.mark.skipif(torch.__version__ < "2.13", reason="missing: torch 2.13, for layers of DTensors")


@of_layers
def test_layers_with_their_rows_sharded():
    ranks(2).run(data_parallel, ONE_EACH)


EVEN = {  # options with which all that a layer unflattens divides by two; torch shards no embedding along with another
    "LowRankFusion": {"rank": 8},
    "ResidualFusion": {"rank": 8},
    "CPBilinear": {},
    "GatedFusion": {},
    "MLB": {},
    "MFB": {},
    "MFH": {},
    "TuckerFusion": {},
    "ConcatMLP": {},
    "LinearSum": {},
    "LateFusion": {},
    "TensorFusion": {},
}


def tensor_parallel(rank, names, dim):
    """Shard every parameter along its first or its last dim."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    mesh = mesh_of((2,))

    def shard(_, module, mesh):
        for name, p in module.named_parameters(recurse=False):
            placed = distribute_tensor(p.detach(), mesh, [Shard(dim % p.ndim)])
            module.register_parameter(name, torch.nn.Parameter(placed))

    for name in names:
        layer, other, inputs = two_of(name, **EVEN[name])
        distribute_module(other, mesh, shard)
        replicated = [spread(x, mesh, [Replicate()]) for x in inputs]
        close(step(other, replicated).full_tensor(), step(layer, inputs))
        same_parameters(layer, other)


@of_layers
@pytest.mark.parametrize("dim", [0, -1])
def test_layers_with_their_parameters_sharded(dim):
    ranks(2).run(tensor_parallel, list(EVEN), dim)


def ranks_of_terms(rank):
    """Shard a layer's terms over two ranks, its rows over two more: one all-reduce forward, of the output."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = mesh_of((2, 2))
    layer, other, inputs = two_of("LowRankFusion", rank=8)

    def shard(name, module, mesh):
        for key, p in module.named_parameters(recurse=False):
            terms = Replicate() if key == "fusion_bias" else Shard(0)
            placed = distribute_tensor(p.detach(), mesh, [Replicate(), terms])
            module.register_parameter(key, torch.nn.Parameter(placed))

    distribute_module(other, mesh, shard)
    rows = [spread(x, mesh, [Shard(0), Replicate()]) for x in inputs]
    with CommDebugMode() as communication:
        fused = other(*rows).redistribute(placements=[Shard(0), Replicate()])
    counts = {str(name).split(".")[-1]: n for name, n in communication.get_comm_counts().items() if n}
    close(fused.full_tensor(), layer(*inputs))
    for _ in range(2):
        close(step(other, rows).full_tensor(), step(layer, inputs))
    same_parameters(layer, other)
    parallel = torch.compile(other, backend="aot_eager", fullgraph=True)
    close(step(parallel, rows).full_tensor(), step(layer, inputs))
    same_parameters(layer, other)
    return counts


def test_low_rank_fusion_with_its_terms_sharded():
    assert ranks(4).run(ranks_of_terms) == [{"all_reduce": 1}] * 4


def replicas(rank, names, kind):
    """Give each rank a part of the rows, uneven ones, and a loss whose average over the ranks is the whole loss."""
    from torch.distributed.fsdp import fully_shard

    for name in names:
        layer, other, inputs = two_of(name)
        parallel = (
            torch.nn.parallel.DistributedDataParallel(other)
            if kind == "DDP"
            else fully_shard(other, mesh=mesh_of((2,)))
        )
        parts = [x if x is None else x.tensor_split(2)[rank] for x in inputs]
        rows = next(len(x) for x in inputs if x is not None)
        step(parallel, parts, share=2 * len(parts[0]) / rows)
        step(layer, inputs)
        same_parameters(layer, other)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_layers_in(kind):
    ranks(2).run(replicas, ONE_EACH, kind)


@pytest.mark.parametrize("code", samples(__file__))
def test_samples_of_the_docs(code):
    ranks(2).run(sample, code)
