"""Tables of an ablation: rows merged over seeds, as Markdown, and all rows as CSV."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..cost.describe import percent, unit_of
from .ablation_grid import Cell, Grid, cell_key
from .metrics import main_score
from .results_log import Row

_NO_VALUE = "-"
_MEASURED = ("macs", "dense_macs", "macs_saved", "time")


@dataclass(frozen=True)
class Group:
    """The rows of cells that differ in their seed alone.

    Attributes:
        labels: The value of each field but the seed, as text; empty for the dense model.
        rows: Those that ran.
        errors: Why the others did not.
    """

    labels: Mapping[str, str]
    rows: Sequence[Row]
    errors: Sequence[str]

    @property
    def name(self) -> str:
        """The fields in words, such as "preset=evit, reduction=0.5"."""
        return ", ".join(f"{field}={text}" for field, text in self.labels.items())

    def values(self, value: Callable[[Row], Any]) -> list[float]:
        """A value of each row that has it."""
        return [found for row in self.rows if (found := value(row)) is not None]

    def mean(self, value: Callable[[Row], Any]) -> float:
        """The mean of a value over the rows; NaN for none."""
        values = self.values(value)
        return statistics.fmean(values) if values else float("nan")

    def deviation(self, value: Callable[[Row], Any]) -> float:
        """The standard deviation of a value over the rows; 0 for fewer than two."""
        values = self.values(value)
        return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Summary:
    """The rows of an ablation, merged over seeds.

    Attributes:
        grid: The grid.
        rows: The row of the dense model, then those of the grid's cells.
    """

    grid: Grid
    rows: Sequence[Row]

    @property
    def dense(self) -> Row:
        """The row of the dense model."""
        return self.rows[0]

    @property
    def main_score(self) -> str | None:
        """The score to chart; None where the metric returned none."""
        return main_score(self.dense["scores"])

    @property
    def scores(self) -> list[str]:
        """The names of all scores."""
        return list(dict.fromkeys(name for row in self.rows for name in row.get("scores", {})))

    @property
    def fields(self) -> list[str]:
        """The fields that have a column in the table, the preset first."""
        return ["preset", *(field for field in self.grid.fields if field not in ("preset", "seed"))]

    @cached_property
    def groups(self) -> list[Group]:
        """The dense model's group, then the others in the grid's order."""
        by_key = {cell_key(row["cell"]): row for row in self.rows}
        members: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.grid:
            members.setdefault(tuple(_labels(cell).values()), []).append(cell)
        found = [Group({}, [self.dense], [])]
        for cells in members.values():
            own = [by_key[cell.key] for cell in cells]
            errors = list(dict.fromkeys(row["error"] for row in own if "error" in row))
            found.append(Group(_labels(cells[0]), [row for row in own if "error" not in row], errors))
        return found

    @property
    def notes(self) -> list[str]:
        """A sentence for each reason why cells did not run."""
        return [f"Did not run: {group.name}: {error}" for group in self.groups for error in group.errors]

    def line_name(self, group: Group) -> str:
        """What a line of the charts is of: the fields that vary, but the reduction."""
        varied = [
            field
            for field, values in self.grid.fields.items()
            if field not in ("reduction", "seed") and len(values) > 1
        ]
        return ", ".join(group.labels[field] for field in varied) or group.labels["preset"]

    def table(self) -> list[list[str]]:
        """The results as text.

        Returns:
            A header, then a row a group, the dense model's first.
        """
        seeds, timed = len(self.grid.fields.get("seed", ())) > 1, self.dense["time"] is not None
        scale, unit = unit_of(self.dense["dense_macs"])
        towers = list(self.dense["tokens"])
        head = [*self.fields, *["seeds"] * seeds, *self.scores, f"{unit}MACs", "saved", *["time"] * timed]
        lines = [[*head, *(f"{tower} tokens" for tower in towers)]]
        for group in self.groups:
            names = [group.labels.get(field, "") for field in self.fields] if group.labels else ["dense"]
            cells = names + [""] * (len(self.fields) - len(names))
            cells += [str(len(group.rows)) if group.labels else ""] * seeds
            cells += [_spread(group, lambda row, name=name: row["scores"].get(name)) for name in self.scores]
            cells += [_spread(group, lambda row: row["macs"] / scale), _saved(group)]
            cells += [_spread(group, lambda row: row["time"], ".2f")] * timed
            lines.append([*cells, *(_tokens(group, tower) for tower in towers)])
        return lines

    def markdown(self) -> str:
        """The table in Markdown, and the notes as a list below it."""
        header, *lines = self.table()
        rule = ["---", *["---:"] * (len(header) - 1)]
        rows = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (header, rule, *lines)]
        text = "".join(f"| {row} |\n" for row in rows)
        return text + ("\n" if self.notes else "") + "".join(f"- {note}\n" for note in self.notes)

    def csv(self) -> str:
        """The rows as CSV, one a cell: the fields, then scores, MACs, time, tokens as JSON, the keeper, and the reason."""
        labels = {cell.key: cell.labels for cell in self.grid}
        fields = list(dict.fromkeys([*self.fields, "reduction", "seed"]))
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow([*fields, *self.scores, *_MEASURED, "tokens", "keeper", "error"])
        for row in self.rows:
            own = {"preset": "dense"} if row["cell"] is None else labels[cell_key(row["cell"])]
            cells = [own.get(field, "") for field in fields]
            cells += [row.get("scores", {}).get(name, "") for name in self.scores]
            cells += [row.get(name, "") for name in _MEASURED]
            tokens = json.dumps(row["tokens"]) if "tokens" in row else ""
            writer.writerow([*cells, tokens, row.get("keep", ""), row.get("error", "")])
        return written.getvalue()


def _labels(cell: Cell) -> dict[str, str]:
    """The fields of a cell as text, without the seed."""
    return {field: text for field, text in cell.labels.items() if field != "seed"}


def _spread(group: Group, value: Callable[[Row], Any], form: str = ".4g") -> str:
    """The mean of a value, and ± its deviation over several seeds."""
    values = group.values(value)
    if not values:
        return _NO_VALUE
    around = f" ± {group.deviation(value):.2g}" if len(values) > 1 else ""
    return format(group.mean(value), form) + around


def _saved(group: Group) -> str:
    """The mean share of MACs that was saved."""
    return percent(group.mean(lambda row: row["macs_saved"])) if group.rows else _NO_VALUE


def _tokens(group: Group, tower: str) -> str:
    """Mean tokens that entered each layer, and that left the last: "197 197 98 49"."""
    means = [row["tokens"][tower] for row in group.rows if tower in row["tokens"]]
    return " ".join(f"{statistics.fmean(column):.0f}" for column in zip(*means, strict=True)) or _NO_VALUE
