"""``unclip binding-probe``: whether colours stay with their shapes, and whose fault it is where they do not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
import typer
from torch import Tensor

from unclip.cli.asked import OFF, ON, REAL, TRUE, Asked, artifacts_of, load_chain, with_captions_decoder
from unclip.data.shapes_exams import binding_scenes
from unclip.data.shapes_render import render
from unclip.data.shapes_scene import Scene
from unclip.errors import ConfigError
from unclip.evaluation.binding import binding_shares, both, is_right
from unclip.evaluation.probes import Share, read_scenes
from unclip.evaluation.sheet import draw_table
from unclip.report.probe import Cell, Finding

SHOWN = 10  # scenes of the sheet, each with its exchange below it


def probe_binding(runs: Path, out: Path, *, text_decoder: Path | None, num: int, seed: int, batch_size: int) -> Finding:
    """Draws ``num`` scenes of two coloured shapes and the same with their colours exchanged; ``binding.json|md|png``.

    ``text_decoder``: a decoder trained with model.conditioning.image=false, for the paper's comparison with GLIDE.
    """
    if num > len(binding_scenes()):
        raise ConfigError(f"--num {num}: there are {len(binding_scenes())} scenes; ask for at most so many")
    pipeline = load_chain(runs)
    other = None if text_decoder is None else with_captions_decoder(runs, text_decoder)
    scenes = [scene for pair in binding_scenes()[:num] for scene in pair]
    asked = Asked(pipeline, [scene.caption for scene in scenes], seed, batch_size)
    real = [render(scene, max(pipeline.clip_size, pipeline.size)) for scene in scenes]
    drawn = {REAL: real, **asked.draw_ways(real, other)}
    rows = {title: _judged(pictures, scenes) for title, pictures in drawn.items()}
    text_emb = asked.text.text_emb
    assert text_emb is not None
    true, near = asked.true(real), "z_i told from its exchange's"
    rows[TRUE][near] = told_apart(true, text_emb)
    for title in rows.keys() & {ON, OFF}:
        rows[title][near] = told_apart(asked.prior, true)
    facts = {
        "scenes": num,
        "seed": seed,
        "artifacts": artifacts_of(pipeline)
        | ({} if other is None else {"text_decoder": artifacts_of(other)["decoder"]}),
        "cosine of a scene's z_i and its exchange's": float(_cosines(true[::2], true[1::2]).mean()),
        "cosine of a caption's z_t and its exchange's": float(_cosines(text_emb[::2], text_emb[1::2]).mean()),
    }
    finding = Finding("binding", f"Binding: {2 * num} captions of two coloured shapes", rows, facts)
    step = max(1, num // SHOWN)
    shown = [2 * i + j for i in range(0, num, step) for j in range(2)]
    lines = [(scenes[i].caption, [pictures[i] for pictures in drawn.values()]) for i in shown]
    typer.echo(finding.write(out, draw_table(lines, list(drawn))))
    return finding


def _shares(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, Share]:
    readings, truth = read_scenes(pictures), [scene.metadata() for scene in scenes]
    right = [is_right(reading, scene) for reading, scene in zip(readings, truth, strict=True)]
    return {**binding_shares(readings, truth), "both of a pair": both(right)}


def _judged(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, Cell]:
    return dict(_shares(pictures, scenes))


def told_apart(embeddings: Tensor, targets: Tensor) -> Share:
    """How often row i of (N, D) is nearer to its own target than to its neighbour's; rows 2k and 2k + 1 are neighbours."""
    own = _cosines(embeddings, targets)
    others = _cosines(embeddings, targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
    return Share(int((own > others).sum()), len(own))


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return F.cosine_similarity(first.float().cpu(), second.float().cpu(), dim=-1)
