"""The benchmarks of the prior at their smallest: they run, and say what they promise. No test reads a time."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_scripts import BENCH, PEER, module, smoke
from tests_support import lacks

from unclip.data.embeddings_writer import EmbeddingsWriter
from unclip.models.interface import Interface


def ratios_against(peer: str) -> set[str]:
    sampling = {"sampling_vs_", "sampling_77_vs_", "draws_vs_"}
    training = {f"train_step_{kind}vs_" for kind in ("", "emoji_", "coco_", "77_")}
    memory = {f"memory_{task}_vs_" for task in ("sample", "train_step", "train_step_77")}
    return {name + peer for name in sampling | training | memory}


@pytest.mark.slow
def test_prior_measures_every_ratio_at_equal_parameters():
    if not PEER.exists():
        lacks("peer", "dalle2-pytorch's environment is missing: make .venv-peer/ready")
    _, found = smoke("prior")
    assert ratios_against("dalle2_pytorch") | ratios_against("diffusers") <= set(found)
    built = found["settings"]["built"]
    assert built["diffusers"] == built["unclip"]
    assert built["dalle2_pytorch"]["parameters"] == pytest.approx(built["unclip"]["parameters"], rel=0.03)


@pytest.mark.slow
def test_prior_runs_without_the_peer(tmp_path: Path):
    folder = tmp_path / "scripts" / "bench"  # of a checkout that has no .venv-peer
    folder.mkdir(parents=True)
    for name in ("prior.py", "peer_worker.py", "turns.py"):
        (folder / name).write_text((BENCH / name).read_text())
    done, found = smoke("prior", folder=folder, UNCLIP_REQUIRE="")
    assert "make it with: make .venv-peer/ready" in done.stderr
    assert ratios_against("diffusers") <= set(found)
    assert not ratios_against("dalle2_pytorch") & set(found)


def test_a_required_peer_that_is_missing_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    prior = module("prior", monkeypatch)
    monkeypatch.setattr(prior, "PEER_PYTHON", tmp_path / "python")
    monkeypatch.setenv("UNCLIP_REQUIRE", "peer,diffusers")
    with pytest.raises(SystemExit, match=r"UNCLIP_REQUIRE asks for the peer; make it with: make \.venv-peer/ready"):
        prior.has_peer()


def test_sides_of_unequal_size_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    prior = module("prior", monkeypatch)

    class Fake:
        def __init__(self, parameters: int) -> None:
            self.parameters = parameters

        def ask(self, what: str, shape: dict[str, int]) -> dict[str, int]:
            return {"parameters": self.parameters}

    def build(theirs: int) -> dict:
        return prior.build({"unclip": Fake(1000), "diffusers": Fake(theirs)}, prior.SIZES["smoke"])

    assert build(1030)["diffusers"]["parameters"] == 1030
    with pytest.raises(SystemExit, match=r"parameters differ by more than 3%.*1031.*change SIZES"):
        build(1031)


def test_captions_have_the_stated_lengths(monkeypatch: pytest.MonkeyPatch):
    prior = module("prior", monkeypatch)
    emoji, coco = (prior.caption_lengths(kind, 20_000) for kind in ("emoji", "coco"))
    assert (min(emoji), max(emoji)) == (7, 22)
    assert np.mean(emoji) == pytest.approx(12.68, abs=0.1)
    assert np.mean(coco) == pytest.approx(12, abs=0.1)
    assert prior.caption_lengths("full", 2) == [77, 77]


def test_a_side_that_fails_says_why(monkeypatch: pytest.MonkeyPatch):
    prior = module("prior", monkeypatch)
    side = prior.Side("unclip", sys.executable)
    try:
        with pytest.raises(RuntimeError, match=r"(?s)unclip side stopped at 'build'.*not divisible by num_heads=3"):
            side.ask("build", shape={"width": 64, "depth": 1, "heads": 3, "draws": 2, "threads": 1})
    finally:
        side.close()


def test_every_side_counts_and_ranks_alike(monkeypatch: pytest.MonkeyPatch):
    worker = module("peer_worker", monkeypatch)
    captions = worker.Captions([5, 77], 16, torch.device("cpu"))
    assert captions.mask.sum(1).tolist() == [5, 77]
    assert captions.states[0, 5:].abs().sum() == 0
    assert (captions.tokens.argmax(1) + 1).tolist() == [5, 77]
    drawn = torch.stack([captions.text_emb[0], -captions.text_emb[0], -captions.text_emb[1], captions.text_emb[1]])
    torch.testing.assert_close(captions.closest(drawn, 2), captions.unit_text)


def test_draws_prints_a_table_and_the_figures():
    done, found = smoke("draws", "--seeds", "2")
    assert {f"loss_{k}" for k in (1, 2, 4, 8)} | {f"cosine_{k}" for k in (1, 2, 4, 8)} <= set(found)
    assert {"speedup_2", "speedup_4", "speedup_8"} <= set(found)
    assert [line.split()[0] for line in done.stdout.splitlines()[:5]] == ["K", "1", "2", "4", "8"]
    cells = found["settings"]["curves"]
    assert [(cell["draws"], cell["seed"]) for cell in cells] == [(k, seed) for seed in (0, 1) for k in (1, 2, 4, 8)]
    starts = {(cell["seed"], *cell["seconds_loss_cosine"][0]) for cell in cells}
    assert len(starts) == 2, "cells of one seed must begin with the same weights and be judged alike"
    for cell in cells:
        assert cell["steps"] > 0
        assert cell["seconds_loss_cosine"][-1][0] >= 0.4


@pytest.mark.parametrize("wrong", [("--seeds", "0"), ("--batch-size", "0"), ("--seconds", "0"), ("--slices", "-1")])
def test_draws_refuses_useless_numbers(wrong: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys):
    draws = module("draws", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["draws.py", *wrong])
    with pytest.raises(SystemExit):
        draws.arguments()
    assert "must be positive" in capsys.readouterr().err


def test_draws_reads_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interface = Interface(embed_dim=8, text_width=8, context_length=6, vocab_size=20, clip="c" * 64)
    random = np.random.default_rng(0)
    expected = {}
    for split, count in (("train", 10), ("val", 4)):
        tokens = np.array([[1, 2, 19, 0, 0, 0]] * count, dtype=np.int32)
        columns = {"image_emb": random.normal(size=(count, 8)).astype(np.float32), "tokens": tokens}
        columns["text_emb"] = random.normal(size=(count, 8)).astype(np.float32)
        expected[split] = columns
        write(tmp_path, split, interface, columns)
    found, train, val = module("draws", monkeypatch).load(tmp_path)
    assert found == interface
    for rows, split in ((train, "train"), (val, "val")):
        np.testing.assert_array_equal(rows.image_emb.numpy(), expected[split]["image_emb"])
        np.testing.assert_array_equal(rows.tokens.numpy(), expected[split]["tokens"])
    batch = train.batch(torch.tensor([3, 1]), [0, 1])
    assert batch.column("tokens").tolist() == [[1, 2, 19]] * 2
    np.testing.assert_array_equal(batch.column("text_emb").numpy(), expected["train"]["text_emb"][[3, 1]])


def write(folder: Path, split: str, interface: Interface, columns: dict[str, np.ndarray]) -> None:
    count = len(columns["tokens"])
    writer = EmbeddingsWriter(folder, split, interface, list(columns), "float32")
    writer.write("00000", "d" * 64, [f"{i}" for i in range(count)], columns)

    class Shards:
        names, shard_sizes, fingerprint, text_fingerprint = ["00000.tar"], [count], "f", "t"

    writer.finish(Shards())  # pyright: ignore[reportArgumentType]  all that finish reads


def test_the_time_to_a_loss_lies_on_the_line_between_two_points(monkeypatch: pytest.MonkeyPatch):
    draws = module("draws", monkeypatch)
    curve = [draws.Point(0.0, 1.0, 0.0), draws.Point(10.0, 0.5, 0.0), draws.Point(20.0, 0.4, 0.0)]
    assert draws.time_to(curve, 0.75) == pytest.approx(5.0)
    assert draws.time_to(curve, 0.4) == pytest.approx(20.0)
    assert draws.time_to(curve, 0.1) == float("inf")
