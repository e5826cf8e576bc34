"""The five kinds of part of a pruner: guides, scorers, keepers, selectors, reducers. They import core/ and no host."""

from .adaptive import Distortion, Threshold
from .adding_reducers import Add
from .assigning_selectors import Components, Dominant
from .block_spec import BlockSpec
from .distinct import Distinct, DistinctAttention, DistinctMadtp
from .diverse_selectors import Deduplicate, Dpp, MaxMin, Pivots, UnlikeImportant
from .grid import with_grid
from .grid_selectors import Anchors, Pool
from .guides import AlignmentGuide, Codebook, Guidance
from .keepers import All, Count, Counts, KeepRatioPredictor, Knob, Outliers, RandomRatio, Ratio, Remove
from .matching_selectors import Bipartite, Energy, Graph, MatchingSelector, Window
from .mctf import Mctf
from .merging_reducers import Merge, Tofu
from .pair_scorers import PairDistance, WindowDistance
from .reducers import Drop, Fuse, TokenReducer
from .reduction import Reduction, plan_reduction
from .sampling_selectors import SampleCdf, Uniform, Windows
from .scorers import Alignment, ClsAttention, Equal, Madtp, MeanClsAttention, Random, SelfAttention, TokenScorer
from .selectors import Selection, TokenSelector, Top
from .statistic_scorers import (
    Ats,
    ColumnAttention,
    FlowCut,
    KeyNorm,
    PageRank,
    Remember,
    ValueWeightedAttention,
    WideClsAttention,
)
from .trained_keepers import Above, RisingThreshold, SampledRatio
from .trained_scorers import Halting, Predictor

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
    "Threshold",
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
]
