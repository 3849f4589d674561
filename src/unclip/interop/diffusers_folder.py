"""The stages of a chain as the folder of diffusers' UnCLIPPipeline and UnCLIPImageVariationPipeline.

One folder serves both: each pipeline takes the components that it knows. Weights are copies, since our layers carry
diffusers' names; diffusers itself is not imported here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unclip.errors import ArtifactError, ConfigError
from unclip.interop.diffusers_tokenizer import write_tokenizer
from unclip.interop.karlo_config import (
    decoder_components,
    prior_component,
    scheduler_component,
    upsampler_component,
)
from unclip.interop.transformers_clip import TEXT, VISION, text_config, to_transformers, vision_config
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from unclip.models.interface import Interface, ModelConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

FIRST_VERSION, LAST_VERSION = "0.37.1", "0.42.1"  # of diffusers, tested
TEXT_PROJ = "diffusers.pipelines.deprecated.unclip.text_proj"  # since 0.38; what 0.38 itself writes, it cannot read
LEGACY_TEXT_PROJ = "unclip"
CLASSES = {
    "prior": ("diffusers", "PriorTransformer"),
    "prior_scheduler": ("diffusers", "UnCLIPScheduler"),
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "decoder_scheduler": ("diffusers", "UnCLIPScheduler"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    "super_res_scheduler": ("diffusers", "UnCLIPScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
}


def refuse_inexpressible(cfg: ModelConfig, interface: Interface) -> None:
    """ConfigError, with the setting that would do, for a stage that the pipelines' components cannot express."""
    match cfg:
        case CLIPConfig():
            text_config(cfg)
        case DiffusionPriorConfig():
            prior_component(cfg, interface)
            scheduler_component(cfg.diffusion)
        case DecoderConfig():
            decoder_components(cfg, interface)
            scheduler_component(cfg.diffusion)
        case UpsamplerConfig():
            upsampler_component(cfg)
            scheduler_component(cfg.diffusion)
        case _:
            raise ConfigError(
                f"diffusers' UnCLIPPipeline samples from a diffusion prior, not by {type(cfg).__name__}: train one with "
                "model=diffusion_prior, or leave the prior out (--without-prior), for picture variations alone"
            )


@dataclass
class DiffusersFolder:
    """A folder that is being written, component by component; ``digests`` of all tensors in it, for the check."""

    path: Path
    legacy: bool
    components: list[str] = field(default_factory=list)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)

    def add_clip(self, clip: CLIP) -> None:
        """Both towers (or the text tower alone, where there is no other), the tokenizer and the preprocessing."""
        state = clip.model.state_dict()
        self._model("text_encoder", text_config(clip.cfg), to_transformers(state, TEXT))
        write_tokenizer(self.path / "tokenizer", clip.tokenizer.context_length)
        self.components.append("tokenizer")
        if clip.model.visual is None:
            return
        self._model("image_encoder", vision_config(clip.cfg), to_transformers(state, VISION))
        self._write("feature_extractor/preprocessor_config.json", _preprocessing(clip))
        self.components.append("feature_extractor")

    def add_prior(self, prior: DiffusionPrior) -> None:
        if not prior.clip_std.any():
            raise ArtifactError("the prior's clip_std is zero, so all z_i would be alike; train or import it again")
        state = _below(prior.state_dict(), "net.") | {"clip_mean": prior.clip_mean, "clip_std": prior.clip_std}
        self._model("prior", prior_component(prior.cfg, prior.interface), state)
        self._scheduler("prior_scheduler", scheduler_component(prior.cfg.diffusion))

    def add_decoder(self, decoder: Decoder) -> None:
        unet, text_proj = decoder_components(decoder.cfg, decoder.interface)
        state = decoder.state_dict()
        self._model("decoder", unet, _below(state, "net.unet."))
        zero = {"learned_classifier_free_guidance_embeddings": torch.zeros(decoder.interface.embed_dim)}
        self._model("text_proj", text_proj, zero | _below(state, "net.text_proj."))
        self._scheduler("decoder_scheduler", scheduler_component(decoder.cfg.diffusion))

    def add_upsampler(self, upsampler: Upsampler, inside: str = "") -> None:
        """``inside``: a sub-folder, for the upsamplers after the first, which no pipeline of diffusers has."""
        config = upsampler_component(upsampler.cfg)
        first, last = (_below(upsampler.state_dict(), f"{net}.unet.") for net in ("net", "last_net"))
        self._model(f"{inside}super_res_first", config, first)
        self._model(f"{inside}super_res_last", config, last or first)
        self._scheduler(f"{inside}super_res_scheduler", scheduler_component(upsampler.cfg.diffusion))

    def finish(self) -> None:
        """Write model_index.json, which names the components of a pipeline."""
        classes = CLASSES | {"text_proj": (LEGACY_TEXT_PROJ if self.legacy else TEXT_PROJ, "UnCLIPTextProjModel")}
        pipeline = "UnCLIPPipeline" if "prior" in self.components else "UnCLIPImageVariationPipeline"
        named = {name: list(classes[name]) for name in sorted(self.components) if "/" not in name}
        index = {"_class_name": pipeline, "_diffusers_version": FIRST_VERSION}
        self._write("model_index.json", {**index, **named})

    def _model(self, name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        of_transformers = name in ("text_encoder", "image_encoder")
        self._write(
            f"{name}/config.json", config if of_transformers else {**config, "_diffusers_version": FIRST_VERSION}
        )
        file = "model.safetensors" if of_transformers else "diffusion_pytorch_model.safetensors"
        save_file(state, self.path / name / file, metadata={"format": "pt"})
        self.digests[name] = {key: digest(value) for key, value in state.items()}
        self.components.append(name)

    def _scheduler(self, name: str, config: Mapping[str, Any]) -> None:
        self._write(f"{name}/scheduler_config.json", {**config, "_diffusers_version": FIRST_VERSION})
        self.components.append(name)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n")


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes on the CPU."""
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What lies below ``prefix``, without the stored caption "": diffusers reads it anew."""
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if not name.startswith("empty_")}


def _preprocessing(clip: CLIP) -> dict[str, Any]:
    """transformers' CLIPImageProcessor: shorter side resized, middle cut out, normalised."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": clip.image_size, "width": clip.image_size},
        "size": {"shortest_edge": clip.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": clip.mean.flatten().tolist(),
        "image_std": clip.std.flatten().tolist(),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
