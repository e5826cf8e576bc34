"""BLIP (Li et al., arXiv 2201.12086): timm's ViT as image tower, `MedEncoder` as text tower, and small heads on top.

These are dense models. `vltprune.prune` takes their two towers apart and puts pruned ones in their place: what the
image tower returns then is packed, and goes to the text tower as it is.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.checks import check_images
from ..core.tokens import PackedTokens
from .med import MedEncoder


class BlipVision(VisionTransformer):
    """The image tower: timm's ViT without a head. images [batch, 3, H, W] -> normed tokens [batch, 1 + patches, width]."""

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

    def forward(self, images: Tensor) -> Tensor:  # narrower than timm's: no attention mask
        check_images(images, self.in_chans, self.patch_embed.img_size)
        return self.forward_features(images)


class Blip(nn.Module):
    """BLIP without a task head: features of an image, of a sentence, and of a sentence read against its image.

    Sizes: `image_size` and `patch_size` in pixels; `vision_*` and `text_*` width, depth, heads of the two towers;
    `vocab_size`; `max_positions`, the longest sentence; `dropout` (text tower), `drop_path` (image tower).
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
        """What a task puts on the summary token [sentences, width]; features have nothing."""
        return nn.Identity()

    def image_features(self, images: Tensor) -> Tensor:
        """images [batch, 3, H, W] -> class-token features [batch, vision_width]."""
        return first(self.visual(images))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [batch, length] -> features [batch, text_width] of the first token, no image in sight."""
        return first(self.text(input_ids, attention_mask))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Multimodal features [sentences, text_width].

        images [batch, 3, H, W]; input_ids, attention_mask [sentences, length], `sentences` a multiple of `batch`
        (consecutive sentences are about one image). Raises ValueError where shapes do not fit.
        """
        return self.head(first(self.text(input_ids, attention_mask, self.visual(images))))


class BlipNlvr(Blip):
    """BLIP for NLVR2: is the sentence true of the two images? The arguments are those of `Blip`.

    Text layers from `merge_from` on merge the two images' streams by a linear layer; lower ones average them.
    """

    images_per_sentence = 2

    def _head(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [sentences, 2] for false and true.

        images [batch, 2, 3, H, W]; input_ids, attention_mask [sentences, length], `sentences` a multiple of `batch`
        (consecutive sentences are about one pair). Raises ValueError where shapes do not fit.
        """
        if images.dim() != 5 or images.shape[1] != 2:
            raise ValueError(
                f"images must be [batch, 2, 3, height, width], two images a sentence; got {list(images.shape)}"
            )
        memory = self.visual(images.flatten(0, 1))
        return self.head(first(self.text(input_ids, attention_mask, memory)))


def first(tokens: Tensor | PackedTokens) -> Tensor:
    """The summary token of each instance: tokens [batch, n, width], or packed ones -> [batch, width]."""
    if isinstance(tokens, PackedTokens):
        assert tokens.summary is not None
        return tokens.read(tokens.summary)
    return tokens[:, 0]


def beginning_with(token: int, input_ids: Tensor) -> Tensor:
    """The same sentences [batch, length] with another first token: what a sentence is read for."""
    return torch.cat([torch.full_like(input_ids[..., :1], token), input_ids[..., 1:]], -1)
