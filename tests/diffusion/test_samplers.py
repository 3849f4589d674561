import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from unclip.diffusion import (
    DiffusionConfig,
    GaussianDiffusion,
    Guidance,
    Noise,
    NoiseSchedule,
    Predict,
    Prediction,
    Sampler,
    SamplerConfig,
    ScheduleName,
    Threshold,
    ancestral,
    ddim,
    dpmpp_2m,
    heun,
    make_schedule,
    sample,
    unipc,
)

VP = [Predict.eps, Predict.x0, Predict.v]  # of the variance-preserving schedules
MEAN, STD = 1.5, 0.3
SAMPLERS = {
    "ancestral": lambda denoiser, noise: ancestral(denoiser, noise),
    "ddim": lambda denoiser, noise: ddim(denoiser, noise),
    "ddim eta=0.5": lambda denoiser, noise: ddim(denoiser, noise, eta=0.5),
    "ddim eta=1": lambda denoiser, noise: ddim(denoiser, noise, eta=1.0),
    "dpmpp_2m": lambda denoiser, noise: dpmpp_2m(denoiser, noise),
    "unipc": lambda denoiser, noise: unipc(denoiser, noise),
    "heun": lambda denoiser, noise: heun(denoiser, noise),
}
FEW = {"dpmpp_2m": 40, "unipc": 40, "heun": 40}  # steps of the samplers of higher order


class GaussianDenoiser:
    """E[x0 | x_t] of N(MEAN, STD²), on any schedule."""

    shape = (16,)

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, step, last=None):
        alpha, sigma = self.schedule.alpha[step], self.schedule.sigma[step]
        return Prediction((MEAN * sigma**2 + STD**2 * alpha * x_t) / (sigma**2 + STD**2 * alpha**2))


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("predict", VP)
@pytest.mark.parametrize("schedule", [ScheduleName.cosine, ScheduleName.linear])
def test_samples_have_the_mean_and_spread_of_the_data(name, predict, schedule, exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig(schedule=schedule, predict=predict))
    num_steps = FEW.get(name, 250)
    denoiser = diffusion.denoiser(exact_net(diffusion, STD), means(MEAN, rows=1000), shape=(16,), num_steps=num_steps)
    x = SAMPLERS[name](denoiser, Noise(range(1000)))
    assert_close(x.mean(), torch.tensor(MEAN), atol=0.02, rtol=0)
    assert_close(x.std(), torch.tensor(STD), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("predict", [Predict.x0, Predict.v])
def test_zero_terminal_snr_samples_the_data_too(name, predict, exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig(schedule=ScheduleName.cosine_zero_snr, predict=predict))
    num_steps = FEW.get(name, 250)
    denoiser = diffusion.denoiser(exact_net(diffusion, STD), means(MEAN, rows=1000), shape=(16,), num_steps=num_steps)
    x = SAMPLERS[name](denoiser, Noise(range(1000)))
    assert_close(x.mean(), torch.tensor(MEAN), atol=0.02, rtol=0)
    assert_close(x.std(), torch.tensor(STD), atol=0.02, rtol=0)


@pytest.mark.parametrize("num_steps", [3, 10, 64])
@pytest.mark.parametrize(
    ("eta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (None, 1.0), (0.5, 0.6), (None, 0.6), (None, 0.0)]
)
def test_few_steps_have_the_spread_that_their_updates_imply(num_steps, eta, temperature):
    """Every update is linear in x_t, so mean and variance follow a recursion: here from alpha and sigma alone.

    eta None is ancestral sampling, which must agree with eta = 1. The temperature scales what is new in a step.
    """
    schedule = GaussianDiffusion(DiffusionConfig()).schedule.respaced(num_steps)
    mean, var = 0.0, 1.0
    for step in reversed(range(num_steps)):
        a, s = float(schedule.alpha[step]), float(schedule.sigma[step])
        a_to, s_to = float(schedule.alpha_prev[step]), float(schedule.sigma_prev[step])
        fresh = (1.0 if eta is None else eta) * s_to / s * math.sqrt(1 - (a / a_to) ** 2)
        gain = STD**2 * a / (STD**2 * a**2 + s**2)
        shift = (1 - gain * a) * MEAN
        keep = math.sqrt(s_to**2 - fresh**2) / s
        slope = a_to * gain + keep * (1 - a * gain)
        mean = slope * mean + (a_to - keep * a) * shift
        var = slope**2 * var + (temperature * fresh) ** 2
    noise, denoiser = Noise(range(4000)), GaussianDenoiser(schedule)
    cfg = SamplerConfig(num_steps=num_steps, temperature=temperature)
    x = sample(cfg if eta is None else replace(cfg, name=Sampler.ddim, eta=eta), denoiser, noise)
    error = math.sqrt(var / x.numel())
    assert abs(x.mean() - mean) < 4 * error + 1e-5
    assert abs(x.std() - math.sqrt(var)) < 4 * error + 1e-5


@pytest.mark.parametrize("predict", VP)
@pytest.mark.parametrize("num_steps", [5, 27])
def test_true_variances_need_few_steps(predict, num_steps, exact_net, means):
    """With the exact reverse variance every ancestral step is exact, however large; without it the spread is lost."""
    diffusion = GaussianDiffusion(DiffusionConfig(predict=predict, learned_variance=True, clip_range=1.0))
    schedule = diffusion.schedule.respaced(num_steps)
    denoiser = diffusion.denoiser(
        exact_net(diffusion, STD, schedule),
        means(MEAN, rows=1000),
        shape=(16,),
        num_steps=num_steps,
        guidance=Guidance(threshold=Threshold.none),
    )
    x = ancestral(denoiser, Noise(range(1000)))
    assert_close(x.mean(), torch.tensor(MEAN), atol=0.01, rtol=0)
    assert_close(x.std(), torch.tensor(STD), atol=0.01, rtol=0)
    assert ancestral(GaussianDenoiser(schedule), Noise(range(1000))).std() < STD - (0.07 if num_steps == 5 else 0.02)


def test_ddim_with_eta_one_is_ancestral_sampling():
    denoiser = GaussianDenoiser(GaussianDiffusion(DiffusionConfig()).schedule.respaced(50))
    noise = Noise(range(8))
    assert_close(ddim(denoiser, noise, eta=1.0), ancestral(denoiser, noise), atol=1e-4, rtol=0)


def flow_error(sampler, num_steps):
    """Distance to the exact probability-flow solution, on a schedule that is even in log-SNR from -4 to 4.

    Its last step is short, since dpmpp_2m and unipc take that one, onto the cleanest level, by first order.
    """
    lam = torch.cat([torch.tensor([4.0001]), torch.linspace(4, -4, num_steps - 1)]).double()
    alpha_bar = torch.sigmoid(2 * lam)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    schedule = NoiseSchedule(alpha_bar, 1 - alpha_bar / before, torch.arange(num_steps))
    denoiser, x_T = GaussianDenoiser(schedule), Noise(range(4)).normal((16,), "x_T")

    def marginal_std(step):
        return ((schedule.alpha[step] * STD) ** 2 + schedule.sigma[step] ** 2).sqrt()

    z = (x_T - schedule.alpha[-1] * MEAN) / marginal_std(-1)
    exact = denoiser(schedule.alpha[0] * MEAN + marginal_std(0) * z, 0).x0
    return float((sampler(denoiser, Noise(range(4)), x_T=x_T) - exact).abs().max())


@pytest.mark.parametrize(
    ("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2), (heun, 2), (unipc, 3)], ids=["ddim", "dpmpp_2m", "heun", "unipc"]
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(sampler, order):
    errors = [flow_error(sampler, n) for n in (22, 42, 82)]
    for coarse, fine in itertools.pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.3


def test_higher_orders_have_smaller_errors():
    """At equal evaluations; heun takes two a step."""
    errors = [flow_error(sampler, n) for sampler, n in ((ddim, 41), (heun, 21), (dpmpp_2m, 41), (unipc, 41))]
    assert errors[0] > 3 * errors[1] > 0
    assert errors[0] > 3 * errors[2] > 0
    assert errors[2] > 3 * errors[3] > 0


@pytest.mark.parametrize("num_evaluations", [1, 2, 3, 4, 5, 12, 27])
def test_heun_makes_the_evaluations_that_it_is_asked_for(num_evaluations):
    cfg = SamplerConfig(Sampler.heun, num_evaluations)
    denoiser = GaussianDenoiser(GaussianDiffusion(DiffusionConfig()).schedule.respaced(cfg.num_levels))
    steps = []
    sample(cfg, denoiser, Noise([0]), on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(done, num_evaluations) for done in range(1, num_evaluations + 1)]


def test_heun_on_the_straight_line_is_heuns_method_in_time():
    schedule = make_schedule(ScheduleName.flow, 1000).respaced(6)
    denoiser, noise = GaussianDenoiser(schedule), Noise(range(3))

    def velocity(x, step):
        return (x - denoiser(x, step).x0) / schedule.sigma[step]

    x = noise.normal((16,), "x_T")
    for step in range(5, 0, -1):
        h = schedule.sigma[step - 1] - schedule.sigma[step]
        first = velocity(x, step)
        x = x + h * (first + velocity(x + h * first, step - 1)) / 2
    assert_close(heun(denoiser, noise), denoiser(x, 0).x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_picture_does_not_depend_on_its_batch(name, exact_net, means):
    diffusion = GaussianDiffusion(DiffusionConfig())

    def run(seeds):
        net, context = exact_net(diffusion, STD), means(MEAN, rows=len(seeds))
        return SAMPLERS[name](diffusion.denoiser(net, context, shape=(3, 4, 4), num_steps=12), Noise(seeds))

    assert_close(run(range(8))[3], run([3])[0], atol=1e-5, rtol=0)


def test_given_start_replaces_the_drawn_one():
    denoiser = GaussianDenoiser(GaussianDiffusion(DiffusionConfig()).schedule.respaced(10))
    noise = Noise([1, 2])
    x_T = noise.normal((16,), "x_T")
    for sampler in (ancestral, ddim, dpmpp_2m, unipc, heun):
        assert torch.equal(sampler(denoiser, noise, x_T=x_T), sampler(denoiser, noise))
        assert not torch.allclose(sampler(denoiser, noise, x_T=-x_T), sampler(denoiser, noise))


def test_sampling_keeps_no_graph():
    denoiser = GaussianDenoiser(GaussianDiffusion(DiffusionConfig()).schedule.respaced(4))
    x_T = torch.zeros(1, 16, requires_grad=True)
    assert not any(
        sampler(denoiser, Noise([0]), x_T=x_T).requires_grad for sampler in (ancestral, ddim, dpmpp_2m, unipc, heun)
    )


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_fewest_steps_work(name, num_steps):
    """One step of any sampler is the prediction itself."""
    denoiser = GaussianDenoiser(GaussianDiffusion(DiffusionConfig()).schedule.respaced(num_steps))
    x = SAMPLERS[name](denoiser, Noise(range(1000)))
    assert_close(x.mean(), torch.tensor(MEAN), atol=0.02, rtol=0)
    if num_steps == 1:
        assert torch.equal(x, denoiser(Noise(range(1000)).normal((16,), "x_T"), 0).x0)


@pytest.mark.parametrize(
    ("cfg", "function"),
    [
        (SamplerConfig(Sampler.ancestral, 6), SAMPLERS["ancestral"]),
        (SamplerConfig(Sampler.ddim, 6), SAMPLERS["ddim"]),
        (SamplerConfig(Sampler.ddim, 6, eta=0.5), SAMPLERS["ddim eta=0.5"]),
        (SamplerConfig(Sampler.dpmpp_2m, 6), SAMPLERS["dpmpp_2m"]),
        (SamplerConfig(Sampler.unipc, 6), SAMPLERS["unipc"]),
        (SamplerConfig(Sampler.heun, 11), SAMPLERS["heun"]),
    ],
)
def test_config_picks_the_sampler(cfg, function):
    denoiser = GaussianDenoiser(GaussianDiffusion(DiffusionConfig()).schedule.respaced(6))
    assert torch.equal(sample(cfg, denoiser, Noise([3])), function(denoiser, Noise([3])))


@pytest.mark.parametrize("name", [name for name in Sampler if name is not Sampler.analytic])
def test_every_evaluation_is_reported(name):
    levels = SamplerConfig(name, 5).num_levels
    denoiser = GaussianDenoiser(GaussianDiffusion(DiffusionConfig()).schedule.respaced(levels))
    steps, plain = [], sample(SamplerConfig(name, 5), denoiser, Noise([3]))
    x = sample(SamplerConfig(name, 5), denoiser, Noise([3]), on_step=lambda *step: steps.append(step))
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert torch.equal(x, plain)


def test_a_report_can_end_the_run():
    class Counting(GaussianDenoiser):
        calls = 0

        def __call__(self, x_t, step, last=None):
            self.calls += 1
            return super().__call__(x_t, step, last)

    def stop(done, total):
        if done == 3:
            raise InterruptedError("enough")

    denoiser = Counting(GaussianDiffusion(DiffusionConfig()).schedule.respaced(10))
    with pytest.raises(InterruptedError, match="enough"):
        sample(SamplerConfig(num_steps=10), denoiser, Noise([0]), on_step=stop)
    assert denoiser.calls == 3


def test_options_without_effect_are_refused():
    for name in (name for name in Sampler if name is not Sampler.ddim):
        with pytest.raises(ValueError, match=r"sampler\.name=ddim"):
            SamplerConfig(name, 10, eta=0.0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        SamplerConfig(Sampler.ddim, 10, eta=2.0)
    with pytest.raises(ValueError, match="at least 1"):
        SamplerConfig(num_steps=0)
    for name in (Sampler.ddim, Sampler.dpmpp_2m, Sampler.unipc, Sampler.heun):
        with pytest.raises(ValueError, match=f"{name.name} adds no noise"):
            SamplerConfig(name, 10, temperature=0.5)
    for temperature in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"temperature is .*; it must lie in \[0, 1\]"):
            SamplerConfig(num_steps=10, temperature=temperature)
    denoiser = GaussianDenoiser(GaussianDiffusion(DiffusionConfig()).schedule.respaced(6))
    with pytest.raises(ValueError, match=r"num_steps=cfg\.num_levels"):
        sample(SamplerConfig(num_steps=7), denoiser, Noise([0]))
