"""Step 4: the training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .preprocess import Split

BATCH = 64
LEARNING_RATE = 2e-3  # of 1e-3, 2e-3 and 4e-3 the one at which concat + MLP learns best


def optimizer(model: nn.Module, learning_rate: float = LEARNING_RATE) -> torch.optim.AdamW:
    """Return the optimiser that every model here is trained with."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate)


def step(model: nn.Module, optim: torch.optim.Optimizer, inputs: dict[str, Tensor], labels: Tensor) -> float:
    """Take one step of training; return the loss before it."""
    optim.zero_grad()
    loss = cross_entropy(model(inputs), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    return loss.item()


def train(model: nn.Module, split: Split, steps: int, seed: int, bar: tqdm) -> list[float]:
    """Train on random batches with a one-cycle learning rate, advancing `bar`; return the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    optim = optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, LEARNING_RATE, total_steps=steps)
    losses = []
    for _ in range(steps):
        losses.append(step(model, optim, *split.batch(BATCH, generator)))
        schedule.step()
        bar.update()
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return losses
