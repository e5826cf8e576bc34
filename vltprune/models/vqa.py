"""BLIP for visual question answering: an encoder of the question, and a decoder that generates or ranks answers.

Li et al., BLIP, arXiv 2201.12086, section 5.3. The answer's decoder sees the image only through the question's states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blip import BlipVision, beginning_with
from .decoder import Cache, MedDecoder, next_token_costs
from .generation import Beam, Rules, Strategy
from .med import MedEncoder, QuestionEncoder

_BEAMS = Beam(3)


class BlipVqa(nn.Module):
    """Answers to questions about images. Sizes are those of `Blip`, `text_*` both the encoder's and the decoder's.

    Questions and answers come as a tokenizer gives them, [CLS] ... [SEP]: the model itself puts `enc_id` in the place of a
    question's first token and `bos_id` in that of an answer's. `eos_id` ends an answer, `pad_id` fills the row behind it.
    """

    images_per_sentence = 1

    def __init__(
        self,
        image_size: int = 480,
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
        bos_id: int = 30522,
        enc_id: int = 30523,
        eos_id: int = 102,
        pad_id: int = 0,
    ):
        super().__init__()
        text = (vocab_size, max_positions, text_width, text_depth, text_heads)
        self.visual = BlipVision(image_size, patch_size, vision_width, vision_depth, vision_heads, drop_path)
        self.text = QuestionEncoder(*text, memory_width=vision_width, dropout=dropout)
        self.decoder = MedDecoder(MedEncoder(*text, memory_width=text_width, dropout=dropout))
        self.bos_id, self.enc_id, self.eos_id, self.pad_id = bos_id, enc_id, eos_id, pad_id

    def read(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Cache:
        """The questions, read against their images, for the decoder to look at.

        images [batch, 3, H, W]; input_ids, attention_mask [questions, length], `questions` a multiple of `batch`
        (consecutive questions are about one image).
        """
        states = self.text(beginning_with(self.enc_id, input_ids), attention_mask, self.visual(images))
        return self.decoder.read(states, attention_mask)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor | None = None,
        question: Tensor | None = None,
    ) -> Tensor:
        """Logits of each next token of the answers, [answers, length, vocab_size].

        images, input_ids, attention_mask as in `read`; answer_ids, answer_mask [answers, length]; question [answers] int64,
        the question that each answers (None: equally many consecutive answers each). ValueError where shapes do not fit.
        """
        cache = self.read(images, input_ids, attention_mask)
        cache = cache if question is None else cache.about(question)
        return self.decoder(beginning_with(self.bos_id, answer_ids), cache, answer_mask)[0]

    def loss(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor | None = None,
        question: Tensor | None = None,
        weight: Tensor | None = None,
        smoothing: float = 0.1,
    ) -> Tensor:
        """Weighted cross-entropy of the answers with smoothed labels, summed over tokens, a mean over questions: a scalar.

        weight [answers]: how often each was given, as a share of its question's (None: 1). The rest as in `forward`.
        """
        logits = self(images, input_ids, attention_mask, answer_ids, answer_mask, question)
        costs, _ = next_token_costs(logits, answer_ids, answer_mask, smoothing=smoothing)
        return (costs if weight is None else costs * weight).sum() / len(input_ids)

    @torch.no_grad()
    def rank(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor | None = None,
        k: int = 128,
        smoothing: float = 0.1,
    ) -> tuple[Tensor, Tensor]:
        """The best of a list of answers: which ones, best first, and their scores, both [questions, min(k, answers)].

        answer_ids, answer_mask [answers, length]: one list for all questions; the rest as in `read`. The k answers whose
        first word is likeliest are scored in full: minus the cost in training, which for BLIP is smoothed by 0.1; with
        smoothing=0 it is the log-likelihood. Raises ValueError for answers without a word, FloatingPointError for scores that
        are NaN.
        """
        if answer_ids.dim() != 2 or answer_ids.shape[1] < 2:
            raise ValueError(f"answer_ids must be [answers, 2 or more], [CLS] first; got {list(answer_ids.shape)}")
        cache = self.read(images, input_ids, attention_mask)
        answer_ids, k = beginning_with(self.bos_id, answer_ids), min(k, len(answer_ids))
        start = answer_ids.new_full((cache.groups, 1), self.bos_id)
        first = self.decoder(start, cache)[0][:, 0].log_softmax(-1)
        chosen = first[:, answer_ids[:, 1]].topk(k).indices

        costs = []
        for question, some in enumerate(chosen):  # one at a time: logits of k answers are [k, length, vocab_size]
            ids, mask = answer_ids[some], None if answer_mask is None else answer_mask[some]
            logits, _ = self.decoder(ids, cache.about(start.new_tensor([question])), mask)
            costs.append(next_token_costs(logits, ids, mask, smoothing=smoothing)[0])
        if first.isnan().any() or any(cost.isnan().any() for cost in costs):
            raise FloatingPointError(
                "the answers' scores are NaN, and none can be ranked by them: check the weights, or compute in full precision"
            )
        scores, order = (-torch.stack(costs)).sort(descending=True)
        return chosen.gather(1, order), scores

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        strategy: Strategy = _BEAMS,
        min_length: int = 1,
        max_length: int = 10,
    ) -> Tensor:
        """Answers [questions, n] in free words, start and end token included, padded behind it. BLIP's defaults.

        images, input_ids, attention_mask as in `read`; strategy: `Greedy()`, `Nucleus(top_p)` or `Beam(beams)`.
        """
        cache = self.read(images, input_ids, attention_mask)
        prompt = input_ids.new_full((cache.groups, 1), self.bos_id)
        return self.decoder.generate(prompt, cache, strategy, Rules(self.eos_id, self.pad_id, min_length, max_length))
