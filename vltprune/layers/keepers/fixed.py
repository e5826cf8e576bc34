"""Keepers of fixed counts: how many tokens stay follows from how many there are, whatever they hold."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ...core.tokens import PackedTokens
from ...registry import keepers
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from .base import KeepRatioPredictor, Knob, decay_factor, keep_count


class FixedKeeper(KeepRatioPredictor):
    """Base class of keepers whose counts follow from the numbers of tokens alone: they implement `kept`.

    Args:
        spec: the block.
    """

    fixed: ClassVar[bool] = True

    @abstractmethod
    def kept(self, available: int) -> int:
        """The number of unprotected tokens that stay.

        Args:
            available: how many unprotected tokens an instance has. It may be a symbol of torch.export in a tower of one
                instance.

        Returns:
            The number, from 0 to `available`.
        """

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return tokens.available.map(self.kept).sizes


@keepers.register("ratio")
class Ratio(FixedKeeper):
    """Keeps the same ratio of every instance's tokens: ceil(ratio * n).

    Args:
        spec: the block.
        ratio: the kept ratio, in [0, 1].
        decay: above 0. After i earlier pruned blocks the ratio is ratio^(decay^i). Below 1 the first blocks prune most, so that
            more tokens stay to the end at the same cost.

    Raises:
        ValueError: for arguments outside their range.
    """

    knob = Knob("ratio", 0.0, 1.0)

    def __init__(self, spec: BlockSpec, ratio: float = 0.7, decay: float = 1.0):
        super().__init__(spec)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio(ratio={ratio}) must lie in 0 .. 1: the share of tokens kept")
        self.ratio, self._decay_factor = ratio, decay_factor(spec, decay, "ratio")

    def kept(self, available: int) -> int:
        return keep_count(available, self.block_ratio)

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        # as tensors: torch.export writes no rounding of a length that is a size of the graph
        return keep_count(tokens.available.sizes, self.block_ratio)

    @property
    def block_ratio(self) -> float:
        """The ratio of the tokens that enter this block, with the decay."""
        return self.ratio**self._decay_factor


@keepers.register("share")
class Share(FixedKeeper):
    """Keeps a share of every instance's tokens, ceil(share^power * n): for published schedules, whose layers differ.

    A budget sets the power of all layers alike, so that their shares rise and fall together. 1 is the schedule itself.

    Args:
        spec: the block.
        share: in [0, 1].
        power: at least 0.

    Raises:
        ValueError: for arguments outside their range.
    """

    knob = Knob("power", 1 / 64, 64.0, log=True, larger_keeps_more=False)

    def __init__(self, spec: BlockSpec, share: float = 0.5, power: float = 1.0):
        super().__init__(spec)
        if not 0 <= share <= 1 or not 0 <= power < math.inf:
            raise ValueError(
                f"share(share={share}, power={power}): the share must lie in 0 .. 1, and the power be 0 or more and finite"
            )
        self.share, self.power = share, power

    def kept(self, available: int) -> int:
        return keep_count(available, self.share**self.power)

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        # as tensors, as in `ratio`
        return keep_count(tokens.available.sizes, self.share**self.power)


@keepers.register("all")
class All(FixedKeeper):
    """Keeps all tokens: a stage that only leaves scores for later ones. Replacing parts of a config leaves such a stage."""

    def kept(self, available: int) -> int:
        return available


@keepers.register("count")
class Count(FixedKeeper):
    """Keeps the same number of tokens of every instance, or all of them where there are fewer.

    Args:
        spec: the block.
        count: the number of unprotected tokens, at least 0.

    Raises:
        ValueError: for a negative count.
    """

    def __init__(self, spec: BlockSpec, count: int):
        super().__init__(spec)
        if count < 0:
            raise ValueError(f"count(count={count}) must be 0 or more: the number of unprotected tokens kept")
        self.count = count

    def kept(self, available: int) -> int:
        return min(available, self.count)


@keepers.register("remove")
class Remove(FixedKeeper):
    """Removes the same number of tokens of every instance, but never more than half of them, as ToMe does.

    ToMe (arXiv 2210.09461), section 3. With fractions, block i of the pruned ones removes floor((i + 1) r) - floor(i r) tokens.

    Args:
        spec: the block.
        r: the number of unprotected tokens to remove, at least 0; the mean over blocks for a fraction.

    Raises:
        ValueError: for a negative or infinite number.
    """

    knob = Knob("r", 0.0, 512.0, larger_keeps_more=False)

    def __init__(self, spec: BlockSpec, r: float = 8.0):
        super().__init__(spec)
        if not 0 <= r < math.inf:
            raise ValueError(
                f"remove(r={r}) must be 0 or more and finite: the number of tokens that each block removes"
            )
        self.r = r

    def kept(self, available: int) -> int:
        i = self.spec.before
        return available - min(math.floor((i + 1) * self.r) - math.floor(i * self.r), available // 2)


@keepers.register("counts")
class Counts(FixedKeeper):
    """Keeps a number of tokens for each block of a tower, as published schedules list them; all where there are fewer.

    Args:
        spec: the block.
        counts: the number of unprotected tokens behind each block, the first block first. Further blocks keep all.

    Raises:
        ValueError: for a negative count, and for what is no sequence.
    """

    def __init__(self, spec: BlockSpec, counts: Sequence[int] = ()):
        super().__init__(spec)
        listed = not isinstance(counts, str) and isinstance(counts, Sequence)
        if not listed or any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in counts):
            raise ValueError(
                f"counts(counts={counts!r}) must be whole numbers of 0 or more, the tokens kept by block: write "
                "counts((64, 32, 32)), or count(32) for the same number at every block"
            )
        self.counts = tuple(counts)

    def kept(self, available: int) -> int:
        depth = self.spec.depth
        return min(available, self.counts[depth]) if depth < len(self.counts) else available
