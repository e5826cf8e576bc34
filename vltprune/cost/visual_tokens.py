"""Visual tokens of a language model: how many enter each of its layers, and what tower, prompt and decoding cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class PromptCounts:
    """Tokens of the prompts that a language model read in one call, of all prompts together.

    Attributes:
        prompts: how many prompts there were.
        layers: visual tokens that entered each layer.
        lengths: all tokens that entered each layer.
        visual: visual tokens of the prompts as pruned, before the first layer.
        dense: visual tokens of the whole prompts.
        dense_length: all tokens of the whole prompts.
    """

    prompts: int
    layers: tuple[int, ...]
    lengths: tuple[int, ...]
    visual: int
    dense: int
    dense_length: int

    @property
    def average(self) -> float:
        """Visual tokens that entered a layer, mean over layers."""
        return sum(self.layers) / len(self.layers)

    @property
    def cached(self) -> float:
        """Tokens that the cache holds, mean over layers."""
        return sum(self.lengths) / len(self.lengths)

    @classmethod
    def from_traces(cls, traces: Sequence[PruneTrace], layers: int) -> PromptCounts | None:
        """Counts the tokens of a call.

        Args:
            traces: of the call.
            layers: how many layers the language model has.

        Returns:
            The counts; None for a call without images.
        """
        call = next((call for trace in traces for call in trace.decode_stats if call.visual), None)
        if call is None or call.dense is None:
            return None
        trace = next((trace for trace in traces if trace.tower == "language"), None)
        entered = [(call.tokens, sum(call.visual))] * layers if trace is None else _entered(trace)
        visual, dense = sum(call.visual), sum(call.dense.visual)
        lengths, of_layers = tuple(length for length, _ in entered), tuple(number for _, number in entered)
        read = call.tokens if trace is None else trace.input_tokens.layout.total
        return cls(len(call.visual), of_layers, lengths, visual, dense, read + dense - visual)


def visual_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> VisualTokens:
    """Counts the visual tokens of a vision-language model on a batch of prompts, and what they cost.

    Args:
        model: a pruned vision-language model with a language model.
        inputs: what its processor makes of images and prompts, on the model's device. Labels are left out.

    Returns:
        Tokens and MACs, pruned and dense.

    Raises:
        TypeError: for a model without a language model, and for a dense one.
        ValueError: for inputs without images.
    """
    host = get_pruning(model).host
    meter = CostMeter(model)
    language = meter.language
    if language is None:
        raise TypeError(
            f"a {type(host).__name__} has no language model that reads visual tokens: use vltprune.count_macs"
        )
    with evaluating(model), torch.no_grad(), collect(threads=False) as traces:
        # a loss would need the logits of all tokens
        model(**{name: value for name, value in inputs.items() if name != "labels"}, logits_to_keep=1)
    counts = PromptCounts.from_traces(traces, language.layers)
    if counts is None:
        raise ValueError("these inputs have no images: give pixel_values, as the model's processor makes them")
    cost = meter(traces)

    def macs(towers: Mapping[str, Tensor], prefill: float, cached: float, rows: int) -> dict[str, float]:
        spent = {tower: float(one.sum()) for tower, one in towers.items()}
        projector = language.row * rows
        prefill += spent.pop("language", 0.0) - projector
        decode = language.decode(counts.prompts, cached)
        return {"tower": sum(spent.values()) + projector, "prefill": prefill, "decode": decode}

    return VisualTokens(
        tuple(number / counts.prompts for number in counts.layers),
        counts.dense / counts.prompts,
        macs(cost.towers, cost.decoder_total, counts.cached, counts.visual),
        macs(cost.dense, cost.dense_decoder, counts.dense_length, counts.dense),
        round(language.cache_bytes * counts.cached),
        language.cache_bytes * counts.dense_length,
    )


def _entered(trace: PruneTrace) -> list[tuple[int, int]]:
    """Tokens that entered each layer of a pruned language model, and the visual ones among them, of all prompts."""
    totals = [layout.total for layout in trace.entered]
    texts = (int(torch.as_tensor(text).sum()) for text in trace.text_counts)
    return [(total, total - text) for total, text in zip(totals, texts, strict=True)]
