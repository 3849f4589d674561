"""CLIP's towers to and from transformers' CLIPTextModelWithProjection and CLIPVisionModelWithProjection.

States and configurations only: transformers itself is not imported. A state is a mapping of names to tensors, in
open_clip's names those of ``CLIP.model``. The towers' outputs agree to rounding: text_embeds is z_t, last_hidden_state the
token states, image_embeds z_i (raw, all of them).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unclip.errors import ArtifactError, ConfigError
from unclip.models.clip import CLIPConfig

LOGIT_SCALE = 4.6052  # ln 100, where OpenAI's training ended: the models with projection do not hold it
START, END = 49406, 49407  # tokens
QUICK, EXACT = "quick_gelu", "gelu"
PLAIN_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
TEXT_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": QUICK,
    "layer_norm_eps": 1e-5,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": QUICK,
    "layer_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Tower:
    """Names of one tower: open_clip's to transformers', outside of the blocks; ``projection`` is transposed there."""

    name: str
    blocks: str
    their_blocks: str
    outside: dict[str, str]
    projection: str
    their_projection: str


TEXT = Tower(
    "text",
    "transformer.resblocks",
    "text_model.encoder.layers",
    {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    },
    "text_projection",
    "text_projection.weight",
)
VISION = Tower(
    "vision",
    "visual.transformer.resblocks",
    "vision_model.encoder.layers",
    {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so spelt in transformers
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    },
    "visual.proj",
    "visual_projection.weight",
)
IN_BLOCK = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "attn.in_proj_": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}


def to_transformers(state: Mapping[str, Tensor], tower: Tower) -> dict[str, Tensor]:
    """The state of the model with projection, from open_clip's state of both towers. ArtifactError for missing names."""
    found: dict[str, Tensor] = {}
    for ours, theirs in _names(tower, _count(state, tower.blocks)):
        value = _take(state, ours, tower)
        parts = value.T[None] if ours == tower.projection else torch.chunk(value, len(theirs))
        found |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return found


def from_transformers(state: Mapping[str, Tensor], tower: Tower) -> dict[str, Tensor]:
    """Of open_clip's state what belongs to ``tower``. ArtifactError for missing or unknown names; ``position_ids`` is none."""
    found: dict[str, Tensor] = {}
    known: set[str] = set()
    for ours, theirs in _names(tower, _count(state, tower.their_blocks)):
        parts = [_take(state, name, tower) for name in theirs]
        known |= {*theirs}
        found[ours] = parts[0].T.contiguous() if ours == tower.projection else torch.cat(parts)
    unknown = {name for name in state if not name.endswith(".position_ids")} - known
    if unknown:
        raise ArtifactError(
            f"the {tower.name} encoder holds {', '.join(sorted(unknown)[:3])} ({len(unknown)} in all), which CLIP's "
            f"{tower.name} tower with projection has not; give the folder of such a model"
        )
    return found


def text_config(cfg: CLIPConfig) -> dict[str, Any]:
    """transformers' CLIPTextConfig as JSON. ConfigError for a tower that it cannot express."""
    arguments = convertible(cfg)
    text = arguments["text_cfg"]
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": text["vocab_size"],
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text["mlp_ratio"]),
        "projection_dim": arguments["embed_dim"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
        **_shared(arguments),
    }


def vision_config(cfg: CLIPConfig) -> dict[str, Any]:
    """transformers' CLIPVisionConfig as JSON. ConfigError for a tower that it cannot express."""
    arguments = convertible(cfg)
    vision = arguments["vision_cfg"]
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": vision["width"],
        "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
        "projection_dim": arguments["embed_dim"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision["head_width"],
        "num_channels": 3,
        "image_size": arguments["image_size"],
        "patch_size": vision["patch_size"],
        **_shared(arguments),
    }


def open_clip_config(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of the two config.json of transformers, whose defaults stand for absent keys.

    ConfigError where open_clip's CLIP cannot express them.
    """
    text, vision = TEXT_DEFAULTS | dict(text), VISION_DEFAULTS | dict(vision)
    for name, theirs in (("text", text), ("vision", vision)):
        if theirs["hidden_act"] not in (QUICK, EXACT) or theirs["layer_norm_eps"] != 1e-5:
            raise ConfigError(
                f"the {name} encoder has hidden_act={theirs['hidden_act']} and layer_norm_eps={theirs['layer_norm_eps']}; "
                f"CLIP has {QUICK} or {EXACT}, and 1e-5: take another encoder"
            )
    if text["hidden_act"] != vision["hidden_act"] or text["projection_dim"] != vision["projection_dim"]:
        raise ConfigError(
            f"text and image encoder differ in hidden_act ({text['hidden_act']}, {vision['hidden_act']}) or projection_dim "
            f"({text['projection_dim']}, {vision['projection_dim']}): they are not of one CLIP"
        )
    return {
        "embed_dim": text["projection_dim"],
        "quick_gelu": text["hidden_act"] == QUICK,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def convertible(cfg: CLIPConfig) -> dict[str, Any]:
    """open_clip's arguments with all defaults filled in, and ``image_size`` as one number.

    ConfigError for towers other than CLIP's plain transformers.
    """
    from dataclasses import asdict

    from open_clip import CLIPTextCfg, CLIPVisionCfg

    arguments = cfg.architecture().arguments
    found = {"quick_gelu": False, **arguments}
    for key, cls, plain in (("vision_cfg", CLIPVisionCfg, PLAIN_VISION), ("text_cfg", CLIPTextCfg, PLAIN_TEXT)):
        defaults, given = asdict(cls()), asdict(cls(**arguments[key]))
        odd = [name for name, value in given.items() if name not in plain and value != defaults[name]]
        if key == "vision_cfg" and not isinstance(given["layers"], int):
            odd.append("layers")
        if odd:
            raise ConfigError(
                f"transformers' CLIP cannot express {key}.{odd[0]}={given[odd[0]]} of this CLIP; it knows OpenAI's plain "
                "transformers, such as model.name=ViT-B-32, ViT-L-14 or ViT-H-14, and the small CLIP without a name"
            )
        found[key] = given
    size = found["vision_cfg"]["image_size"]
    if not isinstance(size, int) and size[0] != size[1]:
        raise ConfigError(f"transformers' CLIP reads squares, not {tuple(size)} pixels; take a CLIP of square pictures")
    return {**found, "image_size": size if isinstance(size, int) else size[0]}


def _shared(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_act": QUICK if arguments["quick_gelu"] else EXACT,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }


def _names(tower: Tower, layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of open_clip's names with transformers', of which it holds one or, for queries, keys and values, three."""
    for ours, theirs in tower.outside.items():
        yield ours, (theirs,)
    for layer in range(layers):
        for ours, several in IN_BLOCK.items():
            for kind in ("weight", "bias"):
                dot = "" if ours.endswith("_") else "."
                names = tuple(f"{tower.their_blocks}.{layer}.{theirs}.{kind}" for theirs in several)
                yield f"{tower.blocks}.{layer}.{ours}{dot}{kind}", names
    yield tower.projection, (tower.their_projection,)


def _count(state: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.removeprefix(f"{blocks}.").split(".")[0] for name in state if name.startswith(f"{blocks}.")})


def _take(state: Mapping[str, Tensor], name: str, tower: Tower) -> Tensor:
    if name not in state:
        raise ArtifactError(
            f"{name} is missing: this is not the {tower.name} tower of a CLIP with projection; give the folder of such a model"
        )
    return state[name]
