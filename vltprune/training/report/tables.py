"""Tables of a compression's results, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...evaluation.metrics import main_score
from .examples import Rows


def results(names: Sequence[str], rows: Rows) -> list[list[str]]:
    """The table of results, whose columns `meanings` explains: a header, then a row a model.

    Args:
        names: The names of the rows.
        rows: Results as of `CompressResult`, the dense model's first.

    Returns:
        Cells of text, [1 + models, columns].
    """
    dense, main = rows[0], main_score(rows[0]["scores"])
    scores = list(dense["scores"])
    relative = ["of dense"] if main else []
    towers = list(dense["towers"]) if len(dense["towers"]) > 1 else []
    padding = ["padding G"] if any(row["padding"] for row in rows) else []
    padded = [tower for tower in towers if any(row["tower_padding"][tower] for row in rows)]
    saved = ["saved", *(name for tower in towers for name in (f"{tower} saved", f"{tower} part"))]
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


_MEANINGS = {
    "validation": "The model. Dense is the model before training. The others share their weights and differ in the knob.",
    "of dense": "The main score, relative to the dense model's.",
    "GMACs": "Billions of multiply-accumulates of an instance: a record's images and one of its texts. The pruning itself is "
    "included, padding is not.",
    "padding G": "Billions of multiply-accumulates that the dense model spends on the padding of an instance besides.",
    "saved": "Share of the dense model's multiply-accumulates that was saved.",
    "knob": "The setting of the keeper, which decides how many tokens stay; calibrated to the cost.",
}
_ENDINGS = {
    " padding G": "Billions of multiply-accumulates that the dense model spends on padding in one input of the {tower} tower.",
    " saved": "Share of the {tower} tower's own multiply-accumulates that was saved.",
    " part": "The {tower} tower's part of all that was saved.",
    " %": "The score {tower} on the validation split, in percent.",
}


def meanings(header: Sequence[str]) -> dict[str, str]:
    """What each column of `results` means."""
    explained = {}
    for column in header:
        if column in _MEANINGS:
            explained[column] = _MEANINGS[column]
        else:
            ending = next(ending for ending in _ENDINGS if column.endswith(ending))
            explained[column] = _ENDINGS[ending].format(tower=column.removesuffix(ending))
    return explained


def matching(names: Sequence[str], rows: Rows) -> list[list[str]]:
    """The table of retrieval's second stage, of rows that have one; GMACs are of a pair whose image is encoded already.

    Args:
        names: The names of the rows.
        rows: Results as of `CompressResult`, each with `matching`.

    Returns:
        Cells of text: a header, then a row a model.
    """
    scores = list(rows[0]["matching"]["scores"])
    table = [["validation", *(f"{one} %" for one in scores), "pairs", "GMACs", "saved"]]
    for name, row in zip(names, rows, strict=True):
        found = row["matching"]
        saved = f"{1 - found['macs'] / found['dense_macs']:.1%}"
        table.append([name, *_percent(found, scores), f"{found['pairs']:,}", f"{found['macs'] / 1e9:.4g}", saved])
    return table


def _knob(found: Mapping[str, Any] | None) -> str:
    """The keepers' settings: one knob of all towers, or one of each; empty for a dense model."""
    if found is None:
        return ""
    if found["value"] is not None:
        return f"{found['knob']} {found['value']:.4g}"
    towers = found["towers"].items()
    return ", ".join(f"{name} {one['knob']} {one['value']:.4g}" for name, one in towers if one["value"] is not None)


def knobs(found: Mapping[str, Any]) -> str:
    """The names of the calibrated knobs: one of all towers, or one of each."""
    if found["knob"] is not None:
        return found["knob"]
    return ", ".join(f"{name} {one['knob']}" for name, one in found["towers"].items() if one["knob"] is not None)


def _part(shares: Mapping[str, float], tower: str) -> str:
    return f"{shares[tower]:.0%}" if shares else "-"


def _percent(row: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    return [f"{100 * row['scores'][one]:.2f}" for one in scores]


def _ratio(value: float, dense: float, form: str) -> str:
    return format(value / dense, form) if dense else "-"
