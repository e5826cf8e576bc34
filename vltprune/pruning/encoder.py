"""PrunedEncoder: a tower that its host runs block by block, with pruners before, in and behind its blocks."""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.checks import is_recorded
from ..core.modality import COLUMN
from ..core.statistics import AttentionStats, Stat
from ..core.tokens import PackedTokens
from ..hosts.base import Host
from ..layers import AlignmentGuide, BoundGuide, Guidance, check_batch, with_grid, with_raters
from ..utils.wrappers import is_sharded
from .block_attention import BlockAttention
from .config import PruneConfig
from .ddp import reach_weights
from .pruner import PruneDecision, Pruner, UntrainedGuideWarning, build_like
from .stage import Place
from .state_dict import fqn_modifiers, use_dense_names
from .tower import Tower, pruned_depths, pruner_key
from .trace import LayerTrace, PruneStep, PruneTrace, active_collectors


@dataclass(frozen=True)
class Pruning:
    """The record of how a model is pruned.

    Attributes:
        config: the config that it was pruned with, and values that calibration set since.
        host: the dense model.
        guide: the alignment guide that the towers share. None without one.
        towers: the pruned towers by name.
    """

    config: PruneConfig
    host: nn.Module
    guide: AlignmentGuide | None
    towers: Mapping[str, PrunedEncoder]


class PrunedEncoder(Tower):
    """A tower that prunes its tokens: it takes what the dense tower takes and returns what that returns.

    `host` is the dense tower itself, unchanged, with which it shares its weights. The state dict has the dense tower's own
    names, and `pruners.*` and `guide.*`. A composite model registers the guide itself, because its towers share it. It also
    registers the host where that is the composite model itself: no tensor is registered twice.

    Args:
        host: the dense tower.
        adapter: the Host that runs it.
        config: what to prune where.
        guide: the alignment guide of the model. None without one.
        tower: the tower's name.
        composite: the dense composite model that it is a tower of. None for a model by itself.
    """

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
        self.places = tuple(stage.place for stage in config.stages)
        use_dense_names(self)
        self.training = host.training  # not by `train`, which would change the host's own modules
        self.pruners.train(host.training)

    def build_pruners(self, config: PruneConfig) -> nn.ModuleDict:
        """Builds the pruners of a config for this tower, by depth. The tower is unchanged."""
        blocks = self.adapter.blocks(self.host)
        has_query = self.guide is not None and self.guide.gives_query(self.tower)
        pruners = {}
        for number, stage in enumerate(config.stages):
            for before, depth in enumerate(stage.depths(self.tower, len(blocks))):
                spec = replace(self.adapter.spec(self.host, depth, self.tower), before=before, has_query=has_query)
                pruners[pruner_key(depth, number)] = build_like(blocks[depth], Pruner.build, stage, spec)
        return nn.ModuleDict(pruners)

    def _hold(self, name: str, module: nn.Module | None, is_child: bool) -> None:
        """Sets a module as a child, or as an attribute outside the module tree, where the composite model registers it."""
        if is_child:
            setattr(self, name, module)
        else:
            object.__setattr__(self, name, module)

    @property
    def pruning(self) -> Pruning:
        """How the tower is pruned, where it is a model by itself. AttributeError for a tower of a composite model."""
        if "_pruning" not in self.__dict__:
            raise AttributeError(f"the {self.tower} tower is no model by itself: its composite model has `pruning`")
        # a record that held its tower would be a reference cycle, and keep the weights of a deleted model in memory
        return replace(self.__dict__["_pruning"], towers={self.tower: self})

    @pruning.setter
    def pruning(self, record: Pruning) -> None:
        self.__dict__["_pruning"] = replace(record, towers={})

    @property
    def decides_softly(self) -> bool:
        """Whether it is in soft training, where tokens stay with a probability."""
        pruners = self.pruners.values() if self.training else ()
        return any(isinstance(pruner, Pruner) and pruner.soft_temperature > 0 for pruner in pruners)

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
        return f"tower={self.tower!r}, at=({', '.join(map(str, pruned_depths(self)))})"

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        """AttributeError for a module of the dense tower, such as a new head: set here, nothing would run it."""
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
        tokens, block_inputs = self.encode(*inputs, **named)
        return self.adapter.format_output(self.host, self.adapter.head(self.host, tokens, block_inputs), **named)

    def encode(self, *inputs: Any, **named: Any) -> tuple[PackedTokens, tuple[object, ...]]:
        """Runs the tower up to its last block.

        Args:
            *inputs: what the dense tower takes.
            **named: the same by keyword.

        Returns:
            The tokens that left the last block, before the host's final norm and pooling, and the inputs of the blocks.

        Raises:
            RuntimeError: for a block that FSDP sharded by itself.
            TypeError: for arguments that the dense tower does not take.
            ValueError: for inputs that the dense tower cannot take, and for a text query that is missing or does not fit.
        """
        self._warn_of_noise()
        inputs = self.adapter.bind_arguments(self.host, *inputs, **named)
        guide = self._bind_guide()
        tokens, block_inputs = self.adapter.embed(self.host, *inputs)
        guide = self._fit_guide(guide, tokens, block_inputs)
        tokens = self._with_columns(tokens, inputs)
        # once: gradient checkpointing runs blocks again when nobody collects any more
        collecting = active_collectors()
        query, project = (None, None) if guide is None else (guide.query, guide.project)
        traces = [
            PruneTrace(self.tower, self, tokens, inputs, block_inputs, query=query, project=project) for _ in collecting
        ]
        recompute = self.training and torch.is_grad_enabled() and self.adapter.gradient_checkpointing(self.host)
        run = partial(checkpoint, self._block, use_reentrant=False) if recompute else self._block
        for depth, block in enumerate(self.adapter.blocks(self.host)):
            if is_sharded(block):
                raise RuntimeError(
                    f"block {depth} of the {self.tower} tower is sharded by FSDP, which gathers weights where a module is "
                    "called, and a pruned tower calls the parts of its blocks: shard the whole model alone, fully_shard(model)"
                )
            tokens, step = run(depth, block, tokens, block_inputs[depth], guide)
            for collector, trace in zip(collecting, traces, strict=True):
                trace.layers.append(replace(step, tokens=tokens) if collector.tokens else step)
        if self.training:
            tokens = reach_weights(tokens, self.pruners, self.guide)
        for collector, trace in zip(collecting, traces, strict=True):
            collector.add(replace(trace, output_tokens=tokens))
        return tokens, block_inputs

    def _bind_guide(self) -> BoundGuide | None:
        """The guide for one call. None without one, and for a text query where this tower is not pruned."""
        if self.guide is None or (self.guide.queried and not self.pruners):
            return None
        return self.guide.bind(self.tower)

    def _fit_guide(
        self, guide: BoundGuide | None, tokens: PackedTokens, block_inputs: tuple[Any, ...]
    ) -> BoundGuide | None:
        """The guide of the tokens and block inputs that `embed` returned. ValueError for texts of another batch."""
        if guide is not None:
            check_batch(guide, tokens, self.tower)
        return guide

    def _block(
        self,
        depth: int,
        block: nn.Module,
        tokens: PackedTokens,
        block_input: object,
        guide: BoundGuide | None,
    ) -> tuple[PackedTokens, LayerTrace]:
        adapter, inside, behind = self.adapter, self.pruners_at(depth, "attention"), self.pruners_at(depth, "block")
        qkv = relate = guidance = scored = looked = None
        steps: tuple[PruneStep, ...] = ()
        if "before" in self.places:
            attention = self._attention(block, tokens, block_input, guide)
            decisions, guidance, qkv = self._decide_before(depth, attention, guide)
            looked, scored = attention.regions, _scored(tokens, decisions)
            tokens, steps = apply_decisions(decisions, tokens, "before")
        attention = self._attention(block, tokens, block_input, guide)
        q, k, v = qkv or adapter.qkv(block, tokens, block_input)
        adapter.store(block, tokens, k, v, block_input)
        needs = self._needs((*inside, *behind), tokens)
        context, stats = attention.attend(q, k, v, needs)
        if needs is None and guide is not None and (inside or behind or (not self.pruners and torch.is_grad_enabled())):
            # for whoever reads it, such as the alignment loss with the other tower
            relate = partial(guide, tokens)

        decisions, found = self._decide(inside, tokens, stats, guide)
        guidance, scored = guidance or found, scored or _scored(tokens, decisions)
        tokens, inner_steps, early = self._project(block, tokens, context, decisions)
        steps += inner_steps
        tokens = adapter.feed_forward(block, tokens, block_input)
        if behind:
            for decision in decisions:
                stats = decision.carry(stats)
            decisions, found = self._decide(behind, tokens, stats, guide)
            guidance, scored = guidance or found, scored or _scored(tokens, decisions)
            tokens, outer_steps = apply_decisions(decisions, tokens, "block")
            steps += outer_steps
        trace = LayerTrace(
            tokens.position,
            tokens.protected,
            tokens.layout,
            steps,
            early,
            relate if guidance is None else lambda: guidance,
            steps[-1].expected if steps else None if tokens.keep_prob is None else tokens.expected,
            scored,
            modality=tokens.columns.get(COLUMN),
            regions=attention.regions,
            looked=looked,
        )
        return tokens, trace

    def _attention(
        self, block: nn.Module, tokens: PackedTokens, block_input: object, guide: BoundGuide | None
    ) -> BlockAttention:
        regions, text = self.adapter.regions(block, tokens, block_input), None if guide is None else guide.text
        return BlockAttention(self.adapter, self.host, block, tokens, block_input, regions, text)

    def _decide_before(
        self, depth: int, attention: BlockAttention, guide: BoundGuide | None
    ) -> tuple[list[PruneDecision], Guidance | None, tuple[Tensor, ...] | None]:
        """The decisions of the pruners before a block, by its own queries and keys, and the guidance of the first.

        The third is query, key and value of the tokens that they leave; None where these are still to be computed.
        """
        pruners, tokens, qkv, stats = self.pruners_at(depth, "before"), attention.tokens, None, AttentionStats()
        needs = self._needs(pruners, tokens)
        if needs:
            qkv = self.adapter.qkv(attention.block, tokens, attention.block_input)
            stats = attention.statistics(*qkv, needs)
        decisions, guidance = self._decide(pruners, tokens, stats, guide)
        for plan in (decision.plan for decision in decisions if decision.plan is not None):
            # those of a token that stays are what they were; those of a sum are not the sum of its sources'
            again = attention.regions is not None or plan.merged is not None
            qkv = None if qkv is None or again else tuple(map(plan.values, qkv))
        return decisions, guidance, qkv

    def _project(
        self, block: nn.Module, tokens: PackedTokens, context: Tensor, decisions: Sequence[PruneDecision]
    ) -> tuple[PackedTokens, tuple[PruneStep, ...], bool]:
        """The tokens that decisions leave, the record of each, and whether the output projection ran on those alone."""
        plans = [decision.plan for decision in decisions if decision.plan is not None]
        # an affine map commutes with averaging: reducing first, the output projection runs on what stays
        early = bool(plans) and all(plan.is_affine for plan in plans) and self.adapter.projects_affinely(block)
        if not early:
            return *apply_decisions(decisions, self.adapter.project(block, tokens, context)), False
        tokens, steps = apply_decisions(decisions, tokens)
        for plan in plans:
            context = plan.values(context)
        return self.adapter.project(block, tokens, context), steps, True

    def _needs(self, pruners: Sequence[Pruner], tokens: PackedTokens) -> Stat | None:
        """The statistics that the pruners of a block read of the tokens that enter it. None where all of them are idle."""
        if not torch.is_grad_enabled():  # losses read the scores
            idle = itertools.takewhile(lambda pruner: pruner.is_idle(tokens, self._least(pruner)), pruners)
            pruners = pruners[len(list(idle)) :]
        return functools.reduce(operator.or_, (pruner.needs for pruner in pruners)) if pruners else None

    def _decide(
        self,
        pruners: Sequence[Pruner],
        tokens: PackedTokens,
        stats: AttentionStats,
        guide: BoundGuide | None,
    ) -> tuple[list[PruneDecision], Guidance | None]:
        """The decisions of pruners at one place, each on what the one before leaves, and the guidance of the first."""
        decisions: list[PruneDecision] = []
        first = guidance = None
        for pruner in pruners:
            if decisions:
                tokens, stats = decisions[-1].apply(tokens), decisions[-1].carry(stats)
            is_idle = pruner.is_idle(tokens, self._least(pruner))
            if is_idle and not torch.is_grad_enabled():
                decisions.append(PruneDecision(None, is_idle=True))
                continue
            if guide is not None and (guidance is None or decisions[-1].plan is not None):
                guidance = guide(tokens)
                first = guidance if first is None else first
            decision = pruner(tokens, stats, guidance, self._least(pruner))
            if is_idle and decision.keep_prob is None:
                decision = replace(decision, is_idle=True)  # for its cost, which is that of inference
            decisions.append(decision)
        return decisions, first

    def _least(self, pruner: Pruner) -> int:
        """How many unprotected tokens must stay: one, where the tower's output is computed from them alone.

        It is asked at each call, because the pooling of a tower may be replaced. A tower of two modalities has a text.
        """
        spec = pruner.scorer.spec
        return int(not (spec.has_summary or spec.modalities) or self.adapter.pools_unprotected(self.host))

    def _with_columns(self, tokens: PackedTokens, inputs: tuple[Any, ...]) -> PackedTokens:
        """The tokens with the grid of their patches, and with marks on raters, where a part reads them."""
        pruners = [pruner for pruner in self.pruners.values() if isinstance(pruner, Pruner)]
        if any(Stat.FROM_RATERS in pruner.needs for pruner in pruners):
            tokens = with_raters(tokens)
        if not any(pruner.reads_grid for pruner in pruners):
            return tokens
        is_image = isinstance(inputs[0], Tensor) and inputs[0].dim() >= 4
        return with_grid(tokens, tuple(inputs[0].shape[-2:]) if is_image else None)

    def _warn_of_noise(self) -> None:
        if self.training or self.guide is None or not self.pruners or is_recorded() or not self.guide.is_untrained:
            return
        warnings.warn(
            f"the {self.tower} tower is pruned by an alignment guide whose anchors are untrained noise: load trained "
            "weights, train it, or place the anchors with vltprune.fit_guide(model, batches)",
            UntrainedGuideWarning,
            stacklevel=3,
        )


def apply_decisions(
    decisions: Iterable[PruneDecision], tokens: PackedTokens, place: Place = "attention"
) -> tuple[PackedTokens, tuple[PruneStep, ...]]:
    """Applies decisions, one after the other.

    Args:
        decisions: the decisions.
        tokens: the tokens that the first one is of.
        place: where in a block they stand.

    Returns:
        The tokens that they leave, and the record of each.
    """
    steps = []
    for decision in decisions:
        tokens = decision.apply(tokens)
        expected = None if tokens.keep_prob is None else tokens.expected
        steps.append(PruneStep(tokens.layout, decision.plan, expected, place, decision.is_idle))
    return tokens, tuple(steps)


def _scored(tokens: PackedTokens, decisions: Sequence[PruneDecision]) -> tuple[PackedTokens, Tensor] | None:
    """Tokens with the scores of the first decision, for losses. None for no decision, and without gradients."""
    scores = decisions[0].scores if decisions and torch.is_grad_enabled() else None
    return None if scores is None else (tokens, scores)
