"""The published upsamplers by their sizes: each preset is built on the meta device, its parameters are counted."""

import pytest
from hydra import compose, initialize_config_dir
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unclip.cli.train import CONF
from unclip.config import typed
from unclip.diffusion.samplers import Sampler
from unclip.diffusion.schedule import ScheduleName
from unclip.diffusion.settings import Predict
from unclip.models import Interface, build
from unclip.models.pictures import Bsr
from unclip.models.upsampler import Upsampler
from unclip.train import UpsamplerTrainConfig


def preset(name: str) -> tuple[UpsamplerTrainConfig, Upsampler]:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = typed(compose("train_upsampler", [f"experiment={name}", "run=r", "data.path=d"]), UpsamplerTrainConfig)
    with FakeTensorMode():  # meta tensors that say they are on the CPU
        return cfg, build(cfg.model, Interface())


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "sizes", "millions", "schedule", "steps", "dropout", "batch", "lr"),
    [
        ("paper_upsampler_256", (64, 256, 64), 730, ScheduleName.cosine, 27, 0.1, 1024, 1.2e-4),
        ("paper_upsampler_1024", (256, 1024, 256), 282, ScheduleName.linear, 15, 0.0, 512, 1.0e-4),
    ],
)
def test_the_papers_upsamplers(name, sizes, millions, schedule, steps, dropout, batch, lr):
    """Table 3; its "700M" and "300M" are 730 M and 282 M by its own widths."""
    cfg, model = preset(name)
    assert (cfg.model.low_size, cfg.model.image_size, cfg.model.crop_size) == sizes
    assert count(model) == pytest.approx(millions * 1e6, rel=0.003)
    assert not cfg.model.net.attention_levels
    diffusion, how = cfg.model.diffusion, model.default_sampling()
    assert (diffusion.schedule, diffusion.num_timesteps, diffusion.predict) == (schedule, 1000, Predict.eps)
    assert (how.sampler.name, how.sampler.num_steps, how.sampler.eta) == (Sampler.ddim, steps, None)
    assert cfg.model.net.dropout == dropout
    assert (cfg.trainer.batch_size, cfg.trainer.max_steps) == (batch, 1_000_000)
    optim = cfg.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (lr, 0.9, 0.999, 1e-8, 0.0)
    assert optim.ema_decay == 0.9999


def test_the_first_upsampler_blurs_and_the_second_degrades():
    first, second = (preset(f"paper_upsampler_{size}")[0].model for size in (256, 1024))
    assert (first.blur_sigma, first.bsr, first.max_noise) == (0.6, Bsr.none, 0.0)
    assert first.blur_prob > 0
    assert (second.bsr, second.blur_prob, second.max_noise) == (Bsr.light, 0.0, 0.0)
    assert first.image_size == second.low_size


def test_karlos_upsampler_has_the_published_count_twice():
    cfg, model = preset("karlo_upsampler")
    assert model.last_net is not None
    assert count(model.net) == count(model.last_net) == 691_579_523
    how = model.default_sampling()
    assert (how.sampler.name, how.sampler.num_steps, cfg.model.last_steps) == (Sampler.ancestral, 7, 1)
    assert (cfg.model.diffusion.learned_variance, cfg.model.diffusion.float32_tables) == (False, True)
    assert (cfg.model.low_size, cfg.model.image_size, cfg.model.net.dropout) == (64, 256, 0.0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 691_579_523


def test_the_tiny_upsampler_is_tiny():
    cfg, model = preset("tiny_upsampler")
    assert count(model) < 1e6
    assert cfg.model.image_size == 4 * cfg.model.low_size
