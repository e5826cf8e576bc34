"""vltprune chat."""

from __future__ import annotations

import json

import pytest
import small_vlms
import torch
from PIL import Image

import vltprune as vp
from vltprune.cli.chat import _seen
from vltprune.cli.main import main
from vltprune.data import SyntheticPairs
from vltprune.data.llava import llava_processor

QUESTION = "both images contain a circle"
# of one turn, as a processor of transformers writes it
TEMPLATE = (
    "{% for part in messages[0].content %}{% if part.type == 'image' %}{{ ['left', 'right'][loop.index0] }} <image> "
    "{% else %}: {{ part.text }} ?{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [str(folder / f"{side}.png") for side in ("left", "right")]
    for path, pixels in zip(paths, SyntheticPairs("test", 1)[0].images, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return vp.create_model("llava_tiny")


def said(capsys, *arguments):
    assert main(["chat", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_saved_model_answers_and_says_what_it_read(dense, images, tmp_path, capsys):
    pruned = vp.prune(dense, "divprune", keep="count(count=16)")
    vp.save(pruned, tmp_path / "pruned")
    vp.save(dense, tmp_path / "dense")
    lines = said(capsys, tmp_path / "pruned", *images, QUESTION, "--max-new-tokens", 3)
    assert [line for line in lines if line.startswith("image")] == [
        f"image {number}: 65 tokens -> 65 65 65 65 17" for number in (1, 2)
    ]
    whole = said(capsys, tmp_path / "dense", *images, QUESTION, "--max-new-tokens", 3)
    assert len(whole) == 2 and "reads every visual token" in whole[1]
    # an option prunes as the saved model was pruned
    again = said(
        capsys,
        tmp_path / "dense",
        *images,
        QUESTION,
        "--max-new-tokens",
        3,
        "--preset",
        "divprune",
        "--keep",
        "count(16)",
    )
    assert again == lines


def test_a_folder_of_transformers_is_asked_by_its_own_processor(dense, images, tmp_path, capsys):
    processor = llava_processor()
    processor.chat_template = TEMPLATE
    dense.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    vp.save(dense, tmp_path / "ours")
    assert "format" not in json.loads((tmp_path / "config.json").read_text())
    wanted = said(capsys, tmp_path / "ours", *images, QUESTION, "--max-new-tokens", 3)
    assert said(capsys, tmp_path, *images, QUESTION, "--max-new-tokens", 3) == wanted
    pruned = said(
        capsys, tmp_path, *images, QUESTION, "--max-new-tokens", 3, "--preset", "divprune", "--keep", "count(4)"
    )
    assert pruned[1].endswith(" 5")


def test_a_picture_shows_what_was_read(dense, images, tmp_path, capsys):
    vp.save(dense, tmp_path / "dense")
    asked = [tmp_path / "dense", *images, QUESTION, "--max-new-tokens", 3, "--picture", tmp_path / "new" / "read.png"]
    lines = said(capsys, *asked, "--preset", "fastv")
    assert lines[-1] == f"wrote {tmp_path / 'new' / 'read.png'}"
    with Image.open(tmp_path / "new" / "read.png") as picture:
        assert picture.width > 500 and picture.height > 300
    assert main(["chat", *map(str, asked)]) == 2
    assert "this one is dense: give --preset" in capsys.readouterr().err
    assert main(["chat", *map(str, asked[:-1]), "read.txt", "--preset", "fastv"]) == 2
    assert "--picture read.txt: write an image file, such as read.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "LEFT", QUESTION], "about two images, a left and a right one, got 1"),
        (["MODEL", "LEFT", "RIGHT", "both images contain a hexagon"], "'hexagon'"),
        (["MODEL", "LEFT", "nowhere.png", QUESTION], "nowhere.png"),
        (["MODEL", "LEFT", "RIGHT", QUESTION, "--keep", "count(4)"], "dense model"),
        (["blip_nlvr_tiny", "LEFT", "RIGHT", QUESTION], "asks a vision-language model of transformers"),
        (["MODEL", "LEFT", "RIGHT", QUESTION, "--processor", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_asked_is_refused(dense, images, tmp_path, capsys, arguments, message):
    vp.save(dense, tmp_path)
    names = {"MODEL": str(tmp_path), "LEFT": images[0], "RIGHT": images[1]}
    assert main(["chat", *(names.get(argument, argument) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


@torch.no_grad()
def test_tiles_are_drawn_but_where_the_model_puts_them_together(images):
    class Processor:
        class image_processor:
            image_mean, image_std = [0.5] * 3, [0.5] * 3

    case = small_vlms.make("llava-next")
    for place, at, sizes in (("output", None, [(96, 96)]), ("block", (0,), [(32, 32)] * 3)):
        inputs = case.prompts((3, 4))
        with vp.collect() as traces:
            case.pruned("random", place=place, at=at)(**inputs)
        assert [image.size for image in _seen(images[:1], inputs, Processor(), traces)] == sizes
