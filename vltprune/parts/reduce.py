"""Reducers as typed parts: prune(model, preset, reducer=vltprune.reduce.fuse())."""

from ..layers.reducers.adding import Add
from ..layers.reducers.base import Drop, Fuse
from ..layers.reducers.merging import Merge, Tofu
from .typed import typed_part

add = typed_part(Add)
drop = typed_part(Drop)
fuse = typed_part(Fuse)
merge = typed_part(Merge)
tofu = typed_part(Tofu)
