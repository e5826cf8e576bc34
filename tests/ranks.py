"""A function called in two processes of one group, for tests of what is distributed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

multiprocessing.set_forkserver_preload(["vltprune.training", "open_clip"])  # each takes seconds


def on_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """Call function(rank, *args) in two new processes, which have met and have the variables that torchrun sets.

    They are forked from a process that has the libraries imported, once for all the tests. An exception in one of them ends
    both, and is raised with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _on_one, (f"file://{folder}/address", function, args), nprocs=2, start_method="forkserver"
        )


def _on_one(rank: int, address: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    function(rank, *args)
    if dist.is_initialized():  # unless `function` has ended it
        dist.destroy_process_group()
