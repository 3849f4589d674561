import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unclip.data.ahead import Batches
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.order import Order, share
from unclip.data.shards import ShardWriter
from unclip.data.stream import Encoded, Stream
from unclip.errors import DataError

SIZES = [5, 1, 7, 3, 4]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    block_shards=st.integers(1, 14),
)
def test_each_epoch_holds_each_sample_once(sizes: list[int], seed: int, epoch: int, block_shards: int) -> None:
    order = Order(sizes, seed, block_shards)
    total = sum(sizes)
    assert sorted(order.indices(epoch * total, total)) == list(range(total))


@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, 100), count=st.integers(0, 60), cut=st.integers(0, 60))
def test_any_window_agrees_with_single_positions(start: int, count: int, cut: int) -> None:
    order, fresh = Order(SIZES, 3, 2), Order(SIZES, 3, 2)
    window = order.indices(start, count)
    assert window.dtype == np.int64
    assert window.tolist() == [fresh.index(position) for position in range(start, start + count)]
    cut = min(cut, count)
    halves = np.concatenate([order.indices(start, cut), order.indices(start + cut, count - cut)])
    assert halves.tolist() == window.tolist()


def test_a_block_of_shards_is_read_before_the_next_one() -> None:
    sizes, block_shards = [10] * 6, 2
    samples = Order(sizes, 1, block_shards).indices(0, 60)
    for block in samples.reshape(3, 20):
        assert len({int(sample) // 10 for sample in block}) == block_shards
        assert sorted(block.tolist()) != block.tolist()


def test_epochs_and_seeds_differ_and_the_stream_is_pinned() -> None:
    order = Order([8, 8], 0)
    first, second = order.indices(0, 16).tolist(), order.indices(16, 16).tolist()
    assert first != second
    assert first != Order([8, 8], 1).indices(0, 16).tolist()
    assert first == [15, 14, 7, 12, 13, 5, 11, 4, 6, 1, 9, 8, 10, 0, 2, 3]  # a run must resume on any NumPy


def test_neighbours_stay_together_in_a_shuffled_order() -> None:
    sizes, total = [8, 7, 4], 19
    stream = Order(sizes, 3, neighbours=4).indices(0, 2 * total)
    assert sorted(stream[:total].tolist()) == list(range(total))
    assert stream[:total].tolist() != stream[total:].tolist()
    runs = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18]]  # none crosses two shards
    for epoch in (stream[:total], stream[total:]):
        for run in runs:
            at = epoch.tolist().index(run[0])
            assert epoch[at : at + len(run)].tolist() == run
        assert epoch.tolist() != sorted(epoch.tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_each_step_whatever_their_number(world_size: int) -> None:
    order = Order(SIZES, 9)
    for step in (0, 1, 5):
        parts = [share(step, 12, rank, world_size) for rank in range(world_size)]
        assert [position for part in parts for position in part] == list(range(step * 12, step * 12 + 12))
        shared = np.concatenate([order.indices(part.start, len(part)) for part in parts])
        assert shared.tolist() == order.indices(step * 12, 12).tolist()


def test_uneven_shares_and_empty_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be shared evenly by 5"):
        share(0, 12, 0, 5)
    with pytest.raises(ValueError, match="at least one sample"):
        Order([3, 0], 0)


# The whole loader: shards x workers x ranks x batch x kill points, indexed and streamed.

LAYOUTS = [(5, 2), (12, 5), (7, 7), (9, 1)]  # samples, of which so many to a shard
REPLICAS = st.integers(1, 4)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("layouts")
    for number, (count, size) in enumerate(LAYOUTS):
        with ShardWriter(root / str(number) / "train", size) as writer:
            for i in range(count):
                writer.write(f"k{i}", b"no picture is asked for", f"caption {i}", {})
    return [root / str(number) for number in range(len(LAYOUTS))]


def module(path: str | list[str], batch: int, rank: int, world_size: int) -> UnclipData:
    data = UnclipData(DataConfig(path, val_split=None), 5, batch, ())
    data.rank, data.world_size = rank, world_size
    return data


def indexed(path: Path, batch: int, steps: range, world_size: int = 1, workers: int = 1) -> list[list[str]]:
    """The keys of each step over all ranks, each of whose workers makes whole batches in turn."""
    found: list[list[str]] = [[] for _ in steps]
    for rank in range(world_size):
        data = module(str(path), batch, rank, world_size)
        data.set_start(steps.start)
        batches = data.train_dataloader().dataset
        assert isinstance(batches, Batches)
        hands = [batches.of_worker(worker, workers) for worker in range(workers)]
        for number in range(len(steps)):
            made = next(hands[number % workers])
            assert made.position == list(share(steps[number], batch, rank, world_size))
            found[number] += made.key
    return found


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.integers(0, 3), local=st.integers(1, 5), before=REPLICAS, after=REPLICAS, workers=REPLICAS, data=st.data()
)
def test_a_killed_run_sees_the_rest_on_any_ranks_and_workers(
    layouts: list[Path], layout: int, local: int, before: int, after: int, workers: int, data: st.DataObject
) -> None:
    batch, steps = local * before * after, 8
    whole = indexed(layouts[layout], batch, range(steps))
    samples = LAYOUTS[layout][0]
    stream = [key for keys in whole for key in keys]
    for epoch in range(len(stream) // samples):
        assert set(stream[epoch * samples : (epoch + 1) * samples]) == {f"k{i}" for i in range(samples)}
    killed = data.draw(st.integers(0, steps - 1))
    first = indexed(layouts[layout], batch, range(killed), before, workers)
    rest = indexed(layouts[layout], batch, range(killed, steps), after, data.draw(REPLICAS))
    assert first + rest == whole


def streamed(path: Path, batch: int, steps: range, world_size: int) -> list[list[list[str]]]:
    """The keys of each step on each rank; the shards are named, and read as if they had no index."""
    found = []
    for rank in range(world_size):
        shards = [f"pipe:cat '{shard}'" for shard in sorted(path.glob("train/*.tar"))]
        encoded = Encoded(Stream(shards, 0.0, 5, rank, world_size, buffer=3), steps.start, (batch, rank, world_size))
        mine = list(itertools.islice(encoded.steps(), len(steps)))
        assert [list(positions) for _, positions in mine] == [
            list(share(step, batch, rank, world_size)) for step in steps
        ]
        found.append([[sample.key for sample in samples] for samples, _ in mine])
    return found


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.sampled_from([0, 1, 3]), local=st.integers(1, 4), world_size=st.integers(1, 3), killed=st.integers(0, 5)
)
def test_a_killed_stream_sees_the_rest_on_as_many_ranks(
    layouts: list[Path], layout: int, local: int, world_size: int, killed: int
) -> None:
    batch, steps = local * world_size, 6
    whole = streamed(layouts[layout], batch, range(steps), world_size)
    first = streamed(layouts[layout], batch, range(killed), world_size)
    rest = streamed(layouts[layout], batch, range(killed, steps), world_size)
    assert [a + b for a, b in zip(first, rest, strict=True)] == whole


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_epoch_of_a_stream_gives_each_sample_to_one_rank(layouts: list[Path], world_size: int) -> None:
    shards = [str(shard) for shard in sorted(layouts[3].glob("train/*.tar"))]
    orders = []
    for epoch in range(3):
        ranks = [Stream(shards, 0.0, 5, rank, world_size, buffer=3)._shuffled(epoch) for rank in range(world_size)]
        orders.append([sample.key for rank in ranks for sample in rank])
        assert sorted(orders[-1]) == [f"k{i}" for i in range(9)]
    assert orders[0] != orders[1] != orders[2]


def test_more_ranks_than_shards_are_refused_for_a_stream(layouts: list[Path]) -> None:
    shards = [str(shard) for shard in sorted(layouts[2].glob("train/*.tar"))]
    with pytest.raises(DataError, match=r"1 shards .* too few for 2 ranks"):
        Stream(shards, 0.0, 5, 0, 2)
