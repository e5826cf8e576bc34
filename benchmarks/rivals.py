"""Vision transformers of timm whose token counts are fixed by layer: slicing without scores, and a minimal ToMe.

They are what a pruned model is compared with at equal MACs. `Sliced` keeps the first tokens of the sequence and scores none,
so that no method that scores tokens is faster in the same engine. `MinimalToMe` merges the most similar pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class Sliced(nn.Module):
    """The limit: each block keeps the first `counts[i]` tokens behind its attention.

    Args:
        vit: the dense model, whose modules it runs.
        counts: tokens that leave each block, the class token included.
    """

    def __init__(self, vit: VisionTransformer, counts: Sequence[int]):
        super().__init__()
        self.vit, self.counts = vit, tuple(counts)

    def forward(self, images: Tensor) -> Tensor:
        x = embed(self.vit, images)
        for block, count in zip(self.vit.blocks, self.counts, strict=True):
            x = x + block.ls1(block.attn(block.norm1(x)))
            if count < x.shape[1]:
                x = x[:, :count]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.vit.forward_head(self.vit.norm(x))


class MinimalToMe(nn.Module):
    """ToMe (arXiv 2210.09461): behind the attention of each block the pairs with the most similar keys merge.

    Attention is torch's fused one, with the logarithm of sizes added to its logits (equation 1, proportional attention).

    Args:
        vit: the dense model, whose modules it runs.
        counts: tokens that leave each block, the class token included; no block removes more than half.
    """

    def __init__(self, vit: VisionTransformer, counts: Sequence[int]):
        super().__init__()
        self.vit, self.counts = vit, tuple(counts)

    def forward(self, images: Tensor) -> Tensor:
        x, size = embed(self.vit, images), None
        for block, count in zip(self.vit.blocks, self.counts, strict=True):
            attended, keys = _attention(block, x, size)
            x = x + attended
            if count < x.shape[1]:
                x, size = merge(x, size, keys, x.shape[1] - count)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.vit.forward_head(self.vit.norm(x))


def _attention(block: Block, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention branch [batch, n, dim], and keys averaged over heads [batch, n, head dim]; size [batch, n, 1] or None."""
    attn: Attention = block.attn
    batch, n, _ = x.shape
    qkv = attn.qkv(block.norm1(x)).view(batch, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys, values = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
    bias = None if size is None else size.log().view(batch, 1, 1, n)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    return block.ls1(attn.proj(attn.norm(mixed.transpose(1, 2).reshape(batch, n, -1)))), keys.mean(1)


def merge(x: Tensor, size: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching, section 3 of the paper: r tokens of one half merge into their nearest of the other.

    Args:
        x: tokens [batch, n, dim]; the first is the class token, which is not merged into another.
        size: how many input tokens each stands for, [batch, n, 1]; None for one each.
        metric: what similarity is the cosine of, [batch, n, channels].
        r: the number of tokens to remove, below half of them.

    Returns:
        The tokens [batch, n - r, dim], averages by size, and their sizes [batch, n - r, 1].
    """
    size = x.new_ones(*x.shape[:2], 1) if size is None else size
    metric = F.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    # the class token stays: no pair of its own is among the most similar
    similarity = torch.cat([torch.full_like(similarity[:, :1], -torch.inf), similarity[:, 1:]], 1)
    best, partner = similarity.max(-1)
    order = best.argsort(-1, descending=True)
    merged, kept = order[:, :r], order[:, r:].sort(-1).values
    goal = partner.gather(1, merged)[..., None]

    def reduced(values: Tensor) -> Tensor:
        first, second = values[:, ::2], values[:, 1::2]
        wide = (-1, -1, values.shape[-1])
        source = first.gather(1, merged[..., None].expand(wide))
        summed = second.scatter_add(1, goal.expand(wide), source)
        return torch.cat([first.gather(1, kept[..., None].expand(wide)), summed], 1)

    total = reduced(size)
    return reduced(x * size) / total, total


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """The tokens that enter the first block, [batch, n, dim]."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


def input_tokens(vit: VisionTransformer) -> int:
    """The number of tokens that enter the first block."""
    return vit.patch_embed.num_patches + vit.num_prefix_tokens


def macs(vit: VisionTransformer, counts: Sequence[int]) -> int:
    """MACs of one image, where `counts[i]` tokens leave block i behind its attention. Matching pairs is not counted."""
    width = vit.embed_dim
    total = vit.patch_embed.num_patches * vit.patch_embed.proj.weight.numel()
    entering = input_tokens(vit)
    for block, count in zip(vit.blocks, counts, strict=True):
        total += entering * 4 * width**2 + 2 * entering**2 * width + count * 2 * width * block.mlp.fc1.out_features
        entering = count
    return total + sum(linear.weight.numel() for linear in vit.get_classifier().modules() if type(linear) is nn.Linear)


def schedule(vit: VisionTransformer, reduction: float) -> tuple[int, ...]:
    """Counts by layer at which one image costs `reduction` fewer MACs: the same share of patches leaves each block.

    Args:
        vit: the dense model.
        reduction: the fraction of its MACs to save, in (0, 1).

    Returns:
        Tokens that leave each block, the class token included.

    Raises:
        ValueError: for a reduction that would remove more than half of the patches in a block, as ToMe cannot.
    """
    dense, low, high = macs(vit, counts_at(vit, 1.0)), 0.5, 1.0
    if macs(vit, counts_at(vit, low)) > (1 - reduction) * dense:
        raise ValueError(
            f"reduction={reduction}: half of the patches would have to leave each block at most; ask for less"
        )
    for _ in range(40):
        share = (low + high) / 2
        low, high = (low, share) if macs(vit, counts_at(vit, share)) > (1 - reduction) * dense else (share, high)
    return counts_at(vit, low)


def counts_at(vit: VisionTransformer, share: float) -> tuple[int, ...]:
    """Counts by layer where `share` of the patches stays in each block, rounded up."""
    patches, counts = vit.patch_embed.num_patches, []
    for _ in vit.blocks:
        patches = -int(-patches * share // 1)
        counts.append(patches + vit.num_prefix_tokens)
    return tuple(counts)
