"""Host interface: what a host says of a tower, and a composite of its towers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.attention import PairBias
from ..core.tokens import PackedTokens
from ..layers.block_spec import BlockSpec
from ..pruning.decode_stats import DecodeStats


class Host(ABC):
    """Takes towers of one type apart. Stateless; speaks in the tower's own submodules and leaves them as they are.

    A forward pass is `embed`, then for each block `qkv`, attention, `project`, `feed_forward`, then `head`. A block input is
    what a block gets besides its tokens: rotary tables, biases, the memory that it cross-attends to, or None. `call` and
    `answer` stand at its two ends, for towers that are called by keywords and answer in more than one form.
    """

    tower: str = "image"
    encoder: ClassVar[type[nn.Module] | None] = None  # a PrunedEncoder with what the library reads of such a tower

    @classmethod
    def from_module(cls, module: nn.Module) -> Host:
        """The host for a module of the registered type."""
        return cls()

    def check(self, tower: nn.Module) -> None:  # noqa: B027  (most towers have nothing more to check)
        """TypeError or ValueError, with what is supported, for a tower of the right type with parts we cannot take apart."""

    def call(self, tower: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        """The positional inputs of `embed` for a call tower(*inputs, **named). TypeError for arguments that it lacks.

        A keyword that the dense tower has as well, and that says what it says by default, may be there.
        """
        if named:
            own, dense = (inspect.signature(call).parameters for call in (self.embed, tower.forward))
            named = {
                name: value
                for name, value in named.items()
                if name in own or name not in dense or value is not dense[name].default
            }
        bound = inspect.signature(self.embed).bind(tower, *inputs, **named)
        bound.apply_defaults()
        return bound.args[1:]

    def answer(self, tower: nn.Module, out: Any, **named: Any) -> Any:
        """What `head` returned, in the form that the call's keywords ask for."""
        return out

    @abstractmethod
    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]: ...

    @abstractmethod
    def spec(self, tower: nn.Module, depth: int, name: str) -> BlockSpec:
        """What is known of block `depth`; `name` is the name of the tower in its model."""

    @abstractmethod
    def embed(self, tower: nn.Module, *inputs: Any) -> tuple[PackedTokens, tuple[Any, ...]]:
        """All before the first block. Returns the tokens, and one input for each block. ValueError for bad input."""

    @abstractmethod
    def qkv(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value, each [total, heads, head_dim], as they enter the dot product."""

    @abstractmethod
    def scale(self, block: nn.Module) -> float:
        """What the dot products are multiplied by."""

    def pairs(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> PairBias | None:
        """What the dot products get for how far apart two tokens stood; None for nothing."""
        return None

    @abstractmethod
    def project(self, block: nn.Module, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        """Output projection, scale, drop path, residual (and norm): context [total, heads, head_dim]."""

    @abstractmethod
    def feed_forward(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> PackedTokens:
        """The rest of the block: cross-attention, MLP."""

    @abstractmethod
    def head(self, tower: nn.Module, tokens: PackedTokens, block_inputs: tuple[Any, ...]) -> Any:
        """Final norm and pooling: what tower(*inputs) returns."""

    def padded_length(self, *inputs: Any) -> int | None:
        """Tokens an instance that the dense tower computes on, where its inputs have padding; None where they have none."""
        return None

    def causal(self, tower: nn.Module) -> bool:
        """Whether a token sees only what stands before it."""
        return False

    def pools_free(self, tower: nn.Module) -> bool:
        """Whether what the tower returns is made of unprotected tokens alone, so that one at least must stay."""
        return False

    def recomputes(self, tower: nn.Module) -> bool:
        """Whether the tower was told to save memory in training by recomputing its blocks (gradient checkpointing)."""
        return bool(getattr(tower, "grad_checkpointing", False))

    def projects_affinely(self, block: nn.Module) -> bool:
        """Whether `project` is x + A(context) with affine A, so that tokens may be averaged before it."""
        return False

    def attention_dropout(self, block: nn.Module) -> float:
        """Dropout on the attention weights, zero outside training."""
        return 0.0


class Composite(ABC):
    """A model of several towers that share a guide."""

    @classmethod
    def from_module(cls, module: nn.Module) -> Composite:
        return cls()

    @abstractmethod
    def towers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Host]]:
        """The dense towers by name, each with its host."""

    @abstractmethod
    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        """A model like `model` that runs these towers and shares everything else; `model` stays as it is."""

    def listeners(self, model: nn.Module) -> dict[str, BlockSpec]:
        """What the guide aligns with the towers and nobody prunes, by name; one spec each."""
        return {}

    def head_macs(self, model: nn.Module) -> float:
        """MACs of what stands behind the towers, once an instance."""
        return 0.0

    def decoder_macs(self, model: nn.Module, decoded: Iterable[DecodeStats], memory: int) -> float:
        """MACs of a decoder behind the towers that did this, looking at memories of so many tokens, padding included."""
        return 0.0
