"""The ways in which `unclip sweep-probe` draws the same captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.batches import Batches, Meter, Progress
from unclip.cli.asked import Asked, with_captions_decoder, with_text_embedding_decoder
from unclip.cli.pictures import ddim_sampling, parse_numbers, sampling_bar
from unclip.cli.reconstruct import psnr
from unclip.data.shards import Sample
from unclip.errors import ConfigError, DataError
from unclip.evaluation.binding import is_right
from unclip.evaluation.probes import Share, read_scenes
from unclip.jobs import Job, Sampling
from unclip.manipulate import check_share, edit_jobs, find_latents, invertible, text_difference, variation_jobs
from unclip.pipeline import UnCLIP
from unclip.report.probe import Cell, Point

DEFAULT_VALUES = {"guidance": "1,1.5,2,3,4", "eta": "0,0.25,0.5,0.75,1", "theta": "0,0.125,0.25,0.375,0.5"}
KINDS = ("captions", "prior", *DEFAULT_VALUES)
DDIM_STEPS = 50


@dataclass
class Sweep:
    """What is swept over which captions; the two decoders are further rows."""

    kind: str
    runs: Path
    split: Path
    out: Path
    values: str | None = None
    text_decoder: Path | None = None
    text_embedding_decoder: Path | None = None
    num: int = 100
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--what {self.kind} is not one of {', '.join(KINDS)}")
        if self.values is not None and self.kind not in DEFAULT_VALUES:
            raise ConfigError(f"--values goes with {', '.join(DEFAULT_VALUES)}; leave it out for --what {self.kind}")
        if self.text_decoder is not None and self.kind not in ("guidance", "prior"):
            raise ConfigError("--text-decoder is a further row of --what guidance and --what prior only")
        if self.text_embedding_decoder is not None and self.kind != "prior":
            raise ConfigError("--text-embedding-decoder is a further row of --what prior only")
        for value in self.numbers:
            if self.kind in ("eta", "theta"):
                check_share(self.kind, value)

    @property
    def numbers(self) -> list[float]:
        """The values that are swept; none for a sweep of ways that have no number."""
        if self.kind not in DEFAULT_VALUES:
            return []
        return parse_numbers("--values", self.values or DEFAULT_VALUES[self.kind])

    @property
    def needs_prior(self) -> bool:
        """Whether any way begins with the prior; η and θ begin with the pictures."""
        return self.kind not in ("eta", "theta")


@dataclass
class Subject:
    """The captions; the samples' own pictures (S, S, 3) at the chain's size, and (N, 3, L, L) at the larger of its and CLIP's."""

    asked: Asked
    samples: list[Sample]
    real: list[np.ndarray]
    large: Tensor

    def true(self) -> Tensor:
        """The real pictures' z_i (N, D)."""
        return self.asked.true(list(self.large.permute(0, 2, 3, 1).numpy()))

    def next_shown(self, pictures: Sequence[np.ndarray]) -> dict[str, Cell]:
        """How often a picture holds the solids of the next caption, for shapes; nothing for other data."""
        scenes = [sample.meta for sample in self.samples[1:] + self.samples[:1]]
        if not all(len(scene.get("objects", ())) in (1, 2) for scene in scenes):
            return {}
        hits = [is_right(reading, scene) for reading, scene in zip(read_scenes(pictures), scenes, strict=True)]
        return {"shows the next caption": Share(sum(hits), len(hits))}

    def refuse_equal_neighbours(self) -> None:
        """DataError where a caption is followed by itself, so that taking the next one's changes nothing."""
        captions = self.asked.captions
        for caption, other in zip(captions, captions[1:] + captions[:1], strict=True):
            if caption == other:
                raise DataError(f'two neighbouring samples are both "{caption}"; take another --num or split')


@dataclass
class Way:
    """What was drawn, measures that only this sweep has, and its place on the plot of a sweep of numbers."""

    pictures: list[np.ndarray]
    measures: dict[str, Cell] = field(default_factory=dict)
    point: Point | None = None


def sweep_captions(cfg: Sweep, subject: Subject) -> dict[str, Way]:
    """What the decoder's caption path does beside z_i: on, off, and with the next sample's caption (paper §2.1)."""
    asked = subject.asked
    if not asked.pipeline.configs["decoder"].conditioning.reads_text:
        raise ConfigError(f"the decoder of {cfg.runs} has no caption path (model.conditioning.text): nothing to sweep")
    subject.refuse_equal_neighbours()
    z_i = asked.prior
    others = asked.text.rows([*range(1, len(asked.captions)), 0])
    conds = {
        "caption path on": asked.with_captions(z_i),
        "caption path off": asked.only(z_i),
        "caption path shuffled": replace(others, image_emb=z_i),
        "caption only": asked.text,
    }
    drawn = {title: asked.draw(title, cond) for title, cond in conds.items()}
    return {title: Way(pictures, subject.next_shown(pictures)) for title, pictures in drawn.items()}


def sweep_prior(cfg: Sweep, subject: Subject) -> dict[str, Way]:
    """What stands in z_i's place, without the caption: the paper's ablation of the prior (§5.1, figure 8)."""
    asked, z_t = subject.asked, subject.asked.text.text_emb
    assert z_t is not None
    true = subject.true()
    rows = {"prior's z_i": asked.prior, "z_t, zero-shot": z_t, "true z_i": true}
    found = {}
    for title, emb in rows.items():
        cosine = float(F.cosine_similarity(emb.cpu(), true.cpu(), dim=-1).mean())
        found[title] = Way(asked.draw(title, asked.only(emb)), {"cosine to true z_i": cosine})
    if cfg.text_embedding_decoder is not None:
        chain, title = with_text_embedding_decoder(cfg.runs, cfg.text_embedding_decoder), "z_t, decoder trained on it"
        found[title] = Way(asked.draw(title, asked.only(z_t), chain))
    if cfg.text_decoder is not None:
        chain, title = with_captions_decoder(cfg.runs, cfg.text_decoder), "decoder of captions alone"
        found[title] = Way(asked.draw(title, asked.text, chain))
    return found


def sweep_guidance(cfg: Sweep, subject: Subject) -> dict[str, Way]:
    """Figures 9 and 11: z_i stays, so that guidance cannot change what is drawn; a decoder of captions alone has no such anchor.

    ``pixels changed``: root of the mean squared difference to the first scale's pictures, of 255.
    """
    asked = subject.asked
    chains = [("", asked.pipeline, asked.with_captions(asked.prior))]
    if cfg.text_decoder is not None:
        chains.append(("GLIDE form", with_captions_decoder(cfg.runs, cfg.text_decoder), asked.text))
    found = {}
    for line, chain, cond in chains:
        first: list[np.ndarray] | None = None
        for scale in cfg.numbers:
            title = f"{line}, guidance {scale:g}" if line else f"guidance {scale:g}"
            pictures = asked.draw(title, cond, chain, _guided(chain, scale))
            first = pictures if first is None else first
            found[title] = Way(pictures, {"pixels changed": _rms(pictures, first)}, Point(line, scale))
    return found


def _guided(chain: UnCLIP, scale: float) -> Sampling:
    own = chain.defaults["decoder"]
    try:
        return Sampling(decoder=replace(own, guidance=replace(own.guidance, scale=scale)))
    except ValueError as error:
        raise ConfigError(f"--values {scale:g}: {error}") from error


def sweep_eta(cfg: Sweep, subject: Subject) -> dict[str, Way]:
    """Variations of the pictures from z_i and inverted x_T by DDIM: η = 0 reconstructs, 1 varies most (paper §3.1).

    ``PSNR``: to the real pictures, in dB. ``pixels changed``: between two seeds, of 255, in the decoder's own pictures:
    upsamplers add noise of theirs whatever η is.
    """
    true, found = torch.from_numpy(np.stack(subject.real)), {}
    with sampling_bar() as progress:
        inverted = _Inverted(subject, 3 * len(cfg.numbers), progress)
        for eta in cfg.numbers:
            jobs = [variation_jobs(inverted.latents, None, 1, cfg.seed + j, eta) for j in range(2)]
            drawn = inverted.run(jobs[0], eta)
            changed = _rms(*(inverted.run(some, eta, last="decoder") for some in jobs))
            measures: dict[str, Cell] = {"PSNR": psnr(true, [torch.from_numpy(picture) for picture in drawn])}
            found[f"η = {eta:g}"] = Way(drawn, {**measures, "pixels changed": changed}, Point("", eta))
    return found


def sweep_theta(cfg: Sweep, subject: Subject) -> dict[str, Way]:
    """Text differences from each picture's caption to the next sample's, with x_T as it was found (paper §3.3)."""
    subject.refuse_equal_neighbours()
    text = subject.asked.text.text_emb
    assert text is not None
    difference = text_difference(text.roll(-1, dims=0), text)
    wanted, found = subject.asked.captions[1:] + subject.asked.captions[:1], {}
    with sampling_bar() as progress:
        inverted = _Inverted(subject, len(cfg.numbers), progress)
        for theta in cfg.numbers:
            pictures = inverted.run(edit_jobs(inverted.latents, difference, wanted, [theta], cfg.seed))
            measures = {"pixels changed": _rms(pictures, subject.real), **subject.next_shown(pictures)}
            found[f"θ = {theta:g}"] = Way(pictures, measures, Point("", theta))
    return found


class _Inverted:
    """The latents (z_i, x_T) of the pictures, and what is drawn from them, with one progress bar for all."""

    def __init__(self, subject: Subject, num_drawings: int, progress: Progress) -> None:
        self.chain, count = subject.asked.pipeline, len(subject.samples)
        how = self.how(0.0)
        total = count * (self.chain.num_steps("inversion", how) + num_drawings * self.chain.steps_of_all(how))
        self.batches = Batches(subject.asked.batch_size, Meter(progress, total))
        self.latents = find_latents(self.chain, subject.large, None, how, self.batches, invert=True)

    def how(self, eta: float, last: str | None = None) -> Sampling:
        return invertible(self.chain, Sampling(decoder=ddim_sampling(self.chain, DDIM_STEPS), last=last), eta)

    def run(self, jobs: Sequence[Job], eta: float = 0.0, last: str | None = None) -> list[np.ndarray]:
        """The pictures of jobs; ``last``: the stage to stop after."""
        drawn = self.chain.run(jobs, self.how(eta, last), self.batches)
        return [picture.image.permute(1, 2, 0).numpy() for picture in drawn]


def _rms(pictures: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Root of the mean squared difference, of 255."""
    return float(np.sqrt(np.mean((np.stack(pictures).astype(float) - np.stack(others)) ** 2)))


WAYS: dict[str, Callable[[Sweep, Subject], dict[str, Way]]] = {
    "captions": sweep_captions,
    "prior": sweep_prior,
    "guidance": sweep_guidance,
    "eta": sweep_eta,
    "theta": sweep_theta,
}
