"""``unclip-evaluate KIND``: measure a trained stage on data that it did not see, and write down what was found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from unclip.cli.evaluate_pictures import PictureEvaluateConfig, evaluate_pictures
from unclip.cli.origin import origin
from unclip.config import typed
from unclip.drafts import write_atomic
from unclip.evaluation.prior import PriorEvaluateConfig, evaluate_prior
from unclip.report.run import report_quietly
from unclip.run_lock import RunLock

EVALUATIONS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "prior": (PriorEvaluateConfig, evaluate_prior),
    "pictures": (PictureEvaluateConfig, evaluate_pictures),
    "coco": (PictureEvaluateConfig, evaluate_pictures),  # presets of pictures
    "coco_filtered": (PictureEvaluateConfig, evaluate_pictures),
}
FILE = "evaluation.json"
GOOD = {  # what to compare a measure with
    "cosine_to_true": "the higher the better",
    "cosine_to_text": "near cosine_text_to_true",
    "cosine_text_to_true": "a property of CLIP and the data",
    "cosine_difference": "near 0",
    "cosine_to_unrelated": "near cosine_true_to_unrelated",
    "cosine_true_to_unrelated": "a property of CLIP and the data",
    "cosine_to_unrelated_text": "far below cosine_to_text",
    "recall_1": "above recall_by_text_1",
    "recall_5": "above recall_by_text_5",
    "recall_10": "above recall_by_text_10",
    "diversity": "0: always the same z_i",
    "diversity_ratio": "1: samples vary as the truth does",
    "nats_per_code": "below ln num_buckets, which is chance",
    "reconstruction_mse": "below 0.01: what PCA and buckets lose",
    "reconstruction_cosine": "above 0.99",
}
GOOD_PICTURES = {  # by the name behind the net's
    "fid": "the lower the better; equal counts only",
    "kid": "0: no difference",
    "cmmd": "0: no difference",
    "precision": "near that of a second real set",
    "recall": "near that of a second real set",
    "density": "1",
    "coverage": "1",
    "score": "near score_real",
    "r_precision": "near r_precision_real; chance is 0.01",
    "vendi": "near vendi_real",
    "pair_distance": "near pair_distance_real",
    "pair_distance_of_a_caption": "0: always the same picture",
    "nearest_train": "near nearest_train_real",
    "copied_share": "about 0.01",
}


def evaluate(kind: str, raw: DictConfig) -> dict[str, Any]:
    """Run one kind of evaluation; its result goes to ``run/evaluation.json`` and, as a table, to the terminal.

    With it goes its :func:`origin`.
    """
    config, work = EVALUATIONS[kind]
    cfg = typed(raw, config)
    run = Path(cfg.run)
    with RunLock(run):
        begun = origin()  # the checkout may move on while it works
        found = work(cfg)
        if not found:  # another rank tells what was found
            return found
        found |= begun
        write_atomic(run / FILE, (json.dumps(found, indent=2) + "\n").encode())
        report_quietly(run)
    Console().print(_intervals(found) if "intervals" in found else _table(found))
    return found


def _intervals(found: dict[str, Any]) -> Table:
    counts = ", ".join(f"{source['count']:,} {side}" for side, source in found["pictures"].items())
    title = f"{found['pictures']['drawn']['where']}: {counts} pictures of {found['size']} px"
    table = Table("figure", "value", "95 % interval", "healthy", title=title, title_justify="left")
    for name, value in found["measures"].items():
        low, high = found["intervals"][name]
        good = GOOD_PICTURES.get(name.rpartition("/")[2].removesuffix("_filtered"), "")
        table.add_row(name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", good)
    return table


def _table(found: dict[str, Any]) -> Table:
    title = f"{found['artifact']} ({found['model']}, step {found['step']}) on {found['samples']} samples of {found['split']}"
    table = Table("measure", "value", "healthy", title=title, title_justify="left")
    for name, value in found["measures"].items():
        table.add_row(name, f"{value:.4f}", GOOD.get(name, ""))
    return table
