"""The four kinds of part of a pruner: guides, scorers, keepers, reducers. They import core/ and no host."""

from .adaptive import Distortion, Threshold
from .block_spec import BlockSpec
from .distinct import Distinct, DistinctAttention, DistinctMadtp
from .guides import AlignmentGuide, Codebook, Guidance
from .keepers import Count, KeepRatioPredictor, Knob, RandomRatio, Ratio
from .reducers import Drop, Fuse, Reduction, TokenReducer
from .scorers import Alignment, ClsAttention, Madtp, MeanClsAttention, Random, SelfAttention, TokenScorer

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
    "Guidance",
    "KeepRatioPredictor",
    "Knob",
    "Madtp",
    "MeanClsAttention",
    "Random",
    "RandomRatio",
    "Ratio",
    "Reduction",
    "SelfAttention",
    "BlockSpec",
    "Threshold",
    "TokenReducer",
    "TokenScorer",
]
