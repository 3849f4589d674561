"""The upsamplers: a small picture to a larger one, by convolutions only (paper §2.1, last paragraph)."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unclip.data.batch import Batch
from unclip.diffusion.gaussian import DiffusionConfig, GaussianDiffusion, Predict
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep, Sampler, SamplerConfig, sample
from unclip.models.interface import Interface, ModelConfig
from unclip.models.pictures import blur, crop, resize, training_pictures
from unclip.models.sampling import UpsamplerSampling
from unclip.nets.conditioned import UpsamplerNet
from unclip.nets.unet import UNetConfig


@dataclass
class UpsamplerConfig(ModelConfig):
    """From ``low_size`` to ``image_size`` pixels. Trains on crops of ``crop_fraction`` of the side, runs on the whole.

    The low-resolution picture is blurred (Gaussian, 3x3, ``blur_sigma``) with probability ``blur_prob`` in training.
    The paper gives no probability; ours is CDM's 0.5. ``max_noise`` > 0 also adds Gaussian noise of a deviation between 0
    and it, which the net is told (noise-conditioning augmentation, Ho et al. 2022, sec. 4.2; not in the paper). Sampling with
    ``sampling.noise_level`` then has the upsampler draw anew what is smaller than such noise. With ``residual`` the net only
    adds to the resized low-resolution picture (not in the paper): far better in a short training, for predict=x0.
    """

    low_size: int = 64
    image_size: int = 256
    net: UNetConfig = field(default_factory=lambda: UNetConfig(scale_shift=False))
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(clip_range=1.0))
    sampling: UpsamplerSampling = field(
        default_factory=lambda: UpsamplerSampling(SamplerConfig(name=Sampler.ddim, num_steps=27))
    )
    crop_fraction: float = 0.25
    blur_sigma: float = 0.6
    blur_prob: float = 0.5
    max_noise: float = 0.0
    residual: bool = False

    def __post_init__(self) -> None:
        if self.net.attention_levels:
            raise ValueError(
                "an upsampler is convolution-only, else it cannot train on crops: set net.attention_levels=[]"
            )
        if self.diffusion.self_conditioning:
            raise ValueError("self-conditioning is for the diffusion prior: set diffusion.self_conditioning=false")
        if self.image_size % self.low_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of low_size={self.low_size}")
        if self.residual and self.diffusion.predict is not Predict.x0:
            raise ValueError(
                "residual adds the low-resolution picture to a predicted x0: set diffusion.predict=x0, or residual=false"
            )
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction is {self.crop_fraction}; it must lie in (0, 1]")
        if not 0 <= self.sampling.noise_level <= self.max_noise:
            raise ValueError(
                f"sampling.noise_level is {self.sampling.noise_level}, but training knows noise up to "
                f"max_noise={self.max_noise}: raise max_noise or lower the level"
            )
        for name, size in (("image_size", self.image_size), ("the training crop", self.crop_size)):
            if size < 1 or size % self.net.stride:
                raise ValueError(f"{name} is {size} pixels, not a multiple of {self.net.stride}, the net's stride")

    @property
    def crop_size(self) -> int:
        return round(self.crop_fraction * self.image_size)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("image",)


class Upsampler(nn.Module):
    """p(large picture | small picture), without caption, z_i or guidance."""

    def __init__(self, cfg: UpsamplerConfig, interface: Interface):
        super().__init__()
        self.cfg, self.interface = cfg, interface
        self.diffusion = GaussianDiffusion(cfg.diffusion)
        out_channels = 6 if cfg.diffusion.learned_variance else 3
        self.net = UpsamplerNet(cfg.net, out_channels, noise_conditioning=cfg.max_noise > 0, residual=cfg.residual)

    def fit(self, embeddings: Any) -> None:
        """Nothing to gather before training."""

    def finish(self, embeddings: Any) -> None:
        """Nothing to gather after training."""

    def default_sampling(self) -> UpsamplerSampling:
        return self.cfg.sampling

    def low_resolution(self, image: Tensor | None) -> Tensor:
        """uint8 (B, 3, H, W) of at least image_size pixels to (B, 3, low_size, low_size) in [-1, 1], as in training."""
        return resize(training_pictures(image, self.cfg.image_size), self.cfg.low_size)

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Scalars whose sum is the loss, on one random crop of each picture."""
        pictures = training_pictures(batch.image, self.cfg.image_size)
        level = self.cfg.max_noise * noise.uniform((), "noise level")
        low = self._noised(self._blurred(resize(pictures, self.cfg.low_size), noise), level, noise)
        # resized as a whole, then cropped: a crop's borders look as they do at full size
        low = resize(low, self.cfg.image_size)
        top, left = self._corner(noise)
        pictures, low = (crop(image, top, left, self.cfg.crop_size) for image in (pictures, low))
        return self.diffusion.losses(self.net, pictures, self.net.prepare(low, level), noise)

    @torch.no_grad()
    def sample(
        self,
        low: Tensor,
        how: UpsamplerSampling,
        noise: Noise,
        x_T: Tensor | None = None,
        *,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """low (B, 3, h, w) in [-1, 1] to a picture larger by image_size / low_size, in [-1, 1].

        Trained for h = w = low_size, the convolutions take any size of which the result is a multiple of the net's stride.
        """
        if how.guidance.scale != 1.0:
            raise ValueError("an upsampler has nothing to guide by: set its guidance.scale=1")
        factor = self.cfg.image_size // self.cfg.low_size
        height, width = low.shape[-2] * factor, low.shape[-1] * factor
        if height % self.cfg.net.stride or width % self.cfg.net.stride:
            raise ValueError(
                f"the upsampler cannot make {width}x{height}: both must be multiples of {self.cfg.net.stride}"
            )
        if how.noise_level > self.cfg.max_noise:
            raise ValueError(f"noise_level {how.noise_level} is above {self.cfg.max_noise}, the training's max_noise")
        level = torch.full((len(low),), how.noise_level, device=low.device)
        low = self._noised(low.float(), level, noise)
        context = self.net.prepare(resize(low, (height, width)), level)
        shape = (3, height, width)
        denoiser = self.diffusion.denoiser(self.net, context, shape=shape, num_steps=how.sampler.num_steps)
        return sample(how.sampler, denoiser, noise, x_T=x_T, on_step=on_step).clamp(-1, 1)

    def _noised(self, low: Tensor, level: Tensor, noise: Noise) -> Tensor:
        if not self.cfg.max_noise:
            return low
        return low + level[:, None, None, None] * noise.normal(tuple(low.shape[1:]), "low noise")

    def _blurred(self, low: Tensor, noise: Noise) -> Tensor:
        blurred = noise.uniform((), "blur") < self.cfg.blur_prob
        return torch.where(blurred[:, None, None, None], blur(low, self.cfg.blur_sigma), low)

    def _corner(self, noise: Noise) -> tuple[Tensor, Tensor]:
        """Top and left of each crop: multiples of the low-resolution pixel and of the net's stride, as at full size."""
        grid = math.lcm(self.cfg.image_size // self.cfg.low_size, self.cfg.net.stride)
        places = (self.cfg.image_size - self.cfg.crop_size) // grid + 1
        corner = (noise.uniform((2,), "crop") * places).long().clamp(max=places - 1) * grid
        return corner[:, 0], corner[:, 1]
