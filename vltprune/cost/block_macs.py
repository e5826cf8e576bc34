"""MACs of single blocks: what a block and its pruner compute, as arithmetic of how many tokens enter and leave."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..core import precision
from ..core.layout import Layout
from ..core.statistics import Stat
from ..core.tokens import PackedTokens
from ..hosts.base import Host
from ..hosts.linear_maps import measure_macs
from ..layers import Reduction
from ..pruning.pruner import Pruner
from ..pruning.trace import LayerTrace, PruneStep
from ..utils.structure import modules_of


@dataclass(frozen=True)
class BlockMacs:
    """MACs of a block's matrix products.

    Attributes:
        heads: the number of attention heads.
        head_dim: the width of a head.
        qkv: per token, of query, key and value.
        project: per token, of the projection behind attention.
        feed_forward: per token, of the rest of the block.
        memory: per memory token, of its keys and values, where the block cross-attends to a memory.
        pair: per pair of token and memory token.
        rows: how many rows of attention a token is.
    """

    heads: int
    head_dim: int
    qkv: float
    project: float
    feed_forward: float
    memory: float = 0.0
    pair: float = 0.0
    rows: int = 1

    @property
    def width(self) -> int:
        """heads * head_dim: attention takes 2 * width per pair of rows."""
        return self.heads * self.head_dim

    @classmethod
    def from_block(cls, adapter: Host, block: nn.Module, like: PackedTokens, block_input: object) -> BlockMacs:
        """Measures a block on one token and two, with memories of one token and two.

        Args:
            adapter: the Host that runs the block.
            block: the dense block.
            like: tokens of the tower, for their width, dtype and device.
            block_input: what the block gets besides its tokens, for one instance.

        Returns:
            The MACs per token, per memory token and per pair of both.
        """
        one = blank_tokens(like, 1)
        with torch.no_grad():
            query = adapter.qkv(block, one, block_input)[0]
        qkv = measure_macs(adapter.qkv, block, one, block_input)
        project = measure_macs(adapter.project, block, one, torch.zeros_like(query))
        rest = _feed_forward_macs(partial(adapter.feed_forward, block), like, block_input)
        rows, heads, head_dim = query.shape
        return cls(heads, head_dim, qkv, project, *rest, rows=rows)

    def after_attention(self, tokens: Tensor, memory: Memory | None) -> Tensor:
        """MACs of what follows attention: feed-forward and cross-attention.

        Args:
            tokens: [batch], the number of tokens of each instance.
            memory: what the block cross-attends to. None for none.

        Returns:
            The MACs of each instance, [batch].
        """
        if memory is None:
            return self.feed_forward * tokens
        return self.feed_forward * tokens + (self.memory * memory.fraction + self.pair * tokens) * memory.tokens


def measure_blocks(
    adapter: Host, blocks: Iterable[nn.Module], like: PackedTokens, block_inputs: Sequence[object]
) -> Iterator[BlockMacs]:
    """Measures the MACs of each block of a tower.

    Blocks that differ in their weights alone, as most of a tower do, are measured once.

    Args:
        adapter: the Host that runs the blocks.
        blocks: the dense blocks, in order.
        like: tokens of the tower, for their width, dtype and device.
        block_inputs: what each block gets besides its tokens, for one instance.

    Yields:
        The BlockMacs of each block, in order.
    """
    measured: list[tuple[object, BlockMacs]] = []
    for block, block_input in zip(blocks, block_inputs, strict=True):
        sizes = {name: tensor.shape for name, tensor in chain(block.named_parameters(), block.named_buffers())}
        structure = (
            modules_of(block),
            sizes,
            [view.x.shape[-1] for view in block_input] if is_memory(block_input) else None,
        )
        macs = next((macs for other, macs in measured if other == structure), None)
        if macs is None:
            macs = BlockMacs.from_block(adapter, block, like, block_input)
            measured.append((structure, macs))
        yield macs


class BlockMeter:
    """MACs of one block with its pruners, from the tokens that enter and leave it.

    Args:
        macs: MACs of the block's matrix products.
        pruners: the block's pruners, in order; none where it is not pruned.
        guide: MACs per token of the guide that the pruners use.
        channels: the width of a token.
    """

    def __init__(self, macs: BlockMacs, pruners: Sequence[Pruner], guide: float, channels: int):
        self.macs, self.pruners, self.guide, self.channels = macs, pruners, guide, channels

    def dense(self, tokens: Tensor, memory: Memory | None, pairs: Tensor | None = None) -> Tensor:
        """MACs of the dense block.

        Args:
            tokens: [batch], the number of tokens of each instance.
            memory: what the block cross-attends to. None for none.
            pairs: [batch], the pairs of rows that attend to each other. None for all pairs of an instance's tokens.

        Returns:
            The MACs of each instance, [batch].
        """
        macs, pairs = self.macs, tokens**2 if pairs is None else pairs
        return (macs.qkv + macs.project) * tokens + 2 * macs.width * pairs + macs.after_attention(tokens, memory)

    def pruned(
        self,
        before: Tensor,
        text: Tensor | float,
        memory: Memory | None,
        layer: LayerTrace,
        pairs: Tensor | None = None,
        looked: Tensor | None = None,
    ) -> Tensor:
        """MACs of the pruned block, its pruners' own scoring included.

        Args:
            before: [batch], the number of tokens of each instance that enter the block.
            text: [batch], how many of them are of a text, where text and image are one sequence. 0 elsewhere.
            memory: what the block cross-attends to. None for none.
            layer: the block's trace, for what its pruners computed and left, and where.
            pairs: as in `dense`, of the tokens that attention reads.
            looked: as in `dense`, of the tokens that enter the block, before which pruners may stand.

        Returns:
            The MACs of each instance, [batch].
        """
        macs, width = self.macs, self.macs.width
        left = [step_tokens(step, before.device) for step in layer.steps]
        # of attention, and of what follows it
        outer = next((n for n, step in _backward(left, layer) if step.place == "before"), before)
        inner = next((n for n, step in _backward(left, layer) if step.place == "attention"), outer)
        pairs = outer**2 if pairs is None else pairs
        projected = inner if layer.reduced_early else outer
        block = macs.qkv * outer + 2 * width * pairs + macs.project * projected + macs.after_attention(inner, memory)

        acted = [
            (step.place == "before", pruner.needs)
            for pruner, step in zip(self.pruners, layer.steps, strict=False)
            if not step.is_idle
        ]
        read, needs = (
            functools.reduce(operator.or_, (needs for is_before, needs in acted if is_before is one), Stat.NONE)
            for one in (True, False)
        )
        block = block + self._statistics(needs, outer, text, pairs)
        if read:
            block = block + self._looking(read, before, outer, text, layer, looked)
        former = None
        for pruner, step, entered, leaves in zip(self.pruners, layer.steps, [before, *left], left, strict=False):
            if step.is_idle:
                continue
            # a pruner at the same place as the one before reads its guidance, unless that one changed the tokens
            guide = self.guide if former is None or former.place != step.place or former.reduction is not None else 0.0
            block = block + guide * entered + pruner.macs(entered, leaves)
            if step.reduction is not None and step.reduction.merged is not None:
                summed = self.channels + (width * macs.rows if step.inside and layer.reduced_early else 0)
                block = block + summed * (entered + _terms(step.reduction))
            former = step
        return block

    def _statistics(self, needs: Stat, tokens: Tensor, text: Tensor | float, pairs: Tensor) -> Tensor:
        """MACs [batch] of statistics of so many tokens and pairs of rows, beyond those of attention."""
        token, pair, text_pair = needs.macs(self.macs.heads, self.macs.head_dim)
        # a text query passes the projections as one token more
        query = self.macs.qkv if Stat.FROM_QUERY in needs else 0.0
        return (token * self.macs.rows + text_pair * text) * tokens + pair * pairs + query

    def _looking(
        self,
        needs: Stat,
        before: Tensor,
        outer: Tensor,
        text: Tensor | float,
        layer: LayerTrace,
        pairs: Tensor | None,
    ) -> Tensor:
        """MACs [batch] of what pruners before the block read of all tokens: queries and keys, which those that stay keep."""
        plans = [step.reduction for step in layer.steps if step.place == "before" and step.reduction is not None]
        again = layer.regions is not None or any(plan.merged is not None for plan in plans)
        pairs = before**2 if pairs is None else pairs
        looking = self._statistics(needs, before, text, pairs)
        looking = looking + self.macs.qkv * (before if again and plans else before - outer)
        return looking + 2 * self.macs.width * pairs if needs.with_output else looking


def _backward(left: Sequence[Tensor], layer: LayerTrace) -> Iterator[tuple[Tensor, PruneStep]]:
    """The pruners of a block from the last to the first, and how many tokens of each instance they left."""
    return zip(reversed(left), reversed(layer.steps), strict=True)


def _terms(plan: Reduction) -> Tensor | int:
    """[batch]: the number of further terms in a plan's sums."""
    if plan.terms is None:
        return 0
    number = (plan.terms.weight != 0).to(precision.widest_float(plan.index.device))
    instance = plan.layout.instance.index_select(0, plan.terms.result)
    return number.new_zeros(plan.layout.batch).index_add(0, instance, number)


def step_tokens(step: PruneStep, device: torch.device) -> Tensor:
    """Tokens of each instance behind a pruner.

    Args:
        step: what the pruner did.
        device: of the result.

    Returns:
        The numbers, [batch], to compute with; in soft training, the expected ones.
    """
    return precision.float_tensor(step.lengths, device) if step.expected is None else step.expected


@dataclass(frozen=True)
class Memory:
    """What each instance of a tower cross-attends to, such as the images of a text.

    Attributes:
        tokens: [batch], of an average image of its group.
        fraction: of the MACs of a group's keys and values that one instance pays; the group's instances have them in common.
    """

    tokens: Tensor
    fraction: float

    @classmethod
    def from_block_input(cls, block_input: object, batch: int, dense: Layout | None = None) -> Memory | None:
        """The memory in the input of a block.

        Args:
            block_input: what the block gets besides its tokens.
            batch: the number of instances of the tower.
            dense: the layout of the dense memory, image after image of each group, to count instead. None counts the tokens
                of the memory itself.

        Returns:
            The memory; None where the block has none.
        """
        if not is_memory(block_input):
            return None
        groups = block_input[0].layout.batch
        sizes = torch.stack([view.expected for view in block_input], 1)
        if dense is not None:
            sizes = token_counts(dense).view(groups, len(block_input))
        return cls(sizes.mean(1).repeat_interleave(batch // groups), groups / batch)


def token_counts(layout: Layout) -> Tensor:
    """Tokens of each instance, [batch], as floating-point numbers to compute with."""
    return precision.float_tensor(layout.lengths, layout.device)


def blank_tokens(like: PackedTokens, n: int) -> PackedTokens:
    """One instance of zero tokens, the first of them protected.

    Args:
        like: tokens of the tower, for their width, dtype and device. Where they have a summary token, the first one is it.
        n: the number of tokens.

    Returns:
        The tokens, x [n, dim].
    """
    first = torch.arange(n, device=like.x.device) == 0
    x = like.x.new_zeros(1, n, like.x.shape[-1])
    return PackedTokens.pack(x, protected=first, summary=first if like.summary is not None else None)


def is_memory(block_input: object) -> TypeGuard[tuple[PackedTokens, ...]]:
    """Whether a block gets packed tokens to cross-attend to."""
    return isinstance(block_input, tuple) and all(isinstance(view, PackedTokens) for view in block_input)


def blank_memory(block_input: object, n: int) -> object:
    """The input of a block for one instance, whose memory is zero tokens.

    Args:
        block_input: what the block gets besides its tokens.
        n: the number of tokens in each part of the memory.

    Returns:
        The memory of zero tokens; another input unchanged.
    """
    return tuple(blank_tokens(view, n) for view in block_input) if is_memory(block_input) else block_input


def _feed_forward_macs(
    run: Callable[[PackedTokens, object], object], like: PackedTokens, block_input: object
) -> tuple[float, float, float]:
    """MACs of run(tokens, block_input) per token, and, where it looks at a memory, per memory token and per pair of both."""

    def macs(tokens: int, memory: int) -> float:
        return measure_macs(run, blank_tokens(like, tokens), blank_memory(block_input, memory))

    one = macs(1, 1)
    if not is_memory(block_input):
        return one, 0.0, 0.0
    more_tokens, more_memory = macs(2, 1), macs(1, 2)
    pair = macs(2, 2) - more_tokens - more_memory + one
    return more_tokens - one - pair, more_memory - one - pair, pair
