"""Training steps over ranks, by DistributedDataParallel and FSDP2: those of one process on the global batch.

What lives elsewhere: the losses' own values and gradients (``test_distributed_losses.py``), layers under DTensor
(``test_autograd_dtensor.py``), the pipeline's training (``test_pipeline_processes.py``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fusionsum.nn import ContrastiveLoss, SigmoidLoss
from ranks import ranks

LOSSES = {"contrastive": ContrastiveLoss, "sigmoid": SigmoidLoss}
ROWS = ((6, 6, 6), (9, 2, 5))  # even, and uneven
STEPS = 4


class Towers(nn.Module):
    """Two towers and a loss of their embeddings."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 8))
        self.texts = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 8))
        self.loss = LOSSES[kind]()

    def forward(self, images: torch.Tensor, texts: torch.Tensor, **given: Any) -> torch.Tensor:
        sides = [nn.functional.normalize(x, dim=1) for x in (self.images(images), self.texts(texts))]
        return self.loss(*sides, **given)


def batches(rows: tuple[int, ...]) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(sum(rows), n, generator=generator) for n in (10, 7)] for _ in range(STEPS)]


def steps(model: nn.Module, parameters: Any, inputs: list[list[torch.Tensor]], **given: Any) -> list[float]:
    optim = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for batch in inputs:
        optim.zero_grad()
        loss = model(*batch, **given)
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


def own(rank: int, rows: tuple[int, ...]) -> list[list[torch.Tensor]]:
    return [[x.split(rows)[rank] for x in batch] for batch in batches(rows)]


def by_ddp(rank: int, kind: str, rows: tuple[int, ...]) -> Any:
    model = nn.parallel.DistributedDataParallel(Towers(kind))
    losses = steps(model, model.parameters(), own(rank, rows), group=dist.group.WORLD)
    return losses, {name: x.detach() for name, x in model.module.named_parameters()}


def by_fsdp(rank: int, kind: str, rows: tuple[int, ...]) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = Towers(kind)
    for tower in (model.images, model.texts):
        fully_shard(tower)
    # its parameters have no dims to be cut along, which fully_shard refuses
    model.loss = nn.parallel.DistributedDataParallel(model.loss)
    losses = steps(model, model.parameters(), own(rank, rows), group=dist.group.WORLD)
    whole = {
        name.replace("module.", ""): (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()
        for name, x in model.named_parameters()
    }
    return losses, whole


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("train", [by_ddp, by_fsdp])
def test_steps_are_those_of_one_process(train, kind, rows):
    one = Towers(kind)
    losses = steps(one, one.parameters(), batches(rows))
    found = ranks(3).run(train, kind, rows)
    for name, x in one.named_parameters():
        for _, parameters in found:
            torch.testing.assert_close(parameters[name], x.detach(), rtol=2e-4, atol=2e-5)
    for step, loss in enumerate(losses):  # a mean, of all ranks, and of one process
        assert sum(of[step] for of, _ in found) / 3 == pytest.approx(loss, rel=1e-4)
