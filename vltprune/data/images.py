"""Image decoding from disk, from an archive or from memory, as RGB."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
_WHITE = (255, 255, 255)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what undoes each value of EXIF's Orientation; 1 is upright

_FILTERS = threading.Lock()


class ImageError(OSError):
    """A picture that cannot be read: missing, damaged, too large, or of no format that Pillow knows. Its message names it."""


class ImageNotFoundError(ImageError, FileNotFoundError):
    """A picture whose file does not exist."""


@dataclass(frozen=True)
class EncodedImage:
    """A picture's file as bytes. name: what to call it in messages."""

    name: str
    data: bytes = field(repr=False)


def load_image(file: str | Path | EncodedImage | np.ndarray) -> Image.Image:
    """The picture as RGB, turned as its EXIF data ask; what is transparent becomes white, 16 bits become 8.

    file: a path, a file's bytes, or pixels, uint8 [height, width, 3]. Of a picture with several frames the first is read.
    Metadata that are damaged are ignored. Raises ImageError, an OSError that names the file, and nothing else.
    """
    try:
        return _rgb(Image.fromarray(file)) if isinstance(file, np.ndarray) else _decoded(file)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise ImageError(f"cannot read {_name(file)} as a picture: {_reason(error)}") from error


def load_tensor(file: str | Path | EncodedImage | np.ndarray, prepare: Callable[[Image.Image], Tensor]) -> Tensor:
    """The picture as a model takes it. prepare: an RGB picture to [3, height, width], as `vltprune.transforms` gives it.

    ImageError as of `load_image`, and for a picture that `prepare` refuses, such as one so thin that nothing is left of it.
    """
    picture = load_image(file)
    try:
        return prepare(picture)
    except Exception as error:
        size = f"{picture.width} x {picture.height} pixels"
        raise ImageError(f"cannot prepare {_name(file)}, {size}, for the model: {_reason(error)}") from error


def list_images(folder: str | Path) -> list[Path]:
    """The pictures of a folder by suffix, sorted, subfolders left out. ValueError for none, OSError for no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder}: give a folder of pictures")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{folder} has no pictures: looked for {', '.join(sorted(SUFFIXES))}")
    return files


def _name(file: str | Path | EncodedImage | np.ndarray) -> str:
    if isinstance(file, np.ndarray):
        return f"an array {list(file.shape)} of {file.dtype}"
    return file.name if isinstance(file, EncodedImage) else str(file)


def _decoded(file: str | Path | EncodedImage) -> Image.Image:
    try:
        return _opened(file)
    except Image.DecompressionBombWarning:
        raise
    except Warning:  # of damaged metadata, where a program makes warnings errors
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _opened(file)


def _opened(file: str | Path | EncodedImage) -> Image.Image:
    with Image.open(_source(file)) as picture:
        return _rgb(_upright(picture))


def _source(file: str | Path | EncodedImage) -> Path | io.BytesIO:
    if isinstance(file, EncodedImage):
        return io.BytesIO(file.data)
    path = Path(file)
    if not path.is_file():
        raise ImageNotFoundError(f"there is no picture {path}" + (" (it is a folder)" if path.is_dir() else ""))
    return path


def _reason(error: Exception) -> str:
    """The first line of an error, or its type where it says nothing."""
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return "of no format that is known" if isinstance(error, UnidentifiedImageError) else lines[0]


def _upright(picture: Image.Image) -> Image.Image:
    """The picture, decoded, and turned as its metadata ask where these can be read."""
    picture.load()
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Warning:
        raise
    except Exception:  # sound pixels beside damaged metadata: read as they lie
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"it has no pixels, {picture.width} x {picture.height}")
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (*_WHITE, 255)), picture).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16 bits by their own range; 32 bits and floats by the largest value there is, as 255."""
    levels = np.nan_to_num(np.asarray(picture, np.float64), posinf=0.0, neginf=0.0)
    high = 65535 if picture.mode != "F" and levels.max() <= 65535 else max(levels.max(), 1e-9)
    return Image.fromarray((levels / high * 255).clip(0, 255).astype(np.uint8))
