"""What telling a layer of a missing modality is worth: against zeros in its place, with and without practice in training.

Three made-up modalities are noisy views of one of twelve classes. `MLB`, a layer of products alone, is trained in four ways
and tested with modalities withheld; the table has the accuracy, the mean over which modality it is. Chance is 0.083.
"""

import torch
from torch.nn.functional import cross_entropy

from fusionsum.nn import MLB

CLASSES, DIMS, ROWS, STEPS, BATCH, RATE = 12, (24, 16, 8), 4000, 300, 256, 0.3

torch.manual_seed(0)
labels = torch.randint(CLASSES, (2 * ROWS,))
views = [torch.randn(CLASSES, d)[labels] + 1.6 * torch.randn(2 * ROWS, d) for d in DIMS]
training, testing = slice(ROWS), slice(ROWS, None)


def called(layer, inputs, masks, told):
    """Call a layer: with masks, or with zeros where they are False."""
    if told:
        return layer(*inputs, present=masks)
    return layer(*(x * mask[:, None] for x, mask in zip(inputs, masks, strict=True)))


def trained(rate, told):
    """Train a layer from whose rows modalities are withheld at a rate."""
    torch.manual_seed(1)
    layer = MLB(DIMS, CLASSES, mm_dim=48)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.005)
    for _ in range(STEPS):
        rows = torch.randint(ROWS, (BATCH,))
        masks = [torch.rand(BATCH) >= rate for _ in DIMS]
        loss = cross_entropy(called(layer, [x[rows] for x in views], masks, told), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer


@torch.no_grad()
def accuracy(layer, withheld, told):
    """Return the share of right answers without some of the modalities."""
    masks = [torch.full((ROWS,), m not in withheld) for m in range(len(DIMS))]
    found = called(layer, [x[testing] for x in views], masks, told).argmax(1)
    return (found == labels[testing]).double().mean().item()


MODALITIES = range(len(DIMS))
WITHHELD = {
    "all": [()],
    "one less": [(m,) for m in MODALITIES],
    "only one": [tuple({*MODALITIES} - {m}) for m in MODALITIES],
}
print(f"{'in training, in the test':42}", *(f"{name:>9}" for name in WITHHELD))
for practice, rate in (("all there", 0.0), (f"{RATE:.0%} withheld", RATE)):
    for means, told in (("zeros", False), ("present=", True)):
        layer = trained(rate, told)
        means_of = [sum(accuracy(layer, w, told) for w in sets) / len(sets) for sets in WITHHELD.values()]
        print(f"{f'{practice}, {means}':42}", *(f"{mean:9.3f}" for mean in means_of))
