from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from unclip.data.batch import Batch
from unclip.diffusion.guidance import Guidance, Threshold
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.diffusion.settings import DiffusionConfig, Predict
from unclip.models.interface import Interface
from unclip.models.pictures import blur, crop, resize, to_range
from unclip.models.sampling import UpsamplerSampling
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.nets.unet import UNetConfig

NET = UNetConfig(channels=[8, 16], num_blocks=1, groups=8, scale_shift=False)
DDIM = UpsamplerSampling(SamplerConfig(Sampler.ddim, 3))


def make(net: UNetConfig = NET, **options) -> Upsampler:
    torch.manual_seed(0)
    model = Upsampler(UpsamplerConfig(**{"low_size": 8, "image_size": 32, "net": net, **options}), Interface())
    with torch.no_grad():
        model.net.unet.conv_out.weight.normal_(std=0.1)
    return model.eval()


def smooth_batch(size: int = 7, pixels: int = 32) -> Batch:
    """Pictures that lose next to nothing at a quarter of their size."""
    grid = torch.linspace(0, 1, pixels)
    phase = torch.arange(size)[:, None, None] / size
    plane = ((grid[:, None] + 0.5 * grid + phase) * 3).sin()
    image = ((plane + 1) * 127.5).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    return Batch(position=list(range(10, 10 + size)), key=["k"] * size, caption=["c"] * size, image=image)


class Recorder(nn.Module):
    def prepare(self, low, noise_level):
        self.low, self.noise_level = low, noise_level
        return self

    def first(self, n):
        return self

    def forward(self, x_t, timestep, context):
        self.x_t = x_t
        return torch.zeros_like(x_t)


def test_the_config_is_usable_by_omegaconf():
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(UpsamplerConfig), {"blur_prob": 0.25}))
    assert isinstance(cfg, UpsamplerConfig)
    assert (cfg.blur_prob, cfg.crop_size, cfg.sampling.sampler.num_steps) == (0.25, 64, 27)


def test_the_blur_is_a_gaussian_of_three_pixels():
    spot = torch.zeros(1, 2, 5, 5)
    spot[0, 1, 2, 2] = 1
    out = blur(spot, 0.6)
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 0.36))
    line = line / line.sum()
    assert_close(out[0, 1, 1:4, 1:4], line[:, None] * line)
    assert out[0, 0].abs().max() == 0
    assert_close(blur(torch.full((1, 3, 4, 4), 0.7), 0.6), torch.full((1, 3, 4, 4), 0.7))


def test_each_picture_is_cut_at_its_own_corner():
    image = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6)
    out = crop(image, torch.tensor([0, 3]), torch.tensor([2, 1]), 3)
    assert out.is_contiguous(), "CPUs are slow in channels_last"
    assert torch.equal(out[0], image[0, :, 0:3, 2:5])
    assert torch.equal(out[1], image[1, :, 3:6, 1:4])


def test_low_and_high_crops_show_the_same_place():
    model = make(blur_prob=0.0, crop_fraction=0.5)
    model.net = Recorder()
    seen = []
    model.diffusion.losses = lambda net, x0, context, noise: seen.append((x0, context.low)) or {}
    batch = smooth_batch()
    model.losses(batch, Noise.at(0, batch.position))
    high, low = seen[0]
    assert high.shape == low.shape == (7, 3, 16, 16)
    assert (high - low)[:, :, 2:-2, 2:-2].abs().max() < 0.1
    assert (high - low.roll(4, dims=-1)).abs().mean() > 0.1
    full = to_range(batch.image)
    corners = [
        [(t, x) for t in range(17) for x in range(17) if torch.equal(full[i, :, t : t + 16, x : x + 16], high[i])]
        for i in range(7)
    ]
    # corners are drawn per sample, on the grid of the low-resolution pixels (4) and the net's stride (2)
    assert all(any(t % 4 == 0 and x % 4 == 0 for t, x in found) for found in corners)
    assert len({found[0] for found in corners}) > 3


def test_blur_is_drawn_per_sample_at_the_set_rate():
    model = make(blur_prob=0.3)
    batch_size = 2000
    low = torch.zeros(batch_size, 3, 4, 4)
    low[:, :, 1, 1] = 1
    blurred = model._blurred(low, Noise(range(batch_size)))[:, 0, 1, 1] < 1
    assert_close(blurred.float().mean(), torch.tensor(0.3), atol=0.04, rtol=0)


def test_the_net_is_told_how_much_noise_its_low_resolution_picture_has():
    model = make(max_noise=0.5, blur_prob=0.0, low_size=32, crop_fraction=1.0)
    model.net = Recorder()
    grey = Batch(position=list(range(400)), image=torch.full((400, 3, 32, 32), 128, dtype=torch.uint8))
    model.diffusion.losses = lambda net, x0, context, noise: {}
    model.losses(grey, Noise.at(0, grey.position))
    level = model.net.noise_level
    assert_close(model.net.low.flatten(1).std(dim=1), level, atol=0.03, rtol=0)
    assert_close(level.mean(), torch.tensor(0.25), atol=0.03, rtol=0)
    assert 0 <= level.min() < 0.01
    assert 0.49 < level.max() <= 0.5
    model.sample(torch.zeros(7, 3, 32, 32), replace(DDIM, noise_level=0.2), Noise(range(7)))
    assert_close(model.net.low.std(), torch.tensor(0.2), atol=0.01, rtol=0)
    assert torch.equal(model.net.noise_level, torch.full((7,), 0.2))


@pytest.mark.parametrize("patch", [1, 2])
def test_trained_on_crops_it_runs_on_the_whole_and_alike_in_any_batch(patch: int):
    model, batch = make(replace(NET, patch=patch)), smooth_batch()
    terms = model.losses(batch, Noise.at(0, batch.position))
    assert torch.isfinite(terms["mse"])
    low = model.low_resolution(batch.image)
    assert low.shape == (7, 3, 8, 8)
    steps: list[tuple[int, int]] = []
    together = model.sample(low, DDIM, Noise.at(0, batch.position), on_step=lambda *step: steps.append(step))
    total = DDIM.sampler.num_steps
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert together.shape == (7, 3, 32, 32)
    alone = model.sample(low[4:5], DDIM, Noise.at(0, batch.position[4:5]))
    assert (alone - together[4:5]).abs().mean() <= 1 / 255


@pytest.mark.parametrize("sampler", [name for name in Sampler if name is not Sampler.analytic])
@pytest.mark.parametrize("threshold", list(Threshold))
def test_one_step_is_the_prediction_brought_into_range(sampler: Sampler, threshold: Threshold):
    model, noise = make(diffusion=DiffusionConfig(predict=Predict.v, clip_range=1.0)), Noise(range(7))
    low = 0.9 * torch.randn(7, 3, 8, 8, generator=torch.manual_seed(0)).clamp(-1, 1)
    x_T = noise.normal((3, 32, 32), "x_T")
    with torch.no_grad():
        for parameter in model.net.unet.conv_out.parameters():
            parameter.normal_(std=0.1)  # beyond the range here and there
        output = model.net(x_T, torch.full((7,), 999), model.net.prepare(resize(low, 32)))
    x0 = model.diffusion.schedule.x0_from_v(999, output, x_T)
    assert 0.01 < (x0.abs() > 1).float().mean() < 0.7
    how = UpsamplerSampling(SamplerConfig(sampler, 1), Guidance(threshold=threshold))
    wanted = Guidance(threshold=threshold).limit(x0, 1.0).clamp(-1, 1)
    assert_close(model.sample(low, how, noise), wanted, atol=1e-5, rtol=0)


def test_training_and_sampling_resize_alike():
    model = make()
    model.net = Recorder()
    low = model.low_resolution(smooth_batch().image)
    model.sample(low, DDIM, Noise(range(7)))
    assert torch.equal(model.net.low, resize(low, 32))


def test_bf16_autocast_stays_near_float32():
    model, batch = make(), smooth_batch()
    noise = Noise.at(0, batch.position)
    exact = model.losses(batch, noise)["mse"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.losses(batch, noise)["mse"]
    assert_close(rough, exact, rtol=0.05, atol=0)


def test_losses_and_sampling_never_wait_for_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = Upsampler(UpsamplerConfig(low_size=8, image_size=32, net=NET), Interface())
        batch = Batch(position=[0, 1], image=torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        noise = Noise.at(0, batch.position, "cuda")
        assert model.losses(batch, noise)["mse"].device.type == "cuda"
        assert model.sample(model.low_resolution(batch.image), DDIM, noise).device.type == "cuda"


def test_refused_settings():
    with pytest.raises(ValueError, match="convolution-only"):
        UpsamplerConfig(net=UNetConfig(attention_levels=[1]))
    with pytest.raises(ValueError, match="not a multiple of low_size"):
        UpsamplerConfig(low_size=60)
    with pytest.raises(ValueError, match="the training crop is 10 pixels"):
        UpsamplerConfig(low_size=10, image_size=40, net=UNetConfig([32, 32, 32]))
    with pytest.raises(ValueError, match="self-conditioning is for the diffusion prior"):
        UpsamplerConfig(diffusion=DiffusionConfig(self_conditioning=True))
    with pytest.raises(ValueError, match="raise max_noise or lower the level"):
        UpsamplerConfig(max_noise=0.1, sampling=replace(DDIM, noise_level=0.2))
    with pytest.raises(ValueError, match=r"training knows noise up to max_noise=0\.0"):
        make().sample(torch.zeros(1, 3, 8, 8), replace(DDIM, noise_level=0.1), Noise([0]))
    with pytest.raises(ValueError, match="a standard deviation"):
        replace(DDIM, noise_level=-0.1)
    for guidance in (Guidance(2.0), Guidance(interval=(0.2, 0.8)), Guidance(rescale=0.7)):
        with pytest.raises(ValueError, match="nothing to guide by"):
            replace(DDIM, guidance=guidance)
    with pytest.raises(ValueError, match=r"cannot make 36x32: both must be multiples of 8"):
        make(replace(NET, channels=[8] * 4)).sample(torch.zeros(1, 3, 8, 9), DDIM, Noise([0]))


def test_a_residual_upsampler_starts_as_the_enlarged_picture():
    diffusion = DiffusionConfig(predict=Predict.x0, clip_range=1.0)
    model = Upsampler(
        UpsamplerConfig(low_size=8, image_size=32, net=NET, diffusion=diffusion, residual=True), Interface()
    )
    low = model.low_resolution(smooth_batch().image)
    drawn = model.sample(low, DDIM, Noise(list(range(7)), "cpu"))
    assert_close(drawn, resize(low, 32).clamp(-1, 1))  # conv_out is zero at first


def test_residual_needs_a_predicted_x0():
    with pytest.raises(ValueError, match=r"set diffusion\.predict=x0, or residual=false"):
        UpsamplerConfig(residual=True, diffusion=DiffusionConfig(predict=Predict.v, clip_range=1.0))
