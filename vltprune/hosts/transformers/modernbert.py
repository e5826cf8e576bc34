"""Host of ModernBERT of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertAttention,
    ModernBertEncoderLayer,
    ModernBertModel,
    apply_rotary_pos_emb,
)

from ...core.attention import PairBias
from ...core.checks import check_ids
from ...core.tokens import PackedTokens
from ...registry import hosts
from .base import PreNormHost, TextHost


class BlockInput(NamedTuple):
    """Rotary tables and attention window of the blocks of one kind, global or local.

    Attributes:
        tables: Cosine and sine by position, [2, sentences, length, head_dim]; sentences is 1 where all have the same.
        within: Hides tokens outside the window, as `PairBias.distance_bias`; None for no window.
    """

    tables: Tensor
    within: Callable[[Tensor], Tensor] | None


@hosts.register("transformers.models.modernbert.modeling_modernbert.ModernBertModel")
class ModernBertHost(PreNormHost, TextHost):
    """Host of ModernBERT, whose rotary tables are indexed by original positions, and whose local blocks attend to a window.

    The window is of original positions: a token attends no farther where those between were pruned.
    """

    layers = "layers"
    attention = "attn"
    dropout = "attention_dropout"
    norms = ("attn_norm", "mlp_norm")
    output = "Wo"
    known: ClassVar = {ModernBertEncoderLayer: (ModernBertAttention,)}

    def embed(
        self,
        tower: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[PackedTokens, tuple[BlockInput, ...]]:
        check_ids(input_ids, tower.config.vocab_size, longest=None)
        if isinstance(attention_mask, dict):
            raise TypeError(
                "a pruned ModernBertModel takes one attention_mask [batch, length], not one for each kind of block"
            )
        x = tower.embeddings(input_ids)
        tokens = self.pack(x, attention_mask, self.summary_position(tower, input_ids))

        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        kinds = {kind: self.block_input(tower, kind, x, position_ids) for kind in set(tower.config.layer_types)}
        return tokens, tuple(kinds[block.attention_type] for block in self.blocks(tower))

    def block_input(self, tower: ModernBertModel, kind: str, x: Tensor, position_ids: Tensor) -> BlockInput:
        """Compute the block input that all blocks of one kind have.

        Args:
            tower: The dense tower.
            kind: "full_attention" for global blocks or "sliding_attention" for local ones.
            x: Embeddings [batch, length, dim], for the length and dtype of the tables.
            position_ids: [1 or batch, length] int64.

        Returns:
            Rotary tables and window; no window where it would hide nothing.
        """
        tables, window = torch.stack(tower.rotary_emb(x, position_ids, kind)), tower.config.sliding_window
        is_global = kind == "full_attention" or window >= x.shape[1] - 1
        return BlockInput(tables, None if is_global else window_bias(window))

    def qkv(
        self, block: ModernBertEncoderLayer, tokens: PackedTokens, block_input: BlockInput
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        q, k, v = attn.Wqkv(block.attn_norm(tokens.x)).unflatten(-1, (3, -1, attn.head_dim)).unbind(1)
        _, sentences, length, _ = block_input.tables.shape
        row = tokens.position if sentences == 1 else tokens.position + length * tokens.layout.instance
        cos, sin = block_input.tables.flatten(1, 2).index_select(1, row)
        return *apply_rotary_pos_emb(q, k, cos, sin), v

    def scale(self, block: ModernBertEncoderLayer) -> float:
        return block.attn.head_dim**-0.5

    def pair_bias(
        self, block: ModernBertEncoderLayer, tokens: PackedTokens, block_input: BlockInput
    ) -> PairBias | None:
        return None if block_input.within is None else PairBias(tokens.position, block_input.within)

    def branch(self, block: ModernBertEncoderLayer, index: int, x: Tensor, tokens: PackedTokens) -> Tensor:
        return block.attn.out_drop(x) if index == 0 else x

    def head(self, tower: ModernBertModel, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=tokens.with_x(tower.final_norm(tokens.x)).unpack()[0])


def window_bias(reach: int) -> Callable[[Tensor], Tensor]:
    """A distance bias that hides keys outside a window.

    Args:
        reach: The largest distance that is seen.

    Returns:
        `PairBias.distance_bias`: nothing up to `reach`, minus infinity beyond.
    """

    def bias(distance: Tensor) -> Tensor:
        hidden = torch.zeros(distance.shape, device=distance.device)
        return hidden.masked_fill_(distance.abs() > reach, float("-inf")).unsqueeze(-3)

    return bias
