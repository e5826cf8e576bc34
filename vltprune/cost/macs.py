"""MAC counter: multiply-accumulates of a forward pass, from the traces of the tokens that were kept.

Counted are matrix products (a multiply and an add are one MAC), attention and the pruners' own scoring included. Norms,
activations and softmax are not, as in torch's counter, which gives twice these numbers. Everything in a block but attention
acts token by token. So a block's costs are measured on one and two tokens, and the rest is arithmetic. An instance costs what
it would cost alone: where short instances are attended to padded, because that is faster, the padding is not counted. A
window (ModernBERT's local blocks) saves nothing: products with keys that it hides are made all the same, here and there.
Regions (frames and windows of Qwen-VL) are counted each by itself, as they are computed.

A dense model also computes on the padding of its texts, which a pruned one skips. That is counted by itself: what pruning
saves is a fraction of what the dense model spends on the tokens that are there.

A decoder behind the towers, of captions or answers, is counted by what it did: all beams, and all tokens that it was given or
generated. The memory and the sentences count as padded as they were. A decoder is not pruned, but costs less where fewer
tokens remain to look at.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core import precision
from ..core.layout import Layout
from ..core.modality import RATER
from ..core.regions import Regions
from ..hosts.base import LanguageCost
from ..hosts.linear_maps import measure_macs
from ..layers import AlignmentGuide, rater_macs, set_query
from ..pruning.model import get_pruning
from ..pruning.prune import composite_of
from ..pruning.tower import Tower
from ..pruning.trace import PruneTrace, collect
from ..utils.modes import evaluating
from .block_macs import (
    BlockMeter,
    Memory,
    blank_memory,
    blank_tokens,
    is_memory,
    measure_blocks,
    step_tokens,
    token_counts,
)
from .savings import Cost

# torch's counter hooks every module of the process, and a model that two threads count would be put back in the wrong mode
_ONE_AT_A_TIME = threading.RLock()


def count_macs(model: nn.Module, *inputs: object, **named: object) -> Cost:
    """Counts the MACs of model(*inputs, **named), run without gradients and in evaluation mode. `print` shows a table.

    For the cost of a dense model, prune it with any config and read `dense_total`, or `padded_total` with its padding. For
    another method than the call, such as `generate`, collect its traces and give them to a `CostMeter`. Threads that count
    wait for each other.

    Args:
        model: a pruned model.
        *inputs: as the model takes them, on its device. A mapping alone is all of them by name, as processors return it.
        **named: likewise, by name.

    Returns:
        The Cost of the call: MACs of each tower, dense and pruned, and of what follows the towers.

    Raises:
        TypeError: for a dense model.
    """
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        inputs, named = (), {**inputs[0], **named}
    with _ONE_AT_A_TIME:
        with evaluating(model), torch.no_grad(), collect(threads=False) as traces:
            model(*inputs, **named)
        return CostMeter(model)(traces)


class CostMeter:
    """Counts the MACs of calls of one pruned model. What it measures of the blocks is measured once.

    Args:
        model: a pruned model.

    Raises:
        TypeError: for a dense model.
    """

    def __init__(self, model: nn.Module):
        self.host = get_pruning(model).host
        self.composite = composite_of(model)
        self.head = self.composite.head_macs(self.host) if self.composite is not None else 0.0
        self._towers: dict[tuple[object, ...], _TowerMeter] = {}

    @property
    def language(self) -> LanguageCost | None:
        """What the language model costs that reads an image tower's tokens; None for a model without one."""
        return None if self.composite is None else self.composite.language_cost(self.host)

    def __call__(self, traces: Sequence[PruneTrace]) -> Cost:
        """The Cost of one call, of which `traces` were collected. ValueError for no traces."""
        if not traces:
            raise ValueError("no traces: call the model inside `with vltprune.collect() as traces:`")
        towers: dict[str, list[Tensor]] = defaultdict(list)
        dense: dict[str, list[Tensor]] = defaultdict(list)
        padding: dict[str, list[Tensor]] = defaultdict(list)
        entered = None
        for trace in traces:
            looks = tuple(map(is_memory, trace.block_inputs))  # a block costs more where it is called with a memory
            kind = (trace.tower, looks, None if trace.query is None else trace.query.shape[1], trace.project is None)
            if kind not in self._towers:
                self._towers[kind] = _TowerMeter(trace)
            meter = self._towers[kind]
            whole = meter.count_dense(trace, token_counts(trace.input_tokens.layout), entered)
            towers[trace.tower].append(meter.count(trace))
            dense[trace.tower].append(whole)
            padding[trace.tower].append(meter.count_dense(trace, _padded_lengths(trace), entered) - whole)
            entered = trace.input_tokens.layout
        decoder = self._decoder(traces, [max(trace.lengths[-1]) for trace in traces], is_dense=False)
        dense_decoder, padded_decoder = (
            float(self._decoder(traces, memories))
            for memories in (
                [trace.input_tokens.layout.longest for trace in traces],
                [int(_padded_lengths(trace).max()) for trace in traces],
            )
        )
        # a prompt of a language model may have several images
        prompts = [len(call.visual) for trace in traces for call in trace.decode_stats if call.visual]
        instances = sum(prompts) or traces[-1].input_tokens.layout.batch
        decoder_padding = padded_decoder - dense_decoder
        # a tower that ran several times, as ViLT does for two images, had the instances of all its calls
        joined = ({tower: torch.cat(calls, 1) for tower, calls in one.items()} for one in (towers, dense, padding))
        counted, whole, padded = joined
        return Cost(counted, whole, self.head, instances, decoder, dense_decoder, padded, decoder_padding)

    def _decoder(self, traces: Sequence[PruneTrace], memories: Sequence[int], is_dense: bool = True) -> float | Tensor:
        """MACs of what a decoder did, or does behind dense towers, looking at so many tokens of each trace's tower."""
        if self.composite is None:
            return 0.0
        macs: float | Tensor = 0.0
        for trace, memory in zip(traces, memories, strict=True):
            decoded = [(call.dense or call) if is_dense else call for call in trace.decode_stats]
            macs += self.composite.decoder_macs(self.host, decoded, memory)
        return macs


class _TowerMeter:
    """The MACs of one tower, measured in evaluation mode: dropout draws nothing, batch norms learn nothing from it."""

    def __init__(self, trace: PruneTrace):
        encoder, like = trace.encoder, trace.input_tokens
        self.encoder, block_inputs = encoder, tuple(blank_memory(b, 1) for b in trace.block_inputs)
        adapter, host = encoder.adapter, encoder.host
        with _evaluating(encoder):
            # no pruner asks the guide of a tower that is pruned nowhere
            guide = encoder.guide if len(encoder.pruners) else None
            self._guide, per_token = (0.0, 0.0) if guide is None else _guide_macs(guide, trace)
            blocks = measure_blocks(adapter, adapter.blocks(host), like, block_inputs)
            self.blocks = [
                BlockMeter(one, encoder.pruners_at(d), per_token, like.x.shape[-1]) for d, one in enumerate(blocks)
            ]
            two, three = (measure_macs(adapter.head, host, blank_tokens(like, n), block_inputs) for n in (2, 3))
        # of any instance, and of each of its tokens
        self._head = 3 * two - 2 * three, three - two
        self._embedding: dict[tuple[tuple[int, ...], ...], float] = {}

    def count(self, trace: PruneTrace) -> Tensor:
        """MACs [depths + 2, batch] of the pruned tower."""
        first, former = trace.input_tokens, trace.input_tokens.layout
        # a language model may get visual tokens that are there in part
        before = token_counts(former) if first.keep_prob is None else first.expected
        rows = [self._embedding_macs(trace) + self._guide]
        if RATER in trace.input_tokens.columns:
            rows = [rows[0] + precision.float_tensor(rater_macs(trace.input_tokens), before.device)]
        inputs = zip(trace.block_inputs, trace.text_counts, trace.entered, strict=True)
        for block, layer, (block_input, text, entered) in zip(self.blocks, trace.layers, inputs, strict=True):
            memory = Memory.from_block_input(block_input, len(before))
            read = next((step_tokens(s, before.device) for s in reversed(layer.steps) if s.place == "before"), before)
            pairs, looked = _pairs(layer.regions, entered, read), _pairs(layer.looked, former, before)
            rows.append(block.pruned(before, text, memory, layer, pairs, looked))
            former = layer.layout
            before = step_tokens(layer.steps[-1], before.device) if layer.steps else before
        return torch.stack([*rows, self._head_macs(before)])

    def count_dense(self, trace: PruneTrace, lengths: Tensor, image: Layout | None) -> Tensor:
        """MACs [depths + 2, batch] of the dense tower for so many tokens of each instance, lengths [batch].

        image: the layout that entered the tower at which this one looks; None where it looks at none.
        """
        rows, tokens, adapter = [self._embedding_macs(trace)], trace.input_tokens, self.encoder.adapter
        blocks = zip(self.blocks, adapter.blocks(self.encoder.host), trace.block_inputs, strict=True)
        for meter, block, block_input in blocks:
            regions = adapter.regions(block, tokens, block_input)
            pairs, count = None if regions is None else regions.pairs(tokens.layout), lengths
            if regions is not None and adapter.copies:
                count = lengths - adapter.copies / regions.rows
                pairs = (count * regions.rows) ** 2
            rows.append(meter.dense(count, Memory.from_block_input(block_input, len(lengths), image), pairs))
        return torch.stack([*rows, self._head_macs(lengths)])

    def _embedding_macs(self, trace: PruneTrace) -> Tensor:
        # packed patches of images of any size have no batch dimension
        shape = tuple(tuple(given.shape) for given in trace.inputs if isinstance(given, Tensor))
        if shape not in self._embedding:
            adapter, host = self.encoder.adapter, self.encoder.host
            with _evaluating(self.encoder):
                macs = measure_macs(adapter.embed, host, *trace.inputs)
            self._embedding[shape] = macs / trace.input_tokens.layout.batch
        return torch.full_like(token_counts(trace.input_tokens.layout), self._embedding[shape])

    def _head_macs(self, lengths: Tensor) -> Tensor:
        each, token = self._head
        return each + token * lengths


def _pairs(regions: Regions | None, layout: Layout, expected: Tensor) -> Tensor | None:
    """Pairs of rows that attend to each other, [batch]: tokens that are there in part are so in all regions alike."""
    return None if regions is None else regions.pairs(layout) * (expected / token_counts(layout).clamp(min=1)) ** 2


def _guide_macs(guide: AlignmentGuide, trace: PruneTrace) -> tuple[float, float]:
    """MACs of a guide per instance, of its text, and per token. What weights cost once a call is of no instance."""
    with set_query(None if trace.query is None else torch.zeros_like(trace.query[:1]), trace.project):
        if guide.queried and trace.query is None:
            # all tokens are alike
            return 0.0, 0.0
        one, two = (measure_macs(guide, blank_tokens(trace.input_tokens, n), trace.tower) for n in (1, 2))
    return 2 * one - two if guide.queried else 0.0, two - one


def _padded_lengths(trace: PruneTrace) -> Tensor:
    """Tokens of each instance that the dense tower computes on, padding included: [batch]."""
    lengths = token_counts(trace.input_tokens.layout)
    padded = trace.encoder.adapter.padded_length(trace.input_tokens, *trace.inputs)
    return lengths if padded is None else torch.full_like(lengths, padded)


@contextlib.contextmanager
def _evaluating(encoder: Tower) -> Iterator[None]:
    """Within the `with` block a tower is in evaluation mode, with its host and guide, and no other thread measures."""
    with _ONE_AT_A_TIME, evaluating(encoder, encoder.host, *([] if encoder.guide is None else [encoder.guide])):
        yield
