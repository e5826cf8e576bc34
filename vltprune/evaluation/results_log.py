"""Results log: one JSON line a record, by which a stopped command resumes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..utils.files import write_text

# one record's line of JSON; a task names its entries
Row = Mapping[str, Any]

_SETTINGS, _ROWS = "settings.json", "results.jsonl"


class ResultsLog:
    """The rows of one run, in the order of its records, as a file of JSON lines.

    Attributes:
        rows: The rows so far.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object], file: str = _ROWS) -> None:
        """Open the log of a folder, with the rows of a stopped run of the same settings.

        Args:
            folder: The folder of the log; it is created with the first row.
            settings: What the run depends on, plain JSON values.
            file: The name of the file of rows.

        Raises:
            ValueError: If the folder holds a run of other settings, or a damaged row.
        """
        self._file, self._settings_file, self._settings = Path(folder, file), Path(folder, _SETTINGS), settings
        self.rows: list[Row] = []
        if self._settings_file.is_file():
            _compare(Path(folder), json.loads(self._settings_file.read_text(encoding="utf-8")), settings)
            self.rows += self._whole()

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, which are written at once. Nothing is written before the first of them."""
        added = [dict(row) for row in rows]
        if not self.rows:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._settings_file, self._settings)
        with self._file.open("a" if self.rows else "w", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in added))
        self.rows += added

    def _whole(self) -> list[Row]:
        """The rows on disk; a last one that was cut short is cut off the file."""
        text = self._file.read_bytes() if self._file.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            self._file.write_bytes(whole)
        return [self._row(number, line) for number, line in enumerate(whole.splitlines(), start=1)]

    def _row(self, number: int, line: bytes) -> Row:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{self._file}, line {number}, is damaged: remove the folder, or choose another --output"
            ) from error


def write_json(file: Path, value: object) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        file: The file; one that exists is replaced.
        value: What json can write.

    Raises:
        OSError: If the file cannot be written.
        TypeError: If json cannot write the value.
    """
    write_text(file, json.dumps(value, indent=2) + "\n")


def _compare(folder: Path, saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    different = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"{folder} holds results of other settings ({key}: {saved.get(key)!r} there, {current.get(key)!r} now): "
            "choose another --output, or remove that folder"
        )
