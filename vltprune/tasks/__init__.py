"""The tasks that models are evaluated on, by name in the registry `tasks`; each says what a model must be able to do."""

from ..registry import tasks
from .base import Task
from .nlvr import Nlvr
from .retrieval import Retrieval, rerank

__all__ = ["Nlvr", "Retrieval", "Task", "rerank", "tasks"]
