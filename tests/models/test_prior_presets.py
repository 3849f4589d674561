"""The published priors by their sizes: each preset is built on the meta device, its parameters are counted."""

import pytest
from hydra import compose, initialize_config_dir
from torch._subclasses.fake_tensor import FakeTensorMode

from unclip.cli.train import CONF
from unclip.config import typed
from unclip.diffusion.samplers import Sampler
from unclip.models import Interface, build
from unclip.models.diffusion_prior import DiffusionPrior, EmbeddingSpace
from unclip.train import PriorTrainConfig

PAPERS_CLIP = Interface(embed_dim=1024, text_width=1024, context_length=256, vocab_size=49408)
VIT_L_14 = Interface(embed_dim=768, text_width=768, context_length=77, vocab_size=49408)


def preset(name: str, interface: Interface) -> tuple[PriorTrainConfig, DiffusionPrior, int]:
    """Its settings, its prior, and the number of its parameters."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        raw = compose("train_prior", [f"experiment={name}", "run=r", "data.path=d"])
    cfg = typed(raw, PriorTrainConfig)
    with FakeTensorMode():  # meta tensors that say they are on the CPU
        prior = build(cfg.model, interface)
    return cfg, prior, sum(p.numel() for p in prior.parameters())


def test_the_papers_prior():
    """Table 3, with the sizes that the paper gives: "1B" parameters.

    12 w² a block are 1.21 B in 24 blocks of width 2048, a fifth more than the paper states; the count below adds biases and
    norms to that, and to the rest the captions' own table of 49,408 tokens (0.10 B).
    """
    cfg, prior, count = preset("paper_diffusion_prior", PAPERS_CLIP)
    blocks = sum(p.numel() for p in prior.net.transformer_blocks.parameters())
    assert 12 * 2048**2 * 24 == 1_207_959_552
    assert blocks == 24 * (12 * 2048**2 + 13 * 2048)
    tokens = prior.net.token_embedding.weight.numel()
    assert (tokens, prior.net.num_embeddings) == (49408 * 2048, 256)
    assert count - tokens == pytest.approx(1.22e9, rel=0.01)
    assert prior.embedding_scale == pytest.approx(17.2, abs=0.001)
    assert (cfg.trainer.batch_size, cfg.trainer.max_steps) == (4096, 600_000)
    optim = cfg.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps) == (1.1e-4, 0.9, 0.96, 1e-6)
    assert (optim.weight_decay, optim.ema_decay) == (0.06, 0.9999)
    how = prior.default_sampling()
    asked = prior.cfg.sampling.sampler  # ancestral until its variances are there
    assert (asked.name, asked.num_steps) == (Sampler.analytic, 64)
    assert (how.num_candidates, how.guidance.scale) == (2, 1.0)


def test_karlos_prior_has_the_published_count():
    """1,022,030,080 as diffusers counts: its mean and deviation of z_i are parameters there and buffers here."""
    _, prior, count = preset("karlo_prior", VIT_L_14)
    assert count + prior.clip_mean.numel() + prior.clip_std.numel() == 1_022_030_080
    how = prior.default_sampling()
    assert prior.cfg.embedding_space is EmbeddingSpace.whitened
    assert (prior.diffusion.cfg.clip_range, how.sampler.num_steps, how.guidance.scale) == (10.0, 25, 4.0)


def test_laions_prior():
    """Blocks of 12 w² each; LAION's own net has one key and value for all heads and gated perceptrons, so another count."""
    _, prior, count = preset("laion_prior", VIT_L_14)
    blocks = 12 * (12 * 768**2 + 13 * 768)
    assert sum(p.numel() for p in prior.net.transformer_blocks.parameters()) == blocks
    assert count == blocks + 6 * (768**2 + 768) + (81 + 4) * 768  # linear layers; positions, query, null and a norm
    assert prior.embedding_scale == pytest.approx(768**0.5, abs=1e-4)
    assert prior.net.cfg.width // prior.net.cfg.num_heads == 64


def test_the_tiny_prior_is_tiny():
    _, prior, count = preset("tiny_diffusion_prior", Interface(64, 64, 32, 49408))
    assert count - prior.net.token_embedding.weight.numel() < 1e6
