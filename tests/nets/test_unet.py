from collections import Counter

import pytest
import torch
from net_support import assert_equal_nets, randomise
from torch import nn
from torch.testing import assert_close

from unclip.nets.conditioned import NOISE_LEVELS, ConditioningConfig, DecoderNet, DecoderText, NullText, UpsamplerNet
from unclip.nets.layers import ClipWidths, Cond, Keep, Null
from unclip.nets.transformer import TextTransformerConfig
from unclip.nets.unet import ContextAttention, ResnetBlock, UNet, UNetConfig, UNetContext

D, N = 24, 7
WIDTHS = ClipWidths(embed_dim=D, text_width=D, context_length=N, vocab_size=50)
SMALL = UNetConfig(channels=[16, 32], num_blocks=1, attention_levels=[1], head_dim=8, groups=8)


def make_net(text: DecoderText, image: bool = True, cfg: UNetConfig = SMALL, **options) -> DecoderNet:
    torch.manual_seed(0)
    transformer = TextTransformerConfig(width=16, depth=2, num_heads=2)
    conditioning = ConditioningConfig(image=image, text=text, context_dim=20, transformer=transformer, **options)
    net = DecoderNet(cfg, conditioning, WIDTHS)
    randomise(net)
    return net


def make_cond(batch: int = 3) -> Cond:
    torch.manual_seed(1)
    mask = torch.arange(N) < torch.tensor([7, 4, 2])[:batch, None]
    return Cond(
        image_emb=torch.randn(batch, D),
        text_emb=torch.randn(batch, D),
        text_seq=torch.randn(batch, N, D),
        text_mask=mask,
        tokens=torch.randint(1, 40, (batch, N)) * mask,
    )


@pytest.mark.parametrize(
    ("changes", "noised", "out_channels"),
    [
        ({}, False, 3),
        ({}, True, 3),
        ({"num_blocks": 2}, False, 3),
        ({"num_blocks": 3, "channels": [16, 16, 32]}, True, 6),
        ({"scale_shift": True}, False, 6),
        ({"gradient_checkpointing": True}, True, 3),
        ({"groups": 16}, False, 3),
    ],
)
def test_equals_diffusers_upsampler_forward_and_backward(changes: dict, noised: bool, out_channels: int):
    diffusers = pytest.importorskip("diffusers")
    cfg = UNetConfig(**{"channels": [16, 32], "num_blocks": 1, "groups": 8, "scale_shift": False, **changes})
    levels = len(cfg.channels)
    reference = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=out_channels,
        layers_per_block=cfg.num_blocks,
        add_attention=False,
        norm_num_groups=cfg.groups,
        down_block_types=("ResnetDownsampleBlock2D",) * levels,
        up_block_types=("ResnetUpsampleBlock2D",) * levels,
        block_out_channels=tuple(cfg.channels),
        resnet_time_scale_shift="scale_shift" if cfg.scale_shift else "default",
        class_embed_type="timestep" if noised else None,
    )
    reference.time_proj.register_forward_hook(
        lambda module, given, sinusoid: sinusoid.to(reference.dtype)
    )  # it forgets
    torch.manual_seed(0)
    randomise(reference)
    net = UpsamplerNet(cfg, out_channels, noised)
    weights = reference.state_dict()
    net.load_state_dict({k if k.startswith("class_embedding") else f"unet.{k}": v for k, v in weights.items()})
    x_t, low, timestep = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24), torch.tensor([10, 900])
    level = torch.tensor([0.0, 0.3])

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        x, small = x_t.to(dtype), low.to(dtype)
        labels = NOISE_LEVELS * level if noised else None
        out = net(x, timestep, net.prepare(small, level))
        return out, reference(torch.cat((x, small), dim=1), timestep, class_labels=labels).sample

    assert_equal_nets(net, reference, run)


@pytest.mark.parametrize("text", [DecoderText.clip_states, DecoderText.transformer, DecoderText.tokens])
def test_masked_positions_and_trimming_change_nothing(text: DecoderText):
    net = make_net(text)
    cond, x_t, timestep = make_cond(), torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999])
    cond.text_mask = cond.text_mask & (torch.arange(N) < 4)
    out = net(x_t, timestep, net.prepare(cond, Keep()))
    padded = Cond(
        image_emb=cond.image_emb,
        text_mask=cond.text_mask,
        text_seq=torch.where(cond.text_mask[..., None], cond.text_seq, 100.0),
        tokens=torch.where(cond.text_mask, cond.tokens, 49),
    )
    assert_close(net(x_t, timestep, net.prepare(padded, Keep())), out, atol=1e-5, rtol=1e-5)
    short = Cond(
        image_emb=cond.image_emb,
        text_mask=cond.text_mask[:, :4],
        text_seq=cond.text_seq[:, :4],
        tokens=cond.tokens[:, :4],
    )
    assert_close(net(x_t, timestep, net.prepare(short, Keep())), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("null_image", "null_text"),
    [(Null.zero, NullText.zero), (Null.learned, NullText.learned), (Null.zero, NullText.empty)],
)
@pytest.mark.parametrize("text", list(DecoderText))
def test_dropped_conditions_are_not_seen_and_equal_missing_ones(
    text: DecoderText, null_image: Null, null_text: NullText
):
    net = make_net(text, text_emb=True, null_image=null_image, null_text=null_text)
    if null_text is NullText.empty:
        net.text_proj.set_empty_caption(torch.tensor([48, 49]), torch.randn(D), torch.randn(2, D))
    cond, x_t, timestep = make_cond(), torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999])
    nothing, everything = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    full = net(x_t, timestep, net.prepare(cond, Keep(everything, everything)))
    assert_close(net(x_t, timestep, net.prepare(cond, Keep())), full, atol=1e-6, rtol=0)
    for missing, keep in (
        (cond.without_image(), Keep(nothing, everything)),
        (cond.without_text(), Keep(everything, nothing)),
        (cond.without_text().without_image(), Keep(nothing, nothing)),
    ):
        dropped = net(x_t, timestep, net.prepare(cond, keep))
        assert ((dropped - full).abs().amax((1, 2, 3)) > 1e-3).all()
        assert_close(net(x_t, timestep, net.prepare(missing, Keep())), dropped, atol=1e-5, rtol=1e-5)


def test_a_row_is_dropped_alone_and_guidance_halves_agree_with_separate_runs():
    net = make_net(DecoderText.transformer)
    cond, x_t, timestep = make_cond(), torch.randn(3, 3, 16, 16), torch.tensor([5, 5, 5])
    context = net.prepare(Cond.cat(cond, cond), Keep.halves(3, torch.device("cpu")))
    both = net(torch.cat((x_t, x_t)), timestep.repeat(2), context)
    assert_close(both[:3], net(x_t, timestep, net.prepare(cond, Keep())), atol=1e-5, rtol=1e-5)
    null = net.prepare(cond.without_text().without_image(), Keep())
    assert_close(both[3:], net(x_t, timestep, null), atol=1e-5, rtol=1e-5)
    assert_close(net(x_t, timestep, context.first(3)), both[:3], atol=1e-5, rtol=1e-5)


def test_own_tokens_enter_the_timestep_embedding_as_their_sum():
    net = make_net(DecoderText.tokens, image=False).text_proj
    tokens = torch.tensor([[3, 7, 7, 49, 0], [5, 49, 0, 0, 0]])  # 49 ends the caption
    emb, states, mask = net(Cond(tokens=tokens), Keep())
    table = net.token_embedding.weight
    assert_close(emb[0], net.pooled_proj((table[3] + 2 * table[7] + table[49]) / 2), atol=1e-5, rtol=1e-5)
    assert_close(emb[1], net.pooled_proj((table[5] + table[49]) / 2**0.5), atol=1e-5, rtol=1e-5)
    assert mask.tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3]
    assert_close(states[0, 1], net.text_encoder_hidden_states_norm(net.encoder_hidden_states_proj(table[7])))
    assert not net(Cond(tokens=tokens), Keep(text=torch.tensor([False, False])))[0].any()


def test_image_tokens_are_channel_major():
    net = make_net(DecoderText.none)
    emb = torch.randn(2, D)
    _, tokens, mask = net.text_proj(Cond(image_emb=emb), Keep())
    flat = net.text_proj.clip_extra_context_tokens_proj(emb)
    assert mask is None
    assert_close(tokens[:, 1], flat[:, 1::4])


@pytest.mark.parametrize("patch", [1, 2])
def test_from_scratch_the_output_is_zero_and_every_weight_learns_after_a_step(patch: int):
    torch.manual_seed(0)
    cfg = UNetConfig(channels=[16, 32], num_blocks=1, attention_levels=[1], head_dim=8, groups=8, patch=patch)
    conditioning = ConditioningConfig(
        text=DecoderText.transformer, context_dim=20, transformer=TextTransformerConfig(width=16, depth=1, num_heads=2)
    )
    net = DecoderNet(cfg, conditioning, WIDTHS, out_channels=6)
    cond, x_t, timestep, target = (
        make_cond(),
        torch.randn(3, 3, 16, 16),
        torch.tensor([0, 500, 999]),
        torch.randn(3, 6, 16, 16),
    )
    out = net(x_t, timestep, net.prepare(cond, Keep()))
    assert out.shape == (3, 6, 16, 16)
    assert out.abs().max() == 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):  # a zero layer opens its inputs' gradients one step later
        optimizer.zero_grad()
        (net(x_t, timestep, net.prepare(cond, Keep())) - target).square().mean().backward()
        optimizer.step()
    silent = [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        cfg = UNetConfig([16, 32], 1, [1], head_dim=8, groups=8, gradient_checkpointing=checkpointing)
        net = make_net(DecoderText.clip_states, cfg=cfg)
        out = net(torch.ones(3, 3, 16, 16), torch.tensor([0, 500, 999]), net.prepare(make_cond(), Keep()))
        out.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    for name, grad in gradients[0].items():
        assert_close(gradients[1][name], grad, msg=name)


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_runs_each_block_and_attention_twice(checkpointing: bool, times: int):
    cfg = UNetConfig([16, 32], 1, [1], head_dim=8, groups=8, gradient_checkpointing=checkpointing)
    net = make_net(DecoderText.clip_states, cfg=cfg)
    runs = Counter[object]()
    blocks = [m for m in net.unet.modules() if isinstance(m, ResnetBlock | ContextAttention)]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: runs.update([module]))
    net(
        torch.ones(3, 3, 16, 16), torch.tensor([0, 500, 999]), net.prepare(make_cond(), Keep())
    ).square().sum().backward()
    assert {type(block) for block in blocks} == {ResnetBlock, ContextAttention}
    assert {runs[block] for block in blocks} == {times}


def test_channels_last_gives_the_same_picture():
    net = make_net(DecoderText.clip_states)
    cond, x_t, timestep = make_cond(), torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999])
    out = net(x_t, timestep, net.prepare(cond, Keep()))
    net = net.to(memory_format=torch.channels_last)
    x_t = x_t.to(memory_format=torch.channels_last)
    assert_close(net(x_t, timestep, net.prepare(cond, Keep())), out, atol=1e-5, rtol=1e-5)


def count(cfg: UNetConfig, in_channels: int, out_channels: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(cfg, in_channels, out_channels).parameters())


def test_parameter_counts_of_the_published_sizes():
    upsampler = UNetConfig(channels=[320, 640, 960, 1280], num_blocks=3, scale_shift=False)
    assert count(upsampler, 6, 3) == 691_579_523  # Karlo's super_res_first
    paper = UNetConfig(channels=[320, 640, 960, 1280], num_blocks=3)
    assert round(count(paper, 6, 6) / 1e6, -1) == 730  # the paper's "700M" 64 to 256 upsampler
    last = UNetConfig(channels=[192, 192, 384, 384, 768, 768], num_blocks=2)
    assert round(count(last, 6, 6) / 1e6) == 282  # its "300M" 256 to 1024 upsampler
    with torch.device("meta"):
        karlo = DecoderNet(
            UNetConfig(channels=[320, 640, 960, 1280], num_blocks=3, attention_levels=[1, 2, 3]),
            ConditioningConfig(text=DecoderText.clip_states, text_emb=True, context_dim=1536, null_image=Null.learned),
            ClipWidths(embed_dim=768, text_width=768),
            out_channels=6,
        )
    assert sum(parameter.numel() for parameter in karlo.unet.parameters()) == 885_439_686
    assert sum(parameter.numel() for parameter in karlo.text_proj.parameters()) == 7_878_400


def test_refuses_shapes_it_cannot_build():
    with pytest.raises(ValueError, match="does not divide channels"):
        UNetConfig(channels=[48, 64])
    with pytest.raises(ValueError, match="head_dim=64 does not divide"):
        UNetConfig(channels=[32, 96], attention_levels=[1])
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        UNetConfig(channels=[32, 64], attention_levels=[2])
    with pytest.raises(ValueError, match="no condition"):
        ConditioningConfig(image=False)
    with pytest.raises(ValueError, match="multiples of 2"):
        UNet(UNetConfig([16, 32], groups=8), 3, 3)(torch.zeros(1, 3, 9, 8), torch.zeros(1), UNetContext())


@pytest.mark.parametrize(("scale_shift", "resample"), [(True, ""), (False, "up"), (True, "down")])
def test_between_the_convolutions_the_precision_is_theirs(scale_shift: bool, resample: str):
    """A GPU's autocast computes group norms in float32; what follows must not stay there."""
    block = ResnetBlock(UNetConfig([16], 1, groups=8, scale_shift=scale_shift), 16, 32, resample).bfloat16()
    block.time_emb_proj.float()
    seen: list[torch.dtype] = []
    for module in block.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda *given: given[2].float())
        elif isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    emb = torch.randn(2, UNetConfig([16], 1, groups=8).time_dim)
    block.time_emb_proj.register_forward_hook(lambda *given: given[2].bfloat16())
    out = block(torch.randn(2, 16, 8, 8).bfloat16(), emb)
    assert seen == [torch.bfloat16] * 3
    assert out.dtype == torch.bfloat16
