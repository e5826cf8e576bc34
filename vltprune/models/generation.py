"""Decoding strategies: greedy, nucleus sampling and beam search, over any step function.

A speaker is a `Step`: new tokens and a state in, the logits of the next token and the new state out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class State(Protocol):
    """What a speaker remembers of the rows it has begun."""

    def reorder(self, rows: Tensor) -> Any:
        """The state whose row i continues what row rows[i] began."""
        ...


Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # ids [rows, n], state -> logits [rows, vocab_size], state


@dataclass(frozen=True)
class Rules:
    """What may be said.

    eos_id ends a sentence, pad_id fills the row behind it. At least `min_length` tokens stand before the end token, and no
    sentence has more than `max_length`; the prompt counts in both, as it does in BLIP. repetition_penalty: above 1, what
    has been said becomes less likely (Keskar et al., CTRL, arXiv 1909.05858, section 4.1).
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

    def apply(self, scores: Tensor, said: Tensor) -> Tensor:
        """scores [rows, vocab_size] of the token behind said [rows, n], logits or their logarithms, under these rules."""
        if self.repetition_penalty != 1:
            again = scores.gather(1, said)
            penalized = torch.where(again < 0, again * self.repetition_penalty, again / self.repetition_penalty)
            scores = scores.scatter(1, said, penalized)
        if said.shape[1] < self.min_length:
            end = torch.arange(scores.shape[1], device=scores.device) == self.eos_id
            scores = scores.masked_fill(end, float("-inf"))
        return scores

    def room(self, prompt: Tensor) -> range:
        """The lengths that sentences can still reach: prompt [rows, prompt length]. ValueError where there are none."""
        if prompt.shape[1] >= self.max_length:
            raise ValueError(
                f"a prompt of {prompt.shape[1]} tokens leaves no room in max_length={self.max_length}: "
                "the prompt counts; raise max_length"
            )
        return range(prompt.shape[1] + 1, self.max_length + 1)


class Strategy(ABC):
    """How the next token is chosen."""

    @abstractmethod
    def __call__(self, step: Step, state: State, prompt: Tensor, rules: Rules) -> Tensor:
        """Sentences [rows, n], n <= max_length, that continue prompt [rows, prompt length], padded behind their ends.

        FloatingPointError for logits that are NaN or infinite.
        """


@dataclass(frozen=True)
class Greedy(Strategy):
    """The likeliest token each time."""

    def __call__(self, step: Step, state: State, prompt: Tensor, rules: Rules) -> Tensor:
        return _one_by_one(step, state, prompt, rules, lambda scores: scores.argmax(-1))


@dataclass(frozen=True)
class Nucleus(Strategy):
    """Drawn from the fewest tokens that hold `top_p` of the probability (Holtzman et al., arXiv 1904.09751, section 3.1)."""

    top_p: float = 0.9
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in 0 .. 1, and above 0")

    def __call__(self, step: Step, state: State, prompt: Tensor, rules: Rules) -> Tensor:
        return _one_by_one(step, state, prompt, rules, self._draw)

    def _draw(self, scores: Tensor) -> Tensor:
        chance, token = scores.softmax(-1).sort(-1, descending=True)
        outside = chance.cumsum(-1) - chance >= self.top_p  # what stands before it suffices
        place = torch.multinomial(chance.masked_fill(outside, 0), 1, generator=self.generator)
        return token.gather(1, place).squeeze(1)


@dataclass(frozen=True)
class Beam(Strategy):
    """The best of several sentences begun at once.

    A sentence's score is the sum of its log-probabilities, end token included, over (tokens behind the prompt) **
    length_penalty. Only the best `beams` continuations of a step may end there, as in transformers. A row stops when
    `beams` sentences have ended and none that goes on would, ending at once, beat the worst of them.
    """

    beams: int = 3
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams={self.beams}: at least one sentence must be begun")

    def __call__(self, step: Step, state: State, prompt: Tensor, rules: Rules) -> Tensor:
        rows, beams = len(prompt), self.beams
        said, scores = prompt[:, None].expand(-1, beams, -1), _first_alone(rows, beams, prompt.device)
        new, ended = prompt.repeat_interleave(beams, 0), _Ended.none(rows, beams, rules, prompt.device)
        for length in rules.room(prompt):
            logits, state = step(new, state)
            chances = _checked(rules.apply(logits.float().log_softmax(-1), said.flatten(0, 1)))
            chances = chances.unflatten(0, (rows, beams))

            found, begun, said = _best(2 * beams, scores[..., None] + chances, said)
            ends = (said[..., -1] == rules.eos_id) | (length == rules.max_length)
            weight = (length - prompt.shape[1]) ** self.length_penalty
            among_best = torch.arange(2 * beams, device=prompt.device) < beams
            ended = ended.join(said, (found / weight).masked_fill(~(ends & among_best), -torch.inf), rules.pad_id)

            scores, pick = found.masked_fill(ends, -torch.inf).topk(beams)
            ended = ended.settle(scores[:, 0] / weight)
            if ended.done.all():
                break
            said, begun = _take(said, pick), begun.gather(1, pick)
            state = state.reorder((begun + beams * torch.arange(rows, device=prompt.device)[:, None]).flatten())
            new = said.flatten(0, 1)[:, -1:]
        return _trim(ended.said[:, 0], rules.pad_id)


@dataclass(frozen=True)
class _Ended:
    """The best sentences that have ended: said [rows, beams, max_length], scores [rows, beams], minus infinity for none;
    done [rows], where no other can come in."""

    said: Tensor
    scores: Tensor
    done: Tensor

    @classmethod
    def none(cls, rows: int, beams: int, rules: Rules, device: torch.device) -> _Ended:
        said = torch.full((rows, beams, rules.max_length), rules.pad_id, device=device)
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(said, torch.full((rows, beams), -torch.inf, device=device), done)

    def join(self, said: Tensor, scores: Tensor, pad_id: int) -> _Ended:
        """With others, said [rows, others, n], scores [rows, others]: the best of both. Rows that are done stay."""
        said = F.pad(said, (0, self.said.shape[-1] - said.shape[-1]), value=pad_id)
        scores = scores.masked_fill(self.done[:, None], -torch.inf)
        best, pick = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        return replace(self, said=_take(torch.cat([self.said, said], 1), pick), scores=best)

    def settle(self, hope: Tensor) -> _Ended:
        """hope [rows]: the best score that a sentence which goes on would have, if it ended now."""
        return replace(self, done=self.done | (self.scores.amin(1) >= hope))


def _checked(scores: Tensor) -> Tensor:
    """scores [rows, vocab_size], as they are. FloatingPointError where a row has no best token: NaN, infinity, or none left."""
    if not scores.amax(-1).isfinite().all():
        raise FloatingPointError(
            "the decoder's logits are NaN or infinite, and no token can be chosen by them: check the weights, or compute in "
            "full precision"
        )
    return scores


def _one_by_one(step: Step, state: State, prompt: Tensor, rules: Rules, choose: Callable[[Tensor], Tensor]) -> Tensor:
    said, new, goes_on = prompt, prompt, torch.ones_like(prompt[:, 0], dtype=torch.bool)
    for _ in rules.room(prompt):
        logits, state = step(new, state)
        token = choose(_checked(rules.apply(logits.float(), said)))
        new = torch.where(goes_on, token, rules.pad_id)[:, None]
        said, goes_on = torch.cat([said, new], 1), goes_on & (token != rules.eos_id)
        if not goes_on.any():
            break
    return said


def _first_alone(rows: int, beams: int, device: torch.device) -> Tensor:
    """Scores [rows, beams] of sentences that are still the same one, so that only the first goes on."""
    scores = torch.full((rows, beams), -torch.inf, device=device)
    scores[:, 0] = 0
    return scores


def _best(count: int, scores: Tensor, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of said [rows, beams, n] by scores [rows, beams, vocab_size].

    Returns their scores [rows, count], which beam each continues [rows, count], and what is said then [rows, count, n + 1].
    """
    best, place = scores.flatten(1).topk(count)
    beam, token = place // scores.shape[2], place % scores.shape[2]
    return best, beam, torch.cat([_take(said, beam), token[..., None]], 2)


def _take(said: Tensor, pick: Tensor) -> Tensor:
    """said [rows, sentences, n], pick [rows, chosen] -> [rows, chosen, n]."""
    return said.gather(1, pick[..., None].expand(-1, -1, said.shape[-1]))


def _trim(said: Tensor, pad_id: int) -> Tensor:
    """Without the columns at the end that are padding in every row: said [rows, n]."""
    used = (said != pad_id).any(0).nonzero()
    return said[:, : int(used.max()) + 1]
