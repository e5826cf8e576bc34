"""The JSON file beside an exported model: its inputs and outputs, how images are preprocessed, and what classes are called."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from ..io.preprocessing import transforms
from ..io.recipe import original_recipe
from ..pruning.model import dense_model, find_pruning
from .graph import Value


def describe(
    model: nn.Module, format: str, inputs: Sequence[Value], outputs: Sequence[Value], difference: float
) -> dict[str, Any]:
    """What a program needs to know to serve an exported model, as plain data that JSON can hold.

    Args:
        model: the model that was exported, dense or pruned.
        format: the format's name.
        inputs: the inputs of the graph.
        outputs: its outputs.
        difference: the largest difference that the check found.

    Returns:
        A dict with the keys "format", "backbone", "pruning", "inputs", "outputs", "preprocessing", "labels" and
        "largest_difference". The value is None for what the model does not know.
    """
    record = find_pruning(model)
    return {
        "format": format,
        "backbone": original_recipe(dense_model(model)).backbone or None,
        "pruning": None if record is None else record.config.to_dict(),
        "inputs": [asdict(value) for value in inputs],
        "outputs": [asdict(value) for value in outputs],
        "preprocessing": _preprocessing(model),
        "labels": labels(model),
        "largest_difference": difference,
    }


def _preprocessing(model: nn.Module) -> dict[str, Any] | None:
    """How images become pixels, in the names of the model's library; None for a model that does not say."""
    host: Any = dense_model(model)
    try:
        return dict(transforms(host).config)
    except TypeError:
        return None


def labels(model: nn.Module) -> list[str] | None:
    """The names of a classifier's classes, by index.

    Args:
        model: a dense or pruned model.

    Returns:
        The names, as transformers and timm know them; None for a model that has none.
    """
    host: Any = dense_model(model)
    config = getattr(host, "config", None)
    names = getattr(config, "id2label", None)
    if isinstance(names, dict) and len(names) == getattr(getattr(host, "classifier", None), "out_features", None):
        return [str(names[index]) for index in sorted(names)]
    if getattr(host, "num_classes", 0) and getattr(host, "pretrained_cfg", None):
        return _labels_of_timm(host)
    return None


def _labels_of_timm(host: Any) -> list[str] | None:
    facts = dict(host.pretrained_cfg)
    if facts.get("num_classes") != host.num_classes:
        return None
    if facts.get("label_names"):
        return [*facts["label_names"]]
    data: Any = importlib.import_module("timm.data")
    subset = data.infer_imagenet_subset(facts)
    if subset is None:
        return None
    info = data.ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(host.num_classes)]
