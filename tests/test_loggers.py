"""What a run logs, and at which step."""

import csv
import json
from pathlib import Path

from test_checkpoint import cfg  # noqa: F401  the fixture

from unclip.train import ClipTrainConfig, train


def test_steps_and_figures_of_jsonl_and_csv(cfg: ClipTrainConfig):  # noqa: F811
    train(cfg)
    run = Path(cfg.run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "train/contrastive" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/contrastive" in row] == [2, 4, 6], "a validation stands at its step"
    for row in losses:
        assert row["train/share_of_peak"] > 0
        assert 0 <= row["train/data_wait_share"] <= 1
        assert 0.01 < row["train/memory_gb"] < 100
        assert row["train/grad_norm"] > 0
        assert row["train/samples_per_second"] > 0
    with (run / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items() if value} for row in table] == rows
    assert json.loads((run / "heartbeat.json").read_text())["step"] == 6
