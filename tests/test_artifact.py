"""An artifact is what was saved, bit for bit, or an error that names the folder."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tests_support import Canary
from torch import nn

from unclip import artifact
from unclip.artifact import Manifest
from unclip.config import to_plain
from unclip.errors import ArtifactError
from unclip.models.interface import Interface
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.nets.unet import UNetConfig

CONFIG = UpsamplerConfig(
    low_size=8, image_size=16, crop_fraction=0.5, net=UNetConfig(channels=[8], num_blocks=1, groups=4)
)


def make_model(seed: int = 0) -> Upsampler:
    torch.manual_seed(seed)
    model = Upsampler(CONFIG, Interface())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def make_manifest(step: int = 7) -> Manifest:
    return Manifest("upsampler", "upsampler", to_plain(CONFIG), to_plain(Interface()), step=step, metrics={"mse": 0.5})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    artifact.save(tmp_path / "run", make_model(), make_manifest())
    return tmp_path / "run"


def write_manifest(run: Path, sign: bool = True, **changes) -> None:
    """Change fields of the manifest; ``sign`` makes hash and weights agree with it, as somebody malicious would."""
    path = run / "artifact" / "manifest.json"
    manifest = Manifest(**{**json.loads(path.read_text()), **changes})
    if sign:
        manifest.weights_sha256 = artifact._sha256(run / "artifact" / "weights.safetensors")
        manifest.hash = artifact.content_hash(manifest)
    path.write_text(json.dumps(asdict(manifest)))


def test_what_is_loaded_is_what_was_saved(run: Path):
    model, manifest = artifact.load(run, kind="upsampler")
    saved = make_model().state_dict()
    assert list(model.state_dict()) == list(saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert (manifest.step, manifest.metrics, manifest.config) == (7, {"mse": 0.5}, to_plain(CONFIG))
    assert isinstance(model, Upsampler)
    assert model.cfg == CONFIG
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert artifact.load(run / "artifact-00000007")[1] == manifest, "the artifact folder itself will do as well"


def test_loading_draws_no_initial_weights(run: Path):
    before = torch.get_rng_state()
    artifact.load(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_link_moves_to_the_newest(run: Path):
    assert (run / "artifact").readlink() == Path("artifact-00000007")
    artifact.save(run, make_model(1), make_manifest(step=9))
    assert (run / "artifact").readlink() == Path("artifact-00000009"), "relative: the run folder can be moved"
    assert sorted(p.name for p in run.iterdir()) == ["artifact", "artifact-00000009"]
    moved = run.rename(run.with_name("moved"))
    weights = artifact.load(moved)[0].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in make_model(1).state_dict().items())


@pytest.mark.parametrize("step", [7, 9])
@pytest.mark.parametrize("function", ["content_hash", "sync", "write_tensors"])
def test_a_failure_while_saving_leaves_the_old_one_alone(run: Path, monkeypatch, function: str, step: int):
    def fail(*_):
        raise OSError("No space left on device")

    before = artifact.read_manifest(run)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, function, fail)
        with pytest.raises(OSError, match="No space left"):
            artifact.save(run, make_model(1), make_manifest(step))
    assert sorted(p.name for p in run.iterdir()) == ["artifact", "artifact-00000007"]
    assert artifact.load(run)[1] == before


def cut_short(run: Path) -> None:
    weights = run / "artifact" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def alter_one_byte(run: Path) -> None:
    weights = run / "artifact" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))


DAMAGE = {
    "weights cut short": (cut_short, "was altered or cut short"),
    "one byte altered": (alter_one_byte, "was altered or cut short"),
    "other config": (lambda run: write_manifest(run, sign=False, config={}), "altered after it was written"),
    "other CLIP": (lambda run: write_manifest(run, sign=False, parents={"clip": "x"}), "altered after it was written"),
    "manifest cut short": (lambda run: (run / "artifact/manifest.json").write_text('{"kind": "ups'), "is damaged"),
    "manifest is a list": (lambda run: (run / "artifact/manifest.json").write_text("[1]"), "is damaged"),
    "no weights": (lambda run: (run / "artifact/weights.safetensors").unlink(), "is missing; copy the whole"),
    "no manifest": (lambda run: (run / "artifact/manifest.json").unlink(), "holds no artifact"),
    "newer format": (
        lambda run: write_manifest(run, format=99),
        "has format 99; this unclip .* reads up to 1: upgrade",
    ),
    "unknown model": (lambda run: write_manifest(run, model="gan"), "holds a 'gan'; this unclip .* knows clip, "),
    "unknown setting": (lambda run: write_manifest(run, config={"low_sise": 8}), "'low_sise'; did you mean 'low_size'"),
    "weights of another net": (
        lambda run: write_manifest(run, config=to_plain(replace(CONFIG, net=UNetConfig(channels=[16], groups=4)))),
        "does not fit the model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(run: Path, damage: str):
    break_it, message = DAMAGE[damage]
    break_it(run)
    with pytest.raises(ArtifactError, match=message) as error:
        artifact.load(run)
    assert str(run) in str(error.value)


def test_a_newer_manifest_with_fields_of_its_own_asks_for_an_upgrade(run: Path):
    path = run / "artifact" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2, "sharding": "x"}))
    with pytest.raises(ArtifactError, match=r"has format 2; .* upgrade it"):
        artifact.read_manifest(run)


def test_wrong_kind_and_wrong_folder_are_named(run: Path):
    with pytest.raises(ArtifactError, match=f"{run}/artifact is a upsampler artifact where a prior is needed"):
        artifact.load(run, kind="prior")
    with pytest.raises(ArtifactError, match=f"{run}/nowhere does not exist"):
        artifact.load(run / "nowhere")


def test_the_hash_covers_what_gives_meaning_and_no_metrics(tmp_path: Path):
    def saved(seed: int = 0, **changes) -> str:
        manifest = replace(make_manifest(), **changes)
        artifact.save(tmp_path / "run", make_model(seed), manifest)
        return manifest.hash

    first = saved()
    assert saved(metrics={"mse": 0.1}, step=8, data="d", settings={"seed": 1}) == first
    other = {
        saved(seed=1),
        saved(config=to_plain(replace(CONFIG, blur_prob=0.1))),
        saved(parents={"clip": "c"}),
        saved(interface=to_plain(Interface(clip="c"))),
        saved(kind="decoder"),
    }
    assert len(other | {first}) == 6


def test_pickled_weights_are_refused_without_running_them(run: Path, tmp_path: Path):
    attack = pickle.dumps(Canary(tmp_path / "canary"))
    pickle.loads(attack)
    (tmp_path / "canary").rmdir()  # it was there: the pickle does something
    (run / "artifact" / "weights.safetensors").write_bytes(attack)
    write_manifest(run)
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifact.load(run)
    assert not (tmp_path / "canary").exists()


def test_describe_counts_what_is_trained():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2).requires_grad_(False).half())
    assert artifact.describe(model) == {"parameters": 32, "trainable": 20, "bytes": 20 * 4 + 12 * 2}
