"""Low-rank adapters for both towers of a CLIP, through peft (Hu et al. 2022, "LoRA")."""

from typing import Any

from unclip.errors import ConfigError

LINEARS = r"(visual\.)?transformer\.resblocks\.\d+\.(attn\.out_proj|mlp\.c_fc|mlp\.c_proj)"
ATTENTION = "attn.in_proj_weight"  # query, key and value in one matrix


def add_lora(model: Any, rank: int) -> Any:
    """Put adapters of this rank beside every matrix of the blocks; only they and the temperature stay trainable.

    They change nothing at first (B = 0), and their scale is 1 (alpha = rank). Returns what :func:`merge_lora` needs.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ConfigError("model.lora_rank needs peft: pip install 'unclip[lora]', or set it to 0") from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, target_parameters=[ATTENTION])
    adapters = LoraModel(model, {"default": config}, "default")
    model.logit_scale.requires_grad_(True)
    if model.logit_bias is not None:
        model.logit_bias.requires_grad_(True)
    return adapters


def merge_lora(adapters: Any) -> Any:
    """Add the adapters to the matrices: open_clip's own model, with its own names."""
    adapters.merge_and_unload()  # of nested layers, peft unwraps the outer ones (attn) only ...
    return adapters.merge_and_unload()  # ... and now the inner ones (attn.out_proj)
