"""Host interface: how a tower is run with its own submodules, and which towers a composite model has."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.attention import Pairs
from ..core.regions import Regions
from ..core.tokens import PackedTokens
from ..layers.block_spec import BlockSpec
from ..layers.guides.base import TokenProjection
from ..pruning.decode_stats import DecodeStats


class Host(ABC):
    """Runs the towers of one type step by step, by calling their own submodules, which it leaves as they are.

    A forward pass is `embed`, then for each block `qkv`, attention, `project` and `feed_forward`, then `head`. A block input is
    what a block gets in addition to its tokens: rotary tables, biases, the memory that it cross-attends to, or None.
    `bind_arguments` and `format_output` are for towers that are called by keywords and return more than one form.

    A host has no state of its own. Register it by the tower's type, `hosts.register("package.module.Class")`.

    Attributes:
        tower: Name of the tower where it is a model by itself: "image", "text", or "fusion" for both in one sequence.
        pruned_class: A subclass of PrunedEncoder with the attributes that the library expects of such a tower; None for
            PrunedEncoder itself.
        copies: How many rows of attention of an instance are copies of others that the dense tower does not have; 0 where a
            token is one row.
    """

    tower: str = "image"
    pruned_class: ClassVar[type[nn.Module] | None] = None
    copies: int = 0

    @classmethod
    def from_module(cls, module: nn.Module) -> Host:
        """Build the host of a module of the registered type."""
        return cls()

    # most towers have nothing more to check
    def check(self, tower: nn.Module) -> None:  # noqa: B027
        """Check that a tower of the right type has parts that this host can run.

        Raises:
            TypeError: For another part; with what is supported.
            ValueError: For an option of the tower that is not supported.
        """

    def bind_arguments(self, tower: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        """Bind a call tower(*inputs, **named) to the inputs of `embed`.

        A keyword that only the dense tower takes is allowed if it has its default value.

        Args:
            tower: The dense tower.
            *inputs: Positional arguments of the call.
            **named: Keyword arguments of the call.

        Returns:
            The positional arguments of `embed` behind the tower, defaults included.

        Raises:
            TypeError: For arguments that `embed` does not take.
        """
        if named:
            takes, dense = (inspect.signature(call).parameters for call in (self.embed, tower.forward))
            named = {
                name: value
                for name, value in named.items()
                if name in takes or name not in dense or value is not dense[name].default
            }
        bound = inspect.signature(self.embed).bind(tower, *inputs, **named)
        bound.apply_defaults()
        return bound.args[1:]

    def format_output(self, tower: nn.Module, out: Any, **named: Any) -> Any:
        """Give the output the form that the call's keywords ask for.

        Args:
            tower: The dense tower.
            out: What `head` returned.
            **named: Keyword arguments of the call, such as `return_dict` in transformers.

        Returns:
            What tower(...) returns for these keywords.
        """
        return out

    @abstractmethod
    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        """The tower's blocks, first to last."""

    @abstractmethod
    def spec(self, tower: nn.Module, depth: int, name: str) -> BlockSpec:
        """Describe a block to the parts that are built for it.

        Args:
            tower: The dense tower.
            depth: Index of the block, from 0.
            name: The tower's name in its model, such as "image".

        Returns:
            Position, width and heads of the block, and what kind of tower it is in.
        """

    @abstractmethod
    def embed(self, tower: nn.Module, *inputs: Any) -> tuple[PackedTokens, tuple[Any, ...]]:
        """Run everything before the first block.

        Args:
            tower: The dense tower.
            *inputs: Images [batch, channels, H, W], or token ids [batch, length] with what the tower takes besides.

        Returns:
            The tokens, and one block input for each block.

        Raises:
            ValueError: For inputs that the tower cannot take.
        """

    @abstractmethod
    def qkv(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Compute query, key and value, as they enter the dot product.

        Args:
            block: The block.
            tokens: Tokens before the block, x [total, dim].
            block_input: What `embed` returned for this block.

        Returns:
            Query, key and value, each [total, heads, head_dim]; one row for each of `regions`, where the block has some.

        Raises:
            TypeError: For an attention that the host cannot run, such as one inside an adapter.
        """

    def regions(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> Regions | None:
        """Which tokens attend to each other, where these are not all of an instance, or where a token is several patches.

        Args:
            block: The block.
            tokens: Tokens before the block.
            block_input: What `embed` returned for this block.

        Returns:
            The regions; None where all tokens of an instance attend to each other, one row each.
        """
        return None

    # most hosts have no cache
    def store(self, block: nn.Module, tokens: PackedTokens, k: Tensor, v: Tensor, block_input: Any) -> None:  # noqa: B027
        """Keep the keys and values that attention of a block reads, where the call has a cache.

        Args:
            block: The block.
            tokens: The tokens that they are of.
            k: Keys [total, heads, head_dim].
            v: Values [total, heads, head_dim].
            block_input: What `embed` returned for this block.
        """

    @abstractmethod
    def scale(self, block: nn.Module) -> float:
        """The factor of the dot products."""

    def pair_bias(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> Pairs | None:
        """Relative position bias of the attention logits, or which keys a query sees, by two tokens' original positions.

        Args:
            block: The block.
            tokens: Tokens before the block.
            block_input: What `embed` returned for this block.

        Returns:
            The bias or the mask; None for a block without one.
        """
        return None

    def softcap(self, block: nn.Module) -> float | None:
        """The limit c of dot products x, which become c * tanh(x / c); None for none."""
        return None

    @abstractmethod
    def project(self, block: nn.Module, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        """Run what follows attention: output projection, scale, drop path, residual (and norm).

        Args:
            block: The block.
            tokens: Tokens before the block, x [total, dim].
            context: Output of attention [total, heads, head_dim]; [total, rows, heads, head_dim] where the block has `regions`.

        Returns:
            The tokens with the new x [total, dim].
        """

    @abstractmethod
    def feed_forward(self, block: nn.Module, tokens: PackedTokens, block_input: Any) -> PackedTokens:
        """Run the rest of the block: cross-attention where it has one, and the MLP.

        Args:
            block: The block.
            tokens: Tokens that `project` returned and pruning kept, x [total, dim].
            block_input: What `embed` returned for this block.

        Returns:
            The tokens behind the block, x [total, dim].
        """

    @abstractmethod
    def head(self, tower: nn.Module, tokens: PackedTokens, block_inputs: tuple[Any, ...]) -> Any:
        """Run the final norm, pooling and projection.

        Args:
            tower: The dense tower.
            tokens: Tokens behind the last block, x [total, dim].
            block_inputs: What `embed` returned, one block input for each block.

        Returns:
            What tower(*inputs) returns.

        Raises:
            ValueError: In soft training, for a pooling that cannot weigh tokens that are kept in part.
        """

    def projection(self, tower: nn.Module) -> TokenProjection | None:
        """What maps the tower's tokens to embeddings that it shares with other towers; None where the host knows of none."""
        return None

    def padded_length(self, tokens: PackedTokens, *inputs: Any) -> int | None:
        """The number of tokens per instance that the dense tower computes on, padding included.

        Args:
            tokens: What `embed` returned for the inputs.
            *inputs: As `embed` takes them.

        Returns:
            The number; None for inputs without padding.
        """
        return None

    def causal(self, tower: nn.Module) -> bool:
        """Whether a token attends only to itself and to those before it."""
        return False

    def pools_unprotected(self, tower: nn.Module) -> bool:
        """Whether the tower's output is made of unprotected tokens alone, so that at least one must be kept."""
        return False

    def gradient_checkpointing(self, tower: nn.Module) -> bool:
        """Whether the tower recomputes its blocks in training to save memory."""
        return bool(getattr(tower, "grad_checkpointing", False))

    def projects_affinely(self, block: nn.Module) -> bool:
        """Whether `project` is x + A(context) with an affine map A, so that tokens may be averaged before it."""
        return False

    def attention_dropout(self, block: nn.Module) -> float:
        """Dropout probability of the attention weights; 0 outside training."""
        return 0.0


@dataclass(frozen=True)
class LanguageCost:
    """What a dense language model behind an image tower costs.

    Attributes:
        token: MACs per token, in all layers.
        pair: MACs per pair of a query and a key, in all layers.
        word: MACs of the logits of one token.
        cache_bytes: Bytes of keys and values per token, in all layers.
        layers: How many layers it has.
        row: MACs of the projector per visual token, where they are not counted with the image tower.
    """

    token: float
    pair: float
    word: float
    cache_bytes: int
    layers: int
    row: float = 0.0

    def decode(self, prompts: int, cached: float, tokens: int = 1) -> float:
        """MACs of tokens that are generated behind prompts; each attends to itself too.

        Args:
            prompts: The number of prompts.
            cached: Tokens of all prompts in the cache, mean over layers.
            tokens: How many tokens are generated behind each prompt.

        Returns:
            The sum over prompts.
        """
        pairs = tokens * cached + prompts * tokens * (tokens + 1) / 2
        return (self.token + self.word) * prompts * tokens + self.pair * pairs


class Composite(ABC):
    """Names the towers of a model that has several, and assembles the model of pruned ones."""

    @classmethod
    def from_module(cls, module: nn.Module) -> Composite:
        """Build the composite of a module of the registered type."""
        return cls()

    @abstractmethod
    def towers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Host]]:
        """The dense towers by name, each with its host."""

    @abstractmethod
    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        """Copy a model with other towers. The copy shares everything else; `model` stays as it is.

        Args:
            model: The dense model.
            towers: The pruned towers by name, one for each of `towers(model)`.

        Returns:
            The copy.
        """

    def inside(self, model: nn.Module) -> Composite:
        """The composite that prunes blocks of the image tower, where this one prunes behind it; else this one.

        Args:
            model: The dense model.
        """
        return self

    def why_without(self, model: nn.Module, tower: str) -> str:
        """Say why a model has no tower of a name.

        Args:
            model: The dense model.
            tower: A name that is not in `towers(model)`.

        Returns:
            The end of a sentence, ": ..."; empty where there is nothing to say.
        """
        return ""

    def exported_alone(self, model: nn.Module) -> Mapping[str, str] | None:
        """The towers that are exported where a model as a whole is not, or only dense and with one instance.

        Args:
            model: The dense model.

        Returns:
            The dotted name of each such tower in the model, by the name of the tower; None for a model that is exported whole.
        """
        return None

    def projections(self, model: nn.Module) -> dict[str, TokenProjection]:
        """What maps tokens to embeddings that the towers share, by tower, where modules outside of the towers do."""
        return {}

    def guide_specs(self, model: nn.Module) -> dict[str, BlockSpec]:
        """Modules that the guide aligns with the towers and that are not pruned, by name; one spec each."""
        return {}

    def head_macs(self, model: nn.Module) -> float:
        """MACs of the heads behind the towers, per instance."""
        return 0.0

    def language_cost(self, model: nn.Module) -> LanguageCost | None:
        """What the language model of a dense model costs that reads an image tower's tokens; None without one."""
        return None

    def decoder_macs(self, model: nn.Module, decoded: Iterable[DecodeStats], memory: int) -> float | Tensor:
        """MACs of a decoder behind the towers, with attention counted whole, masked and padded pairs included.

        Args:
            model: The dense model.
            decoded: What the decoder computed, one record a call.
            memory: Tokens of each memory that it cross-attends to, padding included.

        Returns:
            MACs of all calls; 0 for a model without a decoder. In soft training with the gradients of the cost.
        """
        return 0.0
