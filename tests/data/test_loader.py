"""Batches of pixels: what they hold, and which images are skipped."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from vltprune.data import Loader, Statement, SyntheticNLVR, SyntheticPairs, normalize


def prepare(image):
    return torch.from_numpy(normalize(np.asarray(image)))


@pytest.fixture
def records(tmp_path):
    """Five pairs of images, one of entry 1 broken, one of entry 3 missing."""
    pixels = SyntheticPairs("test", 1)[0].images[0]
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:90])
    names = [("a", "b"), ("a", "broken"), ("b", "a"), ("gone", "b"), ("b", "b")]
    return [Statement(i, (tmp_path / f"{x}.png", tmp_path / f"{y}.png"), "", 1) for i, (x, y) in enumerate(names)]


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_and_what_they_skip(records, tmp_path, workers):
    loader = Loader(records, prepare, batch_size=2, workers=workers)
    for _ in range(2):  # again and again
        batches = list(loader)
        assert [[record.index for record in some] for some, _ in batches] == [[0], [2], [4]]
        assert all(images.shape == (1, 2, 3, 96, 96) for _, images in batches)
    assert [skipped.index for skipped in loader.skipped] == [1, 3]
    assert f"cannot read {tmp_path / 'broken.png'}" in loader.skipped[0].reason
    assert f"there is no image {tmp_path / 'gone.png'}" in loader.skipped[1].reason


def test_parts_take_turns_at_the_batches(records):
    parts = [Loader(records, prepare, batch_size=1, start=1, part=part, parts=3) for part in range(3)]
    assert [part.batches for part in parts] == [[range(1, 2), range(4, 5)], [range(2, 3)], [range(3, 4)]]
    assert [len(part) for part in parts] == [2, 1, 1]
    assert [[record.index for some, _ in part for record in some] for part in parts] == [[4], [2], []]
    assert [[skipped.index for skipped in part.skipped] for part in parts] == [[1], [], [3]]


def test_batches_that_lost_all(records):
    loader = Loader([records[3]], prepare)
    assert list(loader) == []
    assert len(loader.skipped) == 1


@pytest.mark.parametrize("workers", [0, 3])
def test_strict(records, workers):
    with pytest.raises(OSError, match="entry 1: cannot read"):
        list(Loader(records, prepare, strict=True, workers=workers))


def test_workers_set_nothing_aside_before_its_turn(records):
    loader = Loader(records, prepare, batch_size=1, workers=4)
    set_aside = []
    for some, _ in loader:
        set_aside.append((some[0].index, [skipped.index for skipped in loader.skipped]))
    assert set_aside == [(0, []), (2, [1]), (4, [1, 3])]


def test_workers_end_with_their_loader(records):
    before = set(threading.enumerate())  # other tests may have pools that go on
    batches = iter(Loader(records, prepare, batch_size=1, workers=2))
    next(batches)
    assert len(set(threading.enumerate()) - before) >= 1
    batches.close()
    assert not set(threading.enumerate()) - before


def test_synthetic_pairs_are_statements():
    pairs, statements = SyntheticPairs("test", 4, seed=3), SyntheticNLVR("test", 4, seed=3)
    assert [one.sentence for one in statements] == [pairs[i].sentences[0] for i in range(4)]
    assert [one.label for one in statements[1:3]] == [int(pairs[i].labels[0]) for i in (1, 2)]
    ((records, images),) = Loader(statements, prepare)
    assert [record.index for record in records] == [0, 1, 2, 3]
    assert torch.equal(images[2], torch.from_numpy(normalize(pairs[2].images)))
