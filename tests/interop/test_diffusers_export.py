"""A chain as a folder of diffusers' UnCLIP pipelines: what the command checks, and that the check can fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from karlo_chain import CLIP_CONFIG, CONFIGS, laid_over, write_karlo_chain, write_stage
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from unclip import artifact
from unclip.cli.app import app
from unclip.errors import ArtifactError, ConfigError, UnclipError
from unclip.interop import diffusers_export
from unclip.interop.diffusers_tokenizer import write_tokenizer
from unclip.models.clip import CLIPConfig, Tokenizer

STAGES = ("clip", "prior", "decoder", "upsampler", "upsampler_64")
COMPONENTS = {"prior", "decoder", "text_proj", "text_encoder", "image_encoder", "super_res_first", "super_res_last"}
CAPTIONS = [
    "a red horse!",
    "!! wow !!! 100% cotton, isn't it?",
    "un café à l'été",
    "日本の猫 🐱 on a mat",
    "",
    "   spaces   everywhere ",
    "word " * 120,
]


def export(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", "diffusers", *(str(a) for a in arguments)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_karlo_chain(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def exported(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("exported") / "folder"
    result = export(runs, "--out", out)
    assert result.exit_code == 0, result.exception
    return out, result.output


def test_the_whole_chain_is_exported_and_checked_with_diffusers(exported: tuple[Path, str]):
    out, said = exported
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPPipeline"
    assert {*index} > COMPONENTS | {"tokenizer", "feature_extractor", "prior_scheduler", "decoder_scheduler"}
    assert index["text_proj"] == ["diffusers.pipelines.deprecated.unclip.text_proj", "UnCLIPTextProjModel"]
    assert (out / "super_res_64" / "super_res_first" / "diffusion_pytorch_model.safetensors").exists()
    assert f"wrote {out}; diffusers" in said
    assert "loads the same weights, computes the same" in said


def test_weights_are_those_of_the_artifacts_to_the_bit(exported: tuple[Path, str], runs: Path):
    out, _ = exported
    for component, stage, prefix in (
        ("prior", "prior", "net."),
        ("decoder", "decoder", "net.unet."),
        ("text_proj", "decoder", "net.text_proj."),
        ("super_res_first", "upsampler", "net.unet."),
        ("super_res_last", "upsampler", "last_net.unet."),
        ("super_res_64/super_res_first", "upsampler_64", "net.unet."),
        ("super_res_64/super_res_last", "upsampler_64", "net.unet."),
    ):
        ours = load_file(artifact.locate(runs / stage) / "weights.safetensors")
        theirs = load_file(out / component / "diffusion_pytorch_model.safetensors")
        assert len(theirs) > 10
        for name, value in theirs.items():
            own = ours[name if name in ("clip_mean", "clip_std") else prefix + name]
            assert torch.equal(value, own), f"{component} {name}"


def check_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing diffusers in a process of its own takes ten seconds."""
    from diffusers.schedulers import scheduling_unclip

    from unclip.interop import diffusers_check

    monkeypatch.setattr(scheduling_unclip, "randn_tensor", scheduling_unclip.randn_tensor)  # as it was, afterwards
    monkeypatch.setattr(diffusers_export, "repeat", diffusers_check.main)


def alter(component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one weight of a component be another one when diffusers looks at it."""
    finish = diffusers_export.DiffusersFolder.finish

    def spoil(self: Any) -> None:
        finish(self)
        file = next((self.path / component).glob("*.safetensors"))
        state = load_file(file)
        name = min(state)
        state[name].view(-1)[0] += 0.5
        save_file(state, file, metadata={"format": "pt"})

    monkeypatch.setattr(diffusers_export.DiffusersFolder, "finish", spoil)


def test_the_check_sees_one_other_weight_and_leaves_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    check_in_this_process(monkeypatch)
    alter("decoder", monkeypatch)
    result = export(runs, "--out", tmp_path / "out")
    assert isinstance(result.exception, ArtifactError)
    said = str(result.exception)
    assert "does not repeat what these stages compute: decoder: other weights" in said
    assert "decoder: outputs differ by" in said
    assert "pictures (captions): mean difference" in said
    assert not list(tmp_path.iterdir())


def test_without_a_prior_there_are_variations_only(runs: Path, tmp_path: Path):
    result = export(runs, "--out", tmp_path / "out", "--without-prior", "--diffusers-compat", "legacy")
    assert result.exit_code == 0, result.exception
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPImageVariationPipeline"
    assert "prior" not in index
    assert index["text_proj"] == ["unclip", "UnCLIPTextProjModel"]
    assert "this is a legacy folder" in result.output


def test_the_tokenizer_is_open_clips(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path / "tokenizer", 77)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (theirs.pad_token, theirs.pad_token_id, theirs.model_max_length) == ("<|endoftext|>", 49407, 77)
    found = theirs(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    wanted = Tokenizer(77)(CAPTIONS)
    mask = torch.arange(77) <= wanted.argmax(dim=1, keepdim=True)
    assert torch.equal(found.attention_mask.bool(), mask)
    assert torch.equal(found.input_ids.where(mask, 0), wanted)
    assert 256 in found.input_ids[0], "the sign ! of the first caption survives"


UNIT = {"embedding_norm": "unit"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": {"embedding_space": "scaled", "diffusion": {"clip_range": None}}}, "embedding_space=whitened"),
        ({"prior": {"embedding_space": "pca", "num_components": 8}}, "embedding_space=whitened"),
        ({"prior": {"net": {"text": "tokens"}}}, "net.text=clip_states"),
        ({"prior": {"net": {"null_text": "zero"}}}, "net.null_text=empty"),
        ({"prior": {"net": {"qk_norm": True}}}, "net.qk_norm=false"),
        ({"prior": {"diffusion": {"predict": "v"}}}, "diffusion.predict=eps or x0"),
        ({"prior": {"diffusion": {"schedule": "linear"}}}, "diffusion.schedule=cosine"),
        ({"prior": {"diffusion": {"self_conditioning": True}}}, "diffusion.self_conditioning=false"),
        ({"decoder": UNIT}, "embedding_norm=raw"),
        ({"decoder": {"embedding_scale": 2.0}}, "embedding_norm=raw"),
        ({"decoder": {"net": {"patch": 2}}}, "net.patch=1"),
        (
            {"decoder": {"split": 0.5, "last_net": {"channels": [32], "attention_levels": [0], "head_dim": 32}}},
            "model.split=0",
        ),
        ({"decoder": {"conditioning": {"sketch": {"size": 8}}}}, "conditioning.sketch.size=0"),
        ({"decoder": {"conditioning": {"text": "tokens"}}}, "conditioning.text=clip_states"),
        ({"decoder": {"conditioning": {"text": "none"}}}, "conditioning.text=clip_states"),
        ({"decoder": {"conditioning": {"text_emb": False}}}, "conditioning.text_emb=true"),
        ({"decoder": {"conditioning": {"image": False}}}, "conditioning.image=true"),
        ({"decoder": {"conditioning": {"null_text": "zero"}}}, "conditioning.null_text=empty"),
        ({"decoder": {"diffusion": {"learned_variance": False}}}, "diffusion.learned_variance=true"),
        ({"decoder": {"diffusion": {"resolution": 128}}}, "diffusion.resolution=null"),
        ({"decoder": {"conditioning": {"num_image_tokens": 44}}}, "another model.conditioning.num_image_tokens"),
        ({"upsampler": {"residual": True, "diffusion": {"predict": "x0"}}}, "residual=false"),
        ({"upsampler": {"max_noise": 0.5}}, "max_noise=0"),
        ({"upsampler": {"overshoot": False}}, "overshoot=true"),
        ({"upsampler": {"last_steps": 2}}, "last_steps of 0 or 1"),
        ({"upsampler_64": {"net": {"patch": 2}}}, "net.patch=1"),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express_is_refused_with_the_setting(
    changes: dict[str, Any], message: str, runs: Path, tmp_path: Path
):
    ((stage, change),) = changes.items()
    clip, manifest = artifact.load(runs / "clip")
    write_stage(tmp_path, stage, laid_over(CONFIGS[stage], change), clip, manifest.hash)
    with pytest.raises(ConfigError, match=re.escape(message)):
        diffusers_export.export_diffusers(
            {name: runs / name for name in STAGES} | {stage: tmp_path / stage}, tmp_path / "out"
        )
    assert [path.name for path in tmp_path.iterdir()] == [stage]


def test_other_priors_and_other_clips_are_refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from unclip.artifact import Manifest
    from unclip.config import to_plain
    from unclip.models.baseline_priors import IdentityConfig, IdentityPrior
    from unclip.models.interface import Interface

    clip = artifact.read_manifest(runs / "clip")
    interface = clip.interface | {"clip": clip.hash}
    prior = IdentityPrior(IdentityConfig(), Interface(**interface))
    artifact.save(tmp_path / "prior", prior, Manifest("prior", "identity", to_plain(prior.cfg), interface))
    folders = {name: runs / name for name in STAGES}
    with pytest.raises(ConfigError, match=r"samples from a diffusion prior, not by IdentityConfig: train one with"):
        diffusers_export.export_diffusers(folders | {"prior": tmp_path / "prior"}, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"end in an upsampler, and there is none: train-upsampler"):
        diffusers_export.export_diffusers({name: runs / name for name in STAGES[:3]}, tmp_path / "out")
    wide = write_karlo_chain(tmp_path / "wide", clip=CLIPConfig(**{**vars(CLIP_CONFIG), "text_width": 48}))
    with pytest.raises(ConfigError, match=r"a CLIP whose token states are as wide as its embeddings"):
        diffusers_export.export_diffusers({name: wide / name for name in STAGES}, tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"checked with diffusers: pip install 'unclip\[diffusers\]'"):
        diffusers_export.export_diffusers(folders, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--diffusers-compat", "old"), "--diffusers-compat is old; it must be current (from 0.38 on) or legacy"),
        ((), "clip does not exist; give the run folder of a finished stage"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, tmp_path: Path):
    result = export(tmp_path, "--out", tmp_path / "out", *arguments)
    assert isinstance(result.exception, UnclipError), result.exception
    assert message in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.37.1", "0.38.0", "0.40.0"])
def test_other_versions_of_diffusers(version: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, f"diffusers=={version}"], check=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    result = export(runs, "--out", tmp_path / "out", *(("--diffusers-compat", "legacy") if version < "0.38" else ()))
    assert result.exit_code == 0, result.exception
    assert f"diffusers {version} loads the same weights" in result.output
    assert "legacy folder" not in result.output
