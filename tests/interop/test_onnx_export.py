"""Steps of the nets as ONNX, with a dynamic batch, against onnxruntime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from karlo_chain import write_karlo_chain
from tiny_chain import write_tiny_chain
from typer.testing import CliRunner

from unclip import artifact
from unclip.cli.app import app
from unclip.errors import ArtifactError, ConfigError
from unclip.interop import onnx_export

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def export(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", "onnx", *(str(a) for a in arguments)])


def outputs(file: Path, given: dict[str, Any]) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in given.items()})


def test_a_chain_in_karlos_form(tmp_path: Path):
    runs = write_karlo_chain(tmp_path / "runs")
    result = export(runs, "--out", tmp_path / "out", "--programs")
    assert result.exit_code == 0, result.exception
    names = {"clip_image", "clip_text", "prior", "decoder", "upsampler", "upsampler_last", "upsampler_64"}
    assert {path.stem for path in (tmp_path / "out").glob("*.onnx")} == names
    assert result.output.count("onnxruntime's outputs differ by at most") == len(names)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["decoder.onnx"]["artifact"] == artifact.read_manifest(runs / "decoder").hash
    assert index["prior.onnx"]["inputs"] == {
        "x_t": ["batch", 32], "timestep": ["batch"], "keep_text": ["batch"], "text_emb": ["batch", 32],
        "text_seq": ["batch", 20, 32], "tokens": ["batch", 20],
    }  # fmt: skip
    clip, _ = artifact.load(runs / "clip")
    tokens = clip.tokenize(["a red cube", "cones", "!", "", "two"])
    found = outputs(tmp_path / "out" / "clip_text.onnx", {"tokens": tokens})
    np.testing.assert_allclose(found[0], clip.encode_text(tokens)[0], atol=1e-4)
    program = torch.export.load(tmp_path / "out" / "clip_text.pt2").module()
    torch.testing.assert_close(program(tokens)[0], clip.encode_text(tokens)[0], atol=1e-5, rtol=0)


def test_a_chain_in_the_papers_form_one_run_at_a_time(tmp_path: Path):
    runs = write_tiny_chain(tmp_path / "runs")
    for stage in ("decoder", "prior"):
        result = export(runs / stage, "--out", tmp_path / stage)
        assert result.exit_code == 0, result.exception
        assert f"wrote {tmp_path / stage / stage}.onnx" in result.output


def test_guidance_by_dropped_rows_is_the_models_own(tmp_path: Path):
    runs = write_karlo_chain(tmp_path / "runs")
    assert export(runs / "prior", "--out", tmp_path / "out").exit_code == 0
    prior, _ = artifact.load(runs / "prior")
    torch.manual_seed(1)
    x_t, timestep = torch.randn(3, 32), torch.tensor([7, 7, 7])
    text_emb, text_seq = torch.randn(3, 32), torch.randn(3, 20, 32)
    tokens = torch.tensor([[49406, 1, 49407, *[0] * 17]]).repeat(3, 1)
    given = {"x_t": x_t, "timestep": timestep, "text_emb": text_emb, "text_seq": text_seq, "tokens": tokens}
    (dropped,) = outputs(tmp_path / "out" / "prior.onnx", given | {"keep_text": torch.tensor([False, False, True])})
    null = prior.net.null_context()
    rows = type(null)(
        [(key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1)) for key, value in null.keys_values],
        null.mask.expand(3, -1),
    )
    wanted = prior.net(x_t, timestep, rows).numpy()
    np.testing.assert_allclose(dropped[:2], wanted[:2], atol=1e-4)
    assert np.abs(dropped[2] - wanted[2]).max() > 1e-2


def test_a_wrong_output_is_found_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = write_tiny_chain(tmp_path / "runs")
    write = onnx_export.write

    def spoiled(step: Any, file: Path) -> Any:
        program = write(step, file)
        run = step.run
        step.run = lambda given: tuple(out + 1e-2 for out in run(given))
        return program

    monkeypatch.setattr(onnx_export, "write", spoiled)
    result = export(runs / "prior", "--out", tmp_path / "out")
    assert isinstance(result.exception, ArtifactError)
    assert "onnxruntime's outputs of prior differ by 0.01, more than 0.0001" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_what_has_no_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from unclip.config import to_plain
    from unclip.models.baseline_priors import IdentityConfig, IdentityPrior
    from unclip.models.interface import Interface

    prior = IdentityPrior(IdentityConfig(), Interface(8, 8, 8, 8))
    manifest = artifact.Manifest("prior", "identity", to_plain(prior.cfg), to_plain(prior.interface))
    artifact.save(tmp_path / "prior", prior, manifest)
    with pytest.raises(ConfigError, match=r"knows the steps of diffusion priors, not of a IdentityPrior"):
        raise export(tmp_path / "prior", "--out", tmp_path / "out").exception
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ArtifactError, match=r"holds no artifact: the stage has not finished"):
        raise export(tmp_path / "nothing", "--out", tmp_path / "out").exception
    with pytest.raises(ConfigError, match=r"exists already; remove it or write to another folder"):
        raise export(tmp_path / "prior", "--out", tmp_path / "nothing").exception
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"export onnx needs onnx: pip install 'unclip\[onnx\]'"):
        raise export(tmp_path / "prior", "--out", tmp_path / "out").exception
