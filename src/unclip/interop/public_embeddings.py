"""Public embeddings into an embeddings folder that trains a prior, and ours out for others' tools."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from unclip import artifact
from unclip.data.embeddings import Embeddings
from unclip.data.embeddings_writer import EmbeddingsWriter, Written
from unclip.data.shards import IMAGE_TYPES, Shards
from unclip.data.texts import CAPTIONS, StoredTexts, text_sha256, write_captions
from unclip.data.transforms import load_image
from unclip.drafts import complete_or_not
from unclip.errors import ConfigError, DataError
from unclip.interop.clip_retrieval import LayoutWriter, Part, blocks, parts_of, read_rows, texts_of, unit_norm
from unclip.models.clip import CLIP
from unclip.models.interface import Interface
from unclip.progress import counted

SHARD_ROWS = 10_000  # of an imported shard: its captions are read as a whole
NUM_PICTURES = 32  # that are encoded again
MIN_COSINE = 0.99
_BATCH = 256


@dataclass
class ImportConfig:
    """``src``: a folder in clip-retrieval's layout. ``clip``: a run or artifact. ``out``: the folder to write.

    ``pictures``: a folder of pictures or one split of shards, whose names or keys are those of the rows. ``val``: share
    of the rows for validation, chosen by their keys.
    """

    src: Path
    clip: Path
    out: Path
    pictures: Path | None = None
    val: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.val < 1:
            raise ConfigError(f"--val is {self.val}; it is a share of the rows, at least 0 and below 1")


@dataclass
class Found:
    """What a first look at all parts says. ``cosine``: the least of ``num_pictures`` that were encoded again."""

    num_rows: int
    normalised: bool
    dtype: str
    has_text: bool
    num_pictures: int = 0
    cosine: float = 0.0
    written: dict[str, int] = field(default_factory=dict)

    def source(self) -> dict[str, object]:
        """How the manifest says which CLIP made the rows."""
        if not self.num_pictures:
            return {"layout": "clip-retrieval", "clip": "asserted"}
        return {
            "layout": "clip-retrieval",
            "clip": "checked",
            "num_pictures": self.num_pictures,
            "cosine": round(self.cosine, 6),
        }


def import_embeddings(cfg: ImportConfig) -> Found:
    """Write ``cfg.out`` from public embeddings; everything is looked at before anything is written.

    Tokens are made with the CLIP's tokenizer, and z_t with its text tower where there is no text_emb. The same command
    again goes on after the last complete shard. Raises DataError for rows of another width, rows that are zero or not
    finite, counts that differ, missing metadata, a mixture of unit-norm and raw rows, and for pictures that CLIP sees in
    another way than the rows say.
    """
    clip, manifest = artifact.load(cfg.clip, kind="clip")
    assert isinstance(clip, CLIP)
    interface = replace(clip.interface(), clip=manifest.hash)
    parts = parts_of(cfg.src)
    found = _look(parts, interface, cfg.clip)
    if cfg.pictures is not None:
        found.num_pictures, found.cosine = _check_pictures(parts, clip, cfg)
    _refuse_other_norm(cfg.out, found.normalised)
    _write(parts, clip, interface, found, cfg)
    return found


def _look(parts: list[Part], interface: Interface, clip: Path) -> Found:
    """Widths, counts, norms and metadata of all parts."""
    norms: dict[Path, bool] = {}
    dtypes, num_rows = set(), 0
    for part in parts:
        image = read_rows(part.image)
        files = {part.image: image} | ({part.text: read_rows(part.text)} if part.text else {})
        for path, rows in files.items():
            if rows.shape[1] != interface.embed_dim:
                raise DataError(
                    f"{path} has rows of {rows.shape[1]} numbers, but {clip} makes {interface.embed_dim}: "
                    "these embeddings are of another CLIP; give that one"
                )
            if len(rows) != len(image):
                raise DataError(f"{part.image} has {len(image)} rows but {path} has {len(rows)}; fetch both again")
            norms[path] = unit_norm(path, rows)
            dtypes.add(rows.dtype)
        table = part.texts_table()
        if len(table) != len(image):
            raise DataError(f"{part.image} has {len(image)} rows but {part.texts} has {len(table)}; fetch both again")
        num_rows += len(image)
    if len(set(norms.values())) > 1:
        unit, raw = (next(path for path, is_unit in norms.items() if is_unit is wanted) for wanted in (True, False))
        raise DataError(
            f"{unit} is unit-norm but {raw} is not: two exports, or two CLIPs, in one folder; import each alone"
        )
    dtype = "float16" if dtypes == {np.dtype(np.float16)} else "float32"
    return Found(num_rows, next(iter(norms.values())), dtype, parts[0].text is not None)


def _check_pictures(parts: list[Part], clip: CLIP, cfg: ImportConfig) -> tuple[int, float]:
    """Number and least cosine of pictures that were encoded again. DataError where it is below MIN_COSINE."""
    assert cfg.pictures is not None
    pictures = _pictures(cfg.pictures)
    wanted = -(-NUM_PICTURES // len(parts))
    chosen: list[tuple[str, np.ndarray]] = []
    example = ""
    for part in parts:
        rows = read_rows(part.image)
        keys, _ = texts_of(part, len(rows))
        example = example or keys[0]
        there = [row for row, key in enumerate(keys) if key in pictures]
        chosen += [(keys[row], np.asarray(rows[row], np.float32)) for row in _spread(there, wanted)]
    chosen = _spread(chosen, NUM_PICTURES)
    if not chosen:
        raise DataError(
            f"no row belongs to a picture of {cfg.pictures}; rows are called {example!r}, pictures {next(iter(pictures))!r}"
        )
    with torch.no_grad():
        encoded = torch.cat([clip.encode_image(load_image(pictures[key]())[None]).float() for key, _ in chosen])
    cosines = F.cosine_similarity(encoded, torch.from_numpy(np.stack([row for _, row in chosen]))).tolist()
    least = min(range(len(chosen)), key=cosines.__getitem__)
    if cosines[least] < MIN_COSINE:
        raise DataError(
            f"{cfg.clip} did not make these embeddings: encoded again, {chosen[least][0]} has a cosine of "
            f"{cosines[least]:.3f} with its row, not {MIN_COSINE} (mean of {len(chosen)}: {np.mean(cosines):.3f})"
        )
    return len(chosen), cosines[least]


def _pictures(place: Path) -> dict[str, Callable[[], bytes]]:
    """How to read each picture, by all names that a row may give it."""
    if (place / "index.json").exists() or any(place.glob("*.tar")):
        shards = Shards(place)
        return {key: lambda i=i: shards.image(i) for i, key in enumerate(shards.keys)}
    found: dict[str, Callable[[], bytes]] = {}
    for path in sorted(place.rglob("*")):
        if path.suffix.lower().lstrip(".") in IMAGE_TYPES:
            inside = path.relative_to(place)
            for name in (path.stem, path.name, str(inside.with_suffix("")), str(inside), str(path)):
                found[name] = path.read_bytes
    if not found:
        raise DataError(
            f"{place} holds no pictures and no shards; give a folder of pictures or one split of a data set"
        )
    return found


def _spread(items: list, count: int) -> list:
    """At most ``count`` of the items, evenly spread."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _refuse_other_norm(out: Path, normalised: bool) -> None:
    if (out / "manifest.json").exists():
        there = next(
            iter(Embeddings(out, split) for split in ("train", "val") if (out / split / "index.json").exists()), None
        )
        if there is not None and there.normalised != normalised:
            raise DataError(
                f"{out} holds rows with normalised={there.normalised}, these are not; write to another folder"
            )


def _write(parts: list[Part], clip: CLIP, interface: Interface, found: Found, cfg: ImportConfig) -> None:
    columns = ("image_emb", "text_emb", "tokens")
    splits = ("train", "val") if cfg.val else ("train",)
    if not cfg.val and (cfg.out / "val").exists():
        raise DataError(
            f"{cfg.out / 'val'} holds rows of an earlier import, which --val 0 would train on too: remove {cfg.out}, or "
            "write to another folder"
        )
    writers = {split: EmbeddingsWriter(cfg.out, split, interface, columns, found.dtype) for split in splits}
    written = {split: Written(cfg.out / split, [], [], "", "") for split in splits}
    texts: dict[str, list[str]] = {split: [] for split in splits}
    data: dict[str, list[str]] = {split: [] for split in splits}
    with counted(found.num_rows, "importing rows") as advance:
        for part in parts:
            image, text = read_rows(part.image), read_rows(part.text) if part.text else None
            keys, captions = texts_of(part, len(image))
            in_val = np.array([_place(key) < cfg.val for key in keys])
            for number, block in enumerate(blocks(len(keys), SHARD_ROWS)):
                for split in splits:
                    rows = block.start + np.flatnonzero(in_val[block] == (split == "val"))
                    if not len(rows):
                        continue
                    shard = _Shard(f"{part.number:05d}-{number:04d}", rows, image, text, keys, captions)
                    data[split].append(_write_shard(writers[split], shard, clip, found))
                    written[split].names.append(shard.name)
                    written[split].shard_sizes.append(len(rows))
                    texts[split].append(text_sha256(*shard.texts()))
                advance(block.stop - block.start)
    if not written["train"].names:
        raise DataError(f"all {found.num_rows} rows of {cfg.src} fall into val; lower --val")
    for split, rows in written.items():
        if rows.names:
            rows.fingerprint, rows.text_fingerprint = _joined_hash(data[split]), _joined_hash(texts[split])
            writers[split].finish(rows, {"normalised": found.normalised, "source": found.source()})
            found.written[split] = sum(rows.shard_sizes)


@dataclass
class _Shard:
    """Some rows of a part."""

    name: str
    rows: np.ndarray
    image: np.ndarray
    text: np.ndarray | None
    keys: list[str]
    captions: list[str]

    def texts(self) -> tuple[list[str], list[str]]:
        return [self.keys[i] for i in self.rows], [self.captions[i] for i in self.rows]


def _write_shard(writer: EmbeddingsWriter, shard: _Shard, clip: CLIP, found: Found) -> str:
    """Write one shard unless it is there; returns the hash of what it was made of."""
    keys, captions = shard.texts()
    columns = {"image_emb": np.ascontiguousarray(shard.image[shard.rows]).astype(found.dtype)}
    if shard.text is not None:
        columns["text_emb"] = np.ascontiguousarray(shard.text[shard.rows]).astype(found.dtype)
    digest = hashlib.sha256(text_sha256(keys, captions).encode())
    for values in columns.values():
        digest.update(values.tobytes())
    sha256 = digest.hexdigest()
    folder = writer.split_dir / shard.name
    if not writer.done(shard.name, sha256, keys):
        columns["tokens"] = clip.tokenize(captions).int().numpy()
        if "text_emb" not in columns:
            columns["text_emb"] = _encode_text(clip, columns["tokens"], found)
        writer.write(shard.name, sha256, keys, columns)
    if not (folder / CAPTIONS).exists():
        write_captions(folder, captions)
    return sha256


@torch.no_grad()
def _encode_text(clip: CLIP, tokens: np.ndarray, found: Found) -> np.ndarray:
    """z_t of the captions, unit-norm where z_i is."""
    rows = [clip.encode_text(torch.from_numpy(tokens[part]).long())[0].float() for part in blocks(len(tokens), _BATCH)]
    encoded = torch.cat(rows)
    return (F.normalize(encoded, dim=1) if found.normalised else encoded).numpy().astype(found.dtype)


def _place(key: str) -> float:
    """A number in [0, 1) that depends on the key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) / 2**48


def _joined_hash(parts: list[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@dataclass
class ExportConfig:
    """``folder``: embeddings; ``split`` of them goes to ``out``, with captions from ``data`` (a folder with splits).

    ``kind``: npy or parquet. ``raw`` keeps CLIP's raw outputs; otherwise rows are unit-norm, as clip-retrieval's are.
    """

    folder: Path
    out: Path
    split: str = "train"
    data: Path | None = None
    kind: str = "npy"
    raw: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("npy", "parquet"):
            raise ConfigError(f"--kind {self.kind} is not one of: npy, parquet")


def export_embeddings(cfg: ExportConfig) -> int:
    """Write one split in clip-retrieval's layout, a part per shard; returns the number of rows.

    Raises ConfigError where ``out`` is there already, and for raw rows of embeddings that are unit-norm.
    """
    embeddings = Embeddings(cfg.folder, cfg.split)
    if cfg.raw and embeddings.normalised:
        raise ConfigError(
            f"{cfg.folder} holds unit-norm rows: CLIP's raw outputs cannot be had from them; leave out --raw"
        )
    caption = _captions(embeddings, cfg)
    names = {"image_emb": "img_emb", "text_emb": "text_emb"}
    columns = [column for column in names if column in embeddings.columns]
    keys, start = embeddings.keys, 0
    with complete_or_not(cfg.out) as draft:
        writer = LayoutWriter(draft, cfg.kind, len(embeddings.names))
        for size in embeddings.shard_sizes:
            samples = range(start, start + size)
            stored = embeddings.rows(np.array(samples), columns)
            rows = {names[column]: _first(values) for column, values in stored.items()}
            if not cfg.raw:
                rows = {name: v / np.linalg.norm(v, axis=1, keepdims=True) for name, v in rows.items()}
            captions = None if caption is None else [caption(i) for i in samples]
            writer.write(rows, list(itertools.islice(keys, samples.start, samples.stop)), captions)
            start += size
    return start


def _first(values: np.ndarray) -> np.ndarray:
    """(n, D) float32 of (n, D), or of (n, V, D) with several captions or crops a picture."""
    return values.reshape(len(values), -1, values.shape[-1])[:, 0].astype(np.float32)


def _captions(embeddings: Embeddings, cfg: ExportConfig) -> Callable[[int], str] | None:
    """Where the captions of a split come from; None where nobody has them."""
    if cfg.data is not None:
        shards = Shards(cfg.data / cfg.split)
        embeddings.check_belongs_to(shards)
        return shards.caption
    if (embeddings.split_dir / embeddings.names[0] / CAPTIONS).exists():
        return StoredTexts(embeddings).caption
    return None
