"""Pictures from the user's disk, or out of an archive: any format, mode and size that Pillow reads, as RGB."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Encoded:
    """A picture's file as bytes. name: what to call it in messages."""

    name: str
    data: bytes = field(repr=False)


def read(file: str | Path | Encoded) -> Image.Image:
    """The picture as RGB, turned as its EXIF data ask; what is transparent becomes white, 16 bits become 8.

    OSError that names the file where there is none, or none that can be read.
    """
    if isinstance(file, Encoded):
        return _decoded(io.BytesIO(file.data), file.name)
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}" + (" (it is a folder)" if path.is_dir() else ""))
    return _decoded(path, str(path))


def listing(folder: str | Path) -> list[Path]:
    """The pictures of a folder by suffix, sorted, subfolders left out. ValueError for none, OSError for no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder}: give a folder of pictures")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{folder} has no pictures: looked for {', '.join(sorted(SUFFIXES))}")
    return files


def _decoded(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(
            file
        ) as opened:  # of damaged EXIF data Pillow warns, and so it may: filters are not a thread's own
            return _rgb(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = str(error).splitlines()[0].replace(repr(file), "it")  # bytes are called by their place in memory
        raise OSError(f"cannot read {name} as a picture: {why}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        levels = np.asarray(picture, np.float64)
        high = 65535 if picture.mode != "F" and levels.max() <= 65535 else max(levels.max(), 1e-9)
        picture = Image.fromarray((levels / high * 255).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (*_WHITE, 255)), picture).convert("RGB")
    return picture.convert("RGB")
