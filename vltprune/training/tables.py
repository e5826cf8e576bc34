"""The numbers of a compression as tables of text: a header, then a line a row of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .curves import main_score
from .examples import Rows


def results(names: Sequence[str], rows: Rows) -> list[list[str]]:
    """names, rows: what the rows are called, and they, the dense model's first. "of dense" is of the main score, "speed" of
    records a second, GMACs of an instance on the tokens that are there, "saved" of these, of all and of each tower's own, and
    "padding G" what the dense model spends on it besides, where there is any."""
    dense, main = rows[0], main_score(rows[0]["scores"])
    scores = list(dense["scores"])
    relative = ["of dense"] if main else []
    towers = list(dense["towers"]) if len(dense["towers"]) > 1 else []
    padding = ["padding G"] if any(row["padding"] for row in rows) else []
    saved = ["saved", *(f"{tower} saved" for tower in towers)]
    head = ["validation", *(f"{one} %" for one in scores), *relative, "GMACs", *saved, *padding]
    table = [[*head, "knob", "records/s", "speed"]]
    for name, row in zip(names, rows, strict=True):
        relative = [_ratio(row["scores"][main], dense["scores"][main], ".1%")] if main else []
        knob = f"{row['knob']['knob']} {row['knob']['value']:.4g}" if row["knob"] else ""
        speed = _ratio(row["records_per_second"], dense["records_per_second"], ".2f") + " x"
        costs = [
            f"{row['macs'] / 1e9:.4g}",
            f"{row['macs_saved']:.1%}",
            *(f"{1 - macs / whole:.1%}" for macs, whole in (row["towers"][tower] for tower in towers)),
            *(f"{row['padding'] / 1e9:.4g}" for _ in padding),
            knob,
            f"{row['records_per_second']:.1f}",
            speed,
        ]
        table.append([name, *_percent(row, scores), *relative, *costs])
    return table


def matching(names: Sequence[str], rows: Rows) -> list[list[str]]:
    """The second stage alone, of rows that have one; GMACs of a pair whose image is encoded already."""
    scores = list(rows[0]["matching"]["scores"])
    table = [["validation", *(f"{one} %" for one in scores), "pairs", "GMACs", "saved"]]
    for name, row in zip(names, rows, strict=True):
        found = row["matching"]
        saved = f"{1 - found['macs'] / found['dense_macs']:.1%}"
        table.append([name, *_percent(found, scores), f"{found['pairs']:,}", f"{found['macs'] / 1e9:.4g}", saved])
    return table


def _percent(row: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    return [f"{100 * row['scores'][one]:.2f}" for one in scores]


def _ratio(value: float, dense: float, form: str) -> str:
    return format(value / dense, form) if dense else "-"
