"""sentence-transformers' MultipleNegativesRankingLoss replaced, with hard negatives, plain and cached.

The cached variant (GradCache: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021)
embeds a large batch in mini-batches. What is left to grow with the square of the batch are the scores, which
`contrastive_loss` does not store. The model has random weights: word vectors, their mean, a dense layer.
"""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from torch.nn.functional import normalize

from fusionsum import contrastive_loss

BATCH, MINI_BATCH, SCALE = 512, 64, 20.0  # the scale is theirs by default

torch.manual_seed(0)
words = [f"w{i}" for i in range(500)]
vectors = WordEmbeddings(WhitespaceTokenizer(words), torch.randn(len(words), 64), update_embeddings=True)
model = SentenceTransformer(modules=[vectors, Pooling(64), Dense(64, 64)], device="cpu")
columns = [
    [" ".join(words[i] for i in sentence) for sentence in torch.randint(len(words), (BATCH, 8)).tolist()]
    for _ in ("anchor", "positive", "hard negative")
]


def features(texts):
    """Tokenize texts, as the trainer does."""
    return model.preprocess(texts)


def embed(texts):
    """Return embeddings of unit length, whose scores are cosines."""
    return normalize(model(features(texts))["sentence_embedding"], dim=-1)


def loss_of(anchors, *documents):
    """Return the loss: each anchor against all positives and all hard negatives."""
    return contrastive_loss(anchors, torch.cat(documents), logit_scale=SCALE, symmetric=False)


def plain():
    """Embed, take the loss, go back."""
    loss = loss_of(*map(embed, columns))
    loss.backward()
    return loss


def cached():
    """Embed in mini-batches, take the gradient of the embeddings, embed each again and go back through it."""
    parts = [[texts[i : i + MINI_BATCH] for i in range(0, BATCH, MINI_BATCH)] for texts in columns]
    with torch.no_grad():
        embeddings = [torch.cat([embed(part) for part in of_column]).requires_grad_() for of_column in parts]
    loss = loss_of(*embeddings)
    for of_column, grad in zip(parts, torch.autograd.grad(loss, embeddings), strict=True):
        for part, d in zip(of_column, grad.split(MINI_BATCH), strict=True):
            embed(part).backward(d)
    return loss


def step(loss):
    """Return the value of a loss, and the gradients of the model."""
    model.zero_grad()
    return loss().detach(), [p.grad.clone() for p in model.parameters()]


def theirs(loss):
    """Make a step of one of their losses."""

    def call():
        value = loss([features(texts) for texts in columns], None)
        value.backward()
        return value

    return call


for replaced, ours in (
    (MultipleNegativesRankingLoss(model, scale=SCALE), plain),
    (CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=MINI_BATCH), cached),
):
    wanted, got = step(theirs(replaced)), step(ours)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(got[1], wanted[1], strict=True))
    print(f"{type(replaced).__name__}, {BATCH} anchors, {2 * BATCH} documents")
    print(f"  theirs {wanted[0]:.6f}, ours {got[0]:.6f}; gradients: relative difference at most {difference:.1e}")
