import itertools
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from unclip.data.ahead import prefetched
from unclip.data.batch import Batch
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.embeddings_writer import EmbeddingsWriter
from unclip.data.order import Order
from unclip.data.pictures import Pictures
from unclip.data.shards import Shards
from unclip.errors import ConfigError, DataError
from unclip.models.interface import Interface
from unclip.nets.layers import caption_mask

IMAGE = ("image",)
CLIP = Interface(embed_dim=3, text_width=2, context_length=9, vocab_size=50, clip="c" * 64)


def lengths_as_tokens(captions: list[str]) -> torch.Tensor:
    """One token 7 per word, end 49, zeros up to 9."""
    return torch.tensor([[7] * (n := len(c.split())) + [49] + [0] * (8 - n) for c in captions])


def batches(data: UnclipData, count: int) -> list[Batch]:
    return list(itertools.islice(data.train_dataloader(), count))


def check(batch: Batch, positions: range, shards: Shards, pixels: np.ndarray, captions: bool = True) -> None:
    indices = Order(shards.shard_sizes, 5).indices(positions.start, len(positions))
    assert batch.position == list(positions)
    assert batch.key == [shards.keys[i] for i in indices]
    assert batch.caption == [shards.caption(int(i)) for i in indices if captions]
    assert batch.image is not None
    assert batch.image.dtype == torch.uint8
    assert np.array_equal(batch.image.numpy(), pixels[indices])


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_follow_the_order_from_any_start(
    data: Path, pixels: dict[str, np.ndarray], cache: bool, num_workers: int
) -> None:
    module = UnclipData(DataConfig(str(data), cache=cache, num_workers=num_workers), 5, 8, IMAGE)
    shards = Shards(data / "train")
    module.set_start(1)
    for step, batch in enumerate(batches(module, 6), start=1):  # crosses epochs of 20 samples
        check(batch, range(step * 8, step * 8 + 8), shards, pixels["train"], captions=not num_workers)


def test_ranks_divide_what_one_device_gets(data: Path, pixels: dict[str, np.ndarray]) -> None:
    shards = Shards(data / "train")
    for rank in range(4):
        module = UnclipData(DataConfig(str(data)), 5, 8, IMAGE)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=4)  # type: ignore[assignment]
        module.setup()
        for step, batch in enumerate(batches(module, 3)):
            check(batch, range(step * 8 + rank * 2, step * 8 + rank * 2 + 2), shards, pixels["train"])
    module.world_size = 3
    with pytest.raises(ConfigError, match="not a multiple of 3"):
        module.train_dataloader()


@pytest.mark.parametrize(("world_size", "max_val"), [(1, 100), (2, 100), (3, 5), (1, 4)])
def test_validation_sees_each_sample_once_in_equally_many_batches(
    data: Path, pixels: dict[str, np.ndarray], world_size: int, max_val: int
) -> None:
    seen, counts = [], set()
    for rank in range(world_size):
        module = UnclipData(DataConfig(str(data), max_val=max_val), 5, 6, IMAGE)
        module.rank, module.world_size = rank, world_size
        found = list(module.val_dataloader())
        counts.add(len(found))
        for batch in found:
            assert np.array_equal(batch.image.numpy(), pixels["val"][batch.position])
            seen += batch.position
    assert len(counts) == 1
    expected = list(range(7)) if max_val > 7 else [i * 7 // max_val for i in range(max_val)]
    assert sorted(seen) == expected
    assert UnclipData(DataConfig(str(data), val_split=None), 5, 6, IMAGE).val_dataloader() == []


@pytest.mark.parametrize("cache", [False, True])
def test_tokens_are_made_and_cut_to_the_longest_caption(data: Path, cache: bool) -> None:
    calls = []

    def tokenize(captions: list[str]) -> torch.Tensor:
        calls.append(len(captions))
        return lengths_as_tokens(captions)

    module = UnclipData(DataConfig(str(data), cache=cache), 5, 4, ("tokens",), tokenize)
    for batch in batches(module, 10):
        assert batch.image is None
        longest = max(len(caption.split()) for caption in batch.caption)
        assert batch.tokens is not None
        assert batch.tokens.shape == (4, longest + 1)
        assert batch.tokens.dtype == torch.int64
        mask = caption_mask(batch.tokens)
        assert mask.sum(1).tolist() == [len(caption.split()) + 1 for caption in batch.caption]
    assert (sum(calls) == 20) == cache


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Row i of split train is (i, i, i), its token states i."""
    folder = tmp_path_factory.mktemp("embedded")
    for split in ("train", "val"):
        shards = Shards(data / split)
        writer = EmbeddingsWriter(folder, split, CLIP, ("image_emb", "text_emb", "tokens", "text_seq"), "float16")
        for s, name in enumerate(shards.names):
            numbers = np.arange(shards.starts[s], shards.starts[s + 1])
            image_emb = np.repeat(numbers[:, None], 3, 1).astype(np.float16)
            tokens = lengths_as_tokens([shards.caption(i) for i in numbers]).int().numpy()
            text_seq = np.tile(image_emb[:, :1, None], (1, 7, 2))
            columns = {"image_emb": image_emb, "text_emb": -image_emb, "tokens": tokens, "text_seq": text_seq}
            writer.write(Path(name).stem, shards.sha256[s], [shards.keys[i] for i in numbers], columns)
        writer.finish(shards)
    return folder


def test_stored_columns_belong_to_the_pictures(
    data: Path, embedded: Path, larger: Path, pixels: dict[str, np.ndarray]
) -> None:
    needs = ("image", "tokens", "image_emb", "text_emb", "text_seq")
    module = UnclipData(DataConfig(str(data), str(embedded)), 5, 8, needs)
    assert module.interface == CLIP
    assert module.embeddings is not None
    for batch in batches(module, 4):
        numbers = torch.tensor([int(key.removeprefix("train")) for key in batch.key])
        assert batch.image_emb is not None
        assert torch.equal(batch.image_emb, numbers[:, None].expand(8, 3).float())
        assert torch.equal(batch.text_emb, -batch.image_emb)
        assert batch.tokens.shape[1] == batch.text_seq.shape[1] == max(len(c.split()) for c in batch.caption) + 1
        assert torch.equal(batch.text_seq[:, 0, 0], numbers.float())
        assert np.array_equal(batch.image.numpy(), pixels["train"][numbers])
    (batch,) = batches(UnclipData(DataConfig(str(larger), str(embedded), image_size=8), 5, 8, needs), 1)
    assert batch.image.shape == (8, 3, 8, 8)


def test_a_stage_without_pictures_decodes_none(data: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shards, "image", lambda *_: pytest.fail("a picture was read"))
    (batch,) = batches(UnclipData(DataConfig(str(data), str(embedded)), 5, 8, ("tokens", "image_emb", "text_emb")), 1)
    assert batch.image is None
    assert batch.image_emb is not None


def test_missing_sources_are_named(data: Path, embedded: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs tokens, image_emb; run unclip-embed"):
        UnclipData(DataConfig(str(data)), 5, 8, ("tokens", "image_emb", "text_seq")).train_dataloader()
    with pytest.raises(DataError, match="made from other data"):
        UnclipData(DataConfig(str(other), str(embedded)), 5, 8, ("image_emb",)).train_dataloader()
    with pytest.raises(ConfigError, match=r"data\.path is not set"):
        UnclipData(DataConfig(), 5, 8, IMAGE)
    with pytest.raises(DataError, match="there is no folder"):
        UnclipData(DataConfig(str(tmp_path)), 5, 8, IMAGE).train_dataloader()


def test_fingerprints_tell_data_apart(data: Path, larger: Path, embedded: Path, tmp_path: Path) -> None:
    configs = [DataConfig(str(data)), DataConfig(str(larger)), DataConfig(str(data), str(embedded))]
    found = [UnclipData(config, 5, 8, IMAGE).fingerprint for config in configs]
    assert len(set(found)) == 3
    assert found[0] == UnclipData(DataConfig(str(data)), 6, 4, IMAGE).fingerprint
    other = shutil.copytree(embedded, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    for change in ({"precision": "bf16"}, {"dtype": "float32"}, {"variants": {"captions": 2, "crops": 1, "seed": 0}}):
        (other / "manifest.json").write_text(json.dumps(manifest | change))
        found.append(UnclipData(DataConfig(str(data), str(other)), 5, 8, IMAGE).fingerprint)
    assert len(set(found)) == 6, "the same shards, but other rows"


def test_validation_sees_no_more_at_once_than_training(data: Path) -> None:
    module = UnclipData(DataConfig(str(data), max_val=8), 5, 8, IMAGE)
    assert [len(batch) for batch in module.val_dataloader()] == [7]
    module.parts = 4
    assert [len(batch) for batch in module.val_dataloader()] == [2, 2, 2, 1]


def test_batches_go_to_a_gpu_without_waiting(data: Path) -> None:
    module, asked = UnclipData(DataConfig(str(data)), 5, 8, IMAGE), []
    batch: Any = SimpleNamespace(to=lambda device, non_blocking: asked.append((device.type, non_blocking)))
    for device in ("cuda", "cpu"):
        module.transfer_batch_to_device(batch, torch.device(device), 0)
    assert asked == [("cuda", True), ("cpu", False)]


def test_neighbours_stay_together_in_the_batches(data: Path) -> None:
    module = UnclipData(DataConfig(str(data), neighbours=3), 5, 8, IMAGE)
    keys = [key for batch in batches(module, 5) for key in batch.key]
    shards = Shards(data / "train")
    assert keys == [shards.keys[i] for i in Order(shards.shard_sizes, 5, neighbours=3).indices(0, 40)]
    assert keys != [shards.keys[i] for i in Order(shards.shard_sizes, 5).indices(0, 40)]


def test_a_validation_set_elsewhere_needs_a_name_of_its_own() -> None:
    for split in ("train", None):
        with pytest.raises(ConfigError, match="give that split there a name other than train_split=train"):
            DataConfig("A", val_path="B", val_split=split)


@pytest.mark.parametrize("cache", [False, True])
def test_a_damaged_picture_is_replaced_counted_and_logged_once(
    data: Path,
    pixels: dict[str, np.ndarray],
    cache: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = Shards.image
    monkeypatch.setattr(Shards, "image", lambda self, i: b"broken" if i in (4, 5) else read(self, i))
    pictures = Pictures(Shards(data / "train"), None, cache)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            image, used = pictures.batch(np.array([3, 4, 5, 9]))
            assert used.tolist() == [3, 0, 0, 9]  # the shard holds samples 0 to 5
            assert np.array_equal(image.numpy(), pixels["train"][used])
    assert pictures.num_replaced == 2
    assert len(caplog.records) == 2


def test_a_cache_larger_than_memory_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 100 if name == "SC_PHYS_PAGES" else 200)
    with pytest.raises(DataError, match=r"set data\.cache=false"):
        Pictures(Shards(data / "train"), 32, cache=True)


def test_the_cache_decodes_each_picture_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = UnclipData(DataConfig(str(data), cache=True), 5, 10, IMAGE)
    read, reads = Shards.image, []
    monkeypatch.setattr(Shards, "image", lambda self, i: reads.append(i) or read(self, i))
    batches(module, 6)
    assert len(reads) <= 21  # 20 samples, one of them also to learn the shape


def test_errors_of_the_background_thread_arrive_and_the_thread_ends() -> None:
    def broken():
        yield Batch(position=[0])
        raise DataError("no more")

    stream = prefetched(broken(), 2)
    assert next(stream).position == [0]
    with pytest.raises(DataError, match="no more"):
        next(stream)
    endless = prefetched((Batch(position=[i]) for i in itertools.count()), 2)
    assert [next(endless).position for _ in range(3)] == [[0], [1], [2]]
    endless.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "unclip-batches"]


def test_batch_moves_and_masks() -> None:
    tokens = torch.tensor([[3, 49, 0], [3, 0, 49]])
    assert caption_mask(tokens).tolist() == [[True, True, False], [True, True, True]]
    batch = Batch(key=["a", "b"], position=[4, 5], caption=["x", "y"], tokens=tokens)
    moved = batch.to("meta")
    assert moved.tokens is not None
    assert moved.tokens.device.type == "meta"
    assert moved.position == [4, 5]
