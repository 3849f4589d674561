"""Diffusion as pure tensor maths: schedules, losses, guidance and samplers. Imports torch only."""

from unclip.diffusion.gaussian import Context, Denoiser, GaussianDiffusion, Net, Prediction
from unclip.diffusion.guidance import Guidance, Threshold
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep, Sampler, SamplerConfig, ancestral, ddim, dpmpp_2m, heun, sample, unipc
from unclip.diffusion.schedule import NoiseSchedule, Posterior, ScheduleName, make_schedule
from unclip.diffusion.settings import DiffusionConfig, Predict, Timesteps, Weighting

__all__ = [
    "Context",
    "Denoiser",
    "DiffusionConfig",
    "GaussianDiffusion",
    "Guidance",
    "Net",
    "Noise",
    "NoiseSchedule",
    "OnStep",
    "Posterior",
    "Predict",
    "Prediction",
    "Sampler",
    "SamplerConfig",
    "ScheduleName",
    "Threshold",
    "Timesteps",
    "Weighting",
    "ancestral",
    "ddim",
    "dpmpp_2m",
    "heun",
    "make_schedule",
    "sample",
    "unipc",
]
