"""A knowledge graph trained and evaluated without ever storing scores: filtered metrics equal PyKEEN's.

ComplEx is trained on the graph UMLS, which comes with PyKEEN, by the cross entropy over all entities ("1 versus all"),
and evaluated by filtered ranks; then PyKEEN's ComplEx gets the same embeddings, and its evaluator measures it.
"""

import logging

import torch
from pykeen.datasets import UMLS
from pykeen.evaluation import RankBasedEvaluator
from pykeen.models import ComplEx as TheirComplEx

from fusionsum import contrastive_loss, ranks
from fusionsum.nn import ComplEx

EPOCHS, BATCH, WIDTH = 10, 512, 32

logging.disable(logging.WARNING)  # PyKEEN's advice
torch.manual_seed(0)
graph = UMLS()
training, testing = graph.training.mapped_triples, graph.testing.mapped_triples
known = torch.cat([training, graph.validation.mapped_triples, testing])
entities = torch.arange(graph.num_entities)
model = ComplEx(graph.num_entities, graph.num_relations, WIDTH, dtype=torch.float64)  # so that rounding makes no tie


def both_sides(triples):
    """Return what is asked of triples, queries, keys and answers: of a head and relation the tail, and backwards."""
    heads, relations, tails = triples.T
    return [(*model.sides(heads, relations), tails), (*model.sides(None, relations, tails), heads)]


optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(EPOCHS):
    for batch in training[torch.randperm(len(training))].split(BATCH):
        loss = sum(
            contrastive_loss(queries, keys, labels=answers, key_labels=entities, symmetric=False)
            for queries, keys, answers in both_sides(batch)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

places = []
with torch.no_grad():
    for (queries, keys, answers), (asked, answer) in zip(both_sides(testing), (((0, 1), 2), ((1, 2), 0)), strict=True):
        alike = (testing[:, None, asked] == known[:, asked]).all(dim=2)
        true = [known[of_triple, answer].unique().tolist() for of_triple in alike]  # `ranks` keeps the answer itself
        places.append(ranks(queries, keys, answers, exclude=true))
place = torch.cat(places)
got = {"MRR": (1 / place).mean().item()} | {f"hits@{k}": (place <= k).double().mean().item() for k in (1, 3, 10)}

their_model = TheirComplEx(triples_factory=graph.training, embedding_dim=WIDTH, random_seed=0).double()
pairs = zip((*their_model.entity_representations, *their_model.relation_representations), model.children(), strict=True)
with torch.no_grad():
    for theirs, ours in pairs:  # theirs has each number's real and imaginary part side by side
        (weight,) = theirs.parameters()
        weight.copy_(torch.stack(ours.weight.chunk(2, dim=1), dim=-1).reshape(weight.shape))
        theirs.eval()
found = RankBasedEvaluator().evaluate(
    their_model,
    testing,
    batch_size=64,
    use_tqdm=False,
    additional_filter_triples=[training, graph.validation.mapped_triples],
)
names = {"MRR": "inverse_harmonic_mean_rank", "hits@1": "hits_at_1", "hits@3": "hits_at_3", "hits@10": "hits_at_10"}
wanted = {name: found.get_metric(f"both.realistic.{theirs}") for name, theirs in names.items()}

print(f"UMLS, {len(testing)} test triples asked both ways among {len(entities)} entities, filtered")
for name, value in wanted.items():
    print(f"  {name:8} PyKEEN {value:.6f}   fusionsum {got[name]:.6f}")
    assert abs(value - got[name]) <= 1e-6, name  # PyKEEN takes means in float32
