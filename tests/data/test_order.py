import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.data.order import Order, share

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
