"""Nets from local files: what a missing or wrong file is told, and that a right one is read."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from unclip.errors import ConfigError
from unclip.evaluation.extractors import open_extractor
from unclip.evaluation.features import PictureFeatures

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dinov2", "fetch https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"),
        ("inception", "fetch https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015"),
    ],
)
def test_a_missing_weights_file_is_told_with_its_source(tmp_path: Path, name: str, source: str):
    with pytest.raises(ConfigError, match=re.escape(f"features holds {name}, but {name}=FILE is not set: {source}")):
        open_extractor(name, None, CPU)
    path = tmp_path / "weights.pth"
    with pytest.raises(ConfigError, match=re.escape(f"there is no file {name}={path}: {source}")):
        open_extractor(name, str(path), CPU)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ConfigError, match=re.escape(f"{name}={path} cannot be read as weights")):
        open_extractor(name, str(path), CPU)
    torch.save({"other": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=re.escape(f"{name}={path} does not hold")):
        open_extractor(name, str(path), CPU)


def test_dinov2_gives_timms_class_token_from_timms_and_the_authors_file(tmp_path: Path):
    import timm

    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("gamma"):
                weight.fill_(1.0)  # 1e-5 as made, by which no picture would show in the class token
    torch.save(net.state_dict(), tmp_path / "timm.pth")
    torch.save(net.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "meta.pth")
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = pictures.repeat_interleave(14, 2).repeat_interleave(14, 3)
    found = open_extractor("dinov2", str(tmp_path / "timm.pth"), CPU)
    assert (found.name, found.width) == ("dinov2", 384)
    rows = found(pictures)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((pictures.permute(0, 2, 3, 1) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted, plain = (net.forward_features(x)[:, 0] for x in (normalised, pictures / 255))
    torch.testing.assert_close(rows, wanted, atol=2e-3, rtol=0)
    for other in (wanted.flip(0), plain):
        assert (rows - other).abs().mean() > 0.02, "another picture, or one that is not normalised, gives others"
    torch.testing.assert_close(open_extractor("dinov2", str(tmp_path / "meta.pth"), CPU)(pictures), rows)
    assert found.hash != open_extractor("dinov2", str(tmp_path / "meta.pth"), CPU).hash


def test_perceptual_distance_is_the_formula_on_the_nets_maps():
    """Zhang et al. 2018, eq. 1, with equal weights, on what the last blocks at 1/2 to 1/32 of the side put out."""
    net, maps = PictureFeatures("cpu"), []
    for block in (0, 2, 4, 10, 15):
        net.net._blocks[block].register_forward_hook(lambda block, given, out: maps.append(out.double().numpy()))
    pictures = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net(pictures)
    assert [found.shape[-1] for found in maps] == [112, 56, 28, 14, 7]
    depths = []
    for found in maps:
        unit = found / np.sqrt((found**2).sum(axis=1, keepdims=True))
        depths.append(((unit[:2] - unit[2:]) ** 2).sum(axis=1).mean(axis=(1, 2)))
    wanted = torch.from_numpy(np.mean(depths, axis=0)).float()
    assert (wanted > 0.01).all()
    torch.testing.assert_close(net.distance(pictures[:2], pictures[2:]), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_inception_gives_what_torch_fidelity_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    monkeypatch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    net = theirs.FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    monkeypatch.undo()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = open_extractor("inception", str(tmp_path / "weights.pth"), CPU)
    assert found.width == 2048
    torch.testing.assert_close(found(pictures), net(pictures)[0])


def test_perceptual_distance_orders_pictures_as_one_would():
    net = PictureFeatures("cpu")
    generator = torch.Generator().manual_seed(0)
    scene = torch.zeros(1, 3, 48, 48)
    scene[:, 0, 10:30, 8:28], scene[:, 2, 25:40, 20:44] = 220, 180
    noisy = (scene + 6 * torch.randn(scene.shape, generator=generator)).clamp(0, 255)
    other = scene.flip(3).roll(1, 1)
    a, b, c = (x.to(torch.uint8) for x in (scene, noisy, other))
    assert net.distance(a, a).tolist() == [0.0]
    assert 0 < float(net.distance(a, b)) < float(net.distance(a, c)) < 4
    torch.testing.assert_close(net.distance(a, c), net.distance(c, a))
    torch.testing.assert_close(
        net.distance(torch.cat([a, b]), torch.cat([c, a]))[:1], net.distance(a, c), atol=1e-4, rtol=1e-3
    )
