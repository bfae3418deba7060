"""The published formulas of the fusion layers, and the table of layers with arguments, formula and inputs.

A formula is the published code's, written out in float64 on parameters of the published names and shapes. What lives
elsewhere: the tests (``test_nn.py``). ``python tests/published.py`` prints how far each layer is from its formula, and
how many of its parameters a training step moves.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fusionsum import nn as layers

F64 = torch.float64
DIMS, OUTPUTS, RANK, ROWS = (5, 3, 4), 6, 7, 9
ENTITIES, RELATIONS, CANDIDATES = 11, 4, 3


class Parameters(dict):
    """Parameters by their published names, each drawn when a formula first asks for it."""

    def __call__(self, name, *shape):
        """Return the parameter of this name, and hold it to this shape."""
        if name not in self:
            self[name] = torch.randn(shape, dtype=F64).div_(math.sqrt(shape[-1])).requires_grad_()
        assert self[name].shape == shape
        return self[name]

    def linear(self, name, x, outputs, bias=True):
        """Map x as a torch.nn.Linear of this name would."""
        y = x @ self(f"{name}.weight", outputs, x.shape[-1]).T
        return y + self(f"{name}.bias", outputs) if bias else y


# ---- the published formulas: parameters, inputs, masks (all True where none is missing), arguments of the layer --------


def phi(name, z):
    return getattr(torch.nn.functional, name)(z) if name else z


def present_or(value, z, mask):
    return torch.where(mask[:, None], z, torch.full_like(z, value))


def product(factors):
    return functools.reduce(operator.mul, factors)


def unit(z):
    z = torch.sqrt(torch.relu(z)) - torch.sqrt(torch.relu(-z))
    return z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def low_rank(p, xs, masks, o):
    fused = 1
    for name, x, mask in zip(("audio", "video", "text"), xs, masks, strict=True):
        x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
        projected = torch.matmul(x, p(f"{name}_factor", RANK, x.shape[1], OUTPUTS))
        fused = fused * torch.where(mask[:, None], projected, 1)
    return torch.matmul(p("fusion_weights", 1, RANK), fused.permute(1, 0, 2)).squeeze(1) + p("fusion_bias", 1, OUTPUTS)


def low_rank_any(p, xs, masks, o):
    """As `low_rank`, but of any number of modalities, with activations and without a bias; own names."""
    factors = (p.linear(f"factors.{m}", x, RANK * OUTPUTS) for m, x in enumerate(xs))
    held = [present_or(1, phi(a, z), k) for a, z, k in zip(o["activations"], factors, masks, strict=True)]
    return (p("fusion_weights", RANK, 1) * product(held).view(-1, RANK, OUTPUTS)).sum(1)


def residual(p, xs, masks, o):
    summed = late(p, xs, masks, o)
    xs = [present_or(0, x, mask) for x, mask in zip(xs, masks, strict=True)]
    products = product(p.linear(f"factors.{m}", x, RANK * OUTPUTS) for m, x in enumerate(xs)).view(-1, RANK, OUTPUTS)
    return summed + (p("fusion_weights", RANK, 1) * products).sum(1)


def cp_bilinear(p, xs, masks, o):
    """torch.nn.Bilinear of the dense tensor; what is missing counts as 1 once it is mapped."""
    first, second = (p(f"linears.{m}.weight", RANK, x.shape[1]) for m, x in enumerate(xs))
    weight = p("weight", OUTPUTS, RANK)
    y = torch.nn.functional.bilinear(*xs, torch.einsum("or,ri,rj->oij", weight, first, second), p("bias", OUTPUTS))
    lone = [(x @ u.T) @ weight.T + p["bias"] for x, u in zip(xs, (first, second), strict=True)]
    y = torch.where(masks[0][:, None], torch.where(masks[1][:, None], y, lone[0]), lone[1])
    return torch.where((masks[0] | masks[1])[:, None], y, weight.sum(1) + p["bias"])


def gated(p, xs, masks, o):
    xs = [present_or(0, x, mask) for x, mask in zip(xs, masks, strict=True)]
    hidden = [torch.tanh(p.linear(f"linears.{m}", x, OUTPUTS, bias=False)) for m, x in enumerate(xs)]
    gates = p.linear("gate", torch.cat(xs, 1), OUTPUTS if len(xs) == 2 else OUTPUTS * len(xs), bias=False)
    if len(xs) == 2:
        z = torch.sigmoid(gates)
        return z * hidden[0] + (1 - z) * hidden[1]
    return sum(torch.sigmoid(z) * h for z, h in zip(gates.chunk(len(xs), 1), hidden, strict=True))


def pooled(p, xs, masks, o, terms=1):
    """MLB and MFB: relu, product, sum over the minor axis."""
    factors = [phi(o["activ_input"], p.linear(f"linear{m}", x, terms * o["mm_dim"])) for m, x in enumerate(xs)]
    z = product(present_or(1, z, mask) for z, mask in zip(factors, masks, strict=True))
    return finished(p, z.view(-1, o["mm_dim"], terms).sum(2), o)


def finished(p, z, o):
    z = p.linear("linear_out", unit(z) if o["normalize"] else z, OUTPUTS)
    return phi(o.get("activ_output"), z)


def mfb(p, xs, masks, o):
    return pooled(p, xs, masks, o, o["factor"])


def mfh(p, xs, masks, o):
    stages, skip = [], 1
    for stage in range(2):
        for m, (x, mask) in enumerate(zip(xs, masks, strict=True)):
            z = phi(o["activ_input"], p.linear(f"linear{m}_{stage}", x, o["factor"] * o["mm_dim"]))
            skip = skip * present_or(1, z, mask)
        z = skip.view(-1, o["mm_dim"], o["factor"]).sum(2)
        stages.append(unit(z) if o["normalize"] else z)
    return phi(o["activ_output"], p.linear("linear_out", torch.cat(stages, 1), OUTPUTS))


def mapped(p, xs, o):
    return [p.linear(f"linear{0 if o['shared'] else m}", x, o["mm_dim"]) for m, x in enumerate(xs)]


def mutan(p, xs, masks, o):
    merged = [
        p.linear(f"merge_linear{0 if o['shared'] else m}", x, o["mm_dim"] * o["rank"])
        for m, x in enumerate(mapped(p, xs, o))
    ]
    z = product(present_or(1, z, mask) for z, mask in zip(merged, masks, strict=True))
    return finished(p, z.view(-1, o["rank"], o["mm_dim"]).sum(1), o)


def block(p, xs, masks, o):
    sizes = published_sizes(o["mm_dim"], o["chunks"])
    chunks = zip(*(x.split(sizes, 1) for x in mapped(p, xs, o)), strict=True)
    zs = []
    for c, (size, parts) in enumerate(zip(sizes, chunks, strict=True)):
        merged = [
            p.linear(f"merge_linears{0 if o['shared'] else m}.{c}", x, size * o["rank"]) for m, x in enumerate(parts)
        ]
        z = product(present_or(1, z, mask) for z, mask in zip(merged, masks, strict=True))
        z = z.view(len(z), o["rank"], size).sum(1)
        zs.append(unit(z) if o["pos_norm"] == "before_cat" else z)
    z = torch.cat(zs, 1)
    return p.linear("linear_out", unit(z) if o["pos_norm"] == "after_cat" else z, OUTPUTS)


def published_sizes(dim, chunks):
    """Equal parts, the surplus taken from the last; where that gives less than 0, one number from each of the last."""
    size = (dim + chunks - 1) // chunks
    sizes = [size] * chunks
    sizes[-1] -= sum(sizes) - dim
    if sizes[-1] < 0:
        lacking, sizes[-1] = sizes[-2] - sizes[-1], sizes[-2]
        for j in range(lacking):
            sizes[-j - 1] -= 1
        assert min(sizes) > 0
    return sizes


def tucker(p, xs, masks, o):
    hidden = [present_or(1, z, mask) for z, mask in zip(mapped(p, xs, o), masks, strict=True)]
    letters = "ijk"[: len(xs)]
    core = p("bilinear.weight", *(o["mm_dim"],) * (len(xs) + 1))
    z = torch.einsum(f"o{letters},{','.join(f'b{i}' for i in letters)}->bo", core, *hidden)
    return finished(p, z + p("bilinear.bias", o["mm_dim"]), o)


def tensor_fusion(p, xs, masks, o):
    outer = torch.ones(ROWS, 1, dtype=F64)
    for x, mask in zip(xs, masks, strict=True):
        x = torch.cat([torch.ones(ROWS, 1, dtype=F64), present_or(0, x, mask)], 1)
        outer = (outer.unsqueeze(2) * x.unsqueeze(1)).flatten(1)
    return p.linear("post_fusion_layer_1", outer, OUTPUTS)


def concat_mlp(p, xs, masks, o):
    z = torch.cat([present_or(0, x, mask) for x, mask in zip(xs, masks, strict=True)], 1)
    for i, size in enumerate(o["dimensions"]):
        z = phi(o["activation"], p.linear(f"mlp.linears.{i}", z, size))
    return p.linear(f"mlp.linears.{len(o['dimensions'])}", z, OUTPUTS)


def linear_sum(p, xs, masks, o):
    mapped = (phi(o["activ_input"], p.linear(f"linear{m}", x, o["mm_dim"])) for m, x in enumerate(xs))
    return finished(p, sum(present_or(0, z, mask) for z, mask in zip(mapped, masks, strict=True)), o)


def late(p, xs, masks, o):
    scores = (p.linear(f"linears.{m}", x, OUTPUTS) for m, x in enumerate(xs))
    return sum(present_or(0, z, mask) for z, mask in zip(scores, masks, strict=True))


def gmf(p, xs, masks, o):
    users, items = p("user_embedding_W", ENTITIES, o["latent_dim"]), p("item_embedding_W", ENTITIES, o["latent_dim"])
    users, items = users[xs[0]], items if len(xs) == 1 else items[xs[1]]
    users = users.unsqueeze(1) if items.ndim > users.ndim or len(xs) == 1 else users
    score = ((users * items) @ p("prediction_W", o["latent_dim"], 1)).squeeze(-1) + p("prediction_b", 1)
    return torch.sigmoid(score)


def triples(xs, entities, relations):
    """Look embeddings up, with a candidate axis where heads or tails have one; None means all entities."""
    wide = any(x is None or x.ndim > 1 for x in xs)
    for x, table in zip(xs, (entities, relations, entities), strict=True):
        found = table if x is None else table[x]
        yield found.unsqueeze(1) if wide and x is not None and x.ndim == 1 else found


def distmult(p, xs, masks, o):
    n = o["hidden_dim"]
    settings(p)
    return product(triples(xs, p("entity_embedding", ENTITIES, n), p("relation_embedding", RELATIONS, n))).sum(-1)


def complex_(p, xs, masks, o):
    n = o["hidden_dim"]
    settings(p)
    tables = p("entity_embedding", ENTITIES, 2 * n), p("relation_embedding", RELATIONS, 2 * n)
    head, relation, tail = triples(xs, *(torch.complex(*table.chunk(2, 1)) for table in tables))
    return (head * relation * tail.conj()).sum(-1).real


def settings(p):
    """Ask for the constants that the published code saves as parameters."""
    for name in ("gamma", "embedding_range"):
        p(name, 1)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A layer with arguments, its formula, and inputs."""

    layer: type
    formula: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    dims: Any = DIMS[:2]
    indices: Any = None  # for layers that take indices: their shapes and bounds
    published: bool = True  # whether the formula's names are those of an original implementation

    def make(self, **options):
        """Make the layer, freshly initialised."""
        sizes = {} if self.indices else {"input_dims": self.dims, "output_dim": OUTPUTS}
        if self.layer is layers.CPBilinear:
            sizes = {"in1_features": self.dims[0], "in2_features": self.dims[1], "out_features": OUTPUTS}
        return self.layer(**sizes | self.options | options)

    def inputs(self, dtype=F64):
        """Draw one input per modality, which requires its gradient if in float64; or indices, None for all."""
        if self.indices:
            return [x if x is None else torch.randint(x[-1], x[:-1]) for x in self.indices]
        return [torch.randn(ROWS, d, dtype=dtype, requires_grad=dtype == F64) for d in self.dims]

    def all_present(self):
        """Return masks of which nothing is missing."""
        return [torch.ones(ROWS, dtype=torch.bool) for _ in self.dims]

    def arguments(self):
        """Every argument of the layer, defaults too."""
        defaults = {k: v.default for k, v in inspect.signature(self.layer).parameters.items()}
        return defaults | self.options


MM = {"mm_dim": 8}
TANH = MM | {"activ_input": "tanh", "activ_output": None, "normalize": True}
HEADS, TRIPLE = (ROWS, ENTITIES), {"nentity": ENTITIES, "nrelation": RELATIONS, "hidden_dim": 8}
TAILS, RELATION, MANY = HEADS, (ROWS, RELATIONS), (ROWS, CANDIDATES, ENTITIES)
USERS = {"num_users": ENTITIES, "num_items": ENTITIES}

TABLE = {
    "LowRankFusion": Entry(layers.LowRankFusion, low_rank, {"rank": RANK}, DIMS),
    "LowRankFusion of four, activated": Entry(
        layers.LowRankFusion,
        low_rank_any,
        {"rank": RANK, "bias": False, "activations": ["tanh", None, "gelu", "sigmoid"]},
        (*DIMS, 2),
        published=False,
    ),
    "ResidualFusion": Entry(layers.ResidualFusion, residual, {"rank": RANK}, DIMS, published=False),
    "ResidualFusion of eight": Entry(
        layers.ResidualFusion, residual, {"rank": RANK}, (*DIMS, *DIMS, 2, 3), published=False
    ),
    "CPBilinear": Entry(layers.CPBilinear, cp_bilinear, {"rank": RANK}, published=False),
    "GatedFusion": Entry(layers.GatedFusion, gated, published=False),
    "GatedFusion of three": Entry(layers.GatedFusion, gated, dims=DIMS, published=False),
    "MLB": Entry(layers.MLB, pooled, MM),
    "MLB, normalised": Entry(layers.MLB, pooled, TANH),
    "MLB of eight": Entry(layers.MLB, pooled, TANH, (*DIMS, *DIMS, 2, 3)),
    "MFB": Entry(layers.MFB, mfb, MM),
    "MFB of three, normalised": Entry(layers.MFB, mfb, TANH | {"factor": 5}, DIMS),
    "MFH": Entry(layers.MFH, mfh, MM),
    "MFH of eight, normalised": Entry(layers.MFH, mfh, TANH | {"factor": 5}, (*DIMS, *DIMS, 2, 3)),
    "MUTAN": Entry(layers.MUTAN, mutan, MM | {"rank": 3}),
    "MUTAN of three, normalised": Entry(layers.MUTAN, mutan, MM | {"normalize": True}, DIMS),
    "MUTAN, shared": Entry(layers.MUTAN, mutan, MM | {"shared": True}, (4, 4)),
    "BLOCK": Entry(layers.BLOCK, block, MM | {"chunks": 3, "rank": 3}),
    "BLOCK of three, normalised together": Entry(
        layers.BLOCK, block, MM | {"chunks": 4, "pos_norm": "after_cat"}, DIMS
    ),
    "BLOCK, shared, uneven": Entry(
        layers.BLOCK, block, {"mm_dim": 21, "chunks": 10, "rank": 2, "shared": True}, (4, 4)
    ),
    "TuckerFusion": Entry(layers.TuckerFusion, tucker, MM),
    "TuckerFusion of three, normalised": Entry(layers.TuckerFusion, tucker, {"mm_dim": 4, "normalize": True}, DIMS),
    "GMF": Entry(layers.GMF, gmf, USERS, indices=(HEADS, TAILS)),
    "GMF, candidates": Entry(layers.GMF, gmf, USERS, indices=(HEADS, MANY)),
    "GMF, all items": Entry(layers.GMF, gmf, USERS, indices=(HEADS,)),
    **{
        f"{layer.__name__}{what}": Entry(layer, formula, TRIPLE, indices=indices)
        for layer, formula in ((layers.DistMult, distmult), (layers.ComplEx, complex_))
        for what, indices in {
            "": (HEADS, RELATION, TAILS),
            ", candidate tails": (HEADS, RELATION, MANY),
            ", candidate heads": (MANY, RELATION, TAILS),
            ", all tails": (HEADS, RELATION, None),
            ", all heads": (None, RELATION, TAILS),
        }.items()
    },
    "ConcatMLP": Entry(layers.ConcatMLP, concat_mlp, {"dimensions": (7, 5)}, DIMS),
    "LinearSum": Entry(layers.LinearSum, linear_sum, MM, DIMS),
    "LinearSum, normalised": Entry(layers.LinearSum, linear_sum, TANH),
    "LateFusion": Entry(layers.LateFusion, late, dims=DIMS, published=False),
    "TensorFusion": Entry(layers.TensorFusion, tensor_fusion, dims=DIMS),
}
FEATURES = [name for name, entry in TABLE.items() if not entry.indices]
ONE_EACH = list({entry.layer: name for name, entry in reversed(TABLE.items())}.values())


def relative(got, wanted):
    """Return the greatest error, of the greatest value; NaN stays, for a comparison to fail."""
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if b.numel()]
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


def loaded(entry, parameters):
    """Make the layer with these parameters, by whatever names."""
    layer = entry.make(dtype=F64)
    (layer.load_reference_state_dict if entry.published else layer.load_state_dict)(parameters)
    return layer


def parity(entry, masks=None):
    """Errors of the layer, forward and of every gradient, against its formula with the same parameters."""
    inputs, parameters = entry.inputs(), Parameters()
    wanted = entry.formula(parameters, inputs, masks or entry.all_present(), entry.arguments())
    if entry.arguments().get("shared"):
        parameters |= {
            re.sub(r"^(linear|merge_linears?)0", r"\g<1>1", name): value for name, value in parameters.items()
        }
    layer = loaded(entry, parameters)
    got = layer(*inputs) if masks is None else layer(*inputs, present=masks)
    assert got.dtype == F64

    leaves = [x for x in inputs if x is not None and x.is_floating_point()]
    grad = torch.randn_like(wanted)
    theirs = torch.autograd.grad(wanted, [*leaves, *parameters.values()], grad, materialize_grads=True)
    ours = torch.autograd.grad(got, [*leaves, *layer.parameters()], grad)
    # Gradients are reordered as parameters are: what a layer would be with them for parameters.
    expected = loaded(entry, dict(zip(parameters, theirs[len(leaves) :], strict=True))).parameters()
    with torch.no_grad():
        return relative([got], [wanted]), relative(ours, [*theirs[: len(leaves)], *expected])


def moved(entry):
    """Names of all parameters, and of those that one training step moved."""
    layer = entry.make()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    (layer(*entry.inputs(torch.float32)) - 1).square().sum().backward()
    optimizer.step()
    return list(before), [name for name, p in layer.named_parameters() if (p != before[name]).any()]


if __name__ == "__main__":
    print("| layer | formula | error, forward | gradient | parameters moved |\n|---|---|---|---|---|")
    for title, row in TABLE.items():
        torch.manual_seed(0)
        equation = " ".join(re.search(r"``(.+?)``", row.layer.__doc__, re.DOTALL)[1].split())
        registered, those = moved(row)
        counts = f"{len(those)} of {len(registered)}"
        print(f"| {title} | `{equation}` | {' | '.join(f'{error:.1e}' for error in parity(row))} | {counts} |")
