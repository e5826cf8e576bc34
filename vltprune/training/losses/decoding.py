"""Cost of decoding: in evaluation answers are searched for; in training they are given, which is cheaper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...pruning.decode_stats import DecodeStats
from ...pruning.trace import PruneTrace, collect
from ...utils.modes import evaluating


@dataclass(frozen=True)
class Searched:
    """The work of a decoder that answered so many instances: sums, as in `DecodeStats`."""

    instances: int
    tokens: int
    words: int
    pairs: int
    memories: int

    @classmethod
    @torch.no_grad()
    def by(cls, model: nn.Module, calls: Iterable[Callable[[nn.Module], Any]]) -> Searched | None:
        """What a pruned model does in these calls, as `calls_of` makes them; None for one without a decoder."""
        pieces, instances = [], 0
        for call in calls:
            with evaluating(model), collect(threads=False) as traces:
                call(model)
            decoding = [trace for trace in traces if trace.decode_stats]
            if not decoding:
                return None
            pieces += [piece for trace in decoding for piece in trace.decode_stats]
            instances += sum(trace.input_tokens.layout.batch for trace in decoding)
        sums = {
            name: sum(getattr(piece, name) for piece in pieces) for name in ("tokens", "words", "pairs", "memories")
        }
        return cls(instances, **sums) if instances else None  # none of the records may have opened

    def instead(self, trace: PruneTrace) -> PruneTrace:
        """The trace of a tower as if its decoder, where it has one, had searched for each instance."""
        if not trace.decode_stats:
            return trace
        share = trace.input_tokens.layout.batch / self.instances
        tokens, words, pairs, memories = (
            round(share * count) for count in (self.tokens, self.words, self.pairs, self.memories)
        )
        return replace(trace, decode_stats=[DecodeStats(tokens, words, pairs, memories)])
