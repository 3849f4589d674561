import math

import pytest
import torch
from torch.testing import assert_close

from unclip.diffusion import Noise
from unclip.diffusion.noise import GOLDEN, _mix, _signed


def correlation(a, b):
    return float((a * b).mean() / (a.std() * b.std()))


def test_mixing_is_splitmix64():
    """The published test vector of SplitMix64 with seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    words = _mix(torch.tensor([_signed(1234567 + i * GOLDEN) for i in range(1, 6)]))
    assert [word % 2**64 for word in words.tolist()] == known


@pytest.mark.parametrize("draw", ["normal", "uniform", "low_discrepancy"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 8, 8)])
def test_numbers_do_not_depend_on_the_batch(draw, shape):
    batch = getattr(Noise.at(7, range(8)), draw)(shape, "eps")
    alone = getattr(Noise.at(7, [3]), draw)(shape, "eps")
    assert batch.shape == (8, *shape)
    assert torch.equal(batch[3:4], alone)


def test_picture_seeds_do_not_depend_on_the_batch():
    assert torch.equal(Noise([5, -1, 2**70]).normal((4,), "x_T")[1:2], Noise([-1]).normal((4,), "x_T"))


def test_reading_a_stream_again_gives_the_same_numbers():
    noise = Noise.at(0, [1, 2])
    first = noise.normal((3,), "eps")
    noise.uniform((), "step")
    assert torch.equal(noise.normal((3,), "eps"), first)
    assert torch.equal(Noise.at(0, [1, 2]).normal((3,), "eps"), first)


def test_numbers_stay_the_same_in_every_release():
    noise = Noise.at(1, [2])
    assert_close(noise.uniform((3,), "pin"), torch.tensor([[0.756469011, 0.189146578, 0.920281887]]), atol=0, rtol=0)
    assert_close(
        noise.normal((3,), "pin"), torch.tensor([[-0.515058339, -0.690519452, -0.541204333]]), atol=1e-6, rtol=0
    )


def test_normal_has_the_moments_of_a_standard_normal():
    z = Noise.at(3, range(512)).normal((2001,), "eps").double()
    error = 1 / math.sqrt(z.numel())
    assert abs(z.mean()) < 4 * error
    assert abs((z**2).mean() - 1) < 4 * math.sqrt(2) * error
    assert abs((z**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96) * error
    assert 4.4 < z.abs().max() < 6.7
    tail = float((z.abs() > 3).double().mean())
    assert abs(tail - 0.0027) < 4 * math.sqrt(0.0027) * error


def test_uniform_is_flat_and_below_one():
    u = Noise.at(3, range(512)).uniform((2000,), "u").flatten().double()
    assert u.min() >= 0
    assert u.max() < 1
    grid = torch.arange(1, len(u) + 1) / len(u)
    assert (u.sort().values - grid).abs().max() < 1.95 / math.sqrt(len(u))  # Kolmogorov-Smirnov at p = 0.001


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Noise.at(0, range(256)), Noise.at(0, range(1, 257))),
        (Noise.at(0, range(256)), Noise.at(1, range(256))),
        (Noise(range(256)), Noise(range(1, 257))),
        (Noise(range(256)), Noise(range(256)).branch("decoder")),
        (Noise(range(256)).branch("prior"), Noise(range(256)).branch("decoder")),
    ],
    ids=["positions", "run seeds", "picture seeds", "branch", "branches"],
)
def test_samples_are_independent(a, b):
    limit = 4 / math.sqrt(256 * 400)
    assert abs(correlation(a.normal((400,), "eps"), b.normal((400,), "eps"))) < limit
    assert abs(correlation(a.normal((1,), "eps")[1:], a.normal((1,), "eps")[:-1])) < 4 / 16


def test_streams_and_elements_are_independent():
    noise = Noise.at(0, range(256))
    x, y = noise.normal((400,), "eps"), noise.normal((400,), "step 1")
    limit = 4 / math.sqrt(256 * 400)
    assert abs(correlation(x, y)) < limit
    assert abs(correlation(x[:, :200], x[:, 200:])) < limit  # the two normals of one Box-Muller pair
    assert abs(correlation(x[:, :200] ** 2 - 1, x[:, 200:] ** 2 - 1)) < 1.5 * limit
    assert abs(correlation(x[:, 1:], x[:, :-1])) < limit


def test_repeat_makes_new_candidates_around_the_first():
    noise = Noise.at(0, range(64))
    four, two = (noise.repeat(k).normal((50,), "x_T").reshape(64, k, 50) for k in (4, 2))
    assert torch.equal(four[:, 0], noise.normal((50,), "x_T"))
    assert torch.equal(four[:, :2], two)
    for i in range(4):
        for j in range(i):
            assert abs(correlation(four[:, i], four[:, j])) < 4 / math.sqrt(64 * 50)


@pytest.mark.parametrize("start", [0, 12345, 10**10])
def test_low_discrepancy_covers_the_unit_interval(start):
    for count in (8, 64):
        u = Noise.at(0, range(start, start + count)).low_discrepancy((), "step")
        ends = torch.cat([u.sort().values, u.min().reshape(1) + 1])
        assert ends.diff().max() < 2 / count  # 64 independent draws leave a gap of about 4.7 / 64
        assert ends.diff().min() > 0.3 / count


def test_low_discrepancy_spreads_the_draws_of_one_sample_too():
    u = Noise.at(0, range(4)).low_discrepancy((4,), "step")
    assert u.shape == (4, 4)
    assert u.flatten().sort().values.diff().max() < 2 / 16


def test_low_discrepancy_starts_anywhere():
    starts = torch.stack([Noise.at(seed, [0]).low_discrepancy((), "step")[0] for seed in range(300)])
    assert_close(starts.mean(), torch.tensor(0.5), atol=4 * 0.289 / math.sqrt(300), rtol=0)
    assert_close(starts.std(), torch.tensor(0.289), atol=0.03, rtol=0)


def test_low_discrepancy_needs_positions():
    with pytest.raises(ValueError, match=r"Noise\.at"):
        Noise([1, 2]).low_discrepancy((), "step")
