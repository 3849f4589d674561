"""Losses and samplers on a pretended GPU: a host synchronisation (.item()) or a tensor on the wrong device raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from unclip.diffusion import (
    DiffusionConfig,
    GaussianDiffusion,
    Guidance,
    Noise,
    Predict,
    Threshold,
    Timesteps,
    Weighting,
    ancestral,
    ddim,
    dpmpp_2m,
    heun,
    unipc,
)

VP = [Predict.eps, Predict.x0, Predict.v]  # of the variance-preserving schedules
PICTURE = (3, 8, 8)


class Half:
    def first(self, count):
        return self


def net(channels):
    weight = torch.ones(channels, 3, 1, 1, device="cuda", requires_grad=True)
    return lambda x_t, timestep, context: torch.conv2d(x_t, weight) + timestep.reshape(-1, 1, 1, 1)


def test_the_mode_catches_host_synchronisation():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("predict", VP)
@pytest.mark.parametrize("learned", [False, True])
def test_losses(predict, learned):
    with FakeTensorMode():
        cfg = DiffusionConfig(
            predict=predict,
            learned_variance=learned,
            clip_range=1.0,
            weighting=Weighting.min_snr,
            timesteps=Timesteps.low_discrepancy if learned else Timesteps.logit_normal,
            resolution=256,
        )
        noise = Noise.at(0, range(4), "cuda")
        x0 = torch.zeros(4, *PICTURE, device="cuda")
        terms = GaussianDiffusion(cfg).losses(net(6 if learned else 3), x0, None, noise)
        total = torch.stack(list(terms.values())).sum()
        assert total.requires_grad
        assert total.device.type == "cuda"
        assert total.shape == ()


@pytest.mark.parametrize("sampler", [ancestral, lambda d, n: ddim(d, n, eta=0.5), ddim, dpmpp_2m, unipc, heun])
@pytest.mark.parametrize("learned", [False, True])
def test_samplers(sampler, learned):
    with FakeTensorMode():
        diffusion = GaussianDiffusion(DiffusionConfig(learned_variance=learned, clip_range=1.0))
        guidance = Guidance(3.0, interval=(0.2, 0.8), rescale=0.7, threshold=Threshold.dynamic)
        network = net(6 if learned else 3)
        denoiser = diffusion.denoiser(network, Half(), shape=PICTURE, num_steps=5, guidance=guidance)
        x = sampler(denoiser, Noise([0, 1], "cuda"))
        assert x.device.type == "cuda"
        assert x.shape == (2, *PICTURE)
