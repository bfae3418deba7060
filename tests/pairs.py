"""Cases of scores, and what they should give: every pair's score stored, every row's loss by its formula, in torch.

What lives elsewhere: the tests (``test_losses.py``, ``test_search.py``). Nothing here uses the package's formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import conftest
import device
import fusionsum as fs
from fusionsum import backend, reference, scores


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch, *functions: str) -> None:
    """Let the internal functions of scores be evaluated by the reference only, or by the kernels only."""
    if name == "reference":
        monkeypatch.setattr(scores, "native", None)
        return
    conftest.require_native()
    lacking = [function for function in functions if not hasattr(backend.native, function)]
    if lacking:
        conftest.missing(f"kernels of {', '.join(lacking)} in the native module")
    monkeypatch.setattr(scores, "native", device.scores(backend.native))

    def declined(*arguments: Any) -> None:
        raise AssertionError("the kernels declined a valid call")

    for function in functions:
        monkeypatch.setattr(reference, function, declined)


@dataclass
class Pairs:
    """The arguments of a loss: both sides, and options by their names."""

    queries: list[np.ndarray]
    keys: list[np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self, name: str = "contrastive_loss", **options: Any) -> Any:
        """Call a public function."""
        return getattr(fs, name)(tuple(self.queries), tuple(self.keys), **self.options, **options)

    def read(self) -> scores.Scores:
        """Check and read the call, as the internal functions take it."""
        return scores.check(tuple(self.queries), tuple(self.keys), **self.options).read()

    def but(self, **options: Any) -> Pairs:
        """Replace options."""
        return replace(self, options=self.options | options)


def sides(
    rng: Any,
    rows: int = 4,
    columns: int = 6,
    terms: int = 5,
    factors: int = 1,
    dtype: str = "float64",
    kind: str = "normal",
    masks: str | None = None,
    activations: bool = False,
    weights: bool = True,
) -> Pairs:
    """Random sides: of M factors one is the keys', or with M = 1 each side has one."""
    left, right = max(1, factors - 1), 1 if factors < 4 else 2
    queries = [conftest.random(rng, (rows, terms), dtype, kind) for _ in range(left)]
    keys = [conftest.random(rng, (columns, terms), dtype, kind) for _ in range(right)]
    options: dict[str, Any] = {}
    if weights:
        options["fusion_weights"] = conftest.random(rng, (terms,), dtype, kind)
    if masks is not None:
        options["absent"] = masks
        options["present"] = [np.asarray(rng.random(rows) > 0.3) for _ in queries]
        options["key_present"] = [np.asarray(rng.random(columns) > 0.3) for _ in keys]
    if activations:
        options["activations"] = ["tanh", "gelu", None, "relu"][:left]
        options["key_activations"] = "sigmoid"
    return Pairs(queries, keys, options)


def with_labels(pairs: Pairs, rng: Any, kinds: int = 3) -> Pairs:
    """Add labels of which some have no positive on the other side."""
    rows, columns = len(pairs.queries[0]), len(pairs.keys[0])
    labels, key_labels = rng.integers(0, kinds, rows), rng.integers(0, kinds, columns)
    labels[:1], key_labels[-1:] = -5, 2**40
    return pairs.but(labels=labels, key_labels=key_labels)


def with_exclusions(pairs: Pairs, rng: Any, exclude: str | None) -> Pairs:
    """Add "ids" or a "mask", which excludes a whole row and some positives; or nothing."""
    rows, columns = len(pairs.queries[0]), len(pairs.keys[0])
    if exclude == "ids":
        return pairs.but(exclude=(rng.integers(0, 2, rows), rng.integers(0, 2, columns).astype(np.int16)))
    if exclude == "mask":
        mask = np.asarray(rng.random((rows, columns)) > 0.6)
        mask[-1] = True
        return pairs.but(exclude=mask)
    return pairs


# ---- naive torch -----------------------------------------------------------------------------------------------------


class Naive:
    """All pairs in float64: the leaves, whose gradients can be asked for, the scores, and which are valid and positive."""

    def __init__(self, pairs: Pairs, wide: Any = None):
        import torch

        wide = wide or torch.float64
        phi = {
            None: lambda z: z,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "relu": torch.relu,
            "silu": torch.nn.functional.silu,
            "gelu": torch.nn.functional.gelu,
        }
        options = pairs.options

        def side(factors: Any, names: Any, masks: Any) -> Any:
            names = [names] * len(factors) if names is None or isinstance(names, str) else names
            product = 1
            for x, name, mask in zip(factors, names, masks or [None] * len(factors), strict=True):
                z = phi[name](torch.tensor(x.astype(np.float64), dtype=wide))
                if mask is not None:
                    held = torch.full_like(z, {"one": 1.0, "zero": 0.0}[options["absent"]])
                    z = torch.where(torch.tensor(mask)[:, None], z, held)
                product = product * z
            return product

        def leaf(x: Any) -> Any:
            return torch.as_tensor(np.asarray(x, np.float64), dtype=wide).clone().requires_grad_()

        query_side = side(pairs.queries, options.get("activations"), options.get("present"))
        if options.get("fusion_weights") is not None:
            query_side = query_side * torch.tensor(options["fusion_weights"].astype(np.float64), dtype=wide)
        self.query_side = query_side.detach().requires_grad_()
        self.key_side = side(pairs.keys, options.get("key_activations"), options.get("key_present"))
        self.key_side = self.key_side.detach().requires_grad_()
        rows, columns = len(query_side), len(self.key_side)
        self.scale = leaf(options.get("logit_scale", 1.0))
        self.bias = leaf(options.get("logit_bias", 0.0))
        key_bias = options.get("key_bias")
        self.key_bias = leaf(np.zeros(columns) if key_bias is None else key_bias.astype(np.float64))
        self.scores = self.scale * (self.query_side @ self.key_side.T) + self.bias + self.key_bias
        self.positive = torch.eye(rows, columns, dtype=torch.bool)
        if options.get("labels") is not None:
            labels, key_labels = (torch.tensor(options[name].astype(np.int64)) for name in ("labels", "key_labels"))
            self.positive = labels[:, None] == key_labels[None]
        self.valid = torch.ones(rows, columns, dtype=torch.bool)
        exclude = options.get("exclude")
        if isinstance(exclude, tuple):
            ids, key_ids = (torch.tensor(x.astype(np.int64)) for x in exclude)
            self.valid = (ids[:, None] != key_ids[None]) | self.positive
        elif exclude is not None:
            self.valid = torch.tensor(~exclude)
        self.positive = self.positive & self.valid

    def contrastive(
        self,
        positives: str = "mean",
        symmetric: bool = True,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_lse: bool = False,
    ) -> list[Any]:
        """Losses and log-sum-exps, flat, row by row from the definition."""
        import torch

        def one_way(s: Any, valid: Any, positive: Any) -> tuple[Any, list[bool], Any]:
            losses, counted, lses = [], [], []
            for row, ok, wanted in zip(s, valid, positive, strict=True):
                lse = torch.logsumexp(row[ok], 0)
                loss = s.new_zeros(())
                if wanted.any():
                    hard = lse - torch.logsumexp(row[wanted], 0) if positives == "any" else (lse - row[wanted]).mean()
                    loss = hard
                    if label_smoothing:
                        loss = (1 - label_smoothing) * hard + label_smoothing * (lse - row[ok]).mean()
                losses.append(loss)
                counted.append(bool(wanted.any()))
                lses.append(lse)
            return (
                (torch.stack(losses) if losses else s.new_zeros(0)),
                counted,
                (torch.stack(lses) if lses else s.new_zeros(0)),
            )

        ways = [one_way(self.scores, self.valid, self.positive)]
        if symmetric:
            ways.append(one_way(self.scores.T, self.valid.T, self.positive.T))
        found = [losses for losses, _, _ in ways]
        if reduction != "none":
            parts = [losses.sum() / (max(1, sum(counted)) if reduction == "mean" else 1) for losses, counted, _ in ways]
            found = [torch.stack(parts).mean()]
        return found + [lse for _, _, lse in ways if return_lse]

    def sigmoid(self, reduction: str = "mean") -> Any:
        """Evaluate the sigmoid loss from the definition."""
        import torch

        z = 2.0 * self.positive - 1
        pairs = torch.where(self.valid, -torch.nn.functional.logsigmoid(z * self.scores), 0.0)
        if reduction == "none":
            return pairs.sum(1)
        return pairs.sum() / (max(1, len(pairs)) if reduction == "mean" else 1)


def flat(found: Any) -> list[np.ndarray]:
    """Undo the structure in which `contrastive_loss` returns its results."""
    if not isinstance(found, tuple):
        return [np.asarray(found)]
    return [x for part in found for x in flat(part)]
