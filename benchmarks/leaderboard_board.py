"""Results of the leaderboard by task, preset and reduction, with paired differences between them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

TITLES = {  # of tasks, in the page's order: heading, name of the score that ranks
    "nlvr": ("Synthetic pairs", "accuracy"),
    "retrieval": ("Retrieval", "R@10"),
    "neighbors": ("Neighbors", "accuracy"),
    "sentences": ("Sentences", "R@1"),
}
BASELINE, DENSE, RESIZE = "random", "dense", "resize"
_SURE = 2  # standard errors
_PARTS, _DIGITS = 30, "0123456789abcdefghijklmnopqrstu"  # shares are multiples of a thirtieth

Row = dict[str, Any]


def pack(shares: Iterable[float]) -> str:
    """One character an instance: its share of 1 in thirtieths, which halves, thirds, fifths and tenths are exact in."""
    return "".join(_DIGITS[round(share * _PARTS)] for share in shares)


def unpack(text: str) -> list[float]:
    """The shares that `pack` took."""
    return [_DIGITS.index(digit) / _PARTS for digit in text]


class Board:
    """The results by task, preset and reduction; a preset with several seeds has their mean.

    Attributes:
        rows: by task, preset and reduction, a line of results, with the share of each instance as `shares`.
        tasks: those that have results, in the page's order.
        presets: names of presets, and `resize` where it ran, sorted.
        reductions: costs that were asked for, mildest first.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        """Groups the lines; of equal cells the last one counts.

        Args:
            rows: lines of results.
        """
        last = {(row["task"], row["preset"], row["reduction"], row["seed"]): row for row in rows}
        grouped: dict[tuple[str, str, float], list[Row]] = {}
        for (task, preset, reduction, _), row in last.items():
            grouped.setdefault((task, preset, reduction), []).append(row)
        self.rows = {key: _mean(several) for key, several in grouped.items()}
        self.tasks = [task for task in TITLES if any(key[0] == task for key in self.rows)]
        self.presets = sorted({preset for _, preset, _ in self.rows} - {DENSE})
        self.reductions = sorted({reduction for _, _, reduction in self.rows} - {0.0})

    @property
    def columns(self) -> list[tuple[str, float]]:
        """Tasks and reductions that have results."""
        known = {(task, reduction) for task, _, reduction in self.rows}
        pairs = itertools.product(self.tasks, self.reductions)
        return [column for column in pairs if column in known]

    def costs(self, task: str) -> list[float]:
        """The reductions that a task has results at."""
        return [reduction for one, reduction in self.columns if one == task]

    def ran(self, task: str, preset: str, reduction: float) -> bool:
        """Whether a cell has numbers."""
        return "error" not in self.rows.get((task, preset, reduction), {"error": ""})

    def score(self, task: str, preset: str, reduction: float) -> float | None:
        """The score that ranks, in %; None where the cell did not run."""
        if not self.ran(task, preset, reduction):
            return None
        return 100 * statistics.fmean(self.rows[task, preset, reduction]["shares"])

    def standard_error(self, task: str, preset: str, reduction: float) -> float:
        """Of the score that ranks, in points."""
        return _standard_error(self.rows[task, preset, reduction]["shares"])

    def difference(self, task: str, preset: str, reduction: float, other: str = BASELINE) -> tuple[float, float] | None:
        """A score minus that of another preset at the same cost, and the standard error, in points.

        Both answer the same instances, so that the error is that of the differences instance by instance.
        """
        if preset == other or not (self.ran(task, preset, reduction) and self.ran(task, other, reduction)):
            return None
        one, two = (self.rows[task, name, reduction]["shares"] for name in (preset, other))
        apart = [mine - chance for mine, chance in zip(one, two, strict=True)]
        return 100 * statistics.fmean(apart), _standard_error(apart)

    def verdict(self, task: str, preset: str, reduction: float, other: str = BASELINE) -> int:
        """1 for a score above another preset's by more than two standard errors, -1 below, 0 between or unknown."""
        apart, error = self.difference(task, preset, reduction, other) or (0.0, 0.0)
        return (apart > _SURE * error) - (apart < -_SURE * error)

    def mean_difference(self, preset: str) -> float | None:
        """The mean distance to random choice over all cells that ran, in points."""
        apart = [self.difference(task, preset, reduction) for task, reduction in self.columns]
        known = [one[0] for one in apart if one is not None]
        return statistics.fmean(known) if known else None


def _standard_error(shares: Sequence[float]) -> float:
    """Of a mean, in points."""
    return 100 * statistics.stdev(shares) / len(shares) ** 0.5


def _mean(several: Sequence[Row]) -> Row:
    """One row of the seeds of a cell; a seed that failed is the cell's error."""
    failed = [row for row in several if "error" in row]
    if failed:
        return failed[0]

    def mean(value: Callable[[Row], float]) -> float:
        return statistics.fmean(map(value, several))

    first = several[0]
    shares = [statistics.fmean(one) for one in zip(*(unpack(row["instances"]) for row in several), strict=True)]
    scores = {name: mean(lambda row, name=name: row["scores"][name]) for name in first["scores"]}
    tokens = {
        tower: [statistics.fmean(column) for column in zip(*(row["tokens"][tower] for row in several), strict=True)]
        for tower in first["tokens"]
    }
    numbers = {name: mean(lambda row, name=name: row[name]) for name in ("macs", "dense_macs", "macs_saved", "time")}
    return {**first, "shares": shares, "scores": scores, "tokens": tokens, **numbers}
