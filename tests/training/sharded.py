"""Weights sharded among the processes (FSDP 2), which Accelerate offers on GPUs alone, on CPUs."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

_init = Accelerator.__init__


def shard_from_here_on() -> None:
    """Every Accelerator that this process makes shards what it prepares."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="NO_WRAP")
    Accelerator.__init__ = _sharding


def _sharding(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # what every later state is made from
    self.state.distributed_type = DistributedType.FSDP
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
