"""``unclip edit-verdict``: text differences turn the colour of single shapes, and the oracle reads the results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from unclip.batches import Batches, Meter
from unclip.cli.pictures import ddim_sampling, parse_numbers, sampling_bar
from unclip.data.shapes_caption import plain_phrase
from unclip.data.shapes_render import render
from unclip.data.shapes_scene import COLOURS, SOLIDS, Solid, single_scene
from unclip.errors import ConfigError
from unclip.evaluation.probes import Reading, Share, read_scenes
from unclip.evaluation.sheet import draw_table, save_picture
from unclip.jobs import Sampling
from unclip.manipulate import check_share, edit_jobs, find_latents, invertible, text_difference
from unclip.pipeline import UnCLIP

SHOWN = 25  # rows of the sheet
BASES = ("own", "photo", "none")


@dataclass(frozen=True)
class Case:
    """A picture of one solid, uint8 (S, S, 3), and the colour that it is to take."""

    solid: Solid
    colour: str
    picture: np.ndarray

    @property
    def caption(self) -> str:
        return plain_phrase(self.solid.colour, self.solid.shape)

    @property
    def wanted(self) -> str:
        return plain_phrase(self.colour, self.solid.shape)


def cases(num: int, side: int) -> list[Case]:
    """The first ``num`` of 100 fixed cases, drawn at ``side`` pixels: all 40 solids twice, 20 of them once more."""
    rng = np.random.default_rng(20220413)
    order = [i for _ in range(3) for i in rng.permutation(len(SOLIDS))][:100]
    found = []
    for i in order:
        solid = SOLIDS[i]
        others = [colour for colour in COLOURS if colour != solid.colour]
        colour = others[int(rng.integers(len(others)))]
        found.append(Case(solid, colour, render(single_scene(rng, solid), side)))
    return found[:num]


def judge_edits(
    runs: Path,
    out: Path,
    *,
    base: str,
    thetas: str,
    num: int,
    steps: int,
    guidance: float | None,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Shares, with 95 % intervals, of cases whose colour turned and whose shape stayed; ``edits.json`` and ``edits.png``."""
    shares = [check_share("theta", theta) for theta in parse_numbers("--thetas", thetas)]
    if base not in BASES:
        raise ConfigError(f"--base {base} is not one of {', '.join(BASES)}")
    pipeline = UnCLIP.load(runs)
    how = invertible(pipeline, Sampling(decoder=ddim_sampling(pipeline, steps, guidance)))
    asked = cases(num, max(pipeline.clip_size, pipeline.size))
    pictures = torch.from_numpy(np.stack([case.picture for case in asked])).permute(0, 3, 1, 2).contiguous()
    with sampling_bar() as progress:
        total = len(asked) * steps + len(asked) * len(shares) * pipeline.steps_of_all(how)
        batches = Batches(batch_size, Meter(progress, total))
        latents = find_latents(pipeline, pictures, None, how, batches, invert=True)
        differences = _differences(pipeline, asked, base)
        jobs = edit_jobs(latents, differences, [case.wanted for case in asked], shares, seed)
        drawn = [picture.image.permute(1, 2, 0).numpy() for picture in pipeline.run(jobs, how, batches)]
    readings = read_scenes(drawn)
    found = {f"{t:g}": _judged(asked, readings[i :: len(shares)]) for i, t in enumerate(shares)}
    result = {"base": base, "cases": len(asked), "steps": steps, "guidance": guidance or 1.0, "by_theta": found}
    out.mkdir(parents=True, exist_ok=True)
    (out / "edits.json").write_text(json.dumps(result, indent=2) + "\n")
    rows = [
        (f"{case.caption} to {case.wanted}", [case.picture, *drawn[i * len(shares) : (i + 1) * len(shares)]])
        for i, case in enumerate(asked[:SHOWN])
    ]
    save_picture(draw_table(rows, ["the picture", *(f"θ = {t:g}" for t in shares)]), out / "edits.png")
    typer.echo(json.dumps(result))
    return result


def _differences(pipeline: UnCLIP, asked: Sequence[Case], base: str) -> torch.Tensor:
    wanted = pipeline.embed_text([case.wanted for case in asked]).text_emb
    own = [case.caption if base == "own" else "a photo" for case in asked]
    before = None if base == "none" else pipeline.embed_text(own).text_emb
    assert wanted is not None
    return text_difference(wanted, before)


def _judged(asked: Sequence[Case], readings: Sequence[Reading]) -> dict[str, Any]:
    """A picture in which the oracle sees no single solid counts as neither turned nor kept."""
    seen = [reading.objects[0] if len(reading.objects) == 1 else None for reading in readings]
    pairs = list(zip(asked, seen, strict=True))
    measures = {
        "colour_turned": [one is not None and one.colour == case.colour for case, one in pairs],
        "colour_as_before": [one is not None and one.colour == case.solid.colour for case, one in pairs],
        "shape_kept": [one is not None and one.shape == case.solid.shape for case, one in pairs],
        "readable": [one is not None for _, one in pairs],
    }
    measures["both"] = [a and b for a, b in zip(measures["colour_turned"], measures["shape_kept"], strict=True)]
    shares = {name: Share(sum(hits), len(hits)) for name, hits in measures.items()}
    return {name: {"share": share.share, "interval": list(share.interval)} for name, share in shares.items()}
