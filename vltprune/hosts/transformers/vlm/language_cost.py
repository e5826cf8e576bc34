"""What a language model computes on prompts, short and whole, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....pruning.decode_stats import DecodeStats
from ....pruning.trace import active_collectors, report_decode_stats
from ....utils.modes import evaluating
from ...base import LanguageCost
from ...linear_maps import measure_macs


def report_prompts(
    short: tuple[Tensor, Tensor],
    whole: tuple[Tensor, Tensor],
    last: bool,
    has_trace: bool,
    expected: Tensor | None = None,
    before: tuple[Sequence[int], Sequence[int]] | None = None,
) -> None:
    """Report to whoever collects what a language model computes, and what it would on the whole prompts.

    Args:
        short: Which places are tokens, and which of those are visual, [batch, length] bool each, of the short prompts.
        whole: The same of the whole ones.
        last: Whether the logits of the last token of each prompt alone are computed.
        has_trace: Whether the language model has a trace of its own for the short prompts, as where its host runs it.
        expected: The expected number of visual tokens in soft training, a scalar; None outside of it.
        before: How many tokens a cache holds of each prompt, and how many it would of the whole ones. None for no cache.
    """
    if not active_collectors():
        return
    stats, dense = (
        _stats(*which, last, None if before is None else before[i]) for i, which in enumerate((short, whole))
    )
    if has_trace:
        dense = replace(dense, tokens=dense.tokens - stats.tokens, pairs=dense.pairs - stats.pairs)
        stats = replace(stats, tokens=0, pairs=0)
    report_decode_stats(replace(stats, dense=dense, expected_visual=expected))


def _stats(is_token: Tensor, is_visual: Tensor, last: bool, before: Sequence[int] | None) -> DecodeStats:
    lengths = is_token.sum(1).tolist()
    visual = (is_visual & is_token).sum(1).tolist()
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    if before is not None:
        pairs += sum(length * held for length, held in zip(lengths, before, strict=True))
    return DecodeStats(tokens, len(lengths) if last else tokens, pairs, visual=tuple(visual))


def measure_language(model: Any, language: nn.Module) -> LanguageCost:
    """Measure what a dense language model costs, by its own calls on one to three tokens.

    Args:
        model: The dense model.
        language: Its language model.

    Returns:
        Its cost per token, per pair of tokens, and per token whose logits are computed.
    """
    weight = model.get_input_embeddings().weight
    blank = torch.zeros(1, 3, weight.shape[1], dtype=weight.dtype, device=weight.device)
    with evaluating(model):
        one, two, three = (
            measure_macs(partial(language, inputs_embeds=blank[:, :number], use_cache=False)) for number in (1, 2, 3)
        )
        word = measure_macs(model.get_output_embeddings(), blank[:, :1])
        with torch.no_grad():
            cache = language(inputs_embeds=blank[:, :1], use_cache=True).cache
    held = sum(values.nbytes for layer in cache.layers for values in (layer.keys, layer.values))
    pair = (three - 2 * two + one) / 2
    return LanguageCost(two - one - 3 * pair, pair, word, held, len(cache.layers))
