"""Tables of a compression's results, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .curves import main_score
from .examples import Rows


def results(names: Sequence[str], rows: Rows) -> list[list[str]]:
    """names, rows: what the rows are called, and they, the dense model's first. "of dense" is of the main score, GMACs
    of an instance on the tokens that are there. "saved" is a share of these, of all and of each
    tower's own; "of it", the tower's part of all that is saved; "padding G", what the dense model spends on padding besides,
    where there is any, in all and in one of a tower's images or texts."""
    dense, main = rows[0], main_score(rows[0]["scores"])
    scores = list(dense["scores"])
    relative = ["of dense"] if main else []
    towers = list(dense["towers"]) if len(dense["towers"]) > 1 else []
    padding = ["padding G"] if any(row["padding"] for row in rows) else []
    padded = [tower for tower in towers if any(row["tower_padding"][tower] for row in rows)]
    saved = ["saved", *(name for tower in towers for name in (f"{tower} saved", "of it"))]
    skipped = [*padding, *(f"{tower} padding G" for tower in padded)]
    head = ["validation", *(f"{one} %" for one in scores), *relative, "GMACs", *saved, *skipped]
    table = [[*head, "knob"]]
    for name, row in zip(names, rows, strict=True):
        relative = [_ratio(row["scores"][main], dense["scores"][main], ".1%")] if main else []
        costs = [
            f"{row['macs'] / 1e9:.4g}",
            f"{row['macs_saved']:.1%}",
            *(cell for tower in towers for cell in (f"{row['reductions'][tower]:.1%}", _part(row["shares"], tower))),
            *(f"{row['padding'] / 1e9:.4g}" for _ in padding),
            *(f"{row['tower_padding'][tower] / 1e9:.4g}" for tower in padded),
            _knob(row["knob"]),
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


def _knob(found: Mapping[str, Any] | None) -> str:
    """What the keepers were set to: one knob of all towers, or one of each; nothing of a dense model."""
    if found is None:
        return ""
    if found["value"] is not None:
        return f"{found['knob']} {found['value']:.4g}"
    towers = found["towers"].items()
    return ", ".join(f"{name} {one['knob']} {one['value']:.4g}" for name, one in towers if one["value"] is not None)


def knobs(found: Mapping[str, Any]) -> str:
    """The names of the knobs that were set: one, or one of each tower."""
    if found["knob"] is not None:
        return found["knob"]
    return ", ".join(f"{name} {one['knob']}" for name, one in found["towers"].items() if one["knob"] is not None)


def _part(shares: Mapping[str, float], tower: str) -> str:
    return f"{shares[tower]:.0%}" if shares else "-"


def _percent(row: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    return [f"{100 * row['scores'][one]:.2f}" for one in scores]


def _ratio(value: float, dense: float, form: str) -> str:
    return format(value / dense, form) if dense else "-"
