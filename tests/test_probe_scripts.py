"""scripts/binding.sh, busy.sh and words.sh: what they refuse, what they run, and (slow) each at a tiny size."""

import os
import subprocess
from pathlib import Path

import pytest
from tests_support import environment

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [str(SCRIPTS / name), *arguments],
        capture_output=True, text=True, timeout=900, env=environment(), check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == code, said[-3000:]
    return said


@pytest.mark.parametrize("name", ["binding.sh", "busy.sh", "words.sh"])
def test_wrong_options_are_refused(name: str):
    assert "unknown option --mintues" in script(name, "--mintues", "1", code=1)
    assert "--set needs a value" in script(name, "--set", code=1)


def test_binding_asks_for_a_chain_and_its_time(tmp_path: Path):
    assert "has no clip: train a chain with scripts/demo.sh first" in script("binding.sh", str(tmp_path), code=1)
    for part in ("clip", "prior", "decoder", "data", "embeddings"):
        (tmp_path / part).mkdir()
    (tmp_path / "decoder" / "config.yaml").write_text("trainer:\n  max_minutes: null\n")
    assert "was not trained by the clock: say --minutes" in script("binding.sh", str(tmp_path), code=1)


@pytest.mark.parametrize("name", ["busy.sh", "words.sh"])
def test_options_only(name: str):
    assert "unknown argument runs" in script(name, "runs", code=1)


STAND_IN = """#!/usr/bin/env bash
for word; do [[ $word != run=* ]] || run=${word#run=}; done
[[ ${0##*/} == train-* ]] || exit 0
mkdir -p "$run/artifact"
[[ $run == *text_decoder ]] && step=9 || step=7
printf '{\\n  "step": %s\\n}\\n' "$step" >"$run/artifact/manifest.json"
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that do nothing, but for trainings, which leave a manifest: 9 steps of a text_decoder, 7 of all others."""
    (tmp_path / "bin").mkdir()
    for name in ("unclip", "unclip-embed", "train-clip", "train-prior", "train-decoder", "train-upsampler"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("stand_ins")
def test_binding_tells_the_steps_of_both_decoders(tmp_path: Path):
    for part in ("clip", "prior", "decoder/artifact", "data", "embeddings"):
        (tmp_path / "runs" / part).mkdir(parents=True)
    (tmp_path / "runs/decoder/config.yaml").write_text("trainer:\n  max_minutes: 9.375\n")
    (tmp_path / "runs/decoder/artifact/manifest.json").write_text('{\n  "step": 8,\n  "samples_seen": 256\n}')
    said = script("binding.sh", str(tmp_path / "runs"))
    assert "trainer.max_minutes=9.375" in said
    assert "\ndecoder: 8 steps\n" in said
    assert "\ntext_decoder: 9 steps\n" in said


@pytest.mark.usefixtures("stand_ins")
def test_words_trains_two_decoders_of_64_px_for_the_same_time(tmp_path: Path):
    out = tmp_path / "runs"
    said = script("words.sh", "--out", str(out), "--minutes", "3", "--probe", "5")
    data, clip, embed, prior, decoder, glide, probe = (line for line in said.splitlines() if line.startswith("$ "))
    assert data == f"$ unclip data shapes --out {out}/data --num 20000 --size 64 --signs 1"
    assert "text_seq" in embed
    assert all(command.endswith(" trainer.max_minutes=1.500") for command in (clip, prior))
    assert decoder.endswith(" experiment=busy64_decoder trainer.max_minutes=3")
    assert glide == decoder.replace("/decoder", "/text_decoder") + " model.conditioning.image=false"
    assert probe == f"$ unclip words-probe --from {out} --text-decoder {out}/text_decoder --out {out}/probes --num 5"
    assert "\ndecoder: 7 steps\n" in said
    assert "\ntext_decoder: 9 steps\n" in said


TINY = "trainer.max_steps=4 trainer.batch_size=8 trainer.log_every=2 optim.warmup_steps=2"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_busy_at_a_tiny_size(tmp_path: Path):
    given = ["--out", str(tmp_path), "--minutes", "1", "--num", "64", "--probe", "16", "--set", TINY]
    said = script("busy.sh", *given)
    for name in ("base32", "base64", "base64-samples"):
        assert f"{name}: 4 steps of its base" in said
        assert (tmp_path / name / "probes" / "busy.png").exists()
    assert script("busy.sh", *given).count("is finished") == 7, "nothing is trained twice"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_binding_at_a_tiny_size(tmp_path: Path):
    def run(*command: str) -> None:
        subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=600)

    embedded = ["data.path=data", "data.embeddings=embeddings", *TINY.split()]
    run("unclip", "data", "shapes", "--out", "data", "--num", "64")
    run("train-clip", "run=clip", "data.path=data", "experiment=demo_clip", *TINY.split())
    run("unclip-embed", "run=embeddings", "clip=clip", "data=data", "columns=[image_emb,text_emb,tokens,text_seq]")
    run("train-prior", "run=prior", "experiment=demo_prior", *embedded)
    run("train-decoder", "run=decoder", "experiment=demo_decoder", "trainer.max_minutes=0.5", *embedded)
    said = script("binding.sh", "--num", "4", "--set", TINY, str(tmp_path))
    assert "trainer.max_minutes=0.5" in said
    assert "GLIDE form (captions alone)" in said
    assert "\ntext_decoder: 4 steps\n" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_words_at_a_tiny_size(tmp_path: Path):
    given = ["--out", str(tmp_path), "--minutes", "1", "--num", "64", "--probe", "4", "--set", TINY]
    said = script("words.sh", *given)
    assert "GLIDE form (captions alone)" in said
    assert "\ndecoder: 4 steps\n" in said
    assert "\ntext_decoder: 4 steps\n" in said
    assert (tmp_path / "probes" / "words.png").exists()
    assert script("words.sh", *given).count("is finished") == 4, "nothing is trained twice"
