"""Features that parts compare tokens by: their contents, or the mean of their keys over heads."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ..core import segments
from ..core.statistics import AttentionStats, Stat
from ..core.tokens import PackedTokens
from ..registry import selectors
from .block_spec import BlockSpec
from .selectors.base import TokenSelector

By = Literal["content", "key"]


def check_by(by: str, name: str) -> Stat:
    """The statistic that features are read from.

    Args:
        by: "content" or "key".
        name: the registered name of the part, for the error.

    Raises:
        ValueError: for other features.
    """
    if by not in get_args(By):
        raise ValueError(
            f"{name}(by={by!r}): write by='content', the block's input, or by='key', the mean of keys over heads"
        )
    return Stat.KEY if by == "key" else Stat.NONE


def features_of(tokens: PackedTokens, stats: AttentionStats, by: By) -> Tensor:
    """The features that tokens are compared by, without gradients.

    Args:
        tokens: the block's input, x [total, dim].
        stats: statistics with `Stat.KEY`, where it is read.
        by: "content" or "key".

    Returns:
        The features, [batch, longest, width].
    """
    features = stats[Stat.KEY] if by == "key" else tokens.x
    return segments.pad(features.detach(), tokens.layout)


def feature_width(spec: BlockSpec, by: By) -> int:
    """The width of the features that tokens are compared by.

    Args:
        spec: the block.
        by: "content" or "key".
    """
    return spec.dim // spec.heads if by == "key" else spec.dim


class FeatureSelector(TokenSelector):
    """Base class of selectors that compare the features of tokens.

    Args:
        spec: the block.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.

    Raises:
        ValueError: for other features.
    """

    def __init__(self, spec: BlockSpec, by: By = "content"):
        super().__init__(spec)
        self.needs = check_by(by, selectors.name_of(type(self)) or type(self).__name__)
        self.by: By = by

    def padded_features(self, tokens: PackedTokens, stats: AttentionStats) -> tuple[Tensor, Tensor]:
        """The features of a padded batch.

        Args:
            tokens: the block's input, x [total, dim].
            stats: the attention statistics that `needs` declares.

        Returns:
            The features, [batch, longest, width], and the unprotected tokens, [batch, longest] bool.
        """
        return features_of(tokens, stats, self.by), segments.pad(tokens.free, tokens.layout)

    @property
    def width(self) -> int:
        """The width of a token's features."""
        return feature_width(self.spec, self.by)

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        # of each token with each, unless overridden
        return self.width * before**2
