"""A decoder of two nets, from two training runs to a picture, by the commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests_support import TINY, kill_beyond, run_command

from unclip import artifact
from unclip.errors import ArtifactError
from unclip.models.decoder import Decoder
from unclip.pipeline import UnCLIP

LAST = "model.last_net={channels:[8,16],num_blocks:1,groups:8,attention_levels:[1],head_dim:16}"
SPLIT = ["data.path=data", "data.embeddings=embeddings", *TINY["decoder"], "model.split=0.3"]


def weights(run: Path) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in artifact.read_weights(run).items()}


@pytest.fixture(scope="module")
def chain(styled_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The styled chain with a decoder of two nets; runs/half is its first net's run."""
    root = tmp_path_factory.mktemp("split") / "chain"
    shutil.copytree(styled_chain, root)
    shutil.rmtree(root / "runs/decoder")
    run_command("train-decoder", "run=half", *SPLIT, cwd=root)
    run_command("train-decoder", "run=runs/decoder", *SPLIT, LAST, "model.first=half", cwd=root)
    return root


def test_the_chain_draws_with_both_nets(chain: Path):
    half, _ = artifact.load(chain / "half", kind="decoder")
    pipeline = UnCLIP.load(chain / "runs")
    decoder = pipeline.models["decoder"]
    assert isinstance(decoder, Decoder)
    assert isinstance(half, Decoder)
    assert all(value.equal(half.net.state_dict()[name]) for name, value in decoder.net.state_dict().items())
    assert decoder.last_net is not None
    pictures = [picture.image for picture in pipeline.generate(["thing 1, grey style"], num=2)]
    assert [tuple(picture.shape) for picture in pictures] == [(3, 32, 32)] * 2
    assert not torch.equal(*pictures)
    drawn = next(iter(pipeline.vary(pictures[0][None], num=1)))
    assert tuple(drawn.image.shape) == (3, 32, 32)


def test_half_a_decoder_is_refused_with_what_to_do(chain: Path, tmp_path: Path):
    for name in ("clip", "prior"):
        shutil.copytree(chain / "runs" / name, tmp_path / name)
    shutil.copytree(chain / "half", tmp_path / "decoder")
    said = run_command("unclip", "generate", "a thing", "--from", str(tmp_path), "--out", "out", cwd=tmp_path, code=1)
    assert "draws the noisier 70% of the steps only" in " ".join(said.split())
    assert "model.first and model.last_net" in " ".join(said.split())


def test_a_killed_run_of_the_second_net_ends_as_an_undisturbed_one_though_the_first_is_gone(
    chain: Path, tmp_path: Path
):
    root = tmp_path / "chain"
    shutil.copytree(chain, root)
    run = ["train-decoder", "run=again", *SPLIT, LAST, "model.first=half", "trainer.max_steps=4"]
    kill_beyond(1, root / "again/checkpoints/last.ckpt", run, root)
    shutil.rmtree(root / "half")
    run_command(*run, cwd=root)
    assert weights(root / "again") == weights(root / "runs/decoder")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.last_net.widht=1", "widht"),
        ("model.first=half", "give the second net's shape in last_net"),
        ("model.split=0", "set split, or last_net=null"),
    ],
)
def test_bad_settings_are_named(chain: Path, override: str, message: str):
    last = [] if override.startswith("model.first") else [LAST]
    said = run_command("train-decoder", "run=bad", *SPLIT, *last, override, cwd=chain, code=1)
    assert message in " ".join(said.split())
    assert not (chain / "bad/identity.json").exists()


def test_tuning_takes_both_nets_or_only_the_first_and_not_the_first_ones_run(chain: Path, tmp_path: Path):
    root = tmp_path / "chain"
    shutil.copytree(chain, root)
    shutil.rmtree(root / "half")
    start = ["data.path=data", "data.embeddings=embeddings", "init=runs/decoder", "trainer.max_steps=1"]
    run_command("train-decoder", "run=tuned", *start, cwd=root)
    before, after = weights(root / "runs/decoder"), weights(root / "tuned")
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed
    assert all(name.startswith("last_net.") for name in changed)
    run_command("train-decoder", "run=first", *start, "model.last_net=null", cwd=root)
    first = weights(root / "first")
    assert all(name.startswith("net.") for name in first)
    assert first != {name: before[name] for name in first}
    run_command("train-decoder", "run=joined", *start, "model.first=first", cwd=root)
    assert {name: value for name, value in weights(root / "joined").items() if name.startswith("net.")} == first
    said = run_command("train-decoder", "run=other", *start, "model.split=0.1", cwd=root, code=1)
    assert "cannot differ from it in sizes, net, condition, diffusion or split" in " ".join(said.split())


def test_the_artifact_names_the_first_net_among_its_parents(chain: Path):
    parents = artifact.read_manifest(chain / "runs/decoder").parents
    assert parents["first"] == artifact.read_manifest(chain / "half").hash
    assert set(parents) == {"clip", "first"}


def test_half_a_decoder_is_neither_pushed_nor_exported(chain: Path, tmp_path: Path):
    manifest = artifact.read_manifest(chain / "half")
    with pytest.raises(ArtifactError, match="draws the noisier 70% of the steps only"):
        artifact.refuse_half(manifest, chain / "half")
    artifact.refuse_half(artifact.read_manifest(chain / "runs/decoder"), chain / "runs/decoder")
    said = run_command("unclip", "export", "onnx", str(chain / "half"), "--out", "onnx", cwd=tmp_path, code=1)
    assert "of the steps only" in " ".join(said.split())
    push = ["somebody/something", "--license", "mit", "--dry-run", "pushed"]
    said = run_command("unclip", "push", str(chain / "half"), *push, cwd=tmp_path, code=1)
    assert "of the steps only" in " ".join(said.split())


def test_both_nets_are_exported_with_the_timesteps_of_each(chain: Path, tmp_path: Path):
    run_command("unclip", "export", "onnx", str(chain / "runs/decoder"), "--out", "onnx", cwd=tmp_path)
    index = json.loads((tmp_path / "onnx/index.json").read_text())
    assert {name: about["timesteps"] for name, about in index.items()} == {
        "decoder.onnx": [300, 999],
        "decoder_last.onnx": [0, 299],
    }


def test_adapters_of_low_rank_belong_to_the_second_net(chain: Path):
    start = ["data.path=data", "data.embeddings=embeddings", "init=runs/decoder", "trainer.max_steps=1"]
    run_command("train-decoder", "run=lora", *start, "lora_rank=2", cwd=chain)
    before, after = weights(chain / "runs/decoder"), weights(chain / "lora")
    assert {name.partition(".")[0] for name, value in after.items() if value != before[name]} == {"last_net"}
