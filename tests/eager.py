"""The sum as users write it in torch, cases as tensors, and a layer: what the tests of tensors share."""

from __future__ import annotations

import numpy as np
import torch
from torch.func import jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fusionsum as fs
from conftest import ACTIVATIONS, FORMS, Case
from fusionsum import reference

PHI = {
    None: lambda z: z,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
SMALL = {"A": 2, "B": 2, "C": 2, "K": 2, "O": 2, "n": 3}
MASKS = {"present": None, "rows": ("rows", "one"), "full": ("full", "zero")}


def to_torch(case: Case, requires_grad: bool = False) -> tuple[list, dict]:
    """Return the operands, the weights first where there are any, and the options of the call."""
    operands = [torch.from_numpy(np.array(x)).requires_grad_(requires_grad) for x in case.operands]
    masks = None if case.present is None else [None if m is None else torch.from_numpy(m) for m in case.present]
    return operands, case.options() | {"present": masks}


def fused(options: dict, weighted: bool = True):
    return lambda *x: fs.fusion_sum(*(x if weighted else (None, *x)), **options)


def naive(options: dict, weighted: bool = True):
    """Write the sum as a user would, with ``torch.where`` for absent factors."""

    def function(*operands):
        product, factors = (operands[0], operands[1:]) if weighted else (1, operands)
        names = options["activations"] or [None] * len(factors)
        masks = options["present"] or [None] * len(factors)
        full = torch.broadcast_shapes(*(x.shape for x in operands))
        for z, name, mask in zip(factors, names, masks, strict=True):
            if mask is not None:
                mask = reference.align_mask(mask, z)
                z = torch.where(mask, PHI[name](torch.where(mask, z, 0)), float(options["absent"] == "one"))
            else:
                z = PHI[name](z)
            product = product * z
        return product.expand(full).sum(options["dim"])

    return function


def cases(rng, form: str, masks: str, sizes=SMALL):
    """As few cases as have every activation."""
    for shift in range(0, len(ACTIVATIONS), len(FORMS[form].factors)):
        names = [ACTIVATIONS[(m + shift) % len(ACTIVATIONS)] for m in range(len(FORMS[form].factors))]
        case = FORMS[form].case(rng, **sizes, activations=names)
        yield case if MASKS[masks] is None else case.masked(rng, *MASKS[masks])


def simple(*shape: int, requires_grad: bool = False, dtype=torch.float64) -> list[torch.Tensor]:
    """Weights (n,) and two factors (..., n)."""
    shapes = (shape[-1:], shape, shape)
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


class Passing(TorchDispatchMode):
    """A mode that watches and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def by_every_way(function, *operands: torch.Tensor) -> list[torch.Tensor]:
    """Return output and derivatives, by every way that a call of tensors takes."""
    found = [function(*operands)]
    x = [a.clone().requires_grad_() for a in operands]
    output = function(*x)
    u = torch.ones_like(output)
    found += [output, *torch.autograd.grad(output, x, u)]
    first = torch.autograd.grad(function(*x), x, u, create_graph=True)
    found += [*first, *torch.autograd.grad(first, x, [torch.ones_like(d) for d in first])]
    with Passing():
        output = function(*x)
        found += [output, *torch.autograd.grad(output, x, u)]
    found += [*jvp(function, operands, tuple(map(torch.ones_like, operands))), *vjp(function, *operands)[1](u)]
    found.append(vmap(function)(*(torch.stack([a, 2 * a]) for a in operands)))
    output = torch.compile(function, backend="aot_eager", fullgraph=True)(*x)
    found += [output, *torch.autograd.grad(output, x, u)]
    return [a.detach() for a in found]


class Fused(torch.nn.Module):
    """A layer as users write one."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(6))
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6)

    def forward(self, x):
        return fs.fusion_sum(self.weights, self.first(x), self.second(x), activations=["tanh", None])
