"""The five kinds of part of a pruner: guides, scorers, keepers, selectors, reducers. They import core/ and no host."""

from .adaptive import Distortion, Threshold
from .block_spec import BlockSpec
from .distinct import Distinct, DistinctAttention, DistinctMadtp
from .guides import AlignmentGuide, Codebook, Guidance
from .keepers import Count, KeepRatioPredictor, Knob, RandomRatio, Ratio, Remove
from .reducers import Drop, Fuse, TokenReducer
from .reduction import Reduction, plan_reduction
from .scorers import Alignment, ClsAttention, Equal, Madtp, MeanClsAttention, Random, SelfAttention, TokenScorer
from .selectors import Selection, TokenSelector, Top

__all__ = [
    "AlignmentGuide",
    "Alignment",
    "ClsAttention",
    "Codebook",
    "Count",
    "Distinct",
    "DistinctAttention",
    "DistinctMadtp",
    "Distortion",
    "Drop",
    "Fuse",
    "Equal",
    "Guidance",
    "KeepRatioPredictor",
    "Knob",
    "Madtp",
    "MeanClsAttention",
    "Random",
    "RandomRatio",
    "Ratio",
    "Reduction",
    "Remove",
    "Selection",
    "SelfAttention",
    "BlockSpec",
    "Threshold",
    "TokenReducer",
    "plan_reduction",
    "TokenScorer",
    "TokenSelector",
    "Top",
]
