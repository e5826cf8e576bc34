"""MAG for captioning: what the shared anchors gather from a caption while a dense decoder reads it.

MADTP (arXiv 2403.02991) aligns the image with what the text tower's blocks read. Captioning has no text tower, and its
reference leaves the alignment out; here the decoder's blocks take its place. Nothing is pruned by it.
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
from ..pruning.decode_stats import DecodeStats
from ..pruning.trace import active_collectors, report_decode_stats

# what the blocks of the decoder that runs in this thread were given so far; None where nobody asks
_heard: ContextVar[list[Tensor] | None] = ContextVar("heard", default=None)


class Listener:
    """Watches one copy of a `MedDecoder`. Each call that training makes on whole captions is told to the collectors.

    What it hears in a call is kept for that call alone, and for its thread: a call that fails leaves nothing behind.
    """

    def __init__(self, decoder: Any, guide: AlignmentGuide):
        self.guide = guide
        decoder.register_forward_pre_hook(self._begin)
        for layer in decoder.body.layers:
            layer.attention.query.register_forward_pre_hook(self._hear)
        decoder.register_forward_hook(self._tell, with_kwargs=True, always_call=True)

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        _heard.set([] if torch.is_grad_enabled() and active_collectors() else None)

    def _hear(self, query: nn.Module, args: tuple[Tensor, ...]) -> None:
        heard = _heard.get()
        if heard is not None:
            heard.append(args[0])

    def _tell(self, decoder: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        """decoder(input_ids, cache, attention_mask) returned `out`, or failed, which gives None: told is the sum over its
        blocks of what the anchors gather, for whoever asks."""
        heard = _heard.get()
        _heard.set(None)
        if out is None or not heard:
            return
        input_ids, cache, *mask = (*args, *named.values())
        if cache.length:
            return  # words that go on from others
        report_decode_stats(DecodeStats(gathered=partial(self._gathered, heard, input_ids, mask[0] if mask else None)))

    def _gathered(self, heard: Sequence[Tensor], input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """[captions, anchors, anchor dim], from the inputs of the blocks."""
        valid = None if mask is None else mask.bool()
        first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
        packed = (PackedTokens.pack(x, valid, protected=first, summary=first) for x in heard)
        return torch.stack([self.guide(tokens, "text").pooled for tokens in packed]).sum(0)
