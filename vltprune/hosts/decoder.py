"""Decoders behind pruned towers: they stay dense, and hooks note what they compute, so that it can be counted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..pruning.decode_stats import DecodeStats
from ..pruning.trace import report_decode_stats
from .composites import WithTowers
from .graft import sharing, with_submodule
from .linear_maps import linear_macs


class WithDecoder(WithTowers):
    """Towers, and a decoder that looks at what the last of them left. `decoder`: what it is called in the model."""

    decoder: ClassVar[str]

    @abstractmethod
    def body(self, decoder: Any) -> nn.Module:
        """What holds the layers, and no linear map but theirs."""

    @abstractmethod
    def crosses(self, decoder: Any) -> Sequence[Any]:
        """The cross-attentions, layer by layer, each with its linear maps `query`, `key` and `value`."""

    @abstractmethod
    def width(self, cross: Any) -> int:
        """heads * head_dim of a cross-attention."""

    @abstractmethod
    def word_macs(self, decoder: Any) -> float:
        """MACs of the logits of one next token, from what the last layer made of the token before it."""

    @abstractmethod
    def watch(self, decoder: nn.Module) -> None:
        """Have each call of this copy of the decoder told to the collectors."""

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        decoder = sharing(getattr(model, self.decoder))
        self.watch(decoder)
        self.crosses(decoder)[0].key.register_forward_hook(_tell_memories)
        return with_submodule(super().assemble(model, towers), self.decoder, decoder)

    def decoder_macs(self, model: nn.Module, decoded: Iterable[DecodeStats], memory: int) -> float:
        """Attention counts whole: what the causal mask and padding hide is computed all the same."""
        decoder = getattr(model, self.decoder)
        crosses = self.crosses(decoder)
        width = sum(self.width(cross) for cross in crosses)
        keys_values = sum(linear_macs(cross.key) + linear_macs(cross.value) for cross in crosses)
        token, word = linear_macs(self.body(decoder)) - keys_values, self.word_macs(decoder)
        return sum(
            token * call.tokens
            + word * call.words
            + 2 * width * (call.pairs + call.tokens * memory)
            + keys_values * call.memories * memory
            for call in decoded
        )


def _tell_memories(key: nn.Module, args: tuple[Any, ...], keys: Tensor) -> None:
    """After the first layer made the keys [memories, m, width]: the others do as it did."""
    report_decode_stats(DecodeStats(memories=len(keys)))
