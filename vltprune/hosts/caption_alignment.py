"""Alignment of images with captions: what the guide's anchors gather from a caption while a dense decoder reads it.

MADTP's guide (arXiv 2403.02991) aligns the image with the tokens of the text tower's blocks. Captioning has no text tower, and
its reference leaves the alignment out; here the decoder's blocks take that place. Nothing is pruned by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.tokens import PackedTokens
from ..layers import AlignmentGuide
from ..models.decoder import DecoderCache, MedDecoder
from ..pruning.decode_stats import DecodeStats
from ..pruning.trace import active_collectors, report_decode_stats

# inputs of the blocks of the decoder that runs in this thread, so far; None where nobody asks
_inputs: ContextVar[list[Tensor] | None] = ContextVar("decoder_block_inputs", default=None)


class CaptionAlignment:
    """Hooks on a copy of a `MedDecoder` that report what the anchors gather from the captions it is trained on.

    Block inputs are kept for one call and its thread alone: a call that fails leaves nothing behind.

    Args:
        decoder: The copy to hook.
        guide: The guide whose anchors gather.
    """

    def __init__(self, decoder: MedDecoder, guide: AlignmentGuide):
        self.guide = guide
        decoder.register_forward_pre_hook(self._begin)
        for layer in decoder.body.layers:
            layer.attention.query.register_forward_pre_hook(self._record)
        decoder.register_forward_hook(self._report, with_kwargs=True, always_call=True)

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        _inputs.set([] if torch.is_grad_enabled() and active_collectors() else None)

    def _record(self, query: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = _inputs.get()
        if inputs is not None:
            inputs.append(args[0])

    def _report(self, decoder: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: object) -> None:
        """After decoder(input_ids, cache, attention_mask) returned `out`, None if it failed."""
        inputs = _inputs.get()
        _inputs.set(None)
        if out is None or not inputs:
            return
        input_ids, cache, *mask = (*args, *named.values())
        if _continues(cache):
            return
        report_decode_stats(DecodeStats(gathered=partial(self._gather, inputs, input_ids, mask[0] if mask else None)))

    def _gather(self, inputs: Sequence[Tensor], input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """[captions, anchors, anchor dim], summed over the blocks' inputs, [captions, n, width] each."""
        valid = None if mask is None else mask.bool()
        packed = (PackedTokens.pack(x, valid, protected=1, summary=True) for x in inputs)
        return torch.stack([self.guide(tokens, "text").pooled for tokens in packed]).sum(0)


def _continues(cache: DecoderCache) -> bool:
    """Whether the call continues sentences, and so does not see them whole."""
    return cache.length > 0
