"""`predict` from end to end, and the images it reads."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.data import SyntheticPairs
from vltprune.data.images import load_image
from vltprune.data.word_tokenizer import NLVR_WORDS
from vltprune.demo.measure import generate_batches
from vltprune.models import zoo

SHIPPED = zoo.WEIGHTS


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


def test_predict_needs_images(pair, photos, tmp_path, fails):
    output = ["--output", str(tmp_path / "new")]
    assert "there is no image nowhere.png" in fails("predict", pair[0], "nowhere.png", "a circle", *output)
    assert "(it is a folder)" in fails("predict", pair[0], str(tmp_path), "a circle", *output)
    broken = str(photos / "broken.jpg")
    assert f"cannot read {broken}" in fails("predict", broken, pair[1], "a circle", *output)


def test_the_sample_needs_nothing(tmp_path, monkeypatch, capsys, fails):
    """It says what it is, and its images answer alike when they are given by path."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "--sample"]) == 0
    out = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "sample").iterdir()) == ["left.png", "prediction.png", "right.png"]
    sentence = re.search(r'sentence: "(.*)", which is (?:true|false)', out)[1]
    answer = re.search(r"probability of true: .*%", out)[0]
    assert cli.main(["predict", "sample/left.png", "sample/right.png", sentence]) == 0
    assert answer in capsys.readouterr().out

    assert "sample holds results already (prediction.png, left.png, right.png)" in fails("predict", "--sample")
    assert cli.main(["predict", "--sample", "--overwrite"]) == 0


def test_the_shipped_model_is_right_about_the_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "WEIGHTS", SHIPPED)
    assert cli.main(["predict", "--sample", "--output", str(tmp_path)]) == 0
    told, said = re.search(r"which is (\w+)\. The model says:\n(\w+)", capsys.readouterr().out).groups()
    assert told == said


def test_what_is_asked_must_be_whole(pair, fails):
    for argv in ([], [pair[0]], pair):
        assert "needs two images and a sentence, LEFT RIGHT SENTENCE, or --sample" in fails("predict", *argv)
    assert "--sample brings its own images and sentence" in fails("predict", "--sample", *pair, "a circle")


def test_unknown_words_are_refused_with_the_known_ones(pair, fails):
    complaint = fails("predict", *pair, "both images contain a pink dog")
    assert "'pink'" in complaint and "'dog'" in complaint
    assert f"The words that the model knows: {' '.join(NLVR_WORDS)}" in complaint


def test_predictions_never_replace_a_file_unless_asked(pair, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    argv = ["predict", *pair, "a circle"]
    assert cli.main(argv) == cli.main(argv) == 0
    assert {path.name for path in tmp_path.glob("prediction*")} == {"prediction.png", "prediction-2.png"}
    for output in ("prediction.png", "."):
        assert "holds results already (prediction.png): add --overwrite" in fails(*argv, "--output", output)
    assert cli.main([*argv, "--output", "prediction.png", "--overwrite"]) == 0


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
def test_images_of_every_mode_become_rgb(mode, pixel, wanted, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (7, 5), pixel).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert image.getpixel((3, 3)) == wanted


def test_images_are_rotated_by_their_orientation_tag(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (10, 20)
