"""CLIPs described outside of open_clip's registry: folders, and the hub's cache without a network."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import to_plain
from unclip.errors import ArtifactError, ConfigError
from unclip.models.clip import CLIP, CLIPConfig

MODEL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "layers": 2, "heads": 2},
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as open_clip saves it."""
    torch.manual_seed(0)
    path = tmp_path / "model"
    path.mkdir()
    described = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (path / "open_clip_config.json").write_text(json.dumps(described))
    model = open_clip.CLIP(**MODEL)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "open_clip_model.safetensors")
    return path


def imported(name: str) -> CLIP:
    clip = CLIP(CLIPConfig(name=name)).eval()
    clip.fit()
    return clip


@torch.no_grad()
def assert_open_clips_own(clip: CLIP, folder: Path) -> None:
    wanted, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert_close(clip.encode_image(image), wanted.eval().encode_image((image / 255 - mean) / std), atol=1e-5, rtol=1e-4)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red cube", "two"])
    assert torch.equal(clip.tokenize(["a red cube", "two"]), tokens)
    assert_close(clip.encode_text(tokens)[0], wanted.encode_text(tokens), atol=1e-5, rtol=1e-4)
    assert [preprocess.transforms[-1].mean, preprocess.transforms[-1].std] == [MEAN, STD]


def test_a_folder_is_open_clips_own_and_the_artifact_needs_it_no_more(folder: Path, tmp_path: Path) -> None:
    clip = imported(f"local-dir:{folder}")
    assert_open_clips_own(clip, folder)
    artifact.save(tmp_path / "run", clip, Manifest("clip", "clip", to_plain(clip.cfg), to_plain(clip.interface())))
    shutil.rmtree(folder)
    loaded, _ = artifact.load(tmp_path / "run", kind="clip")
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(loaded.encode_image(image), clip.encode_image(image))


def test_the_hubs_cache_serves_without_a_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--someone--tiny-clip" / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_open_clips_own(imported("hf-hub:someone/tiny-clip"), folder)
    with pytest.raises(ArtifactError, match="hf-hub:someone/else is not in the local cache"):
        CLIP(CLIPConfig(name="hf-hub:someone/else"))


def test_what_is_wrong_with_a_folder_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"local-dir:.*nowhere holds none of open_clip_config\.json"):
        CLIP(CLIPConfig(name=f"local-dir:{tmp_path / 'nowhere'}"))
    (folder / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ArtifactError, match="does not hold the weights of local-dir:"):
        imported(f"local-dir:{folder}")
    (folder / "open_clip_config.json").write_text('{"model": 1}')
    with pytest.raises(ArtifactError, match="no model_cfg"):
        CLIP(CLIPConfig(name=f"local-dir:{folder}"))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL | {"custom_text": True}}))
    with pytest.raises(ConfigError, match="has another text tower"):
        CLIP(CLIPConfig(name=f"local-dir:{folder}"))


def test_weights_of_another_shape_or_name_are_refused(folder: Path) -> None:
    model = open_clip.CLIP(**(MODEL | {"embed_dim": 12})).state_dict()
    save_file({k: v.contiguous() for k, v in model.items()}, folder / "open_clip_model.safetensors")
    with pytest.raises(ArtifactError, match="does not hold the weights"):
        imported(f"local-dir:{folder}")
    del model["ln_final.weight"]
    save_file({k: v.contiguous() for k, v in model.items()}, folder / "open_clip_model.safetensors")
    with pytest.raises(ArtifactError, match=r"does not hold the weights"):
        imported(f"local-dir:{folder}")


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small model of open_clip's registry, with plain GELU as its ViT-B-32."""
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    (tmp_path / "tiny-test.json").write_text(json.dumps({k: v for k, v in MODEL.items() if k != "quick_gelu"}))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    return "tiny-test"


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("quick", [None, True])
@torch.no_grad()
def test_a_registry_model_with_a_local_file_is_open_clips_own(
    registered: str, tmp_path: Path, kind: str, quick: bool | None
) -> None:
    wanted = open_clip.create_model(registered, force_quick_gelu=bool(quick)).eval()
    state = {name: value.contiguous() for name, value in wanted.state_dict().items()}
    path = tmp_path / f"weights.{kind}"
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    clip = CLIP(CLIPConfig(name=registered, pretrained=str(path), quick_gelu=quick)).eval()
    clip.fit()
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    pixels = (image / 255 - clip.mean) / clip.std
    assert_close(clip.encode_image(image), wanted.encode_image(pixels), atol=1e-5, rtol=1e-4)
    tokens = open_clip.get_tokenizer(registered)(["a red cube", "two"])
    assert torch.equal(clip.tokenize(["a red cube", "two"]), tokens)
    assert_close(clip.encode_text(tokens)[0], wanted.encode_text(tokens), atol=1e-5, rtol=1e-4)
    other = open_clip.create_model(registered, force_quick_gelu=not quick).eval()
    other.load_state_dict(wanted.state_dict())
    assert (other.encode_image(pixels) - wanted.encode_image(pixels)).abs().max() > 1e-4  # the activation matters


def test_a_registry_model_without_weights_is_open_clips_own_architecture(registered: str) -> None:
    clip = CLIP(CLIPConfig(name=registered))
    shapes = {name: value.shape for name, value in clip.model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in open_clip.create_model(registered).state_dict().items()}
    assert clip.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
