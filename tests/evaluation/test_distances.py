"""Each figure against a closed form, brute force in numpy, and the packages that compute it too."""

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from unclip.evaluation.distances import (
    cmmd_figure,
    cubic,
    fid_figure,
    frechet,
    gaussian,
    kid_figure,
    mmd,
    moments,
)
from unclip.evaluation.intervals import Figure, figure, mean_figure, resamples
from unclip.evaluation.manifolds import nearest, overlap


def normal(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def with_moments(count: int, mean: list[float], cov: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rows whose own mean and covariance (over n - 1) are these."""
    rows = normal(count, len(mean), seed).double()
    rows = torch.linalg.qr(rows - rows.mean(0))[0]
    rows = torch.linalg.qr(rows - rows.mean(0))[0] * (count - 1) ** 0.5
    return (rows @ torch.linalg.cholesky(cov.double()).T + torch.tensor(mean).double()).float()


def alone(*counts: int) -> list[torch.Tensor]:
    return [resamples(count, 0, 0) for count in counts]


def test_the_frechet_distance_of_gaussians_in_closed_form():
    """Covariances that commute: |m - n|^2 + sum of (sqrt a - sqrt b)^2; others by scipy's matrix root."""
    x = with_moments(60, [1.0, 2.0, 0.0], torch.diag(torch.tensor([4.0, 9.0, 1.0])))
    y = with_moments(50, [1.0, 0.0, 3.0], torch.diag(torch.tensor([1.0, 16.0, 1.0])), seed=1)
    assert fid_figure(x, y, *alone(60, 50)).value == pytest.approx(4 + 9 + 1 + 1, rel=1e-5)
    a, b = (moments(normal(40, 6, seed)) for seed in (2, 3))
    root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real
    wanted = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(root)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-9)


def test_fid_agrees_with_torchmetrics_and_its_replicates_with_resampled_rows():
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = normal(80, 5, 0), normal(70, 5, 1, shift=0.3)
    weights = [resamples(80, 3, 0), resamples(70, 3, 1)]

    class Identity(torch.nn.Module):
        num_features = 5

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    theirs = FrechetInceptionDistance(feature=Identity())
    theirs.set_dtype(torch.float64)
    theirs.update(x.double(), real=True)
    theirs.update(y.double(), real=False)
    found = fid_figure(x, y, *weights)
    assert found.value == pytest.approx(float(theirs.compute()), rel=1e-6)
    repeated = [
        frechet(*(moments(rows.repeat_interleave(w[b].long(), dim=0)) for rows, w in zip((x, y), weights, strict=True)))
        for b in (1, 2, 3)
    ]
    wanted = figure(torch.tensor([found.value, *repeated], dtype=torch.float64))
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-5)


def test_moments_are_those_of_numpy_in_any_chunks():
    rows = normal(101, 7, 0, shift=50.0)
    found = moments(rows, chunk=13)
    assert_close(found.mean.numpy(), rows.double().numpy().mean(axis=0))
    assert_close(found.cov.numpy(), np.cov(rows.double().numpy(), rowvar=False))


def brute_mmd(x: np.ndarray, y: np.ndarray, kernel) -> float:
    within = [
        sum(kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    return sum(within) - 2 * np.mean([[kernel(a, b) for b in y] for a in x])


def test_kid_is_the_mmd_by_brute_force_and_torch_fidelitys():
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    x, y = normal(24, 6, 0), normal(24, 6, 1, shift=0.5)
    found = kid_figure(x, y, *alone(24, 24)).value
    wanted = brute_mmd(x.double().numpy(), y.double().numpy(), lambda a, b: (a @ b / 6 + 1) ** 3)
    assert found == pytest.approx(1000 * wanted, rel=1e-9)
    theirs = kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=24, verbose=False)
    assert found == pytest.approx(1000 * theirs[KEY_METRIC_KID_MEAN], rel=1e-6)


def test_cmmd_is_the_mmd_by_brute_force():
    x, y = normal(15, 4, 0), normal(11, 4, 1, shift=1.0)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        return math.exp(-((a - b) ** 2).sum() / 200)

    wanted = brute_mmd(x.double().numpy(), y.double().numpy(), kernel)
    assert cmmd_figure(x, y, *alone(15, 11)).value == pytest.approx(1000 * wanted, rel=1e-3)


@pytest.mark.parametrize("kernel", [cubic, gaussian])
def test_a_resample_never_pairs_a_row_with_its_own_copy(kernel):
    x, y = normal(9, 3, 0).double(), normal(8, 3, 1).double()
    weights = [resamples(9, 2, 0), resamples(8, 2, 1)]
    found = mmd(x, y, kernel, *weights, chunk=4)
    for b in range(3):
        sums = []
        for rows, counts in zip((x, y), (w[b].long() for w in weights), strict=True):
            numbers = torch.arange(len(rows)).repeat_interleave(counts)
            different = numbers[:, None] != numbers
            sums.append(kernel(rows[numbers], rows[numbers])[different].mean())
        drawn = [rows.repeat_interleave(w[b].long(), dim=0) for rows, w in zip((x, y), weights, strict=True)]
        assert_close(found[b], sums[0] + sums[1] - 2 * kernel(*drawn).mean())


def brute_overlap(drawn: np.ndarray, real: np.ndarray, k: int) -> list[float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    of_drawn, of_real = (np.sort(distances(z, z), axis=1)[:, k] for z in (drawn, real))  # 0 is itself
    between = distances(real, drawn)
    inside = between <= of_real[:, None]
    return [
        inside.any(axis=0).mean(),
        (between <= of_drawn[None]).any(axis=1).mean(),
        inside.sum(axis=0).mean() / k,
        inside.any(axis=1).mean(),
    ]


def means(drawn: torch.Tensor, real: torch.Tensor, k: int, chunk: int = 512) -> list[float]:
    found = overlap(drawn, real, k, chunk)
    return [float(rows.mean()) for rows in (found.precise, found.recalled, found.density, found.covered)]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_by_brute_force_and_torch_fidelity(k: int):
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    drawn, real = 0.7 * normal(60, 3, 0), normal(80, 3, 1, shift=0.4)
    found = means(drawn, real, k, chunk=17)
    assert found == pytest.approx(brute_overlap(drawn.double().numpy(), real.double().numpy(), k), abs=1e-12)
    assert found == pytest.approx(means(drawn, real, k))
    theirs = prc_features_to_metric(drawn.double(), real.double(), prc_neighborhood=k, verbose=False)
    assert found[:2] == pytest.approx([theirs[KEY_METRIC_PRECISION], theirs[KEY_METRIC_RECALL]])


def test_equal_sets_overlap_whole_and_distant_ones_not_at_all():
    rows = normal(40, 4, 0)
    precision, recall, _, coverage = means(rows, rows, 3)
    assert (precision, recall, coverage) == (1.0, 1.0, 1.0)
    assert means(rows, rows + 100, 3) == [0.0, 0.0, 0.0, 0.0]


def test_nearest_rows_by_cosine():
    y = normal(50, 8, 0)
    found, numbers = nearest(3 * y[[7, 3]], y, 2, chunk=1)
    assert numbers[:, 0].tolist() == [7, 3]
    assert_close(found[:, 0], torch.ones(2))
    assert (found[:, 1] < 1).all()


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """95 of 100 times: the mean, which is 3, of 50 normal numbers, drawn 200 times. 1.5 % is one standard error."""
    rows = normal(200, 50, 0, shift=3.0)
    found = [mean_figure(some, resamples(50, 200, seed)) for seed, some in enumerate(rows)]
    held = sum(one.low <= 3 <= one.high for one in found) / len(found)
    assert 0.90 <= held <= 0.99
    below, above = (sum(apart) for apart in zip(*((one.high < 3, one.low > 3) for one in found), strict=True))
    assert min(below, above) > 0, "it misses on both sides"


def test_an_interval_is_that_of_theory_about_the_figure():
    """The mean of 50 numbers: 1.96 / sqrt(50) to each side, and the bias of the resamples is taken away."""
    rows = normal(50, 1, 0)[:, 0]
    rows = (rows - rows.mean()) / rows.std(unbiased=False)
    found = mean_figure(rows, resamples(50, 2000, 0))
    assert found.value == pytest.approx(0, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((-0.277, 0.277), abs=0.03)
    shifted = figure(torch.cat([torch.tensor([1.0]), 5 + torch.linspace(-1, 1, 401)]))
    assert (shifted.value, shifted.low, shifted.high) == pytest.approx((1.0, 0.05, 1.95), abs=1e-3)
    assert figure(torch.tensor([2.0])) == Figure(2.0, 2.0, 2.0)


def test_resamples_draw_as_many_rows_and_repeat_themselves():
    found = resamples(30, 4, 7)
    assert found.shape == (5, 30)
    assert found[0].tolist() == [1.0] * 30
    assert found.sum(dim=1).tolist() == [30.0] * 5
    assert torch.equal(found, resamples(30, 4, 7))
    assert not torch.equal(found, resamples(30, 4, 8))


MEASURE = """
import resource, sys, torch
from unclip.evaluation.pictures import Figures, Metric
count, width = int(sys.argv[1]), int(sys.argv[2])
drawn, real = (torch.randn(count, width, generator=torch.Generator().manual_seed(i)) for i in range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
figures = Figures(replicates=int(sys.argv[3]), seed=0)
wanted = {Metric.kid, Metric.precision_recall, Metric.density_coverage, Metric.cmmd}
figures.compare("clip", wanted | ({Metric.fid} if width < count else set()), drawn, real, 5)
figures.vary("clip", drawn, real)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mb(count: int, width: int, replicates: int) -> tuple[float, float]:
    """Resident megabytes with the features in memory, and at most, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(count), str(width), str(replicates)],
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = done.stdout.split()
    return int(before) / 1024, int(peak) / 1024


def test_memory_grows_with_the_number_of_pictures_and_not_with_its_square():
    """5,000 x 5,000 distances take 200 MB a matrix in float64. Chunks of 512 rows take 20 MB, of which a few live at once."""
    before, peak = peak_mb(5000, 4, 1)
    assert peak - before < 180, (before, peak)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_thousand_pictures_take_less_than_four_gibibytes():
    """2 x 30,000 x 2,048 features of Inception: 491 MB in float32, 983 MB in float64; a chunk of 512 x 30,000 distances 123 MB."""
    before, peak = peak_mb(30_000, 2048, 2)
    assert peak < 4096, (before, peak)
