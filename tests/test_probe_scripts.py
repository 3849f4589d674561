"""scripts/binding.sh and scripts/busy.sh: what they refuse, and (slow) each at a tiny size."""

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


@pytest.mark.parametrize("name", ["binding.sh", "busy.sh"])
def test_wrong_options_are_refused(name: str):
    assert "unknown option --mintues" in script(name, "--mintues", "1", code=1)
    assert "--set needs a value" in script(name, "--set", code=1)


def test_binding_asks_for_a_chain_and_its_time(tmp_path: Path):
    assert "has no clip: train a chain with scripts/demo.sh first" in script("binding.sh", str(tmp_path), code=1)
    for part in ("clip", "prior", "decoder", "data", "embeddings"):
        (tmp_path / part).mkdir()
    (tmp_path / "decoder" / "config.yaml").write_text("trainer:\n  max_minutes: null\n")
    assert "was not trained by the clock: say --minutes" in script("binding.sh", str(tmp_path), code=1)


def test_busy_takes_options_only():
    assert "unknown argument runs" in script("busy.sh", "runs", code=1)


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
