"""Fits one or two coloured solids to a picture, by analysis through synthesis; nothing is learned.

A solid's chroma (the part of RGB orthogonal to grey) is its colour's chroma times its coverage and diffuse light:
white gloss, grey shadows and pale backgrounds have next to none. So a picture becomes one complex plane, chroma as a
point of the plane, in which a scene is a sum of real templates times one complex number per solid. Hypotheses come
from templates that touch the outer edges of what is coloured; they are refined with occlusion, and the one that
leaves the least wins.
"""

import itertools
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy import fft
from PIL import Image

from unclip.data.shapes_render import draw_sprite
from unclip.data.shapes_scene import COLOURS, PALETTE
from unclip.data.shapes_solids import SHAPES, extent

SIDE = 32  # every picture is read at this size: small enough to be quick, and averaging tames noise
ONE_IS_ENOUGH = 0.05  # a single solid that leaves less of the energy needs no second
STEP = 0.25  # pixels: the finest move of the refinement, in position and scale

_PALE = 60.0  # chroma (of 255) below this may be background
_FAINT = 0.18  # of a solid's chroma: what is less counts as noise
_COLOURED = 0.40  # of a solid's chroma: the edges of what is coloured
_FEWEST, _MOST = 16, 614  # coloured pixels: half of the smallest ring's, and more than two of the largest cubes'
_STEEPEST = 24  # differences that tell the sharpness
GLOSS_LOSS = 1.3  # chroma lost per white gloss, by clipping at 255: the mean over the palette
_MOST_NOISE = 0.02  # squared length per pixel: more than that is no noise to forgive
_SMALLEST, _LARGEST = round(0.24 * SIDE / STEP), round(0.54 * SIDE / STEP)  # units that solids may have
_PAD = 64  # transforms are this wide, so that correlations do not wrap around
_SCALES = tuple(0.27 + 0.03 * i for i in range(8))  # of the coarse templates, in sides of the picture
_SINGLES, _PAIRS = 3, 8  # hypotheses that are refined
_SWAPS = 2  # at most so many solids change their shape at the end
_CHARGE = 0.3  # per solid's energy, on its amplitude's squared distance from 1
_FINE = round(1 / STEP)


@dataclass(frozen=True)
class Pose:
    """A template's place on the working grid: its base point and its unit, all in quarter pixels."""

    shape: str
    x: int
    y: int
    scale: int

    @property
    def bbox(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the silhouette in sides of the picture, y downwards."""
        half, below, above = (self.scale * e for e in extent(self.shape))
        x0, y0, x1, y1 = (v * STEP / SIDE for v in (self.x - half, self.y - above, self.x + half, self.y + below))
        return x0, y0, x1, y1


@dataclass(frozen=True)
class Fit:
    """One or two poses (the left or the upper one first), their complex amplitudes, the share of energy left
    unexplained, and how much of the last, perhaps covered, solid shows.
    """

    poses: tuple[Pose, ...]
    amplitudes: tuple[complex, ...]
    residual: float
    visible: float


# --- the picture as one complex plane ---------------------------------------------------------------------------------


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) RGB to complex chroma: zero for greys, linear, and of the HSV hue's angle."""
    red, green, blue = np.moveaxis(rgb.astype(np.float32), -1, 0)
    return (red - (green + blue) / 2) + 1j * (np.sqrt(3) / 2 * (green - blue))


@cache
def _wheel() -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """The palette around the hue wheel: angles, chroma lengths and the even angles they move to, closed beyond a full
    turn on both ends; then the colours' names in the order of the even angles 0, 1/8 turn, ...
    """
    chroma = _chroma(np.array([PALETTE[c] for c in COLOURS]))
    angle, turn = np.angle(chroma) % (2 * np.pi), 2 * np.pi
    order = np.argsort(angle)
    names = tuple(COLOURS[i] for i in order)
    around = np.concatenate([order[-1:], order, order[:1]])
    angles, even = angle[around], np.arange(-1, len(COLOURS) + 1) * (turn / len(COLOURS))
    angles[0] -= turn
    angles[-1] += turn
    return angles, np.abs(chroma)[around], even, names


def _without_cast(raw: np.ndarray) -> np.ndarray:
    """Chroma minus the background's, row by row; the more coloured a pixel, the less is taken away."""
    angles, lengths, _, _ = _wheel()
    pale = raw[np.abs(raw) < _PALE]
    cast = np.median(np.real(pale)) + 1j * np.median(np.imag(pale)) if pale.size else 0.0
    ground = np.abs(raw - cast) < _PALE / 2
    tint = ((raw - cast) * ground).sum(axis=1) / np.maximum(ground.sum(axis=1), 1) + cast
    share = np.abs(raw - cast) / np.interp(np.angle(raw - cast) % (2 * np.pi), angles, lengths)
    return raw - tint[:, None] * (1 - np.minimum(share, 1))


def signal(picture: np.ndarray, side: int = SIDE) -> np.ndarray:
    """(H, W, 3) uint8 to (side, side) complex64: about 1 in length within solids, 0 elsewhere, the palette's hues at even
    angles.
    """
    larger = min(picture.shape[:2]) >= side
    small = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX if larger else Image.Resampling.BICUBIC)
    angles, lengths, even, _ = _wheel()
    chroma = _without_cast(_chroma(np.asarray(small)))
    hue = np.angle(chroma) % (2 * np.pi)
    length = np.abs(chroma) / np.interp(hue, angles, lengths)
    return (length * np.exp(1j * np.interp(hue, angles, even))).astype(np.complex64)


def sharpness(plane: np.ndarray) -> float:
    """How much the coloured share changes over two pixels at the steepest places: near 1 for crisp edges, 0.27 for a
    blur of 3 pixels.
    """
    strength = np.minimum(np.abs(plane), 1)
    across, down = np.abs(strength[:, 2:] - strength[:, :-2]), np.abs(strength[2:] - strength[:-2])
    return float(np.sort(np.concatenate([across.ravel(), down.ravel()]))[-_STEEPEST:].mean())


# --- coarse hypotheses ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 15)
def _sprite(shape: str, scale: int, x: int, y: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    planes, left, top = draw_sprite(shape, scale * STEP, x * STEP, y * STEP)
    return planes[..., 0], np.maximum(planes[..., 1] - GLOSS_LOSS * planes[..., 2], 0), left, top


@dataclass(frozen=True)
class _Bank:
    """All coarse templates: what they are, their transforms, their energies, and how much any two overlap at any
    offset.
    """

    shapes: np.ndarray  # (N,) index into SHAPES
    scales: np.ndarray  # (N,) in quarter pixels
    extents: np.ndarray  # (N, 3) half width, reach below, reach above, in pixels
    spectra: np.ndarray  # (N, P, P) conjugate transforms
    energy: np.ndarray  # (N,)
    overlap: np.ndarray  # (N, N, P, P): [i, j, dy, dx] = <i at the origin, j at (dy, dx)>


@cache
def _bank() -> _Bank:
    kinds = [(s, round(scale * SIDE / STEP)) for s in range(len(SHAPES)) for scale in _SCALES]
    planes = np.zeros((len(kinds), _PAD, _PAD), np.float32)
    for plane, (shape, scale) in zip(planes, kinds, strict=True):
        _, diffuse, left, top = _sprite(SHAPES[shape], scale, 0, 0)
        rows, columns = np.arange(diffuse.shape[0]) + top, np.arange(diffuse.shape[1]) + left
        plane[np.ix_(rows % _PAD, columns % _PAD)] = diffuse
    spectra = fft.fft2(planes).astype(np.complex64)
    overlap = np.stack([fft.ifft2(one * spectra.conj()).real.astype(np.float32) for one in spectra])
    extents = np.array([[e * scale * STEP for e in extent(SHAPES[shape])] for shape, scale in kinds])
    shapes, scales = np.array(kinds).T
    return _Bank(shapes, scales, extents, spectra.conj(), (planes**2).sum(axis=(1, 2)), overlap)


@dataclass(frozen=True)
class _Guesses:
    """Per coarse template (N,): the best base point (whole pixels) on one edge, and the complex correlation there."""

    x: np.ndarray
    y: np.ndarray
    match: np.ndarray


def _guess(maps: np.ndarray, energy: np.ndarray, x: np.ndarray | None, y: np.ndarray | None) -> _Guesses:
    """Each template's best place among its columns `x` ± 1 or rows `y` ± 1 ((N,) whole pixels; None = anywhere)."""
    score = 2 * np.abs(maps) - energy[:, None, None]
    grid = np.arange(maps.shape[1])
    if x is not None:
        score = np.where(np.abs(grid - x[:, None]) <= 1, score.swapaxes(0, 1), -np.inf).swapaxes(0, 1)
    if y is not None:
        score = np.where((np.abs(grid - y[:, None]) <= 1)[:, :, None], score, -np.inf)
    best = score.reshape(len(score), -1).argmax(axis=1)
    rows, columns = np.divmod(best, maps.shape[2])
    return _Guesses(columns, rows, maps[np.arange(len(maps)), rows, columns])


def _edges(plane: np.ndarray) -> tuple[float, float, float, float]:
    """Where the coloured area begins and ends, (x0, y0, x1, y1) in pixels, interpolated within the outermost pixels."""
    strength = np.abs(plane)
    found: list[float] = []
    for profile in (strength.max(axis=0), strength.max(axis=1)):
        inside = np.flatnonzero(profile > _COLOURED)
        first, last = int(inside[0]), int(inside[-1])
        found += [first + 1 - min(profile[first], 1.0), last + min(profile[last], 1.0)]
    return found[0], found[2], found[1], found[3]


def _pair_hypotheses(first: _Guesses, second: _Guesses) -> list[tuple[float, tuple[Pose, ...]]]:
    """(loss, poses) of the best scales for each two shapes; `first` is the left or the upper one. Losses leave out
    |plane|².
    """
    bank = _bank()
    energy, count = bank.energy, np.arange(len(bank.energy))
    dx, dy = (second.x[None] - first.x[:, None]) % _PAD, (second.y[None] - first.y[:, None]) % _PAD
    shared = bank.overlap[count[:, None], count[None], dy, dx]
    along = [g.match / np.maximum(np.abs(g.match), 1e-9) for g in (first, second)]
    agree = (along[0][:, None].conj() * along[1][None]).real
    gain_1, gain_2 = energy - 2 * np.abs(first.match), energy - 2 * np.abs(second.match)
    loss = gain_1[:, None] + gain_2[None] + 2 * agree * shared
    found: list[tuple[float, tuple[Pose, ...]]] = []
    for a, b in itertools.product(range(len(SHAPES)), repeat=2):
        rows, columns = np.flatnonzero(bank.shapes == a), np.flatnonzero(bank.shapes == b)
        block = loss[np.ix_(rows, columns)]
        i, j = np.unravel_index(block.argmin(), block.shape)
        found.append((float(block[i, j]), (_pose(first, int(rows[i])), _pose(second, int(columns[j])))))
    return found


def _pose(guesses: _Guesses, index: int) -> Pose:
    bank = _bank()
    x, y = int(guesses.x[index]) * _FINE, int(guesses.y[index]) * _FINE
    return Pose(SHAPES[bank.shapes[index]], x, y, int(bank.scales[index]))


def _hypotheses(plane: np.ndarray) -> tuple[list[tuple[Pose, ...]], list[tuple[Pose, ...]]]:
    """Singles and pairs worth refining, most likely first."""
    bank = _bank()
    maps = fft.ifft2(fft.fft2(plane, s=(_PAD, _PAD)) * bank.spectra)[:, : SIDE + 1, : SIDE + 1]
    x0, y0, x1, y1 = _edges(plane)
    half, below, above = bank.extents.T
    left, right = np.rint(x0 + half), np.rint(x1 - half)
    upper, lower = np.rint(y0 + above), np.rint(y1 - below)
    free = _guess(maps, bank.energy, None, None)
    loss = bank.energy - 2 * np.abs(free.match)
    singles = []
    for shape in range(len(SHAPES)):
        rows = np.flatnonzero(bank.shapes == shape)
        best = int(rows[loss[rows].argmin()])
        singles.append((float(loss[best]), (_pose(free, best),)))
    pairs = _pair_hypotheses(_guess(maps, bank.energy, left, None), _guess(maps, bank.energy, right, None))
    pairs += _pair_hypotheses(_guess(maps, bank.energy, None, upper), _guess(maps, bank.energy, None, lower))
    return _ranked(singles)[:_SINGLES], _ranked(pairs)[:_PAIRS]


def _ranked(found: list[tuple[float, tuple[Pose, ...]]]) -> list[tuple[Pose, ...]]:
    return [poses for _, poses in sorted(found, key=lambda one: one[0])]


# --- refinement -------------------------------------------------------------------------------------------------------


def _layers(poses: tuple[Pose, ...]) -> np.ndarray:
    """(K, 32 · 32): each solid's diffuse plane; the first covers the second where they overlap."""
    layers = np.zeros((len(poses), SIDE, SIDE), np.float32)
    for i in range(len(poses) - 1, -1, -1):
        pose = poses[i]
        coverage, diffuse, left, top = _sprite(pose.shape, pose.scale, pose.x % _FINE, pose.y % _FINE)
        left, top = left + pose.x // _FINE, top + pose.y // _FINE
        r0, r1 = max(top, 0), min(top + coverage.shape[0], SIDE)
        c0, c1 = max(left, 0), min(left + coverage.shape[1], SIDE)
        if r1 <= r0 or c1 <= c0:
            continue
        layers[i, r0:r1, c0:c1] = diffuse[r0 - top : r1 - top, c0 - left : c1 - left]
        if i + 1 < len(poses):
            layers[i + 1, r0:r1, c0:c1] *= 1 - coverage[r0 - top : r1 - top, c0 - left : c1 - left]
    return layers.reshape(len(poses), -1)


def _fit(plane: np.ndarray, poses: tuple[Pose, ...]) -> tuple[float, tuple[complex, ...]]:
    """(loss, each solid's complex amplitude) by least squares; `plane` is (32 · 32, 2), real and imaginary parts.

    The loss is minus the energy explained, plus a charge on amplitudes far from 1: a faint template is the wrong
    template.
    """
    layers = _layers(poses)
    gram, match = (layers @ layers.T).tolist(), (layers @ plane).tolist()
    if len(poses) == 1:
        aa, (re, im) = max(gram[0][0], 1e-9), match[0]
        u = complex(re / aa, im / aa)
        return -(re * re + im * im) / aa + _CHARGE * aa * (abs(u) - 1) ** 2, (u,)
    (aa, ab), (_, bb) = gram
    ma, mb = complex(*match[0]), complex(*match[1])
    det = max(aa * bb - ab * ab, 1e-9)
    u, v = (bb * ma - ab * mb) / det, (aa * mb - ab * ma) / det
    explained = u.real * ma.real + u.imag * ma.imag + v.real * mb.real + v.imag * mb.imag
    return _CHARGE * (aa * (abs(u) - 1) ** 2 + bb * (abs(v) - 1) ** 2) - explained, (u, v)


def _moved(poses: tuple[Pose, ...], which: int, dx: int, dy: int, scale: int) -> tuple[Pose, ...]:
    old = poses[which]
    new = Pose(old.shape, old.x + dx, old.y + dy, min(max(old.scale + scale, _SMALLEST), _LARGEST))
    return (*poses[:which], new, *poses[which + 1 :])


# x, y, scale; the last two change the scale with the top in place
_MOVES = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (0, 1, 1), (0, -1, -1))


def _refine(plane: np.ndarray, poses: tuple[Pose, ...], step: int, rounds: int) -> tuple[float, tuple[Pose, ...]]:
    """Greedy coordinate descent in moves of `step` quarter pixels, at most `rounds` passes over all coordinates."""
    best = _fit(plane, poses)[0]
    for _ in range(rounds):
        before = best
        for which, (dx, dy, scale) in itertools.product(range(len(poses)), _MOVES):
            trial = _moved(poses, which, dx * step, dy * step, scale * step)
            loss = _fit(plane, trial)[0]
            if loss < best:
                best, poses = loss, trial
        if best == before:
            break
    return best, poses


def _swapped(poses: tuple[Pose, ...], which: int, shape: str) -> tuple[Pose, ...]:
    """Another shape of the same height on the same ground."""
    old = poses[which]
    (_, below, above), (_, new_below, new_above) = extent(old.shape), extent(shape)
    scale = old.scale * (below + above) / (new_below + new_above)
    y = round(old.y + old.scale * below - scale * new_below)
    new = Pose(shape, old.x, y, min(max(round(scale), _SMALLEST), _LARGEST))
    return (*poses[:which], new, *poses[which + 1 :])


def _best(plane: np.ndarray, hypotheses: list[tuple[Pose, ...]]) -> tuple[float, tuple[Pose, ...]]:
    """Halves the field at each finer step; then tries other shapes in the winner's places for as long as that helps."""
    field = [_refine(plane, poses, 3, 1) for poses in hypotheses]
    for step, keep in ((2, 3), (1, 2)):
        field = sorted(field, key=lambda one: one[0])[:keep]
        field = [_refine(plane, poses, step, 3) for _, poses in field]
    best = min(field, key=lambda one: one[0])
    for _ in range(_SWAPS):
        places = itertools.product(range(len(best[1])), SHAPES)
        others = [_swapped(best[1], which, shape) for which, shape in places if shape != best[1][which].shape]
        field = sorted((_refine(plane, poses, 2, 2) for poses in others), key=lambda one: one[0])[:2]
        field = [_refine(plane, _refine(plane, poses, 2, 2)[1], 1, 3) for _, poses in field]
        other = min(field, key=lambda one: one[0])
        if other[0] >= best[0]:
            break
        best = other
    return best


def _visible(poses: tuple[Pose, ...]) -> float:
    """The share of the last solid's template that the first does not cover."""
    alone, partly = _layers(poses[-1:])[0], _layers(poses)[-1]
    return float(partly.sum() / max(alone.sum(), 1e-9))


def fit_solids(plane: np.ndarray) -> tuple[Fit, Fit | None] | None:
    """The best single solid for a plane of `signal`, and the best pair unless the single leaves less than
    `ONE_IS_ENOUGH`.

    None if too little or too much of the plane is coloured for solids.
    """
    strength = np.abs(plane)
    if not _FEWEST <= np.count_nonzero(strength > _COLOURED) <= _MOST:
        return None
    faint = strength < _FAINT
    noise = min(float(np.median(strength[faint] ** 2)) / np.log(2), _MOST_NOISE) if faint.any() else 0.0
    clean = np.where(faint, 0, plane)
    flat = np.stack([np.real(clean).ravel(), np.imag(clean).ravel()], axis=1)
    forgiven = noise * np.count_nonzero(clean)  # the noise's energy: complex normal, so its mean is the median / ln 2
    total = float((flat**2).sum())

    def best(hypotheses: list[tuple[Pose, ...]]) -> Fit:
        loss, poses = _best(flat, hypotheses)
        residual = max(total + loss - forgiven, 0.0) / max(total - forgiven, 1e-9)
        return Fit(poses, _fit(flat, poses)[1], residual, _visible(poses))

    singles, pairs = _hypotheses(clean)
    single = best(singles)
    return single, None if single.residual < ONE_IS_ENOUGH else best(pairs)


def colour_of(amplitude: complex) -> tuple[str, float]:
    """The nearest palette colour of a solid's amplitude, and how far off its hue is: 0 exact, 1 half way to the next
    colour.
    """
    names = _wheel()[3]
    turns = float(np.angle(amplitude) / (2 * np.pi)) * len(names)
    nearest = round(turns)
    return names[nearest % len(names)], 2 * abs(turns - nearest)
