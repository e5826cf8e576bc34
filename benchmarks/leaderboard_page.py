"""Page of the leaderboard: findings and tables in docs/leaderboard.md, with charts beside it, from lines of results."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import leaderboard_chart
from leaderboard_board import BASELINE, DENSE, RESIZE, TITLES, Board, Row

PAGE = Path(__file__).parents[1] / "docs" / "leaderboard.md"
MARKER = "<!-- Written by `python benchmarks/leaderboard.py page` from here on. -->\n"
WORSE = "▼"
_OTHERS = ("neighbors", "cosine")
_BEST = 3
_COARSER = "pooling"
_REASON = 200  # characters


def write(rows: Sequence[Row], page: Path) -> None:
    """Writes what follows the page's marker, and the charts beside the page.

    Args:
        rows: lines of results.
        page: the Markdown page, which has the marker.
    """
    board = Board(rows)
    head, _, _ = page.read_text().partition(MARKER)
    page.write_text(head + MARKER + markdown(board))
    for file, chart in charts(board, page).items():
        file.write_text(chart)


def charts(board: Board, page: Path) -> dict[Path, str]:
    """The charts by their files, which lie beside the page."""
    return {
        page.with_suffix(".svg"): leaderboard_chart.scores(board),
        page.with_name(f"{page.stem}_time.svg"): leaderboard_chart.times(board),
    }


def markdown(board: Board) -> str:
    """The findings, the overview and one table a task."""
    parts = [_samples(board), _findings(board), _overview(board), *(_table_of(board, task) for task in board.tasks)]
    return "\n".join(parts)


def _samples(board: Board) -> str:
    """What each task's dense model scores and costs, and how sure the scores are."""
    heads = [
        "task",
        "instances",
        "dense score, %",
        "standard error of a score",
        "of a difference to `random`",
        "M MACs, dense",
    ]
    lines = [heads, ["---"] * len(heads)]
    for task in board.tasks:
        row = board.rows[task, DENSE, 0.0]
        keys = [key for key in board.rows if key[0] == task and board.ran(*key)]
        largest = max(board.standard_error(*key) for key in keys)
        paired = max((one[1] for key in keys if (one := board.difference(*key)) is not None), default=0.0)
        title, metric = TITLES[task]
        score = f"{metric} {board.score(task, DENSE, 0.0):.1f}"
        lines.append([title, str(row["count"]), score, f"≤ {largest:.1f}", f"≤ {paired:.1f}", _mega(row)])
    return "## Samples\n\n" + _table(lines) + "\n" + _coverage(board)


def _coverage(board: Board) -> str:
    """Which cells of which costs have numbers."""
    parts = []
    for task in board.tasks:
        costs = []
        for cost in board.costs(task):
            rows = [board.rows.get((task, one, cost)) for one in board.presets]
            run = sum(row is not None for row in rows)
            numbers = sum(row is not None and "error" not in row for row in rows)
            missing = f", {len(rows) - run} not run yet" if run < len(rows) else ""
            costs.append(f"{cost:.0%} ({numbers} with a number, {run - numbers} with a reason{missing})")
        parts.append(f"{TITLES[task][0]} at {', '.join(costs)}")
    return f"Measured, of {len(board.presets)} rows: {'; '.join(parts)}.\n"


def _findings(board: Board) -> str:
    """The best of each column beside the baselines, and which presets are above or below random choice."""
    heads = ["task", "fewer MACs", "best three", f"`{BASELINE}`", f"`{_COARSER}`", f"`{RESIZE}`"]
    heads += [f"above `{BASELINE}`", f"below `{BASELINE}`", f"above `{RESIZE}`"]
    lines = [heads, ["---"] * len(heads)]
    for task, reduction in board.columns:
        rivals = [one for one in _rivals(board) if board.ran(task, one, reduction)]
        best = sorted(rivals, key=lambda one: -(board.score(task, one, reduction) or 0.0))[:_BEST]
        cells = [TITLES[task][0], f"{reduction:.0%}"]
        cells.append(", ".join(f"`{one}` {board.score(task, one, reduction):.1f}" for one in best))
        cells += [_score(board, task, name, reduction) for name in (BASELINE, _COARSER, RESIZE)]
        for other, sign in ((BASELINE, 1), (BASELINE, -1), (RESIZE, 1)):
            if board.ran(task, other, reduction):
                count = sum(board.verdict(task, one, reduction, other) == sign for one in rivals)
                cells.append(f"{count} of {len(rivals)}")
            else:
                cells.append("-")
        lines.append(cells)
    return "## Findings\n\n" + _table(lines) + "\n" + "\n".join(_sentences(board)) + "\n"


def _sentences(board: Board) -> list[str]:
    """Which presets stand out, by task and over all of them."""
    lines = []
    complete = [one for one in _rivals(board) if all(board.ran(task, one, cost) for task, cost in board.columns)]
    counts = {one: _verdicts(board, one) for one in _rivals(board)}
    total = len(board.columns)
    sure = [one for one in complete if counts[one].count(1) == total]
    never = [one for one in complete if counts[one].count(-1) == 0]
    worst = sorted(
        (one for one in counts if 2 * counts[one].count(-1) >= total), key=lambda one: -counts[one].count(-1)
    )
    lines.append(f"- **Above `{BASELINE}` in all {total} columns**: {_named(sure)}. Never below it: {_named(never)}.")
    worst = [f"`{one}` ({counts[one].count(-1)})" for one in worst]
    lines.append(f"- **Below `{BASELINE}` in half of the columns or more** (how many): {', '.join(worst) or 'none'}.")
    for task in board.tasks:
        costs = board.costs(task)
        below = [f"{cost:.0%}: {_named(_with(board, task, cost, BASELINE, -1))}" for cost in costs]
        lines.append(f"- **{TITLES[task][0]}, below `{BASELINE}`**. {'. '.join(below)}.")
        resized = [cost for cost in costs if board.ran(task, RESIZE, cost)]
        above = [f"{cost:.0%}: {_named(_with(board, task, cost, RESIZE, 1))}" for cost in resized]
        if above:
            lines.append(f"- **{TITLES[task][0]}, above `{RESIZE}`**. {'. '.join(above)}.")
    for cost in board.reductions:
        slow = [
            f"`{preset}` on {TITLES[task][0].lower()} ({board.rows[task, preset, cost]['time']:.2f})"
            for task, preset in itertools.product(board.tasks, board.presets)
            if board.ran(task, preset, cost) and board.rows[task, preset, cost]["time"] >= 1
        ]
        lines.append(f"- **No faster than dense at {cost:.0%} fewer MACs**: {', '.join(slow) or 'none'}.")
    return lines


def _with(board: Board, task: str, reduction: float, other: str, verdict: int) -> list[str]:
    """Presets with a verdict, those of the largest difference first."""
    several = [one for one in _rivals(board) if board.verdict(task, one, reduction, other) == verdict]

    def order(preset: str) -> float:
        apart = board.difference(task, preset, reduction, other)
        return 0.0 if apart is None else -verdict * apart[0]

    return sorted(several, key=order)


def _presets(board: Board) -> list[str]:
    return [one for one in board.presets if one != RESIZE]


def _rivals(board: Board) -> list[str]:
    """Presets that are compared with random choice."""
    return [one for one in _presets(board) if one != BASELINE]


def _verdicts(board: Board, preset: str) -> list[int]:
    return [board.verdict(task, preset, reduction) for task, reduction in board.columns]


def _overview(board: Board) -> str:
    """One line a preset, the scores of all tasks; the best of a column is bold."""
    columns = board.columns
    best = {
        (task, cost): max((board.score(task, one, cost) or 0.0 for one in _presets(board)), default=0.0)
        for task, cost in columns
    }
    heads = ["preset", *(f"{TITLES[task][0]} {cost:.0%}" for task, cost in columns), f"▲ / {WORSE}"]
    dense = [f"{board.score(task, DENSE, 0.0):.1f}" for task, _ in columns]
    lines = [heads, ["---"] * len(heads), [DENSE, *dense, ""]]
    apart = {one: board.mean_difference(one) for one in board.presets}
    apart[BASELINE] = 0.0
    ranked = sorted(board.presets, key=lambda one: (apart[one] is None, -(apart[one] or 0.0)))
    for preset in ranked:
        cells = []
        for task, cost in columns:
            text, score = _score(board, task, preset, cost), board.score(task, preset, cost)
            text = f"**{text}**" if score == best[task, cost] else text
            cells.append(text + f" {WORSE}" * (board.verdict(task, preset, cost) < 0))
        signs = _verdicts(board, preset)
        counts = "" if preset == BASELINE else f"{signs.count(1)} / {signs.count(-1)}"
        lines.append([_name(preset), *cells, counts])
    return "## All tasks\n\n" + _table(lines)


def _table_of(board: Board, task: str) -> str:
    """All cells of a task, best at half of the MACs first; a cell without a number has the reason."""
    title, metric = TITLES[task]
    dense = board.rows[task, DENSE, 0.0]
    others = [name for name in [*dense["scores"]][1:] if name in _OTHERS]
    heads = ["preset", "asked", f"{metric} %", "to dense", f"to `{BASELINE}`", *others]
    heads += ["tokens that enter each layer → leave", "M MACs", "saved", "time"]
    extra = [f"{dense['scores'][name]:.2f}" for name in others]
    score = f"{board.score(task, DENSE, 0.0):.1f} ± {board.standard_error(task, DENSE, 0.0):.1f}"
    lines = [heads, ["---"] * len(heads)]
    lines.append([DENSE, "", score, "", "", *extra, _tokens(dense), _mega(dense), "", "1.00"])
    middle = 0.5 if 0.5 in board.costs(task) else board.costs(task)[0]
    for preset in sorted(board.presets, key=lambda one: -(board.score(task, one, middle) or 0.0)):
        lines += [_line(board, task, preset, reduction, others) for reduction in board.costs(task)]
    return f"## {title}\n\n" + _table(lines)


def _line(board: Board, task: str, preset: str, reduction: float, others: Sequence[str]) -> list[str]:
    """The line of a cell."""
    score = board.score(task, preset, reduction)
    row = board.rows.get((task, preset, reduction), {"error": "not run yet"})
    if score is None:
        return [_name(preset), f"{reduction:.0%}", "-", "", "", *("" for _ in others), _short(row["error"]), "", "", ""]
    difference = board.difference(task, preset, reduction)
    apart = "" if difference is None else f"{difference[0]:+.1f} ± {difference[1]:.1f}"
    apart += f" {WORSE}" * (board.verdict(task, preset, reduction) < 0)
    name = _name(preset) + " *m*" * row["moved"]
    shown = f"{score:.1f} ± {board.standard_error(task, preset, reduction):.1f}"
    to_dense = f"{score - (board.score(task, DENSE, 0.0) or 0.0):+.1f}"
    extra = [f"{row['scores'][name]:.2f}" for name in others]
    costs = [_tokens(row), _mega(row), f"{row['macs_saved']:.0%}", f"{row['time']:.2f}"]
    return [name, f"{reduction:.0%}", shown, to_dense, apart, *extra, *costs]


def _score(board: Board, task: str, preset: str, reduction: float) -> str:
    score = board.score(task, preset, reduction)
    return "-" if score is None else f"{score:.1f}"


def _name(preset: str) -> str:
    return f"*{preset}*" if preset == RESIZE else f"`{preset}`"


def _named(presets: Iterable[str]) -> str:
    return ", ".join(f"`{one}`" for one in presets) or "none"


def _tokens(row: Row) -> str:
    """Rounded counts, "65*3 46*9 → 46": equal neighbors are grouped; towers are divided by a semicolon."""
    return "; ".join(_runs([round(count) for count in counts]) for counts in row["tokens"].values())


def _runs(counts: Sequence[int]) -> str:
    runs = [(count, len(list(group))) for count, group in itertools.groupby(counts[:-1])]
    return " ".join(f"{count}*{many}" if many > 1 else str(count) for count, many in runs) + f" → {counts[-1]}"


def _mega(row: Row) -> str:
    return f"{row['macs'] / 1e6:,.3f}"


def _short(reason: str) -> str:
    """The head of an error, up to a sentence's end."""
    kind, _, text = reason.partition(": ")
    text = re.split(r"(?<=[a-z)%\d])[.;] |: use ", text or kind)[0]
    text = text if len(text) <= _REASON else text[:_REASON].rsplit(" ", 1)[0] + " …"
    return text.replace("|", "\\|")


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
