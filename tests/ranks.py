"""Runs of one process of several, one after another. usage: torchrun … ranks.py JSON, a list of [stage, overrides]

Run folders and data are those of the working directory. ``train_all`` does the same in the calling process.
"""

import json
import sys

from hydra import compose, initialize_config_dir

from unclip.cli.train import CONF, forced
from unclip.config import typed
from unclip.train import ClipTrainConfig, DecoderTrainConfig, PriorTrainConfig, UpsamplerTrainConfig, train

CONFIGS = {
    "clip": ClipTrainConfig,
    "prior": PriorTrainConfig,
    "decoder": DecoderTrainConfig,
    "upsampler": UpsamplerTrainConfig,
}


def train_all(runs: list[tuple[str, list[str]]]) -> None:
    for stage, overrides in runs:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            raw = compose(f"train_{stage}", [forced(override) for override in overrides])
        train(typed(raw, CONFIGS[stage]))


if __name__ == "__main__":
    train_all(json.loads(sys.argv[1]))
