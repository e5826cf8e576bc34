"""Hosts of towers that wrap another tower: the inner host runs its blocks, the outer one what comes before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.attention import Pairs
from ..core.tokens import PackedTokens
from ..layers.block_spec import BlockSpec
from .base import Host
from .find import find_host


class WrapperHost(Host):
    """Host of a tower that wraps another and changes only how it is called and what it returns.

    Args:
        inner: Host of the wrapped tower.

    Attributes:
        name: Name of the child that is the wrapped tower.
    """

    name: ClassVar[str]

    def __init__(self, inner: Host):
        self.inner = inner

    @classmethod
    def from_module(cls, module: nn.Module) -> WrapperHost:
        return cls(find_host(module.get_submodule(cls.name)))

    def inner_tower(self, tower: nn.Module) -> nn.Module:
        """The wrapped tower."""
        return tower.get_submodule(self.name)

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        return self.inner.blocks(self.inner_tower(tower))

    def spec(self, tower: nn.Module, depth: int, name: str) -> BlockSpec:
        return self.inner.spec(self.inner_tower(tower), depth, name)

    def embed(self, tower: nn.Module, *inputs: Any) -> tuple[PackedTokens, tuple[Any, ...]]:
        return self.inner.embed(self.inner_tower(tower), *inputs)

    def qkv(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.qkv(block, tokens, block_input)

    def store(self, block: nn.Module, tokens: PackedTokens, k: Tensor, v: Tensor, block_input: Any) -> None:
        self.inner.store(block, tokens, k, v, block_input)

    def scale(self, block: nn.Module) -> float:
        return self.inner.scale(block)

    def pair_bias(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> Pairs | None:
        return self.inner.pair_bias(block, tokens, block_input)

    def softcap(self, block: nn.Module) -> float | None:
        return self.inner.softcap(block)

    def project(self, block: nn.Module, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return self.inner.project(block, tokens, context)

    def feed_forward(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> PackedTokens:
        return self.inner.feed_forward(block, tokens, block_input)

    def padded_length(self, tokens: PackedTokens, *inputs: Any) -> int | None:
        return self.inner.padded_length(tokens, *inputs)

    def causal(self, tower: nn.Module) -> bool:
        return self.inner.causal(self.inner_tower(tower))

    def pools_unprotected(self, tower: nn.Module) -> bool:
        return self.inner.pools_unprotected(self.inner_tower(tower))

    def gradient_checkpointing(self, tower: nn.Module) -> bool:
        return self.inner.gradient_checkpointing(self.inner_tower(tower))

    def projects_affinely(self, block: nn.Module) -> bool:
        return self.inner.projects_affinely(block)

    def attention_dropout(self, block: nn.Module) -> float:
        return self.inner.attention_dropout(block)
