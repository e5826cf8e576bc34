"""Results log: one JSON line a record, so that a command that was stopped goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..utils.files import write_text

_SETTINGS, _ROWS = "settings.json", "results.jsonl"


class ResultsLog:
    """The rows of one run, in the order of its records. settings: what the run depends on, plain JSON values."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Takes up a run of the same settings where it stopped; ValueError, with the difference, for one of others."""
        self._file, self._settings_file, self._settings = Path(folder, _ROWS), Path(folder, _SETTINGS), settings
        self.rows: list[dict[str, Any]] = []
        if self._settings_file.is_file():
            _compare(Path(folder), json.loads(self._settings_file.read_text(encoding="utf-8")), settings)
            self.rows += self._whole()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, written through at once. Nothing is written before the first of them."""
        added = [dict(row) for row in rows]
        if not self.rows:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._settings_file, self._settings)
        with self._file.open("a" if self.rows else "w", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in added))
        self.rows += added

    def _whole(self) -> Iterable[dict[str, Any]]:
        """The rows on disk; a last one that was cut short is cut off the file."""
        text = self._file.read_bytes() if self._file.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            self._file.write_bytes(whole)
        return [self._row(place, line) for place, line in enumerate(whole.splitlines(), start=1)]

    def _row(self, place: int, line: bytes) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self._file}, line {place}, is damaged: remove the folder, or choose another") from error


def write_json(file: Path, value: Any) -> None:
    """The whole file or none of it, whenever the program is stopped, and whoever else writes it."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def _compare(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    other = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if other:
        key = other[0]
        raise ValueError(
            f"{folder} holds results of other settings ({key}: {there.get(key)!r} there, {here.get(key)!r} now): "
            "choose another --output, or remove that folder"
        )
