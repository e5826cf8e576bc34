"""Pruner: the decision of one pruned layer, made by a scorer, a keeper, a selector and a reducer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..core import precision, segments
from ..core.checks import is_traced
from ..core.layout import Layout
from ..core.modality import Modality, is_of
from ..core.statistics import AttentionStats, Stat
from ..core.tokens import PackedTokens
from ..layers import BlockSpec, Guidance, KeepRatioPredictor, Reduction, TokenReducer, TokenScorer, TokenSelector, Top
from ..layers.keepers.base import with_statistics
from ..layers.keepers.fixed import FixedKeeper
from ..layers.selectors.base import Selection, first_tokens, top_tokens
from .part import KINDS
from .stage import PRUNER_KINDS, Stage

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UntrainedGuideWarning(UserWarning):
    """An alignment guide decides what to prune while its anchors are still noise."""


@dataclass(frozen=True)
class PruneDecision:
    """The decision of one pruned layer.

    Attributes:
        plan: what becomes of the tokens; None where all stay.
        scores: [total], in single precision; those that are equal within rounding are equal.
        keep_prob: [total], in soft training: the probability to stay, with gradients to scores and threshold.
        counted_prob: [total]: the same values, with gradients to the threshold alone where there is one.
        columns: values per token by name, [total, ...], that the tokens carry to later layers.
        is_idle: as `PruneStep` has it.
    """

    plan: Reduction | None
    scores: Tensor | None = None
    keep_prob: Tensor | None = None
    counted_prob: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    is_idle: bool = False

    def apply(self, tokens: PackedTokens) -> PackedTokens:
        """The tokens that the decision leaves, with their keep probabilities and columns."""
        if self.keep_prob is not None:
            tokens = tokens.with_keep_prob(self.keep_prob, self.counted_prob)
        if self.columns:
            tokens = replace(tokens, columns={**tokens.columns, **self.columns})
        return tokens if self.plan is None else self.plan.tokens(tokens)

    def carry(self, stats: AttentionStats) -> AttentionStats:
        """The statistics of the tokens that the decision leaves; of a merged token, those at the row where it stands."""
        plan = self.plan
        return stats if plan is None else stats.mapped(lambda values: values.index_select(0, plan.index))


class Pruner(nn.Module):
    """The pruning of one layer: scores tokens, counts how many stay, selects them, and plans what becomes of the others.

    Args:
        scorer: how much each token matters.
        keeper: how many tokens stay.
        selector: which ones stay.
        reducer: what becomes of the others.
        modality: the modality of the tokens that it prunes; the others stay. None for tokens of any.

    Attributes:
        needs: the attention statistics that its parts read.
        reads_grid: whether a part reads the grid of patches.
        soft_temperature: above 0, training decides softly. A token then stays with a probability, that of its keeper at this
            temperature. Its logarithm is a bias on the token's attention logits, so that the loss has
            gradients to scores and thresholds. The cost has them to thresholds alone: scores should say what matters, not
            what is cheap. Keepers without a threshold say otherwise (`cost_trains_scores`). At 0, and in evaluation, tokens
            stay or go.
        min_keep_prob: a token whose probability to stay is not above this goes, in soft training too. A `hard` keeper masks it.
    """

    min_keep_prob = 0.02

    def __init__(
        self,
        scorer: TokenScorer,
        keeper: KeepRatioPredictor,
        selector: TokenSelector,
        reducer: TokenReducer,
        modality: Modality | None = None,
    ):
        super().__init__()
        self.modality: Modality | None = modality
        self.scorer, self.keeper, self.selector, self.reducer = scorer, keeper, selector, reducer
        self.needs: Stat = scorer.needs | keeper.needs | selector.needs | reducer.needs
        self.reads_grid = scorer.reads_grid or selector.reads_grid
        self.soft_temperature = 0.0

    @classmethod
    def build(cls, stage: Stage, spec: BlockSpec) -> Pruner:
        """Builds the parts of a stage for one block.

        Args:
            stage: the scorer, keeper, selector and reducer.
            spec: the block. Its tower selects the keeper, where `keep` is given by tower.

        Returns:
            The pruner.

        Raises:
            ValueError: for parts that need what the block does not have.
        """
        parts = {kind: stage.part(kind, spec.tower) for kind in PRUNER_KINDS}
        built = {kind: KINDS[kind][0][part.name](spec, **part.args) for kind, part in parts.items()}
        for kind, part in built.items():
            _check_needs(kind, str(parts[kind]), getattr(part, "needs", Stat.NONE), spec)
        if stage.modality is not None and not spec.modalities:
            raise ValueError(
                f"modality={stage.modality!r} prunes the {stage.modality} tokens of a text and an image in one sequence, and "
                f"the {spec.tower} tower has tokens of one modality: write modality=None, or prune a single-stream "
                "transformer such as transformers.ViltModel"
            )
        return cls(*built.values(), modality=stage.modality)

    def forward(
        self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None, least: int = 0
    ) -> PruneDecision:
        """Decides which tokens of a block stay.

        Args:
            tokens: the block's input, x [total, dim].
            stats: the attention statistics that `needs` declares.
            guidance: how the tokens relate to the guide's anchors. None without a guide.
            least: how many unprotected tokens of each instance stay in any case, those of largest score.

        Returns:
            The plan, the scores and, in soft training, the keep probabilities.

        Raises:
            ValueError: for soft training of a keeper without a margin, and under torch.jit.trace for counts that depend on the
                contents of tokens.
        """
        soft = self.training and self.soft_temperature > 0
        varying = [type(part).__name__ for part in (self.keeper, self.selector) if not part.fixed]
        if is_traced() and (soft or varying):
            raise ValueError(
                "torch.jit.trace would keep this example's counts for every other input, and "
                f"{'soft training' if soft else varying[0]} counts tokens by what they hold: prune with "
                "keep='ratio(...)' or keep='count(...)' and selector='top', whose counts are the same for all inputs of one "
                "shape, or run the model without tracing it"
            )
        with precision.without_autocast(tokens.x.device):  # which would take sums of scores in half
            return self._decide(tokens, stats, guidance, soft, least)

    def _decide(
        self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None, soft: bool, least: int
    ) -> PruneDecision:
        if self.modality is not None:
            others = ~is_of(tokens, self.modality)
            protected = tokens.protected | others
            tokens = replace(tokens, protected=protected, number_protected=None, protected_lead=False)
        if soft and not isinstance(self.selector, Top):
            raise ValueError(
                f"soft training keeps the tokens of largest score, and {type(self.selector).__name__} selects others: prune "
                "with selector='top', or train with soft_temperature 0"
            )
        scores = self.scorer(tokens, stats, guidance).float()
        scores, order = segments.rank_apart(scores, tokens.layout, tokens.protected)
        keep_prob = counted_prob = kept = None
        if soft:
            certain = self._certain(tokens, scores, least)
            keep_prob = counted_prob = self._keep_prob(scores, tokens, guidance, certain)
            if not self.keeper.cost_trains_scores:
                counted_prob = self._keep_prob(scores.detach(), tokens, guidance, certain)
            stays = tokens.free if self.keeper.hard else (keep_prob > self.min_keep_prob) & tokens.free
            counts = segments.count(stays, tokens.layout)
            counts = counts.clamp(min=least)
        else:
            kept, counts = self._kept(tokens, scores, stats, guidance, least)
        if isinstance(self.selector, Top) and keep_prob is None:
            selection = Selection(first_tokens(tokens, order, counts if kept is None else kept))
        else:
            # a keeper that samples does not order tokens as their scores do
            ordered = scores if keep_prob is None else keep_prob
            numbers = {"kept": kept} if self.selector.takes_kept else {}
            selection = self.selector(tokens, ordered, counts, stats, **numbers)
        if kept is not None and self.selector.fixed:
            protected = tokens.layout.combine(tokens.available, lambda there, free: there - free)
            selection = replace(selection, kept=kept.combine(protected, lambda free, more: free + more))
        columns = dict(selection.columns)
        if self.scorer.remembers is not None:
            columns[self.scorer.remembers] = self._remembered(scores, tokens)
        plan = self.reducer(tokens, scores, selection, stats)
        return PruneDecision(plan, scores, keep_prob, counted_prob, columns)

    def is_idle(self, tokens: PackedTokens, least: int = 0) -> bool:
        """Whether it keeps all tokens, whatever they hold, and no later layer reads their scores: inference then skips it.

        Args:
            tokens: the block's input.
            least: as in `forward`.
        """
        if not isinstance(self.selector, Top) or self.scorer.remembers is not None:
            return False
        fixed = self._fixed(tokens, least) if self.modality is None else None
        return fixed is not None and fixed == tokens.available

    def _fixed(self, tokens: PackedTokens, least: int) -> Layout | None:
        """How many unprotected tokens of each instance stay, whatever they hold. None where it depends on that."""
        keeper = self.keeper
        # a length that is a size of torch.export depends on what an instance holds, and so does what follows from it
        if not isinstance(keeper, FixedKeeper) or not isinstance(tokens.layout.longest, int):
            return None
        return tokens.available.map(lambda available: min(max(keeper.kept(available), least), available))

    def _kept(
        self, tokens: PackedTokens, scores: Tensor, stats: AttentionStats, guidance: Guidance | None, least: int
    ) -> tuple[Layout | None, Tensor]:
        """How many unprotected tokens of each instance stay, as numbers and as [batch] int64; no numbers under torch.export."""
        kept = self._fixed(tokens, least)
        if kept is not None:
            return kept, kept.sizes
        counts = self.keeper(scores, with_statistics(tokens, stats, self.keeper.needs), guidance).clamp(min=least)
        if torch.compiler.is_exporting():
            return None, counts
        # the only synchronization of a pruned layer
        found = Layout(counts.tolist(), counts.device)
        return found.combine(tokens.available, min), counts

    def _remembered(self, scores: Tensor, tokens: PackedTokens) -> Tensor:
        """[total]: the scores to leave to later layers. Tokens of another modality keep those that a former stage left."""
        former = tokens.columns.get(self.scorer.remembers or "")
        if self.modality is None or former is None:
            return scores
        return torch.where(is_of(tokens, self.modality), scores, former)

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        """Multiply-accumulates of the parts' own comparisons, [batch].

        Args:
            before: [batch], the tokens that enter the block.
            after: [batch], the tokens that leave it.

        Returns:
            The sum over the parts.
        """
        macs = self.scorer.macs(before, after) + self.selector.macs(before, after)
        matching = 0.0 if self.selector.matches else self.reducer.macs(before, after)
        return macs + matching + self.reducer.further_macs(before, after)

    def _certain(self, tokens: PackedTokens, scores: Tensor, least: int) -> Tensor:
        """[total] bool: protected tokens, and the `least` of largest score in each instance that are not masked."""
        counts = tokens.layout.sizes.new_full((tokens.layout.batch,), least)
        return top_tokens(tokens, scores.masked_fill(~tokens.present, float("-inf")), counts)

    def _keep_prob(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None, certain: Tensor) -> Tensor:
        """[total]: the probability that each token stays; 1 where `certain` [total] bool holds."""
        keep_prob = self.keeper.keep_prob(scores, tokens, guidance, self.soft_temperature)
        return keep_prob.to(scores.dtype).masked_fill(certain, 1.0)


def _check_needs(kind: str, part: str, needs: Stat, spec: BlockSpec) -> None:
    """ValueError for a part whose statistics need what the block does not have."""
    alone = "leave the tower alone with at={'other tower': None}"
    if needs.of_summary and not spec.has_summary:
        instead = "scorer='self_attention' or scorer='alignment'" if kind == "scorer" else f"another {kind}"
        raise ValueError(
            f"{kind}={part!r} reads the attention of a summary token ({needs.of_summary}), and the {spec.tower} "
            f"tower has none: write {instead}, or {alone}"
        )
    if Stat.FROM_QUERY in needs and not spec.has_query:
        raise ValueError(
            f"{kind}={part!r} reads the attention of a text query ({Stat.FROM_QUERY}), and no guide gives the {spec.tower} "
            f"tower one: write guide='text_query' and at={{'image': ...}}, or choose another {kind}"
        )
    if needs.of_text and not spec.modalities:
        instead = "scorer='self_attention'" if kind == "scorer" else f"another {kind}"
        raise ValueError(
            f"{kind}={part!r} reads the attention of text tokens ({needs.of_text}), and the {spec.tower} tower has tokens of "
            f"one modality: write {instead}, or prune a single-stream transformer such as transformers.ViltModel"
        )


def build_like(host: nn.Module, build: Callable[P, M], *args: P.args, **named: P.kwargs) -> M:
    """Builds a module in the floating-point dtype and on the device of a host's weights.

    It is initialized on the CPU, so that random numbers are the same on every device. For hosts without floating-point weights,
    such as quantized ones, it is in single precision.

    Args:
        host: the module whose dtype and device it gets.
        build: what builds the module.
        *args: arguments of `build`.
        **named: arguments of `build` by keyword.

    Returns:
        The module.
    """
    with torch.device("cpu"):
        part = build(*args, **named)
    weights = chain(host.parameters(), host.buffers())
    first = next(weights, None)
    if first is None:
        return part.to("cpu", torch.float32)
    floating = (weight.dtype for weight in chain((first,), weights) if weight.dtype in _FLOATING)
    return part.to(first.device, next(floating, torch.float32))
