"""Atomic file writes: to a temporary file in the same folder, which is then renamed."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Write = Callable[[Path], object]


@contextlib.contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Replaces a file atomically: the `with` block writes a temporary file, which is renamed to `target` at its end.

    If the block fails, an earlier file at `target` is unchanged. The file's mode is what the umask leaves.

    Args:
        target: the file to write.

    Yields:
        The path of an empty temporary file in the target's folder.

    Raises:
        OSError: where the file cannot be written.
    """
    with _partial_file(Path(target)) as part:
        mode = part.stat().st_mode
        yield part
        _finish(part, mode)
        os.replace(part, target)
    _sync_folder(Path(target).parent)


def write_text(target: str | Path, text: str) -> None:
    """Writes a text file atomically in UTF-8.

    Args:
        target: the file to write.
        text: its contents. What UTF-8 cannot encode is written with a backslash.

    Raises:
        OSError: where the file cannot be written.
    """
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def replace_together(writes: Mapping[Path, Write], backups: Mapping[Path, Path]) -> None:
    """Replaces several files of a folder together. If anything fails, all are unchanged.

    A process that is killed in between leaves the last target and the backups as they were. A reader then takes the backup
    where a file does not belong to the last target.

    Args:
        writes: for each target a function that writes its contents to a path. The last target is replaced last.
        backups: for all targets but the last, where the old file is kept while the others are replaced.

    Raises:
        OSError: where a file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        parts = {target: stack.enter_context(_partial_file(target)) for target in writes}
        for target, write in writes.items():
            mode = parts[target].stat().st_mode
            write(parts[target])
            _finish(parts[target], mode)
        back: list[tuple[Path, Path | None]] = []
        try:
            for target, part in parts.items():
                if target in backups:
                    there = target.exists()
                    if there:
                        os.replace(target, backups[target])
                    back.append((target, backups[target] if there else None))
                os.replace(part, target)
        except BaseException:
            for target, backup in back:
                os.replace(backup, target) if backup is not None else target.unlink(missing_ok=True)
            raise
    for target in writes:
        _sync_folder(target.parent)
    for backup in backups.values():
        with contextlib.suppress(OSError):  # it is of no use any more, and does no harm
            backup.unlink()


@contextlib.contextmanager
def _partial_file(target: Path) -> Iterator[Path]:
    """A new, empty file in the target's folder, which is deleted afterwards unless it was renamed."""
    # with the target's suffix, from which some writers take the format
    part = target.with_name(f".{uuid.uuid4().hex}.{target.name}")
    try:
        with part.open("xb"):  # not by tempfile, which gives files to their owner alone
            pass
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from error
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _finish(file: Path, mode: int) -> None:
    """Flushes a file to the disk and gives it the mode that the empty file had."""
    if file.stat().st_mode != mode:  # safetensors makes a file of its own, for its owner alone
        file.chmod(stat.S_IMODE(mode))
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
