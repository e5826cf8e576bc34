"""Scorers that read attention statistics as published methods do: columns of the map, values, keys, PageRank."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import segments
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import scorers
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from .base import MeanClsAttention, TokenScorer, normalize


@scorers.register("column_attention")
class ColumnAttention(TokenScorer):
    """Attention that a token receives from the tokens of its instance: the mean over heads and over all n queries.

    LTP (arXiv 2107.00910) and HiPrune (arXiv 2508.00553) have it. Without the attention that a token pays to itself it orders
    tokens as PoWER-BERT does (arXiv 2001.08950), which sums over heads and queries.

    Args:
        spec: the block.
        diagonal: whether the attention that the token pays to itself counts.
    """

    needs = Stat.COLUMN

    def __init__(self, spec: BlockSpec, diagonal: bool = True):
        super().__init__(spec)
        self.diagonal = diagonal
        self.needs = Stat.COLUMN if diagonal else Stat.COLUMN | Stat.DIAGONAL

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        received = stats[Stat.COLUMN]
        if not self.diagonal:
            received = received - stats[Stat.DIAGONAL]
        return received / tokens.layout.spread(tokens.layout.sizes)


@scorers.register("ats")
class Ats(TokenScorer):
    """Attention that the summary token pays to a token, times the length of its value, normalized over the instance.

    ATS (arXiv 2111.15667): S_j = A_cls,j ||V_j|| / sum_i A_cls,i ||V_i||, A summed over heads, V of all heads.
    """

    needs = Stat.SUMMARY | Stat.VALUE

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        shares = stats[Stat.SUMMARY].sum(-1) * stats[Stat.VALUE].norm(dim=-1)
        return normalize(shares, tokens, are_shares=True)


@scorers.register("value_weighted_attention")
class ValueWeightedAttention(TokenScorer):
    """The length of what the summary token takes from a token: sum over heads h of A[h, cls, j] ||v[h, j]||.

    The norm-based analysis of attention (Kobayashi et al., arXiv 2004.10102), head by head, before the output projection.
    """

    needs = Stat.SUMMARY | Stat.VALUE

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return (stats[Stat.SUMMARY] * stats[Stat.VALUE]).sum(-1)


@scorers.register("key_norm")
class KeyNorm(TokenScorer):
    """The L1 norm of a token's keys of all heads, by which DART (arXiv 2502.11494) chooses its pivots."""

    needs = Stat.KEY_NORM

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return stats[Stat.KEY_NORM]


@scorers.register("pagerank")
class PageRank(TokenScorer):
    """Importance on the graph of attention: the I-stage of Zero-TPrune (arXiv 2305.17328), algorithm 1.

    Each token passes its importance on as it pays attention, 30 times from equal ones. Heads count by their root mean
    square. It costs 30 * heads MACs for each pair of tokens. In a causal tower all importance ends at the first token.
    """

    needs = Stat.PAGERANK

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return stats[Stat.PAGERANK]


@scorers.register("wide_cls_attention")
class WideClsAttention(TokenScorer):
    """Attention that the summary token pays to a token, all heads as a single one: LLaVA-PruMerge (arXiv 2403.15388).

    a = softmax(q_cls k^T / sqrt(heads * head_dim)).
    """

    needs = Stat.SUMMARY_WIDE

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return stats[Stat.SUMMARY_WIDE]


@scorers.register("last_attention")
class LastAttention(TokenScorer):
    """Attention that the last token of an instance pays to a token, mean over heads: FastV (arXiv 2403.06764).

    In a language model the last token is the end of the prompt, from which the answer begins.
    """

    needs = Stat.LAST

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return stats[Stat.LAST].mean(-1)


@scorers.register("flowcut")
class FlowCut(TokenScorer):
    """Attention of the summary token and likeness to its value, times the size of the value, smoothed over the layers.

    FlowCut (arXiv 2505.19536): s_j = (a_j + b_j) ||v_j||_1. Here a is the mean over heads of the summary token's attention,
    and b = softmax(v_cls . v_j), both normalized over the unprotected tokens. Values v are means over heads. The score is
    momentum * (the score at the last block that scored the token) + (1 - momentum) * s.

    Args:
        spec: the block.
        momentum: in [0, 1).

    Raises:
        ValueError: for a momentum outside its range.
    """

    needs = Stat.SUMMARY | Stat.VALUE_MEAN
    remembers: str = "flowcut"

    def __init__(self, spec: BlockSpec, momentum: float = 0.5):
        super().__init__(spec)
        if not 0 <= momentum < 1:
            raise ValueError(f"flowcut(momentum={momentum}) must lie in [0, 1): the weight of the last block's score")
        self.momentum = momentum

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        layout, value = tokens.layout, stats[Stat.VALUE_MEAN]
        attention = normalize(stats[Stat.SUMMARY].mean(-1), tokens, are_shares=True)
        logits = (value * layout.spread(tokens.with_x(value).summaries())).sum(-1)
        likeness = segments.softmax(logits, layout, tokens.free)
        score = (attention + likeness) * torch.linalg.vector_norm(value, ord=1, dim=-1)
        before = tokens.columns.get(self.remembers)
        return score if before is None else self.momentum * before + (1 - self.momentum) * score

    def macs(self, before: Tensor, after: Tensor) -> Tensor:
        return self.spec.dim // self.spec.heads * before


@scorers.register("remember")
class Remember(TokenScorer):
    """The scores of another scorer, which later stages find in a column of the tokens.

    A stage that keeps all tokens, `Stage("remember(...)", "all", at=9)`, only leaves its scores.

    Args:
        spec: the block.
        scorer: the name of a registered scorer.
        column: the name of the column.

    Raises:
        LookupError: for a scorer that is not registered.
        ValueError: for a scorer that reads a guide.
    """

    needs = MeanClsAttention.needs

    def __init__(self, spec: BlockSpec, scorer: str = "mean_cls_attention", column: str = "remembered"):
        super().__init__(spec)
        self.base: TokenScorer = scorers[scorer](spec)
        if self.base.guided:
            raise ValueError(f"remember(scorer={scorer!r}) cannot give it the alignment guide: choose another scorer")
        self.needs, self.remembers = self.base.needs, column

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return self.base(tokens, stats, guidance)

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return self.base.macs(before, after)
