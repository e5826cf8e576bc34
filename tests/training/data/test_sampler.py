"""Which records a step sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import annotations

from vltprune.data import captions
from vltprune.training.data.batches import varied
from vltprune.training.data.sampler import Draws


def prepare(picture):
    return torch.from_numpy(np.asarray(picture.resize((8, 8)), np.float32)).permute(2, 0, 1)


@given(
    records=st.integers(8, 40),
    each=st.integers(1, 4),
    world=st.integers(1, 3),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_processes_share_a_step_and_an_epoch_sees_nothing_twice(records, each, world, seed, epoch):
    batch = min(each * world, records // world * world)
    ranks = [Draws(range(records), prepare, batch, seed, rank, world) for rank in range(world)]
    alone, steps = Draws(range(records), prepare, batch, seed), ranks[0].steps_per_epoch
    seen = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        together = np.concatenate([draws.numbers(step) for draws in ranks])
        assert together.tolist() == alone.numbers(step).tolist()
        seen += together.tolist()
    assert len(set(seen)) == len(seen) == steps * batch


def test_a_later_start_gives_the_same_steps(tmp_path):
    records = captions(annotations("caption", tmp_path), tmp_path)
    draws = Draws(records, prepare, 4, seed=3, augment=True)
    whole = list(draws.batches(0, 5))
    rest = list(Draws(records, prepare, 4, seed=3, augment=True, workers=1).batches(3, 5))
    for (some, images), (right, same) in zip(rest, whole[3:], strict=True):
        assert some == right
        assert torch.equal(images, same)
    assert not torch.equal(whole[0][1], next(iter(Draws(records, prepare, 4, seed=3).batches(0, 1)))[1])


def test_what_cannot_be_opened_is_replaced_and_noted(tmp_path):
    records = captions(annotations("caption", tmp_path), tmp_path)
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "5.png").unlink()
    draws = Draws(records, prepare, 4, seed=0)
    batches = list(draws.batches(0, 6))
    assert all(images.shape == (4, 1, 3, 8, 8) for _, images in batches)
    assert {one.index for one in draws.skipped} == {2, 5}
    assert len(draws.skipped) == 2
    assert "5.png" in str(draws.skipped)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(OSError, match="20 records in a row cannot be opened; the last: entry"):
        list(Draws(records, prepare, 4).batches(0, 1))


def test_batches_that_cannot_be_dealt():
    with pytest.raises(ValueError, match="batch_size=9 is more than the 8 records there are"):
        Draws(range(8), prepare, 9)
    with pytest.raises(ValueError, match="batch_size=4 cannot be dealt to 3 processes evenly"):
        Draws(range(8), prepare, 4, world=3)


@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 99))
def test_crops_lie_in_the_picture(width, height, seed):
    picture = Image.new("RGB", (width, height))
    crop = varied(picture, np.random.default_rng(seed))
    assert 1 <= crop.width <= width
    assert 1 <= crop.height <= height
    assert crop.width * crop.height >= 0.3 * width * height or min(width, height) < 8
