"""BLIP for captioning: the image tower, and a decoder that cross-attends to its tokens (arXiv 2201.12086, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blip import BlipVision, replace_first
from .decoder import MedDecoder, next_token_losses
from .generation import BeamSearch, DecodingStrategy, GenerationConfig
from .med import MedEncoder

_BEAM_SEARCH = BeamSearch(3)


class BlipCaption(nn.Module):
    """BLIP's image tower with a text decoder that writes captions.

    Captions come as a tokenizer gives them, [CLS] ... [SEP]. The model puts `bos_id` in the place of the first token.

    Args:
        image_size, patch_size, vision_width, vision_depth, vision_heads, drop_path: As in `Blip`.
        text_width: Width of the decoder.
        text_depth: Layers of the decoder.
        text_heads: Attention heads of the decoder.
        vocab_size: Number of token ids.
        max_positions: Longest caption, in tokens.
        dropout: Dropout probability of the decoder.
        prompt: Token ids that every caption begins with; the default is "a picture of" in BERT's vocabulary.
        bos_id: Token that begins a caption.
        eos_id: Token that ends a caption.
        pad_id: Token that fills the row behind the end.

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
        prompt: Sequence[int] = (1037, 3861, 1997),
        bos_id: int = 30522,
        eos_id: int = 102,
        pad_id: int = 0,
    ):
        super().__init__()
        self.visual = BlipVision(image_size, patch_size, vision_width, vision_depth, vision_heads, drop_path)
        body = MedEncoder(vocab_size, max_positions, text_width, text_depth, text_heads, vision_width, dropout=dropout)
        self.decoder = MedDecoder(body)
        self.prompt = (bos_id, *prompt)
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Predict each next token of given captions.

        Args:
            images: [batch, 3, H, W].
            input_ids: Token ids [captions, length], prompt included, `captions` a multiple of `batch`: consecutive captions
                are about one image.
            attention_mask: [captions, length], nonzero where a token is real; None for everywhere.

        Returns:
            Logits [captions, length, vocab_size].

        Raises:
            ValueError: If the shapes do not fit.
        """
        cache = self.decoder.start(self.visual(images))
        return self.decoder(replace_first(input_ids, self.bos_id), cache, attention_mask)[0]

    def loss(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, label_smoothing: float = 0.1
    ) -> Tensor:
        """Cross-entropy with smoothed labels: the mean over all tokens but the prompt's and padding.

        Args:
            images, input_ids, attention_mask: As in `forward`.
            label_smoothing: Share of the target's probability that all tokens get, 0 .. 1.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: If the shapes do not fit.
        """
        logits = self(images, input_ids, attention_mask)
        losses, counts = next_token_losses(logits, input_ids, attention_mask, len(self.prompt), label_smoothing)
        return losses.sum() / counts.sum()

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        strategy: DecodingStrategy = _BEAM_SEARCH,
        min_length: int = 5,
        max_length: int = 20,
        repetition_penalty: float = 1.0,
    ) -> Tensor:
        """Write captions. The defaults are BLIP's for COCO.

        Args:
            images: [batch, 3, H, W].
            strategy: `GreedySearch()`, `BeamSearch(num_beams)` or `NucleusSampling(top_p)`, of `vltprune.models.generation`.
            min_length: Fewest tokens before the end token, prompt included.
            max_length: Most tokens, prompt included.
            repetition_penalty: Above 1, tokens that were generated become less likely.

        Returns:
            Token ids [batch, n], prompt and end token included, padded behind the end.

        Raises:
            ValueError: For images of another shape, for lengths out of order or past `max_positions`, and for a penalty that is
                not positive.
            FloatingPointError: For logits that are NaN or infinite.
        """
        config = GenerationConfig(self.eos_id, self.pad_id, min_length, max_length, repetition_penalty)
        prompt = torch.tensor([self.prompt], device=images.device).expand(len(images), -1)
        return self.decoder.generate(prompt, self.decoder.start(self.visual(images)), strategy, config)
