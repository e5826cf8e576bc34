"""Attention statistics: what a part may ask of a block's attention, the results, and what they cost."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# Steps of PageRank. Each multiplies the error by the second-largest eigenvalue of the map, in absolute value: with .8,
# 30 steps leave .1 %
PAGERANK_STEPS = 30


class Stat(enum.Flag):
    """The attention statistics that a part may declare in `needs`, one entry per token.

    They are in single precision where the model is in half. "Receives" is of a column of the attention map, whose rows are
    queries. In soft training a query counts as much as its `keep_prob`.

    Attributes:
        NONE: no statistic.
        SUMMARY: [total, heads], attention that the summary token pays to each token.
        RECEIVED: [total], attention from unprotected tokens: the maximum over heads, summed over queries.
        CONTEXT: [total, heads], the norm of each head's output at the token.
        KEY: [total, head_dim], the mean of the keys over heads.
        COLUMN: [total], attention that each token receives from all tokens of its instance, protected ones and itself
            included: the mean over heads, summed over queries.
        DIAGONAL: [total], attention that each token pays to itself: the mean over heads.
        VALUE: [total, heads], the Euclidean norm of each head's value.
        VALUE_MEAN: [total, head_dim], the mean of the values over heads.
        KEY_NORM: [total], the L1 norm of the keys of all heads.
        SUMMARY_WIDE: [total], attention of the summary token with all heads as a single one (LLaVA-PruMerge, Shang et al.,
            arXiv 2403.15388): softmax(q k^T / sqrt(heads * head_dim)). Pair biases are averaged over heads.
        LAST: [total, heads], attention that the last token of each instance pays to each token; where a column "last" marks
            another, that one pays.
        PAGERANK: [total], importance on the graph of attention (Zero-TPrune, Wang et al., arXiv 2305.17328, algorithm 1):
            s <- A^T s per head, 30 times from s = 1 / n, and the root mean square over heads. It sums to about one. A
            causal map sends everything to the first token. It keeps the maps of one instance at a time, heads * n^2 numbers.
        FROM_TEXT: [total], attention that each token receives from the text tokens of its instance, its class token included:
            the mean over heads and over these tokens. Only where a text and an image are one sequence.
        FROM_QUERY: [total, heads], attention that a text query pays to each unprotected token. The block's own query projection
            makes a query of the text (TRIPS, Jiang et al., arXiv 2403.07883).
        FROM_RATERS: [total], FROM_TEXT of those text tokens alone that the column "rater" marks (SparseVLM, arXiv 2410.04417).
    """

    NONE = 0
    SUMMARY = enum.auto()
    RECEIVED = enum.auto()
    CONTEXT = enum.auto()
    KEY = enum.auto()
    COLUMN = enum.auto()
    DIAGONAL = enum.auto()
    VALUE = enum.auto()
    VALUE_MEAN = enum.auto()
    KEY_NORM = enum.auto()
    SUMMARY_WIDE = enum.auto()
    LAST = enum.auto()
    PAGERANK = enum.auto()
    FROM_TEXT = enum.auto()
    FROM_QUERY = enum.auto()
    FROM_RATERS = enum.auto()

    @property
    def of_map(self) -> Stat:
        """Those of these statistics that need the whole attention map."""
        return self & _OF_MAP

    @property
    def with_output(self) -> Stat:
        """Those of these statistics that come with attention's output, and cost what it costs."""
        return self & (_OF_MAP | Stat.CONTEXT)

    @property
    def of_summary(self) -> Stat:
        """Those of these statistics that need a summary token."""
        return self & _OF_SUMMARY

    @property
    def of_text(self) -> Stat:
        """Those of these statistics that need text and image tokens in one sequence."""
        return self & (Stat.FROM_TEXT | Stat.FROM_RATERS)

    def macs(self, heads: int, head_dim: int) -> tuple[int, int, int]:
        """MACs of these statistics beyond those of attention.

        The map is computed once, for the output and for all statistics of it. Sums, maxima and norms count as nothing, as
        softmax does.

        | statistic | per token | per pair of tokens | per pair of a text token and a token |
        |---|---|---|---|
        | SUMMARY, SUMMARY_WIDE, LAST, FROM_QUERY, each | heads * head_dim | 0 | 0 |
        | PAGERANK | 0 | 30 * heads | 0 |
        | FROM_TEXT; FROM_RATERS, at most; each | 0 | 0 | heads * head_dim |
        | all others | 0 | 0 | 0 |

        What makes a query of the text, one token's query projection an instance, is counted apart.

        Args:
            heads: the number of heads.
            head_dim: the width of a head.

        Returns:
            MACs per token, per pair of query and key, and per pair of a query of the text and a key.
        """
        width = heads * head_dim
        rows = sum(stat in self for stat in (Stat.SUMMARY, Stat.SUMMARY_WIDE, Stat.LAST, Stat.FROM_QUERY))
        pair = PAGERANK_STEPS * heads if Stat.PAGERANK in self else 0
        texts = sum(stat in self for stat in (Stat.FROM_TEXT, Stat.FROM_RATERS))
        return rows * width, pair, texts * width


_OF_MAP = Stat.RECEIVED | Stat.COLUMN | Stat.DIAGONAL | Stat.PAGERANK
_OF_SUMMARY = Stat.SUMMARY | Stat.SUMMARY_WIDE


@dataclass(frozen=True)
class AttentionStats:
    """The attention statistics of one block, by `Stat`. Reading one that was not requested raises LookupError.

    Attributes:
        requested: the statistics that were computed.
        values: their tensors, with the shapes that `Stat` lists.
    """

    requested: Stat = Stat.NONE
    values: Mapping[Stat, Tensor] = field(default_factory=dict)

    def __getitem__(self, stat: Stat) -> Tensor:
        if stat not in self.values:
            raise LookupError(
                f"Stat.{stat.name} was not computed: add it to the part's `needs` (requested: {self.requested})"
            )
        return self.values[stat]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> AttentionStats:
        """Applies a function to every statistic, such as `Reduction.values`, for the tokens that a plan leaves.

        Args:
            function: maps values per token, [total, ...], to values per token, [new total, ...].

        Returns:
            The results, as statistics.
        """
        return AttentionStats(self.requested, {stat: function(value) for stat, value in self.values.items()})
