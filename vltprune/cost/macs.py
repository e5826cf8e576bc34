"""MAC counter: multiply-accumulates of a forward pass, from the traces of what was kept.

Counted are matrix products (a multiply and an add are one MAC), attention and the pruners' own scoring included; norms,
activations and softmax are not, as in torch's counter, which gives twice these numbers. Everything in a block but attention
acts token by token, so a block's costs are measured on one and two tokens and the rest is arithmetic. An instance costs what
it would cost alone: where short instances are attended to padded, because that is faster, the padding is not counted. A
window (ModernBERT's local blocks) saves nothing: products with keys that it hides are made all the same, here and there.

A dense model also computes on the padding of its texts, which a pruned one skips. That is counted by itself: what pruning
saves is a share of what the dense model spends on the tokens that are there.

A decoder behind the towers, of captions or answers, is counted by what it did: all tokens it was given or said, and all
beams, the memory and the sentences as padded as they were. It is not pruned, but pays less where less is left to look at.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core import precision
from ..core.attention import Stat
from ..core.tokens import Layout, PackedTokens
from ..hosts.base import Host
from ..hosts.find import find_composite
from ..hosts.linear_maps import uncounted_macs
from ..layers import AlignmentGuide
from ..pruning.model import get_pruning
from ..pruning.pruner import Pruner
from ..pruning.tower import Tower
from ..pruning.trace import LayerTrace, PruneTrace, collect
from ..utils.modes import evaluating
from ..utils.structure import modules_of
from .savings import Cost

# torch's counter hooks every module of the process, and a model that two threads count would be put back in the wrong mode
_ONE_AT_A_TIME = threading.RLock()


def count_macs(model: nn.Module, *inputs: Any, **named: Any) -> Cost:
    """Run a pruned model as model(*inputs, **named), without gradients and as in evaluation, and count.

    TypeError for a dense model. Threads that count wait for each other.

    For the cost of a dense model, prune it with any config and read `dense_total`, or `padded_total` with its padding. For
    another method than the call, such as `generate`, collect its traces and give them to a `CostMeter`.
    """
    with _ONE_AT_A_TIME:
        with evaluating(model), torch.no_grad(), collect(threads=False) as traces:
            model(*inputs, **named)
        return CostMeter(model)(traces)


class CostMeter:
    """Counts calls of one pruned model: meter(traces) -> Cost. What it measures of the blocks is measured once."""

    def __init__(self, model: nn.Module):
        self.host = get_pruning(model).host
        self.composite = find_composite(self.host)
        self.head = self.composite.head_macs(self.host) if self.composite is not None else 0.0
        self._towers: dict[Any, _TowerMeter] = {}

    def __call__(self, traces: Sequence[PruneTrace]) -> Cost:
        """traces: those of one call of the model. ValueError if there are none."""
        if not traces:
            raise ValueError("no traces: call the model inside `with vltprune.collect() as traces:`")
        towers, dense, padding, entered = {}, {}, {}, None
        for trace in traces:
            looks = tuple(map(_is_memory, trace.block_inputs))  # a block costs more where it is called with a memory
            if (trace.tower, looks) not in self._towers:
                self._towers[trace.tower, looks] = _TowerMeter(trace)
            meter = self._towers[trace.tower, looks]
            towers[trace.tower] = meter.count(trace)
            dense[trace.tower] = meter.count_dense(trace, _sizes(trace.input_tokens.layout), entered)
            padding[trace.tower] = meter.count_dense(trace, _padded_lengths(trace), entered) - dense[trace.tower]
            entered = trace.input_tokens.layout
        decoder = self._decoder(traces, [max(trace.lengths[-1]) for trace in traces])
        dense_decoder = self._decoder(traces, [trace.input_tokens.layout.longest for trace in traces])
        padded_decoder = self._decoder(traces, [int(_padded_lengths(trace).max()) for trace in traces])
        instances = traces[-1].input_tokens.layout.batch
        decoder_padding = padded_decoder - dense_decoder
        return Cost(towers, dense, self.head, instances, decoder, dense_decoder, padding, decoder_padding)

    def _decoder(self, traces: Sequence[PruneTrace], memories: Sequence[int]) -> float:
        """MACs of what a decoder did, looking at so many tokens an instance of each trace's tower."""
        if self.composite is None:
            return 0.0
        looks = zip(traces, memories, strict=True)
        return sum(self.composite.decoder_macs(self.host, trace.decode_stats, memory) for trace, memory in looks)


class _TowerMeter:
    """The unit costs of one tower, measured in evaluation: dropout draws nothing, batch norms learn nothing from it."""

    def __init__(self, trace: PruneTrace):
        encoder, like = trace.encoder, trace.input_tokens
        self.encoder, block_inputs = encoder, tuple(_cut(b, 1) for b in trace.block_inputs)
        adapter, host = encoder.adapter, encoder.host
        with _evaluating(encoder):
            guide = encoder.guide if len(encoder.pruners) else None  # which nobody asks elsewhere
            asked = 0.0 if guide is None else _guiding(guide, encoder.tower, like)
            products = _products(adapter, adapter.blocks(host), like, block_inputs)
            self.units = [_Units(one, encoder.pruner(d), asked, like.x.shape[-1]) for d, one in enumerate(products)]
            two, three = (_macs(adapter.head, host, _blank(like, n), block_inputs) for n in (2, 3))
        self._closing = 3 * two - 2 * three, three - two  # of any instance, and of each of its tokens
        self._opening: dict[tuple[Any, ...], float] = {}

    def count(self, trace: PruneTrace) -> Tensor:
        """[depths + 2, batch]."""
        before = _sizes(trace.input_tokens.layout)
        rows = [self._open(trace)]
        for unit, step, block_input in zip(self.units, trace.layers, trace.block_inputs, strict=True):
            after = _left(step, before)
            rows.append(unit.pruned(before, after, _Memory.from_block_input(block_input, len(before)), step))
            before = after
        return torch.stack([*rows, self._close(before)])

    def count_dense(self, trace: PruneTrace, lengths: Tensor, image: Layout | None) -> Tensor:
        """What the host itself pays for so many tokens of each instance, lengths [batch]; `image`: the layout that entered
        the tower this one looks at."""
        rows = [self._open(trace)]
        for unit, block_input in zip(self.units, trace.block_inputs, strict=True):
            rows.append(unit.dense(lengths, _Memory.from_block_input(block_input, len(lengths), image)))
        return torch.stack([*rows, self._close(lengths)])

    def _open(self, trace: PruneTrace) -> Tensor:
        shape = tuple(trace.inputs[0].shape[1:])
        if shape not in self._opening:
            adapter, host = self.encoder.adapter, self.encoder.host
            with _evaluating(self.encoder):
                macs = _macs(adapter.embed, host, *trace.inputs)
            self._opening[shape] = macs / trace.input_tokens.layout.batch
        return torch.full_like(_sizes(trace.input_tokens.layout), self._opening[shape])

    def _close(self, lengths: Tensor) -> Tensor:
        each, token = self._closing
        return each + token * lengths


@dataclass(frozen=True)
class _Products:
    """MACs of a block's products per token. width: heads x head_dim; feed: see `_feeding`."""

    width: int
    qkv: float
    mix: float
    feed: tuple[float, float, float]

    @classmethod
    def from_block(cls, adapter: Host, block: nn.Module, like: PackedTokens, block_input: Any) -> _Products:
        one = _blank(like, 1)
        with torch.no_grad():
            query = adapter.qkv(block, one, block_input)[0]
        qkv = _macs(adapter.qkv, block, one, block_input)
        mix = _macs(adapter.project, block, one, torch.zeros_like(query))
        return cls(query.numel(), qkv, mix, _feeding(partial(adapter.feed_forward, block), like, block_input))


def _products(
    adapter: Host, blocks: Iterable[nn.Module], like: PackedTokens, block_inputs: Sequence[Any]
) -> Iterator[_Products]:
    """Those of each block. Blocks that differ in their weights alone, as most of a tower do, are measured once."""
    known: list[tuple[Any, _Products]] = []
    for block, own in zip(blocks, block_inputs, strict=True):
        sizes = {name: tensor.shape for name, tensor in chain(block.named_parameters(), block.named_buffers())}
        kind = modules_of(block), sizes, [view.x.shape[-1] for view in own] if _is_memory(own) else None
        found = next((products for other, products in known if other == kind), None)
        if found is None:
            found = _Products.from_block(adapter, block, like, own)
            known.append((kind, found))
        yield found


class _Units:
    """Costs of one block, and of the pruner that stands in it. guide: MACs per token of the guide that the pruner asks."""

    def __init__(self, products: _Products, pruner: Pruner | None, guide: float, channels: int):
        self.width, self.qkv, self.mix, self.feed = products.width, products.qkv, products.mix, products.feed
        self.pruner, self.guide, self.channels = pruner, guide, channels

    def dense(self, n: Tensor, memory: _Memory | None) -> Tensor:
        return (self.qkv + self.mix) * n + 2 * self.width * n**2 + self._feed(n, memory)

    def pruned(self, before: Tensor, after: Tensor, memory: _Memory | None, step: LayerTrace) -> Tensor:
        mixed = after if step.reduced_early else before
        block = self.qkv * before + 2 * self.width * before**2 + self.mix * mixed + self._feed(after, memory)
        return block + self._scoring(step) * before + self._comparing * before**2

    def _feed(self, n: Tensor, memory: _Memory | None) -> Tensor:
        token, entry, pair = self.feed
        return token * n if memory is None else token * n + (entry * memory.share + pair * n) * memory.tokens

    def _scoring(self, step: LayerTrace) -> float:
        """Per token: the summary's row of the map, the guide, the weighted sums of a merge."""
        if self.pruner is None:
            return 0.0
        merges = step.reduction is not None and step.reduction.merge is not None
        summed = self.channels + (self.width if step.reduced_early else 0)
        return self.guide + (self.width if Stat.SUMMARY in self.pruner.needs else 0) + (summed if merges else 0)

    @property
    def _comparing(self) -> int:
        """Per pair of tokens."""
        return self.channels if self.pruner is not None and self.pruner.scorer.pairwise else 0


def _feeding(
    feed: Callable[[PackedTokens, Any], Any], like: PackedTokens, block_input: Any
) -> tuple[float, float, float]:
    """MACs of feed(tokens, block_input) per token, and, where it looks at a memory, per memory token and per pair of both."""

    def macs(tokens: int, memory: int) -> float:
        return _macs(feed, _blank(like, tokens), _cut(block_input, memory))

    one = macs(1, 1)
    if not _is_memory(block_input):
        return one, 0.0, 0.0
    more_tokens, more_memory = macs(2, 1), macs(1, 2)
    pair = macs(2, 2) - more_tokens - more_memory + one
    return more_tokens - one - pair, more_memory - one - pair, pair


def _guiding(guide: AlignmentGuide, tower: str, like: PackedTokens) -> float:
    """MACs of a guide per token: what it costs once, whatever the tokens, is of no instance."""
    one, two = (_macs(guide, _blank(like, n), tower) for n in (1, 2))
    return two - one


@dataclass(frozen=True)
class _Memory:
    """What each instance cross-attends to. tokens [batch]: of an average image of its group; share: what an instance pays
    of a group's keys and values, which the group's instances have in common."""

    tokens: Tensor
    share: float

    @classmethod
    def from_block_input(cls, block_input: Any, batch: int, dense: Layout | None = None) -> _Memory | None:
        """From the input of a block; `dense`: the layout, image after image of each group, to count instead."""
        if not _is_memory(block_input):
            return None
        groups = block_input[0].layout.batch
        sizes = torch.stack([view.expected for view in block_input], 1)
        if dense is not None:
            sizes = _sizes(dense).view(groups, len(block_input))
        return cls(sizes.mean(1).repeat_interleave(batch // groups), groups / batch)


def _padded_lengths(trace: PruneTrace) -> Tensor:
    """Tokens of each instance that the dense tower computes on, padding included: [batch]."""
    lengths = _sizes(trace.input_tokens.layout)
    padded = trace.encoder.adapter.padded_length(*trace.inputs)
    return lengths if padded is None else torch.full_like(lengths, padded)


def _sizes(layout: Layout) -> Tensor:
    """Tokens of each instance, [batch], to compute with."""
    return precision.float_tensor(layout.lengths, layout.device)


def _left(step: LayerTrace, like: Tensor) -> Tensor:
    """Tokens of each instance that left a block, [batch]; where some are there in part, as many as may be expected."""
    if step.expected is not None:
        return step.expected
    return precision.float_tensor(step.lengths, like.device)


def _macs(run: Callable[..., Any], *inputs: Any) -> float:
    """MACs of run(*inputs), by torch's counter, under the math backend: fused attention kernels count as nothing.

    Within `_evaluating`. The inputs are made before, for the counter looks at each operation, and takes its time.
    """
    counter = FlopCounterMode(display=False)
    with (
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        counter,
        uncounted_macs(counter) as uncounted,
    ):  # the counter fails on views made without gradients
        run(*inputs)
    return counter.get_total_flops() / 2 + sum(uncounted)


@contextlib.contextmanager
def _evaluating(encoder: Tower) -> Iterator[None]:
    """A tower in evaluation, with its host and guide, which are children of the composite model where there is one, and no
    other thread that measures."""
    with _ONE_AT_A_TIME, evaluating(encoder, encoder.host, *([] if encoder.guide is None else [encoder.guide])):
        yield


def _blank(like: PackedTokens, n: int) -> PackedTokens:
    """One instance of n tokens, nothing in them, the first of them the summary."""
    first = torch.arange(n, device=like.x.device) == 0
    x = like.x.new_zeros(1, n, like.x.shape[-1])
    return PackedTokens.pack(x, protected=first, summary=first if like.summary is not None else None)


def _is_memory(block_input: Any) -> bool:
    return isinstance(block_input, tuple) and all(isinstance(view, PackedTokens) for view in block_input)


def _cut(block_input: Any, n: int) -> Any:
    """The memory that a block gets as n tokens of one instance; anything else as it is."""
    return tuple(_blank(view, n) for view in block_input) if _is_memory(block_input) else block_input
