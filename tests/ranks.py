"""Functions called in new processes: in two of one group, for tests of what is distributed, or in one that knows less."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

multiprocessing.set_forkserver_preload(["vltprune.training"])  # torch, timm, accelerate: seconds


def in_a_process(function: Callable[..., None], *args: Any) -> None:
    """Call function(*args) in a new process, which has neither open_clip nor transformers imported yet.

    It is forked from a process that imports the other libraries once for all the tests. An exception is raised with its
    traceback.
    """
    _start(1, _alone, function, args)


def started(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Such a process at work, for who wants to end it."""
    process = multiprocessing.get_context("forkserver").Process(target=_alone, args=(0, function, args))
    process.start()
    return process


def on_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """Call function(rank, *args) in two such processes, which have met and have the variables that torchrun sets.

    An exception in one of them ends both.
    """
    with tempfile.TemporaryDirectory() as folder:
        _start(2, _together, f"file://{folder}/address", function, args)


def _start(count: int, target: Callable[..., None], *args: Any) -> None:
    multiprocessing.start_processes(target, args, nprocs=count, start_method="forkserver")


def _alone(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(*args)


def _together(rank: int, address: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    function(rank, *args)
    if dist.is_initialized():  # unless `function` has ended it
        dist.destroy_process_group()
