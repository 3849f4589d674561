"""Several gloo ranks against one process on the same global batches: weights, figures of validation, checkpoints, artifacts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import train_all
from safetensors.torch import load_file
from tests_support import TINY, environment, run_command
from torch.testing import assert_close

from unclip import artifact
from unclip.stages.parts import read_checkpoint

pytestmark = pytest.mark.timeout(900)
STEPS = 10
HALFWAY = STEPS // 2
# eps: a gradient that is zero but for rounding must not become a whole step of Adam's
COMMON = ["data.path=data", "trainer.precision=fp32", "optim.eps=1e-4", "trainer.accelerator=cpu", "logger=none"]
COMMON += [f"trainer.max_steps={STEPS}", "data.max_val=7"]
COMMON += [f"trainer.{what}_every={HALFWAY}" for what in ("val", "sample", "checkpoint", "log")]
EMBEDDED = ["data.embeddings=embeddings"]
SPLIT = ["model.net.dropout=0", "model.split=0.3"]
LAST = "channels:[8,16],num_blocks:1,groups:8,attention_levels:[1],head_dim:16"  # beside a net that stays as it is
CASES: dict[str, tuple[str, list[str]]] = {
    "clip": ("clip", []),
    "clip-parts": ("clip", ["trainer.accumulate=2"]),
    "clip-sigmoid": ("clip", ["model.contrast=sigmoid"]),
    "clip-sigmoid-parts": ("clip", ["model.contrast=sigmoid", "trainer.accumulate=2"]),
    "clip-locked": ("clip", ["model.freeze_image=true", "model.gradient_checkpointing=true"]),
    "prior": ("prior", [*EMBEDDED, "model.num_draws=2", "model.net.depth=2"]),
    "ar_prior": ("prior", ["model=ar_prior", *EMBEDDED, "model.net.depth=2", "model.sampling.guidance_scale=2"]),
    "decoder": ("decoder", [*EMBEDDED, "model.net.dropout=0", "model.net.gradient_checkpointing=true"]),
    "decoder-second": ("decoder", [*EMBEDDED, *SPLIT, f"model.last_net={{{LAST}}}", "model.first=half"]),
    "upsampler": ("upsampler", ["trainer.accumulate=2"]),
}

# also in bfloat16, where this loss is compared
HALF = {"clip-parts": "contrastive", "prior": "mse", "ar_prior": "cross_entropy", "decoder": "mse", "upsampler": "mse"}


def runs(strategy: str, ranks: int, cases: list[str], *more: str, folder: str = "") -> list[tuple[str, list[str]]]:
    """One run of each case, in the folder STRATEGY-RANKS/CASE or FOLDER/CASE."""
    given = [*more, f"trainer.strategy={strategy}", f"trainer.devices={ranks}"]
    folder = folder or f"{strategy}-{ranks}"
    return [
        (stage, [f"run={folder}/{case}", *TINY.get(case, TINY[stage]), *COMMON, *own, *given])
        for case, (stage, own) in CASES.items()
        if case in cases
    ]


def on_ranks(ranks: int, planned: list[tuple[str, list[str]]], cwd: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = Path(__file__).with_name("ranks.py")
    done = subprocess.run(
        [*command, script, json.dumps(planned)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, embeddings, and each case trained by one process and by two, with DDP and with FSDP2."""
    root = tmp_path_factory.mktemp("ranks")
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train_all([("clip", ["run=first", "data.path=data", *TINY["clip"], "logger=none", "trainer.accelerator=cpu"])])
        run_command("unclip-embed", "run=embeddings", "clip=first", "data=data", cwd=root)
        train_all([("decoder", ["run=half", *TINY["decoder"], *COMMON, *EMBEDDED, *SPLIT])])
        train_all(runs("auto", 1, list(CASES)))
        half, resumed = f"trainer.max_steps={HALFWAY}", ["clip-sigmoid", "decoder"]
        train_all(runs("auto", 1, resumed, half, folder="one-then-fsdp2"))
        planned = runs("fsdp2", 2, resumed, half) + runs("fsdp2", 2, list(CASES)) + runs("ddp", 2, list(CASES))
        planned += runs("fsdp2", 2, resumed, folder="one-then-fsdp2")
        planned += runs("fsdp2", 2, ["clip-sigmoid"], half, folder="fsdp2-then-one")
        planned += runs("fsdp2", 2, ["decoder"], half, "trainer.checkpoint=full", folder="fsdp2-then-one")
        planned += runs("fsdp2", 2, list(HALF), "trainer.precision=bf16", folder="bf16")
        on_ranks(2, planned, root)
        train_all(runs("auto", 1, resumed, folder="fsdp2-then-one"))
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


def assert_same_run(run: Path, one: Path) -> None:
    """Averaged and trained weights, optimiser, and figures of validation, to 1e-5."""
    found, wanted = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, one))
    assert found["global_step"] == STEPS
    pairs = [(weights(run), weights(one)), (found["state_dict"], wanted["state_dict"])]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (found, wanted)]
    assert set(states[0]) == set(states[1])
    pairs += [(states[0][number], states[1][number]) for number in states[1]]
    for ours, theirs in pairs:
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{run}: {name}: {text}")
    ours, theirs = (artifact.read_manifest(folder).metrics for folder in (run, one))
    for name in theirs.keys() - {"seconds"}:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), f"{run}: {name}"
    ours, theirs = (figures(folder) for folder in (run, one))
    assert (STEPS, "train/lr") in ours.keys() & theirs.keys()
    for key in ours.keys() & theirs.keys():  # a resumed run may validate at other steps
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), f"{run}: {key}"


MACHINE = ("samples_per_second", "data_wait_share", "share_of_peak", "memory_gb")  # figures that tell of the machine


def figures(run: Path) -> dict[tuple[int, str], float]:
    """What metrics.jsonl says of each step, by step and name."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = {"step", "seconds", *(f"train/{name}" for name in MACHINE)}
    return {(row["step"], name): value for row in rows for name, value in row.items() if name not in timed}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_and_report_as_one_process_does(strategy: str, case: str, root: Path) -> None:
    assert_same_run(root / f"{strategy}-2" / case, root / "auto-1" / case)
    model, _ = artifact.load(root / f"{strategy}-2" / case)
    assert any(p.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("case", ["clip-sigmoid", "decoder"])
@pytest.mark.parametrize("way", ["one-then-fsdp2", "fsdp2-then-one"])
def test_a_run_goes_on_with_another_strategy_and_number_of_ranks(way: str, case: str, root: Path) -> None:
    assert_same_run(root / way / case, root / "auto-1" / case)


@pytest.mark.parametrize("case", HALF)
def test_sharded_blocks_in_bfloat16_learn_as_in_float32(case: str, root: Path) -> None:
    ours, theirs = (figures(root / folder / case) for folder in ("bf16", "auto-1"))
    loss = f"val/{HALF[case]}"
    for step in (HALFWAY, STEPS):
        assert ours[step, loss] == pytest.approx(theirs[step, loss], rel=0.01)
        assert ours[step, loss] != theirs[step, loss], "nothing was computed in bfloat16"


def test_each_rank_of_fsdp2_writes_its_share_and_the_last_one_stays(root: Path) -> None:
    """Two files of about half the size each; nothing of earlier steps."""
    for case in ("decoder", "clip"):
        last, folder = sorted((root / "fsdp2-2" / case / "checkpoints").iterdir())
        assert (last.name, folder.name[:14]) == ("last.ckpt", f"parts-{STEPS:08d}")
        sizes = [path.stat().st_size for path in folder.iterdir()]
        assert len(sizes) == 2
        assert max(sizes) < 0.6 * sum(sizes)
    assert not list((root / "fsdp2-then-one").glob("*/checkpoints/parts-*")), "one process wrote the last one"


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_twice_the_ranks(root: Path) -> None:
    cases = ["clip-sigmoid", "decoder"]
    on_ranks(2, runs("fsdp2", 2, cases, f"trainer.max_steps={HALFWAY}", folder="two-then-four"), root)
    on_ranks(4, runs("fsdp2", 4, cases, folder="two-then-four"), root)
    for case in cases:
        assert_same_run(root / "two-then-four" / case, root / "auto-1" / case)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_ranks_that_are_stopped_and_resumed_end_with_the_very_same_weights(strategy: str, root: Path) -> None:
    """Four: the order of a sum of two ranks' gradients changes nothing."""
    short = [f"trainer.max_steps={n}" for n in (1, 4, HALFWAY)]
    cases = ["clip", "upsampler"]
    on_ranks(4, runs(strategy, 4, cases, folder=f"calm-{strategy}"), root)
    for limit in [*short, f"trainer.max_steps={STEPS}"]:
        on_ranks(4, runs(strategy, 4, cases, limit, folder=f"cut-{strategy}"), root)
    for case in cases:
        calm, cut = (root / f"{way}-{strategy}" / case for way in ("calm", "cut"))
        assert (cut / "artifact" / "weights.safetensors").read_bytes() == (
            calm / "artifact" / "weights.safetensors"
        ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_ranks_train_and_report_as_one_process_does(strategy: str, root: Path) -> None:
    cases = [case for case in CASES if case != "clip-locked"]
    on_ranks(4, runs(strategy, 4, cases), root)
    for case in cases:
        assert_same_run(root / f"{strategy}-4" / case, root / "auto-1" / case)


def test_a_command_with_two_ranks_logs_once_and_outlives_them(tmp_path: Path) -> None:
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "32", "--size", "32", cwd=tmp_path)
    given = ["run=two-ranks", "data.path=data", *TINY["upsampler"], "trainer.devices=2", "trainer.accelerator=cpu"]
    said = run_command("train-upsampler", *given, cwd=tmp_path)
    left = [path for path in Path("/proc").glob("[0-9]*") if str(tmp_path) in _cwd(path)]
    assert left == []
    for line in ("data ", "parameters, from step 0", "4 steps in"):
        assert said.count(line) == 1, said


def _cwd(process: Path) -> str:
    try:
        return os.readlink(process / "cwd")
    except OSError:  # it has ended, or is another user's
        return ""
