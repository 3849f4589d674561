"""What our nets and samplers make of fixed inputs, for diffusers to repeat."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unclip.diffusion.guidance import Guidance
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.models.clip import CLIP
from unclip.models.decoder import Decoder
from unclip.models.diffusion_prior import DiffusionPrior
from unclip.models.sampling import DiffusionSampling, PriorSampling, UpsamplerSampling
from unclip.models.upsampler import Upsampler
from unclip.nets.layers import Cond, Keep

CAPTIONS = ["a red horse!", "two cônes, 3 spheres & a very small cube"]
PRIOR_STEPS, DECODER_STEPS, UPSAMPLER_STEPS = (
    10,
    10,
    7,
)  # in large steps the first x0, of hardly any signal, weighs more
PRIOR_SCALE, DECODER_SCALE = 4.0, 8.0  # the pipelines' defaults


class Recorded(Noise):
    """A noise that keeps what was drawn, in order."""

    def __init__(self) -> None:
        super().__init__(range(len(CAPTIONS)))
        self.drawn: list[Tensor] = []

    def normal(self, shape: tuple[int, ...], stream: str) -> Tensor:
        self.drawn.append(super().normal(shape, stream))
        return self.drawn[-1]


class Reference:
    """Inputs and outputs by name, stage by stage in the chain's order. Memory holds the stage at hand only."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.text = self.empty = Cond()
        self.z_i = self.picture = torch.empty(0)

    @torch.no_grad()
    def clip(self, clip: CLIP) -> None:
        tokens = clip.tokenize(CAPTIONS)
        self.text, self.empty = _text(clip, tokens), _text(clip, clip.tokenize([""] * len(CAPTIONS)))
        assert self.text.text_emb is not None
        assert self.text.text_seq is not None
        mask = self.text.caption_mask()
        assert mask is not None
        self._keep("text", tokens=tokens, mask=mask, embeds=self.text.text_emb, states=self.text.text_seq)
        if clip.model.visual is None:
            return
        pixels = Recorded().normal((3, clip.image_size, clip.image_size), "pixels")
        self.z_i = clip.model.visual(pixels)
        self._keep("image", pixels=pixels, embeds=self.z_i)

    @torch.no_grad()
    def prior(self, prior: DiffusionPrior) -> None:
        noise = Recorded()
        x_t, timestep = noise.normal((prior.num_channels,), "x_t"), torch.tensor([0, 500])
        out = prior.net(x_t, timestep, prior.prepare(self.text, Keep()))
        self._keep("prior", x_t=x_t, timestep=timestep, out=out)
        noise.drawn = []
        how = PriorSampling(SamplerConfig(Sampler.karlo, PRIOR_STEPS), Guidance(PRIOR_SCALE), num_candidates=1)
        self.z_i = prior.sample(self.text, how, noise, negative=self.empty)
        self._noises("prior", noise)

    @torch.no_grad()
    def decoder(self, decoder: Decoder) -> None:
        """The caption's picture, and a variation: the same z_i without a caption."""
        noise = Recorded()
        if not len(self.z_i):
            self.z_i = noise.normal((decoder.interface.embed_dim,), "z_i")
        x_t = noise.normal((3, decoder.cfg.image_size, decoder.cfg.image_size), "x_t")
        timestep = torch.tensor([0, 500])
        context = decoder.prepare(replace(self.text, image_emb=self.z_i), Keep())
        out = decoder.net(x_t, timestep, context)
        self._keep("decoder", x_t=x_t, timestep=timestep, out=out, image_emb=self.z_i)
        how = DiffusionSampling(SamplerConfig(Sampler.karlo, DECODER_STEPS), Guidance(DECODER_SCALE))
        noise.drawn = []
        both = [replace(text, image_emb=self.z_i) for text in (self.text, self.empty)]
        self.picture = torch.cat([decoder.sample(cond, how, noise, negative=self.empty) for cond in both])
        noise.drawn = noise.drawn[:DECODER_STEPS]
        self._noises("decoder", noise)

    @torch.no_grad()
    def upsampler(self, upsampler: Upsampler, inside: str = "") -> None:
        """The first one makes the finished pictures; those after it, in ``inside``, small ones of noise."""
        noise, cfg = Recorded(), upsampler.cfg
        side = cfg.net.stride * max(1, 64 // cfg.net.stride)
        x_t, low = (noise.normal((3, side, side), name) for name in ("x_t", "low"))
        timestep = torch.tensor([0, 500])
        nets = [upsampler.net, upsampler.last_net or upsampler.net]
        outs = [net(x_t, timestep, net.prepare(low)) for net in nets]
        name = f"{inside}super_res"
        self._keep(name, x_t=torch.cat((x_t, low), dim=1), timestep=timestep, out_first=outs[0], out_last=outs[1])
        how = UpsamplerSampling(SamplerConfig(Sampler.karlo, UPSAMPLER_STEPS))
        if inside:
            step = cfg.net.stride  # so that low is a whole number of pixels and the result a multiple of the stride
            low = noise.normal((3, step, step), "small").clamp(-1, 1)
            self._keep(name, low=low)
            noise.drawn = []
            pictures = upsampler.sample(low, how, noise)
            self._noises(name, noise)
            self._keep(name, picture=pictures / 2 + 0.5)
            return
        noise.drawn = []
        halves = [upsampler.sample(low, how, noise) / 2 + 0.5 for low in self.picture.chunk(2)]
        noise.drawn = noise.drawn[:UPSAMPLER_STEPS]
        self._noises(name, noise)
        self._keep("picture", of_caption=halves[0], variation=halves[1])

    def write(self, path: Path, digests: Mapping[str, Mapping[str, str]]) -> None:
        """All of it as one safetensors file; the digests stand in its header."""
        flat = {f"{name}:{key}": value for name, found in digests.items() for key, value in found.items()}
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, path, metadata=flat)

    def _noises(self, stage: str, noise: Recorded) -> None:
        """x_T first, then those of the steps."""
        for index, value in enumerate(noise.drawn):
            self._keep(stage, **{f"noise_{index:02}": value.squeeze(1)})  # of the prior's one candidate

    def _keep(self, stage: str, **tensors: Tensor) -> None:
        self.tensors |= {f"{stage}.{name}": value.detach().cpu().clone() for name, value in tensors.items()}


def _text(clip: CLIP, tokens: Tensor) -> Cond:
    text_emb, text_seq = clip.encode_text(tokens)
    return Cond(text_emb=text_emb, text_seq=text_seq, tokens=tokens)
