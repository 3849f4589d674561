"""The decoders of table 3, of Karlo and ours by their sizes: each is built on the meta device, its parameters are counted."""

import math
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from unclip.cli.train import CONF
from unclip.config import typed
from unclip.diffusion.gaussian import GaussianDiffusion, Predict
from unclip.diffusion.samplers import Sampler
from unclip.diffusion.schedule import ScheduleName
from unclip.models import Interface, build
from unclip.models.decoder import Decoder, EmbeddingNorm
from unclip.nets.conditioned import DecoderText, NullText
from unclip.nets.layers import Null
from unclip.train import DecoderTrainConfig

PAPERS_CLIP = Interface(embed_dim=1024, text_width=1024, context_length=256, vocab_size=49408)
VIT_L_14 = Interface(embed_dim=768, text_width=768, context_length=77, vocab_size=49408)


def preset(name: str, interface: Interface = VIT_L_14) -> tuple[DecoderTrainConfig, Decoder]:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        raw = compose("train_decoder", [f"experiment={name}", "run=r", "data.path=d"])
    cfg = typed(raw, DecoderTrainConfig)
    with FakeTensorMode():  # meta tensors that say they are on the CPU
        return cfg, build(cfg.model, interface)


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_decoder():
    """Table 3: "3.5B". The U-Net is 2.24 B, the text transformer 1.21 B (12 w² in each of 24 blocks of width 2048), its table of
    49,408 tokens 0.10 B: 3.57 B, or 3.47 B without that table."""
    cfg, decoder = preset("paper_decoder", PAPERS_CLIP)
    net, transformer = decoder.net.unet, decoder.net.text_proj.transformer
    assert count(net) == 2_238_164_486
    assert count(transformer.transformer_blocks) == 24 * (12 * 2048**2 + 13 * 2048)
    assert (transformer.token_embedding.weight.numel(), transformer.positional_embedding.shape[1]) == (
        49408 * 2048,
        256,
    )
    assert count(decoder) == 3_567_371_782 == pytest.approx(3.5e9, rel=0.02)

    assert decoder.cfg.image_size == 64
    shape = decoder.cfg.net
    assert (shape.channels, shape.num_blocks, shape.head_dim) == ([512, 1024, 1536, 2048], 3, 64)
    assert [64 // 2**level for level in shape.attention_levels] == [32, 16, 8]
    assert shape.dropout == 0.1
    text = decoder.cfg.conditioning
    assert (text.text, text.num_image_tokens, text.text_emb) == (DecoderText.transformer, 4, False)
    assert (text.transformer.width, text.transformer.depth, text.transformer.num_heads) == (2048, 24, 32)
    assert (decoder.cfg.drop_image, decoder.cfg.drop_text) == (0.1, 0.5)
    diffusion = decoder.cfg.diffusion
    assert (diffusion.schedule, diffusion.num_timesteps) == (ScheduleName.cosine, 1000)
    assert (diffusion.predict, diffusion.learned_variance) == (Predict.eps, True)
    how = decoder.default_sampling()
    assert (how.sampler.name, how.sampler.num_steps, how.guidance.scale) == (Sampler.ancestral, 250, 1.25)
    assert (cfg.trainer.batch_size, cfg.trainer.max_steps) == (2048, 800_000)
    optim = cfg.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps) == (1.2e-4, 0.9, 0.999, 1e-8)
    assert (optim.weight_decay, optim.ema_decay) == (0.0, 0.9999)


def test_karlos_decoder_has_the_published_counts():
    _, decoder = preset("karlo_decoder")
    assert count(decoder.net.unet) == 885_439_686
    assert count(decoder.net.text_proj) == 7_878_400
    cfg = decoder.cfg
    assert (cfg.embedding_norm, cfg.diffusion.float32_tables) == (EmbeddingNorm.raw, True)
    assert (cfg.conditioning.null_image, cfg.conditioning.null_text) == (Null.learned, NullText.empty)
    assert (cfg.drop_image, cfg.drop_text, cfg.net.dropout) == (0.1, 0.3, 0.1)


def test_the_base_of_128_pixels():
    """ADM's net for ImageNet at 128 px has 422 M parameters (Dhariwal & Nichol 2021, table 11); ours has a context beside."""
    _, decoder = preset("base128")
    assert decoder.cfg.image_size == 128
    assert [128 // 2**level for level in decoder.cfg.net.attention_levels] == [32, 16, 8]
    assert count(decoder) == 451_728_131
    cosine = replace(decoder.cfg.diffusion, resolution=None)
    shifted, plain = (GaussianDiffusion(cfg).schedule.half_log_snr[::100] for cfg in (decoder.cfg.diffusion, cosine))
    assert_close(shifted, plain - math.log(2), atol=1e-4, rtol=1e-4)  # twice the noise for twice the side


def test_the_tiny_decoder_is_tiny():
    _, decoder = preset("tiny_decoder", Interface(64, 64, 32, 49408))
    assert count(decoder) - decoder.net.text_proj.transformer.token_embedding.weight.numel() < 2.5e6
