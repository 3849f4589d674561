"""``unclip busy-probe``: whether scenes of many objects hold as many as they should, and the detail that they should."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import typer
from torch import Tensor

from unclip.cli.asked import REAL, Asked, artifacts_of, load_chain
from unclip.data.shapes_exams import MOST, busy_scenes
from unclip.data.shapes_render import render
from unclip.data.shapes_scene import Scene
from unclip.errors import ConfigError
from unclip.evaluation.counting import count_shares, count_solids
from unclip.evaluation.detail import octave_powers, patch_features
from unclip.evaluation.features import PictureFeatures
from unclip.evaluation.metrics import kid
from unclip.evaluation.sheet import draw_table
from unclip.report.probe import Cell, Finding

OTHERS = 777  # seed of the real pictures that all others are held against
SMALLEST = 64  # pixels: the spectrum's octaves and the counted solids need them


def probe_busy(runs: Path, out: Path, *, num: int, seed: int, batch_size: int) -> Finding:
    """``num`` captions of 1 to 8 solids; ``busy.json|md|png``: counts by number, patch-KID, power by octaves against real ones."""
    if num < 2 * MOST:
        raise ConfigError(f"--num {num} is too few: give each number of objects, 1 to {MOST}, two pictures at least")
    pipeline = load_chain(runs)
    if pipeline.size < SMALLEST:
        raise ConfigError(
            f"pictures of {pipeline.size} px hold no eight objects: this probe needs a chain of {SMALLEST} px"
        )
    scenes = busy_scenes(num)
    asked = Asked(pipeline, [scene.caption for scene in scenes], seed, batch_size)
    real = [render(scene, pipeline.size) for scene in scenes]
    others = _stack([render(scene, pipeline.size) for scene in busy_scenes(num, OTHERS)])
    drawn = {REAL: real, **asked.draw_ways(real)}
    detail = Detail(others, PictureFeatures())
    rows = {title: {**_counted(pictures, scenes), **detail(pictures)} for title, pictures in drawn.items()}
    facts = {"captions": num, "seed": seed, "size": pipeline.size, "base": pipeline.configs["decoder"].image_size}
    finding = Finding(
        "busy",
        f"Busy scenes: {num} captions of 1 to {MOST} objects",
        rows,
        facts | {"artifacts": artifacts_of(pipeline)},
    )
    lines = [(scenes[i].caption, [pictures[i] for pictures in drawn.values()]) for i in range(min(num, 2 * MOST))]
    typer.echo(finding.write(out, draw_table(lines, list(drawn), cell=max(96, pipeline.size))))
    return finding


class Detail:
    """Patches and spectrum of drawn pictures, held against those of ``real`` uint8 pictures (N, 3, S, S)."""

    def __init__(self, real: Tensor, features: PictureFeatures) -> None:
        self.features, self._patches, self._powers = features, patch_features(real, features), octave_powers(real)

    def __call__(self, pictures: Sequence[np.ndarray]) -> dict[str, Cell]:
        value, error = kid(patch_features(_stack(pictures), self.features), self._patches)
        powers = octave_powers(_stack(pictures)) / self._powers
        by_octave = {f"power, octave {i + 1 - len(powers)}": float(power) for i, power in enumerate(powers)}
        return {"patch-KID": value, "its error": error, **by_octave}


def _counted(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, Cell]:
    shares = count_shares([count_solids(picture) for picture in pictures], [scene.metadata() for scene in scenes])
    return {f"count of {name}" if name.isdecimal() else name: share for name, share in shares.items()}


def _stack(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
