"""Attention of one block, run by its host, with the statistics that pruners read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.attention import PairMask, attend
from ..core.attention_stats import attend_with_stats, attention_stats
from ..core.regions import Regions
from ..core.statistics import AttentionStats, Stat
from ..core.tokens import PackedTokens
from ..hosts.base import Host


@dataclass(frozen=True)
class BlockAttention:
    """Attention of one block over the tokens that enter it.

    Attributes:
        host: runs the block.
        tower: the dense tower.
        block: the block.
        tokens: the tokens that enter it.
        block_input: what `host.embed` returned for it.
        regions: within what the tokens attend to each other. None for whole instances.
        text: the text in the tower's space, [batch, dim], for `Stat.FROM_QUERY`. None without one.
    """

    host: Host
    tower: nn.Module
    block: nn.Module
    tokens: PackedTokens
    block_input: object
    regions: Regions | None
    text: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, needs: Stat | None) -> tuple[Tensor, AttentionStats]:
        """Runs attention.

        Args:
            q, k, v: what `host.qkv` returned.
            needs: the statistics to compute. None for attention alone.

        Returns:
            The context, [total, heads, head_dim]; [total, rows, heads, head_dim] where a token is several rows. And the
            statistics.
        """
        rows, scale = self._rows(), self.host.scale(self.block)
        if needs is None:
            context, stats = attend(q, k, v, rows.layout, scale, **self._options(rows, None)), AttentionStats()
        else:
            context, stats = attend_with_stats(q, k, v, rows, scale, needs, **self._options(rows, needs))
        return context if self.regions is None else self.regions.gather(context), self._per_token(stats)

    def statistics(self, q: Tensor, k: Tensor, v: Tensor, needs: Stat) -> AttentionStats:
        """Computes statistics alone.

        Args:
            q, k, v: what `host.qkv` returned.
            needs: the statistics to compute.
        """
        rows, scale = self._rows(), self.host.scale(self.block)
        return self._per_token(attention_stats(q, k, v, rows, scale, needs, **self._options(rows, needs)))

    def _rows(self) -> PackedTokens:
        return self.tokens if self.regions is None else self.regions.rows_of(self.tokens)

    def _per_token(self, stats: AttentionStats) -> AttentionStats:
        """The statistics of tokens: of one of several rows their mean."""
        regions = self.regions
        return stats if regions is None else stats.mapped(lambda values: regions.gather(values).mean(1))

    def _key_bias(self, rows: PackedTokens) -> Tensor | None:
        """What is added to the logits of each key: for tokens that are there in part, and for rows that none attends to."""
        regions = None if self.regions is None else self.regions.bias
        if regions is None or rows.bias is None:
            return rows.bias if regions is None else regions
        return rows.bias + regions

    def _options(self, rows: PackedTokens, needs: Stat | None) -> dict[str, Any]:
        """What attention is called with besides queries, keys and values."""
        host, block = self.host, self.block
        pairs = host.pair_bias(block, self.tokens, self.block_input)
        causal = host.causal(self.tower) and not isinstance(pairs, PairMask)
        options: dict[str, Any] = {"causal": causal, "dropout": host.attention_dropout(block), "pairs": pairs}
        options |= {"key_bias": self._key_bias(rows), "softcap": host.softcap(block)}
        if needs is not None and Stat.FROM_QUERY in needs and self.text is not None:
            # as a token of its own, by the block's own norm and query projection
            text = PackedTokens.pack(self.text[:, None].to(self.tokens.x.dtype))
            options["text"] = host.qkv(block, text, self.block_input)[0]
        return options
