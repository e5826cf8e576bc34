"""BLIP for captioning: the image tower, and a decoder that cross-attends to its tokens (arXiv 2201.12086, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blip import BlipVision, beginning_with
from .decoder import MedDecoder, next_token_costs
from .generation import Beam, Rules, Strategy
from .med import MedEncoder

_BEAMS = Beam(3)


class BlipCaption(nn.Module):
    """Captions of images. Sizes are those of `Blip`, `text_*` the decoder's.

    Captions come as a tokenizer gives them, [CLS] ... [SEP]: the model itself puts `bos_id` in the place of the first
    token. `prompt`: the ids that every caption begins with; the default is "a picture of", in BERT's words. `eos_id` ends
    a caption, `pad_id` fills the row behind it.
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
        """Logits of each next token, [captions, length, vocab_size].

        images [batch, 3, H, W]; input_ids, attention_mask [captions, length], prompt included, `captions` a multiple of
        `batch` (consecutive captions are about one image). Raises ValueError where shapes do not fit.
        """
        cache = self.decoder.read(self.visual(images))
        return self.decoder(beginning_with(self.bos_id, input_ids), cache, attention_mask)[0]

    def loss(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, smoothing: float = 0.1
    ) -> Tensor:
        """Cross-entropy with smoothed labels, a scalar: the mean over all tokens but the prompt's and padding."""
        logits = self(images, input_ids, attention_mask)
        costs, counts = next_token_costs(logits, input_ids, attention_mask, len(self.prompt), smoothing)
        return costs.sum() / counts.sum()

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        strategy: Strategy = _BEAMS,
        min_length: int = 5,
        max_length: int = 20,
        repetition_penalty: float = 1.0,
    ) -> Tensor:
        """Captions [batch, n] of images [batch, 3, H, W], prompt and end token included, padded behind it.

        strategy: `Greedy()`, `Nucleus(top_p)` or `Beam(beams)`. The other arguments are those of `generation.Rules`, and
        BLIP's defaults for COCO.
        """
        rules = Rules(self.eos_id, self.pad_id, min_length, max_length, repetition_penalty)
        prompt = torch.tensor([self.prompt], device=images.device).expand(len(images), -1)
        return self.decoder.generate(prompt, self.decoder.read(self.visual(images)), strategy, rules)
