"""Images of synthetic scenes: colored shapes on cluttered ground. Needs only numpy and Pillow.

A scene is three to six things that do not touch. Each has a shape, a color and a size. The ground under them is
low-frequency color noise with stripes, checkers or nothing, grain, and low-contrast scribbles, so that most patches
of an image carry no answer to any sentence about it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
SIZES = ("small", "large")
FEWEST, MOST = 3, 6

_RGB = np.array(
    [(225, 40, 40), (40, 180, 60), (45, 80, 235), (240, 215, 40), (175, 50, 210), (245, 245, 245)],  # as COLORS
    np.float32,
)
_DIAMETERS = {"small": (14.0, 17.0), "large": (23.0, 27.0)}
_GAP = 2.0
_SUPERSAMPLING = 4


class Thing(NamedTuple):
    """One drawn object: indices into SHAPES, COLORS and SIZES; center and diameter in pixels; tilt in radians."""

    shape: int
    color: int
    size: int
    x: float
    y: float
    diameter: float
    tilt: float


Scene = tuple[Thing, ...]


def draw_scenes(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """The left and the right scene of a pair, alike in what they are likely to hold.

    The pair shares how likely each shape and each color is, so that things repeat and both images often hold the same.
    """
    shape_weights = rng.dirichlet(np.full(len(SHAPES), 1.5))
    color_weights = rng.dirichlet(np.full(len(COLORS), 1.5))
    left, right = (_draw_scene(rng, shape_weights, color_weights) for _ in range(2))
    return left, right


def _draw_scene(rng: np.random.Generator, shape_weights: np.ndarray, color_weights: np.ndarray) -> Scene:
    count = int(rng.integers(FEWEST, MOST + 1))
    shapes = rng.choice(len(SHAPES), count, p=shape_weights)
    colors = rng.choice(len(COLORS), count, p=color_weights)
    sizes = rng.integers(len(SIZES), size=count)
    diameters = np.array([rng.uniform(*_DIAMETERS[SIZES[size]]) for size in sizes])
    centers = _place(rng, diameters)
    tilts = rng.uniform(-0.25, 0.25, count)

    columns = (shapes, colors, sizes, *centers.T, diameters, tilts)
    return tuple(Thing(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def _place(rng: np.random.Generator, diameters: np.ndarray) -> np.ndarray:
    """Centres [things, 2] that keep things apart; positions are redrawn, never sizes, so that sizes stay fair coins."""
    order = np.argsort(-diameters)
    while True:
        centers = np.zeros((len(diameters), 2))
        for step, thing in enumerate(order):
            placed = order[:step]
            margin = diameters[thing] / 2 + 1
            tries = rng.uniform(margin, SIDE - margin, (24, 2))
            distance = np.linalg.norm(tries[:, None] - centers[placed][None], axis=-1)
            free = (distance >= (diameters[placed] + diameters[thing]) / 2 + _GAP).all(-1)
            if not free.any():
                break
            centers[thing] = tries[free.argmax()]
        else:
            return centers


def paint(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The picture of a scene, uint8 [SIDE, SIDE, 3], and whose each pixel is, uint8 [SIDE, SIDE].

    A pixel's owner is 0 for the ground and i + 1 for thing i.
    """
    picture = _scribble(_ground(rng), rng)
    object_map = np.zeros((SIDE, SIDE), np.uint8)
    for index, thing in enumerate(scene):
        rows, columns, cover = _cover(thing)
        ink = _RGB[thing.color] * rng.uniform(0.85, 1.05) + rng.normal(0, 6, (*cover.shape, 1))
        window = picture[rows, columns]
        picture[rows, columns] = window + cover[..., None] * (ink - window)
        object_map[rows, columns][cover > 0.5] = index + 1

    picture += rng.standard_normal((SIDE, SIDE, 1), dtype=np.float32) * rng.uniform(2, 8)
    return picture.clip(0, 255).astype(np.uint8), object_map


def _ground(rng: np.random.Generator) -> np.ndarray:
    coarse = int(rng.integers(3, 9))
    smooth = _interpolation(coarse)
    blobs = np.einsum("ya,abc,xb->yxc", smooth, rng.normal(0, 22, (coarse, coarse, 3)), smooth, optimize=True)
    texture = rng.uniform(6, 18) * _texture(rng)[..., None] * rng.uniform(0.6, 1.0, 3)
    return (rng.uniform(60, 150) + rng.uniform(-12, 12, 3) + blobs + texture).astype(np.float32)


def _interpolation(coarse: int) -> np.ndarray:
    """The matrix [SIDE, coarse] of linear interpolation from a coarse row to a full one."""
    at = np.linspace(0, coarse - 1, SIDE)[:, None]
    return np.clip(1 - np.abs(at - np.arange(coarse)), 0, None)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Stripes, checkers or nothing, [SIDE, SIDE] within -1 and 1."""
    kind = rng.integers(3)
    if kind == 0:
        return np.zeros((SIDE, SIDE))

    angle, period = rng.uniform(0, math.pi), rng.uniform(6, 20)
    y, x = np.mgrid[:SIDE, :SIDE] * (2 * math.pi / period)
    along = np.sin(x * math.cos(angle) + y * math.sin(angle))
    across = np.sin(y * math.cos(angle) - x * math.sin(angle))
    return along if kind == 1 else np.sign(along * across)


def _scribble(ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ground with six to fourteen low-contrast lines, as float32 [SIDE, SIDE, 3]."""
    sheet = Image.new("L", (SIDE, SIDE), 128)
    pen = ImageDraw.Draw(sheet)
    for _ in range(rng.integers(6, 15)):
        start = rng.uniform(0, SIDE, 2)
        points = start + np.cumsum(rng.normal(0, 9, (4, 2)), axis=0)
        shade = int(128 + rng.choice((-1, 1)) * rng.uniform(12, 30))
        pen.line([tuple(point) for point in points], fill=shade, width=int(rng.integers(1, 3)))
    return ground + (np.asarray(sheet, np.float32) - 128)[..., None]


def _cover(thing: Thing) -> tuple[slice, slice, np.ndarray]:
    """The window of a thing, as row and column slices, and how much of each of its pixels the thing covers, 0 to 1."""
    reach = int(thing.diameter / 2) + 2
    left, top = max(int(thing.x) - reach, 0), max(int(thing.y) - reach, 0)
    right, bottom = min(int(thing.x) + reach + 1, SIDE), min(int(thing.y) + reach + 1, SIDE)
    sheet = Image.new("L", ((right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING), 0)
    outline = (_outline(thing) + (thing.x - left, thing.y - top)) * _SUPERSAMPLING
    ImageDraw.Draw(sheet).polygon([tuple(corner) for corner in outline], fill=255)
    cover = np.asarray(sheet.reduce(_SUPERSAMPLING), np.float32) / 255
    return slice(top, bottom), slice(left, right), cover


def _outline(thing: Thing) -> np.ndarray:
    """Corners [n, 2] around the origin, inside a circle of the thing's diameter."""
    corners = _UNIT_OUTLINES[SHAPES[thing.shape]]
    cos, sin = math.cos(thing.tilt), math.sin(thing.tilt)
    return corners @ np.array([[cos, sin], [-sin, cos]]) * (thing.diameter / 2)


def _polygon(corners: int, radii: tuple[float, ...] = (1.0,), turn: float = 0.0) -> np.ndarray:
    angle = 2 * math.pi * np.arange(corners) / corners + turn
    radius = np.resize(radii, corners)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=-1)


_ARM = 0.32
_UNIT_OUTLINES = {
    "circle": _polygon(32, (0.95,)),
    "square": _polygon(4, turn=math.pi / 4) * 1.1,
    "triangle": _polygon(3) + (0.0, 0.12),
    "star": _polygon(10, (1.0, 0.42)),
    "cross": np.array(
        [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
        + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
    )
    * 0.95,
}
