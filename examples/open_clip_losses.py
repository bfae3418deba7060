"""open_clip's ClipLoss and SigLipLoss replaced in a training step: the same values, the same gradients, no B x B scores.

open_clip_torch needs torchvision, whose wheels do not load beside torch's CPU build; its ``loss.py`` needs only torch, and
is imported by itself: theirs is their published code, on two towers with random weights.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize

from fusionsum.nn import ContrastiveLoss, SigmoidLoss

STEPS, BATCH = 5, 256

package = importlib.util.find_spec("open_clip")
if package is None:
    raise ModuleNotFoundError("open_clip: pip install --no-deps open_clip_torch", name="open_clip")
spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
open_clip_loss = importlib.util.module_from_spec(spec)
spec.loader.exec_module(open_clip_loss)


def towers():
    """Make an image tower and a text tower; draw the batches that they are trained on."""
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nn.GELU(), nn.Flatten(), nn.Linear(32 * 16, 128))
    text = nn.Sequential(nn.Embedding(1000, 64), nn.Flatten(), nn.Linear(64 * 16, 128))
    batches = [(torch.randn(BATCH, 3, 32, 32), torch.randint(1000, (BATCH, 16))) for _ in range(STEPS)]
    return nn.ModuleDict({"image": image, "text": text}), batches


def train(loss, scales):
    """Take some steps; return the losses, and the gradients and parameters after the last."""
    model, batches = towers()
    parameters = [*model.parameters(), *scales]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for images, texts in batches:
        value = loss(normalize(model["image"](images), dim=-1), normalize(model["text"](texts), dim=-1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses), [p.grad for p in parameters], [p.detach() for p in parameters]


for ours, theirs in ((ContrastiveLoss(), open_clip_loss.ClipLoss()), (SigmoidLoss(), open_clip_loss.SigLipLoss())):
    scales = [p.detach().clone().requires_grad_() for p in ours.parameters()]  # logit_scale and, maybe, logit_bias

    def replaced(images, texts, loss=theirs, scales=scales):
        """Call open_clip's loss as its training loop does."""
        return loss(images, texts, scales[0].exp(), *scales[1:])

    wanted = train(replaced, scales)
    got = train(ours, list(ours.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(got[1], wanted[1], strict=True))
    print(f"{type(theirs).__name__} -> {type(ours).__name__}, {STEPS} steps of {BATCH} pairs")
    print("  theirs", *(f"{x:.6f}" for x in wanted[0].tolist()))
    print("  ours  ", *(f"{x:.6f}" for x in got[0].tolist()))
    print(f"  gradients after the last step: relative difference at most {difference:.1e}")
