"""``unclip sweep-probe``: one thing changed at a time: the caption, z_i, the guidance, DDIM's η, or an edit's θ."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from unclip.cli.asked import Asked, artifacts_of, load_chain
from unclip.cli.sweep_ways import WAYS, Subject, Sweep
from unclip.data.shards import Sample, Shards
from unclip.data.transforms import load_image
from unclip.drafts import write_atomic
from unclip.errors import DataError
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.metrics import kid
from unclip.evaluation.probes import judge, read_scenes
from unclip.evaluation.sheet import draw_table
from unclip.pipeline import UnCLIP
from unclip.report.probe import Cell, Finding, draw_curves

SHOWN = 16  # rows of the sheet
FEWEST = 4  # samples: what the KID needs


class Measures:
    """How drawn pictures compare with the samples': by the oracle where these are shapes, by KID and by CLIP's own score."""

    def __init__(self, samples: Sequence[Sample], real: Sequence[np.ndarray]) -> None:
        self.scenes = [sample.meta for sample in samples]
        self.readable = all(len(scene.get("objects", ())) in (1, 2) for scene in self.scenes)
        self.features = PictureFeatures()
        self._real = self.features(_stack(real))

    def __call__(self, pictures: Sequence[np.ndarray], asked: Asked) -> dict[str, Cell]:
        found: dict[str, Cell] = {}
        if self.readable:
            verdict = judge(read_scenes(pictures), self.scenes)
            found = {"objects": verdict.objects, "pairs": verdict.pairs, "pairs x relations": verdict.scenes}
        value, error = kid(self.features(_stack(pictures)), self._real)
        text = asked.text.text_emb
        assert text is not None
        score = F.cosine_similarity(asked.true(pictures).cpu(), text.cpu(), dim=-1).mean()
        return {**found, "KID x 1000": value, "its error": error, "CLIP score": float(score)}


def sweep(cfg: Sweep) -> Finding:
    """Draws the same captions with the same seeds in each way; ``sweep-KIND.json|md|png`` in ``cfg.out``."""
    pipeline = load_chain(cfg.runs, needs_prior=cfg.needs_prior)
    subject = _subject(cfg, pipeline)
    drawn = WAYS[cfg.kind](cfg, subject)
    measured, asked = Measures(subject.samples, subject.real), subject.asked
    rows = {title: {**measured(way.pictures, asked), **way.measures} for title, way in drawn.items()}
    facts = {
        "captions": len(asked.captions),
        "data": str(cfg.split),
        "seed": cfg.seed,
        "artifacts": artifacts_of(pipeline),
    }
    finding = Finding(f"sweep-{cfg.kind}", f"Sweep of {cfg.kind}: {len(asked.captions)} captions", rows, facts)
    lines = [
        (asked.captions[i], [subject.real[i], *(way.pictures[i] for way in drawn.values())])
        for i in range(min(SHOWN, len(asked.captions)))
    ]
    typer.echo(finding.write(cfg.out, draw_table(lines, ["the real picture", *drawn])))
    points = {title: way.point for title, way in drawn.items() if way.point is not None}
    if points:
        curves = draw_curves(rows, points, ["KID x 1000", "CLIP score", "pixels changed"], cfg.kind)
        write_atomic(cfg.out / f"{finding.name}-curves.png", curves)
    return finding


def _subject(cfg: Sweep, pipeline: UnCLIP) -> Subject:
    samples = _spread(cfg.split, cfg.num)
    real = [load_image(s.image, pipeline.size).permute(1, 2, 0).numpy() for s in samples]
    large = torch.stack([load_image(s.image, max(pipeline.size, pipeline.clip_size)) for s in samples])
    return Subject(Asked(pipeline, [s.caption for s in samples], cfg.seed, cfg.batch_size), samples, real, large)


def _spread(split: Path, num: int) -> list[Sample]:
    """Up to ``num`` samples, evenly over the split."""
    samples = Shards(split).spread(num)
    if len(samples) < FEWEST:
        raise DataError(f"{len(samples)} samples of {split} are too few to compare pictures by; take at least {FEWEST}")
    return samples


def _stack(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
