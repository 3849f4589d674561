"""Principal components and buckets against what theory says of Gaussians."""

import math

import pytest
import torch
from torch.testing import assert_close

from unclip.models.pca import PCA, Buckets, BucketValue, Scatter, quantile_edges, uniform_edges

D = 12
VARIANCES = torch.tensor([0.7**i for i in range(D)], dtype=torch.float64)


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """Gaussian vectors whose *sample* mean and covariance are exactly 3 and Q diag(VARIANCES) Qᵀ."""
    torch.manual_seed(seed)
    white = torch.randn(count, D, dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / count)).T
    return white * VARIANCES.sqrt() @ rotation().T + 3


def rotation() -> torch.Tensor:
    torch.manual_seed(7)
    return torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]


def fitted(x: torch.Tensor, **how) -> PCA:
    pca = PCA(D)
    pca.fit(x.split(300), **how)
    return pca


def test_it_finds_the_eigenvalues_and_axes_of_a_known_covariance():
    pca = fitted(rows(2000), num_components=D)
    assert_close(pca.eigenvalues, VARIANCES.float(), rtol=1e-5, atol=1e-7)
    assert_close(pca.mean, torch.full((D,), 3.0))
    assert_close((pca.basis @ rotation().float()).abs(), torch.eye(D), rtol=0, atol=1e-4)
    assert (pca.basis.gather(1, pca.basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_parts_of_the_rows_merge_exactly():
    x = rows(1000)
    whole, parts = Scatter.of(x), [Scatter.of(part) for part in x.split([1, 600, 399])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.count == 1000
    assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    assert_close(merged.products, whole.products, rtol=0, atol=1e-9)


def test_k_comes_from_a_share_of_the_variance():
    shares = VARIANCES.cumsum(0) / VARIANCES.sum()
    pca = fitted(rows(2000), share=0.9)
    assert_close(pca.explained, shares, rtol=1e-5, atol=0)
    assert pca.num_components == int((shares < 0.9).sum()) + 1
    assert shares[pca.num_components - 2] < 0.9 <= shares[pca.num_components - 1]
    assert fitted(rows(2000), share=1.0).num_components <= D


def test_what_is_left_out_is_the_tail_of_the_spectrum():
    x = rows(3000)
    pca = fitted(x, num_components=5)
    error = (pca.decode(pca.encode(x.float())) - x).square().sum(1).mean()
    assert_close(error, VARIANCES[5:].sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", list(BucketValue))
def test_uniform_buckets_add_a_twelfth_of_their_width_squared(value: BucketValue):
    x = rows(20_000)
    pca = fitted(x, num_components=5)
    coefficients = pca.encode(x.float())
    buckets = Buckets(64)
    buckets.fit(coefficients, uniform_edges(pca.eigenvalues[:5].sqrt(), 64, reach=5.0), value)
    codes = buckets.encode(coefficients)
    error = (pca.decode(buckets.decode(codes)) - x).square().sum(1).mean()
    widths = 2 * 5.0 * VARIANCES[:5].sqrt() / 64
    assert_close(error - VARIANCES[5:].sum(), widths.square().sum() / 12, rtol=0.03, atol=0)


def test_quantile_buckets_hold_equally_many():
    x = rows(6400)[:, :3].float()
    buckets = Buckets(32)
    buckets.fit(x, quantile_edges(x, 32), BucketValue.mean)
    codes = buckets.encode(x)
    for dimension in range(3):
        assert torch.bincount(codes[:, dimension], minlength=32).sub(200).abs().max() <= 2
    assert_close(buckets.edges[:, 0], x.amin(0))
    assert_close(buckets.edges[:, -1], x.amax(0))


def test_values_are_means_where_anything_was_seen_and_centres_elsewhere():
    buckets = Buckets(4)
    edges = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    buckets.fit(torch.tensor([[-8.0], [0.0], [1.0], [1.5], [9.0]]), edges, BucketValue.mean)
    assert_close(buckets.values, torch.tensor([[-4.0, 1.25, 2.5, 9.0]]))
    assert buckets.encode(torch.tensor([[-8.0], [1.0], [2.999], [50.0]])).flatten().tolist() == [0, 1, 2, 3]


def test_a_fresh_module_takes_the_shapes_of_the_state_it_loads():
    x = rows(100)
    pca = fitted(x, num_components=3)
    other = PCA(D)
    assert other.num_components == 0
    other.load_state_dict(pca.state_dict())
    assert_close(other.encode(x), pca.encode(x))


def test_codes_do_not_depend_on_the_precision_of_the_run():
    x = rows(50).float()
    pca = fitted(x, num_components=4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = pca.encode(x)
    assert rough.dtype == torch.float32
    assert torch.equal(rough, pca.encode(x))


def test_a_gaussian_in_fine_buckets_costs_its_entropy():
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    buckets = Buckets(64)
    buckets.fit(x, uniform_edges(torch.ones(1), 64, reach=4.0), BucketValue.centre)
    shares = torch.bincount(buckets.encode(x).flatten(), minlength=64) / len(x)
    differential = 0.5 * math.log(2 * math.pi * math.e) - math.log(8 / 64)
    assert torch.special.entr(shares).sum().item() == pytest.approx(differential, abs=2e-3)


def test_too_few_vectors_are_refused():
    with pytest.raises(ValueError, match="at least two vectors"):
        PCA(D).fit([rows(100)[:1]])
