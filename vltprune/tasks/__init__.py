"""The tasks that models are evaluated on, by name in the registry `tasks`; each says what a model must be able to do."""

from ..registry import tasks
from .base import Options, Task
from .caption import Caption
from .nlvr import Nlvr
from .retrieval import Retrieval, rerank
from .vqa import Vqa

__all__ = ["Caption", "Nlvr", "Options", "Retrieval", "Task", "Vqa", "rerank", "tasks"]
