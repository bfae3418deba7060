"""Contrastive losses with a learned scale: of two sides (softmax or sigmoid), and of three or more modalities.

What lives here: the parameters `logit_scale` and `logit_bias`, and Symile's negatives. What lives elsewhere: the losses
(``fusionsum.losses``), which never store the scores; layers that make embeddings (the other files).
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..api import fusion_sum
from ..combination import REDUCTIONS
from ..losses import contrastive_loss, sigmoid_loss
from ..reference import MAX_FACTORS
from ..scores import check_flag, check_smoothing
from .checks import as_choice, as_number

Side: TypeAlias = Tensor | tuple[Tensor, ...]


class ScaledLoss(nn.Module):
    """A loss of scores times ``logit_scale.exp()``; a subclass is its constructor and `forward`."""

    settings: tuple[str, ...] = ()  # arguments that a subclass adds

    def __init__(
        self, logit_scale: float, max_logit_scale: float | None, device: Any, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.initial_logit_scale = as_number("logit_scale", logit_scale, positive=True)
        self.max_logit_scale = max_logit_scale
        if max_logit_scale is not None:
            self.max_logit_scale = as_number("max_logit_scale", max_logit_scale, positive=True)
            if self.max_logit_scale < self.initial_logit_scale:
                raise ValueError(f"logit_scale: expected at most max_logit_scale, {max_logit_scale}, got {logit_scale}")
        self.logit_scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the parameters to their initial values."""
        nn.init.constant_(self.logit_scale, math.log(self.initial_logit_scale))

    def scale(self) -> Tensor:
        """Return the factor of the scores, at most `max_logit_scale`.

        The parameter itself is set back to the maximum, as open_clip does after a step. Were only its use limited, the
        gradient would be 0 from there on, and the scale would never come down again.
        """
        if self.max_logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(self.max_logit_scale))
        return self.logit_scale.exp()

    def extra_repr(self) -> str:
        """Name the constructor's arguments in `repr`."""
        settings = {name: getattr(self, name) for name in ("max_logit_scale", *self.settings)}
        return ", ".join(
            [f"logit_scale={self.initial_logit_scale:.6g}", *(f"{name}={value!r}" for name, value in settings.items())]
        )


class ContrastiveLoss(ScaledLoss):
    """Softmax contrastive loss of all pairs (InfoNCE, CLIP's) with a learned scale.

    ``contrastive_loss(queries, keys, logit_scale=self.logit_scale.exp(), ...)``: see there.

    Parameters
    ----------
    logit_scale : float, optional
        The initial factor of the scores, more than 0.
    max_logit_scale : float or None, optional
        The most that it becomes, or None. The parameter is set back to it in the next call.
    positives, symmetric, label_smoothing, reduction, optional
        As of `fusionsum.contrastive_loss`.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    logit_scale : torch.nn.Parameter
        ``()``: the factor's logarithm.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type, out of range or unknown.

    References
    ----------
    A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3. The initial
    value, the maximum and the parameter's name are those of github.com/mlfoundations/open_clip.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import ContrastiveLoss
    >>> loss = ContrastiveLoss()
    >>> images, texts = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
    >>> loss(images, texts).shape
    torch.Size([])
    >>> hard = torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
    >>> loss(images, torch.cat([texts, hard])).shape  # eight negatives more for every image
    torch.Size([])
    """

    settings = ("positives", "symmetric", "label_smoothing", "reduction")

    def __init__(
        self,
        logit_scale: float = 1 / 0.07,
        max_logit_scale: float | None = 100.0,
        *,
        positives: str = "mean",
        symmetric: bool = True,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(logit_scale, max_logit_scale, device, dtype)
        self.positives = as_choice("positives", positives, ("mean", "any"))
        self.symmetric = check_flag("symmetric", symmetric)
        self.label_smoothing = check_smoothing(label_smoothing)
        self.reduction = as_choice("reduction", reduction, REDUCTIONS)
        self.reset_parameters()

    def forward(self, queries: Side, keys: Side, **given: Any) -> Any:
        """Return the loss of a batch.

        Parameters
        ----------
        queries, keys : torch.Tensor or tuple of torch.Tensor
            ``(B, n)`` and ``(C, n)``, or tuples of them whose products are the sides.
        **given
            What belongs to the batch, as of `fusionsum.contrastive_loss`: `labels` and `key_labels`, `exclude`, `key_bias`,
            `fusion_weights`, activations and masks, `return_lse`, `group`.

        Returns
        -------
        torch.Tensor or tuple
            As `fusionsum.contrastive_loss` does for the reduction, symmetry and `return_lse`.
        """
        return contrastive_loss(
            queries,
            keys,
            logit_scale=self.scale(),
            positives=self.positives,
            symmetric=self.symmetric,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            **given,
        )


class SigmoidLoss(ScaledLoss):
    """Sigmoid loss of all pairs (SigLIP's) with a learned scale and bias.

    ``sigmoid_loss(queries, keys, logit_scale=self.logit_scale.exp(), logit_bias=self.logit_bias, ...)``: see there.

    Parameters
    ----------
    logit_scale : float, optional
        The initial factor of the scores, more than 0.
    logit_bias : float, optional
        The initial addend of the scores: by default one at which nearly every pair counts as a negative, which most are.
    max_logit_scale : float or None, optional
        The most that the factor becomes, or None. The parameter is set back to it in the next call.
    reduction : optional
        As of `fusionsum.sigmoid_loss`.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    logit_scale : torch.nn.Parameter
        ``()``: the factor's logarithm.
    logit_bias : torch.nn.Parameter
        ``()``.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type, out of range or unknown.

    References
    ----------
    X. Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, algorithm 1. The initial values, the maximum
    and the parameters' names are those of github.com/mlfoundations/open_clip.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import SigmoidLoss
    >>> loss = SigmoidLoss()
    >>> images, texts = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
    >>> loss(images, texts).shape
    torch.Size([])
    """

    settings = ("reduction",)

    def __init__(
        self,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        max_logit_scale: float | None = 100.0,
        *,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(logit_scale, max_logit_scale, device, dtype)
        self.initial_logit_bias = as_number("logit_bias", logit_bias)
        self.reduction = as_choice("reduction", reduction, REDUCTIONS)
        self.logit_bias = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters to their initial values."""
        super().reset_parameters()
        nn.init.constant_(self.logit_bias, self.initial_logit_bias)

    def forward(self, queries: Side, keys: Side, **given: Any) -> Tensor:
        """Return the loss of a batch.

        Parameters
        ----------
        queries, keys : torch.Tensor or tuple of torch.Tensor
            ``(B, n)`` and ``(C, n)``, or tuples of them whose products are the sides.
        **given
            What belongs to the batch, as of `fusionsum.sigmoid_loss`: `labels` and `key_labels`, `exclude`,
            `fusion_weights`, activations and masks, `group`.

        Returns
        -------
        torch.Tensor
            As `fusionsum.sigmoid_loss` does for the reduction.
        """
        return sigmoid_loss(
            queries, keys, logit_scale=self.scale(), logit_bias=self.logit_bias, reduction=self.reduction, **given
        )


class SymileLoss(ScaledLoss):
    """Contrastive loss of three or more modalities by their multilinear inner product, each modality against the others.

    ``score(x, y, z) = sum_i x[i] * y[i] * z[i]``; the loss is the mean over the modalities of a softmax contrastive loss
    with that modality for queries and the products of the others for keys. It finds what only several modalities together
    tell of another, which losses of pairs do not.

    Parameters
    ----------
    logit_scale : float, optional
        The initial factor of the scores, more than 0.
    max_logit_scale : float or None, optional
        The most that it becomes, or None. The parameter is set back to it in the next call.
    shuffle : bool, optional
        Whether each of the others is shuffled for itself where it serves as a negative, as the paper's bound wants it: its
        O(N) negatives. Then a loss draws ``M * (M - 1)`` permutations from torch's generator. Otherwise the negatives are
        the other rows' products, and nothing is drawn.
    device, dtype : optional
        Of the parameters, as for every torch module.

    Attributes
    ----------
    logit_scale : torch.nn.Parameter
        ``()``: the factor's logarithm.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of range.

    References
    ----------
    A. Saporta et al., "Contrasting with Symile: Simple Model-Agnostic Representation Learning for Unlimited Modalities",
    NeurIPS 2024, eq. 5 and section 3.3. The shuffling, in this order, is that of ``Symile(negative_sampling="n")`` of
    github.com/rajesh-lab/symile.

    Examples
    --------
    >>> import torch
    >>> from fusionsum.nn import SymileLoss
    >>> images, sounds, texts = torch.nn.functional.normalize(torch.randn(3, 8, 16), dim=-1)
    >>> SymileLoss()(images, sounds, texts).shape
    torch.Size([])
    """

    settings = ("shuffle",)

    def __init__(
        self,
        logit_scale: float = 1 / 0.07,
        max_logit_scale: float | None = 100.0,
        *,
        shuffle: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(logit_scale, max_logit_scale, device, dtype)
        self.shuffle = check_flag("shuffle", shuffle)
        self.reset_parameters()

    def forward(self, *embeddings: Tensor) -> Tensor:
        """Return the loss of a batch.

        Parameters
        ----------
        *embeddings : torch.Tensor
            ``(B, n)`` for each modality, two or more.

        Returns
        -------
        torch.Tensor
            ``()``.

        Raises
        ------
        TypeError
            If an argument is not a tensor.
        ValueError
            If there are less than two, or their shapes differ.
        """
        if not 2 <= len(embeddings) <= MAX_FACTORS:
            raise ValueError(f"embeddings: expected 2 to {MAX_FACTORS}, one per modality, got {len(embeddings)}")
        for m, x in enumerate(embeddings):
            if not isinstance(x, Tensor):
                raise TypeError(f"embeddings[{m}]: expected a torch.Tensor of shape (B, n), got {type(x).__name__}")
            if x.ndim != 2 or x.shape != embeddings[0].shape:
                shape = "(B, n)" if embeddings[0].ndim != 2 else tuple(embeddings[0].shape)
                raise ValueError(f"embeddings[{m}]: expected shape {shape}, got {tuple(x.shape)}")
        scale = self.scale()
        losses = []
        for m, anchor in enumerate(embeddings):
            others = embeddings[:m] + embeddings[m + 1 :]
            if not self.shuffle:
                losses.append(contrastive_loss(anchor, others, logit_scale=scale, symmetric=False))
                continue
            # Row b's own product takes the place of the b-th of the shuffled ones, which is excluded as the pair of ids
            # (b, b): no label of a query is a key's, so no pair is a positive.
            rows = torch.arange(len(anchor), device=anchor.device)
            shuffled = tuple(x[torch.randperm(len(x)).to(x.device)] for x in others)
            _, lse = contrastive_loss(
                anchor,
                shuffled,
                logit_scale=scale,
                labels=rows,
                key_labels=rows + len(rows),
                exclude=(rows, rows),
                symmetric=False,
                return_lse=True,
            )
            own = scale * fusion_sum(None, *embeddings)
            losses.append(-logsigmoid(own - lse).mean())
        return torch.stack(losses).mean()
