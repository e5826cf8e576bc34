"""BLIP (Li et al., arXiv 2201.12086): timm's ViT as image tower, `MedEncoder` as text tower, and a head for the task.

These are dense models. In a pruned one the image tower's tokens are packed, and go to the text tower as they are.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.checks import check_images
from ..core.tokens import PackedTokens
from .med import MedEncoder


class BlipVision(VisionTransformer):
    """BLIP's image tower: timm's ViT without a head.

    Args:
        image_size: Side of the images, in pixels; a multiple of `patch_size`.
        patch_size: Side of a patch, in pixels.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads of each block.
        drop_path: Stochastic depth of the last block; it grows linearly over the blocks.

    Raises:
        ValueError: If `image_size` is no multiple of `patch_size`.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int, drop_path: float = 0.0):
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} does not split into patches of {patch_size}: choose a multiple")
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            drop_path_rate=drop_path,
            num_classes=0,
            global_pool="",
        )

    # narrower than timm's, without its attention mask
    def forward(self, images: Tensor) -> Tensor:
        """Normed tokens [batch, 1 + patches, width] of images [batch, 3, H, W]."""
        check_images(images, self.in_chans, self.patch_embed.img_size)
        return self.forward_features(images)


class Blip(nn.Module):
    """BLIP without a task head: features of an image, of a sentence, and of a sentence that cross-attends to its image.

    Args:
        image_size: Side of the images, in pixels.
        patch_size: Side of a patch, in pixels.
        vision_width: Width of the image tower.
        vision_depth: Blocks of the image tower.
        vision_heads: Attention heads of the image tower.
        text_width: Width of the text tower.
        text_depth: Layers of the text tower.
        text_heads: Attention heads of the text tower.
        vocab_size: Number of token ids.
        max_positions: Longest sentence, in tokens.
        merge_from: First text layer whose streams are merged by a linear layer, where a sentence has several images.
        dropout: Dropout probability of the text tower.
        drop_path: Stochastic depth of the image tower's last block.

    Raises:
        ValueError: If `image_size` is no multiple of `patch_size`, or `text_width` of `text_heads`.
    """

    images_per_sentence = 1

    def __init__(
        self,
        image_size: int = 384,
        patch_size: int = 16,
        vision_width: int = 768,
        vision_depth: int = 12,
        vision_heads: int = 12,
        text_width: int = 768,
        text_depth: int = 12,
        text_heads: int = 12,
        vocab_size: int = 30524,
        max_positions: int = 512,
        merge_from: int = 6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.visual = BlipVision(image_size, patch_size, vision_width, vision_depth, vision_heads, drop_path)
        self.text = MedEncoder(
            vocab_size,
            max_positions,
            text_width,
            text_depth,
            text_heads,
            memory_width=vision_width,
            images=self.images_per_sentence,
            merge_from=merge_from,
            dropout=dropout,
        )
        self.head = self._head(text_width)

    def _head(self, width: int) -> nn.Module:
        """The task's head on the summary token [sentences, width]."""
        return nn.Identity()

    def image_features(self, images: Tensor) -> Tensor:
        """Class-token features [batch, vision_width] of images [batch, 3, H, W]."""
        return summary_token(self.visual(images))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode sentences without an image.

        Args:
            input_ids: Token ids [sentences, length].
            attention_mask: [sentences, length], nonzero where a token is real; None for everywhere.

        Returns:
            First-token features [sentences, text_width].

        Raises:
            ValueError: For ids of another shape or out of range, and for sentences past `max_positions`.
        """
        return summary_token(self.text(input_ids, attention_mask))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode sentences with their images.

        Args:
            images: [batch, 3, H, W].
            input_ids: Token ids [sentences, length], `sentences` a multiple of `batch`: consecutive sentences are about one
                image.
            attention_mask: [sentences, length], nonzero where a token is real; None for everywhere.

        Returns:
            Multimodal features [sentences, text_width].

        Raises:
            ValueError: If the shapes do not fit.
        """
        return self.head(summary_token(self.text(input_ids, attention_mask, self.visual(images))))


class BlipNlvr(Blip):
    """BLIP for NLVR2: classifies whether a sentence is true of two images.

    Args:
        image_size, patch_size, vision_width, vision_depth, vision_heads, drop_path: As in `Blip`.
        text_width, text_depth, text_heads, vocab_size, max_positions, merge_from, dropout: As in `Blip`.

    Raises:
        ValueError: If `image_size` is no multiple of `patch_size`, or `text_width` of `text_heads`.
    """

    images_per_sentence = 2

    def _head(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Classify sentences.

        Args:
            images: [batch, 2, 3, H, W], two images a sentence.
            input_ids: Token ids [sentences, length], `sentences` a multiple of `batch`: consecutive sentences are about one
                pair of images.
            attention_mask: [sentences, length], nonzero where a token is real; None for everywhere.

        Returns:
            Logits [sentences, 2] for false and true.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if images.dim() != 5 or images.shape[1] != 2:
            raise ValueError(
                f"images must be [batch, 2, 3, height, width], two images a sentence; got {list(images.shape)}"
            )
        memory = self.visual(images.flatten(0, 1))
        return self.head(summary_token(self.text(input_ids, attention_mask, memory)))


def summary_token(tokens: Tensor | PackedTokens) -> Tensor:
    """The summary token of each instance [batch, width], of tokens [batch, n, width] or packed ones."""
    return tokens.summaries() if isinstance(tokens, PackedTokens) else tokens[:, 0]


def replace_first(input_ids: Tensor, token: int) -> Tensor:
    """Replace each sentence's first token, which tells the text tower its task.

    Args:
        input_ids: Token ids [..., length].
        token: Id of the new first token.

    Returns:
        New token ids [..., length].
    """
    return torch.cat([torch.full_like(input_ids[..., :1], token), input_ids[..., 1:]], -1)
