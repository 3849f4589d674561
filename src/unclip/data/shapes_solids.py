"""The five solids of the shapes data as closed-form surfaces: where a viewing ray meets them, and how the light falls.

World axes: X right, Y up, Z towards the viewer. A solid stands on the floor with the middle of its base at the origin
and is about one unit wide. The camera is orthographic and looks down by `PITCH`; screen coordinates are x (right) and
y (up), in the same units, with the origin at the middle of the base.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

PITCH = math.radians(20.0)
_COS, _SIN = math.cos(PITCH), math.sin(PITCH)
_LIGHT = np.array([-0.40, 0.86, 0.32])  # from the upper left, a little in front, so that a cube's three faces differ
_AMBIENT, _DIFFUSE, _GLOSS, _SHININESS = 0.54, 0.54, 0.40, 22.0

_CUBE_SIDE, _CUBE_YAW = 0.70, math.radians(40.0)
_CONE_RADIUS, _CONE_HEIGHT = 0.48, 0.95
_CYLINDER_RADIUS, _CYLINDER_HEIGHT = 0.38, 0.85
_RING_MIDDLE, _RING_TUBE = 0.345, 0.155  # outer radius 0.5, hole radius 0.19

# Height (world Y) of the point on which another solid rests.
TOP: dict[str, float] = {
    "cube": _CUBE_SIDE,
    "sphere": 1.0,
    "cone": _CONE_HEIGHT,
    "cylinder": _CYLINDER_HEIGHT,
    "ring": 1.0,
}
SHAPES: tuple[str, ...] = tuple(TOP)

# hit (...,) bool; unit normal (..., 3) in world axes, arbitrary without a hit
_Surface = tuple[np.ndarray, np.ndarray]


def _to_world(across: np.ndarray, up: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Camera axes (right, up the screen, towards the camera) to world axes."""
    return np.stack([across, up * _COS + near * _SIN, near * _COS - up * _SIN], axis=-1)


def _sphere(x: np.ndarray, y: np.ndarray) -> _Surface:
    up = y - 0.5 * _COS
    near_squared = 0.25 - x**2 - up**2
    return near_squared >= 0, _to_world(x, up, np.sqrt(np.maximum(near_squared, 0))) / 0.5


def _ring(x: np.ndarray, y: np.ndarray) -> _Surface:
    """A torus that stands upright and faces the camera, so that its hole shows."""
    up = y - 0.5 * _COS
    radius = np.maximum(np.hypot(x, up), 1e-9)
    off = radius - _RING_MIDDLE
    near_squared = _RING_TUBE**2 - off**2
    normal = _to_world(off * x / radius, off * up / radius, np.sqrt(np.maximum(near_squared, 0))) / _RING_TUBE
    return near_squared >= 0, normal


def _cylinder(x: np.ndarray, y: np.ndarray) -> _Surface:
    depth = np.sqrt(np.maximum(_CYLINDER_RADIUS**2 - x**2, 0))
    height = y * _COS + (depth + y * _SIN) / _COS * _SIN
    side = (np.abs(x) <= _CYLINDER_RADIUS) & (height >= 0) & (height <= _CYLINDER_HEIGHT)
    lid_depth = -y * _SIN + (_CYLINDER_HEIGHT - y * _COS) / _SIN * _COS
    lid = x**2 + lid_depth**2 <= _CYLINDER_RADIUS**2
    normal = np.stack([x / _CYLINDER_RADIUS, np.zeros_like(x), depth / _CYLINDER_RADIUS], axis=-1)
    normal[lid] = (0.0, 1.0, 0.0)
    return side | lid, normal


def _cone(x: np.ndarray, y: np.ndarray) -> _Surface:
    """Solves x² + Z² = (r - kY)² along the ray Y = y cos + t sin, Z = -y sin + t cos; keeps the root nearer to the
    camera.
    """
    slope = _CONE_RADIUS / _CONE_HEIGHT
    reach = _CONE_RADIUS - slope * y * _COS
    a = _COS**2 - (slope * _SIN) ** 2
    half_b = reach * slope * _SIN - y * _SIN * _COS
    disc = half_b**2 - a * (x**2 + (y * _SIN) ** 2 - reach**2)
    t = (-half_b + np.sqrt(np.maximum(disc, 0))) / a
    height, depth = y * _COS + t * _SIN, -y * _SIN + t * _COS
    radius = np.maximum(np.hypot(x, depth), 1e-9)
    normal = np.stack([x / radius, np.full_like(x, slope), depth / radius], axis=-1) / math.hypot(1.0, slope)
    return (disc >= 0) & (height >= 0) & (height <= _CONE_HEIGHT), normal


def _cube(x: np.ndarray, y: np.ndarray) -> _Surface:
    """Slab method: the ray enters through the last of the three facing planes that it crosses."""
    cos, sin, half = math.cos(_CUBE_YAW), math.sin(_CUBE_YAW), _CUBE_SIDE / 2
    faces = np.array([[-cos, 0.0, sin], [0.0, 1.0, 0.0], [sin, 0.0, cos]])  # the normals of left, top and right
    origin = np.stack([x, y * _COS - half, -y * _SIN], axis=-1) @ faces.T
    speed = faces @ np.array([0.0, _SIN, _COS])
    enter, leave = (
        (half - origin) / speed,
        (-half - origin) / speed,
    )  # t grows towards the camera: `enter` is the larger
    first = enter.argmin(axis=-1)
    return enter.min(axis=-1) >= leave.max(axis=-1), faces[first]


_TRACE: dict[str, Callable[[np.ndarray, np.ndarray], _Surface]] = {
    "cube": _cube,
    "sphere": _sphere,
    "cone": _cone,
    "cylinder": _cylinder,
    "ring": _ring,
}


def shade(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(..., 3): coverage, 0 or 1; coverage x diffuse factor on the colour (0.54 to 1.08); coverage x white gloss (0
    to 0.4).
    """
    hit, normal = _TRACE[shape](x, y)
    light = _LIGHT / np.linalg.norm(_LIGHT)
    half_way = light + np.array([0.0, _SIN, _COS])
    half_way /= np.linalg.norm(half_way)
    diffuse = _AMBIENT + _DIFFUSE * np.maximum(normal @ light, 0)
    gloss = np.zeros_like(diffuse) if shape == "cube" else _GLOSS * np.maximum(normal @ half_way, 0) ** _SHININESS
    return np.where(hit[..., None], np.stack([np.ones_like(diffuse), diffuse, gloss], axis=-1), 0.0)


@cache
def extent(shape: str) -> tuple[float, float, float]:
    """(half width, reach below the base point, reach above it) of the silhouette on the screen, in units of the
    solid.
    """
    grid = np.linspace(-0.6, 1.4, 1001)
    x, y = np.meshgrid(grid, grid)
    inside = _TRACE[shape](x, y)[0]
    return float(np.abs(x[inside]).max()), float(-y[inside].min()), float(y[inside].max())


def rise(shape: str) -> float:
    """How far above the base point, on the screen, another solid's base point lies when it rests on this one."""
    return TOP[shape] * _COS
