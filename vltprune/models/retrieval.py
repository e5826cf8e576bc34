"""BLIP for retrieval: features of images and texts, and an image-text matching head.

Li et al., BLIP, arXiv 2201.12086, sections 3.2 and 5.1: image-text contrast (ITC) and image-text matching (ITM).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.tokens import PackedTokens
from .blip import BlipVision, replace_first, summary_token
from .med import MedEncoder


class BlipRetrieval(nn.Module):
    """BLIP's image and text towers with projections to a shared space, and a head that classifies pairs.

    Sentences come as a tokenizer gives them, [CLS] ... [SEP]. The model puts `enc_id` in the place of the first token where a
    sentence is matched with an image.

    Args:
        image_size, patch_size, vision_width, vision_depth, vision_heads, drop_path: As in `Blip`.
        text_width, text_depth, text_heads, vocab_size, max_positions, dropout: As in `Blip`.
        embed_dim: Width of the features.
        temperature: Initial temperature of the contrast, a parameter.
        enc_id: Token that begins a sentence which cross-attends to an image.

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
        """Features [batch, embed_dim] of unit length, of images [batch, 3, H, W]."""
        return self.project_image_tokens(self.visual(images))

    def project_image_tokens(self, memory: Tensor | PackedTokens) -> Tensor:
        """Features [batch, embed_dim] of unit length, of image tokens that `model.visual(images)` returned."""
        return F.normalize(self.image_projection(summary_token(memory)), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode sentences without an image.

        Args:
            input_ids: Token ids [sentences, length].
            attention_mask: [sentences, length], nonzero where a token is real; None for everywhere.

        Returns:
            Features [sentences, embed_dim] of unit length.

        Raises:
            ValueError: For ids of another shape or out of range, and for sentences past `max_positions`.
        """
        return F.normalize(self.text_projection(summary_token(self.text(input_ids, attention_mask))), dim=-1)

    def match(self, memory: Tensor | PackedTokens, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Classify pairs of images and sentences.

        Args:
            memory: `model.visual(images)` of `batch` images.
            input_ids: Token ids [sentences, length], `sentences` a multiple of `batch`: consecutive sentences are about one
                image.
            attention_mask: [sentences, length], nonzero where a token is real; None for everywhere.

        Returns:
            Logits [sentences, 2] for "they do not match" and "they match".

        Raises:
            ValueError: If the shapes do not fit.
        """
        hidden = self.text(replace_first(input_ids, self.enc_id), attention_mask, memory)
        return self.head(summary_token(hidden))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Classify pairs of images and sentences.

        Args:
            images: [batch, 3, H, W].
            input_ids, attention_mask: As in `match`.

        Returns:
            Logits [sentences, 2], as `match`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        return self.match(self.visual(images), input_ids, attention_mask)
