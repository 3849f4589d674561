"""From captions to pictures through all stages: caption, z_t, prior, z_i, decoder, upsamplers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import Precision
from unclip.diffusion.noise import Noise
from unclip.errors import ArtifactError
from unclip.models.sampling import AnyPriorSampling, DiffusionSampling, UpsamplerSampling
from unclip.nets.layers import Cond

log = logging.getLogger(__name__)


@dataclass
class Sampling:
    """How each stage samples; None takes what the stage's artifact says."""

    prior: AnyPriorSampling | None = None
    decoder: DiffusionSampling | None = None
    upsampler: UpsamplerSampling | None = None


@dataclass
class Picture:
    """One picture with what is needed to make it again: uint8 (3, H, W), its caption, its seed, the artifacts' hashes."""

    image: Tensor
    caption: str
    seed: int
    artifacts: dict[str, str] = field(default_factory=dict)


class UnCLIP:
    """The trained stages of one CLIP, ready to use.

    Each picture has its own seed; the same seed gives the same picture in any batch.
    """

    def __init__(
        self,
        stages: dict[str, tuple[Any, Manifest, Path]],
        device: torch.device | str = "cpu",
        precision: Precision = Precision.fp32,
    ) -> None:
        _refuse_mixed(stages)
        self.device = torch.device(device)
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision is Precision.bf16)
        self.manifests = {name: manifest for name, (_, manifest, _) in stages.items()}
        self.models = {name: model.to(self.device) for name, (model, _, _) in stages.items()}
        self.upsamplers = sorted(name for name in stages if name.startswith("upsampler"))
        self.upsamplers.sort(key=lambda name: self.models[name].cfg.image_size)

    @classmethod
    def load(
        cls,
        runs: Path | str,
        device: torch.device | str | None = None,
        precision: Precision = Precision.fp32,
        prior: Path | str | None = None,
    ) -> "UnCLIP":
        """All stages below ``runs``: the sub-folders clip, prior, decoder and upsampler*, each a run or an artifact.

        ``prior`` is another prior's folder, in place of the one there.
        Raises :class:`ArtifactError` for a missing stage, a damaged one, or stages of different CLIPs.
        """
        runs = Path(runs)
        folders = {name: runs / name for name in ("clip", "prior", "decoder")}
        if prior is not None:
            folders["prior"] = Path(prior)
        folders |= {path.name: path for path in sorted(runs.glob("upsampler*")) if (path / "artifact").exists()}
        stages = {}
        for name, folder in folders.items():
            stages[name] = (*artifact.load(folder, kind=name.split("_")[0].rstrip("0123456789")), folder)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(stages, device, precision)

    @property
    def size(self) -> int:
        """Side of the finished pictures in pixels."""
        last = self.upsamplers[-1] if self.upsamplers else "decoder"
        return self.models[last].cfg.image_size

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Cond:
        """z_t, token states and tokens of captions; a warning names those that are longer than CLIP reads."""
        clip = self.models["clip"]
        for caption in dict.fromkeys(captions):
            length, limit = clip.tokenizer.length(caption), clip.tokenizer.context_length
            if length > limit:
                log.warning("only %d of %d tokens are read of: %s ...", limit, length, caption[:60])
        tokens = clip.tokenize(list(captions)).to(self.device)
        tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1]
        with self._autocast:
            text_emb, text_seq = clip.encode_text(tokens)
        return Cond(text_emb=text_emb.float(), text_seq=text_seq.float(), tokens=tokens)

    @torch.no_grad()
    def embed_image(self, pictures: Tensor) -> Tensor:
        """Raw z_i (B, D) of uint8 pictures (B, 3, H, W)."""
        with self._autocast:
            return self.models["clip"].encode_image(pictures.to(self.device)).float()

    def sample_prior(self, text: Cond, seeds: Sequence[int], how: AnyPriorSampling | None = None) -> Tensor:
        """z_i (B, D) for embedded captions."""
        prior = self.models["prior"]
        noise = Noise(seeds, self.device).branch("prior")
        with self._autocast:
            return prior.sample(text, how or prior.default_sampling(), noise).float()

    def decode(self, cond: Cond, seeds: Sequence[int], how: Sampling | None = None) -> Tensor:
        """Decoder and upsamplers: uint8 (B, 3, S, S) on the CPU. A field of ``cond`` that is None is a dropped condition."""
        how = how or Sampling()
        decoder = self.models["decoder"]
        noise = Noise(seeds, self.device)
        with self._autocast:
            pictures = decoder.sample(cond, how.decoder or decoder.default_sampling(), noise.branch("decoder"))
            for name in self.upsamplers:
                upsampler = self.models[name]
                pictures = upsampler.sample(pictures, how.upsampler or upsampler.default_sampling(), noise.branch(name))
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

    def generate(
        self,
        captions: Sequence[str],
        *,
        num: int = 1,
        seed: int = 0,
        how: Sampling | None = None,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Picture]:
        """``num`` pictures for each caption, with seeds ``seed``, ``seed`` + 1, ...; ``progress(done, total)`` after each batch."""
        how = how or Sampling()
        jobs = [(caption, seed + j) for caption in captions for j in range(num)]
        hashes = {name: manifest.hash for name, manifest in self.manifests.items()}
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            seeds = [s for _, s in part]
            cond = self.embed_text([caption for caption, _ in part])
            cond.image_emb = self.sample_prior(cond, seeds, how.prior)
            for image, (caption, s) in zip(self.decode(cond, seeds, how), part, strict=True):
                yield Picture(image, caption, s, hashes)
            if progress is not None:
                progress(min(start + batch_size, len(jobs)), len(jobs))


def _refuse_mixed(stages: dict[str, tuple[Any, Manifest, Path]]) -> None:
    """All stages must stem from the same CLIP; upsamplers need none."""
    _, clip, clip_folder = stages["clip"]
    for name, (_, manifest, folder) in stages.items():
        theirs = manifest.interface.get("clip", "")
        if name != "clip" and theirs and theirs != clip.hash:
            raise ArtifactError(
                f"{folder} was trained on CLIP {theirs[:8]} but {clip_folder} is CLIP {clip.hash[:8]}; "
                "use stages that were trained on one CLIP, or embed and train again"
            )
