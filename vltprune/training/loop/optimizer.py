"""Parameter groups: which parameters are trained, and their learning rates."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

_KEEPERS, _GUIDE = 50.0, 20.0  # how much faster thresholds, and the guide, learn than weights that were trained before


def schedule(step: int, steps: int, warmup: float) -> float:
    """A linear rise over a share of the steps, then a cosine to 0."""
    rise = min((step + 1) / (warmup * steps), 1.0) if warmup > 0 else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def freeze(host: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters of the dense model that are not trained. ValueError for a pattern that is nobody's."""
    for pattern in patterns:
        found = [parameter for name, parameter in host.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not found:
            some = ", ".join(name for name, _ in list(host.named_parameters())[:3])
            raise ValueError(f"freeze: no parameter is called {pattern!r}; they are called {some}, ...")
        for parameter in found:
            parameter.requires_grad_(False)


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups, `times` the rate: matrices decay; vectors, the guide's anchors and thresholds do not."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "times": 1.0},
        {"params": [], "weight_decay": 0.0, "times": 1.0},
        {"params": [], "weight_decay": 0.0, "times": _KEEPERS},
        {"params": [], "weight_decay": 0.0, "times": _GUIDE},
    ]
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            place = 2 if ".keeper." in name else 3 if ".guide." in name else 1 if parameter.ndim < 2 else 0
            groups[place]["params"].append(parameter)
    return [group for group in groups if group["params"]]
