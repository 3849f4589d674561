"""Shards behind URLs and from commands: the same batches as from a folder, and clear errors where that cannot be."""

import itertools
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from shard_server import Server, serving

from unclip.data import files
from unclip.data.batch import Batch
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.places import place_of
from unclip.data.remote import RemoteConfig
from unclip.data.shards import Shards
from unclip.errors import ConfigError, DataError

IMPATIENT = RemoteConfig(retry_seconds=0.4)


@pytest.fixture
def server(data: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(data, tmp_path / "served")
    with serving(tmp_path / "served") as found:
        yield found


def module(cfg: DataConfig, start: int = 0, rank: int = 0, world_size: int = 1) -> UnclipData:
    found = UnclipData(cfg, 5, 8, ("image",))
    found.rank, found.world_size = rank, world_size
    found.set_start(start)
    return found


def batches(cfg: DataConfig, count: int, start: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
    return list(itertools.islice(module(cfg, start, rank, world_size).train_dataloader(), count))


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return all(
        (a.key, a.position, a.caption) == (b.key, b.position, b.caption)
        and torch.equal(a.column("image"), b.column("image"))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_an_url_gives_the_batches_of_the_folder(
    data: Path, server: Server, tmp_path: Path, cached: bool, num_workers: int
) -> None:
    cache = str(tmp_path / "cache") if cached else None
    cfg = DataConfig(server.url, num_workers=num_workers, cache_dir=cache)
    here = DataConfig(str(data), num_workers=num_workers)
    assert same(batches(cfg, 4, 1), batches(here, 4, 1))  # crosses an epoch of 20 samples
    assert module(cfg).fingerprint == module(DataConfig(str(data))).fingerprint
    if cached:
        kept = sorted(path.stem for path in (tmp_path / "cache").glob("*.tar"))
        assert kept == sorted(Shards(data / "train").sha256)
        asked = len(server.asked)
        assert same(batches(cfg, 4, 1), batches(here, 4, 1))
        assert [path for path in server.asked[asked:] if "index.json" not in path] == []


def test_shards_are_named_by_braces_or_a_list(data: Path, server: Server) -> None:
    expected = batches(DataConfig(str(data)), 3)
    braces = "/train/{00000..00003}.tar"
    listed = [f"{server.url}/train/0000{i}.tar" for i in range(4)]
    for path in (f"{data}{braces}", f"{server.url}{braces}", listed):
        assert same(batches(DataConfig(path, val_split=None), 3), expected)
    some = batches(DataConfig(listed[1:2], val_split=None), 3)
    assert {key for batch in some for key in batch.key} == {f"train{i}" for i in range(6, 12)}
    assert place_of("s3://bucket/data/", "train") == "s3://bucket/data/train"
    assert place_of("pipe:cat {0,1}.tar", "train") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    with pytest.raises(ConfigError, match=r"lists 'folder', which is no shard .* data\.others"):
        place_of(["a.tar", "folder"], "train")
    with pytest.raises(ConfigError, match=r"data\.val_path=…, or switch validation off"):
        module(DataConfig(listed)).val_dataloader()
    val = next(iter(module(DataConfig(listed, val_path=str(data))).val_dataloader()))
    assert val.key[0].startswith("val")


def test_the_cache_stays_within_its_bound_and_fetches_again(
    data: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Shards(data / "train")
    sizes = [shard.stat().st_size for shard in sorted((data / "train").glob("*.tar"))]
    monkeypatch.setattr("unclip.data.shards.BLOCK_SHARDS", 1)
    limit = sizes[0] + sizes[1] + 100
    shards = Shards(f"{server.url}/train", RemoteConfig(str(tmp_path / "cache"), limit / 1e9))
    for i in [*range(20), 0, 19]:
        assert shards.read(i) == local.read(i)
        shards.close()
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.t*")) <= limit
    fetched = [path for path in server.asked if path == "/train/00000.tar"]
    assert len(fetched) == 2, "shard 0 had to go, and came back"
    for i in range(20):  # without being closed
        assert shards.read(i) == local.read(i)
    held = list(shards.files._files.values())  # type: ignore[union-attr]
    assert held
    assert all(os.fstat(file).st_nlink for file in held), "a removed one that is open still fills the disk"
    with pytest.raises(ConfigError, match=r"data\.cache_gb=1e-06 is too little: the order reads 1 shards"):
        Shards(f"{server.url}/train", RemoteConfig(str(tmp_path / "cache"), 1e-6))


@pytest.mark.parametrize("cached", [False, True])
def test_reads_wait_for_a_server_that_is_away(
    data: Path, server: Server, tmp_path: Path, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = str(tmp_path / "cache") if cached else None
    expected = batches(DataConfig(str(data)), 4)
    stream = iter(module(DataConfig(server.url, cache_dir=cache, retry_seconds=20)).train_dataloader())
    with caplog.at_level(logging.WARNING):
        server.failures = 20
        found = [next(stream) for _ in range(4)]
    assert same(found, expected)
    assert server.failures <= 0
    assert re.search(
        r"waiting for http://\S+ \(.*503.*\): next try in 0\.\d s, 0 of at most 20 s are over", caplog.text
    )
    del stream  # its thread would wait, too
    server.failures = 10**6
    with pytest.raises(
        DataError, match=r"could not be read for .*is the address right and the server up\? data\.retry_sec"
    ):
        Shards(f"{server.url}/train", IMPATIENT)


def test_unreachable_hosts_unknown_schemes_and_refusals_are_told_apart(server: Server) -> None:
    with pytest.raises(DataError, match=r"could not be read for 0 s \(ClientConnectorDNSError|\(ClientConnector"):
        Shards("http://no.such.host.invalid/data/train", IMPATIENT)
    with pytest.raises(DataError, match=r"could not be read for .*127\.0\.0\.1:9"):
        Shards("http://127.0.0.1:9/data/train", IMPATIENT)
    with pytest.raises(DataError, match=r"nothing here reads foo://; known are local paths"):
        Shards("foo://bucket/train", IMPATIENT)
    with pytest.raises(DataError, match=r"there is no http://\S+/trian/index\.json; write it with `unclip data check`"):
        Shards(f"{server.url}/trian", IMPATIENT)
    server.status, server.failures = 403, 1
    with pytest.raises(DataError, match=r"index\.json may not be read \(.*403.*check the credentials"):
        Shards(f"{server.url}/train", IMPATIENT)
    server.status, server.failures = 400, 1
    with pytest.raises(DataError, match=r"cannot be read \(.*400"):
        Shards(f"{server.url}/train", IMPATIENT)


def test_threads_keep_what_each_fetched_ahead(server: Server) -> None:
    shards = Shards(f"{server.url}/train", RemoteConfig())
    wanted = {i: shards.read(i) for i in (0, 1, 7, 8)}
    with ThreadPoolExecutor(1) as other:
        other.submit(shards.prepare, [0, 1]).result()
        shards.prepare([7, 8])
        shards.prepare([7, 8])  # as for a second size of the same pictures
        asked = len(server.asked)
        assert [other.submit(shards.image, i).result() for i in (0, 1)] == [wanted[i].image for i in (0, 1)]
        assert [shards.image(i) for i in (7, 8)] == [wanted[i].image for i in (7, 8)]
        again = pickle.loads(pickle.dumps(shards))
        assert len(server.asked) == asked
        assert again.image(7) == wanted[7].image
        assert len(server.asked) > asked


@pytest.mark.parametrize("cached", [False, True])
def test_missing_and_changed_shards_of_an_url_are_named(server: Server, tmp_path: Path, cached: bool) -> None:
    remote = RemoteConfig(str(tmp_path / "cache") if cached else None, retry_seconds=0.4)
    shards, middle = Shards(f"{server.url}/train", remote), server.folder / "train/00001.tar"
    content = middle.read_bytes()
    middle.write_bytes(content + b"x" * 512 if not cached else content[:-1] + b"x")
    match = "not the file that its index describes" if cached else r"has \d+ bytes but its index says \d+"
    with pytest.raises(DataError, match=rf"/train/00001\.tar .*{match}.*upload shards and index again"):
        shards.read(7)
    assert not list(tmp_path.glob("cache/*.tar"))
    assert not list(tmp_path.glob("cache/*.tmp"))
    middle.unlink()
    assert shards.read(0).key == "train0"
    with pytest.raises(DataError, match=r"there is no http://\S+/train/00001\.tar; fetch or upload it again"):
        shards.read(7)


def test_a_shard_that_changes_between_epochs_stops_the_run(
    data: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOOK_AGAIN", 0.0)
    shards = Shards(f"{server.url}/train", IMPATIENT)
    first = shards.read(0)
    assert shards.read(0) == first
    server.tags["/train/00000.tar"] = '"two"'
    with pytest.raises(DataError, match=r"00000\.tar was changed while a run read it, so its order cannot be kept"):
        shards.read(0)
    local = Shards(server.folder / "train")
    assert local.read(0) == first
    with (server.folder / "train/00000.tar").open("r+b") as file:
        file.write(b"another")
    with pytest.raises(DataError, match=r"00000\.tar was changed while a run read it"):
        local.read(0)


def test_a_server_without_ranges_still_gives_the_right_bytes(data: Path, server: Server, tmp_path: Path) -> None:
    server.ranges = False
    for remote in (RemoteConfig(), RemoteConfig(str(tmp_path / "cache"))):
        assert Shards(f"{server.url}/train", remote).read(9) == Shards(data / "train").read(9)
