"""Charts of a compression's report: score against cost, tokens by layer, and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...viz import charts, html
from .examples import Rows

SPREAD = (10, 90)  # percentiles of a band
_SMALL = (480, 230)
_KEPT, _TARGET = "kept ", "target "
_LOSSES = {
    "task": "the task's loss",
    "align": "alignment of the towers",
    "distill": "what the dense model teaches",
    "budget": "expected MACs off their target",
    "extra": "the further loss",
}


def costs(rows: Rows, score: str) -> str:
    """Chart of one score, in percent, against GMACs: a mark for each model, as in the table.

    Args:
        rows: Results as of `CompressResult`, the dense model's first.
        score: The name of the score, a key of the rows' scores.

    Returns:
        HTML.
    """
    points = [(row["macs"] / 1e9, 100 * row["scores"][score]) for row in rows]
    path = charts.Line(sorted(points), "#b9bec7", mark=None)
    dots = [charts.Line([point], charts.series_color(i), mark=charts.series_mark(i)) for i, point in enumerate(points)]
    across = charts.Axis.from_values([gmacs for gmacs, _ in points], zero=True)
    up = charts.Axis.from_values([value for _, value in points])
    title = f"{score}, in percent, against GMACs of an instance"
    return _titled(title, charts.chart([path, *dots], across, up, title))


def tokens(record_rows: Sequence[Rows], names: Sequence[str]) -> str:
    """Charts of tokens by layer, of each tower that was pruned: the mean, and a band of the middle 80 % of records.

    Args:
        record_rows: For each model, the rows of its evaluation; the dense model's have no tokens.
        names: The models' names.

    Returns:
        HTML; empty where nothing was pruned.
    """
    evaluations = [[row for row in rows if "skipped" not in row] for rows in record_rows]
    towers = dict.fromkeys(tower for rows in evaluations for tower in rows[0]["kept"])
    return "".join(_tower(tower, evaluations, names) for tower in towers)


def training(history: Rows, knob: str) -> str:
    """Charts of losses, saved MACs, the knob, and tokens after the last layer, over the steps.

    Args:
        history: The rows of history.jsonl.
        knob: The names of the knobs, for the titles.

    Returns:
        HTML; a chart is left out where no row has its numbers.
    """
    charted = [_curve(f"loss: {label}", history, {name: name}) for name, label in _LOSSES.items()]
    controlled = {f" of the {tower} tower": f" {tower}" for tower in _towers_with_target(history)} or {"": ""}
    for of_tower, suffix in controlled.items():
        title = f"share of the dense MACs{of_tower} saved, and the target"
        charted.append(_curve(title, history, {f"saved{suffix}": "saved", f"target{suffix}": "target"}))
        charted.append(_curve(f"knob{of_tower}: {knob}", history, {f"knob{suffix}": "knob"}))
    for name in dict.fromkeys(name for row in history for name in row if name.startswith(_KEPT)):
        last = [{"step": row["step"], name: row[name][-1]} for row in history if name in row]
        charted.append(
            _curve(f"{name.removeprefix(_KEPT)} tokens after the last layer", last, {name: "tokens"}, zero=True)
        )
    return f'<div class="pair">{"".join(charted)}</div>'


def _towers_with_target(history: Rows) -> list[str]:
    """The towers with a target each."""
    names = dict.fromkeys(name for row in history for name in row if name.startswith(_TARGET))
    return [name.removeprefix(_TARGET) for name in names]


def _tower(tower: str, evaluations: Sequence[Rows], names: Sequence[str]) -> str:
    lines, cells, entered = [], [], 0.0
    for i, rows in enumerate(evaluations):
        kept = np.array([row["kept"][tower] for row in rows if tower in row["kept"]])  # [records, 1 + layers]
        if not kept.size:
            continue
        means, (low, high) = kept.mean(0), np.percentile(kept, SPREAD, axis=0)
        band = list(zip(low.tolist(), high.tolist(), strict=True))
        lines.append(
            charts.Line(list(enumerate(means.tolist())), charts.series_color(i), band, mark=charts.series_mark(i))
        )
        columns = zip(means, low, high, strict=True)
        cells.append([charts.symbol(i) + names[i], *(f"{mean:.1f} ({a:g}&ndash;{b:g})" for mean, a, b in columns)])
        entered = max(entered, float(high.max()))
    layers = len(cells[0]) - 2
    flat = [(layer, lines[0].points[0][1]) for layer in range(layers + 1)]
    lines.insert(0, charts.Line(flat, charts.series_color(0), dashed=True, mark=None))

    title = f"{tower} tokens that are left"
    svg = charts.chart(lines, charts.layer_axis(layers), charts.Axis.from_values([entered], "g", zero=True), title)
    head = ["mean (middle 80 %)", "input", *(f"layer {layer}" for layer in range(1, layers + 1))]
    numbers = f"<details><summary>in numbers</summary>{html.table(head, cells)}</details>"
    return html.card(_titled(title, svg + charts.legend(names) + numbers))


def _curve(title: str, history: Rows, series: Mapping[str, str], zero: bool = False) -> str:
    """Series over the steps, by their names in the history; empty where no row has the first of them."""
    points = {name: [(row["step"], row[name]) for row in history if name in row] for name in series}
    if not points[next(iter(series))]:
        return ""
    values = [value for curve in points.values() for _, value in curve]
    is_fraction = "target" in series.values()
    linear = charts.Axis.from_values(values, ".0%" if is_fraction else "g", zero or is_fraction)
    up = charts.Axis.log_from_values(values) if "knob" in series.values() else linear
    lines = [
        charts.Line(
            curve,
            charts.series_color(1 - i),
            dashed=i > 0,
            mark=charts.series_mark(1 - i) if len(curve) < 20 else None,
        )
        for i, curve in enumerate(points.values())
    ]
    across = charts.Axis.from_values([step for curve in points.values() for step, _ in curve], ",.0f", zero=True)
    svg = charts.chart(lines, across, up, title, _SMALL)
    return _titled(title, svg + (charts.legend(["target", "saved"]) if is_fraction else ""))


def _titled(title: str, content: str) -> str:
    return f'<div><div class="model">{title}</div>{content}</div>'
