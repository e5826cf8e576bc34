"""Visual tokens of a language model: how many enter each of its layers, and what tower, prompt and decoding cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.find import find_composite
from ..pruning.model import get_pruning
from ..pruning.trace import PruneTrace, collect
from ..utils.modes import evaluating
from ..utils.table import table
from .describe import percent, unit_of
from .macs import CostMeter


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens and costs of one call of a pruned vision-language model, beside the dense one. `print` shows a table.

    Attributes:
        layers: visual tokens that enter each layer of the language model, mean over prompts.
        dense: visual tokens of the whole prompts, mean over prompts.
        macs: MACs of the call by part: "tower", the image tower with its pruners and the projector, "prefill", the language
            model on all prompts, and "decode", one more token of each prompt.
        dense_macs: the same of the dense model.
        cache_bytes: bytes of keys and values that the cache holds of all prompts.
        dense_cache_bytes: the same of the dense model.
    """

    layers: tuple[float, ...]
    dense: float
    macs: Mapping[str, float]
    dense_macs: Mapping[str, float]
    cache_bytes: int
    dense_cache_bytes: int

    @property
    def average(self) -> float:
        """Visual tokens at the input of a layer, mean over layers and prompts: what papers mean by "192 tokens"."""
        return sum(self.layers) / len(self.layers)

    def __str__(self) -> str:
        rows = [["", "dense", "pruned", "saved"]]
        entries = {"visual tokens, average of layers": (self.dense, self.average)}
        for name, macs in self.macs.items():
            scale, unit = unit_of(self.dense_macs[name])
            entries[f"{name}, {unit}MACs"] = self.dense_macs[name] / scale, macs / scale
        scale, unit = unit_of(self.dense_cache_bytes)
        entries[f"cache, {unit}bytes"] = self.dense_cache_bytes / scale, self.cache_bytes / scale
        for name, (dense, pruned) in entries.items():
            rows.append([name, f"{dense:.3f}", f"{pruned:.3f}", percent(1 - pruned / dense)])
        return table(rows)


def visual_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> VisualTokens:
    """Counts the visual tokens of a vision-language model on a batch of prompts, and what they cost.

    Args:
        model: a pruned vision-language model with a language model.
        inputs: what its processor makes of images and prompts, on the model's device.

    Returns:
        Tokens and MACs, pruned and dense.

    Raises:
        TypeError: for a model without a language model, and for a dense one.
        ValueError: for inputs without images.
    """
    host = get_pruning(model).host
    composite = find_composite(host)
    language = None if composite is None else composite.language_cost(host)
    if language is None:
        raise TypeError(
            f"a {type(host).__name__} has no language model that reads visual tokens: use vltprune.count_macs"
        )
    with evaluating(model), torch.no_grad(), collect(threads=False) as traces:
        model(**inputs, logits_to_keep=1)
    prompts = next((call for trace in traces for call in trace.decode_stats if call.visual), None)
    if prompts is None or prompts.dense is None:
        raise ValueError("these inputs have no images: give pixel_values, as the model's processor makes them")
    number, dropped = len(prompts.visual), sum(prompts.dense.visual) - sum(prompts.visual)
    trace = next((trace for trace in traces if trace.tower == "language"), None)
    entered = [(prompts.tokens, sum(prompts.visual))] * language.layers if trace is None else _entered(trace)
    whole, mean = entered[0][0] + dropped, sum(tokens for tokens, _ in entered) / len(entered)
    cost, each = CostMeter(model)(traces), language.token + language.word

    def macs(towers: Mapping[str, Tensor], prefill: float, cached: float, rows: int) -> dict[str, float]:
        spent = {tower: float(one.sum()) for tower, one in towers.items()}
        projector = language.row * rows
        prefill += spent.pop("language", 0.0) - projector
        # each new token attends to itself too
        decode = each * number + language.pair * (cached + number)
        return {"tower": sum(spent.values()) + projector, "prefill": prefill, "decode": decode}

    return VisualTokens(
        tuple(visual / number for _, visual in entered),
        sum(prompts.dense.visual) / number,
        macs(cost.towers, cost.decoder_total, mean, sum(prompts.visual)),
        macs(cost.dense, cost.dense_decoder, whole, sum(prompts.dense.visual)),
        round(language.cache_bytes * mean),
        language.cache_bytes * whole,
    )


def _entered(trace: PruneTrace) -> list[tuple[int, int]]:
    """Tokens that entered each layer of a pruned language model, and the visual ones among them, of all prompts."""
    totals = [trace.input_tokens.layout.total, *(layer.layout.total for layer in trace.layers[:-1])]
    texts = (int(torch.as_tensor(text).sum()) for text in trace.text_counts)
    return [(total, total - text) for total, text in zip(totals, texts, strict=True)]
