"""BLIP for retrieval: features to search with, and an image-text matching head.

Li et al., BLIP, arXiv 2201.12086, sections 3.2 and 5.1: image-text contrast (ITC) and image-text matching (ITM).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.tokens import PackedTokens
from .blip import BlipVision, beginning_with, first
from .med import MedEncoder


class BlipRetrieval(nn.Module):
    """Features of images and of sentences, and whether a pair of them matches. Sizes are those of `Blip`.

    Sentences come as a tokenizer gives them, [CLS] ... [SEP]: the model itself puts `enc_id` in the place of the first
    token where a sentence is read against an image. `embed_dim`: of the features; `temperature`: of their contrast.
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
        dropout: float = 0.0,
        drop_path: float = 0.0,
        embed_dim: int = 256,
        temperature: float = 0.07,
        enc_id: int = 30523,
    ):
        super().__init__()
        text = (vocab_size, max_positions, text_width, text_depth, text_heads)
        self.visual = BlipVision(image_size, patch_size, vision_width, vision_depth, vision_heads, drop_path)
        self.text = MedEncoder(*text, memory_width=vision_width, dropout=dropout)
        self.image_projection = nn.Linear(vision_width, embed_dim)
        self.text_projection = nn.Linear(text_width, embed_dim)
        self.head = nn.Linear(text_width, 2)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.enc_id = enc_id

    def image_features(self, images: Tensor) -> Tensor:
        """images [batch, 3, H, W] -> features [batch, embed_dim] of length one."""
        return self.features_of(self.visual(images))

    def features_of(self, memory: Tensor | PackedTokens) -> Tensor:
        """Features of images whose tokens, `model.visual(images)`, are there already."""
        return F.normalize(self.image_projection(first(memory)), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids, attention_mask [sentences, length] -> features [sentences, embed_dim] of length one."""
        return F.normalize(self.text_projection(first(self.text(input_ids, attention_mask))), dim=-1)

    def match(self, memory: Tensor | PackedTokens, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [sentences, 2] for "they do not match" and "they do".

        memory: `model.visual(images)` of `batch` images; input_ids, attention_mask [sentences, length], `sentences` a
        multiple of `batch` (consecutive sentences are about one image). Raises ValueError where shapes do not fit.
        """
        return self.head(first(self.text(beginning_with(self.enc_id, input_ids), attention_mask, memory)))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`match`, from images [batch, 3, H, W]."""
        return self.match(self.visual(images), input_ids, attention_mask)
