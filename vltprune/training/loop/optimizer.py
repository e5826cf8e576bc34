"""Optimizer: which parameters are trained, their learning rates, and gradient clipping."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

# how much faster thresholds, and the guide and networks of scorers, learn than weights that were trained before
_KEEPER_LR, _NEW_LR = 50.0, 20.0


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """Learning rate of a step as a share of the highest: a linear rise, times a cosine that falls to 0.

    Args:
        step: of the run.
        steps: of the whole run.
        warmup: share of the steps over which it rises.

    Returns:
        The share, 0 .. 1.
    """
    rise = min((step + 1) / (warmup * steps), 1.0) if warmup > 0 else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of each parameter group to its multiple of `lr`.

    Args:
        optimizer: with the groups of `parameter_groups`.
        lr: learning rate of the weights that were trained before; thresholds and guide have more.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr_multiple"] * lr


def freeze(host: nn.Module, patterns: Sequence[str]) -> None:
    """Excludes parameters of the dense model from training.

    Args:
        host: the dense model.
        patterns: shell patterns of names of its parameters, such as "text.*".

    Raises:
        ValueError: a pattern fits no parameter.
    """
    for pattern in patterns:
        found = [parameter for name, parameter in host.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not found:
            some = ", ".join(name for name, _ in list(host.named_parameters())[:3])
            raise ValueError(f"freeze: no parameter's name matches {pattern!r}: names are {some}, ...")
        for parameter in found:
            parameter.requires_grad_(False)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups, each with its multiple of the learning rate, `lr_multiple`.

    Matrices decay. Vectors, the guide, networks of scorers, and thresholds do not.

    Args:
        module: whose parameters are taken, without those that are frozen.
        weight_decay: of the matrices.

    Returns:
        The groups that have parameters, at most four: matrices, vectors, keepers, the guide and scorers.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "lr_multiple": 1.0},
        {"params": [], "weight_decay": 0.0, "lr_multiple": 1.0},
        {"params": [], "weight_decay": 0.0, "lr_multiple": _KEEPER_LR},
        {"params": [], "weight_decay": 0.0, "lr_multiple": _NEW_LR},
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_new = ".guide." in name or ".scorer." in name
            group = 2 if ".keeper." in name else 3 if is_new else 1 if parameter.ndim < 2 else 0
            groups[group]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def clip_gradients(optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float) -> bool:
    """Clips the gradients of the weights, and says whether all gradients are finite.

    What thresholds and guide get from the budget is not clipped, nor may it shrink what the weights learn.

    Args:
        optimizer: with the groups of `parameter_groups`.
        accelerator: Accelerate's.
        max_norm: norm that gradients are clipped to.

    Returns:
        Whether all are finite; True under a gradient scaler, which finds its scale by those that are not.
    """
    groups = optimizer.param_groups
    weights = [p for group in groups for p in group["params"] if group["lr_multiple"] == 1.0]
    norm: Any = accelerator.clip_grad_norm_(weights, max_norm)
    others = [p.grad for group in groups for p in group["params"] if group["lr_multiple"] != 1.0 and p.grad is not None]
    if accelerator.scaler is not None:  # gradients that are not finite are how it finds its scale
        return True
    return math.isfinite(norm) and all(bool(torch.isfinite(gradient).all()) for gradient in others)
