"""BLIP's text tower: a BERT encoder whose layers can cross-attend to image tokens.

The architecture is the multimodal mixture of encoder-decoder (MED) of Li et al., BLIP, arXiv 2201.12086, section 3.1: post-norm
BERT with a cross-attention between self-attention and MLP. For NLVR2 each image has a cross-attention stream of its own, and
the streams' outputs are averaged or merged by a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core.checks import is_recorded

EPS = 1e-12  # BERT's layer norms


class Attention(nn.Module):
    """Multi-head attention with separate query, key, value and output projections.

    Args:
        width: Width of the tokens that attend; a multiple of `heads`.
        heads: Number of attention heads.
        memory_width: Width of the tokens attended to; None for `width`.

    Raises:
        ValueError: If `width` is no multiple of `heads`.
    """

    def __init__(self, width: int, heads: int, memory_width: int | None = None):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not split into {heads} heads: choose a multiple")
        self.heads, self.head_dim = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width or width, width)
        self.value = nn.Linear(memory_width or width, width)
        self.output = nn.Linear(width, width)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of memory [batch, m, memory_width], each [batch, heads, m, head_dim]."""
        return self._split_heads(self.key(memory)), self._split_heads(self.value(memory))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend to given keys and values, and project the output.

        Args:
            x: Tokens that attend [batch, n, width].
            keys: [batch, heads, m, head_dim].
            values: [batch, heads, m, head_dim].
            mask: Broadcastable to [batch, heads, n, m]: bool, true where a token may attend, or float, added to the logits.

        Returns:
            [batch, n, width], before the residual.
        """
        context = F.scaled_dot_product_attention(self._split_heads(self.query(x)), keys, values, attn_mask=mask)
        return self.output(rearrange(context, "b h n d -> b n (h d)"))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend to a memory.

        Args:
            x: Tokens that attend [batch, n, width].
            memory: Tokens attended to [batch, m, memory_width].
            mask: As in `attend`.

        Returns:
            [batch, n, width], before the residual.
        """
        return self.attend(x, *self.keys_values(memory), mask)

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class CrossAttention(nn.Module):
    """Cross-attention with one stream per image; the streams' outputs are averaged, or merged by a linear layer.

    Args:
        width: Width of the text tokens.
        heads: Attention heads of each stream.
        memory_width: Width of the image tokens.
        images: Images per sentence, each with its own stream.
        merge: Whether a linear layer merges the streams, as in the upper layers of BLIP for NLVR2.
    """

    def __init__(self, width: int, heads: int, memory_width: int, images: int = 1, merge: bool = False):
        super().__init__()
        self.images = images
        # an nn.ModuleList, which does not say what its modules are
        self.streams = cast(
            Sequence[Attention], nn.ModuleList(Attention(width, heads, memory_width) for _ in range(images))
        )
        self.merge = nn.Linear(images * width, width) if merge else None
        self.norm = nn.LayerNorm(width, eps=EPS)

    def combine(self, outputs: list[Tensor]) -> Tensor:
        """Combine the streams' outputs, each [..., width], to [..., width]."""
        if self.merge is not None:
            return self.merge(torch.cat(outputs, -1))
        return torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0]

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Attend from sentences to their images.

        Args:
            x: Text tokens [sentences, n, width], `sentences` a multiple of `groups`.
            memory: Image tokens [groups * images, m, memory_width].

        Returns:
            [sentences, n, width], before the residual.
        """
        groups = len(memory) // self.images
        # the sentences about one group of images share its keys and values
        grouped = x.reshape(groups, -1, x.shape[-1])
        views = memory.unflatten(0, (groups, self.images)).unbind(1)

        outputs = [stream(grouped, view) for stream, view in zip(self.streams, views, strict=True)]
        return self.combine(outputs).reshape(x.shape)


class MedLayer(nn.Module):
    """A post-norm BERT layer: self-attention, cross-attention where there is a memory, MLP.

    Args:
        width: Width of the tokens.
        heads: Attention heads.
        dropout: Dropout probability on each branch.
        cross: Cross-attention, or None for a layer without one.
    """

    def __init__(self, width: int, heads: int, dropout: float, cross: CrossAttention | None):
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.cross = cross
        self.fc1 = nn.Linear(width, 4 * width)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP with its residual and norm: x [..., width] -> [..., width]."""
        return self.norm(x + self.dropout(self.fc2(self.activation(self.fc1(x)))))

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: Text tokens [sentences, n, width].
            memory: Image tokens, as in `CrossAttention.forward`; None to leave cross-attention out.
            mask: Mask of the self-attention, as in `Attention.attend`.

        Returns:
            [sentences, n, width].
        """
        x = self.attention_norm(x + self.dropout(self.attention(x, x, mask)))
        if memory is not None and self.cross is not None:
            x = self.cross.norm(x + self.dropout(self.cross(x, memory)))
        return self.feed_forward(x)


class MedEncoder(nn.Module):
    """A BERT encoder of token ids, which may cross-attend to the tokens of images.

    Args:
        vocab_size: Number of token ids.
        max_positions: Longest sentence, in tokens.
        width: Width of the tokens.
        depth: Number of layers.
        heads: Attention heads of each layer.
        memory_width: Width of the image tokens; None for no cross-attention at all.
        images: Images per sentence.
        merge_from: First layer whose streams are merged by a linear layer rather than averaged.
        dropout: Dropout probability on embeddings and on each branch.

    Raises:
        ValueError: If `width` is no multiple of `heads`.
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        width: int,
        depth: int,
        heads: int,
        memory_width: int | None = None,
        images: int = 1,
        merge_from: int = 6,
        dropout: float = 0.0,
    ):
        super().__init__()

        def cross(index: int) -> CrossAttention | None:
            merge = images > 1 and index >= merge_from
            return CrossAttention(width, heads, memory_width, images, merge) if memory_width else None

        self.vocab_size, self.max_positions, self.width = vocab_size, max_positions, width
        self.word = nn.Embedding(vocab_size, width, padding_idx=0)
        self.position = nn.Embedding(max_positions, width)
        self.embedding_norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        # an nn.ModuleList, which does not say what its modules are
        self.layers = cast(
            Sequence[MedLayer], nn.ModuleList(MedLayer(width, heads, dropout, cross(index)) for index in range(depth))
        )
        self.images = images
        self.apply(initialize)

    def embed(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """Embed token ids with their positions.

        Args:
            input_ids: Token ids [batch, length] int64.
            start: Position of the first of them: how many tokens of the sentence came before.

        Returns:
            Embeddings [batch, length, width].

        Raises:
            ValueError: For ids of another shape or out of range, and for sentences past `max_positions`.
        """
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be [batch, length] and not empty, got {list(input_ids.shape)}")
        longest, end = self.max_positions, start + input_ids.shape[1]
        if end > longest:
            raise ValueError(
                f"input_ids has {end} tokens, the text tower has max_positions={longest}: "
                "shorten the sentences, or build the model with a larger max_positions"
            )
        if not is_recorded() and (input_ids.min() < 0 or input_ids.max() >= self.vocab_size):
            raise ValueError(f"input_ids must lie in 0 .. {self.vocab_size - 1} (vocab_size)")
        x = self.word(input_ids) + self.position(torch.arange(start, end, device=input_ids.device))
        return self.dropout(self.embedding_norm(x))

    def check_memory(self, sentences: int, memories: int) -> None:
        """Check that the sentences of a batch divide evenly over its images.

        Args:
            sentences: Number of sentences.
            memories: Number of images, or of other memories.

        Raises:
            ValueError: If the images form no groups, or the groups do not divide the sentences.
        """
        if memories % self.images or memories == 0 or sentences % (memories // self.images):
            raise ValueError(
                f"{sentences} sentences cannot be about {memories} images at {self.images} images a sentence: "
                "give each group of images the same number of sentences, group after group"
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """Encode sentences, alone or with their images.

        Args:
            input_ids: Token ids [batch, length] int64.
            attention_mask: [batch, length], nonzero where a token is real; None for everywhere.
            memory: Image tokens [batch / k * images, m, memory_width]: consecutive images form a group, and k consecutive
                sentences are about one group. None for sentences alone.

        Returns:
            Hidden states [batch, length, width].

        Raises:
            ValueError: For sentences past `max_positions`, and for batches that do not match.
        """
        x = self.embed(input_ids)
        if memory is not None:
            self.check_memory(len(input_ids), len(memory))
        mask = None if attention_mask is None else rearrange(attention_mask.bool(), "b n -> b 1 1 n")

        for layer in self.layers:
            x = layer(x, memory, mask)
        return x


class QuestionEncoder(MedEncoder):
    """A `MedEncoder` of questions, to whose hidden states a decoder attends. Pruned, it returns them packed.

    Args:
        vocab_size, max_positions, width, depth, heads, memory_width, images, merge_from, dropout: As in `MedEncoder`.
    """


def initialize(module: nn.Module) -> None:
    """Initialize one module as BERT does: weights normal with deviation 0.02, biases and padding embedding zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
