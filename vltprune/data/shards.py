"""Records in tar files, as webdataset packs and streams them: for data that does not fit a disk. Needs the extra `train`.

A sample is what stands behind one key, the files' name up to its first dot:

  key.json   an entry of the form that annotation files have, see `vltprune.data.annotations`; paths in it are not followed
  key.txt    one caption, where no entry has it
  key.jpg    the picture: jpg, jpeg, png or webp; several are key.0.jpg, key.1.jpg, ..., in their order
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

from vltprune.data.annotations import KEY, UNREADABLE, decoded, entries, parsed, reason
from vltprune.data.images import EncodedImage, load_image
from vltprune.data.records import ImageSource, R

_SHARDS = re.compile(r"(pipe:|\w+://).*|.*\.(tar|tgz|tar\.\w+)")
_PICTURE = re.compile(r"(?:(\d+)\.)?(jpg|jpeg|png|webp)")
_PIECE = 1 << 20  # bytes


def is_shard_address(data: str) -> bool:
    """Whether an input is an address of shards: train-{000..009}.tar, train-*.tar, https://..., pipe:..., several by "::"."""
    return _SHARDS.fullmatch(data) is not None


@dataclass(frozen=True)
class Sample:
    """The files of one key of a shard, by what their names say behind it: "json", "0.jpg"."""

    shard: str
    key: str
    files: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used, and why; no key: what is behind the place where a shard ends too early."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return ", ".join(part for part in (self.shard, self.key) if part) + f": {self.reason}"


@dataclass(frozen=True)
class Shards(Generic[R]):
    """Where the shards of a data set are, and how an entry of it is read (`entry` of a task)."""

    names: tuple[str, ...]
    parse_entry: Callable[[int, Mapping[str, Any], Sequence[ImageSource]], R]

    @classmethod
    def from_address(cls, data: str, entry: Callable[[int, Mapping[str, Any], Sequence[ImageSource]], R]) -> Shards[R]:
        """Those of an address as `is_shard_address` takes it. FileNotFoundError that names what is not on this disk."""
        from webdataset.shardlists import expand_urls  # of the extra `train`

        names = tuple(shard for part in expand_urls(data) for shard in _found(part))
        return cls(names, entry)

    def record(self, index: int, sample: Sample) -> R:
        """What a sample holds; its key is the id of an entry that has none. OSError that says why there is no record."""
        try:
            return self.parse_entry(index, {KEY: sample.key, **_entry(sample)}, _pictures(sample))
        except UNREADABLE as error:
            raise OSError(reason(error)) from error


def iterate_samples(shard: str, lost: Callable[[SkippedSample], object]) -> Generator[Sample]:
    """The samples of a shard, in its order; `lost` is told of what is cut off.

    OSError that names a shard which cannot be opened, or whose command or server fails.
    """
    from webdataset.gopen import gopen, set_options  # of the extra `train`
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def told(error: Exception) -> bool:
        if isinstance(error, OSError):
            raise error
        lost(SkippedSample(shard, "", f"not a whole tar file: {_said(error)}"))
        return True

    stream: Any = None
    try:
        stream = gopen(shard)
        files = tar_file_expander([{"url": shard, "stream": stream}], handler=told)
        for found in group_by_keys(files, handler=told):
            yield Sample(shard, found["__key__"], {name: data for name, data in found.items() if name[:2] != "__"})
        while stream.read(_PIECE):  # a command that is not read to its end fails
            pass
        stream.close()
    except (OSError, ValueError) as error:
        raise OSError(f"cannot read the shard {shard}: {_said(error)}") from error
    finally:
        if stream is not None:
            set_options(stream, ignore_errors=True)
            stream.close()


def write_shards(file: str | Path, images: str | Path, folder: str | Path, per_shard: int = 1000) -> list[Path]:
    """An annotation file and its pictures as shards in a folder, in the file's order; returns them, FILE-000000.tar, ...

    images: the folder that the entries' paths begin in. Entries are written as they are, and read only by who reads the
    shards; pictures of other formats than shards have become png. ValueError for an entry without pictures, and as
    `annotations.entries`; OSError that names a picture which is not there, and where nothing can be written.
    """
    from webdataset.writer import TarWriter  # of the extra `train`

    listed, written = entries(Path(file)), []
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


def _entry(sample: Sample) -> Mapping[str, Any]:
    """What is said of a sample's pictures. Raises one of `UNREADABLE`."""
    said = {kind: decoded(sample.files[kind]) for kind in ("json", "txt") if kind in sample.files}
    if not said:
        raise ValueError("it has neither json nor txt")
    entry = parsed(said["json"]) if "json" in said else {}
    if not isinstance(entry, dict):
        raise ValueError(f"its json must hold an entry, it holds a {type(entry).__name__}")
    if "txt" in said and not any(entry.get(key) not in (None, "", []) for key in ("caption", "captions")):
        return {**entry, "caption": said["txt"].strip(), "captions": None}
    return entry


def _pictures(sample: Sample) -> list[ImageSource]:
    matches = filter(None, map(_PICTURE.fullmatch, sample.files))
    names = [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]
    return [EncodedImage(f"{sample.shard}, {sample.key}.{name}", sample.files[name]) for name in names]


def _packed(index: int, entry: Any, folder: Path) -> dict[str, bytes]:
    """The files of one entry."""
    try:
        names = entry["images"] if "images" in entry else [entry["image"]]
        files = [_file(folder / name) for name in names]
    except UNREADABLE as error:
        raise ValueError(f"entry {index}: {reason(error)}") from error
    numbered = {f"{place}.{kind}" if len(files) > 1 else kind: data for place, (kind, data) in enumerate(files)}
    return {**numbered, "json": json.dumps(entry).encode("utf-8")}


def _file(path: Path) -> tuple[str, bytes]:
    """A picture's kind, and its file as bytes."""
    kind = path.suffix[1:].lower()
    if _PICTURE.fullmatch(kind):
        return kind, path.read_bytes()
    as_png = io.BytesIO()
    load_image(path).save(as_png, "png")
    return "png", as_png.getvalue()


def _said(error: Exception) -> str:
    """The first line of an error, without what webdataset hangs on."""
    text = str(getattr(error, "strerror", None) or (error.args[0] if error.args else error))
    if status := re.search(r": (exit -?\d+) \(read\)", text):
        return f"what fetches it ended with {status[1]}"
    return text.splitlines()[0].split(" @ ")[0] if text else type(error).__name__
