"""Composites with a text decoder behind the towers: it stays dense, and hooks record what it computes, for MACs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..pruning.decode_stats import DecodeStats
from ..pruning.trace import report_decode_stats
from .composites import WithTowers
from .graft import copy_modules, with_submodule
from .linear_maps import linear_macs


class WithDecoder(WithTowers):
    """A composite with a decoder that cross-attends to the output of the last tower.

    Attributes:
        decoder: Name of the decoder in the model.
    """

    decoder: ClassVar[str]

    @abstractmethod
    def body(self, decoder: Any) -> nn.Module:
        """The part of the decoder that has its layers, and no other linear maps."""

    @abstractmethod
    def cross_attentions(self, decoder: Any) -> Sequence[Any]:
        """The cross-attention of each layer, with the linear maps `query`, `key` and `value`."""

    @abstractmethod
    def cross_width(self, cross: Any) -> int:
        """heads * head_dim of a cross-attention."""

    @abstractmethod
    def lm_head_macs(self, decoder: Any) -> float:
        """MACs of the logits of one next token, from the last layer's output."""

    @abstractmethod
    def add_hooks(self, decoder: nn.Module) -> None:
        """Hook a copy of the decoder, so that each call reports its `DecodeStats`."""

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        decoder = copy_modules(model.get_submodule(self.decoder))
        self.add_hooks(decoder)
        self.cross_attentions(decoder)[0].key.register_forward_hook(_record_memories)
        return with_submodule(super().assemble(model, towers), self.decoder, decoder)

    def decoder_macs(self, model: nn.Module, decoded: Iterable[DecodeStats], memory: int) -> float:
        decoder = model.get_submodule(self.decoder)
        crosses = self.cross_attentions(decoder)
        width = sum(self.cross_width(cross) for cross in crosses)
        keys_values = sum(linear_macs(cross.key) + linear_macs(cross.value) for cross in crosses)
        per_token = linear_macs(self.body(decoder)) - keys_values
        per_word = self.lm_head_macs(decoder)
        return sum(
            per_token * call.tokens
            + per_word * call.words
            + 2 * width * (call.pairs + call.tokens * memory)
            + keys_values * call.memories * memory
            for call in decoded
        )


def _record_memories(key: nn.Module, args: tuple[Any, ...], keys: Tensor) -> None:
    """Hook of the first layer's keys [memories, m, width]: the other layers have as many."""
    report_decode_stats(DecodeStats(memories=len(keys)))
