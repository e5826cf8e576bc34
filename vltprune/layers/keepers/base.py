"""Keepers (keep-ratio predictors): each turns the scores of an instance into the number of tokens that stay."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.checks import is_recorded
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import MASKED, PackedTokens
from ...registry import keepers
from ..algorithms import sampling
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from ..printing import PrintedPart
from ..scorers.base import Integers, hash_integers

LEAST = 1e-9  # a part of a token that rounding may leave
_DIRECTIONS = 4  # along which `random_ratio` looks for the farthest tokens


@dataclass(frozen=True)
class Knob:
    """The argument of a keeper that sets its cost, which calibration searches.

    Attributes:
        name: the keeper's argument and attribute.
        low: the smallest value.
        high: the largest value.
        log: whether it is searched on a log scale.
        larger_keeps_more: whether larger values keep more tokens.
    """

    name: str
    low: float
    high: float
    log: bool = False
    larger_keeps_more: bool = True

    def value_at(self, fraction: float) -> float:
        """The value at a fraction in [0, 1] of the range."""
        if self.log:
            return math.exp(math.log(self.low) * (1 - fraction) + math.log(self.high) * fraction)
        return self.low * (1 - fraction) + self.high * fraction

    def fraction(self, value: float) -> float:
        """The fraction in [0, 1] of the range that a value is at. Values outside the range are at its ends."""
        low, high, value = (map(math.log, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return min(max((value - low) / (high - low), 0.0), 1.0)


class KeepRatioPredictor(PrintedPart, ABC):
    """Base class of keepers: they predict how many unprotected tokens of each instance stay in a block.

    Implementations take `spec` and arguments of their own, and have the knob's value as an attribute of its name.

    Attributes:
        guided: whether it reads the guidance of an alignment guide.
        needs: the attention statistics that it reads, which are columns of its `tokens` by their names (`with_statistics`).
        fixed: whether its counts depend on the number of tokens alone, and not on their contents.
        cost_trains_scores: whether the cost has gradients to the scores in soft training, and not to a threshold alone.
        hard: whether soft training keeps a token for certain or masks it, with the gradient of its probability (`keep_prob`).
            Masked tokens stay in the batch, so that the loss can want them back, and no reducer acts on them. An instance may
            say otherwise than its class.
        fits_data: whether its counts follow from data that it was fitted to, and not from the knob alone. Calibration fits it
            anew for each value of the knob.
        batch_weight: of a keeper that fits data, the weight in [0, 1] that a batch in training mode has in its running mean. 0,
            the default, fits nothing.
        knob: the argument that sets its cost, None for none. An instance may have another one than its class.
        spec: the block that it is built for.
    """

    guided: ClassVar[bool] = False
    needs: Stat = Stat.NONE
    fixed: ClassVar[bool] = False
    cost_trains_scores: ClassVar[bool] = False
    hard: bool = False
    fits_data: ClassVar[bool] = False
    batch_weight: float = 0.0
    knob: Knob | None = None

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        """Counts the tokens that stay.

        Args:
            scores: [total]; those that are equal within rounding are exactly equal.
            tokens: the block's input, x [total, dim].
            guidance: how the tokens relate to the guide's anchors. None without a guide.

        Returns:
            The number of unprotected tokens that stay in each instance, [batch] int64, from 0 to how many there are.
        """

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        """The distance of each score above the threshold, in standard deviations of its instance's scores or in other units.

        Args:
            scores: [total].
            tokens: the block's input, x [total, dim].
            guidance: as in `forward`.

        Returns:
            The margins, [total], which soft training turns into keep probabilities.

        Raises:
            ValueError: for a keeper without a threshold.
        """
        raise ValueError(
            f"{type(self).__name__} has no threshold to learn softly: use keep='threshold', 'learned', 'rising_threshold', "
            "'above' or 'sampled_ratio'"
        )

    def keep_prob(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None, temperature: float) -> Tensor:
        """The probability that each token stays in soft training: the sigmoid of its margin over a temperature.

        Where `hard`, it is 1 for a probability above one half and `tokens.MASKED` for others, in place of 0. Its gradient is
        that of the probability at temperature 1 (straight-through, Bengio et al., arXiv 1308.3432): it need not harden.

        Args:
            scores: [total].
            tokens: the block's input, x [total, dim].
            guidance: as in `forward`.
            temperature: above 0.

        Returns:
            The probabilities, [total].
        """
        prob = (self.margin(scores, tokens, guidance) / (1.0 if self.hard else temperature)).sigmoid()
        if not self.hard:
            return prob
        # the difference is exactly 0, and is not added to what would round it
        return torch.where(prob > 0.5, 1.0, MASKED) + (prob - prob.detach())


def with_statistics(tokens: PackedTokens, stats: AttentionStats, needs: Stat) -> PackedTokens:
    """The tokens with statistics as columns, by the name of each, as a keeper reads them.

    Args:
        tokens: the tokens of a block.
        stats: their statistics.
        needs: which of them.

    Returns:
        The tokens with these columns.
    """
    if not needs:
        return tokens
    named = {str(stat.name): stats[stat] for stat in Stat if stat & needs}
    return replace(tokens, columns={**tokens.columns, **named})


@keepers.register("outliers")
class Outliers(KeepRatioPredictor):
    """Keeps as many tokens as have an outlying score, at least one: LLaVA-PruMerge (arXiv 2403.15388).

    Outliers are above Q3 + multiplier (Q3 - Q1), where Q1 and Q3 are the quartiles of the instance's scores. The reference
    takes quartiles over the batch.

    Args:
        spec: the block.
        multiplier: how many quartile ranges above the third quartile outliers begin. 1.5 is PruMerge. Below about -1 -
            (Q1 - least) / (Q3 - Q1) all tokens stay, and above the largest score one does.
        samples: how many more tokens stay for each outlier, at least 0, as PruMerge+ adds them (3). The selector `evenly`
            chooses them.

    Raises:
        ValueError: for a multiplier that is not finite, and for a negative number of samples.
    """

    knob = Knob("multiplier", -8.0, 32.0, larger_keeps_more=False)

    def __init__(self, spec: BlockSpec, multiplier: float = 1.5, samples: float = 0.0):
        super().__init__(spec)
        if not math.isfinite(multiplier) or not 0 <= samples < math.inf:
            raise ValueError(
                f"outliers(multiplier={multiplier}, samples={samples}): the multiplier must be finite, and the samples for "
                "each outlier 0 or more"
            )
        self.multiplier, self.samples = multiplier, samples

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        padded, candidates = (
            segments.pad(scores.detach(), tokens.layout),
            segments.pad(tokens.free, tokens.layout, False),
        )
        found = sampling.outliers(padded, candidates, self.multiplier).clamp(min=1)
        return torch.minimum(found + (found * self.samples).long(), candidates.sum(1))


@keepers.register("random_ratio")
class RandomRatio(KeepRatioPredictor):
    """Keeps a random ratio of each instance's tokens, the baseline of per-instance counts.

    The ratio is uniform in mean - half_width .. mean + half_width, clamped to [0, 1]. It is a hash of the seed, the depth, and
    the tokens of the instance that lie farthest along four random directions. So it does not depend on batch mates.

    Args:
        spec: the block.
        mean: the mean ratio, in [0, 1].
        half_width: half the width of the interval, in [0, 1].
        seed: another seed gives other ratios.

    Raises:
        ValueError: for arguments outside their range.
    """

    knob = Knob("mean", 0.0, 1.0)

    def __init__(self, spec: BlockSpec, mean: float = 0.7, half_width: float = 0.25, seed: int = 0):
        super().__init__(spec)
        if not 0 <= mean <= 1 or not 0 <= half_width <= 1:
            raise ValueError(f"random_ratio(mean={mean}, half_width={half_width}): both must lie in 0 .. 1")
        self.mean, self.half_width, self.seed = mean, half_width, seed

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        places = self._farthest(tokens)
        if is_recorded() or places.device.type != "cpu":
            number = torch.arange(places.shape[1], device=places.device)
            # added one by one: OpenVINO's sum over a dimension ends at the largest integer of 32 bits, additions wrap around
            added = sum(hash_integers(places, number).unbind(1), places.new_zeros(()))
            drawn = self._drawn(added)
            return keep_count(tokens.available.sizes, self._ratio((drawn >> 8).float()).clamp(0, 1))
        # a few numbers an instance, which Python computes in a fraction of the time of as many operations
        drawn = [self._drawn(sum(map(hash_integers, row, range(_DIRECTIONS)))) for row in places.tolist()]
        ratios = [min(max(self._ratio(one >> 8), 0.0), 1.0) for one in drawn]
        return torch.tensor([*map(keep_count, tokens.available.lengths, ratios)], device=places.device)

    def _drawn(self, places: Integers) -> Integers:
        return hash_integers(places, self.seed * 1009 + self.spec.depth)

    def _ratio(self, drawn: Tensor | int) -> Any:
        """The ratios of numbers of 23 bits."""
        return self.mean + self.half_width * (2 * (drawn + 0.5) / 2**23 - 1)

    def _farthest(self, tokens: PackedTokens) -> Tensor:
        """The positions of the tokens that lie farthest along each direction: [batch, directions] int64."""
        x, layout = precision.single(tokens.x), tokens.layout
        # tensors of a graph that is recorded must not be kept
        directions = (_directions.__wrapped__ if is_recorded() else _directions)(x.shape[1], self.seed, x.device)
        with precision.without_autocast(x.device):
            reach = segments.pad(x @ directions.to(x.dtype), layout)
        # measured from as far back as a token can reach, so that what is equal within rounding is so relative to itself
        reach = reach + segments.pad(x.abs().sum(1), layout).amax(1)[:, None, None]
        reach = reach.masked_fill(~segments.pad(tokens.free, layout, False)[..., None], float("-inf"))
        rows = reach.transpose(1, 2).flatten(0, 1)
        farthest = precision.equalize(rows).argmax(1).view(layout.batch, -1)
        return segments.pad(tokens.position, layout).gather(1, farthest)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _directions(dim: int, seed: int, device: torch.device) -> Tensor:
    """Random signs, [dim, directions]."""
    entry = torch.arange(dim * _DIRECTIONS, device=device).view(dim, _DIRECTIONS)
    return ((hash_integers(entry, seed) >> 8) % 2 * 2 - 1).float()


def decay_factor(spec: BlockSpec, decay: float, name: str) -> float:
    """The factor by which a keeper's cost changes over the depths: decay^i after i earlier pruned blocks.

    Args:
        spec: the block, for the number of earlier pruned blocks.
        decay: above 0 and finite. 1 prunes alike at all depths, less prunes most at the first.
        name: the keeper's registered name, for the error.

    Returns:
        The exponent of a ratio, or the factor of an error or a power.

    Raises:
        ValueError: for a decay outside its range.
    """
    if not 0 < decay < math.inf:
        raise ValueError(
            f"{name}(decay={decay}) must be above 0 and finite: 1 prunes alike at all depths, less most at first"
        )
    return decay**spec.before


@overload
def keep_count(available: int, ratio: float) -> int: ...


@overload
def keep_count(available: Tensor, ratio: Tensor | float) -> Tensor: ...


def keep_count(available: Tensor | int, ratio: Tensor | float) -> Tensor | int:
    """The number of tokens that a ratio keeps: ceil(ratio * available) within rounding, so that 0.7 * 10 is 7.

    Args:
        available: the number of unprotected tokens of each instance, [batch] int64, or of one instance as a number.
        ratio: the kept ratio, in [0, 1]: one for all instances, or [batch].

    Returns:
        The number of tokens that stay in each instance, [batch] int64, or a number as `available` is.
    """
    if not isinstance(available, Tensor):
        return max(math.ceil(available * float(ratio) * (1 - precision.rounding(torch.float64)) - LEAST), 0)
    dtype = precision.widest_float(available.device)
    part = available.to(dtype) * ratio * (1 - precision.rounding(dtype))
    return (part - LEAST).ceil().long().clamp(min=0)
