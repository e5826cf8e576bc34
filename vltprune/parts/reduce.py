"""Reducers as typed parts: prune(model, preset, reducer=vltprune.reduce.fuse())."""

from ..layers.reducers.adding import Add, AddNeighbors
from ..layers.reducers.base import Drop, Fuse
from ..layers.reducers.merging import Merge, Reassign, Tofu
from .typed import typed_part

add = typed_part(Add)
add_neighbors = typed_part(AddNeighbors)
drop = typed_part(Drop)
fuse = typed_part(Fuse)
merge = typed_part(Merge)
reassign = typed_part(Reassign)
tofu = typed_part(Tofu)
