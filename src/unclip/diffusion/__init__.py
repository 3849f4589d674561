"""Diffusion as pure tensor maths: schedules, losses, guidance and samplers. Imports torch only."""

from unclip.diffusion.gaussian import (
    Context,
    Denoiser,
    DiffusionConfig,
    GaussianDiffusion,
    Net,
    Predict,
    Prediction,
    Timesteps,
    Weighting,
)
from unclip.diffusion.guidance import Guidance, Threshold
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep, Sampler, SamplerConfig, ancestral, ddim, dpmpp_2m, sample
from unclip.diffusion.schedule import NoiseSchedule, Posterior, ScheduleName, make_schedule

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
    "make_schedule",
    "sample",
]
