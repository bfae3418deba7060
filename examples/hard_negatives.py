"""Hard negatives mined by exact search: what they add to a contrastive loss, at equal numbers of steps and of keys.

Two made-up views of 6,000 items that come in families of four, whose members differ little: most negatives that a batch
holds by chance are of other families, and teach nothing about the own one. After the first epoch `top_k` finds, for each
item, the texts that score best and are another's; a batch takes them as further keys, where the control takes as many at
random.
`ranks` measures recall among all 6,000 texts.

Mining is no gain for nothing. With families of ten, 200 queries a step (whose keys hold members of the family by chance)
and mining from the first epoch on, R@1 ended at 0.71 with it and at 0.82 without.
"""

import torch
from torch import nn
from torch.nn.functional import normalize

import fusionsum as fs

ITEMS, FAMILY, DIMS, WIDTH, BATCH, EPOCHS, HARD, SCALE = 6000, 4, 64, 32, 100, 6, 2, 20.0

torch.manual_seed(0)
families = torch.randn(ITEMS // FAMILY, DIMS).repeat_interleave(FAMILY, dim=0)
items = families + 0.25 * torch.randn(ITEMS, DIMS)
images, texts = (torch.tanh(items @ torch.randn(DIMS, DIMS) / 8) + 0.05 * torch.randn(ITEMS, DIMS) for _ in range(2))
numbers = torch.arange(ITEMS)


def recalls(of_images, of_texts):
    """Return recall at 1 and at 10 of each image's own text."""
    place = fs.ranks(of_images, of_texts, numbers)
    return [(place <= k).double().mean().item() for k in (1, 10)]


def trained(mined):
    """Train two towers; return the recalls after each epoch."""
    torch.manual_seed(1)
    towers = [nn.Sequential(nn.Linear(DIMS, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(2)]
    optimizer = torch.optim.Adam([p for tower in towers for p in tower.parameters()], lr=0.002)
    found = []
    for epoch in range(EPOCHS):
        with torch.no_grad():
            of_images, of_texts = (
                normalize(tower(x), dim=-1) for tower, x in zip(towers, (images, texts), strict=True)
            )
        negatives = torch.randint(ITEMS, (ITEMS, HARD))
        if mined and epoch > 0:
            _, negatives = fs.top_k(of_images, of_texts, HARD, exclude=numbers[:, None].tolist())
        for batch in torch.randperm(ITEMS).split(BATCH):
            ids = torch.cat([batch, negatives[batch].flatten()])  # of the keys; a query's own text is no negative of it
            queries, keys = normalize(towers[0](images[batch]), dim=-1), normalize(towers[1](texts[ids]), dim=-1)
            loss = fs.contrastive_loss(queries, keys, logit_scale=SCALE, exclude=(batch, ids), symmetric=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found.append(recalls(*(normalize(t(x), dim=-1) for t, x in zip(towers, (images, texts), strict=True))))
    return found


print(f"{ITEMS} items in families of {FAMILY}; {BATCH} queries a step, {BATCH * (1 + HARD)} keys")
print("epoch   random negatives: R@1, R@10   mined negatives: R@1, R@10")
for epoch, (chance, mined) in enumerate(zip(trained(False), trained(True), strict=True), 1):
    print(f"{epoch:5}   {chance[0]:17.3f}, {chance[1]:.3f}   {mined[0]:20.3f}, {mined[1]:.3f}")
