"""Runs that were killed, ran out of disk or met bad losses: what they leave, and how the same call resumes."""

from __future__ import annotations

import importlib
import json
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import started
from runs import SHORT, config, weights

import vltprune as vp
from vltprune.training import BadLossError, compress
from vltprune.training.loop import trainer as trainer_module
from vltprune.training.loop.checkpoints import Checkpoints
from vltprune.training.models import load_dense_model

timm_host = importlib.import_module("vltprune.hosts.timm")  # `hosts` is also the name of a registry


def test_a_killed_run_ends_as_one_that_was_not(no_final_evaluation, tmp_path):
    taught = {"distill": 0.5, "saliency": 0.5, "distill_summaries": 0.5}
    changes = {"steps": 9, "checkpoint_every": 2, "augment": True, "serve": [0.2], **taught}
    settings = config("nlvr", tmp_path / "data", **changes)
    right = compress(settings, tmp_path / "whole").state_dict()

    for step in (2, 4):  # killed twice, wherever it happens to be behind a checkpoint
        process = started(compress, settings, tmp_path / "cut")
        checkpoint = tmp_path / "cut" / "checkpoints" / f"step_{step:08d}"
        until = time.monotonic() + 100
        while not checkpoint.exists() and time.monotonic() < until:
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model").exists()
    found = compress(settings, tmp_path / "cut").state_dict()

    assert right.keys() == found.keys()
    assert all(torch.equal(right[name], found[name]) for name in right)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "history.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))


def test_losses_that_are_no_number(tmp_path, monkeypatch):
    settings = config("nlvr", tmp_path / "data", **{**SHORT, "steps": 6, "max_bad": 2, "checkpoint_every": 1})
    step = trainer_module.Trainer._step

    def poisoned(self, number, records, images):
        bad = number in (1, 3, 4)
        return step(self, number, records, images * float("nan") if bad else images)

    monkeypatch.setattr(trainer_module.Trainer, "_step", poisoned)
    monkeypatch.setattr(timm_host, "check_images", lambda *given: None)  # which would find it first
    with pytest.raises(BadLossError, match=r"2 losses in a row .* the last at step 4; .* checkpoint is of step 4"):
        compress(settings, tmp_path / "run")
    (saved,) = (tmp_path / "run").glob("bad_batch_*.pt")
    batch = torch.load(saved)
    assert batch["step"] == 4
    assert batch["images"].isnan().all()
    assert len(batch["records"]) == 4
    monkeypatch.setattr(trainer_module.Trainer, "_step", step)
    done = compress(settings, tmp_path / "run")  # the same call, once the cause is mended
    assert done is not None
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_steps"] == 2
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_a_full_disk_leaves_the_last_checkpoint(no_final_evaluation, tmp_path, monkeypatch):
    settings = config("nlvr", tmp_path / "data", **{**SHORT, "steps": 4})
    save, full = torch.save, []

    def fails(value, file, *args, **named):
        if "step_00000004" in str(file):
            full.append(file)
            raise OSError(28, "No space left on device", str(file))
        return save(value, file, *args, **named)

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match=r"checkpoint of step 4 .*No space left.* it resumes from step 2"):
        compress(settings, tmp_path / "run")
    assert full
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    monkeypatch.setattr(torch, "save", save)
    assert compress(settings, tmp_path / "run") is not None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_full_disk_under_sharded_weights_says_so_too(tmp_path):
    class Sharding:
        is_main_process = True

        def wait_for_everyone(self):
            pass

        def save_state(self, folder, safe_serialization):
            place = Path(folder) / "pytorch_model_fsdp_0"
            place.write_text("")  # no folder can be made there
            dcp.save({"weight": torch.ones(2)}, checkpoint_id=place)

    with pytest.raises(OSError, match=r"cannot write the checkpoint of step 4 .*File exists.* it resumes from step 0"):
        Checkpoints(tmp_path, Sharding()).save(4, {})
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_used(no_final_evaluation, tmp_path):
    settings = config("nlvr", tmp_path / "data", **SHORT)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to the folder .*file"):
        compress(settings, tmp_path / "file")
    compress(settings, tmp_path / "run")
    with pytest.raises(ValueError, match=r"is the run of another config \(lr: 0.001 there, 0.01 now\)"):
        compress(settings.replace(lr=0.01), tmp_path / "run")


def test_a_run_resumes_only_on_the_same_content(no_final_evaluation, tmp_path):
    settings = config("nlvr", tmp_path / "data", **SHORT)
    assert compress(settings, tmp_path / "run") is not None
    assert compress(settings, tmp_path / "run") is not None
    file = Path(settings.data)
    whole, image = file.read_text(), tmp_path / "data" / "3.png"
    file.write_text(whole.replace("True", "False", 1))
    with pytest.raises(ValueError, match="has changed since it began: data and val had other content"):
        compress(settings, tmp_path / "run")
    file.write_text(whole)
    image.write_bytes(image.read_bytes() + b"0")
    with pytest.raises(ValueError, match="began: images of data and images of val had other content"):
        compress(settings, tmp_path / "run")
    folder = vp.save(load_dense_model(settings), tmp_path / "model")
    settings = settings.replace(model=str(folder), model_args={})
    assert compress(settings, tmp_path / "from_folder") is not None
    other = load_dense_model(settings)
    with torch.no_grad():
        other.visual.pos_embed.add_(1)
    vp.save(other, folder)
    with pytest.raises(ValueError, match="has changed since it began: model had other content"):
        compress(settings, tmp_path / "from_folder")
