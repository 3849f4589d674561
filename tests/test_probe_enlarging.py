"""``unclip enlarge-probe``: known answers for enlargements that are known, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_chain import write_tiny_chain
from torch import Tensor
from typer.testing import CliRunner

from unclip.cli.app import app
from unclip.data.shapes import write_shapes
from unclip.errors import ArtifactError, ConfigError, DataError
from unclip.models.pictures import resize
from unclip.models.sampling import UpsamplerSampling
from unclip.models.upsampler import Upsampler


class Pixels:
    """In place of EfficientNet, which would take half a minute here: small grey pictures."""

    def __init__(self, device: str) -> None:
        assert device in ("cpu", "cuda")

    def __call__(self, pictures: Tensor) -> Tensor:
        return resize(pictures.float() / 255, 4).mean(1).flatten(1)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.float() - b.float()).abs().flatten(1).mean(1) / 255


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs, whose upsampler makes 32 px of 16, and shapes of 32 and of 16 px."""
    root = tmp_path_factory.mktemp("enlarging")
    write_tiny_chain(root / "runs")
    write_shapes(root / "data", num=12, size=32, workers=1)
    write_shapes(root / "small", num=12, size=16, workers=1)
    return root


def probe(
    place: Path, *options: str, data: str = "data/train", upsampler: str = "runs/upsampler", out: str = "probes"
) -> dict[str, Any]:
    given = ["enlarge-probe", "--upsampler", str(place / upsampler), "--data", str(place / data), "--num", "10"]
    result = CliRunner().invoke(app, [*given, "--out", str(place / out), "--batch-size", "4", *options])
    if result.exception is not None:
        raise result.exception
    return json.loads((place / out / "enlarging.json").read_text())


def test_the_rows_are_what_is_known_of_each_way(place: Path, monkeypatch: pytest.MonkeyPatch):
    """An upsampler that enlarges bicubically is as good as bicubic enlargement; an untrained one is worse than all."""
    monkeypatch.setattr("unclip.cli.probe_enlarging.PictureFeatures", Pixels)
    rows = probe(place)["rows"]
    assert list(rows) == ["upsampler", "bicubic", "Lanczos"]
    assert rows["upsampler"]["PSNR"] < 15 < 20 < rows["bicubic"]["PSNR"] < 60
    assert rows["bicubic"]["PSNR"] == pytest.approx(rows["Lanczos"]["PSNR"], abs=1.5)
    assert rows["upsampler"]["distance"] > 3 * rows["bicubic"]["distance"] > 0
    assert rows["upsampler"]["KID"] > rows["bicubic"]["KID"]

    def bicubic(self: Upsampler, low: Tensor, *_: Any, **__: Any) -> Tensor:
        return resize(low, 32)

    monkeypatch.setattr(Upsampler, "sample", bicubic)
    found = probe(place, out="bicubic")
    for name, value in found["rows"]["bicubic"].items():
        assert found["rows"]["upsampler"][name] == pytest.approx(value, rel=0.02, abs=1e-3), name
    assert found["facts"]["from"] == 16
    assert found["facts"]["to"] == 32
    assert found["facts"]["pictures"] == 10
    with Image.open(place / "bicubic" / "enlarging.png") as sheet:
        assert sheet.width > 5 * 160


def test_tiles_have_a_row_and_borders(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Tiles of 16 px that overlap by 4 have edges at 12, 16 and 28 of 32 px: with a step at 16 the mean gradient there is 5/3 of
    a ramp's."""
    monkeypatch.setattr("unclip.cli.probe_enlarging.PictureFeatures", Pixels)

    def drawn(self: Upsampler, low: Tensor, how: UpsamplerSampling, *_: Any, **__: Any) -> Tensor:
        grey = 4 * torch.arange(32) + (0 if how.tile is None else 8 * (torch.arange(32) >= 16))
        assert how.tile is None or (how.tile, how.tile_overlap) == (16, 4)
        return (grey / 127.5 - 1).expand(len(low), 3, 32, 32)

    monkeypatch.setattr(Upsampler, "sample", drawn)
    rows = probe(place, "--tile", "16", out="tiles")["rows"]
    assert list(rows) == ["upsampler", "in tiles", "bicubic", "Lanczos", "the picture"]
    assert rows["upsampler"]["borders"] == pytest.approx(1)
    assert rows["in tiles"]["borders"] == pytest.approx(5 / 3)
    assert list(rows["the picture"]) == ["borders"]


def test_what_cannot_be_compared_is_refused(place: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"of .*small/train is 16 px and the upsampler makes 32: give larger pictures"):
        probe(place, data="small/train", out="x")
    write_shapes(tmp_path / "few", num=1, size=32, workers=1)
    with pytest.raises(DataError, match="has 1 samples; at least 4 are needed"):
        probe(place, data=str(tmp_path / "few" / "train"), out="x")
    with pytest.raises(ArtifactError, match="decoder"):
        probe(place, upsampler="runs/decoder", out="x")
    with pytest.raises(ConfigError, match="--tile 32 is not smaller than the upsampler's pictures of 32 px"):
        probe(place, "--tile", "32", out="x")
    assert not (place / "x").exists()
