"""MAG for a model that writes: what the shared anchors gather from a caption while a dense decoder reads it.

MADTP (arXiv 2403.02991) aligns the image with what the text tower's blocks read. Captioning has no text tower, and its
reference leaves the alignment out; here the decoder's blocks take its place. Nothing is pruned by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import AlignmentGuide
from ..tokens import PackedTokens
from ..traces import Decoded, is_collecting, tell_collectors


class Listener:
    """Watches one copy of a `MedDecoder`. Each call that training makes on whole captions is told to the collectors."""

    def __init__(self, decoder: Any, guide: AlignmentGuide):
        self.guide = guide
        self.heard: list[Tensor] = []  # the inputs of the blocks, within one call
        for layer in decoder.body.layers:
            layer.attention.query.register_forward_pre_hook(self._hear)
        decoder.register_forward_hook(self._tell, with_kwargs=True)

    def _hear(self, query: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and is_collecting():
            self.heard.append(args[0])

    def _tell(self, decoder: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        """decoder(input_ids, cache, attention_mask) returned: the sum over its blocks of what the anchors gathered."""
        heard, self.heard = self.heard, []
        input_ids, cache, *mask = (*args, *named.values())
        if not heard or cache.length:
            return  # not training, or words that go on from others
        valid = mask[0].bool() if mask and mask[0] is not None else None
        first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
        packed = (PackedTokens.pack(x, valid, protected=first, summary=first) for x in heard)
        tell_collectors(Decoded(gathered=torch.stack([self.guide(tokens, "text").pooled for tokens in packed]).sum(0)))
