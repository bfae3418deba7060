"""A call of a loss as a function of its floating tensors, beside the same from stored scores in torch.

What lives elsewhere: the tests (``test_autograd_losses.py``, ``test_autograd_losses_watched.py``), the cases and naive
formulas (``pairs.py``).
"""

from __future__ import annotations

import numpy as np
import torch

import fusionsum as fs
import pairs
from eager import PHI

LOSSES = ("contrastive_loss", "sigmoid_loss")


class Step:
    """A case of a loss as a function of its floating tensors."""

    def __init__(self, case: pairs.Pairs, name: str = "contrastive_loss", **options):
        self.case, self.name, self.more = case, name, options
        self.places = [*case.queries, *case.keys]
        self.scalars = [x for x in ("fusion_weights", "key_bias", "logit_scale", "logit_bias") if x in case.options]

    def leaves(self, dtype=None, requires_grad=True):
        """Return new tensors of the case's arrays, in the order in which the step takes them."""
        given = self.places + [self.case.options[name] for name in self.scalars]
        found = [torch.tensor(np.asarray(x, np.float64), dtype=dtype or torch.float64) for x in given]
        return [x.requires_grad_(requires_grad) for x in found]

    def _split(self, leaves):
        count, both = len(self.case.queries), len(self.places)
        return leaves[:count], leaves[count:both], dict(zip(self.scalars, leaves[both:], strict=True))

    def __call__(self, *leaves):
        queries, keys, named = self._split(leaves)
        options = {name: as_tensors(x) for name, x in self.case.options.items()} | named | self.more
        found = pairs_flat(getattr(fs, self.name)(tuple(queries), tuple(keys), **options))
        return tuple(torch.where(x.isfinite(), x, 0) for x in found)  # the log-sum-exp of nothing is -inf

    def naive(self, *leaves):
        """Evaluate the loss from stored scores, in the dtype of the leaves."""
        queries, keys, named = self._split(leaves)
        options, found = self.case.options, []
        for prefix, factors in (("", queries), ("key_", keys)):
            names = options.get(f"{prefix}activations")
            names = [names] * len(factors) if names is None or isinstance(names, str) else names
            product = 1
            for z, name, mask in zip(factors, names, options.get(f"{prefix}present", [None] * 9), strict=False):
                z = PHI[name](z)
                product = product * (z if mask is None else torch.where(torch.tensor(mask)[:, None], z, self.absent))
            found.append(product)
        weighted = found[0] * named.get("fusion_weights", 1)
        naive = pairs.Naive(self.case)
        naive.scores = named["logit_scale"] * (weighted @ found[1].T) + named.get("key_bias", 0)
        naive.scores = naive.scores + named.get("logit_bias", 0)
        if self.name == "contrastive_loss":
            found = naive.contrastive(**self.more)
        else:
            found = [naive.sigmoid(self.more.get("reduction", "mean"))]
        return tuple(torch.where(x.isfinite(), x, 0) for x in found)

    @property
    def absent(self):
        return {"one": 1.0, "zero": 0.0}[self.case.options["absent"]]


def pairs_flat(found):
    return [x for part in found for x in pairs_flat(part)] if isinstance(found, tuple) else [found]


def as_tensors(x):
    if isinstance(x, (list, tuple)) and not isinstance(x, str):
        return type(x)(map(as_tensors, x))
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def simple(name="contrastive_loss", rows=4, columns=6, terms=3, factors=3, **options):
    """Make a step with all that has a gradient, masks and activations."""
    rng = np.random.default_rng(7)
    case = pairs.sides(rng, rows, columns, terms, factors, masks="one", activations=True).but(logit_scale=1.7)
    bias = {"logit_bias": -0.4} if name == "sigmoid_loss" else {"key_bias": rng.standard_normal(columns)}
    return Step(case.but(**bias), name, **options)


def gradients(function, leaves):
    return torch.autograd.grad(sum(x.sum() for x in function(*leaves)), leaves)
