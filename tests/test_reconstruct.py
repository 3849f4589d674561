"""``unclip reconstruct`` with a decoder whose every picture is known: the exact denoiser of unit Gaussian data."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_chain import write_tiny_chain
from typer.testing import CliRunner

from unclip import artifact
from unclip.cli.app import app
from unclip.cli.reconstruct import psnr
from unclip.data.shards import ShardWriter

SIZE, NUM = 16, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs, whose decoder answers v = 0, and data/val with pictures of 4 x 4 grey squares."""
    root = tmp_path_factory.mktemp("reconstruct")
    write_tiny_chain(root / "runs")
    decoder, manifest = artifact.load(root / "runs" / "decoder")
    with torch.no_grad():
        for p in decoder.parameters():
            p.zero_()
    artifact.save(root / "runs" / "decoder", decoder, manifest)
    squares = np.random.default_rng(0).integers(0, 256, (NUM, 4, 4, 3), dtype=np.uint8)
    with ShardWriter(root / "data" / "val") as writer:
        for i, picture in enumerate(squares.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2)):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            writer.write(f"picture{i}", file.getvalue(), "squares", {})
    return root


def psnrs(place: Path, steps: str, *more: str) -> dict[str, dict[str, float]]:
    given = ["reconstruct", "--from", str(place / "runs"), "--data", str(place / "data"), "--steps", steps, *more]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["psnr_by_steps"]


def test_an_inverted_latent_gives_the_picture_back_and_a_random_one_does_not(place: Path):
    """More so with more steps, and with several evaluations a step backwards."""
    once, thrice = psnrs(place, "5,10,25,50"), psnrs(place, "5,10,25,50", "--refinements", "3")
    assert once["50"]["inverted"] >= 45
    assert once["50"]["random"] <= 10
    for found in (once, thrice):
        inverted = [found[steps]["inverted"] for steps in ("5", "10", "25", "50")]
        assert inverted == sorted(inverted)
    assert all(thrice[steps]["inverted"] > once[steps]["inverted"] + 3 for steps in once)


def test_psnr_of_known_errors():
    true = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert psnr(true, [torch.full((3, 4, 4), 255, dtype=torch.uint8)] * 2) == pytest.approx(0)
    assert psnr(true, [torch.full((3, 4, 4), 51, dtype=torch.uint8)] * 2) == pytest.approx(13.979, abs=1e-3)
