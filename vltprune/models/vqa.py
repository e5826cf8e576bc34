"""BLIP for visual question answering: a question encoder, and a decoder that generates or ranks answers.

Li et al., BLIP, arXiv 2201.12086, section 5.3. The decoder attends to the question's hidden states, not to the image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blip import BlipVision, replace_first
from .decoder import DecoderCache, MedDecoder, next_token_losses
from .generation import BeamSearch, DecodingStrategy, GenerationConfig
from .med import MedEncoder, QuestionEncoder

_BEAM_SEARCH = BeamSearch(3)


class BlipVqa(nn.Module):
    """BLIP's image tower, an encoder of questions that cross-attends to it, and a decoder of answers.

    Questions and answers come as a tokenizer gives them, [CLS] ... [SEP]. The model puts `enc_id` in the place of a question's
    first token and `bos_id` in that of an answer's.

    Args:
        image_size, patch_size, vision_width, vision_depth, vision_heads, drop_path: As in `Blip`.
        text_width: Width of encoder and decoder.
        text_depth: Layers of encoder and decoder, each.
        text_heads: Attention heads of encoder and decoder.
        vocab_size: Number of token ids.
        max_positions: Longest question or answer, in tokens.
        dropout: Dropout probability of encoder and decoder.
        bos_id: Token that begins an answer.
        enc_id: Token that begins a question.
        eos_id: Token that ends an answer.
        pad_id: Token that fills the row behind the end.

    Raises:
        ValueError: If `image_size` is no multiple of `patch_size`, or `text_width` of `text_heads`.
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

    def encode_questions(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> DecoderCache:
        """Encode questions with their images.

        Args:
            images: [batch, 3, H, W].
            input_ids: Token ids of the questions [questions, length], `questions` a multiple of `batch`: consecutive
                questions are about one image.
            attention_mask: [questions, length], nonzero where a token is real; None for everywhere.

        Returns:
            The decoder's cache before the first token of an answer, one group a question.

        Raises:
            ValueError: If the shapes do not fit.
        """
        hidden = self.text(replace_first(input_ids, self.enc_id), attention_mask, self.visual(images))
        return self.decoder.start(hidden, attention_mask)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor | None = None,
        question: Tensor | None = None,
    ) -> Tensor:
        """Predict each next token of given answers.

        Args:
            images, input_ids, attention_mask: As in `encode_questions`.
            answer_ids: Token ids of the answers [answers, length].
            answer_mask: [answers, length], nonzero where a token is real; None for everywhere.
            question: Index of the question that each answers, [answers] int64; None for equally many consecutive answers
                each.

        Returns:
            Logits [answers, length, vocab_size].

        Raises:
            ValueError: If the shapes do not fit.
        """
        cache = self.encode_questions(images, input_ids, attention_mask)
        cache = cache if question is None else cache.select_groups(question)
        return self.decoder(replace_first(answer_ids, self.bos_id), cache, answer_mask)[0]

    def loss(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor | None = None,
        question: Tensor | None = None,
        weight: Tensor | None = None,
        label_smoothing: float = 0.1,
    ) -> Tensor:
        """Weighted cross-entropy of the answers with smoothed labels: summed over tokens and answers, the mean over questions.

        Args:
            images, input_ids, attention_mask: As in `encode_questions`.
            answer_ids, answer_mask, question: As in `forward`.
            weight: How often each answer was given, as a share of its question's, [answers]; None for 1.
            label_smoothing: Share of the target's probability that all tokens get, 0 .. 1.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: If the shapes do not fit.
        """
        logits = self(images, input_ids, attention_mask, answer_ids, answer_mask, question)
        losses, _ = next_token_losses(logits, answer_ids, answer_mask, label_smoothing=label_smoothing)
        return (losses if weight is None else losses * weight).sum() / len(input_ids)

    @torch.no_grad()
    def rank(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_ids: Tensor,
        answer_mask: Tensor | None = None,
        k: int = 128,
        label_smoothing: float = 0.1,
    ) -> tuple[Tensor, Tensor]:
        """Rank a list of answers for each question.

        The k answers whose first word is likeliest are scored in full, by minus the loss of training. BLIP's loss has
        smoothed labels; with `label_smoothing=0` a score is the log-likelihood.

        Args:
            images, input_ids, attention_mask: As in `encode_questions`.
            answer_ids: Token ids of the answers [answers, length], one list for all questions.
            answer_mask: [answers, length], nonzero where a token is real; None for everywhere.
            k: Answers to score in full.
            label_smoothing: Share of the target's probability that all tokens get, 0 .. 1.

        Returns:
            Indices of the best answers, best first, and their scores, both [questions, min(k, answers)].

        Raises:
            ValueError: For answers without a word.
            FloatingPointError: For scores that are NaN.
        """
        if answer_ids.dim() != 2 or answer_ids.shape[1] < 2:
            raise ValueError(f"answer_ids must be [answers, 2 or more], [CLS] first; got {list(answer_ids.shape)}")
        cache = self.encode_questions(images, input_ids, attention_mask)
        answer_ids, k = replace_first(answer_ids, self.bos_id), min(k, len(answer_ids))
        start = answer_ids.new_full((cache.groups, 1), self.bos_id)
        first_word = self.decoder(start, cache)[0][:, 0].log_softmax(-1)
        candidates = first_word[:, answer_ids[:, 1]].topk(k).indices

        losses = []
        # one question at a time: logits of k answers are [k, length, vocab_size]
        for question, answers in enumerate(candidates):
            ids, mask = answer_ids[answers], None if answer_mask is None else answer_mask[answers]
            logits, _ = self.decoder(ids, cache.select_groups(start.new_tensor([question])), mask)
            losses.append(next_token_losses(logits, ids, mask, label_smoothing=label_smoothing)[0])
        if first_word.isnan().any() or any(loss.isnan().any() for loss in losses):
            raise FloatingPointError(
                "the answers' scores are NaN, and none can be ranked by them: check the weights, or compute in full precision"
            )
        scores, order = (-torch.stack(losses)).sort(descending=True)
        return candidates.gather(1, order), scores

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        strategy: DecodingStrategy = _BEAM_SEARCH,
        min_length: int = 1,
        max_length: int = 10,
    ) -> Tensor:
        """Generate answers. The defaults are BLIP's.

        Args:
            images, input_ids, attention_mask: As in `encode_questions`.
            strategy: `GreedySearch()`, `BeamSearch(num_beams)` or `NucleusSampling(top_p)`, of `vltprune.models.generation`.
            min_length: Fewest tokens before the end token, start token included.
            max_length: Most tokens, start token included.

        Returns:
            Token ids [questions, n], start and end token included, padded behind the end.

        Raises:
            ValueError: If the shapes do not fit, or for lengths out of order or past `max_positions`.
            FloatingPointError: For logits that are NaN or infinite.
        """
        cache = self.encode_questions(images, input_ids, attention_mask)
        prompt = input_ids.new_full((cache.groups, 1), self.bos_id)
        config = GenerationConfig(self.eos_id, self.pad_id, min_length, max_length)
        return self.decoder.generate(prompt, cache, strategy, config)
