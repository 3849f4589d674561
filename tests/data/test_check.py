"""What `unclip data check` says of any webdataset, and what it leaves out of an index."""

import json
from pathlib import Path

import pytest
from picture_sets import noise, write_tar
from typer.testing import CliRunner

from unclip.cli.app import app
from unclip.data import transforms
from unclip.data.check import check_data
from unclip.data.folder import write_folder
from unclip.data.shards import Shards
from unclip.errors import ConfigError, DataError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A data set of twelve pictures, as `unclip data folder` writes it."""
    src = tmp_path / "src"
    src.mkdir()
    for i in range(12):
        (src / f"{i:02d}.png").write_bytes(noise(i))
        (src / f"{i:02d}.txt").write_text(f"picture {i}")
    write_folder(src, tmp_path / "out", val=0.3)
    return tmp_path / "out"


def pairs(**captions: bytes) -> dict[str, bytes]:
    """Members KEY.png, each another picture, and KEY.txt."""
    files: dict[str, bytes] = {}
    for key, caption in captions.items():
        files |= {f"{key}.png": noise(sum(key.encode())), f"{key}.txt": caption}
    return files


def test_it_verifies_an_index_and_writes_a_missing_one(written: Path) -> None:
    report = check_data(written)
    assert report.good
    assert report.index == {"train": "verified", "val": "verified"}
    assert sum(report.samples.values()) == 12
    index = written / "train" / "index.json"
    content = index.read_bytes()
    index.unlink()
    assert check_data(written / "train").index == {"train": "written"}
    assert index.read_bytes() == content


def test_every_bad_sample_is_reported_with_its_reason_and_leaves_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 10_000)
    whole = noise(60)
    files = {
        **pairs(good=b"a caption", twin=b"x", latin="K\u00e4se".encode("latin-1"), empty=b" \n", alone=b"x"),
        **{"cut.png": whole[: len(whole) // 2], "cut.txt": b"cut"},
        **{"text.jpg": b"this is no picture", "text.txt": b"no picture"},
        **{"gif.png": noise(61, kind="GIF"), "gif.txt": b"another format"},
        **{"small.png": noise(62, (48, 31)), "small.txt": b"small"},
        **{"bomb.png": noise(63, (200, 200)), "bomb.txt": b"huge"},
        **{"quiet.txt": b"no picture"},
        **{"list.png": noise(64), "list.json": b"[]"},
        **{"torn.png": noise(65), "torn.json": b"{"},
        **{"byte.png": noise(66), "byte.json": b"\xff"},
        **{"null.png": noise(67), "null.json": b'{"caption": null}'},
        **{"half.png": noise(68), "half.json": b'{"caption": "\\ud83d"}'},
        **{"meta.png": noise(69), "meta.json": b'{"caption": "fine"}'},
        **pairs(broken=b"with damaged metadata", single=b"whose metadata is a list", mark="\ufeffwith a mark".encode()),
        **{"broken.json": b"{", "single.json": b"[]"},
    }
    del files["alone.txt"]
    write_tar(tmp_path / "train/a.tar", files)
    write_tar(tmp_path / "val/b.tar", {"again.png": files["good.png"], "again.txt": b"x", **pairs(other=b"y")})
    report = check_data(tmp_path)
    reasons = {name.rsplit(": ", 1)[-1]: reason for name, reason in report.bad.items()}
    assert {key: reason.split(":")[0] for key, reason in reasons.items()} == {
        "latin": "caption not UTF-8",
        "empty": "empty caption",
        "alone": "no caption",
        "cut": "not decodable",
        "text": "not decodable",
        "gif": "not decodable",
        "small": "too small",
        "bomb": "not decodable",
        "quiet": "no picture",
        "list": "no caption",
        "torn": "no caption",
        "byte": "caption not UTF-8",
        "null": "empty caption",
        "half": "caption not Unicode",
        "again": "duplicate",
        "broken": "bad metadata",
        "single": "bad metadata",
    }
    assert "megapixels" in reasons["bomb"]
    assert reasons["small"] == "too small: 48 x 31 pixels"
    assert reasons["latin"] == "caption not UTF-8: byte 1"
    assert reasons["again"] == f"duplicate: the same bytes as {tmp_path}/train/a.tar: good"
    assert not report.good
    assert report.samples == {"train": 4, "val": 1}
    assert report.index == {"train": "written", "val": "written"}
    assert json.loads((tmp_path / "report.json").read_text()) == vars(report)
    train = Shards(tmp_path / "train")
    assert (train.keys, Shards(tmp_path / "val").keys) == (["good", "twin", "meta", "mark"], ["other"])
    assert train.caption(3) == "with a mark"


def test_the_shorter_side_is_a_setting(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/a.tar", {"a.png": noise(1, (16, 20)), "a.txt": b"x"})
    assert check_data(tmp_path).index == {"train": "not written: no good sample"}
    assert check_data(tmp_path, min_size=16).good
    with pytest.raises(ConfigError, match="--min-size is 0"):
        check_data(tmp_path, min_size=0)


def test_a_cut_shard_is_reported_and_the_others_are_checked_all_the_same(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/0.tar", pairs(a=b"x", b=b"x"))
    write_tar(tmp_path / "train/1.tar", pairs(c=b"x", d=b" "))
    write_tar(tmp_path / "val/2.tar", pairs(e=b"x"))
    cut = tmp_path / "train/0.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 1
    assert "train: 1 good samples, index not written: 0.tar cannot be read; fetch or make it again" in result.output
    assert "val: 1 good samples, index written" in result.output
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["bad"].pop(f"{tmp_path}/train/1.tar: d") == "empty caption"
    assert list(said["bad"]) == [str(cut)]
    assert said["bad"][str(cut)].startswith(f"truncated: {cut} is not a complete tar file")
    assert not (tmp_path / "train/index.json").exists()


def test_a_shard_cut_between_two_members_or_damaged_at_one_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / "train/0.tar"
    write_tar(path, pairs(a=b"x", b=b"y"))
    content = path.read_bytes()
    second = content.index(b"b.png")  # where the header of the third member begins
    for damaged in (content[:second], content[:second] + b"?" + content[second + 1 :]):
        path.write_bytes(damaged)
        report = check_data(tmp_path)
        assert list(report.bad) == [str(path)]
        assert f"at byte {second} stands neither a member nor the archive's end" in report.bad[str(path)]


def test_a_shard_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/0.tar", pairs(a=b"x"))
    (tmp_path / "train/1.tar").symlink_to(tmp_path / "gone.tar")
    report = check_data(tmp_path)
    assert report.bad == {f"{tmp_path}/train/1.tar": "unreadable: No such file or directory"}
    assert report.index == {"train": "not written: 1.tar cannot be read; fetch or make it again"}


def test_it_notices_an_altered_and_a_cut_shard_of_an_index(written: Path) -> None:
    shard = next((written / "train").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    place = content.index(b"picture 5")
    content[place : place + 9] = b"picture 6"
    shard.write_bytes(content)
    assert check_data(written).index["train"].startswith(f"differs from {shard.name}; delete")
    shard.write_bytes(content[: len(content) // 2])
    report = check_data(written)
    assert not report.good
    assert report.index == {
        "train": f"not verified: {shard.name} cannot be read; fetch or make it again",
        "val": "verified",
    }


def test_its_report_stands_beside_what_was_refused_when_the_data_were_made(written: Path) -> None:
    report = written / "report.json"
    made = json.loads(report.read_text())
    check_data(written)
    assert json.loads(report.read_text()) == made | vars(check_data(written))
    with pytest.raises(DataError, match=r"no \*\.tar"):
        check_data(written.parent / "src")
