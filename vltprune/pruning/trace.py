"""Traces: what each layer of a pruned tower kept in one call, and `collect`, which gathers them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core import precision, segments
from ..core.tokens import PackedTokens
from ..layers import Guidance, Reduction
from .decode_stats import DecodeStats
from .tower import Tower


@dataclass(frozen=True)
class LayerTrace:
    """One depth of a trace. position, protected [total] and lengths are those of the tokens that left the block.

    expected [batch]: how many they are where some are there in part, in soft training; else None. scored: the tokens that
    entered a block that prunes, and their scores [total], for losses on them; None without gradients. tokens: those that left
    the block, in `collect(tokens=True)`; else None.
    """

    position: Tensor
    protected: Tensor
    lengths: tuple[int, ...]
    reduction: Reduction | None
    reduced_early: bool
    guide: Callable[[], Guidance] | None
    expected: Tensor | None = None
    scored: tuple[PackedTokens, Tensor] | None = None
    tokens: PackedTokens | None = None

    @cached_property
    def guidance(self) -> Guidance | None:
        """How the tokens that entered relate to the anchors; None without a guide. With gradients enabled, also in a tower that
        is pruned nowhere: it is computed there when first asked for."""
        return None if self.guide is None else self.guide()


@dataclass(frozen=True)
class PruneTrace:
    """What one call of one tower did.

    tower    its name; encoder, the PrunedEncoder that ran
    input_tokens  tokens per instance that entered the first block, protected ones included
    layers   one LayerTrace a depth
    block_inputs   what the blocks got besides their tokens (memory, rotary tables), one entry a depth
    inputs   what the tower was called with, as its host's `embed` takes it
    decode_stats  what a decoder then did that looks at what the tower returned, in order
    output_tokens  the tokens that left the last block, before the host's final norm; None while the tower still runs
    """

    tower: str
    encoder: Tower
    input_tokens: PackedTokens
    inputs: tuple[Any, ...]
    block_inputs: tuple[Any, ...]
    layers: list[LayerTrace] = field(default_factory=list)
    decode_stats: list[DecodeStats] = field(default_factory=list)
    output_tokens: PackedTokens | None = None

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Per depth, per instance: tokens leaving the block, protected ones included."""
        return tuple(step.lengths for step in self.layers)

    @property
    def aligned(self) -> Tensor:
        """What the guide's anchors gathered over all pruned depths, [batch, anchors, anchor dim].

        The sum over blocks that `losses.alignment` compares between towers; with gradients
        enabled, all blocks of a tower that is pruned nowhere. LookupError without a guide.
        """
        pooled = [step.guidance.pooled for step in self.layers if step.guidance is not None]
        if not pooled:
            raise LookupError(f"the {self.tower} tower has no guide at any depth: prune it with guide='codebook'")
        return torch.stack(pooled).sum(0)

    @property
    def embedding(self) -> Tensor:
        """What speaks for each instance behind the last block, [batch, dim]: its summary token, or the mean of what is left."""
        assert self.output_tokens is not None
        left = self.output_tokens
        if left.summary is not None:
            return left.first_where(left.summary)
        total = segments.sum(precision.single(left.x) * left.weight[:, None], left.layout)
        return (total / segments.sum(left.weight, left.layout)[:, None]).to(left.x.dtype)

    @property
    def caption_aligned(self) -> Tensor:
        """What the guide's anchors gathered from captions that a decoder then read, [captions, anchors, anchor dim].

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
        """Provenance, [entered total] int64: the row, among tokens leaving block `depth`, that holds each; -1 if dropped."""
        owner = torch.arange(self.input_tokens.layout.total, device=self.input_tokens.x.device)
        for step in self.layers[: depth + 1]:
            if step.reduction is not None:
                target = step.reduction.target()
                owner = torch.where(owner >= 0, target[owner.clamp(min=0)], owner)
        return owner


class Collector(list[PruneTrace]):
    """The traces of one who collects. tokens: whether each step keeps what left its block."""

    def __init__(self, tokens: bool = False):
        super().__init__()
        self.tokens = tokens
        self._thread = threading.local()

    def add(self, trace: PruneTrace) -> None:
        """A tower has run."""
        self.append(trace)
        self._thread.last = trace

    def add_decode_stats(self, decoded: DecodeStats) -> None:
        """A decoder has run: it looks at what the tower left that ran last in the same thread."""
        last = getattr(self._thread, "last", None)
        if last is not None:
            last.decode_stats.append(decoded)


_own: ContextVar[tuple[Collector, ...]] = ContextVar("collectors", default=())
_lock = threading.Lock()
_shared: list[Collector] = []  # those that other threads report to, in the whole process


@contextlib.contextmanager
def collect(tokens: bool = False, threads: bool = True) -> Iterator[list[PruneTrace]]:
    """Within the `with` block, a list of the traces of every pruned tower that runs, in order; also in foreign code.

    tokens: whether each `LayerTrace.tokens` is what left its block, for those who want features of single blocks (forward
    hooks on blocks do not fire, for a block is run in parts). Without it none of them is kept in memory.

    A thread that collects reports to its own lists alone. threads: whether those that collect nothing themselves, such as
    the workers of a pool, report to this list too, whoever started them; their traces come in the order in which they end.
    What `backward` runs once more, under gradient checkpointing, is no call.
    """
    collector = Collector(tokens)
    token = _own.set((*_own.get(), collector))
    if threads:
        with _lock:
            _shared.append(collector)
    try:
        yield collector
    finally:
        if threads:
            with _lock:
                _shared[:] = [other for other in _shared if other is not collector]  # lists of equal traces are equal
        _own.reset(token)


def active_collectors() -> tuple[Collector, ...]:
    """Those who collect what this thread does now."""
    if torch._C._current_graph_task_id() != -1:  # in `backward`, as torch.utils.checkpoint asks
        return ()
    own = _own.get()
    if own:
        return own
    with _lock:
        return tuple(_shared)


def report_decode_stats(decoded: DecodeStats) -> None:
    """A decoder says what it did: it goes to the trace of the tower that ran last, which is the one it looks at."""
    for collector in active_collectors():
        collector.add_decode_stats(decoded)
