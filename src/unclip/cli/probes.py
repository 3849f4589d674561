"""``unclip pca-probe`` and ``unclip typographic-probe``: figures 7 and 6 of the paper, on one's own pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unclip.batches import Batches, Meter
from unclip.cli.pictures import ddim_sampling, read_lines, read_pictures, sampling_bar
from unclip.data.embeddings import Embeddings
from unclip.errors import ArtifactError, ConfigError
from unclip.evaluation.sheet import draw_table, save_picture
from unclip.evaluation.zero_shot import class_embeddings
from unclip.jobs import Job, Sampling
from unclip.manipulate import find_latents, invertible, need_image
from unclip.models.inputs import in_parts
from unclip.models.pca import PCA
from unclip.pipeline import UnCLIP

PAPER_COMPONENTS = (20, 30, 40, 80, 120, 160, 200, 320)  # of 1024 (figure 7)


def probe_components(
    paths: Sequence[Path],
    runs: Path,
    out: Path,
    embeddings: Path,
    components: str | None,
    *,
    steps: int,
    guidance: float | None,
    seed: int,
    batch_size: int,
    as_json: bool,
) -> dict[str, Any]:
    """Each picture from the first k components of its z_i and from all of it, always with the seed's noise; ``pca.png``."""
    pipeline, pictures = UnCLIP.load(runs), read_pictures(paths)
    how = invertible(pipeline, Sampling(decoder=ddim_sampling(pipeline, steps, guidance)))
    pca, unit = fit_components(embeddings, pipeline)
    counts = _counts(components, len(pca.eigenvalues))
    with sampling_bar() as progress:
        total = len(pictures) * (len(counts) + 1) * pipeline.steps_of_all(how)
        batches = Batches(batch_size, Meter(progress, total))
        z_i = find_latents(pipeline, pictures, None, how, batches, invert=False).image_emb
        z_i = F.normalize(z_i, dim=-1) if unit else z_i
        kept = [_first(pca, z_i, k) for k in counts]
        jobs = [Job(seed, image_emb=some[i]) for i in range(len(pictures)) for some in (*kept, z_i)]
        drawn = [picture.image.permute(1, 2, 0).numpy() for picture in pipeline.run(jobs, how, batches)]
    cosines = [float(F.cosine_similarity(some, z_i, dim=-1).mean()) for some in kept]
    width = len(counts) + 1
    rows = [
        (path.name, [pictures[i].permute(1, 2, 0).numpy(), *drawn[i * width : (i + 1) * width]])
        for i, path in enumerate(paths)
    ]
    titles = [f"{k} components, cosine {cosine:.2f}" for k, cosine in zip(counts, cosines, strict=True)]
    save_picture(draw_table(rows, ["the picture", *titles, "all of z_i"]), out / "pca.png")
    found = [
        {"components": k, "cosine": cosine, "explained_variance": float(pca.explained[k - 1])}
        for k, cosine in zip(counts, cosines, strict=True)
    ]
    _say(as_json, {"sheet": str(out / "pca.png"), "by_components": found}, f"wrote {out / 'pca.png'}")
    return {"by_components": found}


def fit_components(folder: Path, pipeline: UnCLIP) -> tuple[PCA, bool]:
    """All principal components of the training split's z_i, and whether these have unit norm."""
    rows = Embeddings(folder, "train")
    theirs, ours = rows.interface.clip, pipeline.manifests["clip"].hash
    if theirs != ours:
        raise ArtifactError(
            f"{folder} was embedded by CLIP {theirs[:8]} but {pipeline.folders['clip']} is {ours[:8]}; embed with that one"
        )
    pca = PCA(rows.interface.embed_dim)
    pca.fit((part["image_emb"] for part in in_parts(rows, ["image_emb"])), share=2.0)
    return pca, rows.normalised


def _first(pca: PCA, z_i: Tensor, k: int) -> Tensor:
    coefficients = pca.encode(z_i)
    coefficients[:, k:] = 0
    return pca.decode(coefficients)


def _counts(text: str | None, width: int) -> list[int]:
    if text is None:
        return sorted({max(1, round(k * width / 1024)) for k in PAPER_COMPONENTS})
    if not all(part.isdecimal() and 1 <= int(part) <= width for part in text.split(",")):
        raise ConfigError(f"--components {text} is not a list of numbers from 1 to {width}, such as 20,40,80")
    return [int(part) for part in text.split(",")]


def probe_typography(
    paths: Sequence[Path],
    runs: Path,
    out: Path,
    classes: Path,
    words: Sequence[str],
    *,
    num: int,
    seed: int,
    batch_size: int,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Zero-shot probabilities of each picture, plain and with each word upon it, beside ``num`` pictures of its z_i."""
    names = read_lines(classes)
    if len(names) < 2:
        raise ConfigError(f"{classes} names fewer than two classes; give one a line")
    pipeline, plain = UnCLIP.load(runs), read_pictures(paths)
    need_image(pipeline)
    how = pipeline.resolved(None)
    shown = [("", i, plain[i]) for i in range(len(plain))]
    shown += [(word, i, with_word(plain[i], word)) for i in range(len(plain)) for word in words]
    shown.sort(key=lambda entry: entry[1])
    pictures = torch.stack([picture for *_, picture in shown])
    with sampling_bar() as progress:
        total = len(pictures) * num * pipeline.steps_of_all(how)
        batches = Batches(batch_size, Meter(progress, total))
        z_i = find_latents(pipeline, pictures, None, how, batches, invert=False).image_emb
        shares = probabilities(pipeline, z_i, names)
        jobs = [Job(seed + j, image_emb=z_i[i]) for i in range(len(z_i)) for j in range(num)]
        drawn = [picture.image.permute(1, 2, 0).numpy() for picture in pipeline.run(jobs, how, batches)]
    rows, found = [], []
    for place, (word, i, picture) in enumerate(shown):
        by_class = {name: float(share) for name, share in zip(names, shares[place], strict=True)}
        best = sorted(by_class, key=lambda name: -by_class[name])[:4]
        said = ", ".join(f"{name} {100 * by_class[name]:.2f} %" for name in best)
        mine = drawn[place * num : (place + 1) * num]
        rows.append((said, [picture.permute(1, 2, 0).numpy(), *mine]))
        found.append({"picture": str(paths[i]), "word": word or None, "probabilities": by_class})
    sheet = out / "typography.png"
    save_picture(draw_table(rows, ["what CLIP sees", *(f"drawn, seed {seed + j}" for j in range(num))]), sheet)
    _say(as_json, {"sheet": str(sheet), "pictures": found}, f"wrote {sheet}")
    return found


@torch.no_grad()
def probabilities(pipeline: UnCLIP, z_i: Tensor, names: Sequence[str]) -> Tensor:
    """(B, C) softmax over classes of the scaled cosines (Radford et al. 2021, sec. 3.1.2)."""
    clip = pipeline.models["clip"]
    cosines = F.normalize(z_i.to(pipeline.device), dim=-1) @ class_embeddings(clip, names).T
    return (clip.model.logit_scale.exp() * cosines).softmax(dim=-1).cpu()


def with_word(picture: Tensor, word: str) -> Tensor:
    """The uint8 picture (3, H, W) with a white label across its middle that says ``word``."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(image)
    size = image.height / 4
    font = ImageFont.load_default(size)
    while size > 5 and draw.textlength(word, font=font) > 0.8 * image.width:
        size *= 0.9
        font = ImageFont.load_default(size)
    middle, half = (image.width / 2, image.height / 2), (0.46 * image.width, 0.75 * size)
    box = (middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1])
    draw.rectangle(box, fill="white", outline="black")
    draw.text(middle, word, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _say(as_json: bool, found: dict[str, Any], words: str) -> None:
    typer.echo(json.dumps(found) if as_json else words)
