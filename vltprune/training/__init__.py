"""Compression: trains a pruned model to given costs, in runs that can be stopped and resumed. Needs the extra `train`."""

from .compression import Compressed, compress
from .config import RECIPES, CompressConfig, Recipe
from .controller import Controller, target
from .engine import BadLossError, Run
from .objectives import Loss, Objective
from .stopping import Stopped
from .student import Extra, Student

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
