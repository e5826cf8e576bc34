"""vltprune: prune tokens of vision-language transformers, per instance and per layer, guided by both modalities."""

from . import select
from .checks.check import CheckReport, check_part
from .core.attention import PairBias, attend
from .core.attention_stats import attend_with_stats
from .core.kernels.native import build_kernels
from .core.layout import Layout
from .core.statistics import AttentionStats, Stat
from .core.tokens import PackedTokens
from .cost.calibration import BudgetError, calibrate, measure
from .cost.guide_fit import fit_guide
from .cost.macs import CostMeter, count_macs
from .cost.prune import prune
from .cost.visual_tokens import VisualTokens, visual_tokens
from .deploy.export import ExportedModel, export
from .deploy.finish import Finished, finish
from .deploy.freeze import FixedCounts, freeze
from .deploy.graph import ExportError
from .evaluation.ablation import Ablation, ablate
from .hosts.resized import resized
from .io.checkpoint import CheckpointError, Recipe, UnknownHostWarning, save
from .io.hub import from_pretrained, load, push_to_hub
from .io.preprocessing import Preprocessing, transforms
from .layers import (
    AlignmentGuide,
    BlockSpec,
    FixedKeeper,
    Guidance,
    KeepRatioPredictor,
    Knob,
    Reduction,
    Selection,
    TokenReducer,
    TokenScorer,
    TokenSelector,
    plan_reduction,
    query,
)
from .models.catalog import list_models, list_pretrained
from .models.factory import create_model
from .parts import guide, keep, reduce, score, selector
from .parts.typed import typed_part
from .pruning import losses
from .pruning.config import PruneConfig
from .pruning.encoder import PrunedEncoder, Pruning
from .pruning.model import PrunedModel, is_pruned
from .pruning.part import Part
from .pruning.presets import preset
from .pruning.pruner import Pruner, UntrainedGuideWarning
from .pruning.stage import Stage
from .pruning.trace import PruneTrace, collect
from .registry import Registry, backbones, guides, hosts, keepers, presets, reducers, scorers, selectors
from .utils.wrappers import unwrapped

__version__ = "0.1.0"

__all__ = [
    "Ablation",
    "AlignmentGuide",
    "AttentionStats",
    "BudgetError",
    "CheckReport",
    "CheckpointError",
    "CostMeter",
    "ExportError",
    "ExportedModel",
    "Finished",
    "FixedCounts",
    "FixedKeeper",
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
    "PrunedModel",
    "Pruner",
    "Pruning",
    "Recipe",
    "Reduction",
    "Selection",
    "TokenSelector",
    "Registry",
    "BlockSpec",
    "Stage",
    "Stat",
    "TokenReducer",
    "TokenScorer",
    "UnknownHostWarning",
    "UntrainedGuideWarning",
    "VisualTokens",
    "ablate",
    "attend",
    "attend_with_stats",
    "backbones",
    "build_kernels",
    "calibrate",
    "check_part",
    "collect",
    "count_macs",
    "create_model",
    "export",
    "finish",
    "fit_guide",
    "freeze",
    "from_pretrained",
    "guide",
    "guides",
    "hosts",
    "is_pruned",
    "keep",
    "keepers",
    "list_models",
    "list_pretrained",
    "load",
    "losses",
    "measure",
    "preset",
    "presets",
    "prune",
    "plan_reduction",
    "push_to_hub",
    "query",
    "reduce",
    "reducers",
    "resized",
    "selectors",
    "save",
    "score",
    "selector",
    "scorers",
    "select",
    "transforms",
    "typed_part",
    "unwrapped",
    "visual_tokens",
]
