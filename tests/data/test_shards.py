import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from picture_sets import write_tar
from PIL import Image

from unclip.data.remote import Remote
from unclip.data.shards import Shards, ShardWriter, build_index
from unclip.data.stream import samples_of
from unclip.data.transforms import load_image
from unclip.errors import DataError


def encoded(colour: tuple[int, int, int], size: int = 8, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, kind)
    return buffer.getvalue()


def write(folder: Path, count: int = 7, shard_size: int = 3) -> Path:
    with ShardWriter(folder, shard_size) as writer:
        for i in range(count):
            writer.write(f"k{i}", encoded((i, 0, 0)), f"caption {i} é", {"number": i})
    return folder


def test_samples_come_back_by_number(tmp_path: Path) -> None:
    shards = Shards(write(tmp_path / "train"))
    assert len(shards) == 7
    assert shards.shard_sizes == [3, 3, 1]
    assert shards.keys == [f"k{i}" for i in range(7)]
    for i in (6, 0, 4):
        sample = shards.read(i)
        assert (sample.key, sample.caption, sample.meta) == (f"k{i}", f"caption {i} é", {"number": i})
        assert sample.image == encoded((i, 0, 0))
        assert pickle.loads(pickle.dumps(shards)).read(i) == sample


def test_bytes_are_the_same_every_time_and_webdataset_reads_them(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    names = sorted(path.name for path in one.iterdir())
    assert names == ["00000.tar", "00001.tar", "00002.tar", "index.json"]
    assert [(one / name).read_bytes() for name in names] == [(two / name).read_bytes() for name in names]
    assert Shards(one).fingerprint == Shards(two).fingerprint
    samples = list(webdataset.WebDataset(str(one / "{00000..00002}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == Shards(one).keys
    assert [sample["txt"].decode() for sample in samples] == [f"caption {i} é" for i in range(7)]


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, 2) as writer:
            for key in ("a", "b", "c"):
                writer.write(key, b"x", "c", {})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="got no samples"), ShardWriter(tmp_path):
        pass


def test_a_killed_writer_is_replaced_but_finished_shards_are_not(tmp_path: Path) -> None:
    killed = ShardWriter(tmp_path, 1)
    killed.__enter__()
    for i in range(3):
        killed.write(f"old{i}", b"x", "c", {})
    with pytest.raises(DataError, match="no index"):
        Shards(tmp_path)
    assert Shards(write(tmp_path, count=2)).keys == ["k0", "k1"]
    assert not (tmp_path / "00001.tar").exists()
    with pytest.raises(DataError, match="already holds"):
        write(tmp_path)


@pytest.mark.parametrize("key", ["", "a.b", "k0"])
def test_keys_that_webdataset_would_mix_up_are_refused(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("k0", b"x", "c", {})
        with pytest.raises(DataError, match="the key"):
            writer.write(key, b"x", "c", {})


def test_missing_changed_and_damaged_files_say_which(tmp_path: Path) -> None:
    folder = write(tmp_path / "train")
    with pytest.raises(DataError, match=r"holds the splits \['train'\]"):
        Shards(tmp_path / "tain")
    with (folder / "00001.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"00001\.tar has \d+ bytes but its index says.*unclip data check"):
        Shards(folder)
    (folder / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar is in the index but not on disk"):
        Shards(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Shards(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="neither shards"):
        Shards(empty)


def test_shards_of_others_get_an_index_without_their_bad_samples(tmp_path: Path) -> None:
    webp, jpg = encoded((9, 9, 9), kind="WEBP"), encoded((200, 0, 0), kind="JPEG")
    files = {
        "d/a.webp": webp,
        "d/a.txt": b"one\n",
        "b.json": json.dumps({"caption": "two"}).encode(),
        "b.jpg": jpg,
        "c.txt": b"no picture",
        "e.png": b"not a png",
        "e.txt": b"bad",
        "f.png": encoded((1, 2, 3)),
    }
    write_tar(tmp_path / "x.tar", files)
    report = build_index(tmp_path, check=load_image)
    assert (report.num_shards, report.num_samples) == (1, 2)
    assert {key: reason.split(" (")[0] for key, reason in report.bad.items()} == {
        "c": "no picture",
        "e": "the picture cannot be decoded",
        "f": "no caption",
    }
    shards = Shards(tmp_path)
    assert shards.keys == ["d/a", "b"]
    assert [shards.caption(i) for i in (0, 1)] == ["one", "two"]
    assert (shards.image(0), shards.image(1), shards.meta(0)) == (webp, jpg, {})
    (tmp_path / "y.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"y\.tar is not a complete tar"):
        build_index(tmp_path)


def test_texts_that_cannot_be_read_are_named_with_key_and_shard(tmp_path: Path) -> None:
    png, latin = encoded((1, 2, 3)), "Käse".encode("latin-1")
    write_tar(tmp_path / "train/0.tar", {"a.png": png, "a.txt": b"one", "b.png": png, "b.txt": latin})
    write_tar(tmp_path / "train/1.tar", {"c.png": png, "c.json": latin, "d.png": png, "d.json": b"{"})
    build_index(tmp_path / "train")
    shards = Shards(tmp_path / "train")
    assert shards.caption(0) == "one"
    for sample, message in (
        (1, r"0\.tar: b: the caption is not UTF-8 \(byte 1\); mend it, or .*unclip data check .*, which leaves out"),
        (2, r"1\.tar: c: the metadata is no JSON \(.*position 1.*\); mend it"),
        (3, r"1\.tar: d: the metadata is no JSON \(.*\); mend it"),
    ):
        with pytest.raises(DataError, match=message):
            shards.caption(sample)
        with pytest.raises(DataError, match=message):
            shards.read(sample)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_mode_becomes_rgb() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert load_image(saved(half))[:, 0, 0].tolist() == [255, 127, 127]
    assert load_image(saved(Image.new("LA", (2, 2), (0, 0))))[:, 0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert load_image(saved(palette))[:, 0, 0].tolist() == [10, 20, 30]
    assert load_image(saved(palette, transparency=1))[:, 0, 0].tolist() == [255, 255, 255]
    deep = Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.uint16))
    assert load_image(saved(deep))[:, 0, 0].tolist() == [100, 100, 100]
    cmyk = load_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[:, 0, 0].tolist()
    assert cmyk[0] > 240
    assert max(cmyk[1:]) < 15
    turned = Image.new("RGB", (4, 2), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(saved(turned, "JPEG", exif=exif)).shape == (3, 4, 2)


def test_squares_are_central_and_antialiased() -> None:
    wide = np.zeros((4, 10, 3), np.uint8)
    wide[:, 3:7] = 200
    assert torch.equal(load_image(saved(Image.fromarray(wide)), 4), torch.full((3, 4, 4), 200, dtype=torch.uint8))
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    small = load_image(saved(Image.fromarray(checker.astype(np.uint8))), 8).float()
    assert (small - 127.5).abs().max() < 4
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(saved(Image.fromarray(wide))[:60])


def test_members_whose_path_leaves_the_archive_are_left_out(tmp_path: Path) -> None:
    stems = ("good", "../evil", "/etc/evil", "a/../../evil")
    write_tar(tmp_path / "a.tar", {f"{stem}.{kind}": b"content" for stem in stems for kind in ("png", "txt")})
    report = build_index(tmp_path)
    assert Shards(tmp_path).keys == ["good"]
    assert len(report.bad) == 3
    assert set(report.bad.values()) == {"its path leaves the archive"}


def test_names_that_are_not_utf_8_are_spelt_out(tmp_path: Path) -> None:
    latin = "caf\udce9"  # as tarfile reads and writes b"caf\xe9"
    content = {"png": encoded((1, 2, 3)), "txt": b"coffee"}
    write_tar(tmp_path / "a.tar", {f"{latin}.{kind}": member for kind, member in content.items()})
    assert b"caf\xe9.png" in (tmp_path / "a.tar").read_bytes()
    assert not build_index(tmp_path).bad
    (sample,) = Shards(tmp_path).spread(1)
    assert (sample.key, sample.caption) == (r"caf\udce9", "coffee")
    (streamed,) = samples_of(str(tmp_path / "a.tar"), Remote(0.0))
    assert (streamed.key, streamed.caption, streamed.image) == (sample.key, sample.caption, sample.image)
