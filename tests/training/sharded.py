"""vltprune's command line with the weights sharded among the processes (FSDP 2), which Accelerate offers on GPUs alone."""

from __future__ import annotations

import sys

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from vltprune.cli import main

_init = Accelerator.__init__


def _sharding(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # what every later state is made from
    self.state.distributed_type = DistributedType.FSDP
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)


Accelerator.__init__ = _sharding

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
