"""sampler.name=karlo: every number of a run is that of diffusers' UnCLIPScheduler, to the bit, whatever tables the model has."""

import pytest
import torch

from unclip.diffusion import DiffusionConfig, GaussianDiffusion, Guidance, Predict, Sampler, SamplerConfig, sample
from unclip.diffusion.gaussian import NetBranches

diffusers = pytest.importorskip("diffusers")

NAMES = {Predict.eps: "epsilon", Predict.x0: "sample"}


class Draws:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, shape, stream):
        return torch.randn(2, *shape, generator=self.generator)


class Everything:
    def first(self, count):
        return self


class Fixed:
    """A network whose outputs are fixed before the run: a function of the step alone. Conditional rows first."""

    def __init__(self, shape, channels):
        self.shape, self.channels = shape, channels

    def __call__(self, x_t, timestep, context):
        generator = torch.Generator().manual_seed(int(timestep[0]))
        rows = torch.randn(4, self.channels * self.shape[0], *self.shape[1:], generator=generator).clamp(-2, 2)
        return rows[: len(x_t)]


@pytest.mark.parametrize("num_steps", [5, 7, 25])
@pytest.mark.parametrize("tables", [True, False], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("predict", "learned", "clip_range", "scale", "shape"),
    [
        (Predict.x0, False, 5.0, 4.0, (1, 8)),  # the prior: one candidate
        (Predict.eps, True, 1.0, 8.0, (3, 4, 4)),  # the decoder
        (Predict.eps, False, 1.0, 1.0, (3, 4, 4)),  # the upsampler
    ],
    ids=["prior", "decoder", "upsampler"],
)
def test_equal_to_the_bit(num_steps, tables, predict, learned, clip_range, scale, shape):
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="learned_range" if learned else "fixed_small_log",
        prediction_type=NAMES[predict],
        clip_sample_range=clip_range,
    )
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator)
    net, run, states = Fixed(shape, 2 if learned else 1), scheduler.timesteps, []
    for i, t in enumerate(run):
        output = net(torch.cat([x, x]), t.expand(4), None)
        cond, null = output.chunk(2)
        if scale != 1.0:
            guided = null[:, : shape[0]] + scale * (cond[:, : shape[0]] - null[:, : shape[0]])
            cond = torch.cat([guided, cond[:, shape[0] :]], dim=1)
        previous = None if i + 1 == num_steps else run[i + 1]
        x = scheduler.step(cond, t, x, prev_timestep=previous, generator=generator).prev_sample
        states.append(x)

    diffusion = GaussianDiffusion(
        DiffusionConfig(predict=predict, learned_variance=learned, clip_range=clip_range, float32_tables=tables)
    )
    cfg, seen = SamplerConfig(Sampler.karlo, num_steps), []

    def watched(x_t, timestep, context):
        seen.append(x_t[:2].clone())
        return net(x_t, timestep, context)

    schedule = cfg.levels_of(diffusion.schedule)
    branches = NetBranches(watched, Everything(), schedule)
    denoiser = diffusion.denoiser_of(branches, schedule, shape=shape, guidance=Guidance(scale))
    found = sample(cfg, denoiser, Draws())
    assert torch.equal(found, states[-1])
    assert all(torch.equal(a, b) for a, b in zip(seen[1:], states[:-1], strict=True))


def test_the_straight_line_has_no_such_tables():
    flow = GaussianDiffusion(DiffusionConfig(schedule="flow", predict=Predict.flow)).schedule
    with pytest.raises(ValueError, match=r"sampler\.name=karlo is for the schedules of Karlo"):
        SamplerConfig(Sampler.karlo, 5).levels_of(flow)
