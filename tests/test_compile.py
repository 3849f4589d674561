"""``trainer.compile``: the same losses as without it. Minutes, for torch compiles C++ here."""

import json
from pathlib import Path

import pytest
import torch
from tests_support import TINY, run_command

from unclip.diffusion.noise import Noise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_draws_of_several_lengths_are_the_same_in_compiled_code():
    """As graphs they were not: the third one took the strides of the second."""

    def draw(noise: Noise) -> list[torch.Tensor]:
        return [noise.uniform((), "a"), noise.uniform((2,), "b"), noise.normal((3, 8, 8), "c")]

    noise = Noise.at(0, range(8))
    for ours, theirs in zip(draw(noise), torch.compile(draw)(noise), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compile")
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=root)
    run_command("train-clip", "run=clip", "data.path=data", *TINY["clip"], "trainer.max_steps=2", cwd=root)
    run_command("unclip-embed", "run=embeddings", "clip=clip", "data=data", cwd=root)
    return root


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler"])
def test_a_compiled_stage_trains_as_the_plain_one(stage: str, data: Path):
    given = [f"train-{stage}", "data.path=data", *TINY[stage], "trainer.max_steps=6", "trainer.precision=fp32"]
    given += ["data.embeddings=embeddings"] if stage in ("prior", "decoder") else []
    found = []
    for way in ("false", "true"):
        run_command(*given, f"run={stage}-{way}", f"trainer.compile={way}", cwd=data, seconds=1500)
        rows = [json.loads(line) for line in (data / f"{stage}-{way}/metrics.jsonl").read_text().splitlines()]
        found.append([(row["step"], row["train/grad_norm"]) for row in rows if "train/grad_norm" in row])
    assert len(found[0]) >= 2
    for (step, plain), (same, compiled) in zip(*found, strict=True):
        assert step == same
        assert compiled == pytest.approx(plain, rel=1e-2)  # AdamW makes much of rounding where gradients begin at zero
