import copy
import json
import logging
import shutil
import socket
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_sets import noise
from shard_server import serving

from unclip.data import embed as embed_module
from unclip.data.check import check_data
from unclip.data.embed import EmbedConfig, embed_with
from unclip.data.embeddings import Embeddings
from unclip.data.embeddings_writer import EmbeddingsWriter
from unclip.data.shards import Shards, ShardWriter
from unclip.errors import ConfigError, DataError
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.interface import Interface


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    small = {"embed_dim": 12, "image_size": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2}
    return CLIP(CLIPConfig(**small, text_width=16, text_layers=1, text_heads=2, context_length=12)).eval()


@pytest.fixture(scope="module")
def interface(clip: CLIP) -> Interface:
    return replace(clip.interface(), clip="a" * 64)


def config(run: Path, data: Path, **changes: object) -> EmbedConfig:
    return EmbedConfig(**{"run": str(run), "clip": "", "data": str(data), "batch_size": 4, **changes})  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_what_clip_says(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface, pixels: dict[str, np.ndarray], num_workers: int
) -> None:
    columns = ["image_emb", "text_emb", "tokens", "text_seq"]
    embed_with(clip, interface, config(tmp_path, data, columns=columns, num_workers=num_workers))
    for split in ("train", "val"):
        embeddings, shards = Embeddings(tmp_path, split), Shards(data / split)
        embeddings.check_belongs_to(shards)
        tokens = clip.tokenize([shards.caption(i) for i in range(len(shards))])
        text_emb, text_seq = clip.encode_text(tokens)
        image_emb = clip.encode_image(torch.from_numpy(pixels[split]))
        rows = embeddings.rows(np.arange(len(shards)), columns)
        np.testing.assert_array_equal(rows["tokens"], tokens.numpy())
        np.testing.assert_allclose(rows["image_emb"], image_emb.numpy(), atol=1e-5)
        np.testing.assert_allclose(rows["text_emb"], text_emb.numpy(), atol=1e-5)
        longest = rows["text_seq"].shape[1]
        real = np.arange(longest) <= tokens.argmax(1).numpy()[:, None]
        assert longest == real.sum(1).max()
        np.testing.assert_allclose(rows["text_seq"][real], text_seq[:, :longest].numpy()[real], atol=2e-3)
        assert not rows["text_seq"][~real].any()


@pytest.mark.parametrize("cached", [False, True])
def test_data_behind_an_url_give_the_same_rows(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface, cached: bool
) -> None:
    shutil.copytree(data, tmp_path / "served")
    embed_with(clip, interface, config(tmp_path / "here", data, splits=["train"]))
    with serving(tmp_path / "served") as server:
        cache = {"cache_dir": str(tmp_path / "cache")} if cached else {}
        far = config(tmp_path / "far", data, splits=["train"], retry_seconds=5.0, **cache)
        embed_with(clip, interface, replace(far, data=server.url))
        with pytest.raises(ConfigError, match=r"name them, splits=\[train,val\]"):
            embed_with(clip, interface, replace(far, data=server.url, splits=[]))
    here, there = (Embeddings(tmp_path / run, "train") for run in ("here", "far"))
    np.testing.assert_array_equal(here.column("image_emb"), there.column("image_emb"))
    assert list(here.keys) == list(there.keys)


def test_a_stopped_run_goes_on_and_ends_alike(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    embed_with(clip, interface, config(whole, data))
    write, written = EmbeddingsWriter.write, []

    def stop_at_third(self: EmbeddingsWriter, name: str, *rest: object) -> None:
        if len(written) == 2:
            (self.split_dir / f"{name}.{socket.gethostname()}-{2**22 + 1}.tmp").mkdir()  # as a kill leaves it
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(EmbeddingsWriter, "write", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        embed_with(clip, interface, config(cut, data))
    with pytest.raises(DataError, match="no finished embeddings folder"):
        Embeddings(cut, "train")
    monkeypatch.undo()

    encode, encoded = embed_module._encode, []
    monkeypatch.setattr(embed_module, "_encode", lambda *a: encoded.append(len(a[1])) or encode(*a))
    embed_with(clip, interface, config(cut, data))
    assert sum(encoded) == 20 + 7 - 12
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    assert all((whole / file).read_bytes() == (cut / file).read_bytes() for file in files)

    encoded.clear()
    embed_with(clip, interface, config(cut, data))
    assert encoded == []


def test_another_clip_is_refused(tmp_path: Path, data: Path, clip: CLIP, interface: Interface) -> None:
    embed_with(clip, interface, config(tmp_path, data, splits=["val"], dtype="float16"))
    assert Embeddings(tmp_path, "val").column("image_emb").dtype == np.float16
    with pytest.raises(DataError, match="clip aaaaaaaa, not bbbbbbbb"):
        embed_with(clip, replace(interface, clip="b" * 64), config(tmp_path, data, splits=["val"], dtype="float16"))


def test_other_columns_dtypes_and_variants_are_refused(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface
) -> None:
    embed_with(clip, interface, config(tmp_path, data, splits=["val"]))
    for changes, message in [
        ({"dtype": "float16"}, "dtype float32, not float16"),
        ({"columns": ["image_emb"]}, r"columns \['image_emb', 'text_emb', 'tokens'\], not \['image_emb'\]"),
        ({"crops": 2}, "variants .*'crops': 1.*, not .*'crops': 2"),
    ]:
        with pytest.raises(DataError, match=message):
            embed_with(clip, interface, config(tmp_path, data, splits=["val"], **changes))
    facts = tmp_path / "val" / "00000" / "shard.json"
    facts.write_text(facts.read_text()[:40])
    with pytest.raises(DataError, match=r"00000/shard\.json is damaged .*; remove .*/val/00000"):
        embed_with(clip, interface, config(tmp_path, data, splits=["val"]))


class Scaled(CLIP):
    """A CLIP whose embeddings are ``factor`` times as long."""

    factor = 1.0

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return super().encode_image(image) * self.factor


def test_overflow_and_numbers_that_are_not_finite_name_the_first_sample(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = Scaled(clip.cfg).eval()
    scaled.load_state_dict(clip.state_dict())
    monkeypatch.setattr(Scaled, "factor", 1e6)
    with pytest.raises(
        DataError, match=r"image_emb of train0 reaches .*, beyond float16 \(6.55e\+04\): take dtype=flo"
    ):
        embed_with(scaled, interface, config(tmp_path, data, dtype="float16"))
    encode = clip.encode_image
    broken = torch.from_numpy(np.array([1.0] * 6 + [float("nan")] + [1.0]))[4:, None].float()

    def nan_at_train6(image: torch.Tensor) -> torch.Tensor:
        found = encode(image)
        calls.append(len(image))
        return found * broken if len(calls) == 3 else found  # a shard of six is a batch of four and one of two

    calls: list[int] = []
    monkeypatch.setattr(clip, "encode_image", nan_at_train6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(DataError, match="image_emb of train8 is not finite: try precision=fp32"):
        embed_with(clip, interface, config(tmp_path, data))
    assert not (tmp_path / "train" / "00001").exists()


def test_a_damaged_picture_is_named(tmp_path: Path, data: Path, clip: CLIP, interface: Interface) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    index = json.loads((copy / "train" / "index.json").read_text())
    offset, size = index["shards"][1]["offsets"]["png"][2]
    tar = copy / "train" / "00001.tar"
    content = bytearray(tar.read_bytes())
    content[offset : offset + size] = bytes(size)
    tar.write_bytes(content)
    with pytest.raises(
        DataError, match=r"damaged pictures \(train8\); delete its index.json, then `unclip data check .*data`"
    ):
        embed_with(clip, interface, config(tmp_path / "run", copy))
    (copy / "train" / "index.json").unlink()
    check_data(copy, min_size=1)
    embed_with(clip, interface, config(tmp_path / "run", copy))
    assert "train8" not in Embeddings(tmp_path / "run", "train").keys


def test_a_shard_that_is_not_the_one_of_the_index_is_refused(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    tar = copy / "val" / "00001.tar"
    content = bytearray(tar.read_bytes())
    content[-1] ^= 1  # in the padding: the pictures are good
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"val/00001\.tar is not the file of its index: it changed since"):
        embed_with(clip, interface, config(tmp_path / "run", copy))


def test_changed_shards_are_made_anew(
    tmp_path: Path, data: Path, larger: Path, clip: CLIP, interface: Interface, caplog: pytest.LogCaptureFixture
) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    embed_with(clip, interface, config(run, data))
    with caplog.at_level(logging.INFO):
        embed_with(clip, interface, config(run, larger))
    assert "00000 was made from other data: made anew" in caplog.text
    embed_with(clip, interface, config(fresh, larger))
    for path in (path for path in fresh.rglob("*") if path.is_file()):
        assert (run / path.relative_to(fresh)).read_bytes() == path.read_bytes()


def test_storage_is_told_first_and_what_does_not_fit_is_refused(
    tmp_path: Path,
    data: Path,
    clip: CLIP,
    interface: Interface,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    columns = ["image_emb", "text_emb", "tokens", "text_seq"]
    wanted = {"columns": columns, "dtype": "float16", "crops": 2}
    with caplog.at_level(logging.INFO):
        embed_with(clip, interface, config(tmp_path / "a", data, **wanted))
    said = next(record.getMessage() for record in caplog.records if "pictures take" in record.getMessage())
    rows = 27
    image, text, tokens = rows * 2 * 12 * 2, rows * 12 * 2, rows * 12 * 4
    longest = max(np.load(path).shape[1] for path in tmp_path.glob("a/*/*/text_seq.npy"))
    states = rows * longest * 16 * 2
    each = [f"{size / 1e6:.3g} MB" for size in (image + text + tokens + states, image, text, tokens, states)]
    assert said.startswith(
        f"27 pictures take {each[0]}: image_emb {each[1]}, text_emb {each[2]}, tokens {each[3]}, text_seq {each[4]}; "
        f"{each[0]} still to write, "
    )
    real = sum(path.stat().st_size - 128 for path in tmp_path.glob("a/*/*/*.npy"))
    assert 0.8 * (image + text + tokens + states) < real <= image + text + tokens + states

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match=rf"b has 0\.001 MB free, the embeddings still need {each[0]} \(image_emb"):
        embed_with(clip, interface, config(tmp_path / "b", data, **wanted))
    embed_with(clip, interface, config(tmp_path / "a", data, **wanted))  # nothing is missing, so nothing is needed


def test_wrong_settings_and_missing_data_are_refused(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface
) -> None:
    with pytest.raises(ConfigError, match="float32, float16"):
        config(tmp_path, data, dtype="int8")
    with pytest.raises(ConfigError, match="must hold image_emb"):
        config(tmp_path, data, columns=["image_em"])
    with pytest.raises(DataError, match="holds no split"):
        embed_with(clip, interface, config(tmp_path, tmp_path))
    with pytest.raises(ConfigError, match="part=2 of parts=2: parts count from 0"):
        config(tmp_path, data, part=2, parts=2)
    with pytest.raises(ConfigError, match="crops=0 must be at least 1"):
        config(tmp_path, data, crops=0)


@torch.inference_mode()
def test_weights_rounded_once_give_the_same_bits(clip: CLIP) -> None:
    rounded = copy.deepcopy(clip)
    embed_module._round_weights(rounded)
    image = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    tokens = clip.tokenize(["a", "b c", "d e f"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded.encode_image(image), clip.encode_image(image))
        for ours, wanted in zip(rounded.encode_text(tokens), clip.encode_text(tokens), strict=True):
            assert torch.equal(ours, wanted)
    assert sum(p.dtype == torch.bfloat16 for p in rounded.parameters()) >= 12


@torch.no_grad()
@pytest.mark.parametrize(("captions", "count"), [(1, 2), (2, 3)])
def test_captions_that_are_cut_are_counted_in_one_warning_with_the_first_key(
    tmp_path: Path, clip: CLIP, interface: Interface, caplog: pytest.LogCaptureFixture, captions: int, count: int
) -> None:
    fits = "word " * 10  # with start and end all that this CLIP reads
    texts = [[fits, "short"], ["word " * 1000, fits], ["word " * 11, "word " * 11], ["short", fits]]
    for split in ("train", "val"):
        with ShardWriter(tmp_path / "data" / split, shard_size=2) as writer:
            for i, listed in enumerate(texts if split == "train" else [[fits]]):
                writer.write(f"{split}{i}", noise(i, (16, 16)), listed[0], {"captions": listed})
    with caplog.at_level(logging.WARNING):
        embed_with(clip, interface, config(tmp_path / "run", tmp_path / "data", captions=captions, batch_size=2))
    (warning,) = [record.getMessage() for record in caplog.records if "captions" in record.getMessage()]
    assert f"longer than the 12 tokens that CLIP reads: {count}, the first of them that of train1" in warning


def test_the_caption_of_no_words_stands_beside_the_embeddings(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface
) -> None:
    embed_with(clip, interface, config(tmp_path, data))
    path = tmp_path / "empty_caption.safetensors"
    found, whole = Embeddings(tmp_path, "train").empty_caption(), path.read_bytes()
    text_emb, text_seq = clip.encode_text(clip.tokenize([""])[:, :2])
    assert found["tokens"].tolist() == clip.tokenize([""])[0, :2].tolist()
    torch.testing.assert_close(found["text_emb"], text_emb[0])
    torch.testing.assert_close(found["text_seq"], text_seq[0])
    path.unlink()
    with pytest.raises(DataError, match="the same unclip-embed again adds what CLIP makes of the caption"):
        Embeddings(tmp_path, "train").empty_caption()
    embed_with(clip, interface, config(tmp_path, data))
    assert path.read_bytes() == whole
