"""`unclip measure`, and the commands that bring in a user's own pictures, as a user runs them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests_support import TINY, run_command

from unclip.data.shards import ShardWriter

pytestmark = pytest.mark.timeout(280)


def png(seed: int, grey: bool) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("L" if grey else "RGB").convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measure")
    for number, (split, count) in enumerate({"train": 24, "val": 8, "test": 8, "test_styles": 8}.items()):
        with ShardWriter(root / "data" / split) as writer:
            for i in range(count):
                style = ("grey", "colour")[i % 2]
                meta = {"style": style, "concept": f"{split} {i // 2}"}
                writer.write(f"{i:04d}", png(100 * number + i, style == "grey"), f"thing {i // 2}, {style} style", meta)
    run_command("train-clip", "run=runs/clip", "data.path=data", *TINY["clip"], cwd=root)
    run_command("train-clip", "run=runs/judge", "seed=1", "data.path=data", *TINY["clip"], cwd=root)
    run_command("unclip-embed", "run=embeddings", "clip=runs/clip", "data=data", cwd=root)
    embedded = ["data.path=data", "data.embeddings=embeddings"]
    run_command("train-prior", "run=runs/prior", *embedded, *TINY["prior"], cwd=root)
    run_command("train-decoder", "run=runs/decoder", *embedded, *TINY["decoder"], cwd=root)
    run_command("train-upsampler", "run=runs/upsampler", "data.path=data", *TINY["upsampler"], cwd=root)
    return root


def test_measure_writes_every_number_where_the_report_reads_it(chain: Path) -> None:
    given = ["unclip", "measure", "--from", "runs", "--data", "data", "--num", "8", "--batch-size", "4"]
    said = run_command(*given, "--judge", "runs/judge", cwd=chain)
    found = json.loads((chain / "runs" / "measures.json").read_text())
    assert all(name in said for name in found)
    shares = ("clip_recall_at_1", "generated_recall_at_1", "style_accuracy", "style_classifier_accuracy")
    assert all(0 <= found[name] <= 1 for name in shares)
    assert found["style_classifier_accuracy"] == 1.0, "grey and coloured noise are easily told apart"
    assert found["clip_recall_concepts"] == 12
    assert found["kid"] > 5 * abs(found["kid_error"]), "an untrained chain draws nothing like the real pictures"
    run_command("unclip", "report", "runs", cwd=chain)
    summary = json.loads((chain / "runs" / "summary.json").read_text())
    assert {name: summary[name] for name in found} == found


def test_a_judge_that_belongs_to_the_chain_is_refused(chain: Path) -> None:
    given = ["unclip", "measure", "--from", "runs", "--data", "data", "--judge", "runs/clip"]
    assert "trained with another seed" in run_command(*given, cwd=chain, code=1)


def test_folder_and_check_as_a_user_runs_them(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for i in range(6):
        (tmp_path / "mine" / f"{i}.png").write_bytes(png(i, False))
        (tmp_path / "mine" / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "mine" / "bad.jpg").write_bytes(b"no picture")
    said = run_command("unclip", "data", "folder", "mine", "--out", "data", "--val", "0", cwd=tmp_path)
    assert "train: 6 pictures" in said
    assert "bad.jpg" in said
    assert "6 good samples, index verified" in run_command("unclip", "data", "check", "data", cwd=tmp_path)
    shard = tmp_path / "data" / "train" / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"picture 3", b"         "))
    said = run_command("unclip", "data", "check", "data", cwd=tmp_path, code=1)
    assert "empty caption" in said
    assert "differs" in said
