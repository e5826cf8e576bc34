"""Batches of records, opened by the main process and by workers."""

from __future__ import annotations

import os
import signal
from contextlib import closing

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import annotations

from vltprune.data import captions
from vltprune.training.data import loader as loader_module
from vltprune.training.data.loader import RecordLoader
from vltprune.training.data.opener import RecordOpener, random_crop

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)  # from Python 3.12 on


def prepare(image):
    return torch.from_numpy(np.asarray(image.resize((8, 8)), np.float32)).permute(2, 0, 1)


def loader(records, seed=3, augment=True, workers=0, check=None):
    return RecordLoader(records, RecordOpener(prepare, seed, augment, check), 4, workers=workers)


@pytest.fixture
def records(tmp_path):
    return captions(annotations("caption", tmp_path), tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_gives_the_same_steps(records, workers):
    whole = list(loader(records).batches(0, 5))
    torch_state = torch.get_rng_state()
    rest = list(loader(records, workers=workers).batches(2, 5))
    assert torch.equal(torch.get_rng_state(), torch_state)  # the run's random numbers are its own
    for (some, images), (right, same) in zip(rest, whole[2:], strict=True):
        assert some == right
        assert torch.equal(images, same)
    plain = next(iter(loader(records, augment=False).batches(0, 1)))
    assert not torch.equal(whole[0][1], plain[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_opened_is_replaced_and_noted_once(records, workers, tmp_path):
    def check(record):
        if record.index == 3:
            raise ValueError("no words")

    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "5.png").unlink()
    some = loader(records, seed=0, augment=False, workers=workers, check=check)
    batches = list(some.batches(0, 6))
    assert all(images.shape == (4, 1, 3, 8, 8) for _, images in batches)
    assert not {2, 3, 5} & {record.index for batch, _ in batches for record in batch}
    assert sorted(note.index for note in some.skipped) == [2, 3, 5]
    assert "5.png" in str(some.skipped) and "no words" in str(some.skipped)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    before = set(psutil.Process().children())
    with pytest.raises(OSError, match=r"^20 records in a row cannot be opened; the last: entry .: .*png$") as caught:
        list(loader(records, workers=workers).batches(0, 1))
    assert caught.tb is not None  # a traceback keeps what its frames name, and it must not keep the workers
    assert set(psutil.Process().children()) <= before


def test_workers_survive_signals_and_end_with_the_batches(records):
    """A launcher hands Ctrl-C and SIGTERM to all processes; the run ends behind its step, which needs its workers."""
    before = set(psutil.Process().children())
    with closing(loader(records, workers=2).batches(0, 100)) as batches:
        for _ in range(2):
            next(batches)  # one of each worker, which has begun to ignore signals before it opens a record
        workers = set(psutil.Process().children()) - before
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        for _ in range(8):
            next(batches)
    assert not any(worker.is_running() for worker in workers)


def test_workers_survive_signals_before_they_ignore_them(records, monkeypatch):
    ignore_signals = loader_module._ignore_signals

    def begin(worker):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        ignore_signals(worker)

    monkeypatch.setattr(loader_module, "_ignore_signals", begin)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert len(list(loader(records, workers=2).batches(0, 4))) == 4
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before  # of the main process


@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 99))
def test_crops_lie_in_the_image(width, height, seed):
    image = Image.new("RGB", (width, height))
    crop = random_crop(image, np.random.default_rng(seed))
    assert 1 <= crop.width <= width
    assert 1 <= crop.height <= height
    assert crop.width * crop.height >= 0.3 * width * height or min(width, height) < 8
