"""Traces: what each layer of a pruned tower kept in one call, and `collect`, which gathers them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core import precision, segments
from ..core.layout import Layout
from ..core.modality import COLUMN, is_of, text_counts
from ..core.regions import Regions
from ..core.tokens import PackedTokens
from ..layers import Guidance, Reduction
from ..utils.lazy import lazy
from .decode_stats import DecodeStats
from .stage import NAMED_ALONE, Place
from .tower import Tower


@dataclass(frozen=True)
class PruneStep:
    """What one pruner did in one call.

    Attributes:
        layout: how many tokens each instance had behind it.
        reduction: the plan that was applied. None where all tokens stayed.
        expected: [batch], the expected number of tokens behind it in soft training. None otherwise.
        place: "before" the block, between "attention" and MLP, or behind the "block".
        is_idle: whether it kept all tokens whatever they hold, so that inference computes nothing.
    """

    layout: Layout
    reduction: Reduction | None
    expected: Tensor | None
    place: Place
    is_idle: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each instance had behind it."""
        return self.layout.lengths

    @property
    def inside(self) -> bool:
        """Whether it stood between attention and MLP."""
        return self.place == "attention"


@dataclass(frozen=True)
class LayerTrace:
    """What one block of a tower did in one call.

    Attributes:
        position: [total] int64, the original positions of the tokens that left the block.
        protected: [total] bool, which of them are protected.
        layout: how many of them each instance has.
        steps: what the pruners of the block did, in order; none in a block that is not pruned.
        reduced_early: whether the plans inside the block were applied before the output projection.
        guide: computes the guidance. None without a guide.
        expected: [batch], the expected number of tokens in soft training. None otherwise.
        scored: the tokens that entered a pruned block, and their scores [total], for losses. None without gradients.
        tokens: the tokens that left the block, in `collect(tokens=True)`. None otherwise.
        modality: [total] int64, the modality of the tokens that left the block, where text and image are one sequence. None
            elsewhere.
        regions: within what the tokens attended to each other that attention of the block read. None for whole instances.
        looked: the same of the tokens that entered the block, where pruners before it read its attention.
    """

    position: Tensor
    protected: Tensor
    layout: Layout
    steps: tuple[PruneStep, ...]
    reduced_early: bool
    guide: Callable[[], Guidance] | None
    expected: Tensor | None = None
    scored: tuple[PackedTokens, Tensor] | None = None
    tokens: PackedTokens | None = None
    modality: Tensor | None = None
    regions: Regions | None = None
    looked: Regions | None = None

    @property
    def identity(self) -> Tensor:
        """[total] int64 of the tokens that left the block: `PackedTokens.identity`."""
        return self.layout.instance * 2**32 + self.position

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many of them each instance has."""
        return self.layout.lengths

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        """The plans that were applied, in order; none where all tokens stayed."""
        return tuple(step.reduction for step in self.steps if step.reduction is not None)

    @lazy
    def guidance(self) -> Guidance | None:
        """The affinity of the tokens that entered the block to the anchors. None without a guide.

        With gradients enabled it also exists in a tower that is pruned nowhere, and is computed when it is first read.
        """
        return None if self.guide is None else self.guide()


@dataclass(frozen=True)
class PruneTrace:
    """What one call of one tower did, block by block.

    Attributes:
        tower: the tower's name.
        encoder: the pruned tower that ran.
        input_tokens: the tokens that entered the first block, protected ones included.
        inputs: what the tower was called with, as its host's `embed` takes it.
        block_inputs: what the blocks got besides their tokens (memory, rotary tables), one entry per block.
        layers: one LayerTrace per block.
        decode_stats: what decoders that attend to the tower's output did afterwards, in order.
        output_tokens: the tokens that left the last block, before the host's final norm. None while the tower runs.
        query: the text that `vltprune.query` gave, or that of each image's prompt, [batch, segments, dim]. None where the tower
            reads none.
        project: what mapped contents of tokens into the query's space, where the guide itself did not. None elsewhere.
    """

    tower: str
    encoder: Tower
    input_tokens: PackedTokens
    inputs: tuple[Any, ...]
    block_inputs: tuple[object, ...]
    layers: list[LayerTrace] = field(default_factory=list)
    decode_stats: list[DecodeStats] = field(default_factory=list)
    output_tokens: PackedTokens | None = None
    query: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Tokens that left each block, per instance, protected ones included: lengths[depth][instance]."""
        return tuple(step.lengths for step in self.layers)

    @property
    def entered(self) -> tuple[Layout, ...]:
        """The tokens that attention of each block read, per instance: those that pruners before the block left."""
        former = [self.input_tokens.layout, *(layer.layout for layer in self.layers[:-1])]
        return tuple(
            next((step.layout for step in reversed(layer.steps) if step.place == "before"), layout)
            for layer, layout in zip(self.layers, former, strict=True)
        )

    @property
    def text_counts(self) -> list[Tensor | float]:
        """How many tokens of a text entered each block, [batch] each; 0 where text and image are not one sequence."""
        columns = [self.input_tokens.columns.get(COLUMN), *(step.modality for step in self.layers)]
        lengths = [self.input_tokens.layout.lengths, *self.lengths]
        return [text_counts(column, each) for column, each in zip(columns[:-1], lengths[:-1], strict=True)]

    @property
    def aligned(self) -> Tensor:
        """The tokens pooled by the guide's anchors, summed over the pruned blocks: [batch, anchors, anchor dim].

        `losses.alignment` compares it between towers. With gradients enabled, a tower that is pruned nowhere sums over all
        blocks. Of a language model the text is pooled, and not the visual tokens in it. LookupError without a guide.
        """
        pooled = [self._pooled(step.guidance) for step in self.layers if step.guidance is not None]
        if not pooled:
            raise LookupError(f"the {self.tower} tower has no guide at any depth: prune it with guide='codebook'")
        return torch.stack(pooled).sum(0)

    def _pooled(self, guidance: Guidance) -> Tensor:
        """[batch, anchors, anchor dim] of one block."""
        if self.tower != NAMED_ALONE:
            return guidance.pooled
        return guidance.pooled_among(is_of(guidance.tokens, "text"))

    @property
    def embedding(self) -> Tensor:
        """The embedding of each instance after the last block, [batch, dim]: its summary token, or the mean of its tokens."""
        assert self.output_tokens is not None
        tokens = self.output_tokens
        if tokens.summary is not None:
            return tokens.summaries()
        total = segments.sum(precision.single(tokens.x) * tokens.weight[:, None], tokens.layout)
        return (total / segments.sum(tokens.weight, tokens.layout)[:, None]).to(tokens.x.dtype)

    @property
    def caption_aligned(self) -> Tensor:
        """The words of decoded captions pooled by the guide's anchors, [captions, anchors, anchor dim].

        `losses.alignment(trace.aligned, trace.caption_aligned)` aligns an image with its captions.
        LookupError where no decoder read captions under the guide, with gradients, while this was collected.
        """
        gathered = [decoded.gathered() for decoded in self.decode_stats if decoded.gathered is not None]
        if not gathered:
            raise LookupError(
                f"no captions were read behind the {self.tower} tower: call a pruned BlipCaption with gradients enabled, on "
                "images and captions, pruned with guide='codebook'"
            )
        return torch.cat(gathered)

    def provenance(self, depth: int) -> Tensor:
        """The row that holds each input token after a block.

        Args:
            depth: the index of the block.

        Returns:
            [input total] int64, rows of the tokens that left the block, -1 for dropped tokens.
        """
        owner = torch.arange(self.input_tokens.layout.total, device=self.input_tokens.x.device)
        for step in self.layers[: depth + 1]:
            for reduction in step.reductions:
                target = reduction.provenance()
                owner = torch.where(owner >= 0, target[owner.clamp(min=0)], owner)
        return owner


class Collector(list[PruneTrace]):
    """The traces of one `collect` block. tokens: whether each LayerTrace keeps the tokens that left its block."""

    def __init__(self, tokens: bool = False):
        super().__init__()
        self.tokens = tokens
        self._thread = threading.local()

    def add(self, trace: PruneTrace) -> None:
        """Adds the trace of a tower that has run."""
        self.append(trace)
        self._thread.last = trace

    def add_decode_stats(self, decoded: DecodeStats) -> None:
        """Adds what a decoder did to the trace of the tower that ran last in the same thread, which it attends to."""
        last = getattr(self._thread, "last", None)
        if last is not None:
            last.decode_stats.append(decoded)


_of_thread: ContextVar[tuple[Collector, ...]] = ContextVar("collectors", default=())
_lock = threading.Lock()
_shared: list[Collector] = []  # those that other threads report to, in the whole process
_open = 0  # how many `collect` blocks there are in the whole process: what torch.compile can guard on


@contextlib.contextmanager
def collect(tokens: bool = False, threads: bool = True) -> Iterator[list[PruneTrace]]:
    """Collects the traces of all pruned towers that run within the `with` block, in order.

    A thread that collects reports to its own lists alone. What `backward` runs again under gradient checkpointing is no call.

    Args:
        tokens: whether each `LayerTrace.tokens` holds the tokens that left its block, as features of single blocks. (Forward
            hooks on blocks do not fire, because a block is run in parts.) Otherwise they are not kept in memory.
        threads: whether threads that collect nothing themselves, such as the workers of a pool, report to this list too.
            Their traces come in the order in which the calls end.

    Yields:
        The list of traces, one per call of a tower.
    """
    global _open
    collector = Collector(tokens)
    token = _of_thread.set((*_of_thread.get(), collector))
    with _lock:
        _open += 1
        if threads:
            _shared.append(collector)
    try:
        yield collector
    finally:
        with _lock:
            _open -= 1
            _shared[:] = [other for other in _shared if other is not collector]  # lists of equal traces are equal
        _of_thread.reset(token)


def active_collectors() -> tuple[Collector, ...]:
    """The collectors that calls of this thread report to."""
    if not _open:
        return ()
    if torch._C._current_graph_task_id() != -1:  # in `backward`, as torch.utils.checkpoint asks
        return ()
    collectors = _of_thread.get()
    if collectors:
        return collectors
    with _lock:
        return tuple(_shared)


def report_decode_stats(decoded: DecodeStats) -> None:
    """Reports what a decoder did to the trace of the tower that ran last in this thread."""
    for collector in active_collectors():
        collector.add_decode_stats(decoded)
