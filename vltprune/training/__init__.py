"""Compression: trains a pruned model to given costs, in runs that can be stopped and resumed. Needs the extra `train`."""

from .compression import compress
from .config import RECIPES, CompressConfig, Recipe
from .final_evaluation import CompressResult
from .loop.controller import Controller, target
from .loop.interrupts import Stopped
from .loop.trainer import BadLossError, Trainer
from .losses.objectives import Loss, Objective
from .losses.train_module import DistillWeights, ExtraLoss, TrainModule

__all__ = [
    "BadLossError",
    "CompressConfig",
    "CompressResult",
    "Controller",
    "DistillWeights",
    "ExtraLoss",
    "Loss",
    "Objective",
    "RECIPES",
    "Recipe",
    "Stopped",
    "TrainModule",
    "Trainer",
    "compress",
    "target",
]
