"""UnCLIP: captions and pictures to pictures, through all stages of a chain."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.artifact import Manifest
from unclip.batches import Again, Batches, Meter, Progress, chunks
from unclip.chain import Chain, is_guided
from unclip.config import Precision
from unclip.errors import ArtifactError, ConfigError
from unclip.interop.hub import runs_folder
from unclip.jobs import Job, Picture, Sampling
from unclip.loading import Memory, OnDemand, folders_of, read_stage
from unclip.manipulate import (
    DEFAULT_THETAS,
    batches_for,
    check_captions,
    check_num,
    check_pictures,
    check_share,
    edit_jobs,
    find_latents,
    inpainting_jobs,
    interpolation_jobs,
    invertible,
    latents_of_ends,
    need_image,
    need_text,
    slerp,
    text_difference,
    variation_jobs,
)
from unclip.models.pictures import middle
from unclip.nets.layers import Cond

__all__ = ["Memory", "Picture", "Sampling", "UnCLIP"]


class UnCLIP(Chain):
    """The trained stages of one CLIP, ready to use.

    Pictures come one by one, as their batches are done; each has its own seed, and the same seed gives the same picture in
    any batch. ``how`` says how the stages sample, see :class:`Sampling`. ``progress(done, total)`` is called after every
    sampling step with counts of steps over the whole job, a batch's step counting once for each of its pictures; what it
    raises ends the job. Where memory does not suffice, batches are halved, which a log line says. What cannot be done is
    refused with :class:`ConfigError` or :class:`ArtifactError` before anything is drawn.
    """

    @classmethod
    def load(
        cls,
        runs: Path | str | Mapping[str, Path],
        device: torch.device | str | None = None,
        precision: Precision = Precision.fp32,
        keep_in_memory: Memory = Memory.all,
        prior: Path | str | None = None,
    ) -> "UnCLIP":
        """All stages below the folder ``runs``: its sub-folders clip, prior, decoder and upsampler*, each a run or an artifact.

        ``runs`` may also be hf://OWNER/NAME of the hub, or map these names to folders. Without a prior, captions cannot be
        drawn, but pictures can be varied.
        ``prior`` is another prior's folder, in place of the one there.
        ``keep_in_memory`` one holds a single stage at a time: each draws for all pictures before the next one is read.
        Raises :class:`ArtifactError` for a missing stage, a damaged one, or stages of different CLIPs.
        """
        named = {name: Path(f) for name, f in runs.items()} if isinstance(runs, Mapping) else None
        folders = folders_of(runs_folder(str(runs))) if named is None else named
        if prior is not None:
            folders["prior"] = Path(prior)
        if absent := {"clip", "decoder"} - folders.keys():
            raise ArtifactError(f"the stage {min(absent)} is missing: give its folder")
        stages: Mapping[str, tuple[Any, Manifest, Path]] = OnDemand(folders)
        if keep_in_memory is Memory.all:
            stages = {name: read_stage(name, folder) for name, folder in folders.items()}
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(stages, device, precision)

    def generate(
        self,
        captions: Sequence[str],
        *,
        num: int = 1,
        seed: int = 0,
        how: Sampling | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
        negative: str | None = None,
    ) -> Iterator[Picture]:
        """``num`` pictures for each caption, with seeds ``seed``, ``seed`` + 1, ...

        ``negative``: a caption that guidance leads away from, instead of from no caption; without guidance it is refused.
        """
        full, jobs, batches = self._asked(captions, num, seed, how, batch_size, progress, negative)
        batches.meter.total = self._total(len(jobs), full, prior=self.sees_z_i)
        return self.run(jobs, full, batches)

    def sample_embeddings(
        self,
        captions: Sequence[str],
        *,
        num: int = 1,
        seed: int = 0,
        how: Sampling | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
        negative: str | None = None,
    ) -> Tensor:
        """What the prior makes of captions, and nothing further: z_i (N, D), in the order of :meth:`generate`'s pictures."""
        full, jobs, batches = self._asked(captions, num, seed, how, batch_size, progress, negative, decodes=False)
        batches.meter.total = len(jobs) * self.num_steps("prior", full)
        found = []
        for part in chunks(jobs, batch_size):
            z_i = self._conditions(part, full, batches, 0)[0].image_emb
            assert z_i is not None
            found.append(z_i.cpu())
        return torch.cat(found)

    def _asked(
        self,
        captions: Sequence[str],
        num: int,
        seed: int,
        how: Sampling | None,
        batch_size: int,
        progress: Progress | None,
        negative: str | None,
        decodes: bool = True,
    ) -> tuple[Sampling, list[Job], Batches]:
        captions, full = check_captions(captions), self.resolved(how)
        if not decodes or self.sees_z_i:
            self._need_prior("generate")
        check_num(num)
        if negative is not None:
            self._check_negative(full, decodes)
            negative = check_captions([negative])[0]
        words = {"operation": "generate"} | ({} if negative is None else {"negative": negative})
        wanted = [(caption, seed + j) for caption in captions for j in range(num)]
        jobs = [Job(seed, caption, negative, title=caption, words=words) for caption, seed in wanted]
        return full, jobs, batches_for(batch_size, Meter(progress, 0))

    def vary(
        self,
        pictures: Tensor,
        *,
        captions: Sequence[str] | None = None,
        num: int = 4,
        seed: int = 0,
        eta: float = 1.0,
        how: Sampling | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Iterator[Picture]:
        """``num`` variations of each of uint8 pictures (B, 3, H, W): decoded from their z_i and inverted x_T by DDIM (paper §3.1).

        ``eta`` 0 reconstructs, 1 varies most. ``captions``: what a decoder with a caption path also reads; else it is dropped.
        """
        full = invertible(self, how, eta)
        pictures, batches = check_pictures(pictures), batches_for(batch_size, Meter(progress, 0))
        check_num(num)
        if captions is not None:
            need_text(self)
            if len(captions := check_captions(captions)) != len(pictures):
                raise ConfigError(f"{len(captions)} captions for {len(pictures)} pictures; give one for each")
        steps = self.num_steps("inversion", full)
        batches.meter.total = len(pictures) * steps + self._total(num * len(pictures), full)

        def jobs() -> list[Job]:
            latents = find_latents(self, pictures, captions, full, batches, invert=True)
            return variation_jobs(latents, captions, num, seed, eta)

        return self._lazily(jobs, full, batches)

    def interpolate(
        self,
        pictures: Tensor | None = None,
        *,
        captions: Sequence[str] = (),
        frames: int = 9,
        seed: int = 0,
        noise: str = "slerp",
        how: Sampling | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Iterator[Picture]:
        """``frames`` pictures from each of uint8 pictures (K, 3, H, W) to the next, with both ends: K - 1 stretches (paper §3.2).

        ``captions`` follow the pictures as further ends, by the prior's z_i; or they are the only ones. ``noise`` slerp goes from
        one x_T to the next, a picture's being inverted, so that its end is the reconstruction, and a caption's that of its seed:
        ``seed``, ``seed`` + 1, ... Fixed takes the seed's noise for all frames.
        """
        if noise not in ("slerp", "fixed"):
            raise ConfigError(f"noise is {noise!r}; it must be slerp (between the pictures' own x_T) or fixed")
        if frames < 2:
            raise ConfigError(f"frames is {frames}; an interpolation has at least its 2 ends")
        full, batches = invertible(self, how), batches_for(batch_size, Meter(progress, 0))
        shown = 0 if pictures is None else len(check_pictures(pictures))
        if len(captions):
            captions = check_captions(captions)
            self._need_prior("interpolate between captions")
        ends = shown + len(captions)
        if ends < 2:
            raise ConfigError(f"{ends} pictures and captions are too few to go from one to the next; give at least 2")
        inverted = shown if noise == "slerp" else 0
        batches.meter.total = inverted * self.num_steps("inversion", full)
        batches.meter.total += len(captions) * self.num_steps("prior", full)
        batches.meter.total += self._total((ends - 1) * (frames - 1) + 1, full)

        def jobs() -> list[Job]:
            ends = latents_of_ends(self, pictures, captions, seed, full, batches, noisy=noise == "slerp")
            return interpolation_jobs(ends, frames, seed)

        return self._lazily(jobs, full, batches)

    def edit(
        self,
        picture: Tensor,
        caption: str,
        *,
        base_caption: str | None = "a photo",
        thetas: Sequence[float] = DEFAULT_THETAS,
        seed: int = 0,
        how: Sampling | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Iterator[Picture]:
        """A text difference (paper §3.3): uint8 ``picture`` (3, H, W), its z_i turned towards z_d = norm(z_t - z_t0) by each theta.

        ``base_caption`` describes the picture as it is; None: z_d = norm(z_t). x_T is the picture's own throughout.
        """
        full = invertible(self, how)
        caption = check_captions([caption])[0]
        base = None if base_caption is None else check_captions([base_caption])[0]
        thetas = [check_share("theta", theta) for theta in thetas]
        check_num(len(thetas))
        pictures, batches = check_pictures(picture[None]), batches_for(batch_size, Meter(progress, 0))
        text = self.embed_text([caption] if base is None else [caption, base]).text_emb
        assert text is not None
        difference = text_difference(text[0], None if base is None else text[1])
        batches.meter.total = self.num_steps("inversion", full) + self._total(len(thetas), full)

        def jobs() -> list[Job]:
            latents = find_latents(self, pictures, None, full, batches, invert=True)
            found = edit_jobs(latents, difference[None], [caption], thetas, seed)
            return [replace(job, words={**job.words, "base_caption": base}) for job in found]

        return self._lazily(jobs, full, batches)

    def mix(
        self,
        picture: Tensor,
        caption: str,
        *,
        weights: Sequence[float] = (0.25, 0.5, 0.75),
        num: int = 1,
        seed: int = 0,
        how: Sampling | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Iterator[Picture]:
        """A caption and uint8 ``picture`` (3, H, W) in one: slerp from its z_i to the prior's for the caption, by each weight.

        Weight 0 is the picture (without its x_T), 1 the caption. ``num`` pictures a weight, with seeds ``seed``, ...
        """
        need_image(self)
        full, caption = self.resolved(how), check_captions([caption])[0]
        weights = [check_share("weight", weight) for weight in weights]
        check_num(num * len(weights))
        pictures, batches = check_pictures(picture[None]), batches_for(batch_size, Meter(progress, 0))
        self._need_prior("mix")
        batches.meter.total = num * self.num_steps("prior", full) + self._total(num * len(weights), full)

        def jobs() -> list[Job]:
            z_i = find_latents(self, pictures, None, full, batches, invert=False).image_emb[0]
            seeds = [seed + j for j in range(num)]
            wanted = torch.cat(
                self.draw_z_i([Job(s) for s in seeds], self.embed_text([caption]).repeat(num), None, full, batches)
            )
            wanted = wanted.cpu() * (z_i.norm() / wanted.cpu().norm(dim=1, keepdim=True))
            words = {"operation": "mix", "caption": caption}
            return [
                Job(s, image_emb=slerp(z_i, wanted[j], w), title=f"{caption} ({w:g})", words={**words, "weight": w})
                for w in weights
                for j, s in enumerate(seeds)
            ]

        return self._lazily(jobs, full, batches)

    def inpaint(
        self,
        picture: Tensor,
        mask: Tensor,
        caption: str | None = None,
        *,
        num: int = 1,
        seed: int = 0,
        how: Sampling | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Iterator[Picture]:
        """uint8 ``picture`` (3, H, W), repainted where ``mask`` (H, W) bool is True (white); elsewhere it stays as it is.

        The new part follows the prior's z_i of ``caption``, or the picture's own. It is sampled by RePaint (``how.repaint``).
        """
        full, pictures = self.resolved(how), check_pictures(picture[None])
        check_num(num)
        if mask.shape != picture.shape[1:]:
            raise ConfigError(
                f"the mask has {mask.shape[-1]}x{mask.shape[-2]} pixels but the picture {picture.shape[-1]}x"
                f"{picture.shape[-2]}; draw the mask on the picture"
            )
        if not bool(middle(mask, self.finished_size(full)).any()):
            raise ConfigError("the mask is empty: what is white (True) in it is repainted, in the middle that is drawn")
        if caption is None:
            need_image(self)
        else:
            caption = check_captions([caption])[0]
            self._need_prior("inpaint with a caption")
        batches = batches_for(batch_size, Meter(progress, 0))
        batches.meter.total = self._total(num, full, prior=caption is not None, masked=True)

        def jobs() -> list[Job]:
            z_i = None
            if caption is None:
                z_i = find_latents(self, pictures, None, full, batches, invert=False).image_emb[0]
            return inpainting_jobs(picture, mask, z_i, caption, num, seed, self.finished_size(full))

        return self._lazily(jobs, full, batches)

    def repeat(self, picture: Picture, progress: Progress | None = None) -> Picture:
        """The same picture again, bit for bit on the same machine; ``image`` of the given one is not read.

        Raises :class:`ArtifactError` where it was drawn by other artifacts, and ConfigError for another precision.
        """
        self._refuse_others(picture)
        meter = Meter(
            progress,
            self._total(1, picture.how, prior=picture.job.image_emb is None, masked=picture.job.mask is not None),
        )
        again = Again(picture.places, _picked, meter)
        drawn = self.draw([picture.job], picture.how, again, picture.num_tokens)
        return self._finished(picture.job, drawn.images[0], picture.how, picture.places, drawn.num_tokens)

    def _lazily(self, jobs: Callable[[], list[Job]], how: Sampling, batches: Batches) -> Iterator[Picture]:
        yield from self.run(jobs(), how, batches)

    def run(self, jobs: Sequence[Job], how: Sampling, batches: Batches) -> Iterator[Picture]:
        """The pictures of jobs of one kind, ``how`` being resolved: what all the methods above come down to."""
        size = len(jobs) if self.one_at_a_time else batches.size
        for part in chunks(jobs, size):
            batches.places = {}
            drawn = self.draw(part, how, batches)
            for i, (job, image) in enumerate(zip(part, drawn.images, strict=True)):
                places = {stage: found[i] for stage, found in batches.places.items()}
                yield self._finished(job, image, how, places, drawn.num_tokens)

    def _finished(
        self, job: Job, image: Tensor, how: Sampling, places: dict[str, tuple[int, int]], num_tokens: int
    ) -> Picture:
        used = {"clip", *places} & self.manifests.keys()
        hashes = {name: value for name, value in self.hashes.items() if name in used}
        return Picture(image, job.title, job.seed, hashes, job.words, job, how, places, num_tokens, self.precision.name)

    def _refuse_others(self, picture: Picture) -> None:
        for name, theirs in picture.artifacts.items():
            if name not in self.manifests:
                raise ArtifactError(f"the picture was drawn by a stage {name} ({theirs[:8]}), which is missing here")
            if (ours := self.manifests[name].hash) != theirs:
                raise ArtifactError(
                    f"the picture was drawn by {name} {theirs[:8]}, but {self.folders[name]} is {ours[:8]}; give the runs "
                    "that it was drawn from"
                )
        if picture.precision != self.precision.name:
            raise ConfigError(f"the picture was drawn in {picture.precision}; load the stages with that precision")

    def _need_prior(self, what: str) -> None:
        if "prior" not in self.manifests:
            raise ArtifactError(
                f"the stage prior is missing, which {what} needs: run train-prior (model=identity takes z_t for z_i)"
            )

    def _check_negative(self, how: Sampling, decodes: bool) -> None:
        """``decodes``: the decoder runs too, so that its guidance counts if it reads captions."""
        assert how.decoder is not None
        reads = decodes and self.configs["decoder"].conditioning.reads_text
        if not is_guided(how.prior) and not (reads and how.decoder.guidance.scale != 1):
            stages = "prior or decoder" if reads else "the prior, the only stage here that reads captions"
            raise ConfigError(f"a negative caption needs guidance: set a guidance scale other than 1 of {stages}")

    def _total(self, count: int, how: Sampling, prior: bool = False, masked: bool = False) -> int:
        return count * (self.steps_of_all(how, masked) + (self.num_steps("prior", how) if prior else 0))


def _picked(result: Any, index: int) -> Any:
    return result.rows([index]) if isinstance(result, Cond) else result[index : index + 1]
