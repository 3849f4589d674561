import math

import pytest
import torch
from torch.testing import assert_close

from unclip.diffusion import NoiseSchedule, ScheduleName, make_schedule


def broadcast(table, step, x):
    return table[step].reshape(*step.shape, *(1,) * (x.ndim - step.ndim))


def test_cosine_is_the_published_formula():
    """alpha_bar(t) = f(t) / f(0), f(t) = cos²((t/T + s)/(1 + s) pi/2): exact up to the clipped last beta."""
    schedule = make_schedule("cosine", 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    expected = torch.tensor([f[t] / f[0] for t in range(1, 1000)])
    assert_close(schedule.alpha_bar[:999], expected, atol=0, rtol=1e-6)
    assert_close(schedule.beta[999], torch.tensor(0.999))
    assert_close(schedule.alpha[499] ** 2, torch.tensor(0.4938), atol=1e-4, rtol=0)


def test_linear_is_ddpms_and_scales_with_the_number_of_steps():
    schedule = make_schedule("linear", 1000)
    assert_close(schedule.beta[[0, 999]], torch.tensor([1e-4, 0.02]))
    assert_close(schedule.alpha_bar[999], torch.tensor(4.0358e-5), atol=0, rtol=1e-3)
    assert_close(make_schedule("linear", 250).beta[[0, 249]], torch.tensor([4e-4, 0.08]))


def test_zero_terminal_snr_ends_in_pure_noise_and_starts_as_before():
    schedule, plain = make_schedule("cosine_zero_snr", 1000), make_schedule("cosine", 1000)
    assert schedule.alpha[-1] == 0
    assert schedule.sigma[-1] == 1
    assert_close(schedule.alpha[0], plain.alpha[0])
    assert (schedule.alpha.diff() < 0).all()


@pytest.mark.parametrize("name", list(ScheduleName))
@pytest.mark.parametrize("resolution", [32, 64, 256])
def test_a_resolution_shifts_the_log_snr(name, resolution):
    """log-SNR + 2 log(64 / d) (Hoogeboom et al. 2023, sec. 3.1); pure noise stays pure noise."""
    plain, shifted = make_schedule(name, 1000), make_schedule(name, 1000, resolution=resolution)
    last = -1 if plain.snr[-1] == 0 else None
    assert_close(
        shifted.half_log_snr[:last], plain.half_log_snr[:last] + math.log(64 / resolution), atol=1e-3, rtol=1e-4
    )
    assert (shifted.snr[-1] == 0) == (plain.snr[-1] == 0)
    assert_close(shifted.alpha_bar, shifted.alpha**2)
    if resolution == 64:
        assert torch.equal(shifted.alpha, plain.alpha)
        assert torch.equal(shifted.beta, plain.beta)


def test_a_shifted_straight_line_is_sd3s():
    """t' = s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23), still on the line alpha + sigma = 1."""
    schedule = make_schedule("flow", 1000, resolution=192)
    t = torch.arange(1, 1001) / 1000
    assert_close(schedule.sigma, 3 * t / (1 + 2 * t))
    assert_close(schedule.alpha + schedule.sigma, torch.ones(1000))


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="cosnie"):
        make_schedule("cosnie", 1000)


@pytest.mark.parametrize("name", ["cosine", "linear", "cosine_zero_snr"])
def test_process_is_variance_preserving(name):
    schedule = make_schedule(name, 1000)
    assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000))
    assert schedule.sigma_prev[0] == 0
    assert torch.equal(schedule.alpha_prev[1:], schedule.alpha[:-1])


def test_float64_keeps_the_small_variances():
    """1 - alpha_bar at step 0 is beta_0; float32 loses it after three digits."""
    exact, rounded = make_schedule("cosine", 1000), make_schedule("cosine", 1000, dtype=torch.float32)
    beta = 1 - (math.cos((0.001 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    assert_close(exact.sigma[0], torch.tensor(math.sqrt(beta)), atol=0, rtol=1e-6)
    assert abs(rounded.posterior_x0[0] - 0.99947) < 1e-5
    assert exact.posterior_x0[0] == 1


@pytest.mark.parametrize(("count", "kept"), [(1, [999]), (2, [0, 999]), (7, [0, 166, 333, 500, 666, 832, 999])])
def test_respacing_strides_evenly_and_keeps_both_ends(count, kept):
    assert make_schedule("cosine", 1000).respaced(count).timesteps.tolist() == kept


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("count", [1, 2, 27, 64, 250, 999, 1000])
def test_respacing_keeps_the_noise_levels(name, count):
    schedule = make_schedule(name, 1000)
    short = schedule.respaced(count)
    assert len(short) == count == len(set(short.timesteps.tolist()))
    assert torch.equal(short.alpha, schedule.alpha[short.timesteps])
    assert torch.equal(short.sigma, schedule.sigma[short.timesteps])
    alpha_bar = torch.cumprod(1 - short.beta.double(), dim=0)
    assert_close(alpha_bar.float(), schedule.alpha_bar[short.timesteps], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1001, -3])
def test_impossible_respacing_is_refused(count):
    with pytest.raises(ValueError, match="choose 1 to 1000"):
        make_schedule("cosine", 1000).respaced(count)


@pytest.mark.parametrize("name", ["cosine", "linear", "cosine_zero_snr"])
@pytest.mark.parametrize("count", [1000, 40])
def test_posterior_is_bayes_rule(name, count):
    """q(x_{t-1} | x_t, x0) as the product of N(x_{t-1}; alpha' x0, sigma'²) and N(x_t; sqrt(1-beta) x_{t-1}, beta)."""
    schedule = make_schedule(name, 1000).respaced(count)
    step = torch.arange(1, count)
    x0, x_t = torch.linspace(-2, 2, count - 1)[:, None], torch.linspace(3, -1, count - 1)[:, None]
    alpha_bar = torch.cumprod(1 - schedule.beta.double(), dim=0)[:-1, None]
    beta = schedule.beta.double()[1:, None]
    precision = 1 / (1 - alpha_bar) + (1 - beta) / beta
    mean = (alpha_bar.sqrt() * x0 / (1 - alpha_bar) + (1 - beta).sqrt() * x_t / beta) / precision
    posterior = schedule.posterior(step, x0, x_t)
    assert_close(posterior.mean, mean.float(), atol=1e-5, rtol=1e-3)
    assert_close(posterior.var, (1 / precision).float(), atol=1e-9, rtol=1e-3)
    assert_close(posterior.log_var, posterior.var.log(), atol=1e-5, rtol=1e-5)


def test_posterior_of_the_last_step_is_x0():
    schedule = make_schedule("cosine", 1000).respaced(10)
    x0, x_t = torch.randn(2, 4, generator=torch.manual_seed(0)), torch.zeros(2, 4)
    posterior = schedule.posterior(0, x0, x_t)
    assert torch.equal(posterior.mean, x0)
    assert posterior.var == 0
    assert torch.equal(posterior.log_var.flatten(), schedule.posterior_var[1:2].log())


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 4, 4)])
@pytest.mark.parametrize("step", [torch.tensor([0, 1, 9, 400, 700, 950]), 300], ids=["tensor", "int"])
def test_conversions_round_trip(shape, step):
    schedule = make_schedule("cosine", 1000)
    generator = torch.manual_seed(0)
    x0, eps = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    x_t = schedule.q_sample(step, x0, eps)
    v = schedule.v_target(step, x0, eps)
    close = {"atol": 2e-4, "rtol": 1e-4}
    assert_close(schedule.x0_from_eps(step, eps, x_t), x0, **close)
    assert_close(schedule.eps_from_x0(step, x0, x_t), eps, **close)
    assert_close(schedule.x0_from_v(step, v, x_t), x0, **close)


def test_coefficients_broadcast_over_samples_and_draws():
    schedule = make_schedule("cosine", 1000)
    step = torch.tensor([[0, 500, 999], [10, 20, 30]])
    x0, eps = torch.randn(2, 3, 4, generator=torch.manual_seed(0)), torch.ones(2, 3, 4)
    x_t = schedule.q_sample(step, x0, eps)
    for b in range(2):
        for k in range(3):
            one = schedule.q_sample(step[b, k : k + 1], x0[b, k : k + 1], eps[b, k : k + 1])
            assert torch.equal(x_t[b, k : k + 1], one)


@pytest.mark.parametrize("step", [5, 40])
def test_learned_variance_interpolates_between_its_bounds(step):
    schedule = make_schedule("cosine", 1000).respaced(50)
    low, middle, high = (schedule.interpolated_log_var(step, torch.tensor([f])).exp() for f in (0.0, 0.5, 1.0))
    assert_close(low[0], schedule.posterior_var[step])
    assert_close(high[0], schedule.beta[step])
    assert_close(middle[0], (schedule.posterior_var[step] * schedule.beta[step]).sqrt())


def test_moving_to_the_same_device_is_free():
    schedule = make_schedule("cosine", 10)
    assert schedule.to("cpu") is schedule
    assert schedule.to("meta").respaced(4).alpha.device.type == "meta"


def test_custom_betas():
    beta = torch.tensor([0.1, 0.5], dtype=torch.float64)
    assert_close(NoiseSchedule.from_betas(beta).alpha_bar, torch.tensor([0.9, 0.45]))
