"""Captions, each with a seed of its own, and what a chain makes of them: what the probes share."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unclip.config import Precision
from unclip.errors import ArtifactError
from unclip.jobs import Sampling
from unclip.loading import folders_of
from unclip.models.decoder import Embedding
from unclip.nets.layers import Cond
from unclip.pipeline import UnCLIP
from unclip.progress import track

REAL = "real renders"
ON, OFF = "prior's z_i and caption", "prior's z_i only"
TRUE, CAPTION = "encode and decode (true z_i)", "caption only"
GLIDE = "GLIDE form (captions alone)"


class Asked:
    """N captions of one chain, drawn ``batch_size`` at a time; caption i has the seed ``seed`` + i in every drawing."""

    def __init__(self, pipeline: UnCLIP, captions: Sequence[str], seed: int, batch_size: int) -> None:
        self.pipeline, self.captions, self.batch_size = pipeline, list(captions), batch_size
        self.seeds = [seed + i for i in range(len(captions))]
        self.text = pipeline.embed_text(self.captions)

    def parts(self) -> Iterator[list[int]]:
        """The rows, a batch at a time."""
        for start in range(0, len(self.seeds), self.batch_size):
            yield list(range(start, min(start + self.batch_size, len(self.seeds))))

    @cached_property
    def prior(self) -> Tensor:
        """The prior's z_i (N, D), drawn once."""
        return torch.cat(
            [self.pipeline.sample_prior(self.text.rows(r), [self.seeds[i] for i in r]) for r in self.parts()]
        )

    def true(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """z_i (N, D) of N pictures (S, S, 3) uint8."""
        stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return torch.cat([self.pipeline.embed_image(stack[r]) for r in self.parts()])

    def only(self, z_i: Tensor) -> Cond:
        """These z_i without the captions."""
        return Cond(image_emb=z_i, num_rows=len(z_i))

    def with_captions(self, z_i: Tensor) -> Cond:
        """These z_i and the captions."""
        return replace(self.text, image_emb=z_i)

    def draw_ways(self, real: Sequence[np.ndarray] | None, other: UnCLIP | None = None) -> dict[str, list[np.ndarray]]:
        """The chain with and without its caption path, from the z_i of ``real`` pictures of the captions, from the caption
        alone, and by ``other``, a decoder of the GLIDE form: what there is of these, by title."""
        z_i = self.prior
        conds = {ON: self.with_captions(z_i), OFF: self.only(z_i)}
        if real is not None:
            conds[TRUE] = self.only(self.true(real))
        conds[CAPTION] = self.text
        if not self.pipeline.configs["decoder"].conditioning.reads_text:
            conds = {title: cond for title, cond in conds.items() if title in (OFF, TRUE)}
        drawn = {title: self.draw(title, cond) for title, cond in conds.items()}
        return drawn if other is None else {**drawn, GLIDE: self.draw(GLIDE, self.text, other)}

    def draw(
        self, title: str, cond: Cond, pipeline: UnCLIP | None = None, how: Sampling | None = None
    ) -> list[np.ndarray]:
        """N pictures (S, S, 3) uint8; ``pipeline``: another chain of the same CLIP, ``title`` stands by the progress bar."""
        chain, parts, found = pipeline or self.pipeline, list(self.parts()), []
        told = f"drawing {len(self.seeds)} pictures: {title}"
        for r in track(parts, told, len(parts)):
            pictures = chain.decode(cond.rows(r), [self.seeds[i] for i in r], how)
            found += list(pictures.permute(0, 2, 3, 1).numpy())
        return found


def load_chain(runs: Path, needs_prior: bool = True) -> UnCLIP:
    """The chain below ``runs`` in bf16; ArtifactError where a prior is needed and missing."""
    pipeline = UnCLIP.load(runs, precision=Precision.bf16)
    if needs_prior and "prior" not in pipeline.manifests:
        raise ArtifactError(f"{runs} has no run prior, which this probe needs: run train-prior")
    return pipeline


def with_captions_decoder(runs: Path, decoder: Path) -> UnCLIP:
    """The chain below ``runs`` without its prior and with a decoder of the GLIDE form; ArtifactError for any other."""
    chain = _with_decoder(runs, decoder)
    if chain.configs["decoder"].conditioning.image:
        raise ArtifactError(
            f"{decoder} is a decoder that sees z_i; the GLIDE form is trained with model.conditioning.image=false"
        )
    return chain


def with_text_embedding_decoder(runs: Path, decoder: Path) -> UnCLIP:
    """The chain below ``runs`` without its prior and with a decoder that was trained on z_t; ArtifactError for any other."""
    chain = _with_decoder(runs, decoder)
    if chain.configs["decoder"].embedding is not Embedding.text:
        raise ArtifactError(f"{decoder} was not trained on z_t; train it with model.embedding=text")
    return chain


def _with_decoder(runs: Path, decoder: Path) -> UnCLIP:
    folders = {name: folder for name, folder in folders_of(runs).items() if name != "prior"}
    return UnCLIP.load({**folders, "decoder": decoder}, precision=Precision.bf16)


def artifacts_of(pipeline: UnCLIP) -> dict[str, str]:
    """The first letters of each artifact's hash, for the record."""
    return {name: value[:12] for name, value in pipeline.hashes.items()}
