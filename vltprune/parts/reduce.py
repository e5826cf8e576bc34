"""Reducers as typed parts: prune(model, preset, reducer=vltprune.reduce.fuse())."""

from ..layers.adding_reducers import Add
from ..layers.merging_reducers import Merge, Tofu
from ..layers.reducers import Drop, Fuse
from .typed import typed_part

add = typed_part(Add)
drop = typed_part(Drop)
fuse = typed_part(Fuse)
merge = typed_part(Merge)
tofu = typed_part(Tofu)
