"""vltprune: prune tokens of vision-language transformers, per instance and per layer, guided by both modalities."""

from . import budget, flops, losses, metrics, text
from .attention import AttentionStats, PairBias, Stat, attend, attend_with_stats
from .budget import BudgetError, calibrate
from .checkpoint import CheckpointError, Recipe, save
from .config import Part, PruneConfig
from .factory import create_model, list_models, list_pretrained
from .hub import from_pretrained, load, push_to_hub
from .layers import AlignmentGuide, Guidance, KeepRatioPredictor, Knob, Reduction, Site, TokenReducer, TokenScorer
from .preprocessing import Preprocessing, transforms
from .presets import preset
from .pruner import PrunedEncoder, Pruner, UntrainedGuideWarning
from .record import Pruning
from .registry import Registry, backbones, guides, hosts, keepers, presets, reducers, scorers
from .surgery import prune
from .tokens import Layout, PackedTokens
from .traces import PruneTrace, collect
from .wrappers import unwrapped

__version__ = "0.1.0"

__all__ = [
    "AlignmentGuide",
    "AttentionStats",
    "BudgetError",
    "CheckpointError",
    "Guidance",
    "KeepRatioPredictor",
    "Knob",
    "Layout",
    "PackedTokens",
    "PairBias",
    "Part",
    "Preprocessing",
    "PruneConfig",
    "PruneTrace",
    "PrunedEncoder",
    "Pruner",
    "Pruning",
    "Recipe",
    "Reduction",
    "Registry",
    "Site",
    "Stat",
    "TokenReducer",
    "TokenScorer",
    "UntrainedGuideWarning",
    "attend",
    "attend_with_stats",
    "backbones",
    "budget",
    "calibrate",
    "collect",
    "create_model",
    "flops",
    "from_pretrained",
    "guides",
    "hosts",
    "keepers",
    "list_models",
    "list_pretrained",
    "load",
    "losses",
    "metrics",
    "preset",
    "presets",
    "prune",
    "push_to_hub",
    "reducers",
    "save",
    "scorers",
    "text",
    "transforms",
    "unwrapped",
]
