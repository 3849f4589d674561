"""Folders, splits and COCO's format as sources of pictures, and what is wrong with them."""

import io
import re
import shutil
from pathlib import Path

import pytest
from picture_sets import write_coco
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unclip.data.shards import ShardWriter
from unclip.errors import ConfigError, DataError, UnclipError
from unclip.evaluation.sources import Fit, SourceConfig, caption_of, load_pictures, open_source


def picture(side: tuple[int, int], value: int = 100) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", side, (value, 0, 0)).save(content, "PNG")
    return content.getvalue()


def test_a_folder_is_read_by_name_with_captions_beside_or_within(tmp_path: Path):
    info = PngInfo()
    info.add_itxt("Description", "within")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", pnginfo=info)
    (tmp_path / "a.png").write_bytes(picture((8, 8)))
    (tmp_path / "a.txt").write_text("beside\n")
    (tmp_path / "c.png").write_bytes(picture((8, 8)))
    Image.new("RGB", (90, 90)).save(tmp_path / "sheet.png")
    source = open_source(SourceConfig(folder=str(tmp_path)), "drawn")
    assert [source.key(i) for i in range(len(source))] == ["a.png", "b.png", "c.png"], "the sheet is no picture"
    assert [caption_of(source, i) for i in range(2)] == ["beside", "within"]
    with pytest.raises(DataError, match=r"c\.png has no caption, which clip_score and r_precision need"):
        caption_of(source, 2)
    before = source.fingerprint
    (tmp_path / "d.png").write_bytes(picture((8, 8)))
    assert open_source(SourceConfig(folder=str(tmp_path)), "drawn").fingerprint != before


def test_a_folders_fingerprint_is_of_what_is_in_the_files(tmp_path: Path):
    def fingerprint(folder: str) -> str:
        return open_source(SourceConfig(folder=str(tmp_path / folder)), "drawn").fingerprint

    (tmp_path / "one").mkdir()
    first, second = picture((8, 8), 100), picture((8, 8), 101)
    assert len(first) == len(second)
    (tmp_path / "one" / "a.png").write_bytes(first)
    before = fingerprint("one")
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    assert fingerprint("two") == before, "whenever it was written"
    (tmp_path / "two" / "a.png").write_bytes(second)
    assert fingerprint("two") != before
    (tmp_path / "one" / "a.txt").write_text("a caption")
    assert fingerprint("one") != before


def test_part_of_a_split_is_spread_evenly(tmp_path: Path):
    with ShardWriter(tmp_path / "val", shard_size=4) as writer:
        for i in range(10):
            writer.write(f"{i:03d}", picture((8, 8), i), f"caption {i}", {})
    source = open_source(SourceConfig(split=str(tmp_path / "val"), num=5), "real")
    assert [source.captions(i) for i in range(5)] == [[f"caption {i}"] for i in (0, 2, 4, 6, 8)]
    assert load_pictures(source, [1, 4], 8, Fit.same)[:, 0, 0, 0].tolist() == [2, 8]
    whole = open_source(SourceConfig(split=str(tmp_path / "val")), "real")
    assert len(whole) == 10
    assert whole.fingerprint != source.fingerprint


def test_cocos_format(tmp_path: Path):
    write_coco(tmp_path, 6)
    source = open_source(SourceConfig(coco=str(tmp_path)), "real")
    assert len(source) == 6
    assert source.key(0) == "COCO_val2014_000000000003.jpg", "by number, not by place in the file"
    assert len(source.captions(0)) == 5
    assert source.captions(2)[0] == "scene 2, first words"
    pictures = load_pictures(source, range(6), 24, Fit.any)
    assert pictures.shape == (6, 3, 24, 24)
    assert pictures.float().std() > 1


def annotations(folder: Path, content: str) -> Path:
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "captions_val2014.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "say where the real pictures are: real.folder=, real.split= or real.coco="),
        ({"folder": "none"}, "there is no folder"),
        ({"folder": "empty"}, "empty holds no pictures to take as real; give another real source"),
        ({"coco": "none"}, "there is no"),
        ({"coco": "broken"}, "is not in the format of COCO's captions"),
        ({"coco": "void"}, "void/val2014 holds no pictures to take as real"),
        ({"split": "none/val"}, "there is no folder"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, given: dict[str, str], message: str):
    (tmp_path / "empty").mkdir()
    annotations(tmp_path / "broken", '{"images": [{"id": 1}]}')
    annotations(tmp_path / "void", '{"images": [], "annotations": []}')
    cfg = SourceConfig(**{name: str(tmp_path / value) for name, value in given.items()})
    with pytest.raises(UnclipError, match=re.escape(message)):
        open_source(cfg, "real")


def test_one_place_only():
    with pytest.raises(ConfigError, match="give one of folder, split and coco"):
        SourceConfig(folder="a", split="b")
    with pytest.raises(ConfigError, match="num=0 must be at least 1"):
        SourceConfig(folder="a", num=0)


def test_sizes_that_do_not_fit_are_named(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture((16, 16)))
    (tmp_path / "b.png").write_bytes(picture((12, 16)))
    (tmp_path / "c.png").write_bytes(b"no picture")
    source = open_source(SourceConfig(folder=str(tmp_path)), "real")
    assert load_pictures(source, [0, 1], 12, Fit.reduce).shape == (2, 3, 12, 12)
    assert load_pictures(source, [0, 1], 20, Fit.any).shape == (2, 3, 20, 20)
    with pytest.raises(DataError, match=r"b\.png: 12x16 pixels, where drawn ones have 16: set size="):
        load_pictures(source, [0, 1], 16, Fit.same)
    with pytest.raises(DataError, match=r"b\.png: 12x16 pixels would be enlarged to size=16"):
        load_pictures(source, [0, 1], 16, Fit.reduce)
    with pytest.raises(DataError, match=r"c\.png: the picture cannot be decoded"):
        load_pictures(source, [2], 16, Fit.any)


def test_a_picture_that_the_annotations_name_is_missing(tmp_path: Path):
    write_coco(tmp_path, 3)
    source = open_source(SourceConfig(coco=str(tmp_path)), "real")
    (tmp_path / "val2014" / source.key(1)).unlink()
    with pytest.raises(DataError, match="which the annotations name, cannot be read"):
        source.picture(1)
