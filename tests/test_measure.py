"""`unclip measure`, and the commands that bring in a user's own pictures, as a user runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from styled_data import png
from tests_support import run_command
from torch import Tensor

from unclip.cli.measure import Yardstick, draw, measure, pictures_of
from unclip.config import Precision
from unclip.data.shards import Shards
from unclip.pipeline import UnCLIP

pytestmark = pytest.mark.timeout(280)


NAMES = {
    *(
        "kid",
        "kid_error",
        "kid_true_embedding",
        "kid_true_embedding_error",
        "kid_blurred",
        "kid_blurred_error",
        "kid_pictures",
    ),
    *("style_accuracy", "style_classifier_accuracy", "clip_recall_at_1", "clip_recall_concepts"),
    *("clip_recall_unseen_at_1", "clip_recall_unseen_concepts"),
    *("generated_recall_at_1", "generated_recall_concepts", "real_recall_at_1"),
}


def test_measure_writes_every_number_where_the_report_reads_it(styled_chain: Path) -> None:
    given = ["unclip", "measure", "--from", "runs", "--data", "data", "--num", "8", "--batch-size", "4"]
    said = run_command(*given, "--judge", "runs/judge", cwd=styled_chain)
    found = json.loads((styled_chain / "runs" / "measures.json").read_text())
    assert all(name in said for name in found)
    assert set(found) == NAMES
    assert (found["kid_pictures"], found["clip_recall_unseen_concepts"]) == (8, 8)
    shares = ("clip_recall_at_1", "generated_recall_at_1", "style_accuracy", "style_classifier_accuracy")
    assert all(0 <= found[name] <= 1 for name in shares)
    assert found["style_classifier_accuracy"] == 1.0, "grey and coloured noise are easily told apart"
    assert found["clip_recall_concepts"] == 12
    assert found["kid"] > 5 * abs(found["kid_error"]), "an untrained chain draws nothing like the real pictures"
    run_command("unclip", "report", "runs", cwd=styled_chain)
    summary = json.loads((styled_chain / "runs" / "summary.json").read_text())
    assert {name: summary[name] for name in found} == found


def test_each_figure_is_of_the_pictures_that_its_name_says(styled_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Tensor] = []
    styles: list[Tensor] = []

    def noted(where: list[Tensor], answer: Any) -> Any:
        return lambda self, drawn: where.append(drawn) or answer

    monkeypatch.setattr(Yardstick, "kid", noted(looked, (1.0, 0.1)))
    monkeypatch.setattr(Yardstick, "style_accuracy", noted(styles, 0.5))
    runs, data = styled_chain / "runs", styled_chain / "data"
    found = measure(runs, data, styled_chain / "runs/judge", num=8, seed=3, batch_size=4)
    pipeline = UnCLIP.load(runs, precision=Precision.bf16)
    test, styled = (Shards(data / split).spread(8) for split in ("test", "test_styles"))
    drawn, true, blurred = looked
    assert torch.equal(drawn, draw(pipeline, test, 3, 4))
    assert torch.equal(true, draw(pipeline, test, 3, 4, true=True))
    assert not torch.equal(drawn, true)
    kernel = torch.exp(-(torch.arange(-6, 7.0) ** 2) / (2 * 2.0**2))  # sigma 2, to three of it
    kernel = kernel[:, None] * kernel / kernel.sum() ** 2
    real = F.pad(pictures_of(test, pipeline.size).float(), (6,) * 4, mode="reflect")
    wanted = F.conv2d(real, kernel.expand(3, 1, 13, 13), groups=3)
    assert (blurred.float() - wanted).abs().max() <= 0.6  # rounded to whole levels
    assert torch.equal(styles[0], draw(pipeline, styled, 3, 4))
    assert torch.equal(styles[1], pictures_of(styled, pipeline.size))
    assert found["kid_pictures"] == 8


def test_a_judge_that_belongs_to_the_chain_is_refused(styled_chain: Path) -> None:
    given = ["unclip", "measure", "--from", "runs", "--data", "data", "--judge", "runs/clip"]
    assert "trained with another seed" in run_command(*given, cwd=styled_chain, code=1)


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
