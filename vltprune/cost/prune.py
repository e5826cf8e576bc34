"""prune(model, preset, reduction=0.5, data=batches): a pruned model at a cost, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..pruning.config import PruneConfig
from ..pruning.model import PrunedModel
from ..pruning.prune import prune_towers
from .calibration import calibrate
from .guide_fit import fit_guide
from .inputs import Batch


def prune(
    model: nn.Module,
    preset: PruneConfig | str,
    *,
    reduction: float | Mapping[str, float] | None = None,
    data: Iterable[Batch] | None = None,
    **parts: Any,
) -> PrunedModel:
    """A model like `model`, called in the same way and returning the same, whose towers prune their tokens.

    Args:
        model: a tower (timm's VisionTransformer or Eva, open_clip's VisionTransformer, TextTransformer, TimmModel or
            HFTextEncoder, an encoder of transformers, our BlipVision or MedEncoder), or a composite of two (CLIP of open_clip;
            CLIP, SigLIP or BLIP of transformers; our Blip models), whose towers then share one guide. docs/supported.md
            lists them all. It is unchanged, and shares its weights with the result.
        preset: the name of a preset, or a PruneConfig.
        reduction: the share of the dense MACs to save, in (0, 1), or a mapping from tower to a share of its own. An untrained
            guide is placed among tokens of `data` (`fit_guide`), and the budget is set on them (`calibrate`). None leaves both
            as the preset says.
        data: inputs to do so on, as `calibrate` takes them. They are read once, and held.
        **parts: single parts in place of the preset's, as in prune(model, "madtp", reducer="drop", at=(6, 7, 8)).

    Returns:
        The pruned model. It has `.pruning` (config, dense host, guide, towers) and `.host`, the dense model. New parts are in
        training or in evaluation mode as their tower is.

    Raises:
        TypeError: for a model that no host takes apart, and the errors of PruneConfig.
        ValueError: for parts that need what a tower lacks, and for `reduction` without `data` or the reverse.
        BudgetError: for a cost that the keeper cannot reach.
    """
    if reduction is not None and data is None:
        raise ValueError(
            f"reduction={reduction} is set on inputs of the model: give some as data=[images, ...], or prune first and call "
            "vltprune.calibrate(model, batches, reduction) later"
        )
    if data is not None and reduction is None:
        raise ValueError("data= is what a cost is set on: say which, such as reduction=0.5")
    pruned = prune_towers(model, preset, **parts)
    if reduction is None or data is None:
        return pruned
    batches = list(data)
    guide = pruned.pruning.guide
    if guide is not None and guide.is_untrained:
        fit_guide(pruned, batches)
    calibrate(pruned, batches, reduction)
    return pruned
