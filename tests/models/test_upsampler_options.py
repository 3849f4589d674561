"""The second net, tiles, sizes, and bad input of the upsamplers."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import to_plain
from unclip.data.batch import Batch
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.diffusion.settings import DiffusionConfig, Predict
from unclip.errors import ConfigError
from unclip.models.interface import Interface
from unclip.models.pictures import Bsr, resize, to_range
from unclip.models.sampling import UpsamplerSampling
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.nets.unet import UNetConfig

NET = UNetConfig(channels=[8, 16], num_blocks=1, groups=8, scale_shift=False)
DDIM = UpsamplerSampling(SamplerConfig(Sampler.ddim, 4))
X0 = DiffusionConfig(predict=Predict.x0, clip_range=1.0)


def make(**options) -> Upsampler:
    torch.manual_seed(0)
    model = Upsampler(
        UpsamplerConfig(**{"low_size": 8, "image_size": 32, "net": NET, "sampling": DDIM, **options}), Interface()
    )
    with torch.no_grad():
        for net in (model.net, model.last_net):
            if net is not None:
                net.unet.conv_out.weight.normal_(std=0.1)
    return model.eval()


def some_batch(size: int = 3, **columns) -> Batch:
    image = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(position=list(range(size)), key=["k"] * size, caption=["c"] * size, image=image, **columns)


class Constant(nn.Module):
    """Predicts one value; remembers what it saw."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.seen = value, list[tuple[int, Tensor]]()

    def prepare(self, low, noise_level):
        self.low = low
        return self

    def cut(self, rows, columns):
        return self

    def forward(self, x_t, timestep, context):
        self.seen.append((int(timestep[0]), x_t))
        return torch.full_like(x_t, self.value)


def saved(model: Upsampler, folder: Path) -> Path:
    artifact.save(folder, model, Manifest("upsampler", "upsampler", to_plain(model.cfg), to_plain(Interface())))
    return folder


def test_the_second_net_begins_as_the_first_and_alone_learns(tmp_path: Path):
    first = make()
    model = make(last_steps=1, first=str(saved(first, tmp_path / "first")))
    model.fit(None)
    assert model.last_net is not None
    for name, value in first.net.state_dict().items():
        assert torch.equal(model.net.state_dict()[name], value)
        assert torch.equal(model.last_net.state_dict()[name], value)
    sum(model.losses(some_batch(), Noise(range(3))).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None and not p.requires_grad for p in model.net.parameters())
    assert model.last_net.unet.conv_out.weight.grad is not None

    with torch.no_grad():
        model.last_net.unet.conv_out.weight.mul_(3)
    low, noise = torch.zeros(2, 3, 8, 8), Noise(range(2))
    drawn = model.sample(low, DDIM, noise)
    assert (drawn - first.sample(low, DDIM, noise)).abs().max() > 1e-4
    saved(model, tmp_path / "both")
    shutil.rmtree(tmp_path / "first")
    loaded, _ = artifact.load(tmp_path / "both", kind="upsampler")
    assert isinstance(loaded, Upsampler)
    assert torch.equal(loaded.sample(low, DDIM, noise), drawn)


def test_the_second_net_takes_the_last_steps_and_learns_their_noise_levels():
    model = make(last_steps=2, diffusion=X0, sampling=replace(DDIM, sampler=SamplerConfig(Sampler.ddim, 7)))
    model.net, model.last_net = Constant(-0.5), Constant(0.25)  # type: ignore[assignment]
    drawn = model.sample(torch.zeros(1, 3, 8, 8), model.cfg.sampling, Noise([0]))
    assert [step for step, _ in model.net.seen] == [999, 832, 666, 500, 333]
    assert [step for step, _ in model.last_net.seen] == [166, 0]
    assert_close(drawn, torch.full_like(drawn, 0.25), atol=0.02, rtol=0)
    steps = model.last_diffusion.draw_steps(Noise(range(4000)))
    assert 0 <= steps.min() < 5
    assert 328 < steps.max() < 333
    assert_close(steps.float().mean(), torch.tensor(166.0), atol=5, rtol=0)


def test_the_second_net_is_not_asked_at_more_noise_than_it_learnt():
    model = make(last_steps=2, diffusion=X0, sampling=replace(DDIM, sampler=SamplerConfig(Sampler.ddim, 7)))
    low = torch.zeros(1, 3, 8, 8)
    model.sample(
        low, replace(DDIM, sampler=SamplerConfig(Sampler.ddim, 5)), Noise([0])
    )  # steps 250 and 0; it learnt 333
    with pytest.raises(ConfigError, match="num_steps is 3, but the second net learnt the last 2 of 7 steps"):
        model.sample(low, replace(DDIM, sampler=SamplerConfig(Sampler.ddim, 3)), Noise([0]))  # 500


def test_the_second_nets_bound_is_a_sum_over_its_own_steps():
    model = make(last_steps=1, sampling=replace(DDIM, sampler=SamplerConfig(Sampler.ddim, 7)))
    assert model.diffusion.num_trained_steps == 1000
    assert model.last_diffusion.num_trained_steps == round(999 / 6)


def test_with_heun_the_second_net_takes_levels_of_which_there_are_half():
    sampling = replace(DDIM, sampler=SamplerConfig(Sampler.heun, 7))
    model = make(last_steps=1, diffusion=X0, sampling=sampling)
    model.net, model.last_net = Constant(-0.5), Constant(0.25)  # type: ignore[assignment]
    model.sample(torch.zeros(1, 3, 8, 8), sampling, Noise([0]))
    assert [step for step, _ in model.net.seen] == [999, 666, 666, 333, 333]
    assert [step for step, _ in model.last_net.seen] == [0, 0]
    assert 328 < model.last_diffusion.draw_steps(Noise(range(4000))).max() < 333
    with pytest.raises(ValueError, match="nothing is left for the first one"):
        make(last_steps=3, sampling=replace(DDIM, sampler=SamplerConfig(Sampler.heun, 4)))


def test_a_second_net_wants_the_run_of_one_like_it(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"give its run with model\.first=RUN"):
        make(last_steps=1).fit(None)
    other = saved(make(net=replace(NET, num_blocks=2)), tmp_path / "other")
    with pytest.raises(ConfigError, match="differs from this run in sizes, net, condition, diffusion or split"):
        make(last_steps=1, first=str(other)).fit(None)
    with pytest.raises(ValueError, match="set last_steps=1"):
        make(first="runs/first")
    with pytest.raises(ValueError, match="nothing is left for the first one; take more steps"):
        make(last_steps=4)
    with pytest.raises(ValueError, match="nothing is left for the first one"):
        make(last_steps=2).sample(
            torch.zeros(1, 3, 8, 8), replace(DDIM, sampler=SamplerConfig(num_steps=2)), Noise([0])
        )


def test_tiles_are_cut_from_one_noise_and_blend_to_the_whole():
    model, noise = make(), Noise([5])
    low = resize(torch.linspace(-1, 1, 32).expand(1, 3, 32, 32), 16)
    how = replace(DDIM, tile=32, tile_overlap=16)
    whole, tiled = model.sample(low, DDIM, noise), model.sample(low, how, noise)
    assert (whole - tiled).abs().mean() < 0.05 * whole.std()
    assert torch.equal(model.sample(low[..., :8, :8], how, noise), model.sample(low[..., :8, :8], DDIM, noise))
    model.net = Constant(0.0)  # type: ignore[assignment]
    model.sample(low, how, noise)
    x_T = noise.normal((3, 64, 64), "x_T")
    first = [x for step, x in model.net.seen if step == 999]
    assert all(x.shape == (1, 3, 32, 32) for x in first)
    assert torch.equal(first[-1], x_T[:, :, 32:, 32:])
    corners = [(r, c) for r in (0, 16, 32) for c in (0, 16, 32)]
    found = [any(torch.equal(x, x_T[:, :, r : r + 32, c : c + 32]) for x in first) for r, c in corners]
    assert all(found)


def test_tile_settings_that_do_not_go_are_refused():
    with pytest.raises(ValueError, match="must lie between 0 and half of tile=32"):
        replace(DDIM, tile=32, tile_overlap=20)
    with pytest.raises(ValueError, match=r"sampling\.tile is 33 pixels, not a multiple of 2"):
        make(sampling=replace(DDIM, tile=33, tile_overlap=4))
    with pytest.raises(ValueError, match=r"sampling\.tile_overlap is 3 pixels, not a multiple of 2"):
        make().sample(torch.zeros(1, 3, 8, 8), replace(DDIM, tile=16, tile_overlap=3), Noise([0]))


def test_other_sizes_than_the_trained_one():
    model = make()
    for height, width in ((8, 16), (12, 8), (4, 4)):
        drawn = model.sample(torch.zeros(1, 3, height, width), DDIM, Noise([0]))
        assert drawn.shape == (1, 3, 4 * height, 4 * width)


@pytest.mark.parametrize("sampler", [Sampler.ddim, Sampler.ancestral, Sampler.dpmpp_2m])
def test_one_step_gives_the_predicted_picture(sampler: Sampler):
    model = make(diffusion=X0)
    model.net = Constant(0.3)  # type: ignore[assignment]
    drawn = model.sample(torch.zeros(2, 3, 8, 8), UpsamplerSampling(SamplerConfig(sampler, 1)), Noise(range(2)))
    assert_close(drawn, torch.full_like(drawn, 0.3), atol=1e-4, rtol=0)
    assert [step for step, _ in model.net.seen] == [999]
    eps = make().sample(torch.zeros(2, 3, 8, 8), UpsamplerSampling(SamplerConfig(sampler, 1)), Noise(range(2)))
    assert eps.abs().max() <= 1


def test_a_low_resolution_picture_that_is_not_finite_is_named_and_spoils_no_other():
    low = torch.zeros(3, 3, 8, 8)
    low[1, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"rows \[1\] of the low-resolution pictures hold numbers that are not finite"):
        make().sample(low, DDIM, Noise(range(3)))
    net, context = make().net, make().net.prepare(resize(low, 32))
    out = net(torch.zeros(3, 3, 32, 32), torch.tensor([5, 5, 5]), context)
    assert out.isfinite().flatten(1).all(1).tolist() == [True, False, True]


def test_guidance_is_refused_when_the_settings_are_read():
    for guidance in (Guidance(2.0), Guidance(0.0), Guidance(rescale=0.5), Guidance(interval=(0.2, 0.8))):
        with pytest.raises(ValueError, match="nothing to guide by"):
            UpsamplerSampling(guidance=guidance)


def test_degraded_pictures_come_from_the_loader():
    model = make(bsr=Bsr.light, blur_prob=0.0, crop_fraction=1.0)
    low = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seen = []
    model.diffusion.losses = lambda net, x0, context, noise: seen.append((x0, context.low)) or {}
    model.losses(some_batch(low=low), Noise(range(3)))
    assert torch.equal(seen[0][1], resize(to_range(low), 32))
    with pytest.raises(ValueError, match="the batch has no column low"):
        model.losses(some_batch(), Noise(range(3)))


def test_pictures_that_are_not_square_are_refused():
    batch = some_batch()
    batch.image = torch.zeros(3, 3, 32, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\(32, 48\) pixels, which are not square: set data\.image_size=32"):
        make().losses(batch, Noise(range(3)))
