"""Images of synthetic scenes: colored shapes on a cluttered background. Needs only numpy and Pillow.

A scene is three to six shapes that do not touch. Each has a shape, a color and a size. The background is
low-frequency color noise with stripes, checkers or nothing, grain, and low-contrast scribbles. So most patches of an
image carry no answer to any sentence about it.
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


class SceneObject(NamedTuple):
    """One object of a scene.

    Attributes:
        shape: Index into SHAPES.
        color: Index into COLORS.
        size: Index into SIZES.
        x: Center, in pixels from the left.
        y: Center, in pixels from the top.
        diameter: In pixels.
        tilt: In radians.
    """

    shape: int
    color: int
    size: int
    x: float
    y: float
    diameter: float
    tilt: float


Scene = tuple[SceneObject, ...]


def draw_scenes(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Draw the left and the right scene of a pair.

    The two scenes share the probabilities of shapes and colors, so that objects repeat and often occur in both images.
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
    centers = _draw_centers(rng, diameters)
    tilts = rng.uniform(-0.25, 0.25, count)

    columns = (shapes, colors, sizes, *centers.T, diameters, tilts)
    return tuple(SceneObject(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def _draw_centers(rng: np.random.Generator, diameters: np.ndarray) -> np.ndarray:
    """Centers [objects, 2] that keep objects apart; positions are redrawn, never sizes, so that sizes stay fair coins."""
    order = np.argsort(-diameters)
    while True:
        centers = np.zeros((len(diameters), 2))
        for step, item in enumerate(order):
            placed = order[:step]
            margin = diameters[item] / 2 + 1
            tries = rng.uniform(margin, SIDE - margin, (24, 2))
            distance = np.linalg.norm(tries[:, None] - centers[placed][None], axis=-1)
            free = (distance >= (diameters[placed] + diameters[item]) / 2 + _GAP).all(-1)
            if not free.any():
                break
            centers[item] = tries[free.argmax()]
        else:
            return centers


def paint(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paint a scene on a background of clutter.

    Args:
        scene: The objects; they do not touch.
        rng: Draws the background, the shades of the objects, and the grain.

    Returns:
        The image, uint8 [SIDE, SIDE, 3], and the object at each pixel, uint8 [SIDE, SIDE]. The latter is 0 for the
        background and i + 1 for object i.
    """
    image = _scribble(_background(rng), rng)
    object_map = np.zeros((SIDE, SIDE), np.uint8)
    for index, item in enumerate(scene):
        rows, columns, cover = _cover(item)
        ink = _RGB[item.color] * rng.uniform(0.85, 1.05) + rng.normal(0, 6, (*cover.shape, 1))
        window = image[rows, columns]
        image[rows, columns] = window + cover[..., None] * (ink - window)
        object_map[rows, columns][cover > 0.5] = index + 1

    image += rng.standard_normal((SIDE, SIDE, 1), dtype=np.float32) * rng.uniform(2, 8)
    return image.clip(0, 255).astype(np.uint8), object_map


def _background(rng: np.random.Generator) -> np.ndarray:
    coarse = int(rng.integers(3, 9))
    smooth = _interpolation(coarse)
    blobs = np.einsum("ya,abc,xb->yxc", smooth, rng.normal(0, 22, (coarse, coarse, 3)), smooth, optimize=True)
    texture = rng.uniform(6, 18) * _texture(rng)[..., None] * rng.uniform(0.6, 1.0, 3)
    return (rng.uniform(60, 150) + rng.uniform(-12, 12, 3) + blobs + texture).astype(np.float32)


def _interpolation(coarse: int) -> np.ndarray:
    """The matrix [SIDE, coarse] of linear interpolation from a coarse row to a full one."""
    position = np.linspace(0, coarse - 1, SIDE)[:, None]
    return np.clip(1 - np.abs(position - np.arange(coarse)), 0, None)


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


def _scribble(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The background with six to fourteen low-contrast lines, as float32 [SIDE, SIDE, 3]."""
    sheet = Image.new("L", (SIDE, SIDE), 128)
    pen = ImageDraw.Draw(sheet)
    for _ in range(rng.integers(6, 15)):
        start = rng.uniform(0, SIDE, 2)
        points = start + np.cumsum(rng.normal(0, 9, (4, 2)), axis=0)
        shade = int(128 + rng.choice((-1, 1)) * rng.uniform(12, 30))
        pen.line([tuple(point) for point in points], fill=shade, width=int(rng.integers(1, 3)))
    return background + (np.asarray(sheet, np.float32) - 128)[..., None]


def _cover(item: SceneObject) -> tuple[slice, slice, np.ndarray]:
    """The window of an object, as row and column slices, and how much of each of its pixels the object covers, 0 to 1."""
    reach = int(item.diameter / 2) + 2
    left, top = max(int(item.x) - reach, 0), max(int(item.y) - reach, 0)
    right, bottom = min(int(item.x) + reach + 1, SIDE), min(int(item.y) + reach + 1, SIDE)
    sheet = Image.new("L", ((right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING), 0)
    outline = (_outline(item) + (item.x - left, item.y - top)) * _SUPERSAMPLING
    ImageDraw.Draw(sheet).polygon([tuple(corner) for corner in outline], fill=255)
    cover = np.asarray(sheet.reduce(_SUPERSAMPLING), np.float32) / 255
    return slice(top, bottom), slice(left, right), cover


def _outline(item: SceneObject) -> np.ndarray:
    """Corners [n, 2] around the origin, inside a circle of the object's diameter."""
    corners = _UNIT_OUTLINES[SHAPES[item.shape]]
    cos, sin = math.cos(item.tilt), math.sin(item.tilt)
    return corners @ np.array([[cos, sin], [-sin, cos]]) * (item.diameter / 2)


def _polygon(corners: int, radii: tuple[float, ...] = (1.0,), angle: float = 0.0) -> np.ndarray:
    angles = 2 * math.pi * np.arange(corners) / corners + angle
    radius = np.resize(radii, corners)
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], axis=-1)


_ARM = 0.32
_UNIT_OUTLINES = {
    "circle": _polygon(32, (0.95,)),
    "square": _polygon(4, angle=math.pi / 4) * 1.1,
    "triangle": _polygon(3) + (0.0, 0.12),
    "star": _polygon(10, (1.0, 0.42)),
    "cross": np.array(
        [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
        + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
    )
    * 0.95,
}
