"""The tasks that models are evaluated on, by name in the registry `tasks`."""

from ...registry import tasks
from .base import Explains, Options, Publishes, Round, Task
from .caption import Caption
from .matching import Matching, rerank
from .nlvr import Nlvr
from .retrieval import Retrieval
from .vqa import Vqa

__all__ = [
    "Caption",
    "Explains",
    "Matching",
    "Nlvr",
    "Options",
    "Publishes",
    "Retrieval",
    "Round",
    "Task",
    "Vqa",
    "rerank",
    "tasks",
]
