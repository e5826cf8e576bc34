"""Scorers by a text: what the text attends to, and how near a token's embedding is to it."""

from __future__ import annotations

from torch import Tensor

from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import scorers
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from .base import TokenScorer


@scorers.register("query_attention")
class QueryAttention(TokenScorer):
    """Attention that a text pays to a token, mean over heads: TRIPS (arXiv 2403.07883).

    It needs `guide="text_query"` and, in each call, `vltprune.query`.
    """

    needs = Stat.FROM_QUERY

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return stats[Stat.FROM_QUERY].mean(-1)


@scorers.register("query_relevance")
class QueryRelevance(TokenScorer):
    """Relevance of a token to a text: the mean over its segments of their affinity to the token.

    With `guide="text_embedding"` and `negate=True` it is CDPruner's (arXiv 2506.10967): r_i = -mean_m cos(patch_i, text_m) in
    CLIP's space, where patches that a text names are the least similar, and mean_m cos(token_i, word_m) in a language model's.

    Args:
        spec: the block.
        negate: whether the sign is changed, so that the least similar tokens stay. The text of a prompt is compared as it is.
    """

    guided = True

    def __init__(self, spec: BlockSpec, negate: bool = False):
        super().__init__(spec)
        self.negate = negate

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        assert guidance is not None
        relevance = guidance.affinity.mean(-1)
        return -relevance if self.negate and not guidance.of_prompt else relevance
