"""The decoder's net equals diffusers' UNet2DConditionModel and UnCLIPTextProjModel, with each option of its blocks."""

from dataclasses import replace

import pytest
import torch
from net_support import assert_equal_nets, cast, randomise
from torch import nn

from unclip.nets.conditioned import ConditioningConfig, DecoderNet, DecoderText
from unclip.nets.layers import ClipWidths, Cond, Keep, Null
from unclip.nets.unet import UNetConfig

D, N, CONTEXT = 24, 7, 20
BASE = UNetConfig(channels=[16, 32, 48], num_blocks=2, attention_levels=[1, 2], head_dim=8, groups=8)


def theirs(cfg: UNetConfig, num_image_tokens: int = 4) -> nn.ModuleDict:
    diffusers = pytest.importorskip("diffusers")
    text_proj = pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj")
    last = len(cfg.channels) - 1
    attends = [level in cfg.attention_levels for level in range(last + 1)]
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        layers_per_block=cfg.num_blocks,
        norm_num_groups=cfg.groups,
        down_block_types=["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        up_block_types=["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=cfg.channels,
        cross_attention_dim=CONTEXT,
        attention_head_dim=cfg.head_dim,
        resnet_time_scale_shift="scale_shift" if cfg.scale_shift else "default",
        class_embed_type="identity",
    )
    for name, module in unet.named_modules():
        if name.endswith(".dropout"):  # its blocks with attention do not hand the setting on
            module.p = cfg.dropout
    proj = text_proj.UnCLIPTextProjModel(
        clip_extra_context_tokens=num_image_tokens,
        clip_embeddings_dim=D,
        time_embed_dim=cfg.time_dim,
        cross_attention_dim=CONTEXT,
    )
    torch.manual_seed(0)
    both = nn.ModuleDict({"text_proj": proj, "unet": unet})
    randomise(both)
    return both


def ours(cfg: UNetConfig, reference: nn.ModuleDict, num_image_tokens: int = 4) -> DecoderNet:
    conditioning = ConditioningConfig(
        text=DecoderText.clip_states,
        text_emb=True,
        context_dim=CONTEXT,
        null_image=Null.learned,
        num_image_tokens=num_image_tokens,
    )
    net = DecoderNet(cfg, conditioning, ClipWidths(embed_dim=D, text_width=D), out_channels=6)
    net.load_state_dict(reference.state_dict(), strict=True)
    return net


def conditions() -> Cond:
    torch.manual_seed(1)
    mask = torch.arange(N) < torch.tensor([7, 4, 2])[:, None]
    return Cond(image_emb=torch.randn(3, D), text_emb=torch.randn(3, D), text_seq=torch.randn(3, N, D), text_mask=mask)


def striped(dropout: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """Dropout with a mask that depends on the place only: random ones follow each side's layout in memory."""
    if not dropout.p:
        return x
    places = torch.arange(x[0].numel()).view(x.shape[1:])
    return x * (places % 7 > 7 * dropout.p).to(x.dtype) / (1 - dropout.p)


OPTIONS = {
    "as Karlo": (BASE, 4),
    "one block": (replace(BASE, num_blocks=1), 4),
    "three blocks": (replace(BASE, num_blocks=3), 4),
    "one level": (replace(BASE, channels=[16], attention_levels=[0]), 4),
    "attention everywhere": (replace(BASE, attention_levels=[0, 1, 2]), 4),
    "attention in the middle and below": (replace(BASE, attention_levels=[2]), 4),
    "attention above a level without": (replace(BASE, attention_levels=[0, 2]), 4),
    "one head a level": (replace(BASE, channels=[16, 16], attention_levels=[1], head_dim=16), 4),
    "other groups": (replace(BASE, groups=4), 4),
    "equal widths": (replace(BASE, channels=[16, 16, 16]), 4),
    "added timestep": (replace(BASE, scale_shift=False), 4),
    "dropout": (replace(BASE, dropout=0.3), 4),
    "checkpointing": (replace(BASE, gradient_checkpointing=True), 4),
    "checkpointing and dropout": (replace(BASE, gradient_checkpointing=True, dropout=0.3), 4),
    "ten image tokens": (BASE, 10),
}


@pytest.mark.parametrize(
    ("option", "shape"), [*((option, (16, 16)) for option in OPTIONS), ("as Karlo", (8, 24))], ids=str
)
def test_equals_diffusers_forward_and_backward(option: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nn.Dropout, "forward", striped)
    cfg, num_image_tokens = OPTIONS[option]
    reference = theirs(cfg, num_image_tokens)
    net = ours(cfg, reference, num_image_tokens)
    cond, x_t, timestep = conditions(), torch.randn(3, 3, *shape), torch.tensor([0, 500, 999])
    keep_image = torch.tensor([True, False, True])
    text_proj = reference["text_proj"]

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        x, given = x_t.to(dtype), cast(cond, dtype)
        null = text_proj.learned_classifier_free_guidance_embeddings
        hidden, additive = text_proj(
            image_embeddings=torch.where(keep_image[:, None], given.image_emb, null),
            prompt_embeds=given.text_emb,
            text_encoder_hidden_states=given.text_seq,
            do_classifier_free_guidance=False,
        )
        mask = nn.functional.pad(cond.text_mask, (num_image_tokens, 0), value=True)
        told = {"encoder_hidden_states": hidden, "class_labels": additive, "attention_mask": mask}
        return net(x, timestep, net.prepare(given, Keep(image=keep_image))), reference["unet"](
            x, timestep, **told
        ).sample

    assert_equal_nets(net, reference, run)
