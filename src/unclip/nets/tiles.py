"""A large picture through a convolution-only network in tiles that overlap, as if it had been seen whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[slice, slice], Tensor]  # the net's output (B, C, h, w) for these rows and columns of the picture


def in_tiles(net: nn.Module, run: Run, size: tuple[int, int], tile: int, overlap: int) -> Tensor:
    """The output (B, C, H, W) of ``run``, which calls ``net`` on a part of a picture of (H, W) = ``size`` pixels.

    Neighbours are blended over their overlap. The only thing that a convolution-only net knows of a whole picture are its
    group norms' statistics: a first pass without overlap gathers those of the tiles, and their means serve all tiles of
    the second pass. Else each tile would have a brightness of its own.
    """
    with _Norms(net).gathering() as norms:
        for rows, columns in places(size, tile, overlap=0):
            run(rows, columns)
    height, width = (blend(places_along(side, tile, overlap)) for side in size)
    found: Tensor | None = None
    with norms.fixed():
        for rows, columns in places(size, tile, overlap):
            part = run(rows, columns)
            weight = height[rows.start].to(part.device)[:, None] * width[columns.start].to(part.device)
            if found is None:
                found = part.new_zeros(*part.shape[:2], *size, dtype=torch.float32)
            found[:, :, rows, columns] += weight * part
    assert found is not None
    return found


def places(size: tuple[int, int], tile: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile."""
    for rows in places_along(size[0], tile, overlap):
        for columns in places_along(size[1], tile, overlap):
            yield rows, columns


def places_along(length: int, tile: int, overlap: int) -> list[slice]:
    """Tiles along one side: neighbours overlap by ``overlap`` pixels, the last two by as much as it takes."""
    if length <= tile:
        return [slice(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [slice(start, start + tile) for start in starts]


def blend(tiles: list[slice]) -> dict[int, Tensor]:
    """By a tile's start, the weights (tile,) of its pixels along one side; those of all tiles sum to one everywhere.

    They rise from the edge, where the net saw zeros instead of a neighbour, to the overlap's end; not at the picture's
    own edges.
    """
    weights = [torch.ones(tile.stop - tile.start) for tile in tiles]
    for (left, right), (a, b) in zip(pairwise(tiles), pairwise(weights), strict=True):
        overlap = left.stop - right.start
        rise = (torch.arange(overlap) + 0.5) / max(overlap, 1)
        rise = rise**2 * (3 - 2 * rise)
        a[len(a) - overlap :] *= 1 - rise
        b[:overlap] *= rise
    total = torch.zeros(tiles[-1].stop)
    for tile, weight in zip(tiles, weights, strict=True):
        total[tile] += weight
    return {tile.start: weight / total[tile] for tile, weight in zip(tiles, weights, strict=True)}


def border_ratio(picture: Tensor, tile: int, overlap: int) -> float:
    """Mean gradient across the edges of all tiles over that elsewhere, of pictures (B, C, H, W): above 1 there may be seams, or
    the pictures have edges of their own there. The outer eighth of each side does not count."""
    across, elsewhere = [], []
    for axis in (2, 3):
        gradient = picture.diff(dim=axis).abs().mean(dim=(0, 1, 5 - axis))
        tiles = places_along(picture.shape[axis], tile, overlap)
        edges = {place for part in tiles for place in (part.start, part.stop)}
        at = torch.tensor([place + 1 in edges for place in range(len(gradient))])
        inner = slice(len(at) // 8, len(at) - len(at) // 8)
        across.append(gradient[inner][at[inner]])
        elsewhere.append(gradient[inner][~at[inner]])
    return float(torch.cat(across).mean() / torch.cat(elsewhere).mean())


class _Norms:
    """The statistics of a net's group norms: gathered over several inputs, then used for others."""

    def __init__(self, net: nn.Module) -> None:
        self.layers = [module for module in net.modules() if isinstance(module, nn.GroupNorm)]
        self._sums: dict[nn.Module, Tensor] = {}  # (2, B, groups): of the means and of the mean squares
        self._count: dict[nn.Module, int] = {}

    @contextmanager
    def gathering(self) -> "Iterator[_Norms]":
        with self._hooked(self._gather):
            yield self

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Inside, the norms use the means of what was gathered. Raises RuntimeError if a norm was not called then."""
        silent = len(self.layers) - len(self._sums)
        if silent:
            raise RuntimeError(
                f"{silent} of {len(self.layers)} group norms of the net were not called by its forward pass"
            )
        with self._hooked(self._normalise):
            yield

    @contextmanager
    def _hooked(self, hook: Callable[..., Tensor | None]) -> Iterator[None]:
        handles = [layer.register_forward_hook(hook) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _gather(self, layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].float().unflatten(1, (layer.num_groups, -1)).flatten(2)
        found = torch.stack([x.mean(-1), x.square().mean(-1)])
        self._sums[layer] = found + self._sums.get(layer, 0)
        self._count[layer] = self._count.get(layer, 0) + 1

    def _normalise(self, layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        mean, square = self._sums[layer] / self._count[layer]
        scale = (square - mean**2 + layer.eps).rsqrt()
        each = layer.num_channels // layer.num_groups
        scale, mean = (value.repeat_interleave(each, dim=1) for value in (scale, mean))
        scale = scale * layer.weight
        shift = layer.bias - mean * scale
        return torch.addcmul(shift[:, :, None, None], inputs[0].float(), scale[:, :, None, None]).to(output.dtype)
