"""Scorers as typed parts: prune(model, preset, scorer=vltprune.score.self_attention())."""

from ..layers.distinct import Distinct, DistinctAttention, DistinctMadtp
from ..layers.scorers import Alignment, ClsAttention, Equal, Madtp, MeanClsAttention, Random, SelfAttention
from .typed import typed_part

alignment = typed_part(Alignment)
cls_attention = typed_part(ClsAttention)
distinct = typed_part(Distinct)
distinct_attention = typed_part(DistinctAttention)
distinct_madtp = typed_part(DistinctMadtp)
equal = typed_part(Equal)
madtp = typed_part(Madtp)
mean_cls_attention = typed_part(MeanClsAttention)
random = typed_part(Random)
self_attention = typed_part(SelfAttention)
