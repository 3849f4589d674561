"""Pushing, fetching and drawing from a hub: huggingface_hub itself, against a local folder behind its interface."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import Hub, serving_hub
from huggingface_hub import ModelCard
from tiny_chain import write_tiny_chain
from typer.testing import CliRunner

from unclip import UnCLIP, artifact
from unclip.cli.app import app
from unclip.errors import ArtifactError, ConfigError

REPO = "me/tiny"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = write_tiny_chain(tmp_path_factory.mktemp("chain"))
    (runs / "decoder" / "samples").mkdir()
    (runs / "decoder" / "samples" / "step-00000001.png").write_bytes(b"older")
    (runs / "decoder" / "samples" / "step-00000002.png").write_bytes(b"a sheet")
    return runs


@pytest.fixture
def runs(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "runs", symlinks=True))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub(tmp_path / "hub") as server:
        point_at(server.url, tmp_path / "cache", monkeypatch)
        yield server


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT, HF_TOKEN and HF_HUB_CACHE do for a new process."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_local")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def pushed(runs: Path) -> Any:
    result = run("push", runs, REPO, "--license", "apache-2.0")
    assert result.exit_code == 0, result.exception
    return result


def test_what_is_pushed_comes_back_to_the_byte_and_draws(runs: Path, hub: Hub, tmp_path: Path):
    said = pushed(runs).output
    assert said.startswith(f"pushed {hub.url}/{REPO}/commit/")
    sent = {str(path.relative_to(hub.root / REPO)) for path in hub.files(REPO)}
    stages = ("clip", "prior", "decoder", "upsampler")
    files = {
        f"{stage}/artifact/{file}"
        for stage in stages
        for file in ("weights.safetensors", "manifest.json", "config.yaml")
    }
    assert sent == files | {"README.md", "decoder/sheet.png"}
    assert (hub.root / REPO / "decoder/sheet.png").read_bytes() == b"a sheet", "the newest one"

    result = run("pull", REPO, "--out", tmp_path / "fetched")
    assert result.exit_code == 0, result.exception
    for stage in stages:
        weights = artifact.locate(tmp_path / "fetched" / stage) / "weights.safetensors"
        assert weights.read_bytes() == (artifact.locate(runs / stage) / "weights.safetensors").read_bytes()
        assert f"wrote {tmp_path / 'fetched' / stage}: {stage}" in result.output

    before = len(hub.fetched)
    result = run("generate", "a red cube", "--from", f"hf://{REPO}", "--out", tmp_path / "pictures", "--num", 1)
    assert result.exit_code == 0, result.exception
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 1
    assert len(hub.fetched) == before, "the cache has all of it"
    assert UnCLIP.load(f"hf://{REPO}").hashes == UnCLIP.load(runs).hashes


def test_the_cache_serves_without_a_hub(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serving_hub(tmp_path / "hub") as server:
        point_at(server.url, tmp_path / "cache", monkeypatch)
        pushed(runs)
        UnCLIP.load(f"hf://{REPO}")
    assert "decoder" in UnCLIP.load(f"hf://{REPO}@main").hashes
    with pytest.raises(ArtifactError, match=r"the hub cannot be reached, and me/other is not in the local cache"):
        UnCLIP.load("hf://me/other")
    result = run("push", runs, REPO, "--license", "apache-2.0")
    assert "the hub cannot be reached" in str(result.exception)


def test_the_card_says_what_the_manifests_know(runs: Path, tmp_path: Path):
    data = tmp_path / "emoji"
    data.mkdir()
    (data / "ATTRIBUTION.md").write_text("drawn by others")
    _, manifest = artifact.load(runs / "prior")
    manifest.settings = {"data": {"path": str(data), "others": [{"path": "s3://bucket/shapes"}]}}
    manifest.data, manifest.metrics, manifest.step = "f" * 64, {"val/mse": 0.25, "seconds": 3.0}, 1000
    manifest.parents = {"clip": artifact.read_manifest(runs / "clip").hash}
    artifact.save(runs / "prior", artifact.load(runs / "prior")[0], manifest)
    result = run("push", runs, REPO, "--license", "cc-by-4.0", "--dry-run", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "unclip"
    assert card.data.pipeline_tag == "text-to-image"
    (measure,) = card.data.eval_results
    assert (measure.metric_type, measure.metric_value, measure.dataset_name) == ("val/mse", 0.25, "emoji + shapes")
    clip = artifact.read_manifest(runs / "clip").hash[:12]
    assert (
        f"| prior | diffusion_prior | 1,000 | 0 | `{artifact.read_manifest(runs / 'prior').hash[:12]}` | clip clip `{clip}` |"
        in card.text
    )
    assert "- prior: emoji + shapes, fingerprint `ffffffffffff`" in card.text
    assert "| prior | val/mse | 0.25 |" in card.text
    assert "![decoder](decoder/sheet.png)" in card.text
    assert "[data-emoji-ATTRIBUTION.md](data-emoji-ATTRIBUTION.md)" in card.text
    assert (tmp_path / "out" / "data-emoji-ATTRIBUTION.md").read_text() == "drawn by others"
    assert str(tmp_path) not in card.content, "no path of the machine"
    assert UnCLIP.load(tmp_path / "out").hashes == UnCLIP.load(runs).hashes


def test_the_hub_validates_the_card_before_anything_is_sent(runs: Path, hub: Hub):
    result = run("push", runs, REPO, "--license", "gpl-9")
    assert isinstance(result.exception, ArtifactError)
    assert 'the hub refuses me/tiny: {"errors": [{"message": "\\"license\\" must be one of' in str(result.exception)
    assert len(hub.cards) == 1
    assert not hub.files(REPO)


def test_a_single_run_is_pushed_under_its_kind(runs: Path, tmp_path: Path):
    for place in (runs / "prior", artifact.locate(runs / "prior")):
        result = run("push", place, REPO, "--license", "mit", "--dry-run", tmp_path / "out")
        assert result.exit_code == 0, result.exception
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"prior", "README.md"}
        shutil.rmtree(tmp_path / "out")


def test_other_licences_bring_their_text(runs: Path, tmp_path: Path):
    result = run("push", runs, REPO, "--license", "other", "--dry-run", tmp_path / "out")
    assert isinstance(result.exception, ConfigError)
    assert f"--license other needs its text: put it at {runs / 'LICENSE'}" in str(result.exception)
    assert not (tmp_path / "out").exists()
    (runs / "LICENSE").write_text("Do as you like.")
    result = run("push", runs, REPO, "--license", "other", "--dry-run", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license_name, card.data.license_link) == ("other", "LICENSE")


def test_damaged_and_mixed_stages_are_not_pushed(runs: Path, tmp_path: Path):
    _, manifest = artifact.load(runs / "decoder")
    manifest.interface["clip"] = "0" * 64
    artifact.save(runs / "decoder", artifact.load(runs / "decoder")[0], manifest)
    with pytest.raises(ArtifactError, match=r"belong to two CLIPs, .* push them to two repositories"):
        raise run("push", runs, REPO, "--license", "mit", "--dry-run", tmp_path / "out").exception
    weights = artifact.locate(runs / "prior") / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"was altered or cut short"):
        raise run("push", runs / "prior", REPO, "--license", "mit", "--dry-run", tmp_path / "out").exception
    with pytest.raises(ArtifactError, match=r"holds no stages: give a folder with finished runs clip, prior"):
        raise run("push", tmp_path, REPO, "--license", "mit", "--dry-run", tmp_path / "out").exception
    assert not (tmp_path / "out").exists()


def test_what_was_altered_on_the_hub_is_refused(runs: Path, hub: Hub, tmp_path: Path):
    pushed(runs)
    (hub.root / REPO / "prior/artifact/evil.bin").write_bytes(b"a pickle")
    weights = hub.root / REPO / "decoder/artifact/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"decoder.* was altered or cut short"):
        raise run("pull", REPO, "--out", tmp_path / "out").exception
    assert not (tmp_path / "out").exists()
    assert "prior/artifact/evil.bin" not in hub.fetched


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf://tiny", r"hf://tiny is not of the form hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
        ("hf://me/a--b", r"me/a--b is no name of a repository, which is OWNER/NAME"),
        ("hf://me/none", r"the hub has no me/none, or it is private: check the name, and log in"),
        ("hf://me/empty", r"me/empty holds no stages of unclip: `unclip push` writes STAGE/artifact/manifest.json"),
    ],
)
def test_wrong_places_are_refused(place: str, message: str, hub: Hub, tmp_path: Path):
    (hub.root / "me/empty").mkdir(parents=True)
    (hub.root / "me/empty/README.md").write_text("nothing here")
    result = run("generate", "a cube", "--from", place, "--out", tmp_path / "out")
    with pytest.raises(ArtifactError, match=message):
        raise result.exception
    assert not (tmp_path / "out").exists()


def test_pulling_does_not_write_over_a_folder(hub: Hub, tmp_path: Path):
    (tmp_path / "out").mkdir()
    result = run("pull", REPO, "--out", tmp_path / "out")
    assert isinstance(result.exception, ConfigError)
    assert "exists already; remove it or write to another folder" in str(result.exception)
