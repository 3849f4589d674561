"""The chain end to end through the public commands, on 64 pictures."""

import json
import resource
from pathlib import Path

import pytest
from PIL import Image
from tests_support import TINY, run_command
from typer.testing import CliRunner

from unclip.cli.app import app

pytestmark = pytest.mark.timeout(300)


def cpu_seconds() -> float:
    """User and system time of all commands so far that have ended, with their workers."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """All stages trained for a few steps on 64 generated pictures, and the CPU seconds that this took."""
    before, root = cpu_seconds(), tmp_path_factory.mktemp("chain")
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=root)
    data = "data.path=data"
    run_command("train-clip", "run=runs/clip", data, *TINY["clip"], cwd=root)
    run_command("unclip-embed", "run=runs/embeddings", "clip=runs/clip", "data=data", cwd=root)
    stored = "data.embeddings=runs/embeddings"
    run_command("train-prior", "run=runs/prior", data, stored, *TINY["prior"], cwd=root)
    run_command("train-decoder", "run=runs/decoder", data, stored, *TINY["decoder"], cwd=root)
    run_command("train-upsampler", "run=runs/upsampler", data, *TINY["upsampler"], cwd=root)
    return root, cpu_seconds() - before


@pytest.fixture
def chain(trained: tuple[Path, float]) -> Path:
    return trained[0]


def test_the_chain_takes_less_than_two_minutes_from_nothing_to_a_picture(trained: tuple[Path, float]):
    """Of CPU time, on one core: how long a command waits depends on what runs beside it, here another file of tests."""
    root, seconds = trained
    before = cpu_seconds()
    run_command("unclip", "generate", "a red cube", "--from", "runs", "--out", "first", "--num", "1", cwd=root)
    assert (root / "first" / "sheet.png").exists()
    seconds += cpu_seconds() - before
    assert 0 < seconds < 120, f"{seconds:.0f} s"


def test_every_stage_leaves_an_artifact_a_sheet_and_metrics(chain: Path):
    clip_hash = json.loads((chain / "runs/clip/artifact/manifest.json").read_text())["hash"]
    for stage in ("clip", "prior", "decoder", "upsampler"):
        run = chain / "runs" / stage
        manifest = json.loads((run / "artifact" / "manifest.json").read_text())
        assert manifest["kind"] == stage
        assert manifest["step"] == 4
        assert manifest["interface"]["clip"] == (clip_hash if stage in ("prior", "decoder") else "")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert {row["step"] for row in rows if any(k.startswith("train/") for k in row)} == {2, 4}
        assert list((run / "samples").glob("step-*.png"))
        assert not list(run.glob("*.tmp"))


def test_clips_manifest_says_its_recall(chain: Path):
    """Against a computation by hand: tests/test_loggers.py."""
    metrics = json.loads((chain / "runs/clip/artifact/manifest.json").read_text())["metrics"]
    for way in ("text_to_image", "image_to_text"):
        assert 0 <= metrics[f"val/{way}_recall_1"] <= metrics[f"val/{way}_recall_5"] <= 1


def test_the_same_command_again_returns_at_once(chain: Path):
    before = (chain / "runs/clip/artifact/manifest.json").stat().st_mtime_ns
    run_command("train-clip", "run=runs/clip", "data.path=data", *TINY["clip"], cwd=chain)
    assert (chain / "runs/clip/artifact/manifest.json").stat().st_mtime_ns == before


def test_a_start_that_failed_does_not_bind_the_folder(chain: Path):
    command = ["train-upsampler", "run=runs/again", *TINY["upsampler"]]
    assert "nowhere" in run_command(*command, "data.path=nowhere", cwd=chain, code=1)
    assert not (chain / "runs/again/identity.json").exists()
    run_command(*command, "data.path=data", cwd=chain)
    assert (chain / "runs/again/artifact").exists()


def test_another_setting_in_the_same_run_is_refused(chain: Path):
    said = run_command(
        "train-clip", "run=runs/clip", "data.path=data", *TINY["clip"], "optim.lr=0.5", cwd=chain, code=1
    )
    assert "was started with other settings" in said
    assert "optim.lr: 0.001 -> 0.5" in said


def test_generate_writes_pictures_with_their_history(chain: Path):
    (chain / "captions.txt").write_text("a red cube\n\na blue sphere left of a green cone\n")
    for out in ("one", "two"):
        run_command(
            "unclip", "generate", "--from", "runs", "--out", out, "--num", "2", "--prompts", "captions.txt", cwd=chain
        )
    pictures = sorted(p.name for p in (chain / "one").glob("0*.png"))
    assert len(pictures) == 4
    first = Image.open(chain / "one" / pictures[1])
    history = json.loads(first.info["unclip"])
    assert first.size == (32, 32)
    assert (history["caption"], history["seed"]) == ("a red cube", 1)
    assert set(history["artifacts"]) == {"clip", "prior", "decoder", "upsampler"}
    assert (chain / "one" / "sheet.png").exists()
    for name in pictures:
        assert (chain / "one" / name).read_bytes() == (chain / "two" / name).read_bytes()


def test_more_steps_than_the_schedule_has_are_refused(chain: Path):
    said = run_command(
        *("unclip", "generate", "a red cube", "--from", "runs", "--out", "x", "--decoder-steps", "1001"),
        cwd=chain,
        code=1,
    )
    assert "the decoder was trained with 1000 timesteps; it cannot sample in 1001" in said


def test_an_imported_artifact_is_not_trained_over(chain: Path):
    (chain / "imported").mkdir()
    (chain / "imported" / "artifact").symlink_to(chain / "runs/clip/artifact")
    said = run_command("train-clip", "run=imported", "data.path=data", *TINY["clip"], cwd=chain, code=1)
    assert "imported holds an artifact that was not trained there" in said


def test_verdict_and_report(chain: Path):
    run_command("unclip", "verdict", "--from", "runs", "--data", "data", "--out", "runs/verdict", cwd=chain)
    run_command("unclip", "report", "runs", "--seconds", "1", "--cpu-seconds", "2", "--minutes", "15", cwd=chain)
    summary = json.loads((chain / "runs/summary.json").read_text())
    assert set(summary["oracle"]) == {"on", "off", "true_embedding", "text_embedding", "caption_only"}
    assert all({"objects", "pairs", "relations"} <= set(row) for row in summary["oracle"].values())
    assert (summary["seconds"], summary["cpu_seconds"], summary["minutes"]) == (1, 2, 15)
    page = (chain / "runs/report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.split("</style>")[1].split("base64")[0]


def test_latents_are_measured_on_data_and_embeddings(chain: Path):
    def run(*arguments: object) -> dict:
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    runs = chain / "runs"
    told = run(
        "reconstruct",
        "--from",
        runs,
        "--data",
        chain / "data",
        "--num",
        4,
        "--steps",
        "2,4",
        "--captions",
        "--refinements",
        2,
    )
    assert (told["pictures"], told["size"], set(told["psnr_by_steps"])) == (4, 16, {"2", "4"})
    assert all(set(row) == {"inverted", "random"} for row in told["psnr_by_steps"].values())
    picture = chain / "picture.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    probe = (
        "pca-probe",
        picture,
        "--from",
        runs,
        "--out",
        chain / "pca",
        "--embeddings",
        runs / "embeddings",
        "--json",
    )
    told = run(*probe, "--components", "1,4,16", "--decoder-steps", 2)
    assert [row["components"] for row in told["by_components"]] == [1, 4, 16]
    assert [row["explained_variance"] for row in told["by_components"]][-1] == pytest.approx(1)
    assert told["by_components"][-1]["cosine"] == pytest.approx(1, abs=1e-4)
    assert told["by_components"][0]["cosine"] < told["by_components"][1]["cosine"] < 1
    assert Image.open(chain / "pca" / "pca.png").width > 4 * 96
    refused = CliRunner().invoke(app, [*map(str, probe), "--components", "17"])
    assert "--components 17 is not a list of numbers from 1 to 16, such as 20,40,80" in str(refused.exception)


def test_an_autoregressive_prior_takes_the_diffusion_priors_place(chain: Path):
    stored, small = "data.embeddings=runs/embeddings", TINY["ar_prior"]
    run_command("train-prior", "model=ar_prior", "run=ar/prior", "data.path=data", stored, *small, cwd=chain)
    manifest = json.loads((chain / "ar/prior/artifact/manifest.json").read_text())
    assert (manifest["kind"], manifest["model"]) == ("prior", "ar_prior")
    measured = manifest["metrics"]
    assert measured["val/cross_entropy"] > 0
    assert measured["val/nats_per_code"] > 0
    assert 0 <= measured["val/reconstruction_mse"] < 0.2
    assert 0.9 < measured["val/reconstruction_cosine"] <= 1
    for stage in ("clip", "decoder", "upsampler"):
        (chain / "ar" / stage).symlink_to(chain / "runs" / stage)
    generate = ["unclip", "generate", "a red cube", "--from", "ar", "--num", "1", "--candidates", "2", "--out"]
    run_command(*generate, "ar_out", "--prior-guidance", "2", cwd=chain)
    history = json.loads(Image.open(next((chain / "ar_out").glob("0*.png"))).info["unclip"])
    assert history["artifacts"]["prior"] == manifest["hash"]
    said = run_command(*generate, "y", "--prior-steps", "3", cwd=chain, code=1)
    assert "the prior of this chain (ar_prior) draws code by code, not in steps: leave out --prior-steps" in said


def test_stages_of_two_clips_are_refused(chain: Path):
    other = ["run=other/clip", "data.path=data", *TINY["clip"], "seed=1"]
    run_command("train-clip", *other, cwd=chain)
    for stage in ("prior", "decoder", "upsampler"):
        (chain / "other" / stage).symlink_to(chain / "runs" / stage)
    said = run_command("unclip", "generate", "a red cube", "--from", "other", "--out", "x", cwd=chain, code=1)
    assert "was trained on CLIP" in said
    assert "other/prior" in said
    assert "other/clip" in said
    assert not (chain / "x").exists()


def test_a_missing_stage_is_named(chain: Path, tmp_path: Path):
    said = run_command("unclip", "generate", "a red cube", "--from", str(tmp_path), "--out", "x", cwd=chain, code=1)
    assert "clip does not exist; give the run folder of a finished stage" in said
