"""Files that are written whole or not at all: beside their place first, then moved there in one step."""

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
    """Within the `with` block, an empty file beside `target` to write to; it takes the target's place at the end.

    If the block fails, whatever stood at `target` is there as before. The file's mode is what the umask leaves.
    """
    with _partial_file(Path(target)) as part:
        mode = part.stat().st_mode
        yield part
        _finish(part, mode)
        os.replace(part, target)
    _sync_folder(Path(target).parent)


def write_text(target: str | Path, text: str) -> None:
    """`text` in UTF-8 as the whole file, or the file as it was; what UTF-8 does not have is written with a backslash."""
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def replace_together(writes: Mapping[Path, Write], backups: Mapping[Path, Path]) -> None:
    """Several files of one folder, of which the last is written last; if anything fails, all are as before.

    writes: per target, what writes its contents to a path. backups: where the old file of a target stands while the others
    are moved, for all targets but the last. A process that is killed in between leaves the last target and the backups as
    they were: whoever reads takes the backup where the file does not belong to the last target.
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
    """A new, empty file in the target's folder, which is gone afterwards unless it was moved."""
    part = target.with_name(
        f".{uuid.uuid4().hex}.{target.name}"
    )  # with its suffix, which tells some writers the format
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
    """What was written is on the disk, and not only in the system's memory, and has the mode that the empty file had."""
    if file.stat().st_mode != mode:  # safetensors makes a file of its own, for its owner alone
        file.chmod(stat.S_IMODE(mode))
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    """The same for the names in a folder, where the system can; the files are whole in any case."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
