"""DecodeStats: what a decoder did behind a pruned tower, for traces and for counting its MACs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DecodeStats:
    """A piece of a decoder's work, summed over its rows (sentences, or beams of them), padding included.

    Attributes:
        tokens: new tokens that went through the layers.
        words: those of them whose next token's logits were computed.
        pairs: pairs of a new token and a token of its own row, itself and later ones included, that attention multiplied.
        memories: tokens of the memory whose keys and values were computed.
        dense: the same behind dense towers, for a language model whose prompt pruning shortens. None where it is the same.
        visual: the visual tokens among `tokens`, of each prompt of a language model.
        expected_visual: the expected number of these in soft training, a scalar with the gradients of the cost. None elsewhere.
        gathered: gives what the guide's anchors gathered from captions, [captions, anchors, anchor dim], in training.
    """

    tokens: int = 0
    words: int = 0
    pairs: int = 0
    memories: int = 0
    dense: DecodeStats | None = None
    visual: tuple[int, ...] = ()
    expected_visual: Tensor | None = None
    gathered: Callable[[], Tensor] | None = None

    @property
    def rows(self) -> int | Tensor:
        """How many visual tokens went through, in soft training the expected number."""
        return sum(self.visual) if self.expected_visual is None else self.expected_visual
