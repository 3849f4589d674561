"""Tiles that overlap against the whole picture."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from unclip.nets.conditioned import UpsamplerNet
from unclip.nets.tiles import _Norms, blend, border_ratio, in_tiles, places, places_along
from unclip.nets.unet import UNetConfig


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(16, 16, 4), (64, 16, 4), (64, 16, 8), (60, 16, 0), (24, 32, 8)]
)
def test_tiles_cover_a_side_and_their_weights_sum_to_one(length: int, tile: int, overlap: int):
    tiles = places_along(length, tile, overlap)
    weights = blend(tiles)
    total = torch.zeros(length)
    for part in tiles:
        total[part] += weights[part.start]
    assert_close(total, torch.ones(length))
    assert (tiles[0].start, tiles[-1].stop) == (0, length)
    assert all(b.start < a.stop if overlap else b.start <= a.stop for a, b in itertools.pairwise(tiles))
    assert weights[0][0] == 1, "at the picture's own edge there is nothing to blend with"


def random_net(cfg: UNetConfig) -> UpsamplerNet:
    torch.manual_seed(0)
    net = UpsamplerNet(cfg, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return net.eval()


def smooth(height: int, width: int) -> Tensor:
    rows, columns = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 3, width)
    return torch.stack([(rows + columns).sin(), (rows - 2 * columns).cos(), (rows * columns).sin()])[None]


def tiled(net: UpsamplerNet, x_t: Tensor, low: Tensor, tile: int, overlap: int) -> Tensor:
    context, timestep = net.prepare(low), torch.full((len(low),), 300)

    def run(rows: slice, columns: slice) -> Tensor:
        return net(x_t[:, :, rows, columns], timestep, context.cut(rows, columns))

    height, width = x_t.shape[-2:]
    return in_tiles(net, run, (height, width), tile, overlap)


@torch.no_grad()
@pytest.mark.parametrize("scale_shift", [False, True])
def test_one_tile_is_the_net_itself(scale_shift: bool):
    net = random_net(UNetConfig([16, 32], 2, groups=8, scale_shift=scale_shift))
    x_t, low = torch.randn(2, 3, 32, 48), smooth(32, 48).expand(2, -1, -1, -1)
    whole = net(x_t, torch.full((len(x_t),), 300), net.prepare(low))
    assert_close(tiled(net, x_t, low, 64, 16), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_the_whole_pictures_norms_the_tiles_middles_are_the_whole_picture():
    net = random_net(
        UNetConfig([16], 1, groups=8, scale_shift=False)
    )  # sees 8 pixels far: 9 convolutions of 3x3, less one
    x_t, low = torch.randn(1, 3, 48, 64), smooth(48, 64)
    context, timestep = net.prepare(low), torch.full((len(low),), 300)
    norms = _Norms(net)
    with norms.gathering():
        whole = net(x_t, timestep, context)
    reach = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules())
    rows, columns = slice(8, 48), slice(16, 64)
    with norms.fixed():
        part = net(x_t[:, :, rows, columns], timestep, context.cut(rows, columns))
    assert_close(part[:, :, reach:, reach:], whole[:, :, 8 + reach :, 16 + reach :], atol=1e-4, rtol=1e-4)
    own = net(x_t[:, :, rows, columns], timestep, context.cut(rows, columns))
    assert (own - whole[:, :, rows, columns])[:, :, reach:, reach:].abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("channels", "scale_shift"), [([16, 32], False), ([16, 32], True), ([16, 32, 48], False)])
def test_no_seams_where_plain_tiles_have_them(channels: list[int], scale_shift: bool):
    net = random_net(UNetConfig(channels, 1, groups=8, scale_shift=scale_shift))
    low = smooth(128, 160)
    x_t, context, timestep = torch.zeros_like(low), net.prepare(low), torch.tensor([300])
    plain = torch.zeros_like(low)
    for rows, columns in places((128, 160), 64, 0):
        plain[:, :, rows, columns] = net(x_t[:, :, rows, columns], timestep, context.cut(rows, columns))
    assert border_ratio(plain, 64, 0) > 1.5
    assert border_ratio(tiled(net, x_t, low, 64, 32), 64, 32) <= 1.1


def test_the_border_ratio_of_known_pictures():
    ramp = torch.arange(96.0).expand(1, 1, 96, 96)
    ramp = ramp + ramp.mT
    assert border_ratio(ramp, 64, 32) == pytest.approx(1)
    steps = ramp + 2 * (
        torch.arange(96) >= 64
    )  # the edges at 32 and 64 along each side; one of these four is a step of 3
    assert border_ratio(steps, 64, 32) == pytest.approx((1 + 1 + 1 + 3) / 4)


def test_norms_that_the_forward_pass_leaves_out_are_told():
    net = nn.Sequential(nn.GroupNorm(2, 4))
    with pytest.raises(RuntimeError, match="1 of 1 group norms of the net were not called"):
        in_tiles(net, lambda rows, columns: torch.zeros(1, 4, 8, 8), (8, 8), 8, 0)
