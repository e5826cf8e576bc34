"""Work of decoding: evaluation generates answers, while training is given them, which is cheaper."""

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
class DecodeWork:
    """The work of a decoder that generated answers for so many instances: sums, as in `DecodeStats`.

    Args:
        instances: how many instances answers were generated for.
        tokens, words, pairs, memories: as of `DecodeStats`, padding included.
    """

    instances: int
    tokens: int
    words: int
    pairs: int
    memories: int

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, batches: Iterable[Callable[[nn.Module], Any]]) -> DecodeWork | None:
        """Measures what a pruned model generates.

        Args:
            model: the pruned model.
            batches: as `calibration_batches` makes them.

        Returns:
            None for a model without a decoder, and for a language model that reads visual tokens.
        """
        pieces, instances = [], 0
        for batch in batches:
            with evaluating(model), collect(threads=False) as traces:
                batch(model)
            decoding = [trace for trace in traces if trace.decode_stats]
            # what a language model reads depends on what is pruned: each step measures it anew
            if not decoding or any(piece.visual for trace in decoding for piece in trace.decode_stats):
                return None
            pieces += [piece for trace in decoding for piece in trace.decode_stats]
            instances += sum(trace.input_tokens.layout.batch for trace in decoding)
        sums = {
            name: sum(getattr(piece, name) for piece in pieces) for name in ("tokens", "words", "pairs", "memories")
        }
        return cls(instances, **sums) if instances else None  # none of the records may have opened

    def replace_in(self, trace: PruneTrace) -> PruneTrace:
        """The trace of a tower as if its decoder, where it has one, had generated an answer for each instance."""
        if not trace.decode_stats:
            return trace
        ratio = trace.input_tokens.layout.batch / self.instances
        tokens, words, pairs, memories = (
            round(ratio * count) for count in (self.tokens, self.words, self.pairs, self.memories)
        )
        return replace(trace, decode_stats=[DecodeStats(tokens, words, pairs, memories)])
