"""prune(model, preset, reduction=0.5, data=batches): a pruned model at a cost, in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn
from typing_extensions import Unpack

from ..pruning.config import Parts, PruneConfig
from ..pruning.model import PrunedModel
from ..pruning.prune import prune_towers
from ..registry import nearest, presets
from .calibration import calibrate
from .guide_fit import fit_guide
from .inputs import Batch, Inputs, model_inputs
from .macs import CostMeter
from .targets import check_language, check_targets

_CALL = "vltprune.prune(model, 'attention', reduction=0.5, data=[images, ...])"


def prune(
    model: nn.Module,
    preset: PruneConfig | str | None = None,
    *,
    reduction: float | Mapping[str, float] | None = None,
    visual_tokens: float | None = None,
    data: Iterable[Batch] | None = None,
    tolerance: float = 0.01,
    inputs: Inputs = None,
    progress: bool | None = None,
    **parts: Unpack[Parts],
) -> PrunedModel:
    """A model like `model`, called in the same way and returning the same, whose towers prune their tokens.

    Args:
        model: a tower or a composite of two, whose towers then have one guide. Towers are those of timm (VisionTransformer,
            Eva), of open_clip (VisionTransformer, TextTransformer, TimmModel, HFTextEncoder), encoders and ViLT of
            transformers, and our BlipVision and MedEncoder. Composites are CLIP of open_clip, CLIP, SigLIP, BLIP and
            vision-language models with a language model (LLaVA, Qwen-VL) of transformers, and our Blip models.
            docs/supported.md lists them all. The model is unchanged, and shares its weights with the result.
        preset: the name of a preset, or a PruneConfig; required.
        reduction: fraction of the dense MACs to save, in (0, 1), or a mapping from tower to a fraction of its own. An untrained
            guide is placed among tokens of `data` (`fit_guide`), and the budget is set on them (`calibrate`). None leaves both
            as the preset says.
        visual_tokens: in place of `reduction`, for a vision-language model: visual tokens at the input of a layer of the
            language model, mean over layers and prompts.
        data: batches to do so on: a DataLoader or a list, as `calibrate` takes them. They are read once, and held.
        tolerance: of the budget, relative to the MACs or the visual tokens that are to remain.
        inputs: which part of a batch the model takes, as in `calibrate`: inputs=0 for (images, labels).
        progress: whether to show progress bars on stderr; None shows them where stderr is a terminal.
        **parts: single parts in place of the preset's, as in prune(model, "madtp", reducer="drop", at=(6, 7, 8)).

    Returns:
        The pruned model. It has `.pruning` (config, dense host, guide, towers) and `.host`, the dense model. New parts are in
        training or in evaluation mode as their tower is.

    Raises:
        TypeError: for a model that no host runs, for no preset, and the errors of PruneConfig.
        ValueError: for parts that need what a tower lacks, and for a budget without `data` or the reverse.
        BudgetError: for a cost that the keeper cannot reach.
    """
    _check_arguments(preset, {"reduction": reduction, "visual_tokens": visual_tokens}, data, parts)
    pruned = prune_towers(model, cast(PruneConfig | str, preset), **parts)
    if data is None:
        return pruned
    check_targets(pruned, reduction, visual_tokens)
    check_language(CostMeter(pruned), visual_tokens, 0)
    batches = list(model_inputs(data, inputs))
    guide = pruned.pruning.guide
    if guide is not None and guide.is_untrained:
        fit_guide(pruned, batches, progress=progress)
    calibrate(pruned, batches, reduction, tolerance, visual_tokens=visual_tokens, progress=progress)
    return pruned


def _check_arguments(preset: object, targets: Mapping[str, object], data: object, parts: Mapping[str, object]) -> None:
    """TypeError or ValueError, with the call to write, for arguments that are missing or have another name."""
    names = [field.name for field in dataclasses.fields(PruneConfig)]
    for name in parts:
        if name not in names:
            known = [*names, "preset", *targets, "data", "tolerance", "inputs", "progress"]
            hint = "; batches are data=" if name == "batches" else nearest(name, known)
            raise TypeError(f"prune takes no argument {name!r}{hint}: write {_CALL}")
    if preset is None:
        raise TypeError(f"prune needs a preset, one of {', '.join(presets.names())}, or a PruneConfig: write {_CALL}")
    asked = [f"{name}={value}" for name, value in targets.items() if value is not None]
    if asked and data is None:
        raise ValueError(
            f"{asked[0]} is set on inputs of the model: write {_CALL}, or prune first and call "
            f"vltprune.calibrate(model, batches, {asked[0]}) later"
        )
    if data is not None and not asked:
        raise ValueError(f"data= is what a cost is set on: say which, as in {_CALL}")
