"""Models of a run: the dense model, its teacher, and the pruned model as it was trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models.resolve import resolve_model
from ..pruning.model import is_pruned
from ..pruning.prune import prune_towers
from .config import CompressConfig
from .loop.trainer import Trainer
from .losses.saliency import saliency_teacher


def load_dense_model(config: CompressConfig) -> nn.Module:
    """The dense model of a config, with its weights.

    Raises:
        TypeError: the model is pruned.
    """
    torch.manual_seed(config.seed)  # of weights that are random
    model = resolve_model(config.model, pretrained=config.pretrained, arguments=config.model_args)
    if is_pruned(model):
        raise TypeError(f"model={config.model!r} is pruned already: give its dense model, and this one as start=")
    return model


def build_teacher(dense: nn.Module, student: nn.Module, config: CompressConfig) -> nn.Module:
    """Builds the teacher of a pruned model: its dense model, which records its tokens for distillation.

    Args:
        dense: the dense model, whose weights the teacher shares.
        student: the pruned model; for saliency the teacher records its tokens where this one prunes.
        config: says whether saliency is distilled.

    Returns:
        The teacher, which gives the dense model's answers.
    """
    return saliency_teacher(dense, student) if config.saliency_weight else prune_towers(dense, "random", at=())


def trained_model(trainer: Trainer) -> nn.Module:
    """The model that was trained; where processes held a part of it each, a whole one again, in the first process."""
    if getattr(trainer.accelerator.state, "fsdp_plugin", None) is None:
        module: Any = trainer.accelerator.unwrap_model(trainer.module)
        return module.model
    learned = trainer.accelerator.get_state_dict(trainer.module)  # all processes must ask
    model = prune_towers(load_dense_model(trainer.config), trainer.config.pruning)
    if trainer.accelerator.is_main_process:
        own = {name.removeprefix("model."): value for name, value in learned.items() if name.startswith("model.")}
        model.load_state_dict(own)
    return model.to(trainer.accelerator.device)
