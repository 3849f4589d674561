"""Shards without an index."""

import io
import itertools
import logging
import tarfile
from pathlib import Path

import pytest
import torch
from shard_server import serving

from unclip.data.batch import Batch
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.errors import ConfigError, DataError


def module(path: str | list[str], num_workers: int = 0, needs: tuple[str, ...] = ("image",)) -> UnclipData:
    return UnclipData(DataConfig(path, val_split=None, num_workers=num_workers, retry_seconds=0.4), 5, 8, needs)


def batches(data: UnclipData, count: int, start: int = 0) -> list[Batch]:
    data.set_start(start)
    return list(itertools.islice(data.train_dataloader(), count))


def pipes(data: Path) -> str:
    return f"pipe:cat '{data}/train/'{{00000..00003}}.tar"


def test_streams_give_whole_epochs_whatever_the_workers_and_resume(data: Path) -> None:
    whole = batches(module(pipes(data)), 5)
    keys = [key for batch in whole for key in batch.key]
    assert sorted(keys[:20]) == sorted(f"train{i}" for i in range(20)) == sorted(keys[20:])
    assert keys[:20] != keys[20:]
    assert [p for batch in whole for p in batch.position] == list(range(40))
    for other, start in ((batches(module(pipes(data), 2), 5), 0), (batches(module(pipes(data)), 2, 3), 3)):
        for a, b in zip(other, whole[start:], strict=True):
            assert (a.key, a.position, a.caption) == (b.key, b.position, b.caption)
            assert torch.equal(a.column("image"), b.column("image"))


def test_shards_of_an_url_without_index_are_a_stream(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(data) as server:
        (data / "train/index.json").rename(data / "index.aside")
        try:
            with caplog.at_level(logging.INFO):
                found = batches(module(f"{server.url}/train/{{00000..00003}}.tar"), 2)
        finally:
            (data / "index.aside").rename(data / "train/index.json")
    assert [batch.key for batch in found] == [batch.key for batch in batches(module(pipes(data)), 2)]
    assert "A stream resumes on the same number of ranks only" in caplog.text


def test_another_number_of_ranks_and_other_data_are_refused(data: Path) -> None:
    one, two = module(pipes(data)), module(pipes(data))
    state = one.state_dict()
    two.load_state_dict(state)
    two.world_size = 2
    with pytest.raises(ConfigError, match=r"as a stream on 1 ranks and cannot go on with 2"):
        two.load_state_dict(state)
    indexed = module(str(data))
    with pytest.raises(DataError, match="is another one than when this run began"):
        indexed.load_state_dict(state)
    state = indexed.state_dict()
    indexed.world_size = 2
    indexed.load_state_dict(state)


def test_commands_that_fail_and_cut_shards_are_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pipe:echo gone >&2; exit 3 ended with code 3: gone"):
        batches(module("pipe:echo gone >&2; exit 3"), 1)
    cut = tmp_path / "cut.tar"
    cut.write_bytes((data / "train/00000.tar").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut\.tar is not a complete tar file"):
        batches(module(f"pipe:cat {cut}"), 1)
    with pytest.raises(DataError, match="hold no captioned picture"):
        batches(module(f"pipe:tar c -C {tmp_path} cut.tar"), 1)


def test_what_needs_an_index_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs image_emb from embeddings, but pipe:.* is read as a stream"):
        module(pipes(data), needs=("image_emb",)).train_dataloader()
    cfg = DataConfig(pipes(data), val_split=None, neighbours=4)
    with pytest.raises(ConfigError, match=r"data\.neighbours needs shards with an index"):
        UnclipData(cfg, 5, 8, ("image",)).train_dataloader()


def test_damaged_pictures_of_a_stream_are_replaced_and_members_alone_left_out(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = next(iter(batches(module(pipes(data)), 1))).key
    shard = tmp_path / "a.tar"
    with tarfile.open(data / "train/00000.tar") as source, tarfile.open(shard, "w") as target:
        for info in source:
            content = source.extractfile(info).read()  # type: ignore[union-attr]
            if info.name == "train2.png":
                content = b"broken"
                info.size = len(content)
            if info.name == "train5.txt":
                content = "Käse".encode("latin-1")
                info.size = len(content)
            if info.name == "train3.txt":
                content = b" \n"
                info.size = len(content)
            if info.name != "train4.txt" and not info.name.endswith(".json"):
                target.addfile(info, io.BytesIO(content))
    assert good
    with caplog.at_level(logging.WARNING):
        (batch,) = batches(module(f"pipe:cat {shard}"), 1)
    assert "train4 has no caption" in caplog.text
    assert "a.tar: train5 has no caption (UnicodeDecodeError('utf-8'" in caplog.text
    assert "train2" not in batch.key
    assert "train2" in batch.replaced
    assert "train3 has no caption (ValueError('an empty one'))" in caplog.text
    assert set(batch.key) <= {f"train{i}" for i in (0, 1)}
    assert batch.column("image").shape == (8, 3, 16, 16)
