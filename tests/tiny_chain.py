"""All stages, freshly built and tiny, in memory or as artifacts."""

from pathlib import Path
from typing import Any

import torch

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import from_plain, to_plain
from unclip.models import REGISTRY, build
from unclip.models.clip import CLIP, CLIPConfig

STEPS = {"sampler": {"name": "ddim", "num_steps": 3}}
UNET = {"channels": [16, 32], "num_blocks": 1, "groups": 8, "head_dim": 16}
DIFFUSION = {"predict": "v", "clip_range": 1.0}
CONFIGS = {
    "diffusion_prior": {
        "net": {"width": 32, "depth": 1, "num_heads": 2, "text": "tokens"},
        "sampling": {**STEPS, "num_candidates": 2},
    },
    "decoder": {
        "image_size": 16,
        "net": {**UNET, "attention_levels": [1]},
        "conditioning": {
            "text": "transformer",
            "context_dim": 32,
            "transformer": {"width": 32, "depth": 1, "num_heads": 2},
        },
        "diffusion": DIFFUSION,
        "sampling": {**STEPS, "guidance": {"scale": 2.0}},
    },
    "upsampler": {
        "low_size": 16,
        "image_size": 32,
        "net": UNET,
        "diffusion": DIFFUSION,
        "sampling": STEPS,
        "crop_fraction": 0.5,
    },
}


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Away from the zero initialisation, under which a net ignores its input."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=generator) * 2 / p[0].numel() ** 0.5)
    return model.eval()


def tiny_stages() -> dict[str, tuple[Any, Manifest, Path]]:
    """For ``UnCLIP(...)``: clip, prior, decoder (16 px) and upsampler (32 px)."""
    clip = random_weights(CLIP(CLIPConfig(image_size=16, vision_width=32, vision_heads=2, text_width=32, text_heads=2)))
    own = clip.interface()
    stages = {"clip": (clip, Manifest("clip", "clip", {}, {}, hash="c"), Path("clip"))}
    for name, raw in CONFIGS.items():
        model = random_weights(build(from_plain(raw, REGISTRY[name][0]), own))
        stage = "prior" if name == "diffusion_prior" else name
        interface = {"clip": "c" if stage != "upsampler" else ""}
        stages[stage] = (model, Manifest(stage, name, raw, interface, hash=name), Path(stage))
    return stages


def write_tiny_chain(runs: Path) -> Path:
    """The same stages as artifacts in the runs of this folder, which is returned."""
    stages = tiny_stages()
    clip = stages["clip"][0]
    artifact.save(runs / "clip", clip, Manifest("clip", "clip", to_plain(clip.cfg), to_plain(clip.interface())))
    found = artifact.read_manifest(runs / "clip").hash
    for stage, (model, manifest, _) in stages.items():
        if stage == "clip":
            continue
        interface = to_plain(model.interface) | {"clip": found if stage != "upsampler" else ""}
        artifact.save(runs / stage, model, Manifest(stage, manifest.model, to_plain(model.cfg), interface))
    return runs
