"""Charts of the leaderboard as SVG: scores by preset, and scores over measured time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from html import escape

from leaderboard_board import BASELINE, DENSE, RESIZE, TITLES, Board

_COLORS = {0.3: "#7db3ec", 0.5: "#1f6fd6", 0.7: "#0b2f63"}
_LANDMARKS = (BASELINE, "pooling", RESIZE)
_PANEL, _LABEL, _ROW, _HEAD, _FOOT = 470, 96, 15, 44, 24  # pixels
_TALL = 300  # pixels, of a panel of times
_LEFT, _RIGHT = 40, 24  # margins of it
_TICKS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def scores(board: Board) -> str:
    """A panel a task: a line a preset with a dot a cost, hollow below random choice, which vertical lines mark."""
    height = _HEAD + _ROW * (1 + len(board.presets)) + _FOOT
    return _panels([_score_panel(board, task) for task in board.tasks], height)


def times(board: Board) -> str:
    """A panel a task: a dot a cell, its score over the time of the dense model; baselines and the best have names."""
    return _panels([_time_panel(board, task) for task in board.tasks], _HEAD + _TALL + 2 * _FOOT)


def _panels(panels: list[str], height: int) -> str:
    """Panels in two columns."""
    width, rows = 2 * _PANEL, math.ceil(len(panels) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {rows * height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{rows * height}" fill="white"/>'
    ]
    for index, panel in enumerate(panels):
        x, y = index % 2 * _PANEL, index // 2 * height
        parts.append(f'<g transform="translate({x} {y})">{panel}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _score_panel(board: Board, task: str) -> str:
    present = [one for one in board.presets if _known(board, task, one)]
    present.sort(key=lambda one: -statistics.fmean(_known(board, task, one)))
    whole = board.score(task, DENSE, 0.0) or 0.0
    low = min([whole, *(score for one in present for score in _known(board, task, one))])
    across = _scale(low, whole, _LABEL, _PANEL - _RIGHT)
    bottom = _HEAD + _ROW * len(present)
    parts = [*_head(board, task), _vertical(across(whole), bottom, "black")]
    for reduction in board.reductions:
        chance = board.score(task, BASELINE, reduction)
        if chance is not None:
            parts.append(_vertical(across(chance), bottom, _color(reduction), 'stroke-dasharray="3 3"'))
    for line, preset in enumerate(present):
        y = _HEAD + _ROW * line + 6
        weight = ' font-weight="bold"' if preset in _LANDMARKS else ""
        parts.append(f'<text x="8" y="{y + 4}"{weight}>{escape(preset)}</text>')
        for reduction in board.reductions:
            score = board.score(task, preset, reduction)
            if score is not None:
                parts.append(_dot(across(score), y, reduction, board.verdict(task, preset, reduction) < 0))
    parts += [_centered(across(one), bottom + 14, f"{one:.1f}") for one in (low, whole)]
    return "".join(parts)


def _time_panel(board: Board, task: str) -> str:
    cells = [(one, cost) for one in board.presets for cost in board.reductions if board.ran(task, one, cost)]
    whole = board.score(task, DENSE, 0.0) or 0.0
    low = min([whole, *(board.score(task, one, cost) or 0.0 for one, cost in cells)])
    spent = {(one, cost): board.rows[task, one, cost]["time"] for one, cost in cells}
    bottom = _HEAD + _TALL
    across = _scale(min([0.25, *spent.values()]), max([1.0, *spent.values()]), _LEFT, _PANEL - _RIGHT)
    up = _scale(low, whole, bottom, _HEAD + 8)
    parts = [*_head(board, task), _vertical(across(1.0), bottom, "black")]
    parts.append(_centered((_LEFT + _PANEL - _RIGHT) / 2, bottom + 28, "CPU time, dense = 1"))
    ticks = [tick for tick in _TICKS if _LEFT <= across(tick) <= _PANEL - _RIGHT]
    parts += [_centered(across(tick), bottom + 14, f"{tick:g}") for tick in ticks]
    parts += [f'<text x="8" y="{up(one) + 4:.0f}">{one:.1f}</text>' for one in (low, whole)]
    for preset, cost in cells:
        x, y = across(spent[preset, cost]), up(board.score(task, preset, cost) or 0.0)
        parts.append(_dot(x, y, cost, board.verdict(task, preset, cost) < 0))
    for preset, cost in _labeled(board, task, cells):
        x, y = across(spent[preset, cost]), up(board.score(task, preset, cost) or 0.0)
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" font-size="9">{escape(preset)}</text>')
    return "".join(parts)


def _labeled(board: Board, task: str, cells: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The best preset of each cost, and the baselines."""
    best = []
    for cost in board.reductions:
        ran = [one for one, other in cells if other == cost and one not in _LANDMARKS]
        best += [(max(ran, key=lambda one: board.score(task, one, cost) or 0.0), cost)] if ran else []
    return [*best, *(cell for cell in cells if cell[0] in _LANDMARKS)]


def _head(board: Board, task: str) -> list[str]:
    """Title and legend of a panel."""
    title, metric = TITLES[task]
    parts = [
        f'<text x="8" y="16" font-weight="bold">{title}: {metric}, % (dense {board.score(task, DENSE, 0.0):.1f})</text>'
    ]
    for at, reduction in enumerate(board.reductions):
        text = f"● {reduction:.0%} fewer MACs"
        parts.append(f'<text x="{8 + 120 * at}" y="32" fill="{_color(reduction)}">{text}</text>')
    return parts


def _known(board: Board, task: str, preset: str) -> list[float]:
    """Scores of a preset, at the costs that ran."""
    several = [board.score(task, preset, reduction) for reduction in board.reductions]
    return [score for score in several if score is not None]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Values from low to high, to pixels from start to end."""
    return lambda value: start + (value - low) / (high - low or 1) * (end - start)


def _color(reduction: float) -> str:
    return _COLORS.get(reduction, "gray")


def _dot(x: float, y: float, reduction: float, hollow: bool) -> str:
    color = _color(reduction)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{"white" if hollow else color}" stroke="{color}"/>'


def _centered(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y}" text-anchor="middle">{text}</text>'


def _vertical(x: float, bottom: float, color: str, style: str = "") -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEAD - 4}" y2="{bottom}" stroke="{color}" {style}/>'
