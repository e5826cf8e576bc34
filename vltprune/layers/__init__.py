"""The five kinds of part of a pruner: guides, scorers, keepers, selectors, reducers. They import core/ and no host."""

from .block_spec import BlockSpec
from .grid import with_grid
from .guides.base import AlignmentGuide, BoundGuide, Codebook, Guidance, TokenProjection
from .guides.query import current_query, query, set_query
from .guides.text import TextEmbedding, TextGuide, TextQuery, check_batch
from .keepers.adaptive import Distortion, Threshold
from .keepers.base import KeepRatioPredictor, Knob, Outliers, RandomRatio
from .keepers.fixed import All, Count, Counts, FixedKeeper, Ratio, Remove, Share
from .keepers.trained import Above, RisingThreshold, SampledRatio
from .raters import rater_macs, with_raters
from .reducers.adding import Add
from .reducers.base import Drop, Fuse, TokenReducer
from .reducers.merging import Merge, Tofu
from .reducers.reduction import Reduction, plan_reduction
from .scorers.base import (
    Alignment,
    ClsAttention,
    Equal,
    Madtp,
    MeanClsAttention,
    Random,
    SelfAttention,
    TextAttention,
    TokenScorer,
)
from .scorers.distinct import Distinct, DistinctAttention, DistinctMadtp
from .scorers.pairs import PairDistance, WindowDistance
from .scorers.queries import QueryAttention, QueryRelevance
from .scorers.statistics import (
    Ats,
    ColumnAttention,
    FlowCut,
    KeyNorm,
    PageRank,
    Remember,
    ValueWeightedAttention,
    WideClsAttention,
)
from .scorers.trained import Halting, Predictor
from .selectors.assigning import Components, Dominant
from .selectors.base import Selection, TokenSelector, Top
from .selectors.diverse import Deduplicate, Dpp, MaxMin, Pivots, UnlikeImportant
from .selectors.grid import Anchors, Pool
from .selectors.matching import Bipartite, Energy, Graph, MatchingSelector, Window
from .selectors.mctf import Mctf
from .selectors.sampling import SampleCdf, Uniform, Windows

__all__ = [
    "UnlikeImportant",
    "Remember",
    "Pool",
    "Outliers",
    "Dominant",
    "Components",
    "Anchors",
    "All",
    "Add",
    "Above",
    "Counts",
    "Energy",
    "Graph",
    "Mctf",
    "PairDistance",
    "Tofu",
    "Window",
    "WindowDistance",
    "AlignmentGuide",
    "Alignment",
    "Ats",
    "Bipartite",
    "BoundGuide",
    "QueryAttention",
    "TextEmbedding",
    "TextGuide",
    "TextQuery",
    "QueryRelevance",
    "check_batch",
    "current_query",
    "query",
    "set_query",
    "ClsAttention",
    "Codebook",
    "ColumnAttention",
    "Count",
    "Deduplicate",
    "Distinct",
    "DistinctAttention",
    "DistinctMadtp",
    "Distortion",
    "Dpp",
    "Drop",
    "FlowCut",
    "FixedKeeper",
    "Fuse",
    "Equal",
    "Guidance",
    "Halting",
    "KeepRatioPredictor",
    "KeyNorm",
    "Knob",
    "Madtp",
    "MaxMin",
    "MeanClsAttention",
    "PageRank",
    "Pivots",
    "MatchingSelector",
    "Merge",
    "Predictor",
    "Random",
    "RandomRatio",
    "Ratio",
    "Reduction",
    "Remove",
    "RisingThreshold",
    "SampleCdf",
    "SampledRatio",
    "Selection",
    "SelfAttention",
    "BlockSpec",
    "TextAttention",
    "Threshold",
    "TokenProjection",
    "TokenReducer",
    "plan_reduction",
    "TokenScorer",
    "TokenSelector",
    "Top",
    "Uniform",
    "ValueWeightedAttention",
    "WideClsAttention",
    "Windows",
    "with_grid",
    "with_raters",
    "rater_macs",
    "Share",
]
