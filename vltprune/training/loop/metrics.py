"""Training metrics of one step: means over its pieces and over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...core import precision

KEPT, SAVED = "kept ", "saved "  # what the names of a tower's metrics begin with
_MACS = "macs "


def reduce_metrics(pieces: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> dict[str, Any]:
    """Means of a step's metrics over its pieces and over all processes.

    Args:
        pieces: what `TrainModule` returns for each piece, without the loss.
        accelerator: Accelerate's.

    Returns:
        Plain numbers by name. Where MACs were measured, `saved` is the saved share of the dense MACs, and `saved image` that
        of the image tower's own. `kept image` is the image tower's tokens at the input and behind each layer.
    """
    means: dict[str, Tensor] = {}
    for name in pieces[0]:
        if name not in ("kept", "towers"):
            means[name] = _mean([piece[name] for piece in pieces])
    for tower in pieces[0].get("kept", ()):
        means[KEPT + tower] = torch.stack([piece["kept"][tower] for piece in pieces]).mean(0)
        means[_MACS + tower] = torch.stack([piece["towers"][tower] for piece in pieces]).mean(0)
    if accelerator.num_processes > 1:
        means = accelerator.reduce(means, "mean")
    metrics: dict[str, Any] = {name: value.tolist() for name, value in means.items()}
    if "macs" in metrics:
        metrics["saved"] = 1 - metrics["macs"] / metrics["dense_macs"]
    for name in [name for name in metrics if name.startswith(_MACS)]:
        macs, dense = metrics.pop(name)
        metrics[SAVED + name.removeprefix(_MACS)] = 1 - macs / dense
    return metrics


def tower_metrics(name: str, value: float | Mapping[str, float]) -> dict[str, float]:
    """A metric by its name; one of each tower by the name and the tower's.

    Args:
        name: of the metric.
        value: one for all towers, or one for each.

    Returns:
        Numbers by name, such as "knob image".
    """
    return {f"{name} {tower}": one for tower, one in value.items()} if isinstance(value, Mapping) else {name: value}


def _mean(values: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(values))
    return stacked.to(precision.widest_float(stacked.device)).mean(0)
