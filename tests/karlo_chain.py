"""A chain in Karlo's form, tiny and with random weights, as artifacts of runs."""

from pathlib import Path
from typing import Any

import torch

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import from_plain, to_plain
from unclip.models import REGISTRY, build
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.interface import Interface

D, L = 32, 20
CLIP_CONFIG = CLIPConfig(
    quick_gelu=True,
    embed_dim=D,
    image_size=16,
    patch_size=8,
    vision_width=32,
    vision_layers=1,
    vision_heads=2,
    text_width=D,
    text_layers=1,
    text_heads=2,
    context_length=L,
)
UNET = {"channels": [16, 32], "num_blocks": 1, "groups": 8, "head_dim": 8}
KARLO_TABLES = {"float32_tables": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "prior": {
        "net": {"width": 32, "depth": 2, "num_heads": 2, "text": "clip_states", "null_text": "empty"},
        "diffusion": {"predict": "x0", "clip_range": 10.0, **KARLO_TABLES},
        "embedding_space": "whitened",
    },
    "decoder": {
        "image_size": 16,
        "net": {**UNET, "attention_levels": [1], "dropout": 0.1},
        "conditioning": {
            "text": "clip_states",
            "text_emb": True,
            "context_dim": 24,
            "null_image": "learned",
            "null_text": "empty",
        },
        "diffusion": {"learned_variance": True, "clip_range": 1.0, **KARLO_TABLES},
        "embedding_norm": "raw",
    },
    "upsampler": {
        "low_size": 16,
        "image_size": 32,
        "net": {**UNET, "scale_shift": False},
        "diffusion": {"clip_range": 1.0, **KARLO_TABLES},
        "overshoot": True,
        "last_steps": 1,
        "crop_fraction": 0.5,
    },
    "upsampler_64": {
        "low_size": 32,
        "image_size": 64,
        "net": {**UNET, "scale_shift": False},
        "diffusion": {"clip_range": 1.0},
        "overshoot": True,
        "crop_fraction": 0.5,
    },
}
MODELS = {"prior": "diffusion_prior", "decoder": "decoder", "upsampler": "upsampler", "upsampler_64": "upsampler"}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights under which no branch is silent and no activation grows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.7 / parameter[0].numel() ** 0.5 if parameter.ndim >= 2 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape))
    return model.eval()


def write_karlo_chain(
    runs: Path, changes: dict[str, dict[str, Any]] | None = None, clip: CLIPConfig = CLIP_CONFIG
) -> Path:
    """Artifacts below ``runs``, which is returned; ``changes``: by stage, settings to replace, nested as they are."""
    torch.manual_seed(0)
    own: Any = randomised(CLIP(clip))
    with torch.no_grad():
        own.model.text_projection.mul_(20)  # so that embeddings have values of about one, as real ones do
    artifact.save(runs / "clip", own, Manifest("clip", "clip", to_plain(own.cfg), to_plain(own.interface())))
    hashed = artifact.read_manifest(runs / "clip").hash
    for name, config in CONFIGS.items():
        write_stage(runs, name, laid_over(config, (changes or {}).get(name, {})), own, hashed)
    return runs


def write_stage(runs: Path, name: str, raw: dict[str, Any], clip: CLIP, hashed: str) -> None:
    kind = name.split("_")[0]
    interface = to_plain(clip.interface()) | {"clip": hashed}
    if kind == "upsampler":
        interface = to_plain(Interface())
    model = randomised(build(from_plain(raw, REGISTRY[MODELS[name]][0]), Interface(**interface)))
    if kind != "upsampler" and hasattr(model, "set_empty_caption"):
        tokens = clip.tokenize([""])
        text_emb, text_seq = clip.encode_text(tokens)
        if "empty" in str(raw):
            model.set_empty_caption(tokens[0], text_emb[0], text_seq[0])
    if name == "prior":
        model.clip_mean.copy_(torch.linspace(-0.5, 0.5, D)[None])
        model.clip_std.copy_(torch.linspace(0.5, 1.5, model.num_channels)[None])
    artifact.save(runs / name, model, Manifest(kind, MODELS[name], to_plain(model.cfg), interface))


def laid_over(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(config)
    for key, value in changes.items():
        found[key] = laid_over(found.get(key, {}), value) if isinstance(value, dict) else value
    return found
