"""The loop over depths: a tower taken apart by its host, with pruners between its attention and the rest of each block."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import segments
from .attention import AttentionStats, Stat, attend, attend_with_stats
from .checks import is_traced
from .config import PruneConfig
from .layers import AlignmentGuide, Guidance, KeepRatioPredictor, Reduction, Site, TokenReducer, TokenScorer
from .layers.printing import remember_arguments
from .layers.reducers import best
from .naming import fqn_modifiers, use_dense_names
from .record import Noted
from .registry import keepers, reducers, scorers
from .ties import tied
from .tokens import PackedTokens
from .traces import PruneTrace, Step, collectors
from .wrappers import is_sharded

if TYPE_CHECKING:
    from .hosts.base import Host


M = TypeVar("M", bound=nn.Module)

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UntrainedGuideWarning(UserWarning):
    """An alignment guide decides what to prune while its anchors are still noise."""


@dataclass(frozen=True)
class Verdict:
    """What a pruner says of tokens: scores [total], in single precision, those that are equal within rounding made equal; and
    the plan, None where all stay; in soft training also how much of each.

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
        parts = []
        for kind, registry in kinds.items():
            part = config.part(kind, site.tower)
            parts.append(registry[part.name](site, **part.args))
            remember_arguments(parts[-1], registry[part.name], part.args)
        pruner = cls(*parts)
        if Stat.SUMMARY in pruner.needs and not site.has_summary:
            raise ValueError(
                f"scorer={str(config.scorer)!r} reads the attention of a summary token (Stat.SUMMARY), and the "
                f"{site.tower} tower has none: write scorer='self_attention' or scorer='alignment', "
                "or leave the tower alone with at={'other tower': None}"
            )
        return pruner

    def forward(
        self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None, least: int = 0
    ) -> Verdict:
        """tokens: the block's input -> the plan for its output.

        least: how many unprotected tokens of each instance stay in any case, the best by score. ValueError for soft training
        of a keeper without a margin, and under torch.jit.trace for counts that depend on what tokens hold.
        """
        soft = self.training and self.softness > 0
        if is_traced() and (soft or not self.keeper.fixed):
            raise ValueError(
                "torch.jit.trace would keep this example's counts for every other input, and "
                f"{'soft training' if soft else type(self.keeper).__name__} counts tokens by what they hold: prune with "
                "keep='ratio(...)' or keep='count(...)', whose counts are the same for all inputs of one shape, or run the "
                "model without tracing it"
            )
        with torch.autocast(tokens.x.device.type, enabled=False):  # which would take sums of scores in half
            return self._judge(tokens, stats, guidance, soft, least)

    def _judge(
        self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None, soft: bool, least: int
    ) -> Verdict:
        scores = segments.settle(self.scorer(tokens, stats, guidance).float(), tokens.layout)
        presence = counted = None
        if soft:
            whole = best(tokens, scores, tokens.layout.sizes.new_full((tokens.layout.batch,), least))
            presence, counted = (self._presence(one, tokens, guidance, whole) for one in (scores, scores.detach()))
            counts = segments.count((presence > self.gone) & tokens.free, tokens.layout)
        else:
            counts = self.keeper(scores, tokens, guidance)
        counts = counts.clamp(min=least)
        return Verdict(self.reducer(tokens, scores, counts, stats), scores, presence, counted)

    def _presence(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None, whole: Tensor) -> Tensor:
        """[total]: how much of each token stays; all of those that are `whole` [total] bool, which stay in any case."""
        margin = self.keeper.margin(scores, tokens, guidance)
        return (margin / self.softness).sigmoid().to(scores.dtype).masked_fill(whole, 1.0)


def born_like(host: nn.Module, build: Callable[..., M], *args: Any, **named: Any) -> M:
    """What `build` makes of the arguments, in the floating-point type and on the device of the host's weights.

    It is made on the CPU, whatever the default device, so that what is drawn at random is the same on each. Hosts without
    such weights, as some quantized ones, leave it in single precision.
    """
    with torch.device("cpu"):
        part = build(*args, **named)
    weights = chain(host.parameters(), host.buffers())
    first = next(weights, None)
    if first is None:
        return part.to("cpu", torch.float32)
    floating = (weight.dtype for weight in chain((first,), weights) if weight.dtype in _FLOATING)
    return part.to(first.device, next(floating, torch.float32))


class PrunedEncoder(Noted, nn.Module):
    """A tower that prunes its tokens. `host` is the dense tower itself, untouched, with which it shares its weights.

    Calling it takes what the host takes and returns what the host returns. Its state dict has the host's own names, and
    `pruners.*` and `guide.*` beside them. A tower of a composite model leaves the guide to that model, whose towers share it,
    and so the host where that is the composite model itself: no tensor is registered twice.
    """

    host: nn.Module
    guide: AlignmentGuide | None

    def __init__(
        self,
        host: nn.Module,
        adapter: Host,
        config: PruneConfig,
        guide: AlignmentGuide | None,
        tower: str,
        composite: nn.Module | None = None,
    ):
        super().__init__()
        self.adapter, self.tower = adapter, tower
        self._hold("host", host, is_child=host is not composite)
        self._hold("guide", guide, is_child=composite is None)
        self.pruners = self.build_pruners(config)
        use_dense_names(self)
        self.training = host.training  # not by `train`, which would change the host's own modules
        self.pruners.train(host.training)

    def build_pruners(self, config: PruneConfig) -> nn.ModuleDict:
        """New pruners of a config for this tower, by depth; the tower stays as it is."""
        blocks = self.adapter.blocks(self.host)
        depths = config.depths(self.tower, len(blocks))
        sites = [replace(self.adapter.site(self.host, d, self.tower), before=i) for i, d in enumerate(depths)]
        pruners = {str(site.depth): born_like(blocks[site.depth], Pruner.build, config, site) for site in sites}
        return nn.ModuleDict(pruners)

    def _hold(self, name: str, module: nn.Module | None, is_child: bool) -> None:
        """As a child, or as an attribute that the module tree does not have: the composite model has it."""
        if is_child:
            setattr(self, name, module)
        else:
            object.__setattr__(self, name, module)

    @property
    def _dense(self) -> nn.Module:
        return self.host

    def _fqn_modifiers(self) -> dict[str, str]:
        """torch.distributed.checkpoint asks for this."""
        return fqn_modifiers(self)

    def _replicate_for_data_parallel(self) -> PrunedEncoder:
        if self.__dict__.get("host") is not None or self.__dict__.get("guide") is not None:
            raise RuntimeError(
                f"DataParallel over several devices cannot copy the {self.tower} tower, which shares its guide with other "
                "towers: use torch.nn.parallel.DistributedDataParallel, one process a device (torchrun, accelerate launch), or "
                "show one device to this process (CUDA_VISIBLE_DEVICES=0)"
            )
        return super()._replicate_for_data_parallel()

    def extra_repr(self) -> str:
        return f"tower={self.tower!r}, at=({', '.join(self.pruners)})"

    def __setattr__(self, name: str, value: Any) -> None:
        """AttributeError for a module that is the dense tower's to have, such as a new head: here nothing would run it."""
        modules = self.__dict__.get("_modules", {})
        if (
            isinstance(value, nn.Module)
            and "host" in modules
            and name not in modules
            and name in modules["host"]._modules
        ):
            raise AttributeError(f"{name} is a module of the dense tower, which is run: write pruned.host.{name} = ...")
        super().__setattr__(name, value)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        tokens, beside = self.encode(*inputs, **named)
        return self.adapter.answer(self.host, self.adapter.close(self.host, tokens, beside), **named)

    def encode(self, *inputs: Any, **named: Any) -> tuple[PackedTokens, tuple[Any, ...]]:
        """Tokens that leave the last block, before the host's final norm and pooling; and what stood beside the blocks."""
        self._warn_of_noise()
        inputs = self.adapter.call(self.host, *inputs, **named)
        tokens, beside = self.adapter.open(self.host, *inputs)
        collecting = collectors()  # asked once: gradient checkpointing runs blocks again when nobody collects any more
        traces = [PruneTrace(self.tower, self, tokens, inputs, beside) for _ in collecting]
        recompute = self.training and torch.is_grad_enabled() and self.adapter.recomputes(self.host)
        run = partial(checkpoint, self._block, use_reentrant=False) if recompute else self._block
        guide = self.guide.bind(self.tower) if self.guide is not None else None
        for depth, block in enumerate(self.adapter.blocks(self.host)):
            if is_sharded(block):
                raise RuntimeError(
                    f"block {depth} of the {self.tower} tower is sharded by FSDP, which gathers weights where a module is "
                    "called, and a pruned tower calls the parts of its blocks: shard the whole model alone, fully_shard(model)"
                )
            tokens, step = run(depth, block, tokens, beside[depth], guide)
            for collector, trace in zip(collecting, traces, strict=True):
                trace.steps.append(replace(step, tokens=tokens) if collector.tokens else step)
        if self.training:
            tokens = tied(tokens, self.pruners, self.guide)
        for collector, trace in zip(collecting, traces, strict=True):
            collector.add(replace(trace, left=tokens))
        return tokens, beside

    def _block(
        self,
        depth: int,
        block: nn.Module,
        tokens: PackedTokens,
        beside: Any,
        guide: Callable[[PackedTokens], Guidance] | None,
    ) -> tuple[PackedTokens, Step]:
        adapter, pruner = self.adapter, self.pruner(depth)
        q, k, v = adapter.qkv(block, tokens, beside)
        room: dict[str, Any] = {"causal": adapter.causal(self.host), "dropout": adapter.attention_dropout(block)}
        room |= {"key_bias": tokens.bias, "pairs": adapter.pairs(block, tokens, beside)}
        scale, relate, verdict = adapter.scale(block), None, Verdict(None)

        if pruner is None:
            context = attend(q, k, v, tokens.layout, scale, **room)
            if guide is not None and not self.pruners and torch.is_grad_enabled():
                relate = partial(guide, tokens)  # so that the other tower has something to be aligned with, if it asks
        else:
            context, stats = attend_with_stats(q, k, v, tokens, scale, pruner.needs, **room)
            guidance = guide(tokens) if guide is not None else None
            relate = None if guidance is None else lambda: guidance
            verdict = pruner(tokens, stats, guidance, self._least(pruner))
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
        return tokens, Step(tokens.position, tokens.protected, lengths, plan, early, relate, expected, scored)

    def _least(self, pruner: Pruner) -> int:
        """How many unprotected tokens must stay: one, where nothing else is there to answer with. Asked at each call, for the
        pooling of a tower may be exchanged."""
        return int(not pruner.scorer.site.has_summary or self.adapter.pools_free(self.host))

    def pruner(self, depth: int) -> Pruner | None:
        """The pruner at a depth, None where nothing is pruned."""
        pruner = self.pruners[str(depth)] if str(depth) in self.pruners else None  # noqa: SIM401 (ModuleDict has no get)
        assert pruner is None or isinstance(pruner, Pruner)
        return pruner

    def _warn_of_noise(self) -> None:
        if self.training or self.guide is None or not self.pruners or is_traced() or not self.guide.is_untrained:
            return
        warnings.warn(
            f"the {self.tower} tower is pruned by an alignment guide whose anchors are untrained noise: load trained "
            "weights, train it, or place the anchors with vltprune.budget.fit_guide(model, batches)",
            UntrainedGuideWarning,
            stacklevel=3,
        )
