"""Hosts of towers that wrap another tower: the inner tower's host runs it, the outer adds what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.attention import PairBias
from ..core.tokens import PackedTokens
from ..layers.block_spec import BlockSpec
from .base import Host
from .find import find_host


class Wrapper(Host):
    """A tower that holds another, the `name` child, and only changes how it is entered and left."""

    name: ClassVar[str]

    def __init__(self, inner: Host):
        self.inner = inner

    @classmethod
    def from_module(cls, module: nn.Module) -> Wrapper:
        return cls(find_host(getattr(module, cls.name)))

    def within(self, tower: nn.Module) -> Any:
        """The inner tower."""
        return getattr(tower, self.name)

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        return self.inner.blocks(self.within(tower))

    def spec(self, tower: nn.Module, depth: int, name: str) -> BlockSpec:
        return self.inner.spec(self.within(tower), depth, name)

    def embed(self, tower: nn.Module, *inputs: Any) -> tuple[PackedTokens, tuple[Any, ...]]:
        return self.inner.embed(self.within(tower), *inputs)

    def qkv(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.qkv(block, tokens, block_input)

    def scale(self, block: nn.Module) -> float:
        return self.inner.scale(block)

    def pairs(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> PairBias | None:
        return self.inner.pairs(block, tokens, block_input)

    def project(self, block: nn.Module, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return self.inner.project(block, tokens, context)

    def feed_forward(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> PackedTokens:
        return self.inner.feed_forward(block, tokens, block_input)

    def padded_length(self, *inputs: Any) -> int | None:
        return self.inner.padded_length(*inputs)

    def causal(self, tower: nn.Module) -> bool:
        return self.inner.causal(self.within(tower))

    def pools_free(self, tower: nn.Module) -> bool:
        return self.inner.pools_free(self.within(tower))

    def recomputes(self, tower: nn.Module) -> bool:
        return self.inner.recomputes(self.within(tower))

    def projects_affinely(self, block: nn.Module) -> bool:
        return self.inner.projects_affinely(block)

    def attention_dropout(self, block: nn.Module) -> float:
        return self.inner.attention_dropout(block)
