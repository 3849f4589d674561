"""A CLIP artifact as a folder that open_clip itself loads."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from typer.testing import CliRunner

from unclip import artifact
from unclip.artifact import Manifest
from unclip.cli.app import app
from unclip.config import to_plain
from unclip.errors import ArtifactError, ConfigError
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.contrastive import Contrast

SMALL = {"embed_dim": 16, "image_size": 16, "patch_size": 8, "vision_width": 32, "vision_layers": 1, "vision_heads": 2}
SMALL |= {"text_width": 32, "text_layers": 1, "text_heads": 2, "context_length": 20}


def saved(run: Path, cfg: CLIPConfig) -> CLIP:
    torch.manual_seed(0)
    clip = CLIP(cfg).eval()
    artifact.save(run, clip, Manifest("clip", "clip", to_plain(clip.cfg), to_plain(clip.interface())))
    return clip


def export(*arguments: object):
    return CliRunner().invoke(app, ["export", "open-clip", *(str(a) for a in arguments)])


@pytest.mark.parametrize("options", [{}, {"quick_gelu": True}, {"contrast": Contrast.sigmoid}], ids=str)
@torch.no_grad()
def test_open_clip_loads_the_same_model(options: dict, tmp_path: Path):
    clip = saved(tmp_path / "clip", CLIPConfig(**SMALL, **options))
    result = export(tmp_path / "clip", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert f'open_clip.create_model("local-dir:{tmp_path / "out"}")' in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    theirs.eval()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, clip.model.state_dict()[name]), name
    captions = ["a red cube!", "two cones"]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(captions)
    assert torch.equal(tokens, clip.tokenize(captions))
    torch.testing.assert_close(theirs.encode_text(tokens), clip.encode_text(tokens)[0], atol=1e-5, rtol=0)
    image = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    from torchvision.transforms.functional import to_pil_image

    seen = preprocess(to_pil_image(image[0]))[None]
    torch.testing.assert_close(theirs.encode_image(seen), clip.encode_image(image), atol=1e-5, rtol=0)


def test_what_is_exported_is_imported_again(tmp_path: Path):
    clip = saved(tmp_path / "clip", CLIPConfig(**SMALL))
    assert export(tmp_path / "clip", "--out", tmp_path / "out").exit_code == 0
    result = CliRunner().invoke(
        app, ["import", "clip", f"local-dir:{tmp_path / 'out'}", "--out", str(tmp_path / "again")]
    )
    assert result.exit_code == 0, result.exception
    again, _ = artifact.load(tmp_path / "again", kind="clip")
    for name, value in again.state_dict().items():
        assert torch.equal(value, clip.state_dict()[name]), name


def test_what_is_no_clip_and_what_is_there_is_refused(tmp_path: Path):
    saved(tmp_path / "clip", CLIPConfig(**SMALL))
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"out exists already; remove it or write to another folder"):
        raise export(tmp_path / "clip", "--out", tmp_path / "out").exception
    with pytest.raises(ArtifactError, match=r"none does not exist; give the run folder of a finished stage"):
        raise export(tmp_path / "none", "--out", tmp_path / "new").exception
    manifest = json.loads((tmp_path / "clip/artifact/manifest.json").read_text())
    assert manifest["kind"] == "clip"
    (tmp_path / "clip/artifact/weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match=r"was altered or cut short"):
        raise export(tmp_path / "clip", "--out", tmp_path / "new").exception
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.tmp").exists()
