"""Shards: records in tar files, as webdataset packs and streams them, for data that does not fit a disk.

Needs the extra `train`. A sample is all files of one key, their names up to the first dot:

  key.json   an entry of the format that annotation files have, see `vltprune.data.annotations`; its paths are not followed
  key.txt    one caption, where no entry has it
  key.jpg    the image: jpg, jpeg, png or webp; several are key.0.jpg, key.1.jpg, ..., in their order
"""

from __future__ import annotations

import glob
import io
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from vltprune.data.annotations import KEY, UNREADABLE, Entry, decode_text, entries, parse_json, reason
from vltprune.data.images import EncodedImage, ImageSource, load_image
from vltprune.data.records import R

_SHARDS = re.compile(r"(pipe:|\w+://).*|.*\.(tar|tgz|tar\.\w+)")
_IMAGE = re.compile(r"(?:(\d+)\.)?(jpg|jpeg|png|webp)")
_PIECE = 1 << 20  # bytes


def is_shard_address(data: str) -> bool:
    """Whether an input names shards: train-{000..009}.tar, train-*.tar, https://..., pipe:..., or several joined by "::"."""
    return _SHARDS.fullmatch(data) is not None


@dataclass(frozen=True)
class Sample:
    """The files of one key of a shard.

    Attributes:
        shard: The shard's address.
        key: The sample's key.
        files: Their contents, by their names behind the key: "json", "0.jpg".
    """

    shard: str
    key: str
    files: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used.

    Attributes:
        shard: The shard's address.
        key: The sample's key; empty for everything behind the place where a shard ends too early.
        reason: What is wrong with it.
    """

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return ", ".join(part for part in (self.shard, self.key) if part) + f": {self.reason}"


@dataclass(frozen=True)
class Shards(Generic[R]):
    """The shards of a data set.

    Attributes:
        names: The address of each shard.
        parse_entry: A task's function from index, entry and images to a record.
    """

    names: tuple[str, ...]
    parse_entry: Callable[[int, Entry, Sequence[ImageSource]], R]

    @classmethod
    def from_address(cls, data: str, parse_entry: Callable[[int, Entry, Sequence[ImageSource]], R]) -> Shards[R]:
        """Find the shards of an address.

        Args:
            data: An address as `is_shard_address` takes it.
            parse_entry: As of the class.

        Returns:
            The shards, in the order of the address; those of a pattern sorted by name.

        Raises:
            FileNotFoundError: If a shard on this disk does not exist.
        """
        from webdataset.shardlists import expand_urls  # of the extra `train`

        names = tuple(shard for part in expand_urls(data) for shard in _found(part))
        return cls(names, parse_entry)

    def record(self, index: int, sample: Sample) -> R:
        """Parse a sample; its key is the identifier of an entry that has none.

        Args:
            index: The record's index, as `Record.index`.
            sample: The files of its key.

        Returns:
            The record, whose images are still encoded.

        Raises:
            OSError: If the sample holds no record of the task.
        """
        try:
            return self.parse_entry(index, {KEY: sample.key, **_entry(sample)}, _images(sample))
        except UNREADABLE as error:
            raise OSError(reason(error)) from error


def iterate_samples(shard: str, on_skip: Callable[[SkippedSample], object]) -> Generator[Sample]:
    """Stream the samples of a shard, in its order.

    Args:
        shard: The shard's address.
        on_skip: Called with what is cut off where a shard ends too early.

    Yields:
        The samples.

    Raises:
        OSError: If the shard cannot be opened, or if its command or server fails.
    """
    from webdataset.gopen import gopen, set_options  # of the extra `train`
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def handle(error: Exception) -> bool:
        if isinstance(error, OSError):
            raise error
        on_skip(SkippedSample(shard, "", f"not a whole tar file: {_first_line(error)}"))
        return True

    stream: Any = None
    try:
        stream = gopen(shard)
        files = tar_file_expander([{"url": shard, "stream": stream}], handler=handle)
        for found in group_by_keys(files, handler=handle):
            yield Sample(shard, found["__key__"], {name: data for name, data in found.items() if name[:2] != "__"})
        while stream.read(_PIECE):  # a command that is not read to its end fails
            pass
        stream.close()
    except (OSError, ValueError) as error:
        raise OSError(f"cannot read the shard {shard}: {_first_line(error)}") from error
    finally:
        if stream is not None:
            set_options(stream, ignore_errors=True)
            stream.close()


def write_shards(file: str | Path, images: str | Path, folder: str | Path, per_shard: int = 1000) -> list[Path]:
    """Write an annotation file and its images as shards, in the file's order.

    Entries are written as they are, and are parsed only when the shards are read. Images in formats that shards do not
    have become png.

    Args:
        file: The annotation file.
        images: The folder that the entries' image paths begin in.
        folder: Where the shards go; it is created.
        per_shard: Entries a shard.

    Returns:
        The shards, FILE-000000.tar, FILE-000001.tar, ...

    Raises:
        ValueError: If the file holds no list of entries, or if an entry has no images.
        OSError: If the file or an image cannot be read, or if a shard cannot be written.
    """
    from webdataset.writer import TarWriter  # of the extra `train`

    listed = entries(Path(file))
    written: list[Path] = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for start in range(0, len(listed), per_shard):
        written.append(Path(folder, f"{Path(file).stem}-{len(written):06d}.tar"))
        with TarWriter(str(written[-1]), encoder=False, mtime=0) as tar:
            for index, entry in enumerate(listed[start : start + per_shard], start):
                tar.write({"__key__": f"{index:08d}", **_packed(index, entry, Path(images))})
    return written


def _found(name: str) -> list[str]:
    """The shards of one name, which may be a pattern of files."""
    if ":" in name:
        return [name]
    found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] if Path(name).is_file() else []
    if not found:
        raise FileNotFoundError(f"there is no shard {name}")
    return found


def _entry(sample: Sample) -> Entry:
    """The entry of a sample. Raises one of `UNREADABLE`."""
    texts = {kind: decode_text(sample.files[kind]) for kind in ("json", "txt") if kind in sample.files}
    if not texts:
        raise ValueError("it has neither json nor txt")
    entry = parse_json(texts["json"]) if "json" in texts else {}
    if not isinstance(entry, dict):
        raise ValueError(f"its json must hold an entry, it holds a {type(entry).__name__}")
    if "txt" in texts and not any(entry.get(key) not in (None, "", []) for key in ("caption", "captions")):
        return {**entry, "caption": texts["txt"].strip(), "captions": None}
    return entry


def _images(sample: Sample) -> list[ImageSource]:
    matches = filter(None, map(_IMAGE.fullmatch, sample.files))
    names = [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]
    return [EncodedImage(f"{sample.shard}, {sample.key}.{name}", sample.files[name]) for name in names]


def _packed(index: int, entry: Any, folder: Path) -> dict[str, bytes]:
    """The files of one entry."""
    try:
        names = entry["images"] if "images" in entry else [entry["image"]]
        files = [_file(folder / name) for name in names]
    except UNREADABLE as error:
        raise ValueError(f"entry {index}: {reason(error)}") from error
    numbered = {f"{number}.{kind}" if len(files) > 1 else kind: data for number, (kind, data) in enumerate(files)}
    return {**numbered, "json": json.dumps(entry).encode("utf-8")}


def _file(path: Path) -> tuple[str, bytes]:
    """An image's format, and its file as bytes."""
    kind = path.suffix[1:].lower()
    if _IMAGE.fullmatch(kind):
        return kind, path.read_bytes()
    as_png = io.BytesIO()
    load_image(path).save(as_png, "png")
    return "png", as_png.getvalue()


def _first_line(error: Exception) -> str:
    """The first line of an error, without what webdataset appends."""
    text = str(getattr(error, "strerror", None) or (error.args[0] if error.args else error))
    if status := re.search(r": (exit -?\d+) \(read\)", text):
        return f"what fetches it ended with {status[1]}"
    return text.splitlines()[0].split(" @ ")[0] if text else type(error).__name__
