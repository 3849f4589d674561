"""The same trajectories as the schedulers of diffusers, from the same network and the same draws."""

import pytest
import torch
from torch.testing import assert_close

from unclip.diffusion import (
    DiffusionConfig,
    GaussianDiffusion,
    NoiseSchedule,
    Predict,
    ancestral,
    ddim,
    dpmpp_2m,
    unipc,
)

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 4, 4)
NAMES = {Predict.eps: "epsilon", Predict.x0: "sample", Predict.v: "v_prediction"}


class Draws:
    """A noise that hands out one generator's numbers in the order of the steps, as a diffusers pipeline draws them."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.streams = []

    def normal(self, shape, stream):
        self.streams.append(stream)
        return torch.randn(2, *shape, generator=self.generator)


class Everything:
    def first(self, count):
        return self


class Recording:
    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.shape = denoiser, denoiser.schedule, denoiser.shape
        self.x0 = []

    def __call__(self, x_t, step, last=None):
        prediction = self.denoiser(x_t, step, last)
        self.x0.append(prediction.x0)
        return prediction


def net(channels):
    def forward(x_t, timestep, context):
        first = torch.sin(1.3 * x_t + timestep.reshape(-1, 1, 1, 1) / 300)
        return torch.cat([first, torch.cos(2 * x_t)], dim=1)[:, :channels]

    return forward


def reference(scheduler, timesteps, channels, step):
    """A pipeline's loop; step(output, i, t, x, generator) calls the scheduler."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *SHAPE, generator=generator)
    for i, t in enumerate(timesteps):
        output = net(channels)(x, t.expand(2), None)
        x = step(output, i, t, x, generator).prev_sample
    return x


@pytest.mark.parametrize("variance", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("predict", [Predict.eps, Predict.x0])
@pytest.mark.parametrize("num_steps", [7, 25])
def test_ancestral_is_the_unclip_scheduler(variance, predict, num_steps):
    learned = variance == "learned_range"
    scheduler = diffusers.UnCLIPScheduler(variance_type=variance, prediction_type=NAMES[predict])
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps

    def step(output, i, t, x, generator):
        previous = None if i + 1 == num_steps else timesteps[i + 1]
        return scheduler.step(output, t, x, prev_timestep=previous, generator=generator)

    channels = 6 if learned else 3
    expected = reference(scheduler, timesteps, channels, step)
    diffusion = GaussianDiffusion(
        DiffusionConfig(predict=predict, learned_variance=learned, clip_range=1.0, float32_tables=True)
    )
    denoiser = diffusion.denoiser(net(channels), Everything(), shape=SHAPE, num_steps=num_steps)
    assert denoiser.schedule.timesteps.tolist() == timesteps.flip(0).tolist()
    assert_close(ancestral(denoiser, Draws(0)), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize("predict", list(NAMES))
def test_ancestral_is_the_ddpm_scheduler(beta_schedule, predict):
    scheduler = diffusers.DDPMScheduler(
        1000, beta_schedule=beta_schedule, prediction_type=NAMES[predict], variance_type="fixed_small", clip_sample=True
    )
    scheduler.set_timesteps(1000)
    expected = reference(
        scheduler,
        scheduler.timesteps,
        3,
        lambda output, i, t, x, generator: scheduler.step(output, t, x, generator=generator),
    )
    name = "linear" if beta_schedule == "linear" else "cosine"
    cfg = DiffusionConfig(schedule=name, predict=predict, clip_range=1.0, float32_tables=True)
    denoiser = GaussianDiffusion(cfg).denoiser(net(3), Everything(), shape=SHAPE, num_steps=1000)
    assert_close(ancestral(denoiser, Draws(0)), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("predict", list(NAMES))
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_the_ddim_scheduler(predict, eta):
    """On all steps: with fewer, that scheduler's own grid misses step T - 1 or 0."""
    scheduler = diffusers.DDIMScheduler(
        50, beta_schedule="squaredcos_cap_v2", prediction_type=NAMES[predict], clip_sample=True
    )
    scheduler.set_timesteps(50)
    expected = reference(
        scheduler,
        scheduler.timesteps,
        3,
        lambda output, i, t, x, generator: scheduler.step(
            output, t, x, eta=eta, use_clipped_model_output=True, generator=generator
        ),
    )
    cfg = DiffusionConfig(num_timesteps=50, predict=predict, clip_range=1.0, float32_tables=True)
    denoiser = GaussianDiffusion(cfg).denoiser(net(3), Everything(), shape=SHAPE, num_steps=50)
    assert_close(ddim(denoiser, Draws(0), eta=eta), expected, atol=2e-4, rtol=0)


def multistep(sampler, predict):
    settings = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": NAMES[predict],
        "solver_order": 2,
        "final_sigmas_type": "zero",
    }
    if sampler is unipc:
        return diffusers.UniPCMultistepScheduler(1000, solver_type="bh2", **settings)
    return diffusers.DPMSolverMultistepScheduler(1000, algorithm_type="dpmsolver++", **settings)


@pytest.mark.parametrize("sampler", [dpmpp_2m, unipc], ids=["dpmpp_2m", "unipc"])
@pytest.mark.parametrize("predict", list(NAMES))
def test_second_order_samplers_are_the_multistep_schedulers(sampler, predict):
    """On their grid, which ends above step 0 with the plain prediction: ours gets one cleaner step."""
    scheduler = multistep(sampler, predict)
    scheduler.set_timesteps(20)
    kept = scheduler.timesteps.flip(0)
    expected = reference(
        scheduler, scheduler.timesteps, 3, lambda output, i, t, x, generator: scheduler.step(output, t, x)
    )
    diffusion = GaussianDiffusion(DiffusionConfig(predict=predict))
    denoiser = diffusion.denoiser(net(3), Everything(), shape=SHAPE, num_steps=21)
    alpha_bar = torch.cat([torch.tensor([1 - 1e-9], dtype=torch.float64), diffusion.schedule.alpha_bar.double()[kept]])
    timesteps = torch.cat([torch.tensor([0]), kept])
    denoiser.schedule = NoiseSchedule(alpha_bar, torch.full_like(alpha_bar, 0.5), timesteps)
    predictions = Recording(denoiser)
    sampler(predictions, Draws(0))
    actual = predictions.x0[-2]
    assert (actual - expected).abs().median() < 1e-4 * expected.abs().median()
    assert_close(actual, expected, atol=1e-2, rtol=1e-2)
