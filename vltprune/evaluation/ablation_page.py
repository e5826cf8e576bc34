"""Page of an ablation: a self-contained HTML file with charts of score against cost and time, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ..cost.describe import percent, unit_of
from ..viz import charts, html
from .ablation_table import Group, Summary
from .results_log import Row

_TITLE = "Ways of pruning, compared"
_DIGEST = "content_of_"  # settings that only a program reads
_ABOUT = (
    "Token pruning removes image patches and words that matter little between the layers of a model, so that later layers have "
    "less to compute. An ablation prunes one model in several ways and measures each. This page compares {cells} with the "
    "model that is not pruned, the row “dense”. No model was trained: all rows have the same weights."
)
_EQUAL = (
    "Computation is counted in multiply-accumulates (MACs). For a row with a reduction, a search set how many tokens are kept "
    "so that the mean MACs of an instance fall by this fraction. Rows of equal reduction thus cost the same, and differ in "
    "which tokens they keep and what becomes of the others. MACs alone were looked at, no score."
)
_CHARTS = (
    "A mark is a row, and a line joins rows that differ in their reduction alone. Further left is cheaper. Bands reach one "
    "standard deviation over seeds up and down."
)
_COLUMNS = {
    "preset": "A named combination of parts; further columns name the parts that replace its own.",
    "guide": "What relates the tokens of all towers to shared anchors.",
    "scorer": "How much each token matters.",
    "selector": "Which tokens stay.",
    "keep": "How many tokens stay.",
    "reducer": "What becomes of the other tokens.",
    "at": "The layers that prune, counted from 0; fractions are of the depth.",
    "place": "Where in these layers: between attention and MLP, behind the layer (block), or behind the tower (output).",
    "modality": "Whose tokens are pruned where text and image are one sequence.",
    "reduction": "The fraction of the dense model's MACs that was asked to be saved.",
    "seeds": "How many seeds the row is the mean of; ± is the standard deviation over them.",
    "MACs": "Mean multiply-accumulates of an instance, the pruning itself included, padding not.",
    "saved": "The fraction of the dense model's MACs that was saved.",
    "time": "Time of an instance, as a fraction of the dense model's. Both run in turn, in one process.",
}
_TOKENS = "Mean number of {tower} tokens that enter each layer, and last of those that leave the tower."
_SCORE = "What the metric {name} returned."


def page(summary: Summary, settings: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        summary: The results.
        settings: What they depend on besides the grid.
    """
    header, *lines = summary.table()
    series = _series(summary)
    symbols = {id(group): charts.symbol(i) for i, groups in enumerate(series.values()) for group in groups}
    marked = [
        [symbols[id(group)] + escape(first), *map(escape, rest)]
        for group, (first, *rest) in zip(summary.groups, lines, strict=True)
    ]
    count = len(summary.grid)
    facts = {"grid": str(summary.grid)}
    facts |= {
        name: str(value) for name, value in settings.items() if value is not None and not name.startswith(_DIGEST)
    }
    body = [
        f"<h1>{_TITLE}</h1>",
        *(f'<p class="lead">{escape(sentence)}</p>' for sentence in _results(summary)),
        f"<p>{_ABOUT.format(cells='one way of pruning' if count == 1 else f'{count} prunings')}</p><p>{_EQUAL}</p>",
        f"<h2>Score against cost</h2><p>{_CHARTS}</p>{html.card(_charts(summary, series))}",
        f'<h2>All results</h2>{html.card(f"""<div class="tight">{html.table(header, marked)}</div>""")}',
        html.bullets(summary.notes),
        f"<h2>What the columns mean</h2>{html.card(html.definitions(_meanings(header)))}",
        f"<h2>What was done</h2>{html.card(html.definitions(facts))}",
    ]
    return html.document(_TITLE, body)


def _series(summary: Summary) -> dict[str, list[Group]]:
    """The dense model, then the groups of each line of the charts."""
    dense, *others = summary.groups
    series = {"dense": [dense]}
    for group in others:
        series.setdefault(summary.line_name(group), []).append(group)
    return series


def _results(summary: Summary) -> list[str]:
    """For each reduction the range of the main score, in a sentence."""
    name = summary.main_score
    by_reduction: dict[str, list[Group]] = {}
    for group in summary.groups[1:]:
        if group.rows:
            by_reduction.setdefault(group.labels["reduction"], []).append(group)
    if name is None:
        return []
    sentences = []
    for reduction, ran in by_reduction.items():
        means = sorted((group.mean(lambda row: row["scores"][name]), summary.line_name(group)) for group in ran)
        (low, lowest), (high, highest) = means[0], means[-1]
        saved = statistics.fmean(group.mean(lambda row: row["macs_saved"]) for group in ran)
        fewer = "As the presets say" if reduction == "none" else f"With {percent(saved)} fewer MACs"
        between = f"ranges from {low:.4g} ({lowest}) to {high:.4g} ({highest})"
        reached = between if len(ran) > 1 else f"is {high:.4g} ({highest})"
        sentences.append(f"{fewer}, {name} {reached}; dense: {summary.dense['scores'][name]:.4g}.")
    return sentences


def _meanings(header: Sequence[str]) -> dict[str, str]:
    """What each column of the table means."""
    meanings = {}
    for column in header:
        name = "MACs" if column.endswith("MACs") else column
        if column.endswith(" tokens"):
            meanings[column] = _TOKENS.format(tower=column.removesuffix(" tokens"))
        else:
            meanings[column] = _COLUMNS.get(name, _SCORE.format(name=name))
    return meanings


def _charts(summary: Summary, series: Mapping[str, Sequence[Group]]) -> str:
    """Charts of the main score against MACs and against time, and their legend."""
    name = summary.main_score
    if name is None:
        return "Nothing was scored."
    scale, unit = unit_of(summary.dense["dense_macs"])
    drawn = [_chart(series, name, f"{unit}MACs of an instance", lambda row: row["macs"] / scale)]
    if summary.dense["time"] is not None:
        drawn.append(_chart(series, name, "time of an instance, as a fraction of dense", lambda row: row["time"]))
    return "".join(drawn) + charts.legend(list(series))


def _chart(series: Mapping[str, Sequence[Group]], name: str, what: str, across: Callable[[Row], float]) -> str:
    """A chart of a score against a cost."""
    lines, xs, ys = [], [], []
    for i, one in enumerate(series.values()):
        points, band = [], []
        for group in sorted((group for group in one if group.rows), key=lambda group: group.mean(across)):
            score, around = (f(lambda row: row["scores"][name]) for f in (group.mean, group.deviation))
            points.append((group.mean(across), score))
            band.append((score - around, score + around))
        xs += [x for x, _ in points]
        ys += [edge for edges in band for edge in edges]
        color, mark = charts.series_color(i), charts.series_mark(i)
        lines.append(charts.Line(points, color, band if any(low < high for low, high in band) else (), mark=mark))
    title = f"{name} against {what}"
    svg = charts.chart(lines, charts.Axis.from_values(xs, zero=True), charts.Axis.from_values(ys), title)
    return f'<div class="model">{escape(title)}</div>{svg}'
