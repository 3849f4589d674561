"""Fine-tuning a CLIP by the commands: adapters, sharpness-aware steps in parts, resuming, and the way back (WiSE-FT)."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests_support import TINY, run_command

from unclip import artifact
from unclip.data.shards import ShardWriter

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    run_command("unclip", "data", "shapes", "--out", "data", "--num", "64", "--size", "32", cwd=root)
    run_command("train-clip", "run=clip", "data.path=data", *TINY["clip"], cwd=root)
    clip, _ = artifact.load(root / "clip", kind="clip")
    save_file({k: v.contiguous() for k, v in clip.model.state_dict().items()}, root / "start.safetensors")
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


def test_lora_with_sam_in_parts_resumes_and_merges(root: Path):
    tune = ["model.pretrained=start.safetensors", "model.lora_rank=2", "trainer.accumulate=2", "optim.sam_rho=0.05"]
    tune = ["train-clip", "data.path=data", *TINY["clip"], *tune, "optim.layer_decay=0.8", "trainer.precision=fp32"]
    run_command(*tune, "run=whole", cwd=root)
    run_command(*tune, "run=parts", "trainer.max_steps=2", cwd=root)
    run_command(*tune, "run=parts", cwd=root)
    start, whole, parts = (weights(root / run) for run in ("clip", "whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert set(whole) == set(start)  # no adapters are left
    moved = {name for name in start if not torch.equal(start[name], whole[name])}
    assert "model.visual.transformer.resblocks.0.attn.in_proj_weight" in moved
    assert all("resblocks" in name or "logit_scale" in name for name in moved)
    clip, manifest = artifact.load(root / "whole", kind="clip")
    assert (clip.cfg.lora_rank, manifest.config["lora_rank"]) == (0, 0)
    assert manifest.settings["model"]["lora_rank"] == 2


def test_wise_ft_mixes_two_artifacts(root: Path):
    lock = ["model.pretrained=start.safetensors", "model.freeze_image=true"]
    run_command("train-clip", "data.path=data", *TINY["clip"], *lock, "run=lit", cwd=root)
    assert "wrote" in run_command("unclip", "wise-ft", "clip", "lit", "--share", "0.25", "--out", "mixed", cwd=root)
    said = run_command("unclip", "wise-ft", "clip", "lit", "--out", "lit", cwd=root, code=1)
    assert "error: --out lit is a training run, whose artifact this would replace" in said
    assert "A clip: model clip" in (root / "mixed" / "report.html").read_text()
    start, tuned, mixed = (weights(root / run) for run in ("clip", "lit", "mixed"))
    for name in mixed:
        torch.testing.assert_close(mixed[name], 0.75 * start[name] + 0.25 * tuned[name])
        assert torch.equal(start[name], tuned[name]) == name.startswith("model.visual.")
    _, manifest = artifact.load(root / "mixed", kind="clip")
    hashes = [artifact.read_manifest(root / run).hash for run in ("clip", "lit")]
    assert [manifest.parents["start"], manifest.parents["tuned"]] == hashes


def test_zero_shot_reads_classes_by_name_and_number(root: Path):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    for folder, labels in (("good", ["a red cube", 1, "a red cube", 0]), ("bad", ["a bear"])):
        with ShardWriter(root / folder) as writer:
            for i, label in enumerate(labels):
                writer.write(f"{i}", buffer.getvalue(), "", {"label": label})
    (root / "classes.txt").write_text("a red cube\n\na blue ball\n")
    given = ["unclip", "zero-shot", "--clip", "clip", "--classes", "classes.txt", "--data"]
    said = run_command(*given, "good", cwd=root)
    assert "4 pictures, 2 classes" in said
    shares = [line for line in said.splitlines() if line.startswith("top_")]
    assert len(shares) == 1  # 5 of 2 classes would say nothing
    assert "75.0 %" in shares[0] or "25.0 %" in shares[0]  # equal pictures get one class
    said = run_command(*given, "bad", cwd=root, code=1)
    assert "sample 0 has label='a bear' in its metadata, which is none of the classes" in said
