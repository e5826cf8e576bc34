"""The loop over depths: a tower taken apart by its host, with pruners between its attention and the rest of each block."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import segments
from .attention import AttentionStats, Stat, attend, attend_with_stats
from .config import PruneConfig
from .layers import AlignmentGuide, Guidance, KeepRatioPredictor, Reduction, Site, TokenReducer, TokenScorer
from .registry import keepers, reducers, scorers
from .tokens import PackedTokens

if TYPE_CHECKING:
    from .hosts.base import Host


class UntrainedGuideWarning(UserWarning):
    """An alignment guide decides what to prune while its anchors are still noise."""


@dataclass(frozen=True)
class Verdict:
    """What a pruner says of tokens: scores [total], and the plan, None where all stay; in soft training also how much of each.

    presence [total]: with gradients to scores and threshold; counted [total]: the same, to the threshold alone.
    """

    plan: Reduction | None
    scores: Tensor | None = None
    presence: Tensor | None = None
    counted: Tensor | None = None


class Pruner(nn.Module):
    """One depth: score, count, plan.

    softness: above 0, training decides softly. A token then stays as far as a sigmoid of its keeper's margin over
    `softness` says, by a bias on its attention logits, so that the loss has gradients to scores and thresholds; the cost has
    them to thresholds alone, for scores should say what matters, and not what is cheap. What would stay by less than
    `gone` goes. At 0, and in evaluation, tokens stay or go.
    """

    gone = 0.02

    def __init__(self, scorer: TokenScorer, keeper: KeepRatioPredictor, reducer: TokenReducer):
        super().__init__()
        self.scorer, self.keeper, self.reducer = scorer, keeper, reducer
        self.needs: Stat = scorer.needs | reducer.needs
        self.softness = 0.0

    @classmethod
    def build(cls, config: PruneConfig, site: Site) -> Pruner:
        """The parts of a config, for one site. ValueError for parts that need what the site does not have."""
        kinds = {"scorer": scorers, "keep": keepers, "reducer": reducers}
        parts = [registry[config.part(kind).name](site, **config.part(kind).args) for kind, registry in kinds.items()]
        pruner = cls(*parts)
        if Stat.SUMMARY in pruner.needs and not site.has_summary:
            raise ValueError(
                f"scorer={str(config.scorer)!r} reads the attention of a summary token (Stat.SUMMARY), and the "
                f"{site.tower} tower has none: write scorer='self_attention' or scorer='alignment', "
                "or leave the tower alone with at={'other tower': None}"
            )
        return pruner

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Verdict:
        """tokens: the block's input -> the plan for its output. ValueError for soft training of a keeper without a margin."""
        scores = self.scorer(tokens, stats, guidance)
        presence = counted = None
        if self.training and self.softness > 0:
            presence, counted = (self._presence(one, tokens, guidance) for one in (scores, scores.detach()))
            counts = segments.count((presence > self.gone) & tokens.free, tokens.layout)
        else:
            counts = self.keeper(scores, tokens, guidance)
        if not self.scorer.site.has_summary:
            counts = counts.clamp(min=1)  # where nothing is protected, the last token stays all the same
        return Verdict(self.reducer(tokens, scores, counts, stats), scores, presence, counted)

    def _presence(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        margin = self.keeper.margin(scores, tokens, guidance)
        return (margin / self.softness).sigmoid().to(scores.dtype).masked_fill(tokens.protected, 1.0)


@dataclass(frozen=True)
class Step:
    """One depth of a trace. position, protected [total] and lengths are those of the tokens that left the block.

    expected [batch]: how many they are where some are there in part, in soft training; else None. scored: the tokens that
    entered a block that prunes, and their scores [total], for losses on them; None without gradients.
    """

    position: Tensor
    protected: Tensor
    lengths: tuple[int, ...]
    reduction: Reduction | None
    reduced_early: bool
    guidance: Guidance | None
    expected: Tensor | None = None
    scored: tuple[PackedTokens, Tensor] | None = None


@dataclass(frozen=True)
class Decoded:
    """A piece of a decoder's work, summed over its rows (sentences, or beams of them), padding included.

    tokens    new tokens that went through the layers
    words     those of them whose next token's logits were made
    pairs     of a new token and one of its own row, itself and later ones included, that attention multiplied
    memories  those whose keys and values were made
    gathered  [captions, anchors, anchor dim]: what the guide's anchors gathered from captions, while training
    """

    tokens: int = 0
    words: int = 0
    pairs: int = 0
    memories: int = 0
    gathered: Tensor | None = None


@dataclass(frozen=True)
class PruneTrace:
    """What one call of one tower did.

    tower    its name; encoder, the PrunedEncoder that ran
    entered  tokens per instance that entered the first block, protected ones included
    steps    one Step a depth
    beside   what the blocks got besides their tokens (memory, rotary tables), one entry a depth
    inputs   what the tower was called with, as its host's `open` takes it
    decoded  what a decoder then did that looks at what the tower returned, in order
    left     the tokens that left the last block, before the host's final norm; None while the tower still runs
    """

    tower: str
    encoder: PrunedEncoder
    entered: PackedTokens
    inputs: tuple[Any, ...]
    beside: tuple[Any, ...]
    steps: list[Step] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)
    left: PackedTokens | None = None

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Per depth, per instance: tokens leaving the block, protected ones included."""
        return tuple(step.lengths for step in self.steps)

    @property
    def aligned(self) -> Tensor:
        """What the guide's anchors gathered over all pruned depths, [batch, anchors, anchor dim].

        The sum over blocks that `losses.alignment` compares between towers; with gradients
        enabled, all blocks of a tower that is pruned nowhere. LookupError without a guide.
        """
        pooled = [step.guidance.pooled for step in self.steps if step.guidance is not None]
        if not pooled:
            raise LookupError(f"the {self.tower} tower has no guide at any depth: prune it with guide='codebook'")
        return torch.stack(pooled).sum(0)

    @property
    def summary(self) -> Tensor:
        """What speaks for each instance behind the last block, [batch, dim]: its summary token, or the mean of what is left."""
        assert self.left is not None
        left = self.left
        if left.summary is not None:
            return left.read(left.summary)
        total = segments.sum(left.x * left.weight[:, None], left.layout)
        return total / segments.sum(left.weight, left.layout)[:, None]

    @property
    def spoken(self) -> Tensor:
        """What the guide's anchors gathered from captions that a decoder then read, [captions, anchors, anchor dim].

        `losses.alignment(trace.aligned, trace.spoken)` aligns an image with its captions, as `aligned` of two towers does.
        LookupError where no decoder read captions under the guide, with gradients, while this was collected.
        """
        gathered = [decoded.gathered for decoded in self.decoded if decoded.gathered is not None]
        if not gathered:
            raise LookupError(
                f"no captions were read behind the {self.tower} tower: call a pruned BlipCaption with gradients enabled, on "
                "images and captions, pruned with guide='codebook'"
            )
        return torch.cat(gathered)

    def owners(self, depth: int) -> Tensor:
        """Provenance, [entered total] int64: the row, among tokens leaving block `depth`, that holds each; -1 if dropped."""
        owner = torch.arange(self.entered.layout.total, device=self.entered.x.device)
        for step in self.steps[: depth + 1]:
            if step.reduction is not None:
                target = step.reduction.target()
                owner = torch.where(owner >= 0, target[owner.clamp(min=0)], owner)
        return owner


_collectors: ContextVar[tuple[list[PruneTrace], ...]] = ContextVar("collectors", default=())


@contextlib.contextmanager
def collect() -> Iterator[list[PruneTrace]]:
    """Within the `with` block, a list of the traces of every pruned tower that runs, in order; also in foreign code."""
    traces: list[PruneTrace] = []
    token = _collectors.set((*_collectors.get(), traces))
    try:
        yield traces
    finally:
        _collectors.reset(token)


def is_collecting() -> bool:
    """Whether anybody collects."""
    return bool(_collectors.get())


def tell_collectors(decoded: Decoded) -> None:
    """A decoder says what it did: it goes to the trace of the tower that ran last, which is the one it looks at."""
    for traces in _collectors.get():
        if traces:
            traces[-1].decoded.append(decoded)


class PrunedEncoder(nn.Module):
    """A tower that prunes its tokens. `host` is the dense tower itself, untouched, with which it shares its weights.

    Calling it takes what the host takes and returns what the host returns.
    """

    def __init__(self, host: nn.Module, adapter: Host, config: PruneConfig, guide: AlignmentGuide | None, tower: str):
        super().__init__()
        self.host, self.guide, self.adapter, self.tower = host, guide, adapter, tower
        depths = config.depths(tower, len(adapter.blocks(host)))
        sites = [replace(adapter.site(host, d, tower), before=i) for i, d in enumerate(depths)]
        self.pruners = nn.ModuleDict({str(site.depth): Pruner.build(config, site) for site in sites})
        self.train(host.training)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        tokens, beside = self.encode(*inputs, **named)
        return self.adapter.answer(self.host, self.adapter.close(self.host, tokens, beside), **named)

    def encode(self, *inputs: Any, **named: Any) -> tuple[PackedTokens, tuple[Any, ...]]:
        """Tokens that leave the last block, before the host's final norm and pooling; and what stood beside the blocks."""
        self._warn_of_noise()
        inputs = self.adapter.call(self.host, *inputs, **named)
        tokens, beside = self.adapter.open(self.host, *inputs)
        traces = [PruneTrace(self.tower, self, tokens, inputs, beside) for _ in _collectors.get()]
        recompute = self.training and torch.is_grad_enabled() and self.adapter.recomputes(self.host)
        run = partial(checkpoint, self._block, use_reentrant=False) if recompute else self._block
        for depth, block in enumerate(self.adapter.blocks(self.host)):
            tokens, step = run(depth, block, tokens, beside[depth])
            for trace in traces:
                trace.steps.append(step)
        for collector, trace in zip(_collectors.get(), traces, strict=True):
            collector.append(replace(trace, left=tokens))
        return tokens, beside

    def _block(self, depth: int, block: nn.Module, tokens: PackedTokens, beside: Any) -> tuple[PackedTokens, Step]:
        adapter, pruner = self.adapter, self.pruner(depth)
        q, k, v = adapter.qkv(block, tokens, beside)
        room: dict[str, Any] = {"causal": adapter.causal(self.host), "dropout": adapter.attention_dropout(block)}
        room |= {"key_bias": tokens.bias, "pairs": adapter.pairs(block, tokens, beside)}
        scale, guidance, verdict = adapter.scale(block), None, Verdict(None)

        if pruner is None:
            context = attend(q, k, v, tokens.layout, scale, **room)
            if self.guide is not None and not self.pruners and is_collecting() and torch.is_grad_enabled():
                guidance = self.guide(tokens, self.tower)  # so that the other tower has something to be aligned with
        else:
            context, stats = attend_with_stats(q, k, v, tokens, scale, pruner.needs, **room)
            guidance = self.guide(tokens, self.tower) if self.guide is not None else None
            verdict = pruner(tokens, stats, guidance)
        plan = verdict.plan
        scored = (tokens, verdict.scores) if verdict.scores is not None and torch.is_grad_enabled() else None

        # an affine map commutes with averaging: reducing first, the output projection runs on what stays
        early = plan is not None and plan.is_affine and adapter.mixes_affinely(block)
        if verdict.presence is not None:
            tokens = tokens.fade(verdict.presence, verdict.counted)
        if plan is not None and early:
            tokens, context = plan.tokens(tokens), plan.values(context)
        tokens = adapter.mix(block, tokens, context)
        if plan is not None and not early:
            tokens = plan.tokens(tokens)
        tokens = adapter.feed(block, tokens, beside)
        expected = None if tokens.presence is None else tokens.expected
        lengths = tokens.layout.lengths
        return tokens, Step(tokens.position, tokens.protected, lengths, plan, early, guidance, expected, scored)

    def pruner(self, depth: int) -> Pruner | None:
        """The pruner at a depth, None where nothing is pruned."""
        pruner = self.pruners[str(depth)] if str(depth) in self.pruners else None  # noqa: SIM401 (ModuleDict has no get)
        assert pruner is None or isinstance(pruner, Pruner)
        return pruner

    def _warn_of_noise(self) -> None:
        if self.training or self.guide is None or not self.pruners or not self.guide.is_untrained:
            return
        warnings.warn(
            f"the {self.tower} tower is pruned by an alignment guide whose anchors are untrained noise: load trained "
            "weights, train it, or place the anchors with vltprune.budget.fit_guide(model, batches)",
            UntrainedGuideWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class Pruning:
    """What `prune` made of a model: its config, the dense model, the guide that its towers share, the pruned towers."""

    config: PruneConfig
    host: nn.Module
    guide: AlignmentGuide | None
    towers: Mapping[str, PrunedEncoder]
