"""Every allowed combination of parametrisation, schedule, weighting and timesteps at its optimum; every refused one."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from unclip.diffusion import DiffusionConfig, GaussianDiffusion, Noise, Predict, ScheduleName, Timesteps, Weighting

MEAN, STD, DIM, ROWS = 0.2, 0.3, 16, 4096
COSINE, LINEAR, ZERO, FLOW = ScheduleName
EPS, X0, V, U = Predict
LOGIT_NORMAL = Timesteps.logit_normal
SHIFTED = 256  # pixels


def refusal(predict, schedule, weighting, timesteps):
    """What design and arithmetic refuse, with a part of the message; None: allowed."""
    if schedule is FLOW:
        if predict not in (U, X0):
            return "set predict=flow or x0"
        return None if weighting is Weighting.simple else "trained with equal weights"
    if predict is U:
        return "set schedule=flow"
    if schedule is ZERO:
        if predict is EPS:
            return "eps says nothing about x0 at zero SNR"
        if weighting in (Weighting.min_snr, Weighting.p2):
            return f"{weighting.name} never trains the zero-SNR step"
        if timesteps is Timesteps.logit_normal:
            return "logit_normal never draws the zero-SNR step"
    return None


COMBINATIONS = list(itertools.product(Predict, ScheduleName, Weighting, Timesteps))
ALLOWED = [combination for combination in COMBINATIONS if refusal(*combination) is None]


def name(value):
    return "-".join(part.name for part in value)


def test_the_tables_below_are_not_empty():
    assert len(ALLOWED) == 3 * 2 * 4 * 3 + 2 * 2 * 2 + 2 * 3  # cosine and linear, zero SNR, flow
    assert len(COMBINATIONS) == 192


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if refusal(*c)], ids=name)
def test_void_combinations_are_refused(combination):
    predict, schedule, weighting, timesteps = combination
    message = refusal(*combination)
    assert message is not None
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(predict=predict, schedule=schedule, weighting=weighting, timesteps=timesteps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": FLOW, "predict": X0}, "not of flow"),
        ({"timesteps": Timesteps.logit_normal}, "set timesteps=uniform or low_discrepancy"),
    ],
)
def test_learned_variances_are_refused_where_they_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(learned_variance=True, clip_range=1.0, **settings)


def closed_form(diffusion):
    """The loss of the best network and its standard error over ROWS rows, from alpha and sigma alone.

    Given a step, the error of each of DIM numbers is N(0, V), with V = Var[x0 | x_t] times what the parametrisation makes
    of an error in x0. A row's loss is then w V chi²(DIM) / DIM.
    """
    cfg, schedule = diffusion.cfg, diffusion.schedule
    alpha, sigma = schedule.alpha.double(), schedule.sigma.double()
    snr = (alpha / sigma) ** 2
    scale = {EPS: snr, X0: torch.ones_like(snr), V: 1 / sigma**2, U: 1 / sigma**2}[cfg.predict]
    weight = {
        Weighting.simple: scale,
        Weighting.min_snr: snr.clamp(max=5),
        Weighting.clamped_snr: snr.clamp(1, 5),
        Weighting.p2: snr / (1 + snr),
    }[cfg.weighting]
    loss = weight / (STD**-2 + snr)
    edges = torch.linspace(0, 1, len(snr) + 1, dtype=torch.float64)
    if cfg.timesteps is Timesteps.logit_normal:
        edges = Normal(0.0, 1.0).cdf(edges.logit())
    share = edges.diff()
    mean = (share * loss).sum()
    variance = 2 / DIM * (share * loss**2).sum()
    if cfg.timesteps is not Timesteps.low_discrepancy:  # whose steps hardly vary from one batch to the next
        variance = variance + (share * loss**2).sum() - mean**2
    return mean, (variance / ROWS).sqrt()


@pytest.mark.parametrize("resolution", [None, SHIFTED])
@pytest.mark.parametrize("combination", ALLOWED, ids=name)
def test_the_loss_at_the_optimum_is_the_closed_form(combination, resolution, exact_net, means):
    predict, schedule, weighting, timesteps = combination
    cfg = DiffusionConfig(
        predict=predict, schedule=schedule, weighting=weighting, timesteps=timesteps, resolution=resolution
    )
    diffusion, noise = GaussianDiffusion(cfg), Noise.at(0, range(ROWS))
    x0 = MEAN + STD * noise.normal((DIM,), "data")
    loss = diffusion.losses(exact_net(diffusion, STD), x0, means(MEAN, rows=ROWS), noise)["mse"]
    expected, error = closed_form(diffusion)
    assert error < 0.07 * expected
    assert abs(loss - expected) < 3 * error


@pytest.mark.parametrize("combination", [c for c in ALLOWED if c[1] is not FLOW and c[3] is not LOGIT_NORMAL], ids=name)
def test_learned_variances_leave_the_error_as_it_is_and_add_a_bound_that_no_weighting_changes(
    combination, exact_net, means
):
    """What the bound is at the optimum stands in test_gaussian.py, for every parametrisation and schedule."""
    predict, schedule, weighting, timesteps = combination
    noise = Noise.at(0, range(64))
    x0 = MEAN + STD * noise.normal((DIM,), "data")

    def losses(weighting, learned):
        cfg = DiffusionConfig(
            predict=predict,
            schedule=schedule,
            weighting=weighting,
            timesteps=timesteps,
            learned_variance=learned,
            clip_range=1.0,
        )
        diffusion = GaussianDiffusion(cfg)
        return diffusion.losses(exact_net(diffusion, STD), x0, means(MEAN, rows=64), noise)

    found = losses(weighting, learned=True)
    assert set(found) == {"mse", "vlb"}
    assert found["mse"] == losses(weighting, learned=False)["mse"]
    assert found["vlb"] == losses(Weighting.simple, learned=True)["vlb"]


@pytest.mark.parametrize("predict", [EPS, X0, V])
@pytest.mark.parametrize("weighting", [Weighting.min_snr, Weighting.clamped_snr, Weighting.p2])
@pytest.mark.parametrize("limit", [5.0, 25.0])
def test_weights_weigh_the_x0_error_alike_for_every_parametrisation(weighting, predict, limit):
    diffusion = GaussianDiffusion(DiffusionConfig(predict=predict, weighting=weighting, snr_limit=limit))
    snr = diffusion.schedule.snr.double()
    wanted = {
        Weighting.min_snr: snr.clamp(max=limit),
        Weighting.clamped_snr: snr.clamp(1, limit),
        Weighting.p2: snr / (1 + snr),
    }
    scale = {EPS: snr, X0: torch.ones_like(snr), V: 1 + snr}[predict]
    found = diffusion.weight(torch.arange(1000)).double() * scale
    torch.testing.assert_close(found, wanted[weighting], rtol=1e-4, atol=1e-9)


def test_p2_is_its_papers_weight_of_eps():
    """1 / (k + SNR)^gamma with k = gamma = 1 (Choi et al. 2022)."""
    diffusion = GaussianDiffusion(DiffusionConfig(weighting=Weighting.p2))
    torch.testing.assert_close(diffusion.weight(torch.arange(1000)), 1 / (1 + diffusion.schedule.snr))


def test_logit_normal_steps_have_that_distribution():
    """Quantiles of sigmoid(N(0, 1)): 1/2 below the middle, 15.87 % below sigmoid(-1) = 0.2689, and as many above its mirror."""
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=10000, timesteps=Timesteps.logit_normal))
    place = diffusion.draw_steps(Noise.at(0, range(40000))) / 10000
    for edge, share in ((0.5, 0.5), (0.2689, 0.1587), (0.7311, 0.8413)):
        assert abs((place < edge).float().mean() - share) < 4 * math.sqrt(share * (1 - share) / 40000)
