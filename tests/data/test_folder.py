"""A user's own pictures: what goes in, what is refused and why."""

import csv
import io
import json
from pathlib import Path

import pytest
from picture_sets import noise
from PIL import Image

from unclip.data import transforms
from unclip.data.folder import write_folder
from unclip.data.shards import Shards
from unclip.data.transforms import load_image
from unclip.errors import ConfigError, DataError


def put(folder: Path, name: str, content: bytes, caption: str | bytes | None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    src = tmp_path / "src"
    for i in range(12):
        put(src, f"{i:02d}.png", noise(i), f"picture {i}")
    return src


def everything(out: Path) -> dict[str, str]:
    found = {}
    for split in sorted(path.parent for path in out.glob("*/index.json")):
        shards = Shards(split)
        found |= {shards.meta(i)["path"]: shards.caption(i) for i in range(len(shards))}
    return found


def test_pictures_and_captions_come_through_unchanged(pictures: Path, tmp_path: Path) -> None:
    put(pictures, "sub/a.jpg", noise(50, kind="JPEG"), "  a cat\n on a mat ")
    put(pictures, "b.webp", noise(51, kind="WEBP"), "ein Käse".encode("utf-8-sig"))
    report = write_folder(pictures, tmp_path / "out", val=0.3)
    assert not report.refused
    assert sum(report.written.values()) == 14
    assert set(report.written) == {"train", "val"}
    found = everything(tmp_path / "out")
    assert len(found) == 14
    assert found["sub/a.jpg"] == "a cat on a mat"
    assert found["b.webp"] == "ein Käse"
    splits = [Shards(tmp_path / "out" / split) for split in ("train", "val")]
    several = [shards.meta(i).get("captions") for shards in splits for i in range(len(shards))]
    assert [captions for captions in several if captions] == [["a cat", "on a mat"]], "lines are several captions too"
    for split in ("train", "val"):
        shards = Shards(tmp_path / "out" / split)
        for i in range(len(shards)):
            assert shards.image(i) == (pictures / shards.meta(i)["path"]).read_bytes()


def test_links_are_followed_and_broken_ones_named(pictures: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "far.png", noise(70), "far away")
    (pictures / "linked").symlink_to(tmp_path / "elsewhere")
    (pictures / "linked" / "back").symlink_to(pictures)
    (pictures / "gone.png").symlink_to(tmp_path / "nowhere.png")
    report = write_folder(pictures, tmp_path / "out")
    assert report.refused == {"gone.png": "unreadable: No such file or directory"}
    assert everything(tmp_path / "out")["linked/far.png"] == "far away"
    assert len(everything(tmp_path / "out")) == 13


def test_every_refusal_is_reported_with_its_reason(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 10_000)
    whole = noise(60)
    put(pictures, "truncated.png", whole[: len(whole) // 2], "cut")
    put(pictures, "text.jpg", b"this is no picture", "no picture")
    put(pictures, "small.png", noise(61, (48, 31)), "small")
    put(pictures, "empty.png", noise(62), " \n")
    put(pictures, "alone.png", noise(63), None)
    put(pictures, "latin.png", noise(64), "Käse".encode("latin-1"))
    put(pictures, "twice.png", noise(3), "again")
    put(pictures, "bomb.png", noise(65, (200, 200)), "huge")
    report = write_folder(pictures, tmp_path / "out")
    assert {name: reason.split(":")[0] for name, reason in report.refused.items()} == {
        "truncated.png": "not decodable",
        "text.jpg": "not decodable",
        "small.png": "too small",
        "empty.png": "empty caption",
        "alone.png": "no caption",
        "latin.png": "caption not UTF-8",
        "twice.png": "duplicate",
        "bomb.png": "not decodable",
    }
    assert "megapixels" in report.refused["bomb.png"]
    assert "03.png" in report.refused["twice.png"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["refused"] == report.refused
    assert any("refused 3: not decodable" in line for line in report.lines())


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_picture_of_a_hundred_megapixels_is_refused_before_it_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(DataError, match="100 megapixels"):
        load_image(buffer.getvalue())


def test_an_empty_result_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    put(tmp_path / "src", "a.png", b"", "nothing")
    with pytest.raises(DataError, match=r"no usable picture.*not decodable"):
        write_folder(tmp_path / "src", tmp_path / "out")
    assert not list(tmp_path.glob("out/**/*.tar"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        write_folder(tmp_path / "none", tmp_path / "out")
    with pytest.raises(DataError, match="neither a folder nor a table"):
        write_folder(tmp_path / "missing", tmp_path / "out")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_of_path_and_caption(pictures: Path, tmp_path: Path, kind: str) -> None:
    rows = [{"path": f"src/{i:02d}.png", "caption": f'"row", {i}'} for i in range(12)]
    rows.append({"path": "src/gone.png", "caption": "gone"})
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["path", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), table)
    report = write_folder(table, tmp_path / "out", val=0)
    assert report.written == {"train": 12}
    assert list(report.refused) == ["src/gone.png"]
    assert everything(tmp_path / "out")["src/07.png"] == '"row", 7'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"file,caption\na.png,x\n", "row 1: the columns path and caption"),
        ("t.csv", b"path,caption\na.exe,x\n", r"row 1: a\.exe is no"),
        ("t.csv", "path,caption\na.png,Käse\n".encode("latin-1"), "not UTF-8"),
        ("t.jsonl", b'{"path": ', "cannot be read"),
        ("t.jsonl", b"[1]\n", "not an object"),
        ("t.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_bad_tables_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        write_folder(tmp_path / name, tmp_path / "out")


def test_settings_out_of_range_and_a_folder_in_use(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--val"):
        write_folder(pictures, tmp_path / "out", val=1.0)
    with pytest.raises(ConfigError, match="--min-size"):
        write_folder(pictures, tmp_path / "out", min_size=0)
    write_folder(pictures, tmp_path / "out", val=0)
    with pytest.raises(DataError, match="already holds"):
        write_folder(pictures, tmp_path / "out", val=0)
    assert len(Shards(tmp_path / "out" / "train")) == 12
