"""``unclip verdict``: the oracle reads what the chain drew for fixed captions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from unclip.config import Precision
from unclip.data.shards import Shards
from unclip.data.transforms import load_image
from unclip.evaluation.probes import Verdict, judge, read_scenes
from unclip.evaluation.sheet import draw_table, save_picture
from unclip.nets.layers import Cond
from unclip.pipeline import UnCLIP
from unclip.progress import counted

COLUMNS = {
    "on": "prior's z_i and caption",
    "off": "prior's z_i only",
    "true_embedding": "true picture's z_i only",
    "text_embedding": "caption's z_t as z_i",
    "caption_only": "caption only",
}
SHOWN = 40  # rows of the sheet


def judge_runs(runs: Path, data_path: Path, out: Path, *, seed: int, batch_size: int) -> dict[str, Any]:
    """One picture a caption and column, never chosen; writes ``verdict.json`` and ``verdict.png`` to ``out``.

    The captions are those of the data set's split ``verdict``; their object pairs never occur in training.
    """
    pipeline = UnCLIP.load(runs, precision=Precision.bf16)
    shards = Shards(data_path / "verdict")
    samples = [shards.read(i) for i in range(len(shards))]
    clip_size = pipeline.models["clip"].image_size
    true = torch.stack([load_image(s.image, clip_size) for s in samples])
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    with counted(len(samples) * len(COLUMNS), "verdict") as advance:
        for start in range(0, len(samples), batch_size):
            part = slice(start, start + batch_size)
            conds = _conditions(pipeline, [s.caption for s in samples[part]], true[part], seed)
            for name, cond in conds.items():
                pictures = pipeline.decode(cond, [seed] * len(cond))
                drawn[name] += list(pictures.permute(0, 2, 3, 1).numpy())
                advance(len(pictures))
    scenes = [s.meta for s in samples]
    result = {name: as_dict(judge(read_scenes(pictures), scenes)) for name, pictures in drawn.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "verdict.json").write_text(json.dumps(result, indent=2) + "\n")
    originals = [load_image(s.image, pipeline.size).permute(1, 2, 0).numpy() for s in samples]
    step = max(1, len(samples) // SHOWN)
    rows = [(samples[i].caption, [originals[i], *(drawn[n][i] for n in COLUMNS)]) for i in range(0, len(samples), step)]
    save_picture(draw_table(rows, ["a real picture", *COLUMNS.values()]), out / "verdict.png")
    typer.echo(table(result))
    return result


@torch.no_grad()
def _conditions(pipeline: UnCLIP, captions: list[str], true: torch.Tensor, seed: int) -> dict[str, Cond]:
    text = pipeline.embed_text(captions)
    z_i = pipeline.sample_prior(text, [seed] * len(captions))
    bare = Cond(num_rows=len(captions))
    return {
        "on": replace(text, image_emb=z_i),
        "off": replace(bare, image_emb=z_i),
        "true_embedding": replace(bare, image_emb=pipeline.embed_image(true)),
        "text_embedding": replace(bare, image_emb=text.text_emb),
        "caption_only": text,
    }


def as_dict(verdict: Verdict) -> dict[str, float]:
    """Shares with the ends of their 95 % intervals; ``product`` is the share of pairs with their relation right as well."""
    found: dict[str, float] = {}
    for name in ("objects", "pairs", "relations"):
        share = getattr(verdict, name)
        found |= {name: share.share, f"{name}_low": share.interval[0], f"{name}_high": share.interval[1]}
    return {**found, "product": verdict.scenes.share}


def table(result: dict[str, Any]) -> str:
    """The verdict in words: shares in percent with their 95 % Wilson intervals."""
    lines = [f"{'':26} {'objects':>18} {'pairs':>18} {'relations':>18} {'pairs x rel.':>12}"]
    for name, title in COLUMNS.items():
        row = result[name]
        cells = [
            f"{100 * row[k]:5.1f} [{100 * row[k + '_low']:.0f}-{100 * row[k + '_high']:.0f}]"
            for k in ("objects", "pairs", "relations")
        ]
        lines.append(f"{title:26} {cells[0]:>18} {cells[1]:>18} {cells[2]:>18} {100 * row['product']:12.1f}")
    return "\n".join(lines)
