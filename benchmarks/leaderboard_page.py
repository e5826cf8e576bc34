"""Page of the leaderboard: tables in docs/leaderboard.md and the chart docs/leaderboard.svg, from lines of results."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "leaderboard.md"
MARKER = "<!-- Written by `python benchmarks/leaderboard.py page` from here on. -->\n"
TITLES = {  # of tasks, in the page's order: heading, name of the score that ranks
    "nlvr": ("Synthetic pairs", "accuracy"),
    "retrieval": ("Retrieval", "R@10"),
    "neighbors": ("Neighbors", "neighbors"),
    "sentences": ("Sentences", "R@1"),
}
SEVERAL = {"photographs": {"retrieval": "r10", "neighbors": "neighbors"}}  # tasks of one measurement, and their scores
BASELINE, DENSE = "random", "dense"
WORSE = "▼"
_OTHERS = ("neighbors", "cosine")
_REASON = 150  # characters
_COLORS = {0.3: "#9cc3ee", 0.5: "#1f6fd6", 0.7: "#0b2f63"}
_PANEL, _LABEL, _ROW, _HEAD = 470, 96, 15, 44  # pixels

Row = dict[str, Any]


def write(rows: Sequence[Row], page: Path) -> None:
    """Writes the tables behind the page's marker, and the chart beside the page.

    Args:
        rows: lines of results.
        page: the Markdown page, which has the marker.
    """
    board = Board(rows)
    head, _, _ = page.read_text().partition(MARKER)
    page.write_text(head + MARKER + board.markdown())
    page.with_suffix(".svg").write_text(board.svg())


class Board:
    """The results by task, preset and reduction; a preset with several seeds has their mean."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Groups the lines; of equal cells the last one counts.

        Args:
            rows: lines of results.
        """
        rows = [one for row in rows for one in _by_task(row)]
        last = {(row["task"], row["preset"], row["reduction"], row["seed"]): row for row in rows}
        grouped: dict[tuple[str, str, float], list[Row]] = {}
        for (task, preset, reduction, _), row in last.items():
            grouped.setdefault((task, preset, reduction), []).append(row)
        self.rows = {key: _mean(several) for key, several in grouped.items()}
        self.tasks = [task for task in TITLES if any(key[0] == task for key in self.rows)]
        self.presets = sorted({preset for _, preset, _ in self.rows} - {DENSE})
        self.reductions = sorted({reduction for _, _, reduction in self.rows} - {0.0})

    def score(self, task: str, preset: str, reduction: float) -> float | None:
        """The first score, in %; None where the cell did not run."""
        row = self.rows.get((task, preset, reduction))
        return None if row is None or "error" in row else 100 * next(iter(row["scores"].values()))

    def is_worse(self, task: str, preset: str, reduction: float) -> bool:
        """Whether a score is below random choice by more than its standard error."""
        score, chance = self.score(task, preset, reduction), self.score(task, BASELINE, reduction)
        if score is None or chance is None or preset == BASELINE:
            return False
        return score < chance - self.standard_error(task, preset, reduction)

    def standard_error(self, task: str, preset: str, reduction: float) -> float:
        """Of the first score, in points."""
        return 100 * next(iter(self.rows[task, preset, reduction]["errors"].values()))

    def markdown(self) -> str:
        """The overview and one table a task."""
        return "\n".join([self.overview(), *map(self.table, self.tasks)])

    def overview(self) -> str:
        """One line a preset, the scores of all tasks; the best of a column is bold."""
        columns = list(itertools.product(self.tasks, self.reductions))
        best = {
            column: max(filter(None, (self.score(column[0], p, column[1]) for p in self.presets)), default=None)
            for column in columns
        }
        heads = [f"{TITLES[task][0]} {reduction:.0%}" for task, reduction in columns]
        dense = [f"{self.score(task, DENSE, 0.0):.1f}" for task, _ in columns]
        lines = [["preset", *heads], ["---"] * (1 + len(columns)), ["dense", *dense]]
        for preset in sorted(self.presets, key=self._rank):
            cells = [self._cell(task, preset, reduction, best[task, reduction]) for task, reduction in columns]
            lines.append([f"`{preset}`", *cells])
        return "## All tasks\n\n" + _table(lines)

    def _rank(self, preset: str) -> tuple[bool, float]:
        """Presets that ran everywhere first, by their mean distance to random choice at all costs."""
        pairs = [(self.score(t, preset, r), self.score(t, BASELINE, r)) for t in self.tasks for r in self.reductions]
        apart = [mine - chance for mine, chance in pairs if mine is not None and chance is not None]
        return not apart, -statistics.fmean(apart) if apart else 0.0

    def _cell(self, task: str, preset: str, reduction: float, best: float | None) -> str:
        score = self.score(task, preset, reduction)
        if score is None:
            return "-"
        text = f"**{score:.1f}**" if score == best else f"{score:.1f}"
        return text + f" {WORSE}" * self.is_worse(task, preset, reduction)

    def table(self, task: str) -> str:
        """All cells of a task, best at half of the MACs first."""
        title, metric = TITLES[task]
        dense = self.rows[task, DENSE, 0.0]
        whole = self.score(task, DENSE, 0.0)
        others = [name for name in [*dense["scores"]][1:] if name in _OTHERS]
        heads = [
            "preset",
            "asked",
            f"{metric} %",
            "to dense",
            "to `random`",
            *others,
            "tokens that enter each layer → leave",
        ]
        lines = [[*heads, "M MACs", "saved", "time"], ["---"] * (len(heads) + 3)]
        extra = [f"{dense['scores'][name]:.2f}" for name in others]
        lines.append(["dense", "", f"{whole:.1f}", "", "", *extra, _tokens(dense), _mega(dense), "", "1.00"])
        middle = 0.5 if 0.5 in self.reductions else self.reductions[0]
        for preset in sorted(self.presets, key=lambda one: -(self.score(task, one, middle) or 0)):
            for reduction in self.reductions:
                lines += self._lines(task, preset, reduction, others)
        errors = [
            self.standard_error(task, *key[1:])
            for key, row in self.rows.items()
            if key[0] == task and "error" not in row
        ]
        intro = f"Standard error of {metric}: up to {max(errors):.1f} points."
        return f"## {title}\n\n{intro}\n\n" + _table(lines) + self._reasons(task)

    def _lines(self, task: str, preset: str, reduction: float, others: Sequence[str]) -> list[list[str]]:
        """The line of a cell that ran, or none."""
        score = self.score(task, preset, reduction)
        if score is None:
            return []
        row, chance = self.rows[task, preset, reduction], self.score(task, BASELINE, reduction)
        apart = "" if chance is None or preset == BASELINE else f"{score - chance:+.1f}"
        apart += f" {WORSE}" * self.is_worse(task, preset, reduction)
        extra = [f"{row['scores'][name]:.2f}" for name in others]
        name = f"`{preset}`" + " *m*" * row["moved"]
        to_dense = f"{score - self.score(task, DENSE, 0.0):+.1f}"
        costs = [_tokens(row), _mega(row), f"{row['macs_saved']:.0%}", f"{row['time']:.2f}"]
        return [[name, f"{reduction:.0%}", f"{score:.1f}", to_dense, apart, *extra, *costs]]

    def _reasons(self, task: str) -> str:
        """Why cells of a task did not run; costs with one reason share a line."""
        lines = []
        for preset in self.presets:
            reasons: dict[str, list[float]] = {}
            for reduction in self.reductions:
                row = self.rows.get((task, preset, reduction), {"error": "not run"})
                if "error" in row:
                    reasons.setdefault(_short(row["error"]), []).append(reduction)
            for reason, costs in reasons.items():
                lines.append(f"- `{preset}` at {', '.join(f'{cost:.0%}' for cost in costs)}: {reason}")
        return "\nWithout a number:\n\n" + "\n".join(lines) + "\n" if lines else ""

    def svg(self) -> str:
        """A panel a task: a line a preset with a dot a cost, and vertical lines where random choice is."""
        height = _HEAD + _ROW * (1 + len(self.presets)) + 24
        width, rows = 2 * _PANEL, math.ceil(len(self.tasks) / 2)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {rows * height}" font-family="sans-serif" '
            f'font-size="11"><rect width="{width}" height="{rows * height}" fill="white"/>'
        ]
        for index, task in enumerate(self.tasks):
            x, y = index % 2 * _PANEL, index // 2 * height
            parts.append(f'<g transform="translate({x} {y})">{self._panel(task)}</g>')
        return "\n".join([*parts, "</svg>\n"])

    def _panel(self, task: str) -> str:
        title, metric = TITLES[task]
        whole = self.score(task, DENSE, 0.0)
        present = [p for p in self.presets if any(self.score(task, p, r) is not None for r in self.reductions)]

        def first(preset: str) -> float:
            known = [self.score(task, preset, reduction) for reduction in self.reductions]
            return -statistics.fmean(score for score in known if score is not None)

        present.sort(key=first)
        scores = [self.score(task, p, r) for p in present for r in self.reductions]
        low = min([whole, *(one for one in scores if one is not None)])
        bottom = _HEAD + _ROW * len(present)

        def across(score: float) -> float:
            return _LABEL + (score - low) / (whole - low or 1) * (_PANEL - _LABEL - 24)

        parts = [
            f'<text x="8" y="16" font-weight="bold">{title}: {metric}, % (dense {whole:.1f})</text>',
            _vertical(across(whole), bottom, "black"),
        ]
        for at, reduction in enumerate(self.reductions):
            color, chance = _COLORS.get(reduction, "gray"), self.score(task, BASELINE, reduction)
            legend = f'<text x="{8 + 120 * at}" y="32" fill="{color}">● {reduction:.0%} fewer MACs</text>'
            parts += [legend] + ([_vertical(across(chance), bottom, color, 'stroke-dasharray="3 3"')] if chance else [])
        for line, preset in enumerate(present):
            y = _HEAD + _ROW * line + 6
            parts.append(f'<text x="8" y="{y + 4}">{escape(preset)}</text>')
            for reduction in self.reductions:
                score = self.score(task, preset, reduction)
                if score is not None:
                    parts.append(
                        f'<circle cx="{across(score):.1f}" cy="{y}" r="4" fill="{_COLORS.get(reduction, "gray")}"/>'
                    )
        ends = [
            f'<text x="{across(one):.0f}" y="{bottom + 14}" text-anchor="middle">{one:.0f}</text>'
            for one in (low, whole)
        ]
        return "".join([*parts, *ends])


def _vertical(x: float, bottom: float, color: str, style: str = "") -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEAD - 4}" y2="{bottom}" stroke="{color}" {style}/>'


def _by_task(row: Row) -> list[Row]:
    """One row a task of what was measured, the score that ranks first."""
    tasks = SEVERAL.get(row["task"])
    if tasks is None or "error" in row:
        return [{**row, "task": task} for task in tasks or (row["task"],)]
    return [
        {**row, "task": task} | {kind: {first: row[kind][first], **row[kind]} for kind in ("scores", "errors")}
        for task, first in tasks.items()
    ]


def _mean(several: Sequence[Row]) -> Row:
    """One row of the seeds of a cell; a seed that failed is the cell's error."""
    failed = [row for row in several if "error" in row]
    first = failed[0] if failed else several[0]
    if failed or len(several) == 1:
        return first

    def mean(value: Callable[[Row], float]) -> float:
        return statistics.fmean(map(value, several))

    scores = {name: mean(lambda row, name=name: row["scores"][name]) for name in first["scores"]}
    tokens = {
        tower: [statistics.fmean(column) for column in zip(*(row["tokens"][tower] for row in several), strict=True)]
        for tower in first["tokens"]
    }
    numbers = {name: mean(lambda row, name=name: row[name]) for name in ("macs", "dense_macs", "macs_saved", "time")}
    return {**first, "scores": scores, "tokens": tokens, **numbers}


def _tokens(row: Row) -> str:
    """Rounded counts, "65*3 46*9 → 46": equal neighbors are grouped; towers are divided by a semicolon."""
    return "; ".join(_runs([round(count) for count in counts]) for counts in row["tokens"].values())


def _runs(counts: Sequence[int]) -> str:
    runs = [(count, len(list(group))) for count, group in itertools.groupby(counts[:-1])]
    return " ".join(f"{count}*{many}" if many > 1 else str(count) for count, many in runs) + f" → {counts[-1]}"


def _mega(row: Row) -> str:
    return f"{row['macs'] / 1e6:,.1f}"


def _short(reason: str) -> str:
    """The head of an error, up to a sentence's end."""
    kind, _, text = reason.partition(": ")
    text = re.split(r"(?<=[a-z)%])[.:;] ", text or kind)[0]
    return text if len(text) <= _REASON else text[:_REASON].rsplit(" ", 1)[0] + " …"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
