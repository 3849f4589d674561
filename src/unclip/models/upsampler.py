"""The upsamplers: a small picture to a larger one, by convolutions only (paper §2.1, last paragraph)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from unclip.data.batch import Batch
from unclip.diffusion.gaussian import Branches, GaussianDiffusion, Handover
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import OnStep, Sampler, SamplerConfig, sample
from unclip.diffusion.schedule import NoiseSchedule
from unclip.diffusion.settings import DiffusionConfig, Predict
from unclip.errors import ConfigError
from unclip.models.interface import Interface, ModelConfig
from unclip.models.pictures import Bsr, blur, crop, resize, to_range, training_pictures
from unclip.models.sampling import UpsamplerSampling, check_goes_with
from unclip.models.second_net import take_first
from unclip.nets.conditioned import UpsamplerNet
from unclip.nets.tiles import in_tiles
from unclip.nets.unet import UNetConfig


@dataclass
class UpsamplerConfig(ModelConfig):
    """From ``low_size`` to ``image_size`` pixels. Trains on crops of ``crop_fraction`` of the side, runs on the whole.

    ``bsr``: how strongly the loader degrades the low-resolution picture (data/degrade.py); none: it is the target, resized.
    It is then blurred (Gaussian, 3x3, ``blur_sigma``) with probability ``blur_prob``. The paper gives no probability; ours
    is CDM's 0.5. ``max_noise`` > 0 also adds Gaussian noise of a deviation between 0 and it, which the net is told
    (noise-conditioning augmentation, Ho et al. 2022, sec. 4.2; not in the paper). Sampling with ``sampling.noise_level`` then
    has the upsampler draw anew what is smaller than such noise. All of it is drawn for each sample, in training only.
    With ``residual`` the net only adds to the resized low-resolution picture (not in the paper): far better in a short
    training, for predict=x0. ``overshoot`` leaves what bicubic resizing of the low-resolution picture adds at edges beyond
    [-1, 1] (Karlo), which is cut off otherwise.

    ``last_steps`` > 0: a second net takes the last so many sampling steps (Karlo: 1 of 7). It begins as a copy of the net of
    ``first``, the run of an upsampler alike but for this, which is kept as it is, and learns the noise levels of its steps.
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
    bsr: Bsr = Bsr.none
    max_noise: float = 0.0
    residual: bool = False
    overshoot: bool = False
    last_steps: int = 0
    first: str | None = None

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
        if self.last_steps < 0 or (self.first is not None and not self.last_steps):
            raise ValueError(
                f"last_steps is {self.last_steps} and first {self.first}; the second net that begins as the one of "
                "`first` needs at least one step: set last_steps=1"
            )
        for name, size in (("image_size", self.image_size), ("the training crop", self.crop_size)):
            if size < 1 or size % self.net.stride:
                raise ValueError(f"{name} is {size} pixels, not a multiple of {self.net.stride}, the net's stride")
        self.check(self.sampling)

    def check(self, how: UpsamplerSampling) -> None:
        """ConfigError for sampling settings that do not go with these."""
        check_goes_with(how, self.diffusion)
        if how.noise_level > self.max_noise:
            raise ConfigError(
                f"sampling.noise_level is {how.noise_level}, but training knows noise up to "
                f"max_noise={self.max_noise}: raise max_noise or lower the level"
            )
        if how.sampler.num_levels <= self.last_steps:
            raise ConfigError(
                f"sampling.sampler.num_steps is {how.sampler.num_steps}, of which the second net takes {self.last_steps}: "
                "nothing is left for the first one; take more steps"
            )
        trained = self.last_steps / (self.sampling.sampler.num_levels - 1) if self.last_steps else 1.0
        if self.last_steps > 1 and (self.last_steps - 1) / (how.sampler.num_levels - 1) >= trained:
            raise ConfigError(
                f"sampling.sampler.num_steps is {how.sampler.num_steps}, but the second net learnt the last {self.last_steps} of "
                f"{self.sampling.sampler.num_steps} steps, and knows less noise than {self.last_steps} of so few begin with: take "
                "more steps"
            )
        for name, size in (("tile", how.tile or 0), ("tile_overlap", how.tile_overlap if how.tile else 0)):
            if size % self.net.stride:
                raise ConfigError(
                    f"sampling.{name} is {size} pixels, not a multiple of {self.net.stride}, the net's stride"
                )

    def kind_of_net(self) -> tuple[Any, ...]:
        """What two upsamplers share of which one's net may take over from the other's."""
        net = replace(self.net, dropout=0.0, gradient_checkpointing=False)
        return self.low_size, self.image_size, net, self.diffusion, self.max_noise > 0, self.residual, self.overshoot

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
        self.last_net: UpsamplerNet | None = None
        if cfg.last_steps:
            self.last_net = UpsamplerNet(cfg.net, out_channels, cfg.max_noise > 0, cfg.residual)
            self.net.requires_grad_(False)
            share = cfg.last_steps / (cfg.sampling.sampler.num_levels - 1)
            # up to the last step that the first net takes, as NoiseSchedule.respaced rounds it
            self.last_diffusion = GaussianDiffusion(
                cfg.diffusion, range(round(share * (cfg.diffusion.num_timesteps - 1)))
            )

    def fit(self, embeddings: Any) -> None:
        """Before training: with a second net, take both nets' weights from the run ``first``. ConfigError for another's."""
        if self.last_net is None:
            return
        take_first(self, "upsampler")
        self.last_net.load_state_dict(self.net.state_dict())

    def default_sampling(self) -> UpsamplerSampling:
        return self.cfg.sampling

    def low_resolution(self, image: Tensor | None) -> Tensor:
        """uint8 (B, 3, H, W) of at least image_size pixels to (B, 3, low_size, low_size) in [-1, 1], not degraded."""
        return resize(training_pictures(image, self.cfg.image_size), self.cfg.low_size)

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Scalars whose sum is the loss, on one random crop of each picture."""
        pictures = training_pictures(batch.image, self.cfg.image_size)
        low = to_range(batch.column("low")) if self.cfg.bsr is not Bsr.none else resize(pictures, self.cfg.low_size)
        level = self.cfg.max_noise * noise.uniform((), "noise level")
        low = self._noised(self._blurred(low, noise), level, noise)
        # resized as a whole, then cropped: a crop's borders look as they do at full size
        low = resize(low, self.cfg.image_size, clamp=not self.cfg.overshoot)
        top, left = self._corner(noise)
        pictures, low = (crop(image, top, left, self.cfg.crop_size) for image in (pictures, low))
        if self.last_net is None:
            return self.diffusion.losses(self.net, pictures, self.net.prepare(low, level), noise)
        return self.last_diffusion.losses(self.last_net, pictures, self.last_net.prepare(low, level), noise)

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
        Raises ValueError for other sizes, ConfigError for settings that do not go with the model's. What is not finite in a row of
        ``low`` spoils that row alone: on a CPU it is refused, a GPU would have to wait for it to be seen.
        """
        self.cfg.check(how)
        size = self._grown(low)
        level = torch.full((len(low),), how.noise_level, device=low.device)
        low = resize(self._noised(low.float(), level, noise), size, clamp=not self.cfg.overshoot)
        schedule = how.sampler.levels_of(self.diffusion.schedule)
        branches: Branches = _Branches(self.net, low, level, how, schedule)
        if self.last_net is not None:
            branches = Handover(branches, _Branches(self.last_net, low, level, how, schedule), self.cfg.last_steps)
        denoiser = self.diffusion.denoiser_of(branches, schedule, shape=(3, *size), guidance=how.guidance)
        return sample(how.sampler, denoiser, noise, x_T=x_T, on_step=on_step).clamp(-1, 1)

    def _grown(self, low: Tensor) -> tuple[int, int]:
        """Height and width of the large picture; ValueError where the net has none, or where nothing is there to enlarge."""
        scale, stride = self.cfg.image_size // self.cfg.low_size, self.cfg.net.stride
        height, width = (scale * side for side in low.shape[-2:])
        if height % stride or width % stride:
            raise ValueError(f"the upsampler cannot make {width}x{height}: both must be multiples of {stride}")
        if low.device.type == "cpu" and not low.isfinite().all():
            rows = (~low.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"rows {rows} of the low-resolution pictures hold numbers that are not finite; draw them again"
            )
        return height, width

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


class _Branches:
    """One net of a sampling run, in tiles where the picture is larger than one."""

    def __init__(
        self, net: UpsamplerNet, low: Tensor, level: Tensor, how: UpsamplerSampling, schedule: NoiseSchedule
    ) -> None:
        self.net, self.how, self.schedule = net, how, schedule
        self.context = net.prepare(low, level)

    def __call__(self, x_t: Tensor, step: int, guided: bool, /, *x0_last: Tensor) -> Tensor:
        self.schedule = self.schedule.to(x_t.device)
        timestep = self.schedule.timesteps[step].expand(len(x_t))
        height, width = x_t.shape[-2:]
        if self.how.tile is None or max(height, width) <= self.how.tile:
            return self.net(x_t, timestep, self.context)

        def run(rows: slice, columns: slice) -> Tensor:
            return self.net(x_t[:, :, rows, columns], timestep, self.context.cut(rows, columns))

        return in_tiles(self.net, run, (height, width), self.how.tile, self.how.tile_overlap)
