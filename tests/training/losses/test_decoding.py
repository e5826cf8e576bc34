"""What a step says it cost is what its records cost in evaluation, where answers are searched for."""

from __future__ import annotations

import pytest
from accelerate import Accelerator
from runs import config

from vltprune.cost.calibration import measure
from vltprune.training import compress, compression
from vltprune.training.data.calibration import calibration_batches
from vltprune.training.loop import trainer as trainer_module
from vltprune.training.losses.decoding import DecodeWork

PARTS = {"guide": "codebook(anchors=4)", "keep": "ratio(ratio=0.6)"}


def begun(task, folder, monkeypatch, **changes):
    """A run that trained nothing."""
    runs = []
    monkeypatch.setattr(trainer_module.Trainer, "train", lambda run: runs.append(run))
    monkeypatch.setattr(compression, "finish", lambda *a: None)
    compress(config(task, folder, parts=PARTS, reduction=0.2, steps=4, **changes), folder / "run")
    return runs[0]


@pytest.mark.filterwarnings("ignore:captions are written, and not scored")
@pytest.mark.parametrize("task", ["vqa", "caption", "nlvr", "retrieval"])
def test_a_step_counts_what_evaluation_does(task, tmp_path, monkeypatch):
    run = begun(task, tmp_path, monkeypatch)
    records, images = next(iter(run.loader.batches(0, 1)))
    run.module.train()
    given, said = (
        run.module(records, images, 0, measure_cost=True, decode_work=one) for one in (None, run.decode_work)
    )
    found = measure(run.model, calibration_batches(run.task, records, run.loader.opener.prepare))
    assert (run.decode_work is None) == (task in ("nlvr", "retrieval"))  # which have no decoder
    off = 0.02 if task == "retrieval" else 1e-6  # its captions are drawn, and evaluation is measured on the first ones
    assert float(said["macs"]) == pytest.approx(found.macs, rel=off)
    assert float(said["dense_macs"]) == pytest.approx(found.dense_macs, rel=off)
    if run.decode_work is not None:
        assert float(given["dense_macs"]) < 0.9 * found.dense_macs


def test_it_is_kept_with_the_checkpoints(tmp_path, monkeypatch):
    Accelerator(cpu=True)  # a caller's, whose state stays when `compress` returns
    run = begun("vqa", tmp_path, monkeypatch)
    run.checkpoints.save(1, run._state())
    again = begun("vqa", tmp_path, monkeypatch)
    assert again.decode_work is None
    assert again._restore() == 1
    assert again.decode_work == run.decode_work != DecodeWork(0, 0, 0, 0, 0)
