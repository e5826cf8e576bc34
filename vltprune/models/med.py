"""BLIP's text tower: BERT whose layers may cross-attend to images.

The architecture is the "multimodal mixture of encoder-decoder" of Li et al., BLIP, arXiv 2201.12086, section 3.1: a
post-norm BERT encoder with a cross-attention between self-attention and feed-forward, and, for NLVR2, one
cross-attention stream per image whose outputs are averaged or merged by a linear layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12  # BERT's layer norms


class Attention(nn.Module):
    """The four projections of multi-head attention; `memory_width` is the width of what keys and values read."""

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
        """memory [batch, m, memory_width] -> its keys and values, each [batch, heads, m, head_dim]."""
        return self._by_head(self.key(memory)), self._by_head(self.value(memory))

    def look(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, n, width] looks at keys and values; mask broadcastable to [batch, heads, n, m], true where it may."""
        context = F.scaled_dot_product_attention(self._by_head(self.query(x)), keys, values, attn_mask=mask)
        return self.output(context.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, n, width], memory [batch, m, memory_width], mask as in `look`."""
        return self.look(x, *self.keys_values(memory), mask)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """One attention stream per image; several streams are averaged, or merged by a linear layer (NLVR2, upper layers)."""

    def __init__(self, width: int, heads: int, memory_width: int, images: int = 1, merge: bool = False):
        super().__init__()
        self.images = images
        self.streams = nn.ModuleList(Attention(width, heads, memory_width) for _ in range(images))
        self.merge = nn.Linear(images * width, width) if merge else None
        self.norm = nn.LayerNorm(width, eps=EPS)

    def combine(self, outputs: list[Tensor]) -> Tensor:
        """One tensor per stream, each [..., width] -> [..., width]."""
        if self.merge is not None:
            return self.merge(torch.cat(outputs, -1))
        return torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0]

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [sentences, n, width]; memory [groups * images, m, memory_width], `sentences` a multiple of `groups`."""
        groups = len(memory) // self.images
        grouped = x.reshape(groups, -1, x.shape[-1])  # the sentences about one pair share its keys and values
        views = memory.unflatten(0, (groups, self.images)).unbind(1)

        outputs = [stream(grouped, view) for stream, view in zip(self.streams, views, strict=True)]
        return self.combine(outputs).reshape(x.shape)


class MedLayer(nn.Module):
    """Post-norm BERT layer: self-attention, then (given a memory) cross-attention, then the feed-forward."""

    def __init__(self, width: int, heads: int, dropout: float, cross: CrossAttention | None):
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.cross = cross
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width], residual and norm included."""
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, x, mask)))
        if memory is not None and self.cross is not None:
            x = self.cross.norm(x + self.dropout(self.cross(x, memory)))
        return self.feed_forward(x)


class MedEncoder(nn.Module):
    """Token ids, and optionally the tokens of the images they speak of, to hidden states.

    Arguments: `vocab_size`, `max_positions` (longest sentence), `width`, `depth`, `heads`; `memory_width`: the image
    tower's width (`None`: no cross-attention at all); `images`: images per sentence; `merge_from`: first layer whose
    streams are merged by a linear layer rather than averaged; `dropout` on embeddings and on each sublayer's output.
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
        self.layers = nn.ModuleList(MedLayer(width, heads, dropout, cross(index)) for index in range(depth))
        self.images = images
        self.apply(initialize)

    def embed(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """input_ids [batch, length] int64 -> [batch, length, width]; ValueError where a sentence cannot be embedded.

        start: how many tokens of the sentence came before these.
        """
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be [batch, length] and not empty, got {list(input_ids.shape)}")
        longest, end = self.max_positions, start + input_ids.shape[1]
        if end > longest:
            raise ValueError(
                f"input_ids has {end} tokens, the text tower has max_positions={longest}: "
                "shorten the sentences, or build the model with a larger max_positions"
            )
        if input_ids.min() < 0 or input_ids.max() >= self.vocab_size:
            raise ValueError(f"input_ids must lie in 0 .. {self.vocab_size - 1} (vocab_size)")
        x = self.word(input_ids) + self.position(torch.arange(start, end, device=input_ids.device))
        return self.dropout(self.embedding_norm(x))

    def check_memory(self, sentences: int, memories: int) -> None:
        """ValueError unless `sentences` sentences can be about `memories` images."""
        if memories % self.images or memories == 0 or sentences % (memories // self.images):
            raise ValueError(
                f"{sentences} sentences cannot be about {memories} images at {self.images} images a sentence: "
                "give each group of images the same number of sentences, group after group"
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """Hidden states [batch, length, width].

        input_ids [batch, length] int64; attention_mask [batch, length], nonzero where a token is real; memory
        [batch / k * images, tokens, memory_width]: consecutive images belong to one group, and k consecutive sentences
        are about one group. Raises ValueError for sentences past `max_positions` and for batches that do not match.
        """
        x = self.embed(input_ids)
        if memory is not None:
            self.check_memory(len(input_ids), len(memory))
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]

        for layer in self.layers:
            x = layer(x, memory, mask)
        return x


class QuestionEncoder(MedEncoder):
    """A MedEncoder whose states are all read by what follows, not the first alone. Pruned, it hands them on packed."""


def initialize(module: nn.Module) -> None:
    """BERT's: normal of deviation 0.02, zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
