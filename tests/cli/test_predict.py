"""`predict` from end to end, and the pictures it reads."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.data import SyntheticPairs
from vltprune.data.images import load_image
from vltprune.demo.measure import generate_batches


def test_predict(pair, tmp_path, capsys):
    target = tmp_path / "out" / "kept.png"
    assert cli.main(["predict", *pair, "both images contain a red circle.", "--output", str(target)]) == 0
    out = capsys.readouterr().out
    assert re.match(r"(true|false)  \(probability of true: \d+\.\d%\)", out)
    assert re.search(r"left image +145 -> (\d+ ){5}\d+\n", out)
    assert re.search(r"text +8 -> (\d+ ){3}\d+\n", out)
    with Image.open(target) as drawn:
        assert drawn.width > 900


def test_predict_dense_into_a_folder(pair, tmp_path, capsys):
    argv = [
        "predict",
        *pair,
        "no image contains a star",
        "--model",
        "blip_nlvr_tiny",
        "--output",
        str(tmp_path / "new"),
    ]
    assert cli.main(argv) == 0
    assert "every token stays" in capsys.readouterr().out
    assert (tmp_path / "new" / "prediction.png").is_file()


def test_predict_answers_as_the_library(pair, tmp_path, capsys):
    sentence = "there are more stars in the left image than in the right image"
    images = [np.asarray(Image.fromarray(side)) for side in SyntheticPairs("test", 1)[0].images]
    for path, pixels in zip(pair, images, strict=True):
        Image.fromarray(pixels).save(path.replace("jpg", "png"))
    argv = [path.replace("jpg", "png") for path in pair]
    assert cli.main(["predict", *argv, sentence, "--output", str(tmp_path)]) == 0

    batch = generate_batches("test", 1)[0]
    question = type(batch)(batch.images, (sentence,), batch.labels, batch.families)
    model = vp.create_model("blip_nlvr_tiny_madtp.p80", pretrained=True)
    chance = model(*question.inputs_for(model)).softmax(-1)[0, 1]
    assert f"{chance:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sentence", "options", "complaint"),
    [
        ("both images contain a pink circle", [], "'pink'"),
        ("both images contain a cirle", [], "nearest: circle"),
        ("", [], "empty sentence"),
        ("red " * 40, [], "max_positions=32"),
        ("a circle", ["--model", "blip_nlvr_tiny_madtpp"], "did you mean"),
        ("a circle", ["--model", "vit_tiny_patch16_224"], "use a blip_nlvr_tiny"),
        ("a circle", ["--pretrained", "nowhere"], "there is no file nowhere"),
    ],
)
def test_predict_refusals(sentence, options, complaint, pair, tmp_path, fails):
    assert complaint in fails("predict", *pair, sentence, "--output", str(tmp_path), *options)


def test_predict_needs_pictures(pair, photos, tmp_path, fails):
    output = ["--output", str(tmp_path / "new")]
    assert "there is no picture nowhere.png" in fails("predict", pair[0], "nowhere.png", "a circle", *output)
    assert "(it is a folder)" in fails("predict", pair[0], str(tmp_path), "a circle", *output)
    broken = str(photos / "broken.jpg")
    assert f"cannot read {broken}" in fails("predict", broken, pair[1], "a circle", *output)


@pytest.mark.parametrize(
    ("mode", "pixel", "wanted"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 128, (128, 128, 128)),
        ("LA", (128, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_pictures_of_every_mode_become_rgb(mode, pixel, wanted, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (7, 5), pixel).save(path)
    picture = load_image(path)
    assert (picture.mode, picture.size) == ("RGB", (7, 5))
    assert picture.getpixel((3, 3)) == wanted


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (10, 20)
