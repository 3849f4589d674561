"""Karlo's components as diffusers' ``config.json`` describes them, and our configurations: pure functions, both ways.

What one side has and the other cannot compute is refused with ConfigError. Settings that a config lacks have diffusers'
defaults, as they have for diffusers itself: those of 2022 are shorter.
"""

from collections.abc import Mapping
from typing import Any

from unclip.diffusion.guidance import Guidance
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.diffusion.schedule import ScheduleName
from unclip.diffusion.settings import DiffusionConfig, Predict
from unclip.errors import ConfigError
from unclip.models.decoder import DecoderConfig, EmbeddingNorm
from unclip.models.diffusion_prior import DiffusionPriorConfig, EmbeddingSpace
from unclip.models.interface import Interface
from unclip.models.sampling import DiffusionSampling, PriorSampling, UpsamplerSampling
from unclip.models.upsampler import UpsamplerConfig
from unclip.nets.conditioned import ConditioningConfig, DecoderText
from unclip.nets.layers import Null, NullText
from unclip.nets.transformer import PriorNetConfig, PriorText
from unclip.nets.unet import UNetConfig

Json = Mapping[str, Any]

# What our nets compute, where diffusers' nets have a choice.
PRIOR_FIXED = {
    "additional_embeddings": 4, "time_embed_act_fn": "silu", "norm_in_type": None, "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear", "added_emb_type": "prd",
}  # fmt: skip
UNET_FIXED = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu", "norm_eps": 1e-5,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "time_embedding_type": "positional", "time_embedding_dim": None,
}  # fmt: skip
DECODER_FIXED = UNET_FIXED | {
    "in_channels": 3, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "class_embed_type": "identity",
    "only_cross_attention": False, "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "num_attention_heads": None, "dual_cross_attention": False,
    "use_linear_projection": False, "addition_embed_type": None, "upcast_attention": False, "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0, "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None,
}  # fmt: skip
UPSAMPLER_FIXED = UNET_FIXED | {
    "in_channels": 6, "mid_block_type": "UNetMidBlock2D", "add_attention": False, "class_embed_type": None,
}  # fmt: skip
SCHEDULER_FIXED = {"beta_schedule": "squaredcos_cap_v2"}
# Those of them whose default in diffusers is another one.
DEFAULTS = {
    "PriorTransformer": {},
    "UNet2DConditionModel": {
        "in_channels": 4, "mid_block_type": "UNetMidBlock2DCrossAttn", "class_embed_type": None,
    },
    "UNet2DModel": {"in_channels": 3, "add_attention": True},
    "UnCLIPScheduler": {},
}  # fmt: skip
# Settings that do not change what these nets compute.
IDLE = {
    "dropout", "num_class_embeds", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    "addition_embed_type_num_heads", "downsample_type", "upsample_type", "attn_norm_num_groups", "num_train_timesteps",
    "attention_head_dim", "trained_betas",
}  # fmt: skip
PREDICT = {"epsilon": Predict.eps, "sample": Predict.x0}
TIMES = {"scale_shift": True, "default": False}


class Component:
    """A component's config.json: settings by name, of which none that matters may go unread."""

    def __init__(self, config: Json, class_name: str, where: str, fixed: Json) -> None:
        """Raises ConfigError for a config of another class, or with a setting that our nets cannot compute."""
        self.config, self.where = config, where
        found = config.get("_class_name")
        if found != class_name:
            raise ConfigError(f"{where} describes a {found}, not a {class_name}: give a folder of Karlo's components")
        for name, wanted in fixed.items():
            value = self._plain(config.get(name, DEFAULTS[class_name].get(name, wanted)))
            if value != wanted:
                raise ConfigError(f"{where}: {name} is {value!r}; only {wanted!r} can be imported")
        self.read = {*fixed, *IDLE}

    def get(self, name: str, default: Any) -> Any:
        self.read.add(name)
        return self.config.get(name, default)

    def number(self, name: str, default: Any) -> Any:
        """A setting that may also be a list of equal numbers, one for each level."""
        value = self.get(name, default)
        values = value if isinstance(value, list) else [value]
        if len(set(values)) != 1:
            raise ConfigError(f"{self.where}: {name} is {value}; only equal values for all levels can be imported")
        return values[0]

    def same(self, name: str, wanted: Any) -> None:
        """ConfigError where the setting is given and is not ``wanted``."""
        if self.get(name, None) not in (None, wanted):
            raise ConfigError(f"{self.where}: {name} is {self.config[name]!r}; only {wanted!r} can be imported")

    def done(self) -> None:
        """ConfigError where a setting is left that nobody read and that is not off."""
        for name, value in self.config.items():
            if name not in self.read and not name.startswith("_") and value not in (None, False):
                raise ConfigError(
                    f"{self.where}: the setting {name}={value!r} is unknown here; it was written by a newer diffusers, or "
                    "is of another net than Karlo's"
                )

    @staticmethod
    def _plain(value: Any) -> Any:
        """Lists of equal values as one of them."""
        return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value


def prior_config(config: Json, scheduler: Json, where: str = "prior/config.json") -> DiffusionPriorConfig:
    """Of a PriorTransformer with an UnCLIPScheduler; its interface is :func:`prior_interface`."""
    found = Component(config, "PriorTransformer", where, PRIOR_FIXED)
    num_heads, head_dim = found.get("num_attention_heads", 32), found.config.get("attention_head_dim", 64)
    width, embed_dim = num_heads * head_dim, found.get("embedding_dim", 768)
    for name, wanted in (("time_embed_dim", width), ("embedding_proj_dim", embed_dim), ("clip_embed_dim", embed_dim)):
        found.same(name, wanted)
    net = PriorNetConfig(width, found.get("num_layers", 20), num_heads, PriorText.clip_states, NullText.empty)
    found.get("num_embeddings", 77)
    found.done()
    diffusion = diffusion_config(scheduler)
    if diffusion.learned_variance:
        raise ConfigError("prior_scheduler: variance_type is 'learned_range'; a prior has 'fixed_small_log'")
    return DiffusionPriorConfig(
        net, diffusion, PriorSampling(SamplerConfig(Sampler.karlo, 25), Guidance(4.0), 1), EmbeddingSpace.whitened,
        drop_text=0.2,
    )  # fmt: skip


def prior_interface(config: Json) -> tuple[int, int]:
    """Width of the embeddings, which is that of the token states too, and the longest caption."""
    return config.get("embedding_dim", 768), config.get("num_embeddings", 77)


def decoder_config(unet: Json, text_proj: Json, scheduler: Json) -> tuple[DecoderConfig, int]:
    """Of an UNet2DConditionModel with an UnCLIPTextProjModel and an UnCLIPScheduler, and the width of z_i."""
    where = "decoder/config.json"
    found = Component(unet, "UNet2DConditionModel", where, DECODER_FIXED)
    head_dim, context_dim = found.number("attention_head_dim", 8), found.number("cross_attention_dim", 1280)
    net = _unet(found, ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"), head_dim)
    diffusion = diffusion_config(scheduler, "decoder_scheduler")
    _check_channels(found, diffusion)
    size = found.get("sample_size", None)
    found.done()
    proj = Component(text_proj, "UnCLIPTextProjModel", "text_proj/config.json", {})
    proj.same("cross_attention_dim", context_dim)
    proj.same("time_embed_dim", net.time_dim)
    conditioning = ConditioningConfig(
        image=True,
        text=DecoderText.clip_states,
        text_emb=True,
        context_dim=context_dim,
        num_image_tokens=proj.get("clip_extra_context_tokens", 4),
        null_image=Null.learned,
        null_text=NullText.empty,
    )
    embed_dim = proj.get("clip_embeddings_dim", 768)
    proj.done()
    sampling = DiffusionSampling(SamplerConfig(Sampler.karlo, 25), Guidance(8.0))
    cfg = DecoderConfig(
        size, net, conditioning, diffusion, sampling, drop_image=0.1, drop_text=0.3, embedding_norm=EmbeddingNorm.raw
    )
    return cfg, embed_dim


def upsampler_config(unet: Json, scheduler: Json, low_size: int, where: str = "super_res_first") -> UpsamplerConfig:
    """Of a pair of UNet2DModel, alike but for their weights, for pictures of ``low_size`` pixels."""
    found = Component(unet, "UNet2DModel", f"{where}/config.json", UPSAMPLER_FIXED)
    net = _unet(found, ("AttnDownBlock2D", "AttnUpBlock2D"), 64)
    diffusion = diffusion_config(scheduler, "super_res_scheduler")
    _check_channels(found, diffusion)
    size = found.get("sample_size", None)
    found.done()
    fits = size % (4 * net.stride) == 0
    sampling = UpsamplerSampling(SamplerConfig(Sampler.karlo, 7))
    return UpsamplerConfig(
        low_size, size, net, diffusion, sampling, crop_fraction=0.25 if fits else 1.0, overshoot=True, last_steps=1
    )


def diffusion_config(scheduler: Json, where: str = "prior_scheduler") -> DiffusionConfig:
    """Of an UnCLIPScheduler."""
    found = Component(scheduler, "UnCLIPScheduler", f"{where}/scheduler_config.json", SCHEDULER_FIXED)
    predict, variance = found.get("prediction_type", "epsilon"), found.get("variance_type", "fixed_small_log")
    clips, clip_range = found.get("clip_sample", True), found.get("clip_sample_range", 1.0)
    found.done()
    if predict not in PREDICT or variance not in ("fixed_small_log", "learned_range"):
        raise ConfigError(f"{found.where}: prediction_type={predict!r}, variance_type={variance!r} are not Karlo's")
    return DiffusionConfig(
        schedule=ScheduleName.cosine,
        num_timesteps=scheduler.get("num_train_timesteps", 1000),
        predict=PREDICT[predict],
        learned_variance=variance == "learned_range",
        clip_range=clip_range if clips else None,
        float32_tables=True,
    )


def _unet(found: Component, attending: tuple[str, str], head_dim: int) -> UNetConfig:
    """``attending``: names of the blocks with attention, on the way down and up."""
    names = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = found.get("down_block_types", ()), found.get("up_block_types", ())
    for name, blocks, index in (("down_block_types", down, 0), ("up_block_types", up, 1)):
        if odd := {*blocks} - {names[index], attending[index]} or (set() if blocks else {"unset"}):
            raise ConfigError(f"{found.where}: {name} has {', '.join(sorted(odd))}; only {names[index]} and "
                              f"{attending[index]} can be imported")  # fmt: skip
    levels = [level for level, name in enumerate(down) if name == attending[0]]
    if levels != [len(up) - 1 - i for i in reversed(range(len(up))) if up[i] == attending[1]]:
        raise ConfigError(f"{found.where}: attention stands at other levels on the way up than down")
    times = found.get("resnet_time_scale_shift", "default")
    if times not in TIMES:
        raise ConfigError(f"{found.where}: resnet_time_scale_shift={times!r}; it must be one of {', '.join(TIMES)}")
    channels = list(found.get("block_out_channels", ()))
    if len(channels) != len(down):
        raise ConfigError(f"{found.where}: {len(channels)} block_out_channels for {len(down)} down_block_types")
    return UNetConfig(
        channels=channels,
        num_blocks=found.number("layers_per_block", 2),
        attention_levels=levels,
        head_dim=head_dim,
        dropout=found.config.get("dropout", 0.0),
        groups=found.get("norm_num_groups", 32),
        scale_shift=TIMES[times],
    )


def _check_channels(found: Component, diffusion: DiffusionConfig) -> None:
    given, wanted = found.get("out_channels", 3), 6 if diffusion.learned_variance else 3
    if given != wanted:
        raise ConfigError(f"{found.where}: out_channels is {given}, but its scheduler's variance_type wants {wanted}")
    if found.get("sample_size", None) is None or isinstance(found.config["sample_size"], list):
        raise ConfigError(f"{found.where}: sample_size is {found.config.get('sample_size')}; it must be one number")


def prior_component(cfg: DiffusionPriorConfig, interface: Interface) -> dict[str, Any]:
    """PriorTransformer's config of a prior; ConfigError, with the setting that would do, for one that it cannot express."""
    net = cfg.net
    _refuse(
        "the prior", "UnCLIPPipeline",
        ("model.embedding_space=whitened", cfg.embedding_space is EmbeddingSpace.whitened),
        ("model.net.text=clip_states", net.text is PriorText.clip_states),
        ("model.net.null_text=empty", net.null_text is NullText.empty),
        ("model.net.qk_norm=false", not net.qk_norm),
        ("model.diffusion.self_conditioning=false", not cfg.diffusion.self_conditioning),
        ("a CLIP whose token states are as wide as its embeddings", interface.text_width == interface.embed_dim),
    )  # fmt: skip
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": net.num_heads,
        "attention_head_dim": net.width // net.num_heads,
        "num_layers": net.depth,
        "embedding_dim": interface.embed_dim,
        "num_embeddings": interface.context_length,
        "dropout": 0.0,
        "time_embed_dim": None,
        "embedding_proj_dim": None,
        "clip_embed_dim": None,
        **PRIOR_FIXED,
    }


def decoder_components(cfg: DecoderConfig, interface: Interface) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of UNet2DConditionModel and UnCLIPTextProjModel of a decoder; ConfigError as :func:`prior_component`.

    A zero ``null_image`` is a learned one that is zero.
    """
    net, conditioning = cfg.net, cfg.conditioning
    tokens = interface.context_length + conditioning.num_image_tokens
    sides = [cfg.image_size // 2**level for level in net.attention_widths()]
    _refuse(
        "the decoder", "UnCLIPPipeline",
        ("model.embedding_norm=raw", cfg.embedding_norm is EmbeddingNorm.raw and cfg.embedding_scale in (None, 1.0)),
        ("model.conditioning.image=true", conditioning.image),
        ("model.conditioning.text=clip_states", conditioning.text is DecoderText.clip_states),
        ("model.conditioning.text_emb=true", conditioning.text_emb),
        ("model.conditioning.null_text=empty", conditioning.null_text is NullText.empty),
        ("model.diffusion.learned_variance=true", cfg.diffusion.learned_variance),
        ("model.net.patch=1", net.patch == 1),
        ("model.split=0", cfg.split == 0),
        ("model.conditioning.sketch.size=0", not conditioning.sketch.size),
        ("a CLIP whose token states are as wide as its embeddings", interface.text_width == interface.embed_dim),
        ("another model.conditioning.num_image_tokens, since diffusers takes as many context tokens as pixels for "
         "none", tokens not in [side**2 for side in sides]),
    )  # fmt: skip
    unet = unet_json(net, cfg.image_size, 6, conditioning.context_dim)
    text_proj = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": conditioning.num_image_tokens,
        "clip_embeddings_dim": interface.embed_dim,
        "time_embed_dim": net.time_dim,
        "cross_attention_dim": conditioning.context_dim,
    }
    return unet, text_proj


def upsampler_component(cfg: UpsamplerConfig) -> dict[str, Any]:
    """UNet2DModel's config of an upsampler, for each of its nets; ConfigError as :func:`prior_component`."""
    _refuse(
        "the upsampler", "UnCLIPPipeline",
        ("model.residual=false", not cfg.residual),
        ("model.max_noise=0", not cfg.max_noise),
        ("model.overshoot=true", cfg.overshoot),
        ("model.last_steps of 0 or 1", cfg.last_steps <= 1),
        ("model.net.patch=1", cfg.net.patch == 1),
        ("model.diffusion.learned_variance=false", not cfg.diffusion.learned_variance),
    )  # fmt: skip
    return unet_json(cfg.net, cfg.image_size, 3, None)


def scheduler_component(cfg: DiffusionConfig) -> dict[str, Any]:
    """UnCLIPScheduler's config of a diffusion; ConfigError as :func:`prior_component`."""
    _refuse(
        "the diffusion", "UnCLIPScheduler",
        ("model.diffusion.schedule=cosine", ScheduleName(cfg.schedule) is ScheduleName.cosine),
        ("model.diffusion.resolution=null", cfg.resolution is None),
        ("model.diffusion.predict=eps or x0", cfg.predict in PREDICT.values()),
    )  # fmt: skip
    return {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": cfg.num_timesteps,
        "variance_type": "learned_range" if cfg.learned_variance else "fixed_small_log",
        "clip_sample": cfg.clip_range is not None,
        "clip_sample_range": 1.0 if cfg.clip_range is None else cfg.clip_range,
        "prediction_type": next(name for name, predict in PREDICT.items() if predict is cfg.predict),
        **SCHEDULER_FIXED,
    }


def _unet_component(net: UNetConfig, image_size: int, out_channels: int) -> dict[str, Any]:
    return {
        "sample_size": image_size,
        "out_channels": out_channels,
        "block_out_channels": list(net.channels),
        "layers_per_block": net.num_blocks,
        "norm_num_groups": net.groups,
        "dropout": net.dropout,
        "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
    }


def unet_json(net: UNetConfig, image_size: int, out_channels: int, context_dim: int | None) -> dict[str, Any]:
    """diffusers' config of a decoder's U-Net or, without a context, of an upsampler's."""
    levels = range(len(net.channels))
    attends = [level in net.attention_levels for level in levels]
    shared = _unet_component(net, image_size, out_channels) | {
        "down_block_types": ["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        "up_block_types": ["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
    }
    if context_dim is None:
        return {"_class_name": "UNet2DModel", **shared, **UPSAMPLER_FIXED}
    own = {"cross_attention_dim": context_dim, "attention_head_dim": net.head_dim}
    return {"_class_name": "UNet2DConditionModel", **shared, **own, **DECODER_FIXED}


def scheduler_json(predict: str, variance: str, clip_range: float) -> dict[str, Any]:
    """UnCLIPScheduler's config, by its own words."""
    return {
        "_class_name": "UnCLIPScheduler", "prediction_type": predict, "variance_type": variance,
        "clip_sample_range": clip_range,
    }  # fmt: skip


def _refuse(what: str, reader: str, *settings: tuple[str, bool]) -> None:
    """ConfigError that names the first setting which would do and is not given."""
    for setting, given in settings:
        if not given:
            raise ConfigError(f"{what} is not one that diffusers' {reader} can express; it would need {setting}")
