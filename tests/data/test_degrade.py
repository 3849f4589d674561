"""BSR degradation: each operation against a known answer, and the whole through the loader."""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from unclip.data import degrade
from unclip.data.batch import Batch
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.degrade import STRENGTHS, Degrade, as_jpeg, blurred, degraded, gaussian_kernel, noised, shrunk
from unclip.diffusion.noise import Noise
from unclip.models.pictures import Bsr

FULL, LIGHT = STRENGTHS[Bsr.full], STRENGTHS[Bsr.light]


def smooth(size: int = 64, count: int = 1) -> Tensor:
    """Grey (count, 3, size, size) in [0, 1] without fine detail."""
    coarse = torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1)


def batch_of(pictures: Tensor, first: int = 0) -> Batch:
    return Batch(position=list(range(first, first + len(pictures))), image=(pictures * 255).round().to(torch.uint8))


def test_the_kernel_has_the_widths_and_the_direction_that_it_is_asked_for():
    kernel = gaussian_kernel(41, 3.0, 1.5, math.pi / 6)
    assert_close(kernel.sum(), torch.tensor(1.0))
    line = torch.arange(41) - 20.0
    moments = torch.stack(
        [(kernel * line**2).sum(), (kernel * line[:, None] ** 2).sum(), (kernel * line * line[:, None]).sum()]
    )
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    wanted = [9 * cos**2 + 2.25 * sin**2, 9 * sin**2 + 2.25 * cos**2, (9 - 2.25) * cos * sin]
    assert_close(moments, torch.tensor(wanted), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("height", "width", "size"), [(40, 40, 7), (37, 50, 21), (8, 12, 21)])
def test_the_blur_is_a_convolution_with_reflected_borders(height: int, width: int, size: int):
    picture = torch.rand(3, height, width)
    kernel = gaussian_kernel(size, 3.0, 1.0, 0.7)
    found = blurred(picture, kernel)
    radius = min(size // 2, height - 1)
    cut = size // 2 - radius
    kernel = kernel[cut : size - cut, cut : size - cut] / kernel[cut : size - cut, cut : size - cut].sum()
    padded = F.pad(picture[:, None], (radius,) * 4, mode="reflect")
    assert_close(found, F.conv2d(padded, kernel[None, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "name"), [(0.1, "general"), (0.5, "grey"), (0.9, "each channel")])
def test_the_noise_has_the_level_and_the_colours_that_were_drawn(kind: float, name: str):
    noise, flat = Noise([7]), torch.full((3, 200, 200), 0.5)
    grain = (noised(flat, FULL, noise, 0.5, kind) - flat).flatten(1) / (13 / 255)
    covariance = grain @ grain.T / grain.shape[1]
    if name == "grey":
        assert_close(covariance, torch.ones(3, 3), atol=0.03, rtol=0)
        assert torch.equal(grain[0], grain[1])
    elif name == "each channel":
        assert_close(covariance, torch.eye(3), atol=0.03, rtol=0)
    else:
        root = degrade._covariance_root(noise.normal((3, 3), "axes")[0], noise.uniform((3,), "lengths")[0])
        assert_close(covariance, root @ root.T, atol=0.03, rtol=0)
        assert (covariance - covariance.diag().diag()).abs().max() > 0.05
        assert torch.linalg.eigvalsh(covariance).max() < 1.05


def test_jpeg_is_that_of_other_encoders_and_its_quality_counts():
    picture = smooth()[0] + 0.1 * torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))
    picture = picture.clamp(0, 1)
    errors = []
    for share, quality in ((0.0, 30), (1.0, 95)):
        found = as_jpeg(picture, FULL, share)
        buffer = io.BytesIO()
        pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        theirs = torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1) / 255
        assert (found - theirs).abs().mean() < 2 / 255, "as near as fast transforms are to exact ones"
        errors.append((found - picture).abs().mean())
    assert errors[0] > 1.5 * errors[1] > 0


def test_a_change_of_size_moves_nothing():
    ramp = torch.linspace(0, 1, 65)[:-1] + 0.5 / 64
    ramp = ramp.expand(3, 64, 64)
    wanted = (torch.arange(16) + 0.5) / 16
    for draws in itertools.product((0.1, 0.9), (0.2, 0.7), (0.0, 0.4, 0.8), (0.0, 0.4, 0.8)):
        found = shrunk(ramp, 16, *draws)
        assert found.shape == (3, 16, 16)
        assert_close(found[:, 4, 2:-2], wanted[2:-2].expand(3, -1), atol=0.008, rtol=0)


@pytest.mark.parametrize("bsr", [Bsr.light, Bsr.full])
def test_degraded_pictures_show_the_same_place_and_full_is_stronger(bsr: Bsr):
    spot = torch.zeros(3, 64, 64)
    spot[:, 24:40, 24:40] = 1
    noise = [Noise([seed]) for seed in range(60)]
    mean = torch.stack([degraded(spot, 16, STRENGTHS[bsr], n).float() for n in noise]).mean((0, 1))
    mean = (mean - mean[0, 0]).clamp(min=0)
    centre = (mean.sum(0) * torch.arange(16)).sum() / mean.sum(), (mean.sum(1) * torch.arange(16)).sum() / mean.sum()
    assert_close(torch.stack(centre), torch.tensor([7.5, 7.5]), atol=0.05, rtol=0)


def test_full_is_stronger_than_light_and_light_stays_near_the_plain_picture():
    pictures = smooth(160, count=30)
    plain = F.interpolate(pictures, (40, 40), mode="bicubic", antialias=True) * 255
    light, full = (Degrade(bsr, 160, 40, 0)(batch_of(pictures)).column("low").float() for bsr in (Bsr.light, Bsr.full))
    errors = [(low - plain).abs().mean(dim=(1, 2, 3)) for low in (light, full)]
    assert 0.3 < errors[0].mean() < 6
    assert errors[1].mean() > 2 * errors[0].mean()
    assert errors[1].std() > 1, "each picture has strengths of its own"


def test_a_sample_depends_on_seed_and_position_only_and_all_orders_occur(monkeypatch: pytest.MonkeyPatch):
    pictures = smooth(count=7)
    together = Degrade(Bsr.full, 64, 16, 3)(batch_of(pictures, first=10))
    assert together.column("low").shape == (7, 3, 16, 16)
    assert together.column("low").dtype == torch.uint8
    alone = Degrade(Bsr.full, 64, 16, 3)(batch_of(pictures[4:5], first=14))
    assert torch.equal(alone.column("low")[0], together.column("low")[4])
    for other in (
        Degrade(Bsr.full, 64, 16, 4)(batch_of(pictures[4:5], first=14)),
        Degrade(Bsr.full, 64, 16, 3)(batch_of(pictures[4:5], first=15)),
    ):
        assert not torch.equal(other.column("low")[0], together.column("low")[4])
    calls: list[str] = []
    for name in ("isotropic", "anisotropic", "shrunk", "noised", "as_jpeg"):
        real = getattr(degrade, name)
        monkeypatch.setattr(degrade, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    orders, compressed = set(), 0
    for seed in range(300):
        calls.clear()
        degraded(pictures[0], 16, FULL, Noise([seed]))
        assert calls[-1] == "as_jpeg"
        orders.add(tuple(name for name in calls[:-1] if name != "as_jpeg"))
        compressed += calls.count("as_jpeg") - 1
    assert len(orders) == math.factorial(4)
    assert 0.65 < compressed / 300 < 0.85


def module(path: str, num_workers: int, rank: int = 0, world_size: int = 1) -> UnclipData:
    data = UnclipData(DataConfig(path, num_workers=num_workers), 5, 8, ("image",))
    data.degrade = Degrade(Bsr.light, 16, 8, 5)
    data.rank, data.world_size = rank, world_size
    return data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_degrades_alike_whatever_the_workers_and_the_ranks(data: Path, num_workers: int):
    whole = list(itertools.islice(module(str(data), num_workers).train_dataloader(), 3))
    assert all(torch.equal(b.column("low"), Degrade(Bsr.light, 16, 8, 5)(b).column("low")) for b in whole)
    shares = [next(iter(module(str(data), 0, rank, 2).train_dataloader())) for rank in range(2)]
    assert torch.equal(torch.cat([share.column("low") for share in shares]), whole[0].column("low"))
    parts = whole[0].split(2)
    assert torch.equal(parts[1].column("low"), whole[0].column("low")[4:])
    streamed = next(iter(module(f"pipe:cat '{data}/train/'{{00000..00003}}.tar", num_workers).train_dataloader()))
    assert torch.equal(streamed.column("low"), Degrade(Bsr.light, 16, 8, 5)(streamed).column("low"))
    val = next(iter(module(str(data), num_workers).val_dataloader()))  # type: ignore[call-overload]
    assert val.column("low").shape == (7, 3, 8, 8)


def test_pictures_that_are_too_small_or_not_square_are_refused():
    with pytest.raises(ValueError, match="use data of at least 64 pixels"):
        Degrade(Bsr.light, 64, 16, 0)(batch_of(smooth(32)))
    with pytest.raises(ValueError, match=r"\(64, 48\) pixels, which are not square: set data\.image_size=64"):
        Degrade(Bsr.light, 64, 16, 0)(batch_of(smooth(64)[..., :48]))
    larger = Degrade(Bsr.light, 32, 8, 0)(batch_of(smooth(64)))
    assert larger.column("low").shape == (1, 3, 8, 8)
