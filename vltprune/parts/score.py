"""Scorers as typed parts: prune(model, preset, scorer=vltprune.score.self_attention())."""

from ..layers.scorers.base import (
    Alignment,
    ClsAttention,
    Equal,
    Madtp,
    MeanClsAttention,
    Random,
    SelfAttention,
    TextAttention,
)
from ..layers.scorers.distinct import Distinct, DistinctAttention, DistinctMadtp
from ..layers.scorers.pairs import PairDistance, WindowDistance
from ..layers.scorers.queries import QueryAttention, QueryRelevance
from ..layers.scorers.statistics import (
    Ats,
    ColumnAttention,
    FlowCut,
    KeyNorm,
    LastAttention,
    PageRank,
    Remember,
    ValueWeightedAttention,
    WideClsAttention,
)
from ..layers.scorers.trained import Halting, Predictor
from .typed import typed_part

alignment = typed_part(Alignment)
ats = typed_part(Ats)
cls_attention = typed_part(ClsAttention)
column_attention = typed_part(ColumnAttention)
distinct = typed_part(Distinct)
distinct_attention = typed_part(DistinctAttention)
distinct_madtp = typed_part(DistinctMadtp)
equal = typed_part(Equal)
flowcut = typed_part(FlowCut)
halting = typed_part(Halting)
key_norm = typed_part(KeyNorm)
last_attention = typed_part(LastAttention)
madtp = typed_part(Madtp)
mean_cls_attention = typed_part(MeanClsAttention)
pagerank = typed_part(PageRank)
predictor = typed_part(Predictor)
query_attention = typed_part(QueryAttention)
query_relevance = typed_part(QueryRelevance)
random = typed_part(Random)
remember = typed_part(Remember)
self_attention = typed_part(SelfAttention)
text_attention = typed_part(TextAttention)
value_weighted_attention = typed_part(ValueWeightedAttention)
wide_cls_attention = typed_part(WideClsAttention)
pair_distance = typed_part(PairDistance)
window_distance = typed_part(WindowDistance)
