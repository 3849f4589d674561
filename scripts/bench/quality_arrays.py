"""The arrays that both sides of scripts/bench/peer_quality.py train on and are judged by, written once.

FOLDER/arrays.json                                             widths, counts, sources, the pictures' fingerprint and the CLIP
FOLDER/{train,eval}/{image,image_emb,text_emb,tokens,text_seq}.npy    uint8 pictures; CLIP's raw outputs
FOLDER/eval/captions.json
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unclip import artifact
from unclip.data.embeddings import Embeddings, lengths
from unclip.data.pictures import Pictures
from unclip.data.shards import Shards
from unclip.models.clip import CLIP

EVALUATED = 1000
HELD_OUT = ("val", "test", "test_styles")
SIZE = 32
Columns = dict[str, np.ndarray]


def from_data(data: Path, embeddings: Path, clip: Path | None, folder: Path) -> dict[str, Any]:
    """The facts of arrays.json; the arrays are written unless ``folder`` holds those of the same source.

    ``clip`` made the embeddings; it is asked for the captions' token states where these lack them. SystemExit if it is needed and
    missing, or another one.
    """
    opened = {split: (Shards(data / split), Embeddings(embeddings, split)) for split in ("train", *HELD_OUT)}
    interface = opened["train"][1].interface
    for shards, rows in opened.values():
        rows.check_belongs_to(shards)
    source = {
        "data": {split: shards.fingerprint for split, (shards, _) in opened.items()},
        "clip": interface.clip,
        "size": SIZE,
        "evaluated": EVALUATED,
    }
    if (known := _known(folder, source)) is not None:
        return known
    tower = None if "text_seq" in opened["train"][1].columns else _text_tower(clip, interface.clip)
    held_out = [_columns(*opened[split], tower) for split in HELD_OUT]
    joined = {name: _joined([columns[name] for columns in held_out]) for name in held_out[0]}
    total = len(joined["tokens"])
    chosen = np.sort(np.random.default_rng(0).permutation(total)[:EVALUATED])
    evaluated = {name: column[chosen] for name, column in joined.items()}
    captions = [shards.caption(i) for shards, _ in (opened[split] for split in HELD_OUT) for i in range(len(shards))]
    widths = {name: value for name, value in asdict(interface).items() if name != "clip"}
    return write(folder, _columns(*opened["train"], tower), evaluated, [captions[i] for i in chosen], widths, source)


def made_up(folder: Path) -> dict[str, Any]:
    """Small arrays that say nothing about real data: z_i a turn of z_t, pictures in the colours of z_i's first numbers."""
    chance, width, context, size = np.random.default_rng(0), 32, 8, 16
    turn = np.linalg.qr(chance.normal(size=(width, width)))[0]

    def columns(count: int) -> Columns:
        text = chance.normal(size=(count, width)).astype(np.float32)
        image_emb = (np.tanh(text @ turn) + 0.2 * chance.normal(size=text.shape)).astype(np.float32)
        length = chance.integers(3, context, size=count)
        tokens = chance.integers(1, 40, size=(count, context)) * (np.arange(context) < length[:, None])
        tokens[np.arange(count), length] = 41
        colours = 127.5 + 60 * image_emb[:, :3, None, None]
        image = np.broadcast_to(colours.clip(0, 255).astype(np.uint8), (count, 3, size, size)).copy()
        states = chance.normal(size=(count, context, 16)).astype(np.float16)
        text_seq = states * (np.arange(context) <= length[:, None])[..., None]
        return {"image": image, "image_emb": image_emb, "text_emb": text, "tokens": tokens, "text_seq": text_seq}

    widths = {"embed_dim": width, "text_width": 16, "context_length": context, "vocab_size": 42}
    return write(folder, columns(64), columns(24), [str(i) for i in range(24)], widths, {"made up": True})


def write(
    folder: Path,
    train: Columns,
    evaluated: Columns,
    captions: list[str],
    widths: dict[str, int],
    source: dict[str, Any],
) -> dict[str, Any]:
    """arrays.json comes last: a folder without it is unfinished."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, columns in (("train", train), ("eval", evaluated)):
        (folder / name).mkdir(parents=True)
        for column, values in columns.items():
            np.save(folder / name / f"{column}.npy", values)
    (folder / "eval" / "captions.json").write_text(json.dumps(captions))
    facts = {
        "widths": widths,
        "size": train["image"].shape[-1],
        "longest": train["text_seq"].shape[1],
        "train": len(train["tokens"]),
        "evaluated": len(captions),
        "source": source,
        "fingerprint": _hash({name: value for name, value in source.items() if name != "clip"}),
        "clip": source.get("clip", ""),
    }
    (folder / "arrays.json").write_text(json.dumps(facts, indent=1))
    return facts


def _hash(source: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def _known(folder: Path, source: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / "arrays.json"
    facts = json.loads(path.read_text()) if path.exists() else None
    return facts if facts is not None and facts["source"] == source else None


def _text_tower(folder: Path | None, wanted: str) -> CLIP:
    if folder is None:
        raise SystemExit("the embeddings hold no text_seq: give the CLIP that made them, as --clip RUNS/clip")
    clip, manifest = artifact.load(folder, kind="clip")
    if manifest.hash != wanted:
        raise SystemExit(
            f"{folder} is CLIP {manifest.hash[:8]} but the embeddings are of CLIP {wanted[:8]}; give that one"
        )
    assert isinstance(clip, CLIP)
    return clip.eval()


@torch.no_grad()
def _columns(shards: Shards, embeddings: Embeddings, tower: CLIP | None) -> Columns:
    """All rows of a split; the states of padding are zero, which is how dalle2-pytorch knows it."""
    names = ["image_emb", "text_emb", "tokens", *(["text_seq"] if tower is None else [])]
    rows = embeddings.rows(np.arange(len(embeddings)), names)
    longest = int(lengths(rows["tokens"]).max())
    rows["tokens"] = rows["tokens"][:, :longest].astype(np.int64)
    if tower is not None:
        parts = [
            tower.encode_text(torch.from_numpy(part))[1] for part in np.array_split(rows["tokens"], 16) if len(part)
        ]
        rows["text_seq"] = torch.cat(parts).half().numpy()
    real = np.arange(longest) < lengths(rows["tokens"])[:, None]
    rows["text_seq"] = rows["text_seq"][:, :longest] * real[..., None]
    rows["image"] = Pictures(shards, SIZE).batch(np.arange(len(shards)))[0].numpy()
    return rows


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """One column of several splits, filled up with zeros to the longest captions."""
    longest = max(part.shape[1] for part in parts)
    padded = [
        np.pad(part, [(0, 0), (0, longest - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]) if part.ndim > 1 else part
        for part in parts
    ]
    return np.concatenate(padded)
