"""Images of every format, mode and kind of damage: read as RGB, or refused by the one error that names the file."""

from __future__ import annotations

import io
import random
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vltprune.data import Loader, Record
from vltprune.data.images import EncodedImage, ImageError, load_image
from vltprune.training.data.calibration import calibration_batches
from vltprune.training.data.loader import RecordLoader
from vltprune.training.data.opener import RecordOpener

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
LEFT_HALF_RED = np.zeros((16, 48, 3), np.uint8)
LEFT_HALF_RED[:, :24, 0] = 255


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def every_format() -> dict[str, bytes]:
    """The same pixels in each format that Pillow both writes and reads here, by the format's name."""
    Image.init()
    made = {}
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN) - {"EPS"}):  # which another program draws
        for mode in ("RGB", "P", "1", "F"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of formats that Pillow will give up
                    data = encoded(Image.fromarray(PIXELS).convert(mode), kind)
                load_image(EncodedImage(kind, data))
            except (OSError, KeyError, ValueError):
                continue
            made[kind] = data
            break
    return made


FORMATS = every_format()


def test_every_common_format_is_read():
    assert set(FORMATS) >= {"BMP", "DDS", "GIF", "ICO", "JPEG", "PNG", "PPM", "SPIDER", "TGA", "TIFF", "WEBP"}


@pytest.mark.parametrize("kind", FORMATS)
@given(seed=st.integers(0, 2**32))
def test_damage_of_any_kind_is_an_image_error_or_an_image(kind, seed):
    rng, data = random.Random(seed), bytearray(FORMATS[kind])
    if rng.random() < 0.4:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.randrange(6)):
        if data:
            data[rng.randrange(min(len(data), rng.choice((32, 256, len(data)))))] = rng.randrange(256)
    complaint = ""
    try:
        image = load_image(EncodedImage("it.bin", bytes(data)))
    except ImageError as error:
        complaint = str(error)
    if complaint:
        assert complaint.startswith("cannot read it.bin as an image: ") and "0x" not in complaint
    else:
        assert image.mode == "RGB" and 0 not in image.size


@pytest.mark.parametrize(
    "raised",
    [
        struct.error("unpack"),
        TypeError("int"),
        AttributeError("none"),
        SyntaxError("box"),
        MemoryError(),
        RecursionError("deep"),
        EOFError(),
        AssertionError(),
        ZeroDivisionError("0"),
        Image.DecompressionBombWarning("large"),
        Image.DecompressionBombError("huge"),
        UserWarning("odd"),
        OverflowError("wide"),
        RuntimeError(""),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["open", "load", "convert"])
def test_whatever_a_decoder_raises(raised, where, tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")

    def fail(*_, **__):
        raise raised

    owner = Image if where == "open" else Image.Image
    monkeypatch.setattr(owner, where, fail)
    if where == "load":
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageError, match=r"cannot read .*a\.png as an image: \w+"):
        load_image(tmp_path / "a.png")


def exif(orientation: int, *more: tuple[int, int, int, int]) -> bytes:
    """EXIF data of an orientation and further entries (tag, type, count, value), which nobody checks."""
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)]
    entries += [struct.pack("<HHII", *entry) for entry in more]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0)


ILL_TYPED = {
    "text as a number": (0x010F, 3, 1, 77),
    "number as a text": (0x011A, 2, 4, 0x41424344),
    "fraction as a text": (0x011B, 2, 1, 0x30),
    "signed byte": (0x9000, 6, 4, 0xFFFFFFFF),
    "double": (0x9003, 12, 1, 3),
    "none": (0x8769, 7, 0, 0),
    "beyond the end": (0x010E, 2, 400, 1 << 30),
    "of no type": (0x0110, 99, 3, 5),
    "directory nowhere": (0x8769, 4, 1, 1 << 31),
    "itself": (0x8769, 4, 1, 8),
}


@pytest.mark.parametrize("broken", ILL_TYPED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("filters", ["error", "ignore"])
def test_a_sound_image_with_an_ill_typed_tag_is_turned_and_read(broken, kind, filters):
    data = encoded(Image.fromarray(LEFT_HALF_RED), kind, exif=exif(6, ILL_TYPED[broken]))
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        image = load_image(EncodedImage("a", data))
    assert image.size == (16, 48)
    assert image.getpixel((8, 4))[0] > 200 and image.getpixel((8, 44))[0] < 60


@pytest.mark.parametrize(
    "damaged",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0nonsense, and more of it",
        exif(0),
        exif(9),
        exif(6)[:20],
        b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 2, 4, 0x41424344, 0),
        b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 5, 1, 0, 0),
    ],
)
@pytest.mark.parametrize("filters", ["error", "ignore"])
def test_where_the_orientation_is_broken_the_image_is_read_as_it_lies(damaged, filters):
    whole = encoded(Image.fromarray(PIXELS), "JPEG")
    data = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(damaged) + 2) + damaged + whole[2:]
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        assert load_image(EncodedImage("a", data)).size == (32, 24)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations(orientation):
    data = encoded(Image.fromarray(LEFT_HALF_RED), "PNG", exif=exif(orientation))
    image = np.asarray(load_image(EncodedImage("a", data)))[..., 0] > 0
    wide = orientation < 5
    assert image.shape == ((16, 48) if wide else (48, 16))
    first = image[:, :24] if wide else image[:24]
    assert first.all() if orientation in (1, 4, 5, 6) else not first.any()


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.fromarray(np.array([[np.nan, np.inf, 1.0, -np.inf, -2.0]], np.float32)), [0, 0, 255, 0, 0]),
        (Image.fromarray(np.array([[0, 65535, 32896]], np.uint16)), [0, 255, 128]),
        (Image.fromarray(np.array([[-5, 70000, 35000]], np.int32)), [0, 255, 127]),
        (Image.fromarray(np.zeros((1, 2), np.float32)), [0, 0]),
    ],
    ids=["F", "I;16", "I", "F of nothing"],
)
def test_wide_pixels(image, wanted):
    read = load_image(EncodedImage("a", encoded(image, "TIFF")))
    assert np.asarray(read)[0].tolist() == [[level] * 3 for level in wanted]


def test_transparent_palettes_become_white():
    palette = Image.fromarray(PIXELS).convert("P")
    for transparency in (palette.getpixel((0, 0)), bytes(256)):
        data = encoded(palette, "PNG", transparency=transparency)
        assert load_image(EncodedImage("a", data)).getpixel((0, 0)) == (255, 255, 255)


def test_of_several_frames_the_first_is_read():
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue", "lime")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load_image(EncodedImage("a", data)).getpixel((2, 2)) == (255, 0, 0)


def test_images_of_no_or_too_many_pixels(monkeypatch):
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ImageError, match="as an image"):
            load_image(EncodedImage("a", b"P6 %d %d 255\n" % size))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # 768 are more, and not twice as many
    with pytest.raises(ImageError, match="decompression bomb"):
        load_image(EncodedImage("a", FORMATS["PNG"]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="decompression bomb"):
        load_image(EncodedImage("a", FORMATS["PNG"]))


def test_names_that_no_disk_takes(tmp_path):
    for name in ("a\0b.png", "half \ud83d.png", "long" * 100, "missing.png"):
        with pytest.raises(ImageError, match="image"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no image"):
        load_image(tmp_path / "missing.png")


def test_arrays_that_are_no_pixels():
    with pytest.raises(ImageError, match=r"cannot read an array \[2, 2, 2, 2\] of float64"):
        load_image(np.zeros((2, 2, 2, 2)))


def thin(image: Image.Image) -> torch.Tensor:
    """A transform that refuses what is thinner than four pixels."""
    image.resize((image.width // 4, image.height // 4))
    return torch.zeros(3, 2, 2)


@pytest.fixture
def records(tmp_path):
    """Four images: sound, damaged, too thin for the model, sound."""
    for name, side in (("a", 24), ("c", 2), ("d", 24)):
        Image.fromarray(PIXELS[:side]).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(FORMATS["DDS"][:140])
    return [Record(10 + i, (tmp_path / f"{name}.png",)) for i, name in enumerate("abcd")]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_report_them_with_file_and_index(records, tmp_path, workers):
    loader = Loader(records, thin, batch_size=2, workers=workers)
    assert [[record.index for record in some] for some, _ in loader] == [[10], [13]]
    damaged, refused = map(str, loader.skipped)
    assert damaged.startswith(f"entry 11: cannot read {tmp_path / 'b.png'} as an image: ")
    assert refused.startswith(f"entry 12: cannot prepare {tmp_path / 'c.png'}, 32 x 2 pixels, for the model: ")
    with pytest.raises(OSError, match="entry 11: cannot read"):
        list(Loader(records, thin, strict=True, workers=workers))


def test_training_draws_others_instead(records):
    loader = RecordLoader(records, RecordOpener(thin), batch_size=4)
    (batch, images), *_ = loader.batches(0, 1)
    assert {record.index for record in batch} == {10, 13} and len(images) == 4
    assert sorted(one.index for one in loader.skipped) == [11, 12]


def test_calls_leave_them_out(records):
    class Looks:
        def tokenize(self, some):
            return (), [1] * len(some)

        def predict(self, model, records, images, texts):
            return [record.index for record in records]

    (call,) = calibration_batches(Looks(), records, thin)
    assert call(None) == [10, 13]
