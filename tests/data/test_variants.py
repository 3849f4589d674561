import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_sets import write_tar
from PIL import Image

from unclip.data.embed import EmbedConfig, embed_with
from unclip.data.embeddings import Embeddings
from unclip.data.settings import DataConfig
from unclip.data.shards import Shards, ShardWriter, build_index
from unclip.data.split import Split
from unclip.data.texts import text_sha256
from unclip.data.transforms import load_image
from unclip.data.variants import Crops, Variants, captions_of, picked
from unclip.errors import DataError
from unclip.models.clip import CLIP, CLIPConfig


def png(seed: int, size: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples with captions in every form that there is."""
    folder = tmp_path_factory.mktemp("many")
    with ShardWriter(folder / "train", shard_size=4) as writer:
        for i in range(9):
            meta = {"captions": [f"json {i} a", f"json {i} b", f"json {i} c", "beyond"]} if i % 3 == 0 else {}
            text = f"line {i} a\n\n line {i} b \nline {i} c" if i % 3 == 1 else f"only {i}"
            writer.write(f"k{i}", png(i), text, meta)
    return folder


def test_captions_of_every_form(many: Path) -> None:
    shards = Shards(many / "train")
    assert captions_of(shards, 0, 3) == ["json 0 a", "json 0 b", "json 0 c"]
    assert captions_of(shards, 1, 3) == ["line 1 a", "line 1 b", "line 1 c"]
    assert captions_of(shards, 2, 3) == ["only 2"] * 3
    assert captions_of(shards, 1, 4)[3] == "line 1 a"
    assert captions_of(shards, 0, 1) == ["only 0"]


def test_other_captions_of_a_picture_make_another_text_fingerprint(tmp_path: Path) -> None:
    def fingerprint(name: str, *more: str) -> str:
        with ShardWriter(tmp_path / name) as writer:
            writer.write("k", png(0), "one", {"style": "flat", **({"captions": ["one", *more]} if more else {})})
        return Shards(tmp_path / name).text_fingerprint

    assert fingerprint("a", "two") == fingerprint("b", "two") != fingerprint("c", "three")
    assert fingerprint("d") == hashlib.sha256(text_sha256(["k"], ["one"]).encode()).hexdigest()


def test_captions_that_are_no_list_are_refused(tmp_path: Path) -> None:
    files = {"a.png": png(0), "a.json": json.dumps({"captions": "one"}).encode()}
    write_tar(tmp_path / "train" / "0.tar", files)
    build_index(tmp_path / "train")
    with pytest.raises(DataError, match=r'"captions" of a in .*train is not a list of texts'):
        captions_of(Shards(tmp_path / "train"), 0, 2)


def test_crops_are_windows_that_depend_on_seed_and_shard_only(many: Path) -> None:
    shards = Shards(many / "train")
    crops = Crops(shards, 16, Variants(crops=3, seed=5))
    found = crops.batch(range(3, 7)).unflatten(0, (4, 3))
    larger = torch.stack([load_image(shards.image(i), 20) for i in range(3, 7)])
    for row, sample in enumerate(range(3, 7)):
        assert torch.equal(found[row, 0], load_image(shards.image(sample), 16))
        for k in (1, 2):
            windows = larger[row].unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 5, 5, 16, 16)
            equal = (windows == found[row, k][:, None, None]).all(-1).all(-1).all(0)
            assert equal.sum() == 1
    assert torch.equal(crops.batch(range(5, 6)), found[2])
    assert not torch.equal(found[:, 1], found[:, 2])
    assert not torch.equal(Crops(shards, 16, Variants(crops=3, seed=6)).batch(range(3, 7)), found.flatten(0, 1))


def test_picks_depend_on_positions_and_use_every_variant() -> None:
    variants = Variants(captions=3, crops=2, seed=0)
    positions = list(range(4000))
    captions = np.broadcast_to(np.arange(3), (4000, 3))
    rows = {"tokens": np.stack([captions] * 5, -1), "text_emb": np.stack([captions] * 2, -1)}
    rows["image_emb"] = np.broadcast_to(np.arange(2)[None, :, None], (4000, 2, 2))
    found, caption = picked(rows, variants, positions, central=False)
    assert found["tokens"].shape == (4000, 5)
    assert np.array_equal(found["tokens"][:, 0], caption)
    assert np.array_equal(found["text_emb"][:, 1], caption)
    assert np.abs(np.bincount(caption) / 4000 - 1 / 3).max() < 0.03
    assert np.abs(np.bincount(found["image_emb"][:, 0]) / 4000 - 1 / 2).max() < 0.03
    some = [17, 3, 3999]
    few, again = picked({c: r[some] for c, r in rows.items()}, variants, some, central=False)
    assert again == [caption[i] for i in some]
    assert np.array_equal(few["image_emb"], found["image_emb"][some])
    assert not picked(rows, variants, positions, central=True)[0]["image_emb"].any()


@torch.no_grad()
def test_training_gets_one_caption_with_its_own_columns(tmp_path: Path, many: Path) -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 12, "image_size": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2}
    clip = CLIP(CLIPConfig(**small, text_width=16, text_layers=1, text_heads=2, context_length=12)).eval()
    columns = ["image_emb", "text_emb", "tokens", "text_seq"]
    cfg = EmbedConfig(str(tmp_path), "", str(many), columns=columns, batch_size=6, captions=3, crops=2, seed=1)
    embed_with(clip, replace(clip.interface(), clip="a" * 64), cfg)
    embeddings, shards = Embeddings(tmp_path, "train"), Shards(many / "train")
    assert embeddings.variants == Variants(3, 2, 1)
    rows = embeddings.all_variants(np.arange(9), columns)
    shapes = {name: values.shape for name, values in rows.items()}
    longest = shapes["text_seq"][2]
    assert shapes == {
        "image_emb": (9, 2, 12), "text_emb": (9, 3, 12), "tokens": (9, 3, 12), "text_seq": (9, 3, longest, 16),
    }  # fmt: skip
    image = Crops(shards, 16, cfg.variants).batch(range(9))
    np.testing.assert_allclose(rows["image_emb"].reshape(18, 12), clip.encode_image(image).numpy(), atol=1e-5)
    for name, first in embeddings.rows(np.arange(9), columns).items():
        assert np.array_equal(first, rows[name][:, 0])
    assert np.array_equal(embeddings.column("image_emb"), rows["image_emb"][:, 0])
    stats = embeddings.stats
    assert (stats["count"], stats["image_count"], stats["text_count"]) == (9, 18, 27)
    np.testing.assert_allclose(stats["text_mean"], rows["text_emb"].reshape(27, 12).astype(np.float64).mean(0))

    split = Split(DataConfig(path=str(many), embeddings=str(tmp_path)), "train", columns, None)
    batch = split.batch(np.arange(9), list(range(100, 109)))
    assert len({caption[-1] for caption in batch.caption}) > 1
    tokens = clip.tokenize(batch.caption)
    length = batch.tokens.shape[1]
    assert torch.equal(batch.tokens, tokens[:, :length])
    text_emb, text_seq = clip.encode_text(tokens)
    torch.testing.assert_close(batch.text_emb.float(), text_emb, atol=1e-5, rtol=0)
    real = torch.arange(length) <= tokens.argmax(1)[:, None]
    torch.testing.assert_close(batch.text_seq.float()[:, :length][real], text_seq[:, :length][real], atol=2e-3, rtol=0)
