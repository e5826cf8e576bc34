"""Towers around another one: the inner tower's own host takes it apart, and what stands behind it comes at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..attention import PairBias
from ..layers.site import Site
from ..tokens import PackedTokens
from .base import Host, find_host


class Wrapper(Host):
    """A tower that holds another, the `name` child, and only changes how it is entered and left."""

    name: ClassVar[str]

    def __init__(self, inner: Host):
        self.inner = inner

    @classmethod
    def of(cls, module: nn.Module) -> Wrapper:
        return cls(find_host(getattr(module, cls.name)))

    def within(self, tower: nn.Module) -> Any:
        """The inner tower."""
        return getattr(tower, self.name)

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        return self.inner.blocks(self.within(tower))

    def site(self, tower: nn.Module, depth: int, name: str) -> Site:
        return self.inner.site(self.within(tower), depth, name)

    def open(self, tower: nn.Module, *inputs: Any) -> tuple[PackedTokens, tuple[Any, ...]]:
        return self.inner.open(self.within(tower), *inputs)

    def qkv(self, block: nn.Module, tokens: PackedTokens, beside: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.qkv(block, tokens, beside)

    def scale(self, block: nn.Module) -> float:
        return self.inner.scale(block)

    def pairs(self, block: nn.Module, tokens: PackedTokens, beside: Any) -> PairBias | None:
        return self.inner.pairs(block, tokens, beside)

    def mix(self, block: nn.Module, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return self.inner.mix(block, tokens, context)

    def feed(self, block: nn.Module, tokens: PackedTokens, beside: Any) -> PackedTokens:
        return self.inner.feed(block, tokens, beside)

    def padded_length(self, *inputs: Any) -> int | None:
        return self.inner.padded_length(*inputs)

    def causal(self, tower: nn.Module) -> bool:
        return self.inner.causal(self.within(tower))

    def pools_free(self, tower: nn.Module) -> bool:
        return self.inner.pools_free(self.within(tower))

    def recomputes(self, tower: nn.Module) -> bool:
        return self.inner.recomputes(self.within(tower))

    def mixes_affinely(self, block: nn.Module) -> bool:
        return self.inner.mixes_affinely(block)

    def attention_dropout(self, block: nn.Module) -> float:
        return self.inner.attention_dropout(block)
