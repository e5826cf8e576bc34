"""Fixtures of the commands: weights, images, annotations, and a check of errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.data import SyntheticPairs
from vltprune.demo.measure import generate_batches
from vltprune.models import zoo


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """Random weights under the names that come with the package."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    dense = vp.create_model("blip_nlvr_tiny")
    vp.save(dense, folder / "blip_nlvr_tiny", dtype=torch.float16)
    pruned = vp.prune(dense, "madtp", guide="codebook(anchors=8)")
    vp.fit_guide(pruned, [batch.inputs_for(pruned) for batch in generate_batches("val", 2)])
    for tag in ("p70", "p80"):
        vp.save(pruned, folder / f"blip_nlvr_tiny_madtp.{tag}", dtype=torch.float16)
    vp.save(vp.create_model("llava_tiny"), folder / "llava_tiny", dtype=torch.float16)
    return folder


@pytest.fixture(autouse=True)
def _weights(tiny_weights, monkeypatch):
    monkeypatch.setattr(zoo, "WEIGHTS", tiny_weights)


@pytest.fixture
def pair(tmp_path):
    """The paths of two images."""
    paths = [tmp_path / "left.png", tmp_path / "right.jpg"]
    for path, pixels in zip(paths, SyntheticPairs("test", 1)[0].images, strict=True):
        Image.fromarray(pixels).resize((130, 70)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def photos(tmp_path):
    """A folder with three images of different sizes and modes, a broken one, a cut one, and a text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.jpg")
    Image.fromarray(noise[..., 0]).resize((50, 200)).save(folder / "b.png")
    Image.fromarray(noise).convert("RGBA").save(folder / "c.webp")
    (folder / "broken.jpg").write_bytes(b"no image at all")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:1500])
    (folder / "notes.txt").write_text("no image, and not to be complained of")
    return folder


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with exit code 2; its one line of complaint."""

    def run(*argv: str) -> str:
        try:
            code = cli.main([*argv])
        except SystemExit as stop:
            code = stop.code
        err = capsys.readouterr().err
        assert code == 2, err
        assert "Traceback" not in err
        complaint = err.strip().splitlines()[-1]
        assert complaint.startswith("vltprune: error: ")
        return complaint

    return run


@pytest.fixture
def captioned(tmp_path):
    """Five images with one to three captions each, Flickr8k's form."""
    folder, noise = tmp_path / "flickr", np.random.default_rng(0)
    folder.mkdir()
    entries = []
    for i in range(5):
        Image.fromarray(noise.integers(0, 255, (60, 80, 3), np.uint8)).save(folder / f"{i}.jpg")
        entries.append({"image": f"{i}.jpg", "captions": [f"caption {j} of image {i}" for j in range(1 + i % 3)]})
    (folder / "dev.json").write_text(json.dumps(entries))
    return folder / "dev.json"


WORDS = ("a", "caption", "of", "image", "what", "is", "on", "the", "desk", *"0123456789")


@pytest.fixture
def vocabulary(tmp_path):
    """A small vocabulary of BERT's form, and the arguments of a model that has it: its words, [DEC] and [ENC]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return str(tmp_path / "vocab.txt"), [f"vocab_size={len(words) + 2}", f"enc_id={len(words) + 1}"]
