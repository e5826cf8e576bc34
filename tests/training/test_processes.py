"""Two processes learn what one learns from the same global batch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from runs import config
from safetensors.torch import load_file
from sharded import shard_from_here_on
from torch.multiprocessing import start_processes

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.data.shards import write_shards
from vltprune.training import CompressConfig, Trainer, compress, compression
from vltprune.training.models import load_dense_model

_SETTINGS = {
    "steps": 3,
    "log_every": 1,
    "distill": 0.5,
    "distill_summaries": 0.5,
    "checkpoint_every": 100,
    "val_limit": 2,
}


def by_command(settings: CompressConfig, output: Path) -> None:
    """Compress by the command, in two processes that torchrun might have started: they meet where its variables say."""
    output.with_suffix(".json").write_text(json.dumps(settings.to_dict()))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which torchrun keeps for them
    start_processes(_command, (store.port, output), nprocs=2, start_method="forkserver")


def _command(rank: int, port: int, output: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in {**place, **meeting}.items()})
    os.environ.update(OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    processes, train = [], Trainer.train

    def counted(trainer: Trainer) -> None:
        processes.append(trainer.accelerator.num_processes)
        train(trainer)

    Trainer.train = counted  # in this process, which ends here
    run = ["--config", str(output.with_suffix(".json")), "--output", str(output), "--device", "cpu"]
    assert cli.main(["compress", *run]) == 0
    assert processes == [2]


def forked(settings: CompressConfig, output: Path, shards: bool = False) -> None:
    """Compress in two processes that are at hand sooner. shards: whether each holds a part of the weights."""
    on_two_ranks(_compress, settings, output, shards)


def _compress(rank: int, settings: CompressConfig, output: Path, shards: bool) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    compression.finish = _saved  # in this process, which ends here
    if shards:
        shard_from_here_on()
    compress(settings, output)


def _saved(run: Trainer, model: torch.nn.Module, val: Any) -> None:
    """What was learned, without what comes behind the last step: two processes by the command have that."""
    vp.save(model, run.folder / "model")


@pytest.fixture
def no_final_evaluation(monkeypatch):
    monkeypatch.setattr(compression, "finish", _saved)


def losses(folder: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [[row[name] for name in ("task", "align", "distill", "saliency") if name in row] for row in rows]


@pytest.mark.filterwarnings("ignore:captions are written, and not scored")
@pytest.mark.parametrize(
    ("task", "packed", "in_two"),
    [("nlvr", True, by_command), ("caption", False, forked), ("vqa", False, forked), ("retrieval", False, forked)],
)
def test_two_processes_learn_as_one(task, packed, in_two, no_final_evaluation, tmp_path):
    # Taught scores move anchors far and fast, rounding errors with them: the sharded test has them, in its first step.
    settings = config(task, tmp_path / "data", saliency=0.0, **_SETTINGS)
    if packed:
        write_shards(settings.data, tmp_path / "data", tmp_path / "shards", per_shard=3)
        settings = settings.replace(data=f"{tmp_path}/shards/{task}-{{000000..000002}}.tar")
    in_two(settings, tmp_path / "run2")
    if task == "retrieval":
        return  # negatives are drawn at random: see test_objectives
    compress(settings, tmp_path / "run1")
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "run2")), torch.tensor(losses(tmp_path / "run1")), atol=1e-4, rtol=1e-4
    )
    one, two = (weights(vp.load(tmp_path / f"run{n}" / "model")) for n in (1, 2))
    way = one - weights(vp.prune(load_dense_model(settings), settings.pruning))
    assert way.abs().max() > 1e-3
    # Adam moves a weight whose gradient is rounding error as far as any other, this way or that: no weight by itself tells.
    # A handful of such weights is 1 % of the way; one record that the two saw differently is all of it.
    assert float((two - one).norm() / way.norm()) < 0.05


def test_processes_that_hold_a_part_of_the_weights_each_learn_as_those_that_hold_them_all(
    no_final_evaluation, tmp_path
):
    """Resumed runs as well."""
    settings = config("nlvr", tmp_path / "data", **{**_SETTINGS, "steps": 2, "checkpoint_every": 1})
    compress(settings, tmp_path / "alone")
    forked(settings, tmp_path / "whole")
    forked(settings, tmp_path / "sharded", shards=True)
    alone, whole, parts = (torch.tensor(losses(tmp_path / name)) for name in ("alone", "whole", "sharded"))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole[0], alone[0], atol=1e-4, rtol=1e-4)  # saliency's directions, too
    whole, parts = (weights(vp.load(tmp_path / name / "model")) for name in ("whole", "sharded"))
    way = whole - weights(vp.prune(load_dense_model(settings), settings.pruning))
    assert way.abs().max() > 1e-3
    assert float((parts - whole).norm() / way.norm()) < 0.05

    folder = tmp_path / "sharded"
    assert (folder / "checkpoints/step_00000001/pytorch_model_fsdp_0").is_dir()  # every process wrote its own part
    at_once, weighed = losses(folder), load_file(folder / "model" / "model.safetensors")
    shutil.rmtree(folder / "checkpoints" / "step_00000002")  # as if they had been killed in their last step
    shutil.rmtree(folder / "model")
    forked(settings, tmp_path / "sharded", shards=True)
    assert losses(folder) == at_once
    again = load_file(folder / "model" / "model.safetensors")
    assert again.keys() == weighed.keys()
    assert all(torch.equal(value, weighed[name]) for name, value in again.items())


def weights(model) -> torch.Tensor:
    """All of them but the guide's, which do not begin where they were born."""
    return torch.cat([value.flatten() for name, value in model.state_dict().items() if "guide" not in name])
