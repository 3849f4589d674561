"""The ``unclip`` command's surface: help, refusals, and importing a CLIP."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import typer
from hydra.core.global_hydra import GlobalHydra
from tests_support import run_command
from typer.testing import CliRunner

from unclip import artifact
from unclip.cli import train as hydra_commands
from unclip.cli.app import app, main
from unclip.errors import ConfigError, UnclipError


def leaves(command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not hasattr(command, "commands"):
        return [path]
    return [leaf for name, sub in command.commands.items() for leaf in leaves(sub, (*path, name))]


COMMANDS = leaves(typer.main.get_command(app))


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_all_commands_are_known():
    names = {" ".join(path) for path in COMMANDS}
    data = {"data shapes", "data emoji", "data folder", "data check"}
    assert names == data | {
        "import clip",
        "import embeddings",
        "import karlo",
        "export embeddings",
        "export open-clip",
        "export diffusers",
        "export onnx",
        "push",
        "pull",
        "wise-ft",
        "inspect",
        "prior-stats",
        "zero-shot",
        "generate",
        "vary",
        "interpolate",
        "edit",
        "mix",
        "inpaint",
        "repeat",
        "reconstruct",
        "edit-verdict",
        "pca-probe",
        "typographic-probe",
        "binding-probe",
        "words-probe",
        "busy-probe",
        "sweep-probe",
        "enlarge-probe",
        "verdict",
        "compare",
        "measure",
        "report",
        "ui",
        "doctor",
        "ema",
        "plan",
        "job",
        "sync",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_every_command(path: tuple[str, ...]):
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert command.help.split(";")[0].split(":")[0].splitlines()[0] in " ".join(result.output.split())
    for option in command.params:
        assert option.opts[0].lower() in result.output.lower()


@pytest.mark.parametrize("name", ["train_clip", "embed", "train_prior", "train_decoder", "train_upsampler", "evaluate"])
def test_help_of_every_training_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    try:
        with pytest.raises(SystemExit) as ended:
            getattr(hydra_commands, name)()
    finally:
        GlobalHydra.instance().clear()
    assert not ended.value.code
    assert "run: ???" in capsys.readouterr().out


def test_start_up_is_light():
    code = "import sys, unclip.cli.app, unclip.cli.train; print('torch' in sys.modules, 'open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--from", "runs"], 'give at least one caption, for example "a red cube", or --prompts FILE'),
        (["generate", " ", "--from", "runs"], "caption 1 of 1 is empty; say what the picture shows"),
        (["generate", "a cube", "--from", "runs"], "does not exist; give the run folder of a finished stage"),
        (["data", "shapes", "--objects", "1-x"], "--objects 1-x is not a range such as 1-2"),
        (["data", "shapes", "--objects", "1-"], "--objects 1- is not a range such as 1-2"),
        (["data", "shapes", "--objects", "3-2"], "--objects is 3-2; give a range within 1-8, smaller number first"),
        (["data", "emoji", "--sizes", "64,x"], "--sizes 64,x is not a list of sides such as 64,256"),
        (["data", "emoji", "--sizes", "64,²"], "--sizes 64,² is not a list of sides such as 64,256"),
        (["import", "clip", "ViT-B-33", "--pretrained", "x"], "model.name=ViT-B-33 is not in open_clip"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(tmp_path: Path, arguments: list[str], message: str):
    arguments = [str(tmp_path / "runs") if a == "runs" else a for a in arguments]
    result = run(*arguments, "--out", tmp_path / "out")
    assert isinstance(result.exception, UnclipError), result.output
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a cube", "--from", "runs", "--num", "0"],
        ["generate", "a cube", "--from", "runs", "--batch-size", "0"],
        ["generate", "a cube", "--from", "runs", "--decoder-steps", "0"],
        ["generate", "a cube", "--from", "runs", "--candidates", "0"],
        ["generate", "--from", "runs", "--prompts", "nowhere.txt"],
        ["compare", "--from", "runs", "--data", "d", "--num", "0"],
    ],
    ids=lambda a: a[-2],
)
def test_values_out_of_range_are_refused_by_option(tmp_path: Path, arguments: list[str]):
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, "a usage error, told by the option's name"
    assert arguments[-2] in result.output


def test_an_error_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["unclip", "data", "shapes", "--out", "x", "--objects", "one"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: --objects one is not a range such as 1-2\n"


@pytest.fixture
def tiny_name(tmp_path: Path) -> str:
    """A small architecture in open_clip's own registry."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    path = tmp_path / "ViT-tiny-for-tests.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return path.stem


def import_and_compare(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = open_clip.create_model(name).eval()
    torch.save(plain.state_dict(), tmp_path / "clip.pt")
    result = run("import", "clip", name, "--pretrained", tmp_path / "clip.pt", "--out", tmp_path / "clip")
    assert result.exit_code == 0, result.exception
    assert "A clip: model clip, step 0" in (tmp_path / "clip" / "report.html").read_text()
    (tmp_path / "clip.pt").unlink()  # the artifact is self-contained
    model, manifest = artifact.load(tmp_path / "clip", kind="clip")
    assert f"wrote {tmp_path / 'clip' / 'artifact-00000000'}" in result.output
    tokens = open_clip.get_tokenizer(name)(["a red cube", "two cones"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens)[0], plain.encode_text(tokens), atol=1e-4, rtol=1e-4)
    assert manifest.interface == {
        "embed_dim": plain.text_projection.shape[1],
        "text_width": plain.token_embedding.embedding_dim,
        "context_length": 77,
        "vocab_size": 49408,
        "clip": "",
    }


def test_importing_a_clip_gives_its_embeddings(tmp_path: Path, tiny_name: str):
    import_and_compare(tiny_name, tmp_path)


@pytest.mark.slow
def test_importing_a_clip_of_the_registry(tmp_path: Path):
    import_and_compare("ViT-S-32-alt", tmp_path)


def test_importing_what_is_no_file_and_no_tag_is_refused(tmp_path: Path, tiny_name: str):
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "identity.json").write_text("{}")
    result = run("import", "clip", tiny_name, "--pretrained", tmp_path / "no.pt", "--out", tmp_path / "trained")
    assert "is a training run, whose artifact this would replace" in str(result.exception)
    result = run("import", "clip", tiny_name, "--pretrained", tmp_path / "no.pt", "--out", tmp_path / "clip")
    assert isinstance(result.exception, ConfigError)
    assert "no.pt is neither a file nor a tag of 'ViT-tiny-for-tests'" in str(result.exception)
    assert not (tmp_path / "clip").exists()


def test_doctor_finds_this_machine_ready_and_leaves_nothing(tmp_path: Path) -> None:
    said = run_command("unclip", "doctor", "--runs", "runs", cwd=tmp_path)
    for part in ("torch", "GB free", "encodes a picture and a caption", "This machine is ready."):
        assert part in said
    for stage in ("CLIP", "prior", "decoder", "upsampler"):
        assert f"step of a small {stage}" in said
    assert list((tmp_path / "runs").iterdir()) == []


def test_doctor_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    said = run_command("unclip", "doctor", "--runs", "runs", cwd=tmp_path, code=1)
    assert "WRONG disk" in said
    assert "Not ready" in said
