"""Evaluation tasks, by name in the registry `tasks`: NLVR, retrieval, VQA and captioning."""

from ...registry import tasks
from .base import EvaluationStage, Options, SupportsSubmission, SupportsUnscored, Task
from .caption import Caption
from .matching import Matching, rerank
from .nlvr import Nlvr
from .retrieval import Retrieval
from .vqa import Vqa

__all__ = [
    "Caption",
    "EvaluationStage",
    "Matching",
    "Nlvr",
    "Options",
    "Retrieval",
    "SupportsSubmission",
    "SupportsUnscored",
    "Task",
    "Vqa",
    "rerank",
    "tasks",
]
