"""``unclip binding-probe --captions``: binding without an oracle, for chains of photographs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer

from unclip import artifact
from unclip.cli.asked import Asked, artifacts_of, load_chain, with_captions_decoder
from unclip.cli.pictures import read_lines
from unclip.cli.probe_binding import SHOWN
from unclip.errors import ConfigError
from unclip.evaluation.binding import both
from unclip.evaluation.probes import Share
from unclip.evaluation.sheet import draw_table
from unclip.evaluation.vqa import Questioner
from unclip.report.probe import Finding

Score = Callable[[np.ndarray, str], float]


def probe_caption_pairs(
    runs: Path,
    out: Path,
    captions: Path,
    judge: Path,
    *,
    text_decoder: Path | None,
    num: int,
    seed: int,
    batch_size: int,
) -> Finding:
    """Draws both captions of each line ``CAPTION | EXCHANGED CAPTION``; the judge says which of the two a picture shows.

    ``judge``: the run of a CLIP that is not the chain's own, or the local folder of a VQA model.
    """
    pairs = read_caption_pairs(captions)[:num]
    score, told = _judge(judge, runs)
    pipeline = load_chain(runs)
    other = None if text_decoder is None else with_captions_decoder(runs, text_decoder)
    asked = Asked(pipeline, [caption for pair in pairs for caption in pair], seed, batch_size)
    drawn = asked.draw_ways(None, other)
    rows, name = {}, f"own caption before the exchanged one, by {told}"
    for title, pictures in drawn.items():
        right = [
            score(picture, pairs[i // 2][i % 2]) > score(picture, pairs[i // 2][1 - i % 2])
            for i, picture in enumerate(pictures)
        ]
        rows[title] = {name: Share(sum(right), len(right)), "both of a pair": both(right)}
    facts = {"pairs": len(pairs), "seed": seed, "judge": told, "artifacts": artifacts_of(pipeline)}
    finding = Finding("binding", f"Binding: {2 * len(pairs)} captions, judged without an oracle", rows, facts)
    lines = [
        (asked.captions[i], [pictures[i] for pictures in drawn.values()]) for i in range(min(2 * SHOWN, 2 * len(pairs)))
    ]
    typer.echo(finding.write(out, draw_table(lines, list(drawn))))
    return finding


def read_caption_pairs(path: Path) -> list[tuple[str, str]]:
    """Lines ``a red cup and a green plate | a green cup and a red plate``; ConfigError names the first that is no pair."""
    pairs = []
    for line in read_lines(path):
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 2 or not all(parts) or parts[0] == parts[1]:
            raise ConfigError(f'{path}: "{line}" is not CAPTION | EXCHANGED CAPTION, two different captions a line')
        pairs.append((parts[0], parts[1]))
    if not pairs:
        raise ConfigError(f"{path} holds no captions; write CAPTION | EXCHANGED CAPTION, a pair a line")
    return pairs


def _judge(folder: Path, runs: Path) -> tuple[Score, str]:
    """How well a picture goes with a caption, and who says so."""
    if (folder / "config.json").is_file():
        return Questioner(folder).agrees, f"VQA {folder.name}"
    model, manifest = artifact.load(folder, kind="clip")
    if manifest.hash == artifact.read_manifest(runs / "clip").hash:
        raise ConfigError(f"{folder} is the CLIP of {runs} itself, which would judge its own work; take another one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip: Any = model.to(device).eval()

    @torch.no_grad()
    def cosine(picture: np.ndarray, caption: str) -> float:
        image = clip.encode_image(torch.from_numpy(picture).permute(2, 0, 1)[None].to(device))
        text = clip.encode_text(clip.tokenize([caption]).to(device))[0]
        return float(F.cosine_similarity(image.float(), text.float()))

    return cosine, f"CLIP {manifest.hash[:8]}"
