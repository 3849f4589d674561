"""Low-rank adapters for prior, decoder and upsampler, through peft (Hu et al. 2022, "LoRA"); CLIP's are in clip_lora."""

from typing import Any

from unclip.errors import ConfigError

TARGETS = {  # modules by name, whole names
    "diffusion_prior": r"net\.transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
    "decoder": r"net\.unet\..*attentions\.\d+\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)",
    "upsampler": r"net\.unet\..*resnets\.\d+\.conv[12]",
}


def add_lora(model: Any, name: str, rank: int) -> Any:
    """Put adapters of this rank beside the matrices of a model of the registry; only they stay trainable.

    They change nothing at first (B = 0), and their scale is 1 (alpha = rank). Where there is a second net they belong to
    that one. Returns what :func:`merge_lora` needs. Raises ConfigError for another model, or without peft.
    """
    if name not in TARGETS:
        raise ConfigError(
            f"lora_rank is for {', '.join(TARGETS)}, not for {name}: set it to 0, which trains all weights"
        )
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ConfigError("lora_rank needs peft: pip install 'unclip[lora]', or set it to 0") from error
    second = getattr(model, "last_net", None) is not None
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=("last_" if second else "") + TARGETS[name])
    return LoraModel(model, {"default": config}, "default")


def merge_lora(adapters: Any) -> None:
    """Add the adapters to the matrices, in place: the model has its own names and sizes again."""
    adapters.merge_and_unload()
