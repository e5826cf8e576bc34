"""SVG charts of lines, bands and marks over labeled axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 36, 16, 40  # pixels around the plot area
_GRID, _TICKS = "#e4e7eb", 4
_LOG_FROM = 5.0  # largest value over smallest from which an axis is logarithmic
_NEAR = 1e-6
_SAME, _SHIFT = 1.0, 9.0  # pixels: within which two lines coincide, and between their marks then
_RADIUS = 4.0
_DASHES, _GAPS = "6 5", "9 9"

_SERIES = (
    ("#3b3f46", "circle"),
    ("#1f6fd6", "square"),
    ("#d98a1f", "triangle"),
    ("#0a9b74", "diamond"),
    ("#c8452f", "circle"),
    ("#8a58c7", "square"),
    ("#7b7f87", "triangle"),
)
_CORNERS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
    "diamond": ((0.0, -1.4), (1.4, 0.0), (0.0, 1.4), (-1.4, 0.0)),
}

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        points: (x, y) from left to right; points that are not finite are left out.
        color: A CSS color.
        band: (low, high) around each point, drawn pale; empty for no band.
        dashed: Whether the line is dashed.
        mark: The shape at each point, "circle", "square", "triangle" or "diamond"; None for no marks.
        stroke: Whether the points are joined.
    """

    points: Sequence[Point]
    color: str
    band: Sequence[Point] = ()
    dashed: bool = False
    mark: str | None = "circle"
    stroke: bool = True


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its labels.

    Attributes:
        low: The value at its beginning.
        high: The value at its end.
        labels: The text at each labeled value.
        log: Whether the scale is logarithmic.
    """

    low: float
    high: float
    labels: Mapping[float, str]
    log: bool = False

    @classmethod
    def from_values(cls, values: Iterable[float], form: str = "g", zero: bool = False) -> Axis:
        """Build a linear axis with round labels that holds all finite values; 0 to 1 where there are none.

        Args:
            values: The values to hold.
            form: The format of the labels, as of `format`.
            zero: Whether the axis includes 0.

        Returns:
            The axis, from the first label to the last.
        """
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(*finite, 0.0) if zero else min(finite), max(finite)
        if low == high:
            margin = abs(low) / 2 or 0.5
            low, high = low if zero else low - margin, high + margin
        step = _round_up((high - low) / _TICKS)
        first, last = math.floor(low / step + _NEAR), math.ceil(high / step - _NEAR)
        ticks = [float(f"{step * n:.10g}") for n in range(first, last + 1)]
        return cls(ticks[0], ticks[-1], {tick: format(tick, form) for tick in ticks})

    @classmethod
    def log_from_values(cls, values: Iterable[float]) -> Axis:
        """Build a logarithmic axis where all values are above 0 and the largest is 5 times the smallest, else a linear one."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite or min(finite) <= 0 or max(finite) < _LOG_FROM * min(finite):
            return cls.from_values(finite)
        powers = range(math.floor(math.log10(min(finite))) - 1, math.ceil(math.log10(max(finite))) + 1)
        marks = [float(f"{times}e{power}") for power in powers for times in (1, 2, 5)]
        low, high = max(m for m in marks if m <= min(finite)), min(m for m in marks if m >= max(finite))
        inside = [mark for mark in marks if low <= mark <= high]
        every = -(-len(inside) // (_TICKS + 2))
        return cls(low, high, {mark: f"{mark:g}" for mark in inside[::every]}, log=True)

    def position(self, value: float) -> float:
        """Where a value lies on the axis, 0 at its beginning to 1 at its end."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)


def layer_axis(layers: int) -> Axis:
    """The axis of what enters a tower and what leaves each of its layers; at most twelve layers are labeled."""
    every = -(-layers // 12)
    named = {n: f"layer {n}" if layers <= 8 else str(n) for n in range(1, layers + 1) if n % every == 0}
    return Axis(0, max(layers, 1), {0: "input", **named})


def series_color(index: int) -> str:
    """The color of a chart's series, the same in legends and tables."""
    return _SERIES[index % len(_SERIES)][0]


def series_mark(index: int) -> str:
    """The mark of a chart's series, the same in legends and tables."""
    return _SERIES[index % len(_SERIES)][1]


def symbol(index: int) -> str:
    """A series' mark in its color, as an inline SVG to put before its name."""
    mark = _marked(series_mark(index), (7.0, 7.0), series_color(index))
    return f'<svg class="symbol" viewBox="1 1 12 12" width="15" height="15" aria-hidden="true">{mark}</svg>'


def legend(names: Sequence[str]) -> str:
    """A line of HTML with the symbol and name of each series, in their order. Names are plain text."""
    named = "".join(f"<span>{symbol(i)}{escape(name)}&emsp;</span>" for i, name in enumerate(names))
    return f'<div class="quiet">{named}</div>'


def chart(lines: Sequence[Line], across: Axis, up: Axis, title: str, size: tuple[int, int] = (760, 300)) -> str:
    """Draw lines as an SVG that is as wide as its page allows.

    No line hides another: one that coincides with an earlier line is drawn with gaps, and its marks stand to the right.

    Args:
        lines: The lines, drawn in this order.
        across: The horizontal axis.
        up: The vertical axis.
        title: What the chart shows, for screen readers.
        size: Width and height of its coordinates, in pixels.

    Returns:
        The SVG element.
    """
    width, height = size

    def at(point: Point) -> Point:
        x = _LEFT + (width - _LEFT - _RIGHT) * across.position(point[0])
        return x, _TOP + (height - _TOP - _BOTTOM) * (1 - up.position(point[1]))

    parts = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{escape(title)}">']
    for value, label in up.labels.items():
        y = at((across.low, value))[1]
        parts.append(f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for value, label in across.labels.items():
        x = at((value, up.low))[0]
        parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle">{escape(label)}</text>')
    earlier: list[list[Point]] = []
    for line in lines:
        points = [at(point) for point in line.points if _finite(point)]
        covered = sum(_coincide(points, other) for other in earlier)
        parts += _line_elements(line, at, points, covered)
        earlier.append(points)
    return "".join(parts) + "</svg>"


def _line_elements(line: Line, at: Callable[[Point], Point], points: Sequence[Point], covered: int) -> Iterator[str]:
    """Band, stroke and marks, each over those before; covered: how many earlier lines lie where this one does."""
    if line.band and points:
        band = [(point[0], edges) for point, edges in zip(line.points, line.band, strict=True) if _finite(point)]
        low, high = ([at((x, edges[side])) for x, edges in band] for side in (0, 1))
        yield f'<polygon points="{_path([*low, *reversed(high)])}" fill="{line.color}" opacity="0.15"/>'
    if line.stroke and len(points) > 1:
        dashes = _GAPS if covered else _DASHES if line.dashed else ""
        dashes = dashes and f' stroke-dasharray="{dashes}"'
        yield f'<polyline points="{_path(points)}" fill="none" stroke="{line.color}" stroke-width="2.5"{dashes}/>'
    mark = line.mark or ("circle" if len(points) == 1 else None)  # a single point has no stroke to be seen by
    if mark is not None:
        yield from (_marked(mark, (x + covered * _SHIFT, y), line.color) for x, y in points)


def _marked(mark: str, center: Point, color: str) -> str:
    x, y = center
    if mark == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}" fill="{color}"/>'
    corners = [(x + _RADIUS * dx, y + _RADIUS * dy) for dx, dy in _CORNERS[mark]]
    return f'<polygon points="{_path(corners)}" fill="{color}"/>'


def _coincide(points: Sequence[Point], others: Sequence[Point]) -> bool:
    """Whether two lines have the same points, to within a pixel."""
    if len(points) != len(others) or not points:
        return False
    return all(math.dist(point, other) <= _SAME for point, other in zip(points, others, strict=True))


def _finite(point: Point) -> bool:
    return all(map(math.isfinite, point))


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _round_up(step: float) -> float:
    """The least of 1, 2, 5, 10 times a power of ten that is no smaller than a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * (1 - 1e-9))
