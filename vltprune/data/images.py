"""Image decoding: files, bytes and arrays to RGB images and to input tensors."""

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
# What undoes each value of EXIF's Orientation; 1 is upright.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNING_FILTERS = threading.Lock()


class ImageError(OSError):
    """An image that cannot be decoded: missing, damaged, too large, or of an unknown format. The message names it."""


class ImageNotFoundError(ImageError, FileNotFoundError):
    """An image whose file does not exist."""


@dataclass(frozen=True)
class EncodedImage:
    """An image file as bytes.

    Attributes:
        name: What error messages call it.
        data: The bytes of the file.
    """

    name: str
    data: bytes = field(repr=False)


ImageSource = str | Path | EncodedImage | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """Decode an image to RGB, upright by its EXIF orientation.

    Transparent pixels become white and 16 bits become 8. Of several frames the first is decoded. Damaged metadata is
    ignored.

    Args:
        source: A path, a file's bytes, or pixels, uint8 [height, width, 3].

    Raises:
        ImageError: If the image cannot be decoded. It is an OSError, names the source, and is the only exception raised.
    """
    try:
        return _rgb(Image.fromarray(source)) if isinstance(source, np.ndarray) else _decoded(source)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise ImageError(f"cannot read {_name(source)} as an image: {_reason(error)}") from error


def load_tensor(source: ImageSource, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Decode an image and transform it to a model's input.

    Args:
        source: As of `load_image`.
        transform: An RGB image to [3, height, width], as `vltprune.transforms` gives it.

    Returns:
        The input, [3, height, width].

    Raises:
        ImageError: If the image cannot be decoded, or if `transform` refuses it, as one so thin that resizing leaves nothing.
    """
    image = load_image(source)
    try:
        return transform(image)
    except Exception as error:
        size = f"{image.width} x {image.height} pixels"
        raise ImageError(f"cannot prepare {_name(source)}, {size}, for the model: {_reason(error)}") from error


def list_images(folder: str | Path) -> list[Path]:
    """List the images of a folder by their suffixes, sorted, without subfolders.

    Raises:
        NotADirectoryError: If there is no such folder.
        ValueError: If it holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder}: give a folder of images")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{folder} has no images: looked for {', '.join(sorted(SUFFIXES))}")
    return files


def _name(source: ImageSource) -> str:
    if isinstance(source, np.ndarray):
        return f"an array {list(source.shape)} of {source.dtype}"
    return source.name if isinstance(source, EncodedImage) else str(source)


def _decoded(file: str | Path | EncodedImage) -> Image.Image:
    try:
        return _opened(file)
    except Image.DecompressionBombWarning:
        raise
    except Warning:  # of damaged metadata, where a program makes warnings errors
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _opened(file)


def _opened(file: str | Path | EncodedImage) -> Image.Image:
    with Image.open(_source(file)) as image:
        return _rgb(_upright(image))


def _source(file: str | Path | EncodedImage) -> Path | io.BytesIO:
    if isinstance(file, EncodedImage):
        return io.BytesIO(file.data)
    path = Path(file)
    if not path.is_file():
        raise ImageNotFoundError(f"there is no image {path}" + (" (it is a folder)" if path.is_dir() else ""))
    return path


def _reason(error: Exception) -> str:
    """The first line of an error, or its type where it says nothing."""
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return "of no format that is known" if isinstance(error, UnidentifiedImageError) else lines[0]


def _upright(image: Image.Image) -> Image.Image:
    """The image, decoded, and upright by its metadata where these can be read."""
    image.load()
    try:
        transpose = _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Warning:
        raise
    except Exception:  # the pixels are sound and the metadata are damaged: leave the image as it is
        transpose = None
    return image if transpose is None else image.transpose(transpose)


def _rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"it has no pixels, {image.width} x {image.height}")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*_WHITE, 255)), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits by their own range; 32 bits and floats by the largest value there is, as 255."""
    levels = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
    high = 65535 if image.mode != "F" and levels.max() <= 65535 else max(levels.max(), 1e-9)
    return Image.fromarray((levels / high * 255).clip(0, 255).astype(np.uint8))
