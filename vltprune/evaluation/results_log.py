"""Results log: one JSON line a record, by which a stopped command resumes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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

    def __init__(self, folder: str | Path | None, settings: Mapping[str, object], file: str = _ROWS) -> None:
        """Open the log of a folder, with the rows of a stopped run of the same settings.

        Args:
            folder: The folder of the log; it is created with the first row. None keeps the rows in memory alone.
            settings: What the run depends on, plain JSON values.
            file: The name of the file of rows.

        Raises:
            ValueError: If the folder holds a run of other settings, or a damaged row.
        """
        self._file, self._settings = None if folder is None else Path(folder, file), settings
        self.rows: list[Row] = []
        if self._file is not None and (saved := self._file.with_name(_SETTINGS)).is_file():
            _compare(self._file.parent, json.loads(saved.read_text(encoding="utf-8")), settings)
            self.rows += _read(self._file)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, which are written at once. Nothing is written before the first of them."""
        added = [dict(row) for row in rows]
        if self._file is not None:
            self._write(self._file, added)
        self.rows += added

    def _write(self, file: Path, rows: Sequence[Row]) -> None:
        if not self.rows:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file.with_name(_SETTINGS), self._settings)
        with file.open("a" if self.rows else "w", encoding="utf-8") as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows))


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


def _read(file: Path) -> list[Row]:
    """The rows of a file; a last one that was cut short is cut off it."""
    text = file.read_bytes() if file.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        file.write_bytes(whole)
    return [_row(file, number, line) for number, line in enumerate(whole.splitlines(), start=1)]


def _row(file: Path, number: int, line: bytes) -> Row:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}, is damaged: remove the folder, or choose another --output") from error


def _compare(folder: Path, saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    different = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"{folder} holds results of other settings ({key}: {saved.get(key)!r} there, {current.get(key)!r} now): "
            "choose another --output, or remove that folder"
        )
