"""Run folder: belongs to one config, and to the content of the files that the config names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..data import Records, fingerprint, shards
from ..evaluation.results_log import write_json
from ..models import zoo
from .config import CompressConfig


def check_config(folder: Path, config: CompressConfig) -> None:
    """Makes the folder, and checks that it is no other config's.

    Args:
        folder: the run's folder.
        config: the run's config, compared with the one that is saved there.

    Raises:
        OSError: the folder cannot be made.
        ValueError: it is another config's; the text names the difference.
    """
    with _named_in_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    if not file.is_file():
        return
    saved, current = json.loads(file.read_text()), json.loads(json.dumps(config.to_dict()))
    different = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if different:
        raise ValueError(
            f"{folder} is the run of another config ({different[0]}: {saved.get(different[0])!r} there, "
            f"{current.get(different[0])!r} now): choose another output, or remove that folder"
        )


def claim_config(folder: Path, config: CompressConfig) -> None:
    """Writes the config to the folder, which is no other's from now on.

    Not before the config was found to fit its model: the folder would refuse the one that is right.

    Args:
        folder: the run's folder, checked by `check_config`.
        config: the run's config; one that is saved there already stays.

    Raises:
        OSError: the config cannot be written.
    """
    file = folder / "config.json"
    with _named_in_errors(folder):
        if not file.is_file():
            write_json(file, config.to_dict())


@contextlib.contextmanager
def _named_in_errors(folder: Path) -> Iterator[None]:
    """An OSError in the `with` block names the folder."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror}; choose another output") from error


def hash_contents(
    config: CompressConfig, model: str, records: Sequence[Any] | shards.Shards[Any], val: Sequence[Any]
) -> dict[str, str | None]:
    """Digests of the files that a config names. Of images and shards, size and both ends are hashed.

    Args:
        config: the run's.
        model: digest of the dense model.
        records: what is trained on.
        val: records of the validation split.

    Returns:
        A digest by what it is of; None for what the config does not name, or what is no file.
    """
    start = None if config.start is None else zoo.packaged(config.start) or config.start
    names = map(Path, records.names) if isinstance(records, shards.Shards) else _image_files(records)
    return {
        "version": __version__,
        "model": model,
        "start": fingerprint.hash_file(start),
        "data": fingerprint.hash_file(config.data),
        "val": fingerprint.hash_file(config.val),
        "vocabulary": fingerprint.hash_file(config.vocabulary),
        "answers": fingerprint.hash_file(config.answers),
        "images of data": fingerprint.hash_file_ends(names),
        "images of val": fingerprint.hash_file_ends(_image_files(val)),
    }


def _image_files(records: Sequence[Any]) -> list[Path]:
    """Files of records that were read from an annotation file; synthetic ones have none."""
    listed = records if isinstance(records, Records) else ()
    return [image for record in listed for image in record.images if isinstance(image, Path)]


def claim_contents(folder: Path, contents: dict[str, str | None]) -> None:
    """Writes the digests to the folder, or compares them with those that are there.

    Args:
        folder: the run's folder.
        contents: digests as of `hash_contents`.

    Raises:
        ValueError: the folder's run began from other content under the same names.
    """
    file = folder / "contents.json"
    if not file.is_file():
        write_json(file, contents)
        return
    saved = json.loads(file.read_text(encoding="utf-8"))
    if different := [name for name in {**saved, **contents} if saved.get(name) != contents.get(name)]:
        raise ValueError(
            f"what the run in {folder} depends on has changed since it began: {' and '.join(different)} had other "
            "content under the same names: choose another output, or remove that folder"
        )
