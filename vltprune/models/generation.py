"""Decoding strategies for text generation: greedy search, nucleus sampling and beam search.

A strategy drives any `DecoderStep`: a function of new tokens and a state that returns the logits of the next token and the
new state. `MedDecoder.generate` gives it such a function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

S = TypeVar("S", bound="DecoderState")


class DecoderState(Protocol):
    """What a decoder keeps of the rows that it has begun, such as a key/value cache."""

    def reorder(self: S, rows: Tensor) -> S:
        """The state whose row i continues what row `rows[i]` began."""
        ...


# ids [rows, n] and the state before them -> logits [rows, vocab_size] of the next token, and the state after them
DecoderStep: TypeAlias = Callable[[Tensor, S], tuple[Tensor, S]]


@dataclass(frozen=True)
class GenerationConfig:
    """Limits of a generated sentence: its end token, its length, and a penalty for repetition.

    Args:
        eos_id: Token that ends a sentence.
        pad_id: Token that fills the row behind the end.
        min_length: Fewest tokens before the end token; the prompt counts, as in BLIP.
        max_length: Most tokens of a sentence; the prompt counts.
        repetition_penalty: Above 1, tokens that were generated become less likely (Keskar et al., CTRL, arXiv 1909.05858,
            section 4.1); 1 for none.

    Raises:
        ValueError: For lengths out of order, or a penalty that is not positive.
    """

    eos_id: int
    pad_id: int
    min_length: int
    max_length: int
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length={self.min_length} must lie in 0 .. max_length={self.max_length}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 is none")

    def process(self, scores: Tensor, generated: Tensor) -> Tensor:
        """Apply the repetition penalty and the minimum length to the scores of the next token.

        Args:
            scores: Logits or log-probabilities, [rows, vocab_size].
            generated: Tokens so far, prompt included, [rows, n].

        Returns:
            Scores [rows, vocab_size].
        """
        if self.repetition_penalty != 1:
            repeated = scores.gather(1, generated)
            penalized = torch.where(
                repeated < 0, repeated * self.repetition_penalty, repeated / self.repetition_penalty
            )
            scores = scores.scatter(1, generated, penalized)
        if generated.shape[1] < self.min_length:
            end = torch.arange(scores.shape[1], device=scores.device) == self.eos_id
            scores = scores.masked_fill(end, float("-inf"))
        return scores

    def lengths_after(self, prompt: Tensor) -> range:
        """The lengths that sentences can still reach behind a prompt [rows, prompt length].

        Raises:
            ValueError: If the prompt fills `max_length` already.
        """
        if prompt.shape[1] >= self.max_length:
            raise ValueError(
                f"a prompt of {prompt.shape[1]} tokens fills max_length={self.max_length}: "
                "the prompt counts; raise max_length"
            )
        return range(prompt.shape[1] + 1, self.max_length + 1)


class DecodingStrategy(ABC):
    """A rule that chooses each next token from a decoder's logits."""

    @abstractmethod
    def __call__(self, step: DecoderStep[S], state: S, prompt: Tensor, config: GenerationConfig) -> Tensor:
        """Continue a prompt until each sentence ends.

        Args:
            step: The decoder, one call at a time.
            state: The decoder's state before the prompt.
            prompt: Token ids [rows, prompt length], at least one each.
            config: Limits of the sentences.

        Returns:
            Token ids [rows, n], n <= max_length, prompt and end token included, padded behind the end.

        Raises:
            ValueError: If the prompt is as long as `max_length` or longer.
            FloatingPointError: For logits that are NaN or infinite.
        """


@dataclass(frozen=True)
class GreedySearch(DecodingStrategy):
    """Greedy search: the likeliest token each time."""

    def __call__(self, step: DecoderStep[S], state: S, prompt: Tensor, config: GenerationConfig) -> Tensor:
        return _generate_token_by_token(step, state, prompt, config, lambda scores: scores.argmax(-1))


@dataclass(frozen=True)
class NucleusSampling(DecodingStrategy):
    """Nucleus (top-p) sampling: a token drawn from the fewest that hold `top_p` of the probability.

    Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751, section 3.1.

    Args:
        top_p: Probability that the nucleus holds, above 0 and at most 1.
        generator: Source of randomness, on the logits' device; None for torch's own.

    Raises:
        ValueError: If `top_p` is out of range.
    """

    top_p: float = 0.9
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in 0 .. 1, and above 0")

    def __call__(self, step: DecoderStep[S], state: S, prompt: Tensor, config: GenerationConfig) -> Tensor:
        return _generate_token_by_token(step, state, prompt, config, self._sample)

    def _sample(self, scores: Tensor) -> Tensor:
        probabilities, tokens = scores.softmax(-1).sort(-1, descending=True)
        # the tokens before it hold top_p already
        outside = probabilities.cumsum(-1) - probabilities >= self.top_p
        rank = torch.multinomial(probabilities.masked_fill(outside, 0), 1, generator=self.generator)
        return tokens.gather(1, rank).squeeze(1)


@dataclass(frozen=True)
class BeamSearch(DecodingStrategy):
    """Beam search: the best of several sentences that are extended side by side.

    A sentence's score is the sum of its log-probabilities, end token included, over (tokens behind the prompt) **
    length_penalty. Only the best `num_beams` continuations of a step may end there, as in transformers. A row stops when
    `num_beams` sentences have ended and none of the others would beat the worst of them by ending now.

    Args:
        num_beams: Sentences per row that are extended side by side.
        length_penalty: Exponent of the length that divides a score; above 0 favors longer sentences.

    Raises:
        ValueError: If `num_beams` is below 1.
    """

    num_beams: int = 3
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams} must be at least 1")

    def __call__(self, step: DecoderStep[S], state: S, prompt: Tensor, config: GenerationConfig) -> Tensor:
        rows, beams = len(prompt), self.num_beams
        generated = prompt[:, None].expand(-1, beams, -1)
        scores = _initial_scores(rows, beams, prompt.device)
        finished = _FinishedSentences.empty(rows, beams, config, prompt.device)
        new = prompt.repeat_interleave(beams, 0)
        for length in config.lengths_after(prompt):
            logits, state = step(new, state)
            log_probs = config.process(logits.float().log_softmax(-1), rearrange(generated, "r b n -> (r b) n"))
            log_probs = rearrange(_check_finite(log_probs), "(r b) vocab -> r b vocab", b=beams)

            found, beam, generated = _best_continuations(2 * beams, scores[..., None] + log_probs, generated)
            ends = (generated[..., -1] == config.eos_id) | (length == config.max_length)
            weight = (length - prompt.shape[1]) ** self.length_penalty
            among_best = torch.arange(2 * beams, device=prompt.device) < beams
            ended_scores = (found / weight).masked_fill(~(ends & among_best), -torch.inf)
            finished = finished.add(generated, ended_scores, config.pad_id)

            scores, pick = found.masked_fill(ends, -torch.inf).topk(beams)
            finished = finished.close_rows(scores[:, 0] / weight)
            if finished.closed.all():
                break
            generated, beam = _take(generated, pick), beam.gather(1, pick)
            state = state.reorder((beam + beams * torch.arange(rows, device=prompt.device)[:, None]).flatten())
            new = generated[..., -1:].flatten(0, 1)
        return _trim(finished.generated[:, 0], config.pad_id)


@dataclass(frozen=True)
class _FinishedSentences:
    """The best sentences of each row that have ended.

    generated  [rows, beams, max_length]
    scores     [rows, beams], minus infinity where no sentence has ended
    closed     [rows] bool, true where no other sentence can come in
    """

    generated: Tensor
    scores: Tensor
    closed: Tensor

    @classmethod
    def empty(cls, rows: int, beams: int, config: GenerationConfig, device: torch.device) -> _FinishedSentences:
        generated = torch.full((rows, beams, config.max_length), config.pad_id, device=device)
        scores = torch.full((rows, beams), -torch.inf, device=device)
        return cls(generated, scores, closed=torch.zeros(rows, dtype=torch.bool, device=device))

    def add(self, generated: Tensor, scores: Tensor, pad_id: int) -> _FinishedSentences:
        """Keep the best of these and of others, generated [rows, others, n], scores [rows, others]. Closed rows stay."""
        generated = F.pad(generated, (0, self.generated.shape[-1] - generated.shape[-1]), value=pad_id)
        scores = scores.masked_fill(self.closed[:, None], -torch.inf)
        best, pick = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        return replace(self, generated=_take(torch.cat([self.generated, generated], 1), pick), scores=best)

    def close_rows(self, best_unfinished: Tensor) -> _FinishedSentences:
        """Close rows whose worst sentence is no worse than best_unfinished [rows], the best score of unfinished ones."""
        return replace(self, closed=self.closed | (self.scores.amin(1) >= best_unfinished))


def _check_finite(scores: Tensor) -> Tensor:
    """scores [rows, vocab_size] as they are. FloatingPointError where a row has no best token: NaN, infinity, none left."""
    if not scores.amax(-1).isfinite().all():
        raise FloatingPointError(
            "the decoder's logits are NaN or infinite, and no token can be chosen by them: check the weights, or compute in "
            "full precision"
        )
    return scores


def _generate_token_by_token(
    step: DecoderStep[S], state: S, prompt: Tensor, config: GenerationConfig, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sentences [rows, n] of one candidate a row; choose: scores [rows, vocab_size] -> the next tokens [rows]."""
    generated = new = prompt
    unfinished = torch.ones_like(prompt[:, 0], dtype=torch.bool)
    for _ in config.lengths_after(prompt):
        logits, state = step(new, state)
        token = choose(_check_finite(config.process(logits.float(), generated)))
        new = torch.where(unfinished, token, config.pad_id)[:, None]
        generated = torch.cat([generated, new], 1)
        unfinished = unfinished & (token != config.eos_id)
        if not unfinished.any():
            break
    return generated


def _initial_scores(rows: int, beams: int, device: torch.device) -> Tensor:
    """Scores [rows, beams] of equal unfinished sentences, of which only the first is extended."""
    scores = torch.full((rows, beams), -torch.inf, device=device)
    scores[:, 0] = 0
    return scores


def _best_continuations(count: int, scores: Tensor, generated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of generated [rows, beams, n] by scores [rows, beams, vocab_size].

    Returns their scores [rows, count], the beam that each continues [rows, count], and their tokens [rows, count, n + 1].
    """
    vocab_size = scores.shape[2]
    best, index = scores.flatten(1).topk(count)
    beam, token = index // vocab_size, index % vocab_size
    return best, beam, torch.cat([_take(generated, beam), token[..., None]], 2)


def _take(generated: Tensor, pick: Tensor) -> Tensor:
    """generated [rows, sentences, n], pick [rows, chosen] -> [rows, chosen, n]."""
    return generated.gather(1, pick[..., None].expand(-1, -1, generated.shape[-1]))


def _trim(generated: Tensor, pad_id: int) -> Tensor:
    """generated [rows, n] without the columns at the end that are padding in every row."""
    used = (generated != pad_id).any(0).nonzero()
    return generated[:, : int(used.max()) + 1]
