"""Step 4: the training loop, with early stopping and checkpoints that resume to the same bits.

What lives here: one model's training on rows in memory; the losses. What lives elsewhere: the models and seeds to train
(``predictor.py``), the checkpoint's file (``checkpoint.py``). All randomness is torch's global generator, whose state is
part of a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from tqdm import tqdm

from ..losses import contrastive_loss
from . import checkpoint as files
from .checkpoint import Checkpoint, History
from .config import Train
from .errors import CheckpointError
from .fuse import Inputs, TwoTowers
from .preprocess import Column
from .processes import ALONE, AsOne, Ranks, Share, here
from .run import write_checkpoint

LOG = logging.getLogger("fusionsum")
EVALUATED = 512  # rows at a time where no gradient is kept


@dataclass(frozen=True)
class Rows:
    """All modalities' columns, and the labels: (N,) int64 classes, float32 values, or retrieval's target numbers."""

    columns: Mapping[str, Column]
    labels: Tensor

    def batch(self, rows: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Return the inputs and the labels of some rows."""
        return {name: column.batch(rows) for name, column in self.columns.items()}, self.labels[rows]


def contrastive(
    model: TwoTowers, embedded: tuple[Tensor, Tensor], labels: Tensor, reduction: str = "mean", group: Any = None
) -> Tensor:
    """Return the symmetric InfoNCE loss of a batch, the mean of both directions.

    Rows of the same label, which is the same target or, of a model of `several`, the manifest's label, are not each other's
    negatives; in the latter case they are positives.

    References
    ----------
    A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3. P. Khosla
    et al., "Supervised Contrastive Learning", NeurIPS 2020, eq. 2.
    """
    pairs = {"labels": labels, "key_labels": labels} if model.several else {"exclude": (labels, labels)}
    found = contrastive_loss(*embedded, fusion_weights=model.fusion_weights, reduction=reduction, group=group, **pairs)
    return found if reduction == "mean" else sum(found) / 2


@dataclass(frozen=True)
class Loss:
    """A task's loss, a function of the model, the model's output and the labels.

    `weights`: one a class; of a label of multi-label classification, for the rows that have it. `reduction`: ``mean``,
    ``sum``, or ``none`` for a loss per row (B,).
    """

    kind: str
    weights: Tensor | None = None
    reduction: str = "mean"

    def __call__(self, model: Any, output: Any, labels: Tensor) -> Tensor:
        """Return the loss of some rows."""
        if self.kind == "classification":
            return cross_entropy(output, labels, weight=self.weights, reduction=self.reduction)
        if self.kind == "multilabel":
            found = binary_cross_entropy_with_logits(output, labels, pos_weight=self.weights, reduction=self.reduction)
            return found.mean(dim=-1) if self.reduction == "none" else found
        if self.kind == "regression":
            return mse_loss(output.squeeze(-1), labels, reduction=self.reduction)
        return contrastive(model, output, labels, self.reduction)

    def share(self, model: Any, output: Any, labels: Tensor, every: Tensor, ranks: Ranks) -> Tensor:
        """Return one rank's part of the loss of a batch, of which it knows `every` label: the parts' mean is that loss."""
        if self.kind == "retrieval":
            return contrastive(model, output, labels, group=ranks.group)
        count = every.numel() if self.kind != "classification" or self.weights is None else self.weights[every].sum()
        return replace(self, reduction="sum")(model, output, labels) * (ranks.count / count)


def loss_of(kind: str, weights: Sequence[float] | None = None, reduction: str = "mean") -> Loss:
    """Return a task's loss, with the weights as plain numbers."""
    return Loss(kind, None if weights is None else torch.tensor(weights, dtype=torch.float32), reduction)


class Objective(nn.Module):
    """A model and its loss: what is differentiated, and what ranks have in common.

    Parameters
    ----------
    model : torch.nn.Module
    loss : Loss
    ranks : Ranks, optional
        Those that share a batch.
    """

    def __init__(self, model: nn.Module, loss: Loss, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.ranks = ranks

    def forward(self, inputs: Inputs, labels: Tensor, share: Share | None = None) -> Tensor:
        """Return the loss of a batch, or of one rank's `share` of it: `inputs` of the rows it takes, all `labels`."""
        if share is None:
            return self.loss(self.model, self.model(inputs), labels)
        with AsOne(share):
            output = self.model(inputs)
        own = labels[share.own]
        output = output[: len(own)] if isinstance(output, Tensor) else tuple(side[: len(own)] for side in output)
        return self.loss.share(self.model, output, own, labels, self.ranks)


def dropped(present: Mapping[str, Tensor], probability: float) -> dict[str, Tensor]:
    """Take each modality of each row away at random, but never all modalities of a row; by name, what is there (B,)."""
    masks = torch.stack(list(present.values()))
    kept = masks & (torch.rand(masks.shape) >= probability)
    kept = torch.where(kept.any(dim=0), kept, masks)
    return dict(zip(present, kept, strict=True))


def optimizer(model: nn.Module, settings: Train) -> torch.optim.AdamW:
    """Return the optimiser that every model is trained with; a layer's `param_groups` override the settings."""
    groups = [group for module in model.modules() if hasattr(module, "param_groups") for group in module.param_groups()]
    special = {parameter for group in groups for parameter in group["params"]}
    others = [parameter for parameter in model.parameters() if parameter not in special]
    # fused: each parameter is updated in one pass, which saves a sixth of the demo's time
    return torch.optim.AdamW(
        [{"params": others}, *groups], lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )


def step(objective: nn.Module, optim: torch.optim.Optimizer, batch: Sequence[Any], clip: float) -> float:
    """Take one step of training on what an `Objective` takes; return the loss before it."""
    optim.zero_grad()
    value = objective(*batch)
    value.backward()
    nn.utils.clip_grad_norm_(objective.parameters(), clip)
    optim.step()
    return value.item()


@torch.no_grad()
def row_losses(model: nn.Module, loss: Callable[..., Tensor], rows: Rows, chosen: Tensor, batch_size: int) -> Tensor:
    """Return the loss of each of some rows (N,), by a `loss_of` without reduction, in batches as `mean_loss` takes them."""
    model.eval()

    def of_rows(part: Tensor) -> Tensor:
        inputs, labels = rows.batch(part)
        return loss(model, model(inputs), labels)

    return torch.cat(here().mapped(of_rows, chosen.split(batch_size)))


@torch.no_grad()
def mean_loss(model: nn.Module, loss: Callable[..., Tensor], rows: Rows, chosen: Tensor, batch_size: int) -> float:
    """Return the mean loss over some rows, in batches of training's size, on which a contrastive loss depends."""
    model.eval()

    def total(part: Tensor) -> float:
        inputs, labels = rows.batch(part)
        return loss(model, model(inputs), labels).item() * len(part)

    return functools.reduce(operator.add, here().mapped(total, chosen.split(batch_size)), 0.0) / len(chosen)


def train(
    model: nn.Module,
    loss: Loss,
    rows: Rows,
    chosen: Mapping[str, Tensor],
    settings: Train,
    identity: Mapping[str, Any],
    query: list[str],
    checkpoint: Path | None = None,
    bar: tqdm | None = None,
) -> History:
    """Train a model, in place; with validation rows and patience, to the weights of its best epoch.

    Parameters
    ----------
    model : torch.nn.Module
    loss : Loss
    rows : Rows
    chosen : mapping of str to Tensor
        The numbers of the rows to train on, ``train``, and to validate on, ``validation``, which may be empty.
    settings : Train
    identity : mapping
        The configuration and the manifest's hash: a checkpoint of another identity is refused.
    query : list of str
        The modalities that `settings.modality_dropout` may take away.
    checkpoint : pathlib.Path, optional
        Written after every epoch, with its log, ``.csv``, beside it; if it exists, training continues from it.
    bar : tqdm, optional
        Advanced by every step.

    Returns
    -------
    list of dict
        For each epoch: ``epoch``, ``train_loss``, ``validation_loss`` (if there are rows for it), ``learning_rate``.

    Raises
    ------
    CheckpointError
        If `checkpoint` cannot be read or is of another configuration.
    ArithmeticError
        If the loss is not finite.
    """
    ranks = here()
    optim = optimizer(model, settings)
    steps = -(-len(chosen["train"]) // settings.batch_size)
    known = ranks.first(lambda: _known(checkpoint, identity, settings))
    history: History = known.history if known else []
    best: dict[str, Any] = {"loss": float("inf"), "epoch": 0, "weights": None}
    extended = known is not None and known.done and not known.stopped and settings.epochs > known.epochs
    over = known is not None and known.done and not extended
    again = extended and settings.schedule == "one-cycle"  # a cycle is over: the next one is a warm restart
    if known and again:
        optim.load_state_dict(known.loop["optimizer"])
    schedule = _schedule(optim, settings, steps, len(history) if again else 0)
    if known:
        loaded(model, known.model)
    if known and not over:
        if not again:
            optim.load_state_dict(known.loop["optimizer"])
            schedule.load_state_dict(known.loop["schedule"])
        torch.set_rng_state(known.loop["generator"])
        best = known.loop["best"]
        if "last" in known.loop:
            best["weights"] = known.model
            loaded(model, known.loop["last"])
    _shorten(bar, (settings.epochs if over else len(history)) * steps)  # what an earlier process has done
    stopped = known is not None and known.stopped
    board = _board(checkpoint)
    objective: nn.Module = Objective(model, loss, ranks)
    if not over:
        objective = ranks.parallel(objective)
    for epoch in range(len(history) + 1, settings.epochs + 1):
        if over:
            break
        model.train()
        ranks.agree()
        total = 0.0
        order = chosen["train"][torch.randperm(len(chosen["train"]))]
        for part in order.split(settings.batch_size):
            share = ranks.share(len(part))
            inputs, _ = rows.batch(part[share.taken])
            if settings.modality_dropout:
                kept = dropped({name: rows.columns[name].present(part) for name in query}, settings.modality_dropout)
                inputs.update({name: (inputs[name][0], mask[share.taken]) for name, mask in kept.items()})
            batch = inputs, rows.labels[part], *([share] if ranks.count > 1 else [])
            total += step(objective, optim, batch, settings.clip) * len(part)
            schedule.step()
            if bar is not None:
                bar.update()
        entry = {
            "epoch": epoch,
            "train_loss": ranks.mean(total) / len(order),
            "learning_rate": schedule.get_last_lr()[0],
        }
        if len(chosen["validation"]):
            value = mean_loss(model, loss, rows, chosen["validation"], settings.batch_size)
            entry["validation_loss"] = value
            if settings.patience and value < best["loss"]:
                best = {"loss": value, "epoch": epoch, "weights": copy.deepcopy(model.state_dict())}
        if not all(map(math.isfinite, entry.values())):
            raise ArithmeticError(f"epoch {epoch}: the loss is not finite; try a lower train.learning_rate")
        history.append(entry)
        LOG.debug("epoch %s: %s", epoch, losses(entry))
        stopped = bool(best["epoch"]) and epoch - best["epoch"] >= settings.patience
        over = stopped or epoch == settings.epochs
        loop = {"optimizer": optim.state_dict(), "schedule": schedule.state_dict(), "generator": torch.get_rng_state()}
        loop["best"] = {**best, "weights": None} if over else best
        if over and best["weights"] is not None:
            loop["last"] = copy.deepcopy(model.state_dict())
            loaded(model, best["weights"])
        if board is not None:
            for name, value in entry.items():
                board.add_scalar(name, value, epoch)
        if checkpoint is not None:
            weights = model.state_dict()
            state = Checkpoint(
                dict(identity), weights, history, settings.epochs, over, stopped, {} if stopped else loop
            )
            write_checkpoint(checkpoint, state)
        if over:
            _shorten(bar, (settings.epochs - epoch) * steps)  # what early stopping saves
    if board is not None:
        board.close()
    model.eval()
    return history


def losses(entry: Mapping[str, float]) -> str:
    """Return the losses of an epoch in words."""
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in entry.items() if "loss" in key)


@contextlib.contextmanager
def contained(threads: int) -> Iterator[None]:
    """Let torch use so many threads; restore its generator and its number of threads afterwards.

    On small batches a second thread saves nothing, and costs tenfold where another process wants its core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def loaded(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a model's weights; raise CheckpointError if they are those of another model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights do not fit the configuration: {error}") from None


def _known(checkpoint: Path | None, identity: Mapping[str, Any], settings: Train) -> Checkpoint | None:
    """Return the checkpoint to go on from, if there is one."""
    if checkpoint is None or not checkpoint.exists():
        return None
    return files.read(checkpoint).checked(checkpoint, identity, settings)


def _shorten(bar: tqdm | None, steps: int) -> None:
    """Take steps out of a bar that need not be taken, so that its rate does not count them."""
    if bar is not None:
        bar.total -= steps
        bar.refresh()


def _schedule(optim: torch.optim.Optimizer, settings: Train, steps: int, past: int) -> Any:
    """Return the schedule of the learning rate over the epochs that are not `past`."""
    if settings.schedule == "one-cycle":
        total = (settings.epochs - past) * steps
        return torch.optim.lr_scheduler.OneCycleLR(optim, settings.learning_rate, total_steps=max(total, 1))
    return torch.optim.lr_scheduler.ConstantLR(optim, factor=1.0)


def _board(checkpoint: Path | None) -> Any:
    """Return a TensorBoard writer if TensorBoard is installed."""
    if checkpoint is None or find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(checkpoint.parent.parent / "tensorboard" / checkpoint.stem))
