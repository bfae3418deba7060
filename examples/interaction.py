"""When products of modalities pay: a dial from a task that a plain sum solves to one of which it can learn nothing.

Two modalities show a digit each. The label is the first's, or their sum modulo six, and both modalities show which of the
two rules holds. The dial is the share of rows with the sum. `LateFusion` adds a linear map of each modality, `ConcatMLP`
has a hidden layer; `MUTAN` is products alone, `ResidualFusion` a sum and products. Chance is 0.167.
"""

import torch
from torch.nn.functional import cross_entropy

from fusionsum.nn import MUTAN, ConcatMLP, LateFusion, ResidualFusion

DIGITS, DIMS, ROWS, STEPS, BATCH = 6, 16, 4000, 40, 256
DIALS = (0.0, 0.25, 0.5, 0.75, 1.0)
LAYERS = {
    "LateFusion (a sum)": lambda: LateFusion((DIMS, DIMS), DIGITS),
    "ConcatMLP": lambda: ConcatMLP((DIMS, DIMS), DIGITS, (70,)),
    "MUTAN": lambda: MUTAN((DIMS, DIMS), DIGITS, mm_dim=16, rank=4),
    "ResidualFusion": lambda: ResidualFusion((DIMS, DIMS), DIGITS, rank=8),
}

torch.manual_seed(0)
first, second = torch.randint(DIGITS, (2, 2 * ROWS))
drawn = [torch.randn(DIGITS, DIMS - 1)[digits] + 0.3 * torch.randn(2 * ROWS, DIMS - 1) for digits in (first, second)]
place = torch.rand(2 * ROWS)


def task(dial):
    """Return the views and labels; the last number of either view shows which of the two rules holds."""
    both = place < dial
    rule = torch.where(both, 1.0, -1.0)[:, None]
    return [torch.cat([x, rule], dim=1) for x in drawn], torch.where(both, (first + second) % DIGITS, first)


def accuracy(make, views, labels):
    """Train a layer on the first half of the rows; return its accuracy on the other."""
    torch.manual_seed(1)
    layer = make()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.005)
    for _ in range(STEPS):
        rows = torch.randint(ROWS, (BATCH,))
        loss = cross_entropy(layer(*(x[rows] for x in views)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = layer(*(x[ROWS:] for x in views)).argmax(1)
    return (found == labels[ROWS:]).double().mean().item()


print(f"{'share of rows that need both':32}", *(f"{dial:6.2f}" for dial in DIALS), "  parameters")
for name, make in LAYERS.items():
    row = [accuracy(make, *task(dial)) for dial in DIALS]
    print(f"{name:32}", *(f"{a:6.3f}" for a in row), f"{sum(p.numel() for p in make().parameters()):12,}")
print(f"{'those at chance, the rest right':32}", *(f"{1 - dial * (1 - 1 / DIGITS):6.3f}" for dial in DIALS))
