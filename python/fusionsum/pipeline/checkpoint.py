"""Checkpoints: tensors as safetensors, all else as JSON. Nothing that a file says is ever executed.

What lives here: the one reader and writer of a run's binary and JSON files, their checksums, and what a resumed training
requires of a checkpoint. What lives elsewhere: the files' names and places (``run.py``), what the loop keeps
(``train.py``).

A checksum finds the flipped bit of a bad disk or a broken copy. It is no signature: who changes a file on purpose can
change its checksum too, and gains numbers by it, not a program's execution.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import Train, differences
from .errors import CheckpointError

History = list[dict[str, float]]  # an entry for each epoch
ABOUT = "fusionsum"  # the key of a safetensors file's metadata under which our JSON is
MODEL = "model."  # what the names of a model's weights begin with in a file
TENSOR, NUMBERED = "$tensor", "$numbered"  # JSON objects that stand for a tensor, and for a mapping by integers


@dataclass
class Checkpoint:
    """A model's training so far.

    `identity`: the configuration and the hash of the rows, which a resumed training must have too. `model`: the weights,
    the best ones once the training is `done`. `epochs`: how many the training was planned for; `stopped`: whether it ended
    early. `loop`: what more the loop needs to go on (``optimizer``, ``schedule``, ``generator``, ``best``, and ``last``,
    the last weights, where `model` has better ones); empty where a predictor was saved that had it no more.
    """

    identity: dict[str, Any] | None
    model: dict[str, Tensor]
    history: History
    epochs: int
    done: bool = False
    stopped: bool = False
    loop: dict[str, Any] = field(default_factory=dict)

    def checked(self, path: Path, identity: Mapping[str, Any], settings: Train) -> Checkpoint:
        """Return itself; raise CheckpointError if it cannot be continued with this identity and these settings."""
        if self.identity is None:
            raise CheckpointError(f"{path}: does not say of which configuration it is, so it cannot be resumed")
        if different := differences(self.identity, identity):
            raise CheckpointError(f"{path}: is of another configuration (there, and here): {'; '.join(different)}")
        wanted = settings.epochs
        if wanted < len(self.history):
            raise CheckpointError(
                f"{path}: train.epochs: expected {len(self.history)} at least, its epochs; got {wanted}"
            )
        if not self.done and wanted != self.epochs and settings.schedule == "one-cycle":
            raise CheckpointError(
                f"{path}: train.epochs: the schedule of its training, which is not done, spans {self.epochs}; got {wanted}"
            )
        if not self.loop and not self.stopped and (wanted > self.epochs or not self.done):
            raise CheckpointError(
                f"{path}: cannot be trained on: it holds no optimizer, as `MultimodalPredictor.save` writes"
            )
        return self


def _taken_apart(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return a nested value as JSON's types; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, Mapping):
        items = {key: _taken_apart(item, tensors, f"{name}.{key}") for key, item in value.items()}
        return {NUMBERED: list(items.items())} if any(isinstance(key, int) for key in items) else items
    if isinstance(value, list | tuple):
        return [_taken_apart(item, tensors, f"{name}.{k}") for k, item in enumerate(value)]
    return value


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if NUMBERED in value:
        return {int(key): _put_together(item, tensors) for key, item in value[NUMBERED]}
    return {key: _put_together(item, tensors) for key, item in value.items()}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a JSON text and of tensors: names, types, shapes and bytes."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, so that an interruption leaves the old file or the new one, never a part."""
    tensors: dict[str, Tensor] = {}
    state = {key: getattr(checkpoint, key) for key in ("identity", "history", "epochs", "done", "stopped", "loop")}
    text = json.dumps(_taken_apart(state, tensors, "state"))
    tensors |= {MODEL + name: weights for name, weights in checkpoint.model.items()}
    # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    replace(path, save(tensors, {ABOUT: text, "sha256": _digest(text, tensors)}))


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    CheckpointError
        If the file is missing or is none, has changed since it was written, or holds weights that are not finite.
    """
    _must_be_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None
    if not {ABOUT, "sha256"} <= about.keys():
        raise CheckpointError(f"{path}: is no checkpoint of fusionsum")
    if _digest(about[ABOUT], tensors) != about["sha256"]:
        raise CheckpointError(
            f"{path}: has changed since it was written: its checksum is another; copy or train it again"
        )
    try:
        state = _put_together(json.loads(about[ABOUT]), tensors)
        model = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
        found = Checkpoint(model=model, **state)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no checkpoint of fusionsum: {error}") from None
    for name, weights in model.items():
        if not torch.isfinite(weights).all():
            raise CheckpointError(f"{path}: the weights {name!r} are not finite")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON with its checksum."""
    text = json.dumps(value, sort_keys=True)
    replace(path, f'{{"sha256": "{_digest(text, {})}", "value": {text}}}\n'.encode())


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Raises
    ------
    CheckpointError
        If the file is missing or is none, or has changed since it was written.
    """
    _must_be_file(path)
    try:
        found = json.loads(path.read_bytes())
        changed = found["sha256"] != _digest(json.dumps(found["value"], sort_keys=True), {})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
    if changed:
        raise CheckpointError(f"{path}: has changed since it was written: its checksum is another")
    return found["value"]


def _must_be_file(path: Path) -> None:
    """Raise CheckpointError unless there is a regular file: a pipe or a device would be waited for, or read for ever."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: {'is no regular file' if path.exists() else 'cannot be read: there is no such file'}"
        )


def replace(path: Path, content: bytes) -> None:
    """Write a file whole, or leave the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
