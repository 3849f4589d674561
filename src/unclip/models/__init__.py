"""The models of every stage: configuration, losses and sampling. One registry rebuilds them from an artifact."""

from typing import Any

from torch import nn

from unclip.errors import ConfigError, UnclipError
from unclip.models.ar_prior import ARPrior, ARPriorConfig
from unclip.models.baseline_priors import (
    EclipsePrior,
    EclipsePriorConfig,
    IdentityConfig,
    IdentityPrior,
    LinearPrior,
    LinearPriorConfig,
    MLPPrior,
    MLPPriorConfig,
)
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from unclip.models.interface import Interface, ModelConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

REGISTRY: dict[str, tuple[type[ModelConfig], type[nn.Module]]] = {
    "clip": (CLIPConfig, CLIP),
    "ar_prior": (ARPriorConfig, ARPrior),
    "diffusion_prior": (DiffusionPriorConfig, DiffusionPrior),
    "eclipse_prior": (EclipsePriorConfig, EclipsePrior),
    "identity": (IdentityConfig, IdentityPrior),
    "linear_prior": (LinearPriorConfig, LinearPrior),
    "mlp_prior": (MLPPriorConfig, MLPPrior),
    "decoder": (DecoderConfig, Decoder),
    "upsampler": (UpsamplerConfig, Upsampler),
}


def build(config: ModelConfig, interface: Interface) -> Any:
    """The model that ``config`` describes, freshly initialised. ConfigError where it does not fit the CLIP's widths."""
    try:
        return REGISTRY[name_of(config)][1](config, interface)
    except UnclipError:
        raise
    except ValueError as error:
        raise ConfigError(f"model={name_of(config)}: {error}") from error


def name_of(config: ModelConfig) -> str:
    """The registry name of a configuration's model."""
    return next(name for name, (cls, _) in REGISTRY.items() if cls is type(config))
