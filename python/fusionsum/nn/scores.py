"""Scores of embedded things: users and items, heads, relations and tails.

What lives elsewhere: what all layers share (``layer.py``), layers that take features (the other files).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..api import fusion_sum
from ..autograd.registration import layered
from .checks import as_activation, as_size
from .layer import ReferenceState, activated, is_plain


def aligned(**indices: Tensor) -> list[Tensor]:
    """Give index tensors one number of dims, by dims of 1 at the end: (B,) and (B, K) become (B, 1) and (B, K).

    Indices of no dims, as `torch.nn.Embedding` takes them, stay as they are where all are such.

    Raises
    ------
    TypeError
        If one is not a tensor of integers.
    """
    for name, index in indices.items():
        if (
            not isinstance(index, Tensor)
            or index.is_floating_point()
            or index.is_complex()
            or index.dtype == torch.bool
        ):
            got = getattr(index, "dtype", type(index).__name__)
            raise TypeError(f"{name}: expected a tensor of integers, got {got}")
    ndim = max(index.ndim for index in indices.values())
    return [
        index if index.ndim == ndim else index.reshape(*index.shape, *(1,) * (ndim - index.ndim))
        for index in indices.values()
    ]


def table(embedding: nn.Module) -> Tensor:
    """Return all embeddings: the weight, unless a call of the module may do more than read it."""
    if is_plain(embedding, nn.Embedding) and embedding.max_norm is None:
        return embedding.weight
    return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))


def complex_product(a: Tensor, b: Tensor, conjugate: bool) -> Tensor:
    """Multiply complex numbers, real parts in the first half of the last axis, by others or by their conjugates.

    By torch's own operations: as fusion sums over two terms it took 2 to 6 times as long (4,096 rows of 50 to 512).
    Computed in float32 or better and rounded once.
    """
    dtype = a.dtype
    if dtype.itemsize < 4:
        a, b = a.float(), b.float()
    (a_re, a_im), (b_re, b_im) = a.chunk(2, -1), b.chunk(2, -1)
    add, subtract = (torch.sub, torch.add) if conjugate else (torch.add, torch.sub)
    if torch.is_grad_enabled() or is_compiling() or layered():
        z = torch.cat([subtract(a_re * b_re, a_im * b_im), add(a_im * b_re, a_re * b_im)], dim=-1)
    else:  # nothing watches: one tensor in the place of seven, 1.1 to 2 times as fast
        z = a * b
        real, imaginary = z.chunk(2, -1)
        subtract(real, imaginary, out=real)
        torch.mul(a_im, b_re, out=imaginary).addcmul_(a_re, b_im, value=-1 if conjugate else 1)
    return z.to(dtype)


class GMF(ReferenceState):
    """Generalised matrix factorisation: the score of a user for an item.

    ``score(u, i) = activ_output(sum_k fusion_weights[k] * p_u[k] * q_i[k] + fusion_bias)``.

    Parameters
    ----------
    num_users, num_items : int
        How many there are.
    latent_dim : int, optional
        The number of terms.
    activ_output : str or None, optional
        The activation of the score; None leaves the logit.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    users, items : torch.nn.Embedding
        ``(num_users, latent_dim)`` and ``(num_items, latent_dim)``.
    fusion_weights : torch.nn.Parameter
        ``(latent_dim,)``.
    fusion_bias : torch.nn.Parameter
        ``(1,)``.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer, or less than 1, or the activation is unknown.

    References
    ----------
    X. He et al., "Neural Collaborative Filtering", WWW 2017, eq. 8 and 9. The initialisation, the bias and the names
    ``user_embedding_W``, ... are those of the authors' code, github.com/hexiangnan/neural_collaborative_filtering.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import GMF
    >>> model = GMF(num_users=100, num_items=1000, latent_dim=16)
    >>> users = torch.tensor([3, 14])
    >>> model(users, torch.tensor([15, 92])).shape
    torch.Size([2])
    >>> model(users, torch.randint(1000, (2, 5))).shape  # five candidates each
    torch.Size([2, 5])
    >>> model(users).shape  # all items
    torch.Size([2, 1000])
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        latent_dim: int = 8,
        activ_output: str | None = "sigmoid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_users, self.num_items = as_size("num_users", num_users), as_size("num_items", num_items)
        self.latent_dim = as_size("latent_dim", latent_dim)
        self.activ_output = as_activation("activ_output", activ_output)
        self.users = nn.Embedding(self.num_users, self.latent_dim, device=device, dtype=dtype)
        self.items = nn.Embedding(self.num_items, self.latent_dim, device=device, dtype=dtype)
        self.fusion_weights = nn.Parameter(torch.empty(self.latent_dim, device=device, dtype=dtype))
        self.fusion_bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for embedding in (self.users, self.items):
            nn.init.normal_(embedding.weight, std=0.01)
        bound = math.sqrt(3 / self.latent_dim)  # LeCun's
        nn.init.uniform_(self.fusion_weights, -bound, bound)
        nn.init.zeros_(self.fusion_bias)

    def forward(self, users: Tensor, items: Tensor | None = None) -> Tensor:
        """Score users for items.

        Parameters
        ----------
        users, items : torch.Tensor
            Indices; they broadcast, and one of fewer dims gets dims of 1 at its end: ``(B,)`` users and ``(B, K)`` items
            are K candidates each. Without `items`, all items.

        Returns
        -------
        torch.Tensor
            One score for each pair: of the broadcast shape, or ``(*users.shape, num_items)``.

        Raises
        ------
        TypeError
            If indices are not integers.
        """
        if items is None:
            users, candidates = aligned(users=users)[0].unsqueeze(-1), table(self.items)
        else:
            users, items = aligned(users=users, items=items)
            candidates = self.items(items)
        scores = fusion_sum(self.fusion_weights, self.users(users), candidates) + self.fusion_bias.squeeze(0)
        return activated(self.activ_output, scores)

    def _reference_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "user_embedding_W": (self.num_users, self.latent_dim),
            "item_embedding_W": (self.num_items, self.latent_dim),
            "prediction_W": (self.latent_dim, 1),
            "prediction_b": (1,),
        }

    def _from_reference(self, name: str, value: Tensor) -> dict[str, Tensor]:
        own = {
            "user_embedding_W": "users.weight",
            "item_embedding_W": "items.weight",
            "prediction_W": "fusion_weights",
            "prediction_b": "fusion_bias",
        }
        return {own[name]: value.flatten() if name == "prediction_W" else value}


class Triples(ReferenceState):
    """Embeddings of entities and relations, and the lookups for a score; a subclass is its `_query`."""

    numbers = 1  # that one dim of an embedding has: 2 where it is complex

    def __init__(
        self,
        nentity: int,
        nrelation: int,
        hidden_dim: int,
        gamma: float = 12.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.nentity, self.nrelation = as_size("nentity", nentity), as_size("nrelation", nrelation)
        self.hidden_dim, self.gamma = as_size("hidden_dim", hidden_dim), gamma
        self.entities = nn.Embedding(self.nentity, self.numbers * self.hidden_dim, device=device, dtype=dtype)
        self.relations = nn.Embedding(self.nrelation, self.numbers * self.hidden_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        bound = (self.gamma + 2) / self.hidden_dim
        for embedding in (self.entities, self.relations):
            nn.init.uniform_(embedding.weight, -bound, bound)

    def forward(self, heads: Tensor | None, relations: Tensor, tails: Tensor | None = None) -> Tensor:
        """Score triples.

        Parameters
        ----------
        heads, relations, tails : torch.Tensor
            Indices; they broadcast, and one of fewer dims gets dims of 1 at its end: ``(B,)`` heads and relations and
            ``(B, K)`` tails are K candidates each. None, for heads or tails, means all entities.

        Returns
        -------
        torch.Tensor
            One score for each triple: of the broadcast shape, or with a last dim of `nentity` more.

        Raises
        ------
        TypeError
            If indices are not integers.
        ValueError
            If both heads and tails are None.
        """
        if heads is None and tails is None:
            raise ValueError("heads, tails: expected at most one to be None, which means all entities")
        if heads is None or tails is None:
            side, known = ("tails", heads) if tails is None else ("heads", tails)
            known, relations = aligned(**{"heads" if tails is None else "tails": known, "relations": relations})
            known, relations, candidates = known.unsqueeze(-1), relations.unsqueeze(-1), table(self.entities)
        else:
            heads, relations, tails = aligned(heads=heads, relations=relations, tails=tails)
            side, known, other = ("heads", tails, heads) if heads.numel() > tails.numel() else ("tails", heads, tails)
            candidates = self.entities(other)
        return fusion_sum(None, *self._query(self.entities(known), self.relations(relations), side), candidates)

    def sides(
        self, heads: Tensor | None, relations: Tensor, tails: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return queries and keys whose scores are those for all entities, for what does not store scores.

        `fusionsum.contrastive_loss` of them, with the entities looked for as `labels`, is the cross entropy over all
        entities (training "1 versus all"); `fusionsum.ranks` and `fusionsum.top_k` evaluate and search.

        Parameters
        ----------
        heads, relations, tails : torch.Tensor
            Indices, ``(B,)``. One of heads and tails is None: the side that all entities are candidates for.

        Returns
        -------
        queries, keys : tuple of torch.Tensor
            Factors ``(B, n)`` and ``(nentity, n)``.

        Raises
        ------
        TypeError
            If indices are not integers.
        ValueError
            If not exactly one of heads and tails is None, or indices are not of one shape ``(B,)``.
        """
        if (heads is None) == (tails is None):
            raise ValueError("heads, tails: expected one to be None, which means all entities")
        name, known = ("tails", tails) if heads is None else ("heads", heads)
        assert known is not None
        aligned(**{name: known, "relations": relations})
        if known.ndim != 1 or relations.shape != known.shape:
            got = f"{tuple(known.shape)} and {tuple(relations.shape)}"
            raise ValueError(f"{name}, relations: expected one shape (B,), got {got}")
        side = "heads" if heads is None else "tails"
        return self._query(self.entities(known), self.relations(relations), side), (table(self.entities),)

    def _query(self, known: Tensor, relations: Tensor, side: str) -> tuple[Tensor, ...]:
        """Return factors whose sum with the embeddings of candidates, which are entities of `side`, are their scores."""
        raise NotImplementedError

    def _reference_shapes(self) -> dict[str, tuple[int, ...]]:
        entities, relations = tuple(self.entities.weight.shape), tuple(self.relations.weight.shape)
        scalars = {"gamma": (1,), "embedding_range": (1,)}  # the original saves its settings as parameters
        return {"entity_embedding": entities, "relation_embedding": relations} | scalars

    def _from_reference(self, name: str, value: Tensor) -> dict[str, Tensor]:
        own = {"entity_embedding": "entities.weight", "relation_embedding": "relations.weight"}
        return {own[name]: value} if name in own else {}


class DistMult(Triples):
    """Scores of triples by a diagonal bilinear form.

    ``score(h, r, t) = sum_k e_h[k] * w_r[k] * e_t[k]``.

    Parameters
    ----------
    nentity, nrelation : int
        How many there are.
    hidden_dim : int
        The number of terms.
    gamma : float, optional
        Embeddings are drawn from the uniform distribution within ``(gamma + 2) / hidden_dim`` of 0.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    entities, relations : torch.nn.Embedding
        ``(nentity, hidden_dim)`` and ``(nrelation, hidden_dim)``.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer, or less than 1.

    References
    ----------
    B. Yang et al., "Embedding Entities and Relations for Learning and Inference in Knowledge Bases", ICLR 2015, eq. 2.
    The initialisation and the names of parameters are those of github.com/DeepGraphLearning/KnowledgeGraphEmbedding.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import DistMult
    >>> model = DistMult(nentity=1000, nrelation=20, hidden_dim=16)
    >>> heads, relations = torch.tensor([3, 14]), torch.tensor([1, 5])
    >>> model(heads, relations, torch.tensor([92, 65])).shape
    torch.Size([2])
    >>> model(heads, relations, torch.randint(1000, (2, 64))).shape  # 64 candidates each
    torch.Size([2, 64])
    >>> model(None, relations, torch.tensor([92, 65])).shape  # all entities as heads
    torch.Size([2, 1000])

    Train against all entities as tails, without their scores in memory:

    >>> from fusionsum import contrastive_loss
    >>> queries, keys = model.sides(heads, relations)
    >>> tails, entities = torch.tensor([92, 65]), torch.arange(1000)
    >>> loss = contrastive_loss(queries, keys, labels=tails, key_labels=entities, symmetric=False)
    >>> loss.backward()
    """

    def _query(self, known: Tensor, relations: Tensor, side: str) -> tuple[Tensor, ...]:
        return known, relations


class ComplEx(Triples):
    """Scores of triples by complex embeddings, which tell a relation from its inverse.

    ``score(h, r, t) = Re(sum_k e_h[k] * w_r[k] * conj(e_t[k]))``.

    Parameters
    ----------
    nentity, nrelation, hidden_dim, gamma, device, dtype
        As for `DistMult`.

    Attributes
    ----------
    entities, relations : torch.nn.Embedding
        ``(nentity, 2 * hidden_dim)`` and ``(nrelation, 2 * hidden_dim)``: real parts, then imaginary.

    Raises
    ------
    TypeError, ValueError
        As for `DistMult`.

    References
    ----------
    T. Trouillon et al., "Complex Embeddings for Simple Link Prediction", ICML 2016, eq. 9 to 11. The initialisation, the
    order and the names of parameters are those of github.com/DeepGraphLearning/KnowledgeGraphEmbedding.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import ComplEx
    >>> model = ComplEx(nentity=1000, nrelation=20, hidden_dim=16)
    >>> heads, relations = torch.tensor([3, 14]), torch.tensor([1, 5])
    >>> model(heads, relations, torch.randint(1000, (2, 64))).shape  # 64 candidates each
    torch.Size([2, 64])
    >>> model(heads, relations).shape  # all entities as tails
    torch.Size([2, 1000])
    """

    numbers = 2

    def _query(self, known: Tensor, relations: Tensor, side: str) -> tuple[Tensor, ...]:
        # Re(h r conj(t)) is the real dot product of h r with t, and of t conj(r) with h.
        return (complex_product(known, relations, conjugate=side == "heads"),)
