"""open_clip's losses of several processes replaced: the same values and gradients over two ranks, and what a step takes.

Theirs are ``ClipLoss(local_loss=True, gather_with_grad=True)`` and ``SigLipLoss``, as open_clip trains with them: each rank
holds its rows' scores with all keys. ``loss.py`` is imported by itself, as in ``open_clip_losses.py``. Run as

    python examples/open_clip_ranks.py [rows of a rank] [dimensions]
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import normalize

import fusionsum as fs

RANKS, ROUNDS = 2, 7


def open_clip_loss():
    """Import open_clip's losses without its models."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise ModuleNotFoundError("open_clip: pip install --no-deps open_clip_torch", name="open_clip")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(rank, rows, dims):
    """Draw a rank's images and texts; a scale and a bias, which are the same on all ranks."""
    torch.manual_seed(rank)
    images, texts = normalize(torch.randn(2, rows, dims), dim=-1)
    return [x.requires_grad_() for x in (images, texts, torch.tensor(10.0), torch.tensor(-10.0))]


def step(loss, given):
    """Go forward and backward; return the loss and the gradients as DistributedDataParallel averages them."""
    for x in given:
        x.grad = None
    value = loss(*given)
    value.backward()
    for shared in given[2:]:
        if shared.grad is not None:
            dist.all_reduce(shared.grad)
            shared.grad /= RANKS
    return value.detach(), [x.grad for x in given if x.grad is not None]


def timed(loss, given):
    """Return the milliseconds until all ranks have taken a step."""
    dist.barrier()
    start = time.perf_counter()
    step(loss, given)
    dist.barrier()
    return 1e3 * (time.perf_counter() - start)


def run(rank, store, rows, dims):
    """Compare, as one of the ranks; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    published = open_clip_loss()
    clip = published.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=RANKS)
    siglip = published.SigLipLoss(rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    pairs = {
        "ClipLoss -> contrastive_loss": (
            lambda images, texts, scale, bias: clip(images, texts, scale),
            lambda images, texts, scale, bias: fs.contrastive_loss(images, texts, logit_scale=scale, group=group),
        ),
        "SigLipLoss -> sigmoid_loss": (
            siglip,
            lambda images, texts, scale, bias: fs.sigmoid_loss(
                images, texts, logit_scale=scale, logit_bias=bias, group=group
            ),
        ),
    }
    for name, losses in pairs.items():
        given = leaves(rank, rows, dims)
        wanted, got = (step(loss, given) for loss in losses)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
        difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(got[1], wanted[1], strict=True))
        theirs, ours = zip(*[[timed(loss, given) for loss in losses] for _ in range(ROUNDS)], strict=True)
        ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        if rank == 0:
            print(f"{name}, {RANKS} ranks of {rows} pairs of {dims} numbers")
            print(f"  loss of the first: theirs {wanted[0]:.6f}, ours {got[0]:.6f}")
            print(f"  gradients: relative difference at most {difference:.1e}")
            theirs, ours = statistics.median(theirs), statistics.median(ours)
            print(f"  a step: theirs {theirs:.1f} ms, ours {ours:.1f}, {ratio:.2f} times")
    dist.destroy_process_group()


if __name__ == "__main__":
    open_clip_loss()
    with tempfile.TemporaryDirectory() as folder:
        given = (f"{folder}/store", *map(int, sys.argv[1:] or (256, 64)))
        torch.multiprocessing.spawn(run, given, nprocs=RANKS)
