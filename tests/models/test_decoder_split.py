"""A decoder of two nets that share the timesteps."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from models.test_decoder import DDIM, INTERFACE, NET, TEXT, make, make_batch
from torch import Tensor, nn
from torch.testing import assert_close

from unclip import artifact
from unclip.artifact import Manifest
from unclip.cli.train import CONF, forced
from unclip.config import to_plain, typed
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.diffusion.settings import DiffusionConfig, Predict, Timesteps, Weighting
from unclip.errors import ConfigError
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.sampling import DiffusionSampling
from unclip.nets.conditioned import NullText
from unclip.nets.unet import UNetConfig
from unclip.train import DecoderTrainConfig

LAST = UNetConfig(channels=[8, 16], num_blocks=1, attention_levels=[0], head_dim=8, groups=8)
X0 = DiffusionConfig(predict=Predict.x0, clip_range=1.0)
SPLIT: dict[str, Any] = {"split": 0.3, "diffusion": X0}


def saved(model: Decoder, run: Path) -> Path:
    artifact.save(run, model, Manifest("decoder", "decoder", to_plain(model.cfg), to_plain(model.interface)))
    return run


class Constant(nn.Module):
    """Predicts one value; remembers the timesteps that it saw, and how many rows."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.seen = value, list[tuple[int, int]]()
        self.anything = nn.Parameter(torch.zeros(()))

    def prepare(self, cond: Any, keep: Any) -> Any:
        return SimpleNamespace(first=lambda count: None)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        self.seen.append((int(timestep[0]), len(x_t)))
        return torch.full_like(x_t, self.value)


def test_each_net_learns_its_own_timesteps():
    model = make(last_net=LAST, **SPLIT)
    noise = Noise(range(4000))
    first, last = model.diffusion.draw_steps(noise), model.last_diffusion.draw_steps(noise)
    assert (int(first.min()), int(last.max())) == (300, 299)
    assert first.max() == 999
    assert last.min() == 0
    assert_close(first.float().mean(), torch.tensor(649.5), atol=10, rtol=0)
    assert_close(last.float().mean(), torch.tensor(149.5), atol=5, rtol=0)
    assert make().diffusion.trained == range(1000)
    assert (model.diffusion.num_trained_steps, model.last_diffusion.num_trained_steps) == (700, 300)  # the bound's sum


def test_the_second_net_takes_over_in_sampling_with_guidance_and_context_of_its_own():
    model, batch = make(last_net=LAST, **SPLIT), make_batch(2)
    model.net, model.last_net = Constant(-0.5), Constant(0.25)  # type: ignore[assignment]
    how = replace(DDIM, sampler=replace(DDIM.sampler, num_steps=7))
    drawn = model.sample(model.cond(batch), how, Noise(range(2)))
    assert model.net.seen == [(999, 4), (832, 4), (666, 4), (500, 4), (333, 4)]
    assert model.last_net.seen == [(166, 4), (0, 4)]
    assert_close(drawn, torch.full_like(drawn, 0.25), atol=0.02, rtol=0)


def test_the_second_net_alone_learns_and_the_artifact_holds_both(tmp_path: Path):
    first, batch = make(**SPLIT), make_batch()
    model = make(last_net=LAST, first=str(saved(first, tmp_path / "first")), **SPLIT)
    model.fit(None)
    for name, value in first.net.state_dict().items():
        assert torch.equal(model.net.state_dict()[name], value)
    sum(model.losses(batch, Noise(range(4))).values()).backward()  # type: ignore[union-attr]
    assert model.last_net is not None
    assert all(p.grad is None and not p.requires_grad for p in model.net.parameters())
    assert model.last_net.unet.conv_out.weight.grad is not None

    cond, noise = model.cond(batch), Noise(range(4))
    drawn = model.sample(cond, DDIM, noise)
    assert (drawn - first.sample(cond, DDIM, noise)).abs().max() > 1e-3
    noisy = DiffusionSampling(SamplerConfig(num_steps=1), DDIM.guidance)  # at 999: the first net's
    assert torch.equal(model.sample(cond, noisy, noise), first.sample(cond, noisy, noise))
    saved(model, tmp_path / "both")
    shutil.rmtree(tmp_path / "first")
    loaded, _ = artifact.load(tmp_path / "both", kind="decoder")
    assert isinstance(loaded, Decoder)
    assert_close(loaded.sample(cond, DDIM, noise), drawn, atol=1e-5, rtol=0)


def test_both_nets_read_the_caption_that_stands_for_a_dropped_one():
    conditioning = replace(TEXT, null_text=NullText.empty)
    model, batch = make(last_net=LAST, conditioning=conditioning, **SPLIT), make_batch(1)
    tokens = torch.tensor([1, 39, 0, 0, 0, 0])
    model.set_empty_caption(tokens, batch.text_emb[0], batch.text_seq[0])  # type: ignore[index]
    assert model.last_net is not None
    for net in (model.net, model.last_net):
        assert torch.equal(net.text_proj.empty_tokens, tokens[:2])


def test_settings_that_contradict_each_other(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"give its run with model\.first=RUN"):
        make(last_net=LAST, **SPLIT).fit(None)
    with pytest.raises(ValueError, match="set split, or last_net=null"):
        make(last_net=LAST)
    with pytest.raises(ValueError, match="give the second net's shape in last_net"):
        make(first="runs/first", **SPLIT)
    for split in (-0.1, 1.0, 1e-9):
        with pytest.raises(ValueError, match="a share of the timesteps: above 0 and below 1"):
            make(split=split)
    with pytest.raises(ValueError, match=r"set last_net\.attention_levels"):
        make(last_net=replace(LAST, attention_levels=[]), **SPLIT)
    with pytest.raises(ValueError, match="image_size=8 is not a multiple of 16, the stride of last_net"):
        make(last_net=replace(LAST, channels=[8] * 5), **SPLIT)


@pytest.mark.parametrize(
    "other", [{"net": replace(NET, num_blocks=2)}, {"split": 0.5}, {"diffusion": replace(X0, predict=Predict.v)}]
)
def test_the_first_run_is_one_alike(tmp_path: Path, other: dict[str, Any]):
    first = saved(make(**{**SPLIT, **other}), tmp_path / "other")
    with pytest.raises(ConfigError, match="differs from this run in sizes, net, condition, diffusion or split"):
        make(last_net=LAST, first=str(first), **SPLIT).fit(None)


def test_how_each_net_learns_is_its_own_affair(tmp_path: Path):
    first = saved(make(**SPLIT), tmp_path / "first")
    own = {
        "net": replace(NET, dropout=0.1, gradient_checkpointing=True),
        "conditioning": replace(TEXT, transformer=replace(TEXT.transformer, gradient_checkpointing=True)),
        "diffusion": replace(X0, weighting=Weighting.clamped_snr, snr_limit=25.0, timesteps=Timesteps.low_discrepancy),
        "drop_text": 0.2,
        "sampling": DDIM,
    }
    make(last_net=LAST, first=str(first), **{**SPLIT, **own}).fit(None)


def test_the_presets_of_both_nets_fit():
    first, last = (preset(f"emoji_decoder_{which}") for which in ("first", "last"))
    assert first.kind_of_net() == last.kind_of_net()
    assert first.is_half
    assert not last.is_half


def preset(name: str) -> DecoderConfig:
    given = ["run=run", "data.path=data", f"experiment={name}"]
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return typed(compose("train_decoder", [forced(o) for o in given]), DecoderTrainConfig).model


def test_half_a_decoder_is_not_asked_about_the_timesteps_that_it_does_not_know():
    model, batch = make(**SPLIT), make_batch(2)
    model.net = Constant(-0.5)  # type: ignore[assignment]
    for sampler in (Sampler.ddim, Sampler.ancestral, Sampler.dpmpp_2m, Sampler.unipc, Sampler.heun):
        model.net.seen.clear()
        how = replace(DDIM, sampler=SamplerConfig(sampler, 7))
        drawn = model.sample(model.cond(batch), how, Noise(range(2)))
        assert model.net.seen
        assert min(step for step, _ in model.net.seen) >= 300
        assert_close(drawn, torch.full_like(drawn, -0.5), atol=0.02, rtol=0)


def test_the_first_run_is_of_the_same_clip(tmp_path: Path):
    first = saved(make(**SPLIT), tmp_path / "first")
    model = make(last_net=LAST, first=str(first), **SPLIT)
    model.interface = replace(INTERFACE, clip="another")
    with pytest.raises(ConfigError, match="is of another CLIP than the data's embeddings"):
        model.fit(None)
