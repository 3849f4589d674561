"""``unclip measure``: how good a chain is on held-out concepts and on held-out styles of known ones, in numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from unclip import artifact
from unclip.config import Precision
from unclip.data.shards import Sample, Shards
from unclip.data.transforms import load_image
from unclip.drafts import write_atomic
from unclip.errors import ConfigError, DataError
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.metrics import kid, retrieval
from unclip.evaluation.styles import StyleClassifier
from unclip.models.sampling import DiffusionSampling
from unclip.pipeline import UnCLIP
from unclip.progress import track

BLUR = 2.0  # sigma in pixels of the yardstick
STYLED = 1600  # real training pictures for the style classifier


class Yardstick:
    """Real pictures of held-out concepts (``test``) and of held-out styles (``styled``), looked at once for many chains."""

    def __init__(self, data: Path, num: int) -> None:
        """Up to ``num`` samples of each of the two splits. DataError, before anything is drawn, for data that lack a split
        or do not name concepts and styles."""
        self.features = PictureFeatures()
        for split in ("train", "val", "test", "test_styles"):
            few = Shards(data / split).spread(4)
            if len(few) < 4 or not (_named(few, "style") and _named(few, "concept")):
                raise DataError(f"{data / split} has {len(few)} samples; at least 4 are needed")
        self.data = data
        self.test, self.styled = (Shards(data / split).spread(num) for split in ("test", "test_styles"))

    def look(self, size: int) -> None:
        """Features of the real pictures at ``size`` pixels, and a classifier of their styles, from training pictures."""
        self.real = pictures_of(self.test, size)
        self._real = self.features(self.real)
        known = Shards(self.data / "train").spread(STYLED)
        self._classifier = StyleClassifier.fit(self.features(pictures_of(known, size)), _named(known, "style"))

    def kid(self, drawn: Tensor) -> tuple[float, float]:
        """KID x 1000 of pictures against the real ones of ``test``, and its error."""
        return kid(self.features(drawn), self._real)

    def style_accuracy(self, drawn: Tensor) -> float:
        """The share of pictures, one for each of ``styled``, in the style that its caption asks for."""
        return self._classifier.accuracy(self.features(drawn), _named(self.styled, "style"))


def measure(runs: Path, data: Path, judge: Path, *, num: int, seed: int, batch_size: int) -> dict[str, float]:
    """Measure the chain in ``runs`` on ``data``, whose samples name their concept and style; writes measures.json there.

    ``judge`` is a CLIP of another seed, which the chain has never met. KID is x 1000 over ``num`` pictures of the split
    test (concepts never trained on); styles are judged on test_styles (concepts trained on in other styles only). The recall
    of the chain's CLIP is among one picture a concept of val, test and test_styles, the "unseen" one of val and test alone.
    """
    yardstick = Yardstick(data, num)
    pipeline = UnCLIP.load(runs, precision=Precision.bf16)
    other = artifact.load(judge, kind="clip")[0].to(pipeline.device).eval()
    if artifact.read_manifest(judge).hash == pipeline.manifests["clip"].hash:
        raise ConfigError(f"{judge} is the CLIP of {runs} itself; judge with one that was trained with another seed")
    yardstick.look(pipeline.size)
    drawn = draw(pipeline, yardstick.test, seed, batch_size)
    true = draw(pipeline, yardstick.test, seed, batch_size, true=True)
    styled = draw(pipeline, yardstick.styled, seed, batch_size)
    blurred = gaussian_blur(yardstick.real, [13, 13], [BLUR, BLUR])
    found: dict[str, float] = {"kid_pictures": len(drawn)}
    for name, pictures in (("kid", drawn), ("kid_true_embedding", true), ("kid_blurred", blurred)):
        found[name], found[f"{name}_error"] = yardstick.kid(pictures)
    found["style_accuracy"] = yardstick.style_accuracy(styled)
    found["style_classifier_accuracy"] = yardstick.style_accuracy(pictures_of(yardstick.styled, pipeline.size))
    found |= _recalls(pipeline, other, yardstick, drawn)
    write_atomic(runs / "measures.json", (json.dumps(found, indent=2) + "\n").encode())
    for name, value in found.items():
        typer.echo(f"{name:28} {value:.4g}")
    return found


def draw(
    pipeline: UnCLIP,
    samples: list[Sample],
    seed: int,
    batch_size: int,
    *,
    true: bool = False,
    how: DiffusionSampling | None = None,
) -> Tensor:
    """Pictures uint8 (N, 3, S, S) of the samples' captions, with the seeds ``seed``, ``seed`` + 1, ...

    ``true`` takes the z_i of the samples' own pictures in place of the prior's; ``how`` is the decoder's sampling, None its own.
    """
    clip_size = pipeline.models["clip"].image_size
    drawn = []
    starts = range(0, len(samples), batch_size)
    for start in track(starts, f"drawing {len(samples)} captions", len(starts)):
        part = samples[start : start + batch_size]
        seeds = [seed + start + i for i in range(len(part))]
        text = pipeline.embed_text([sample.caption for sample in part])
        own = pipeline.embed_image(pictures_of(part, clip_size)) if true else pipeline.sample_prior(text, seeds)
        drawn.append(pipeline.decode(replace(text, image_emb=own), seeds, pipeline.resolved(None, how)))
    return torch.cat(drawn)


def pictures_of(samples: list[Sample], size: int) -> Tensor:
    """The samples' own pictures, uint8 (N, 3, size, size)."""
    return torch.stack([load_image(sample.image, size) for sample in samples])


def _recalls(pipeline: UnCLIP, other: Any, yardstick: Yardstick, drawn: Tensor) -> dict[str, float]:
    """Captions to pictures among distinct concepts: real ones by the chain's CLIP, drawn ones by the other."""
    val, test, styled = (Shards(yardstick.data / split).spread(10**9) for split in ("val", "test", "test_styles"))
    found: dict[str, float] = {}
    for name, samples in (("clip_recall", [*val, *test, *styled]), ("clip_recall_unseen", [*val, *test])):
        chosen = [samples[i] for i in _one_per_concept(samples)]
        own = pipeline.models["clip"]
        found[f"{name}_at_1"] = _recall(own, [s.caption for s in chosen], pictures_of(chosen, own.image_size))
        found[f"{name}_concepts"] = len(chosen)
    rows = _one_per_concept(yardstick.test)
    captions = [yardstick.test[i].caption for i in rows]
    return found | {
        "generated_recall_at_1": _recall(other, captions, drawn[rows]),
        # the same pictures' originals: what a perfect chain would reach with this judge
        "real_recall_at_1": _recall(other, captions, yardstick.real[rows]),
        "generated_recall_concepts": len(rows),
    }


@torch.no_grad()
def _recall(clip: Any, captions: list[str], pictures: Tensor) -> float:
    device = next(clip.parameters()).device
    images = torch.cat([clip.encode_image(part.to(device)) for part in pictures.split(256)])
    texts = torch.cat([clip.encode_text(part.to(device))[0] for part in clip.tokenize(captions).split(256)])
    found = retrieval(F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1), captions)
    return found["text_to_image_recall_1"]


def _one_per_concept(samples: list[Sample]) -> list[int]:
    """The first sample of each concept."""
    firsts: dict[str, int] = {}
    for i, concept in enumerate(_named(samples, "concept")):
        firsts.setdefault(concept, i)
    return list(firsts.values())


def _named(samples: list[Sample], field: str) -> list[str]:
    lacking = [sample.key for sample in samples if field not in sample.meta]
    if lacking:
        raise DataError(f"sample {lacking[0]} names no {field} in its metadata; `unclip data emoji` makes such data")
    return [str(sample.meta[field]) for sample in samples]
