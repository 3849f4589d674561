import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.config import from_plain
from unclip.data.batch import Batch
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.mixture import PERIOD, Mixture
from unclip.data.order import Order
from unclip.data.settings import SourceConfig
from unclip.data.shards import Shards
from unclip.errors import ConfigError

WEIGHTS = [1.0, 3.0, 0.5]


def test_every_period_has_the_exact_shares() -> None:
    found = Mixture(WEIGHTS, seed=0).sources(0, 3 * PERIOD).reshape(3, PERIOD)
    for period in found:
        shares = np.bincount(period) / PERIOD
        assert np.abs(shares - np.array(WEIGHTS) / 4.5).max() <= 1 / PERIOD
    assert not np.array_equal(found[0], found[1])
    first = found[0][:400]
    assert abs((first == 1).mean() - 2 / 3) < 0.1  # mixed throughout, not one after another
    assert Mixture([1, 1], seed=0).counts.tolist() == [PERIOD // 2] * 2
    assert set(Mixture([2.0], seed=0).sources(5, 10)) == {0}


@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, 3 * PERIOD), count=st.integers(0, 300), seed=st.integers(0, 2**40))
def test_windows_agree_and_each_source_goes_on_where_it_stood(start: int, count: int, seed: int) -> None:
    mixture = Mixture(WEIGHTS, seed)
    whole = Mixture(WEIGHTS, seed).sources(0, start + count)
    assert np.array_equal(mixture.sources(start, count), whole[start:])
    assert np.array_equal(mixture.drawn_before(start), np.bincount(whole[:start], minlength=3))


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [1e6, 1.0]])
def test_useless_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Mixture(weights, 0)


def stream(cfg: DataConfig, start: int, count: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    module = UnclipData(cfg, 5, 8, ("image",))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    module.setup()
    module.set_start(start)
    return list(itertools.islice(module.train_dataloader(), count))


def test_batches_mix_both_data_sets_from_any_start_and_on_any_ranks(data: Path) -> None:
    """The validation split stands in for another data set: its samples are other pictures with keys of their own."""
    other = data.parent / "other"
    other.mkdir()
    (other / "train").symlink_to(data / "val")
    cfg = DataConfig(str(data), weight=3.0, others=[SourceConfig(str(other), weight=1.0)])
    shards = [Shards(data / "train"), Shards(other / "train")]
    orders = [Order(s.shard_sizes, 5) for s in shards]
    sources = Mixture([3.0, 1.0], 5).sources(0, 96)
    keys, drawn = [], [0, 0]
    for source in sources.tolist():
        keys.append(shards[source].keys[orders[source].index(drawn[source])])
        drawn[source] += 1
    assert min(drawn) > 10
    whole = stream(cfg, 0, 12)
    assert [key for batch in whole for key in batch.key] == keys
    assert [p for batch in whole for p in batch.position] == list(range(96))
    for fresh, batch in zip(stream(cfg, 7, 3), whole[7:], strict=False):
        assert (fresh.key, fresh.position) == (batch.key, batch.position)
        assert torch.equal(fresh.column("image"), batch.column("image"))
    halves = [stream(cfg, 4, 2, rank, 2) for rank in range(2)]
    for step in range(2):
        assert halves[0][step].key + halves[1][step].key == whole[4 + step].key


def test_merged_rows_stand_by_position_and_captions_are_padded() -> None:
    long = Batch(["a", "c"], [0, 2], ["x", "y"], tokens=torch.tensor([[1, 2, 3], [4, 5, 0]]), text_emb=torch.eye(2))
    short = Batch(["b"], [1], ["z"], tokens=torch.tensor([[9]]), text_emb=torch.full((1, 2), 7.0))
    found = Batch.merged([long, short])
    assert (found.key, found.position, found.caption) == (["a", "b", "c"], [0, 1, 2], ["x", "z", "y"])
    assert found.column("tokens").tolist() == [[1, 2, 3], [9, 0, 0], [4, 5, 0]]
    assert found.column("text_emb").tolist() == [[1, 0], [7, 7], [0, 1]]
    assert found.image is None


@pytest.mark.parametrize("weight", [-1, 1e-6])
def test_weights_in_settings_are_checked(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"^weight|^a weight"):
        from_plain({"path": "a", "others": [{"path": "b", "weight": weight}]}, DataConfig)
