"""Steps of the nets as ONNX, with a dynamic batch, against onnxruntime."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from karlo_chain import write_karlo_chain
from models.test_decoder import NET, TEXT, make
from tiny_chain import write_tiny_chain
from typer.testing import CliRunner

from unclip import artifact
from unclip.cli.app import app
from unclip.errors import ArtifactError, ConfigError
from unclip.interop import onnx_export
from unclip.interop.onnx_steps import steps_of
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.decoder import Embedding
from unclip.nets.conditioned import SketchConfig

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def export(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", "onnx", *(str(a) for a in arguments)])


def outputs(file: Path, given: dict[str, Any]) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in given.items()})


SMALLER = {"prior": {"net": {"depth": 1}}}  # an export takes seconds of CPU for every hundred operations
SMALLER |= {name: {"net": {"channels": [16]}} for name in ("decoder", "upsampler", "upsampler_64")}
SMALLER["decoder"]["net"]["attention_levels"] = [0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = write_karlo_chain(tmp_path_factory.mktemp("karlo") / "runs", SMALLER)
    shutil.rmtree(runs / "upsampler_64")
    return runs


@pytest.fixture(scope="module")
def exported(runs: Path) -> tuple[Path, str]:
    result = export(runs, "--out", runs.parent / "out", "--programs")
    assert result.exit_code == 0, result.exception
    return runs.parent / "out", result.output


def test_a_chain_in_karlos_form(exported: tuple[Path, str], runs: Path):
    out, said = exported
    names = {"clip_image", "clip_text", "prior", "decoder", "upsampler", "upsampler_last"}
    assert {path.stem for path in out.glob("*.onnx")} == names
    assert said.count("onnxruntime's outputs differ by at most") == len(names)
    index = json.loads((out / "index.json").read_text())
    assert index["decoder.onnx"]["artifact"] == artifact.read_manifest(runs / "decoder").hash
    assert index["prior.onnx"]["inputs"] == {
        "x_t": ["batch", 32], "timestep": ["batch"], "keep_text": ["batch"], "text_emb": ["batch", 32],
        "text_seq": ["batch", 20, 32], "tokens": ["batch", 20],
    }  # fmt: skip


def test_batches_of_any_size(exported: tuple[Path, str], runs: Path):
    out, _ = exported
    clip, _ = artifact.load(runs / "clip")
    tokens = clip.tokenize(["a red cube", "cones", "!", "", "two"])
    found = outputs(out / "clip_text.onnx", {"tokens": tokens})
    np.testing.assert_allclose(found[0], clip.encode_text(tokens)[0], atol=1e-4)
    program = torch.export.load(out / "clip_text.pt2").module()
    torch.testing.assert_close(program(tokens)[0], clip.encode_text(tokens)[0], atol=1e-5, rtol=0)


def test_guidance_by_dropped_rows_is_the_models_own(exported: tuple[Path, str], runs: Path):
    prior, _ = artifact.load(runs / "prior")
    torch.manual_seed(1)
    x_t, timestep = torch.randn(3, 32), torch.tensor([7, 7, 7])
    text_emb, text_seq = torch.randn(3, 32), torch.randn(3, 20, 32)
    tokens = torch.tensor([[49406, 1, 49407, *[0] * 17]]).repeat(3, 1)
    given = {"x_t": x_t, "timestep": timestep, "text_emb": text_emb, "text_seq": text_seq, "tokens": tokens}
    (found,) = outputs(exported[0] / "prior.onnx", given | {"keep_text": torch.tensor([False, False, True])})
    null = prior.net.null_context()
    spread = [(key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1)) for key, value in null.keys_values]
    wanted = prior.net(x_t, timestep, type(null)(spread, null.mask.expand(3, -1))).numpy()
    np.testing.assert_allclose(found[:2], wanted[:2], atol=1e-4)
    assert np.abs(found[2] - wanted[2]).max() > 1e-2


def test_a_wrong_output_is_found(exported: tuple[Path, str], runs: Path):
    (step,) = steps_of("prior", artifact.load(runs / "prior")[0])
    assert onnx_export.check(step, exported[0] / "prior.onnx") <= 1e-4
    run = step.run
    step.run = lambda given: tuple(out + 0.05 for out in run(given))
    with pytest.raises(
        ArtifactError, match=r"outputs of prior differ by 0\.0.*, more than 0.0001: nothing was written"
    ):
        onnx_export.check(step, exported[0] / "prior.onnx")


def test_a_decoder_that_draws_a_sketch(tmp_path: Path):
    net = replace(NET, channels=[16], attention_levels=[0])
    [step] = steps_of("decoder", make(net=net, conditioning=replace(TEXT, sketch=SketchConfig(size=4, width=8))))
    onnx_export.write(step, tmp_path / "decoder.onnx")
    assert onnx_export.check(step, tmp_path / "decoder.onnx") <= onnx_export.TOLERANCE
    [plain] = outputs(tmp_path / "decoder.onnx", step.inputs)
    step.module.sketch.out.bias.data += 1  # type: ignore[union-attr]
    assert np.abs(step.run(step.inputs)[0].detach().numpy() - plain).max() > 0.01  # the sketch was in it


def test_a_decoder_trained_on_z_t_sees_its_embedding():
    [step] = steps_of("decoder", make(embedding=Embedding.text))
    assert "image_emb" in step.inputs
    assert "text_emb" not in step.inputs
    before = step.run(step.inputs)[0]
    after = step.run({**step.inputs, "image_emb": step.inputs["image_emb"].flip(1)})[0]
    assert (after - before)[0].abs().max() > 1e-3, "row 0 keeps it"


def test_a_clip_with_a_resnet(tmp_path: Path):
    clip = CLIP(CLIPConfig(image_size=32, vision_width=4, vision_blocks=[1, 1, 1, 1], text_layers=1)).eval()
    image = next(step for step in steps_of("clip", clip) if step.name == "clip_image")
    onnx_export.write(image, tmp_path / "clip_image.onnx")
    assert onnx_export.check(image, tmp_path / "clip_image.onnx") <= onnx_export.TOLERANCE


@pytest.mark.slow
def test_a_chain_in_the_papers_form_one_run_at_a_time(tmp_path: Path):
    runs = write_tiny_chain(tmp_path / "runs")
    for stage in ("decoder", "prior"):
        result = export(runs / stage, "--out", tmp_path / stage)
        assert result.exit_code == 0, result.exception
        assert f"wrote {tmp_path / stage / stage}.onnx" in result.output


def test_what_has_no_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from unclip.config import to_plain
    from unclip.models.baseline_priors import IdentityConfig, IdentityPrior
    from unclip.models.interface import Interface

    prior = IdentityPrior(IdentityConfig(), Interface(8, 8, 8, 8))
    manifest = artifact.Manifest("prior", "identity", to_plain(prior.cfg), to_plain(prior.interface))
    artifact.save(tmp_path / "prior", prior, manifest)
    with pytest.raises(ConfigError, match=r"knows the steps of diffusion priors, not of a IdentityPrior"):
        raise export(tmp_path / "prior", "--out", tmp_path / "out").exception
    (tmp_path / "prior-val").mkdir()  # of unclip-evaluate, beside the stages
    assert list(artifact.stages_of(tmp_path)) == ["prior"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ArtifactError, match=r"holds no stages: give a folder with finished runs"):
        raise export(tmp_path / "nothing", "--out", tmp_path / "out").exception
    with pytest.raises(ConfigError, match=r"exists already; remove it or write to another folder"):
        raise export(tmp_path / "prior", "--out", tmp_path / "nothing").exception
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"export onnx needs onnx: pip install 'unclip\[onnx\]'"):
        raise export(tmp_path / "prior", "--out", tmp_path / "out").exception
