"""SVG charts of lines, bands and dots over labeled axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 36, 16, 40  # pixels around the field
_GRID, _TICKS, _MUCH, _NEAR = "#e4e7eb", 4, 5.0, 1e-6

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """points: from left to right; band: (low, high) at each of them."""

    points: Sequence[Point]
    color: str
    band: Sequence[Point] = ()
    dashed: bool = False
    dots: bool = True
    stroke: bool = True


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`. labels: what is written at which values; log: equal ratios are equally long."""

    low: float
    high: float
    labels: Mapping[float, str]
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], form: str = "g", zero: bool = False) -> Axis:
        """Round numbers, in the format `form`, around all finite values; zero: from 0 on. 0 to 1 where there are none."""
        there = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(*there, 0.0) if zero else min(there), max(there)
        if low == high:
            margin = abs(low) / 2 or 0.5
            low, high = low if zero else low - margin, high + margin
        step = _round((high - low) / _TICKS)
        first, last = math.floor(low / step + _NEAR), math.ceil(high / step - _NEAR)
        ticks = [float(f"{step * n:.10g}") for n in range(first, last + 1)]
        return cls(ticks[0], ticks[-1], {tick: format(tick, form) for tick in ticks})

    @classmethod
    def ratios(cls, values: Iterable[float]) -> Axis:
        """As `over`, on a log scale where values above 0 differ by much."""
        there = [value for value in values if math.isfinite(value)]
        if not there or min(there) <= 0 or max(there) < _MUCH * min(there):
            return cls.over(there)
        powers = range(math.floor(math.log10(min(there))) - 1, math.ceil(math.log10(max(there))) + 1)
        marks = [float(f"{times}e{power}") for power in powers for times in (1, 2, 5)]
        low, high = max(m for m in marks if m <= min(there)), min(m for m in marks if m >= max(there))
        inside = [mark for mark in marks if low <= mark <= high]
        every = -(-len(inside) // (_TICKS + 2))
        return cls(low, high, {mark: f"{mark:g}" for mark in inside[::every]}, log=True)

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)


def layers(count: int) -> Axis:
    """What enters a tower, and what leaves each of its blocks: every one is named where there is room, else some."""
    every = -(-count // 12)
    named = {n: f"layer {n}" if count <= 8 else str(n) for n in range(1, count + 1) if n % every == 0}
    return Axis(0, max(count, 1), {0: "input", **named})


def chart(lines: Sequence[Line], across: Axis, up: Axis, what: str, size: tuple[int, int] = (760, 300)) -> str:
    """An SVG, as wide as the page lets it be. what: what it shows, for those who cannot see it; size: in pixels."""
    width, height = size

    def at(point: Point) -> Point:
        x = _LEFT + (width - _LEFT - _RIGHT) * across.place(point[0])
        return x, _TOP + (height - _TOP - _BOTTOM) * (1 - up.place(point[1]))

    parts = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{escape(what)}">']
    for value, label in up.labels.items():
        y = at((across.low, value))[1]
        parts.append(f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for value, label in across.labels.items():
        parts.append(
            f'<text x="{at((value, up.low))[0]:.1f}" y="{height - 14}" text-anchor="middle">{escape(label)}</text>'
        )
    for line in lines:
        parts += _drawn(line, at)
    return "".join(parts) + "</svg>"


def _drawn(line: Line, at: Callable[[Point], Point]) -> Iterator[str]:
    """Band, stroke and dots, each over those before. Points that are no numbers are left out."""
    there = [n for n, point in enumerate(line.points) if all(map(math.isfinite, point))]
    points = [at(line.points[n]) for n in there]
    if line.band and points:
        low, high = ([at((line.points[n][0], line.band[n][side])) for n in there] for side in (0, 1))
        yield f'<polygon points="{_path([*low, *reversed(high)])}" fill="{line.color}" opacity="0.15"/>'
    if line.stroke and len(points) > 1:
        dashes = ' stroke-dasharray="6 5"' if line.dashed else ""
        yield f'<polyline points="{_path(points)}" fill="none" stroke="{line.color}" stroke-width="2.5"{dashes}/>'
    if line.dots or len(points) == 1:  # one alone has no stroke to be seen by
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{line.color}"/>' for x, y in points)


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _round(step: float) -> float:
    """The least of 1, 2, 5, 10 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * (1 - 1e-9))
