"""Compression: trains a pruned model to given costs, in runs that can be stopped and resumed. Needs the extra `train`."""

from .compression import Compressed, compress
from .config import RECIPES, CompressConfig, Recipe
from .loop.controller import Controller, target
from .loop.interrupts import Stopped
from .loop.trainer import BadLossError, Run
from .losses.objectives import Loss, Objective
from .losses.train_module import Extra, Student

__all__ = [
    "BadLossError",
    "CompressConfig",
    "Compressed",
    "Controller",
    "Extra",
    "Loss",
    "Objective",
    "RECIPES",
    "Recipe",
    "Run",
    "Stopped",
    "Student",
    "compress",
    "target",
]
