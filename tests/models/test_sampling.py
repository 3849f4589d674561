"""Sampling settings with others in their place, as the commands' options ask for."""

import pytest

from unclip.diffusion.guidance import Guidance
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.errors import ConfigError
from unclip.models.sampling import DiffusionSampling, changed

WARM = DiffusionSampling(SamplerConfig(num_steps=24, temperature=0.3), Guidance(3.5))


@pytest.mark.parametrize("sampler", [Sampler.ddim, Sampler.dpmpp_2m, Sampler.unipc, Sampler.heun, Sampler.karlo])
def test_another_sampler_starts_from_its_own_defaults(sampler: Sampler):
    assert changed(WARM, "decoder", 1000, sampler=sampler).sampler == SamplerConfig(sampler, 24)


def test_what_is_not_asked_for_stays():
    assert changed(WARM, "decoder", 1000) == WARM
    assert changed(WARM, "decoder", 1000, sampler=Sampler.ancestral) == WARM
    fewer = changed(WARM, "decoder", 1000, steps=8, scale=1.0)
    assert fewer == DiffusionSampling(SamplerConfig(num_steps=8, temperature=0.3), Guidance(1.0))
    with pytest.raises(ConfigError, match="the decoder was trained with 10 timesteps; it cannot sample in 24"):
        changed(WARM, "decoder", 10)
