"""`unclip measure`, and the commands that bring in a user's own pictures, as a user runs them."""

import json
from pathlib import Path

import pytest
from styled_data import png
from tests_support import run_command

pytestmark = pytest.mark.timeout(280)


def test_measure_writes_every_number_where_the_report_reads_it(styled_chain: Path) -> None:
    given = ["unclip", "measure", "--from", "runs", "--data", "data", "--num", "8", "--batch-size", "4"]
    said = run_command(*given, "--judge", "runs/judge", cwd=styled_chain)
    found = json.loads((styled_chain / "runs" / "measures.json").read_text())
    assert all(name in said for name in found)
    shares = ("clip_recall_at_1", "generated_recall_at_1", "style_accuracy", "style_classifier_accuracy")
    assert all(0 <= found[name] <= 1 for name in shares)
    assert found["style_classifier_accuracy"] == 1.0, "grey and coloured noise are easily told apart"
    assert found["clip_recall_concepts"] == 12
    assert found["kid"] > 5 * abs(found["kid_error"]), "an untrained chain draws nothing like the real pictures"
    run_command("unclip", "report", "runs", cwd=styled_chain)
    summary = json.loads((styled_chain / "runs" / "summary.json").read_text())
    assert {name: summary[name] for name in found} == found


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
