"""Step 3: a model is an encoder per modality and a head that fuses their features, any layer of `fusionsum.nn`.

What lives here: the look-up and check of layers and encoders, the names and the making of the fused model and of the
baselines that it is compared with. What lives elsewhere: the fusion layers (``fusionsum.nn``), the encoders
(``features.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as fusion_layers
from .config import Config
from .errors import ConfigError, unknown
from .features import encoder_class, find, make
from .kinds import Modality, Vector
from .pretrained import EXTRACTORS

Inputs = Mapping[str, tuple[Tensor, Tensor]]  # by modality: items (B, ...), and whether they are there (B,) bool
FUSED = "fused"
SUM = "concat-linear"
ALONE = " alone"
LOGIT_SCALE = 14.3  # 1 / 0.07, where CLIP starts


def layers() -> dict[str, type[nn.Module]]:
    """Return by name the layers of `fusionsum.nn` that map any modalities to any number of outputs."""
    return {
        name: layer
        for name, layer in vars(fusion_layers).items()
        if inspect.isclass(layer)
        and issubclass(layer, nn.Module)
        and {"input_dims", "output_dim"} <= inspect.signature(layer).parameters.keys()
    }


def layer(name: str, input_dims: Sequence[int], output_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """Make a fusion layer of a configuration's name and options.

    Raises
    ------
    ValueError
        If the name or an option is unknown (the nearest is suggested), or an option is missing or wrong.

    Examples
    --------
    >>> layer("LowRankFusion", [32, 16], 10, {"rank": 4}).rank
    4
    """
    known = layers()
    if name not in known:
        raise ValueError(f"fusion.layer: {unknown('layer', name, known)}")
    parameters = inspect.signature(known[name]).parameters
    settable = [p for p in parameters if p not in ("input_dims", "output_dim", "device", "dtype")]
    for option in options:
        if option not in settable:
            raise ValueError(f"fusion: {unknown(f'option of {name}', option, settable)}")
    missing = [p for p in settable if parameters[p].default is inspect.Parameter.empty and p not in options]
    if missing:
        raise ValueError(f"fusion: {name} needs {', '.join(missing)}")
    try:
        return known[name](input_dims=input_dims, output_dim=output_dim, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"fusion: {name}: {error}") from error


def checked(config: Config) -> dict[str, Modality]:
    """Return each modality as its encoder gets it, `Vector` behind a frozen encoder; import encoders of one's own.

    Raises
    ------
    ConfigError
        If an encoder, the layer or one of its options is unknown or wrong.
    """
    found: dict[str, Modality] = {}
    for name, modality in config.modalities.items():
        frozen = EXTRACTORS[modality.kind]
        try:
            if modality.encoder in frozen:
                found[name] = Vector(features=modality.features)
            else:
                find(modality.encoder, config.data.code)
                encoder_class(modality.kind, modality.encoder, tuple(frozen))
                found[name] = modality
        except ValueError as error:
            raise ConfigError(f"modalities.{name}: {error}") from None
    inputs = input_modalities(config)
    if len(inputs) > 1:
        try:
            with torch.device("meta"):  # where initialising a layer draws no random numbers
                layer(config.fusion.layer, [2] * len(inputs), 2, config.fusion.options)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return found


def parameter_count(module: nn.Module) -> int:
    """Count the trainable numbers of a module."""
    return sum(p.numel() for p in module.parameters())


class FusionModel(nn.Module):
    """Encode each modality, then fuse the features in `head`. Inputs of other modalities than the encoders' are ignored.

    If `head` takes ``present``, it gets the masks of missing modalities; otherwise their features are set to 0.
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.head = head
        self.takes_present = "present" in inspect.signature(head.forward).parameters

    def encode(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """Return each modality's features (B, features) and whether it is there (B,)."""
        pairs = [inputs[name] for name in self.encoders]
        features = [encoder(items) for encoder, (items, _) in zip(self.encoders.values(), pairs, strict=True)]
        return features, [present for _, present in pairs]

    def fuse(self, features: Sequence[Tensor], masks: Sequence[Tensor], zero_fill: bool = False) -> Tensor:
        """Return (B, output_dim); with `zero_fill` missing features are 0 even if the head takes ``present``."""
        if not torch.compiler.is_exporting() and all(bool(mask.all()) for mask in masks):
            return self.head(*features)
        if self.takes_present and not zero_fill:
            return self.head(*features, present=masks)
        return self.head(*(x * mask[:, None] for x, mask in zip(features, masks, strict=True)))

    def forward(self, inputs: Inputs) -> Tensor:
        """Return (B, output_dim)."""
        return self.fuse(*self.encode(inputs))


class TwoTowers(nn.Module):
    """Retrieval: a query and a target of unit length, scored in all pairs by ``sum_i fusion_weights[i] * q_i * t_i``.

    `several`: whether all targets of a query's label are right, or its own only.
    """

    def __init__(self, query: FusionModel, target: FusionModel, dim: int, several: bool = False) -> None:
        super().__init__()
        self.query = query
        self.target = target
        self.several = several
        self.fusion_weights = nn.Parameter(torch.full((dim,), LOGIT_SCALE))

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the queries (B, dim) and the targets (B, dim)."""
        query, target = self.query(inputs), self.target(inputs)
        return nn.functional.normalize(query, dim=-1), nn.functional.normalize(target, dim=-1)


def input_modalities(config: Config) -> list[str]:
    """Return the modalities that the model fuses: all but retrieval's target."""
    return [name for name in config.modalities if name not in config.task.target]


def sides(config: Config) -> tuple[str, str]:
    """Return the names of retrieval's query and target in metrics: their modalities, joined by ``+``."""
    return "+".join(input_modalities(config)), "+".join(config.task.target)


def trained_models(config: Config) -> list[str]:
    """Return the names of the models that are trained: the fused model, then the baselines.

    With one input modality every baseline would be the fused model again, a linear map of that modality's features: only
    the fused model is trained.
    """
    inputs = input_modalities(config)
    if len(inputs) == 1:
        return [FUSED]
    alone = [f"{name}{ALONE}" for name in inputs] if "alone" in config.baselines else []
    wanted = {*config.baselines, *([SUM] if may_be_sum(config) else [])}
    return [FUSED, *alone, *(name for name in (SUM, "mlp") if name in wanted)]


def may_be_sum(config: Config) -> bool:
    """Tell whether the fused model becomes the sum of linear maps where products do not help (`without_products`).

    That takes validation rows, which a training with patience has, and a layer that is a sum and products.
    """
    chosen = layers().get(config.fusion.layer)
    products = chosen is not None and issubclass(chosen, fusion_layers.ResidualFusion)
    return products and config.train.patience > 0 and len(input_modalities(config)) > 1


def without_products(fused: Mapping[str, Tensor], summed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of the fused model with which it is the sum `summed`: its maps, and fusion weights of 0."""
    found = {
        name: torch.zeros_like(value) if name.endswith("head.fusion_weights") else value
        for name, value in fused.items()
    }
    return found | dict(summed)


def combined_models(config: Config) -> list[str]:
    """Return the names of the models that combine the unimodal models' outputs, without any training of their own."""
    names = ("late-product", "score-sum") if config.task.kind == "classification" else ("score-sum",)
    return [name for name in names if name in config.baselines] if len(input_modalities(config)) > 1 else []


def build(
    config: Config,
    name: str,
    modalities: Mapping[str, Modality],
    fitted: Mapping[str, dict[str, Any]],
    output_dim: int,
) -> nn.Module:
    """Make one of the `trained_models`, freshly initialised.

    Parameters
    ----------
    config : Config
    name : str
    modalities, fitted : mapping
        By name, each modality as its encoder gets it (`Vector` behind a frozen encoder), and `preprocess.fit`'s statistics.
    output_dim : int
        Of the head: classes, 1, or the dimensions of the retrieval space.

    Returns
    -------
    FusionModel or TwoTowers
    """

    def encoder(modality: str) -> nn.Module:
        return make(modalities[modality], fitted[modality])

    def model(inputs: Sequence[str], head: str) -> FusionModel:
        encoders = {modality: encoder(modality) for modality in inputs}
        return FusionModel(encoders, _head(config, head, [modalities[m].features for m in inputs], output_dim))

    inputs, head = input_modalities(config), name
    if name.endswith(ALONE):
        inputs, head = [name.removesuffix(ALONE)], FUSED
    fused = model(inputs, head)
    if config.task.kind != "retrieval":
        return fused
    target = model(list(config.task.target), SUM if name == SUM else FUSED)
    return TwoTowers(fused, target, output_dim, config.task.positives == "label")


def _head(config: Config, name: str, input_dims: Sequence[int], output_dim: int) -> nn.Module:
    if len(input_dims) == 1:
        return nn.Linear(input_dims[0], output_dim)
    if name == SUM:
        # A linear map of the concatenated features is a sum of linear maps of each modality's.
        return fusion_layers.LateFusion(input_dims, output_dim)
    fused = layer(config.fusion.layer, input_dims, output_dim, config.fusion.options)
    if name == FUSED:
        return fused
    hidden = (parameter_count(fused) - output_dim) // (sum(input_dims) + 1 + output_dim)
    return fusion_layers.ConcatMLP(input_dims, output_dim, (max(1, hidden),))
