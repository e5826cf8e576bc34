"""Base classes of transformers' hosts: calls and outputs, attention projections, image and text towers, pre-norm blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import PushToHubMixin

from ...core.checks import check_ids, check_images, is_recorded
from ...core.tokens import PackedTokens
from ...layers.block_spec import BlockSpec
from ...pruning.encoder import PrunedEncoder
from ..attributes import forward_attributes
from ..base import Host
from ..composites import WithTowers
from ..ops import by_tiles, check_blocks, is_affine
from .saving import save_pretrained, with_pruning_saved

# all of them compute the same numbers
_KERNELS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
# arguments of trainers and tokenizers that an encoder's output does not depend on
_WITHOUT_EFFECT = ("num_items_in_batch", "labels", "return_loss", "use_cache", "token_type_ids")
# what a call or a configuration may ask for and pruning cannot give
_EXTRAS = ("output_attentions", "output_hidden_states", "is_causal")


@forward_attributes(
    "config", "device", "dtype", "main_input_name", "input_modalities", "base_model_prefix", "name_or_path"
)
@forward_attributes("generation_config", "can_generate", "dummy_inputs", "hf_device_map", "warnings_issued")
@forward_attributes("get_input_embeddings", "set_input_embeddings", "resize_token_embeddings")
@forward_attributes("enable_input_require_grads", "disable_input_require_grads", "supports_gradient_checkpointing")
@forward_attributes("gradient_checkpointing_enable", "gradient_checkpointing_disable", "is_gradient_checkpointing")
@forward_attributes(
    "activation_checkpointing_enable", "activation_checkpointing_disable", "is_activation_checkpointing"
)
class PrunedTransformer(PrunedEncoder, PushToHubMixin):
    """A pruned tower of transformers, with the attributes that its pipelines, trainer and composite models expect.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """

    @property
    def base_model(self) -> nn.Module:
        """The tower itself, as for any model without a head."""
        return self

    def save_pretrained(self, save_directory: str | Path, **named: Any) -> None:
        """Save as transformers' method, and the pruning in a file more, which `vltprune.load` reads.

        Args:
            save_directory: The folder to write.
            **named: Arguments of transformers' method.

        Raises:
            ValueError: For `push_to_hub=True`, for parts that were exchanged by hand, and for adapters of peft.
        """
        save_pretrained(self, save_directory, **named)


class TransformersHost(Host):
    """Host of a tower of transformers, which is called by keywords and returns transformers' output classes.

    A `last_hidden_state` of pruned tokens holds the kept ones, in their order, and zeros behind them. `embed` names its
    arguments as the tower does, and takes those that pruning supports.

    Attributes:
        layers: Dotted name of the blocks in a tower.
        attention: Dotted name of the attention in a block.
        head_size: The attention's attribute for the width of a head.
        projections: The attention's query, key and value projections.
        dropout: The attention's attribute for the dropout of its weights.
        known: Types of blocks, each with the types of attention it may have.
        has_summary: Whether one token summarizes its instance.
        runs: How many blocks are run; None for all. Set where a model reads the output of an earlier block.
    """

    pruned_class = PrunedTransformer
    runs: int | None = None
    layers: ClassVar[str]
    attention: ClassVar[str]
    head_size: ClassVar[str] = "head_dim"
    projections: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")
    dropout: ClassVar[str] = "dropout"
    known: ClassVar[Mapping[type, Sequence[type]]]
    has_summary: ClassVar[bool] = True

    def check(self, tower: PreTrainedModel) -> None:
        check_blocks(tower, self.blocks(tower), self.known, self.attention)
        kernel = tower.config._attn_implementation
        if kernel not in _KERNELS:
            raise TypeError(
                f"cannot prune this {type(tower).__name__}: its attention implementation is {kernel!r}, which may compute "
                f"anything. Supported: {', '.join(_KERNELS)}"
            )

    def bind_arguments(self, tower: PreTrainedModel, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        given = inspect.signature(tower.forward).bind(*inputs, **named).arguments
        given |= given.pop("kwargs", {})
        for extra in _EXTRAS:
            given.setdefault(extra, getattr(tower.config, extra, False))

        # all but the tower
        takes = list(inspect.signature(self.embed).parameters)[1:]
        asked = [name for name, value in given.items() if value is not None and value is not False]
        unknown = [name for name in asked if name not in (*takes, *_WITHOUT_EFFECT, "return_dict")]
        if unknown:
            raise TypeError(
                f"a pruned {type(tower).__name__} does not take {unknown[0]}: leave it out (hidden states and attentions of "
                f"tokens that are gone cannot be given). Supported: {', '.join(takes)}, return_dict"
            )
        return super().bind_arguments(tower, **{name: value for name, value in given.items() if name in takes})

    def format_output(self, tower: PreTrainedModel, out: Any, **named: Any) -> Any:
        return_dict = named.get("return_dict")
        if return_dict is None:
            return_dict = tower.config.return_dict
        return out if return_dict else out.to_tuple()

    def blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        blocks = attrgetter(self.layers)(tower)
        return blocks if self.runs is None else list(blocks)[: self.runs]

    def spec(self, tower: PreTrainedModel, depth: int, name: str) -> BlockSpec:
        heads, depths = tower.config.num_attention_heads, len(self.blocks(tower))
        return BlockSpec(name, depth, depths, tower.config.hidden_size, heads, self.has_summary, self.causal(tower))

    def attn(self, block: nn.Module) -> Any:
        """The block's attention module."""
        return attrgetter(self.attention)(block)

    def heads(self, attn: Any) -> int:
        """The number of attention heads."""
        return attn.config.num_attention_heads

    def project_qkv(self, attn: Any, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens to query, key and value.

        Args:
            attn: The attention module.
            x: Tokens that attend [total, dim].
            memory: Tokens attended to [total, memory dim]; `x` itself in self-attention.

        Returns:
            Query of `x`, key and value of `memory`, each [total, heads, head_dim].
        """
        query, key, value = (getattr(attn, name) for name in self.projections)
        heads = (self.heads(attn), -1)
        return query(x).unflatten(-1, heads), key(memory).unflatten(-1, heads), value(memory).unflatten(-1, heads)

    def scale(self, block: nn.Module) -> float:
        return getattr(self.attn(block), self.head_size) ** -0.5

    def attention_dropout(self, block: nn.Module) -> float:
        dropout = getattr(self.attn(block), self.dropout)
        probability = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        return probability if block.training else 0.0

    def gradient_checkpointing(self, tower: PreTrainedModel) -> bool:
        return any(block.gradient_checkpointing for block in self.blocks(tower))


class TransformersComposite(WithTowers):
    """A composite of transformers whose towers are children; its `save_pretrained` also writes how they are pruned."""

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        return with_pruning_saved(super().assemble(model, towers))


class PreNormHost(TransformersHost):
    """Host of pre-norm blocks, x + attention(norm(x)), then x + mlp(norm(x)): ViT, DINO, CLIP, ModernBERT.

    Attributes:
        norms: Names of a block's two norms.
        output: The attention's output projection.
    """

    norms: ClassVar[tuple[str, str]]
    output: ClassVar[str] = "o_proj"

    def qkv(self, block: Any, tokens: PackedTokens, block_input: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = getattr(block, self.norms[0])(tokens.x)
        return self.project_qkv(self.attn(block), x, x)

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        branch = getattr(self.attn(block), self.output)(context.flatten(1))
        return tokens.with_x(tokens.x + self.branch(block, 0, branch, tokens))

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: Any) -> PackedTokens:
        norm = getattr(block, self.norms[1])
        branch = by_tiles(lambda x: block.mlp(norm(x)), tokens.x)
        return tokens.with_x(tokens.x + self.branch(block, 1, branch, tokens))

    def branch(self, block: Any, index: int, x: Tensor, tokens: PackedTokens) -> Tensor:
        """Scale or drop a branch before its residual.

        Args:
            block: The block.
            index: 0 for the branch of attention, 1 for that of the MLP.
            x: Output of the branch [total, dim].
            tokens: The tokens that it is added to.

        Returns:
            [total, dim]; `x` as it is, unless overridden.
        """
        return x

    def projects_affinely(self, block: nn.Module) -> bool:
        return is_affine(getattr(self.attn(block), self.output))


class ImageHost(TransformersHost):
    """Host of an image tower. Prefix tokens are protected, and the first of them is the image's summary."""

    def prefix(self, tower: PreTrainedModel) -> int:
        """The number of tokens before the patches."""
        return int(self.has_summary)

    def embed(
        self, tower: Any, pixel_values: Tensor, interpolate_pos_encoding: bool | None = False
    ) -> tuple[PackedTokens, tuple[Any, ...]]:
        images = self.check_pixels(tower, pixel_values, interpolate_pos_encoding)
        x = tower.embeddings(images, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.pack(tower, x), (None,) * len(self.blocks(tower))

    def check_pixels(self, tower: PreTrainedModel, pixel_values: Tensor, any_size: bool | None) -> Tensor:
        """Check images, and cast them to the tower's dtype.

        Args:
            tower: The dense tower.
            pixel_values: [batch, channels, H, W].
            any_size: Whether H and W may differ from the tower's image size.

        Returns:
            The images [batch, channels, H, W].

        Raises:
            ValueError: For no images, another shape, an empty batch, and NaN or infinity.
        """
        if pixel_values is None:
            raise ValueError("pixel_values is None: give the images, as the model's image processor makes them")
        size = tower.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(tower.config, "num_channels", 3)
        check_images(pixel_values, channels, None if any_size else size, "pixel_values")
        return pixel_values.to(tower.dtype)

    def pack(self, tower: PreTrainedModel, x: Tensor, valid: Tensor | None = None) -> PackedTokens:
        """Pack embedded images, prefix tokens protected.

        Args:
            tower: The dense tower.
            x: [batch, n, dim], prefix tokens first.
            valid: [batch, n] bool, false on padding, which does not enter; None for no padding.

        Returns:
            The packed tokens.
        """
        return PackedTokens.pack(x, valid, protected=self.prefix(tower), summary=self.has_summary)


class TextHost(TransformersHost):
    """Host of a text tower. One token of each sentence is protected and its summary: the first, unless overridden."""

    tower = "text"

    def summary_position(self, tower: PreTrainedModel, input_ids: Tensor) -> Tensor | int:
        """The position of each sentence's summary token.

        Args:
            tower: The dense tower.
            input_ids: Token ids [batch, length].

        Returns:
            [batch, 1] int64, or one position for all.
        """
        return 0

    def embed(
        self,
        tower: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[PackedTokens, tuple[Any, ...]]:
        return self.embed_ids(tower, input_ids, attention_mask, position_ids=position_ids)

    def embed_ids(
        self, tower: Any, input_ids: Tensor, attention_mask: Tensor | None, **embedding: Any
    ) -> tuple[PackedTokens, tuple[None, ...]]:
        """Check ids, embed them and pack them without padding.

        Args:
            tower: The tower.
            input_ids: Token ids [batch, length].
            attention_mask: [batch, length], nonzero where a token is real; None for everywhere.
            **embedding: Further arguments of the tower's embeddings.

        Returns:
            The packed tokens, and None as each block's input.

        Raises:
            ValueError: As `pack`, and for ids of another shape, out of range, or past the tower's positions.
        """
        embed = tower.embeddings
        # RoBERTa counts positions from behind its padding token
        first = getattr(embed, "padding_idx", -1) + 1
        longest = tower.config.max_position_embeddings - first
        check_ids(input_ids, tower.config.vocab_size, longest)
        x = embed(input_ids, **embedding)
        return self.pack(x, attention_mask, self.summary_position(tower, input_ids)), (None,) * len(self.blocks(tower))

    def padded_length(self, tokens: PackedTokens, *inputs: Any) -> int:
        return inputs[0].shape[1]

    def pack(self, x: Tensor, attention_mask: Tensor | None, summary_position: Tensor | int) -> PackedTokens:
        """Pack embedded sentences without their padding.

        Args:
            x: [batch, length, dim].
            attention_mask: [batch, length], nonzero where a token is real; None for everywhere.
            summary_position: As `summary_position` returns it.

        Returns:
            The packed tokens, summary tokens protected.

        Raises:
            ValueError: For a mask of another shape, and for one that hides a summary token.
        """
        is_first = isinstance(summary_position, int) and summary_position == 0
        summary = (torch.arange(x.shape[1], device=x.device) == summary_position).expand(x.shape[:2])
        marks: dict[str, Any] = {"protected": summary, "summary": summary, "number_protected": 1}
        if is_first:
            marks = {"protected": 1, "summary": True}
        if attention_mask is None:
            return PackedTokens.pack(x, **marks)
        if attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask must be {list(x.shape[:2])} like input_ids, got {list(attention_mask.shape)}"
            )
        valid = attention_mask.bool()
        hidden = [] if is_recorded() else (summary & ~valid).nonzero().tolist()
        if hidden:
            raise ValueError(
                f"attention_mask hides token {hidden[0][1]} of sentence {hidden[0][0]}, which summarizes it: pad BERT and its "
                "kin on the right, let CLIP see the end of its text, and call SigLIP without a mask (it pools its last token)"
            )
        return PackedTokens.pack(x, valid, **marks)
