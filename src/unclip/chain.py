"""The trained stages of one CLIP, and how pictures are drawn through them, batch by batch."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.artifact import Manifest, refuse_half
from unclip.batches import Batches
from unclip.config import Precision
from unclip.diffusion.inversion import ddim_invert
from unclip.diffusion.noise import Noise
from unclip.diffusion.repaint import repaint
from unclip.diffusion.samplers import OnStep
from unclip.errors import ArtifactError, ConfigError
from unclip.jobs import Drawn, Job, Sampling, known_parts, laid_over, there
from unclip.loading import Models, OnDemand
from unclip.models.pictures import middle, resize, to_range, to_uint8
from unclip.models.sampling import AnyPriorSampling, ARSampling, DiffusionSampling, NoSampling, UpsamplerSampling
from unclip.nets.layers import Cond

log = logging.getLogger(__name__)
LONGEST_WORD = 256  # letters; a longer one is no word, and would keep the tokenizer busy for minutes


class Chain:
    """The stages and the steps between them. Each picture has its own seed; the same seed gives the same picture in any batch."""

    def __init__(
        self,
        stages: Mapping[str, tuple[Any, Manifest, Path]],
        device: torch.device | str = "cpu",
        precision: Precision = Precision.fp32,
    ) -> None:
        self.device, self.precision = torch.device(device), precision
        self.one_at_a_time = isinstance(stages, OnDemand)
        self.manifests: dict[str, Manifest] = {}
        self.folders: dict[str, Path] = {}
        self.configs: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        for name in stages:
            model, self.manifests[name], self.folders[name] = stages[name]
            self.configs[name] = model.cfg
            if name == "clip":
                self.clip_size: int = model.image_size
            else:
                self.defaults[name] = model.default_sampling()
            del model  # before the next one is read
        self.models: Mapping[str, Any] = Models(stages, self.device)
        self.upsamplers = [name for name in stages if name.startswith("upsampler")]
        self.upsamplers.sort(key=lambda name: self.configs[name].image_size)
        self._refuse_mixed()

    @property
    def size(self) -> int:
        """Side of the finished pictures in pixels."""
        return self.configs[self.upsamplers[-1] if self.upsamplers else "decoder"].image_size

    @property
    def sees_z_i(self) -> bool:
        """Whether the decoder does; one of captions alone needs no prior."""
        return self.configs["decoder"].conditioning.image

    @property
    def _autocast(self) -> torch.autocast:
        """A new one each time: threads must not share one."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision is Precision.bf16)

    @property
    def hashes(self) -> dict[str, str]:
        """Of all artifacts."""
        return {name: manifest.hash for name, manifest in self.manifests.items()}

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str], num_tokens: int = 0) -> Cond:
        """z_t, token states and tokens of captions, padded to the longest or to ``num_tokens``.

        A warning names captions that are longer than CLIP reads.
        """
        clip = self.models["clip"]
        readable = [_readable(caption) for caption in captions]
        for caption in dict.fromkeys(readable):
            length, limit = clip.tokenizer.length(caption), clip.tokenizer.context_length
            if length > limit:
                log.warning("only %d of %d tokens are read of: %s ...", limit, length, caption[:60])
        tokens = clip.tokenize(readable).to(self.device)
        tokens = tokens[:, : max(num_tokens, int(tokens.argmax(dim=1).max()) + 1)]
        with self._autocast:
            text_emb, text_seq = clip.encode_text(tokens)
        return Cond(text_emb=text_emb.float(), text_seq=text_seq.float(), tokens=tokens)

    @torch.no_grad()
    def embed_image(self, pictures: Tensor) -> Tensor:
        """Raw z_i (B, D) of uint8 pictures (B, 3, H, W)."""
        with self._autocast:
            return self.models["clip"].encode_image(pictures.to(self.device)).float()

    def sample_prior(
        self,
        text: Cond,
        seeds: Sequence[int],
        how: AnyPriorSampling | None = None,
        negative: Cond | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """z_i (B, D) for embedded captions; ``negative``, one or B rows, is what guidance leads away from, if there is any."""
        prior = self.models["prior"]
        noise = Noise(seeds, self.device).branch("prior")
        how = how or self.defaults["prior"]
        with self._autocast:
            if negative is None or not is_guided(how):
                return prior.sample(text, how, noise, on_step=on_step).float()
            return prior.sample(text, how, noise, negative, on_step=on_step).float()

    def decode(self, cond: Cond, seeds: Sequence[int], how: Sampling | None = None) -> Tensor:
        """Decoder and upsamplers: uint8 (B, 3, H, W) on the CPU. A field of ``cond`` that is None is a dropped condition.

        Raises ValueError for a z_i that is not finite, which would give a grey or black picture.
        """
        how = self.resolved(how)
        pictures = self._base(cond, seeds, how)
        for name in how.upsamplers:
            pictures = self._upsampled(name, pictures, seeds, how.upsamplers[name])
        return to_uint8(pictures)

    def invert(self, pictures: Tensor, cond: Cond, how: Sampling, on_step: OnStep | None = None) -> Tensor:
        """x_T (B, 3, h, w) of uint8 pictures (B, 3, H, W) of any size, seen by the decoder under ``cond``."""
        assert how.decoder is not None
        _refuse_nonfinite(cond.image_emb)
        x0 = self.fitted(pictures, self.base_size(how)).to(self.device)
        with self._autocast:
            denoiser = self.models["decoder"].denoiser(cond, how.decoder, size=self.base_size(how))
            return ddim_invert(denoiser, x0, refinements=how.refinements, on_step=on_step)

    def _base(
        self,
        cond: Cond,
        seeds: Sequence[int],
        how: Sampling,
        negative: Cond | None = None,
        x_T: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        _refuse_nonfinite(cond.image_emb)
        noise = Noise(seeds, self.device).branch("decoder")
        with self._autocast:
            return self.models["decoder"].sample(
                cond, how.decoder, noise, negative, x_T, size=self.base_size(how), on_step=on_step
            )

    def _repainted(
        self, cond: Cond, seeds: Sequence[int], how: Sampling, jobs: Sequence[Job], on_step: OnStep | None = None
    ) -> Tensor:
        _refuse_nonfinite(cond.image_emb)
        assert how.decoder is not None
        size = self.base_size(how)
        known, mask = known_parts(jobs, size)
        noise = Noise(seeds, self.device).branch("decoder")
        with self._autocast:
            denoiser = self.models["decoder"].denoiser(cond, how.decoder, size=size)
            args = (known.to(self.device), mask.to(self.device), noise, how.repaint)
            temperature = how.decoder.sampler.temperature
            return repaint(denoiser, *args, temperature=temperature, on_step=on_step).clamp(-1, 1)

    def _upsampled(
        self, name: str, low: Tensor, seeds: Sequence[int], how: UpsamplerSampling, on_step: OnStep | None = None
    ) -> Tensor:
        noise = Noise(seeds, self.device).branch(name)
        with self._autocast:
            return self.models[name].sample(low.to(self.device), how, noise, on_step=on_step)

    def draw(self, jobs: Sequence[Job], how: Sampling, batches: Batches, num_tokens: int = 0) -> Drawn:
        """Jobs of one kind (all or none have a caption, z_i, x_T, a mask) through all stages, stage by stage."""
        seeds = [job.seed for job in jobs]
        cond, negative, num_tokens = self._conditions(jobs, how, batches, num_tokens, self.sees_z_i)
        steps = self.num_steps("decoder", how, masked=jobs[0].mask is not None)

        last = ["decoder", *how.upsamplers][-1]

        def kept(stage: str, drawn: Tensor) -> Tensor:
            return to_uint8(drawn) if stage == last else drawn.cpu()

        def base(rows: list[int], on_step: OnStep) -> Tensor:
            mine, some = [seeds[i] for i in rows], cond.rows(rows).to(self.device)
            if jobs[0].mask is not None:
                return kept("decoder", self._repainted(some, mine, how, [jobs[i] for i in rows], on_step))
            x_T = None if jobs[0].x_T is None else torch.stack([there(jobs[i].x_T) for i in rows]).to(self.device)
            against = None if negative is None else negative.rows([0] * len(rows)).to(self.device)
            return kept("decoder", self._base(some, mine, how, against, x_T, on_step))

        pictures = torch.cat(batches.each("decoder", len(jobs), steps, base))
        for name, sampling in how.upsamplers.items():

            def upsampled(rows: list[int], on_step: OnStep, name: str = name, low: Tensor = pictures) -> Tensor:
                mine = [seeds[i] for i in rows]
                return kept(name, self._upsampled(name, low[rows], mine, how.upsamplers[name], on_step))

            pictures = torch.cat(batches.each(name, len(jobs), sampling.sampler.num_steps, upsampled))
        images = [laid_over(image, job) for image, job in zip(pictures, jobs, strict=True)]
        return Drawn(images, num_tokens)

    def _conditions(
        self, jobs: Sequence[Job], how: Sampling, batches: Batches, num_tokens: int, with_z_i: bool = True
    ) -> tuple[Cond, Cond | None, int]:
        """What the decoder is told of each job, what it is led away from (one row), and the captions' length in tokens."""
        cond, negative = Cond(num_rows=len(jobs)), None
        captions = [job.caption for job in jobs if job.caption is not None]
        if captions:
            num_tokens = num_tokens or self._num_tokens(captions)
            cond = self.embed_texts(captions, batches, num_tokens)
        if jobs[0].negative is not None:
            negative = self.embed_text([jobs[0].negative])
        if jobs[0].image_emb is not None:
            cond.image_emb = torch.stack([there(job.image_emb) for job in jobs]).to(self.device)
        elif captions and with_z_i:
            cond.image_emb = torch.cat(self.draw_z_i(jobs, cond, negative, how, batches))
        return cond, negative, num_tokens

    def embed_texts(self, captions: Sequence[str], batches: Batches, num_tokens: int = 0) -> Cond:
        """:meth:`embed_text` in batches that fit into memory."""
        num_tokens = num_tokens or self._num_tokens(captions)
        parts = batches.each(
            "clip", len(captions), 0, lambda rows, _: self.embed_text([captions[i] for i in rows], num_tokens)
        )
        cond = parts[0]
        for part in parts[1:]:
            cond = Cond.cat(cond, part)
        return replace(cond, text_mask=None)

    def draw_z_i(
        self, jobs: Sequence[Job], text: Cond, negative: Cond | None, how: Sampling, batches: Batches
    ) -> list[Tensor]:
        """The prior's z_i of jobs with these embedded captions: parts (b, D), one for each batch."""

        def prior(rows: list[int], on_step: OnStep) -> Tensor:
            return self.sample_prior(text.rows(rows), [jobs[i].seed for i in rows], how.prior, negative, on_step)

        return batches.each("prior", len(jobs), self.num_steps("prior", how), prior)

    def _num_tokens(self, captions: Sequence[str]) -> int:
        tokens = self.models["clip"].tokenize([_readable(caption) for caption in captions])
        return int(tokens.argmax(dim=1).max()) + 1

    def resolved(self, how: Sampling | None, decoder: DiffusionSampling | None = None) -> Sampling:
        """``how`` with every stage's settings filled in: ``decoder`` or the artifacts' own; upsamplers in order, up to ``last``.

        Raises :class:`ConfigError` for a size that the networks cannot make and for an unknown last stage.
        """
        how = how or Sampling()
        names = self.upsamplers
        if how.last is not None and how.last not in ("decoder", *names):
            raise ConfigError(f"there is no stage {how.last} to stop after; choose {', '.join(['decoder', *names])}")
        if how.last is not None:
            names = names[: names.index(how.last) + 1] if how.last in names else []
        full = replace(
            how,
            prior=how.prior or self.defaults.get("prior"),
            decoder=how.decoder or decoder or self.defaults["decoder"],
            upsamplers={name: how.upsamplers.get(name) or self.defaults[name] for name in names},
        )
        self._check_size(full)
        return full

    def _check_size(self, how: Sampling) -> None:
        height, width = self.base_size(how)
        stride = self.configs["decoder"].stride
        if min(height, width) < stride or height % stride or width % stride:
            raise ConfigError(f"a size of {width}x{height} is not possible: both must be multiples of {stride}")
        for name in how.upsamplers:
            cfg = self.configs[name]
            factor = cfg.image_size // cfg.low_size
            height, width = height * factor, width * factor
            if height % cfg.net.stride or width % cfg.net.stride:
                raise ConfigError(
                    f"{name} cannot make {width}x{height} pixels: both must be multiples of {cfg.net.stride}"
                )

    def base_size(self, how: Sampling) -> tuple[int, int]:
        """Height and width of the decoder's picture."""
        side = self.configs["decoder"].image_size
        return how.size or (side, side)

    def finished_size(self, how: Sampling) -> tuple[int, int]:
        """Height and width of the finished picture, ``how`` being resolved."""
        height, width = self.base_size(how)
        for name in how.upsamplers:
            factor = self.configs[name].image_size // self.configs[name].low_size
            height, width = height * factor, width * factor
        return height, width

    def fitted(self, pictures: Tensor, size: tuple[int, int]) -> Tensor:
        """The middle of uint8 pictures (B, 3, H, W), resized to ``size``, in [-1, 1]."""
        return resize(to_range(middle(pictures, size)), size)

    def num_steps(self, stage: str, how: Sampling, masked: bool = False) -> int:
        """Evaluations that one picture takes of a stage, or of the decoder backwards ("inversion"); ``how`` is resolved."""
        if stage == "inversion":
            return self.num_steps("decoder", how) * how.refinements
        if stage == "decoder":
            assert how.decoder is not None
            count = how.decoder.sampler.num_steps
            return sum(how.repaint.moves(count)) if masked else count
        if stage == "prior":
            if isinstance(how.prior, DiffusionSampling):
                return how.prior.sampler.num_steps
            return 1 if isinstance(how.prior, NoSampling | None) else AR_STEPS
        return how.upsamplers[stage].sampler.num_steps

    def steps_of_all(self, how: Sampling, masked: bool = False) -> int:
        """Those of the decoder and the upsamplers together."""
        return self.num_steps("decoder", how, masked) + sum(self.num_steps(name, how) for name in how.upsamplers)

    def _refuse_mixed(self) -> None:
        """All stages must stem from the same CLIP (upsamplers need none), and each must take what the one before makes."""
        clip = self.manifests["clip"].hash
        for name, manifest in self.manifests.items():
            theirs = manifest.interface.get("clip", "")
            if name != "clip" and theirs and theirs != clip:
                raise ArtifactError(
                    f"{self.folders[name]} was trained on CLIP {theirs[:8]} but {self.folders['clip']} is CLIP {clip[:8]}; "
                    "use stages that were trained on one CLIP, or embed and train again"
                )
        refuse_half(self.manifests["decoder"], self.folders["decoder"])
        prior, decoder = self.configs.get("prior"), self.configs["decoder"]
        if prior is not None and self.sees_z_i and decoder.is_raw and not prior.is_raw:
            raise ArtifactError(
                f"{self.folders['prior']} makes z_i of unit norm, but {self.folders['decoder']} takes them as CLIP makes them "
                "(embedding_norm=raw): train a prior with model.embedding_space=whitened or pca"
            )
        for name, before in zip(self.upsamplers, ["decoder", *self.upsamplers], strict=False):
            takes, gets = self.configs[name].low_size, self.configs[before].image_size
            if takes != gets:
                raise ArtifactError(
                    f"{self.folders[name]} takes pictures of {takes} pixels but {self.folders[before]} makes {gets}; "
                    "use stages that fit one another"
                )


AR_STEPS = 100  # progress is counted in steps; an autoregressive prior's codes count as so many


def is_guided(how: AnyPriorSampling | None) -> bool:
    """Whether guidance acts in a prior."""
    if isinstance(how, ARSampling):
        return how.guidance_scale != 1
    return isinstance(how, DiffusionSampling) and how.guidance.scale != 1


def _refuse_nonfinite(image_emb: Tensor | None) -> None:
    bad = [] if image_emb is None else (~image_emb.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ConfigError(
            f"z_i of row {bad[0]} is not finite ({len(bad)} of the batch): look at the prior or at the picture it came from; "
            "where it was computed in bfloat16, take float32"
        )


def _readable(caption: str) -> str:
    """The caption with single spaces and no word of more than LONGEST_WORD letters."""
    words = caption.split()
    if any(len(word) > LONGEST_WORD for word in words):
        log.warning("words of more than %d letters are cut in: %s ...", LONGEST_WORD, caption[:60])
    return " ".join(word[:LONGEST_WORD] for word in words)
