"""``unclip measure``: how good a chain is on held-out concepts and on held-out styles of known ones, in numbers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from unclip import artifact
from unclip.config import Precision
from unclip.data.shards import Sample, Shards, write_atomic
from unclip.data.transforms import load_image
from unclip.errors import ConfigError, DataError
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.metrics import kid, retrieval
from unclip.evaluation.styles import StyleClassifier
from unclip.pipeline import UnCLIP

BLUR = 2.0  # sigma in pixels of the yardstick
STYLED = 1600  # real training pictures for the style classifier


@dataclass
class Drawn:
    """Samples with their real pictures and what the chain draws for them: uint8 (N, 3, S, S)."""

    samples: list[Sample]
    real: Tensor
    from_prior: Tensor
    from_true: Tensor


def measure(runs: Path, data: Path, judge: Path, *, num: int, seed: int, batch_size: int) -> dict[str, float]:
    """Measure the chain in ``runs`` on ``data``, whose samples name their concept and style; writes measures.json there.

    ``judge`` is a CLIP of another seed, which the chain has never met. KID is x 1000 over ``num`` pictures of the split
    test (concepts never trained on); styles are judged on test_styles (concepts trained on in other styles only). The recall
    of the chain's CLIP is among one picture a concept of val, test and test_styles.
    """
    features = PictureFeatures()
    for split in ("train", "val", "test", "test_styles"):  # before anything is drawn
        few = _spread(data / split, 4)
        if len(few) < 4 or not (_named(few, "style") and _named(few, "concept")):
            raise DataError(f"{data / split} has {len(few)} samples; at least 4 are needed")
    pipeline = UnCLIP.load(runs, precision=Precision.bf16)
    other = artifact.load(judge, kind="clip")[0].to(pipeline.device).eval()
    if artifact.read_manifest(judge).hash == pipeline.manifests["clip"].hash:
        raise ConfigError(f"{judge} is the CLIP of {runs} itself; judge with one that was trained with another seed")
    test = _draw(pipeline, _spread(data / "test", num), seed, batch_size)
    styled = _draw(pipeline, _spread(data / "test_styles", num), seed, batch_size)
    real = features(test.real)
    blurred = gaussian_blur(test.real, [13, 13], [BLUR, BLUR])
    found: dict[str, float] = {}
    for name, pictures in (("kid", test.from_prior), ("kid_true_embedding", test.from_true), ("kid_blurred", blurred)):
        found[name], found[f"{name}_error"] = kid(features(pictures), real)
    found |= _style_scores(features, data / "train", styled)
    found |= _recalls(pipeline, other, data, test)
    write_atomic(runs / "measures.json", (json.dumps(found, indent=2) + "\n").encode())
    for name, value in found.items():
        typer.echo(f"{name:28} {value:.4g}")
    return found


def _spread(split: Path, num: int) -> list[Sample]:
    """Up to ``num`` samples, evenly over the split."""
    shards = Shards(split)
    count = min(num, len(shards))
    return [shards.read(i * len(shards) // count) for i in range(count)]


def _draw(pipeline: UnCLIP, samples: list[Sample], seed: int, batch_size: int) -> Drawn:
    clip_size = pipeline.models["clip"].image_size
    prior, true = [], []
    for start in track(range(0, len(samples), batch_size), f"drawing {len(samples)} captions", transient=True):
        part = samples[start : start + batch_size]
        seeds = [seed + start + i for i in range(len(part))]
        text = pipeline.embed_text([sample.caption for sample in part])
        image_emb = pipeline.embed_image(_pictures(part, clip_size))
        prior.append(pipeline.decode(replace(text, image_emb=pipeline.sample_prior(text, seeds)), seeds))
        true.append(pipeline.decode(replace(text, image_emb=image_emb), seeds))
    return Drawn(samples, _pictures(samples, pipeline.size), torch.cat(prior), torch.cat(true))


def _pictures(samples: list[Sample], size: int) -> Tensor:
    return torch.stack([load_image(sample.image, size) for sample in samples])


def _style_scores(features: PictureFeatures, train: Path, styled: Drawn) -> dict[str, float]:
    known = _spread(train, STYLED)
    classifier = StyleClassifier.fit(features(_pictures(known, styled.real.shape[-1])), _named(known, "style"))
    wanted = _named(styled.samples, "style")
    return {
        "style_accuracy": classifier.accuracy(features(styled.from_prior), wanted),
        "style_classifier_accuracy": classifier.accuracy(features(styled.real), wanted),
    }


def _recalls(pipeline: UnCLIP, other: Any, data: Path, test: Drawn) -> dict[str, float]:
    """Captions to pictures among distinct concepts: real ones by the chain's CLIP, drawn ones by the other."""
    held_out = [_spread(data / split, 10**9) for split in ("val", "test", "test_styles")]
    samples = [sample for split in held_out for sample in split]
    rows = _one_per_concept(samples)
    chosen = [samples[i] for i in rows]
    own = pipeline.models["clip"]
    real = _recall(own, [s.caption for s in chosen], _pictures(chosen, own.image_size))
    rows = _one_per_concept(test.samples)
    drawn = _recall(other, [test.samples[i].caption for i in rows], test.from_prior[rows])
    shown = _recall(other, [test.samples[i].caption for i in rows], test.real[rows])
    return {
        "clip_recall_at_1": real,
        "clip_recall_concepts": len(chosen),
        "generated_recall_at_1": drawn,
        "real_recall_at_1": shown,  # the same pictures' originals: what a perfect chain would reach with this judge
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
