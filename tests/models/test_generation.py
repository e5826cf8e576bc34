"""Decoding strategies, against a decoder whose every sentence can be listed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from vltprune.models.generation import BeamSearch, GenerationConfig, GreedySearch, NucleusSampling

WORDS, EOS, PAD = 4, 3, 0
ROWS = 5


@dataclass(frozen=True)
class History:
    """A state that can be checked: all that each row has generated."""

    generated: torch.Tensor

    def reorder(self, rows):
        return History(self.generated[rows])


class TableDecoder:
    """Draws a table of logits for each row, place and last word; of `rows` groups, any number of sentences each."""

    def __init__(self, rows=ROWS, longest=7):
        self.table = torch.randn(rows, longest, WORDS, WORDS) * 2
        self.calls = 0

    def __call__(self, ids, state):
        self.calls += 1
        generated = torch.cat([state.generated, ids], 1) if len(state.generated) else ids
        group = torch.arange(len(ids)) * len(self.table) // len(ids)
        return self.table[group, generated.shape[1] - 1, generated[:, -1]], History(generated)

    def score(self, row, sentence, prompt):
        """Sum of the log-probabilities of what stands behind the prompt."""
        chances = self.table[row].log_softmax(-1)
        return sum(float(chances[i - 1, sentence[i - 1], sentence[i]]) for i in range(prompt, len(sentence)))

    def start(self):
        return History(torch.empty(0, 0, dtype=torch.int64))


PROMPT = torch.tensor([[1, 2]]).expand(ROWS, -1)


def sentences(longest):
    """All that can stand behind the prompt: ended, or as long as may be."""
    for length in range(1, longest - 1):
        for words in itertools.product(range(WORDS), repeat=length):
            if EOS not in words[:-1] and (words[-1] == EOS or length == longest - 2):
                yield (1, 2, *words)


def without_padding(row):
    return tuple(row[: row.index(EOS) + 1] if EOS in row else row)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_enough_for_all_find_the_best(length_penalty):
    decoder, config = TableDecoder(), GenerationConfig(EOS, PAD, 0, 5)
    generated = BeamSearch(64, length_penalty)(decoder, decoder.start(), PROMPT, config)
    for row in range(ROWS):

        def worth(sentence, row=row):
            return decoder.score(row, sentence, 2) / (len(sentence) - 2) ** length_penalty

        assert without_padding(generated[row].tolist()) == max(sentences(5), key=worth)


def test_one_beam_is_greedy():
    decoder, config = TableDecoder(), GenerationConfig(EOS, PAD, 0, 7)
    greedy = GreedySearch()(decoder, decoder.start(), PROMPT, config)
    beam = BeamSearch(1, 0.0)(decoder, decoder.start(), PROMPT, config)
    assert torch.equal(greedy, beam)
    for row, sentence in enumerate(greedy.tolist()):
        for i in range(2, len(without_padding(sentence))):
            assert sentence[i] == decoder.table[row, i - 1, sentence[i - 1]].argmax()


def test_a_tiny_nucleus_is_greedy():
    decoder, config = TableDecoder(), GenerationConfig(EOS, PAD, 0, 7)
    greedy = GreedySearch()(decoder, decoder.start(), PROMPT, config)
    assert torch.equal(NucleusSampling(1e-6)(decoder, decoder.start(), PROMPT, config), greedy)


@pytest.mark.parametrize("top_p", [0.5, 0.8, 1.0])
def test_a_nucleus_holds_just_enough_and_is_drawn_in_proportion(top_p):
    decoder = TableDecoder(rows=1, longest=3)
    prompt = torch.tensor([[1, 2]]).expand(20000, -1)
    decoder.table = decoder.table.expand(20000, -1, -1, -1)
    strategy = NucleusSampling(top_p, torch.Generator().manual_seed(1))
    generated = strategy(decoder, decoder.start(), prompt, GenerationConfig(EOS, PAD, 0, 3))
    drawn = torch.bincount(generated[:, 2], minlength=WORDS) / len(generated)

    chance, order = decoder.table[0, 1, 2].softmax(-1).sort(descending=True)
    size = int((chance.cumsum(0) < top_p).sum()) + 1
    want = torch.zeros(WORDS).index_put((order[:size],), chance[:size] / chance[:size].sum())
    torch.testing.assert_close(drawn, want, atol=0.015, rtol=0)
    assert (drawn > 0).sum() == min(size, WORDS)


def test_a_generator_repeats_itself():
    decoder, config = TableDecoder(), GenerationConfig(EOS, PAD, 0, 7)
    a, b = (
        NucleusSampling(0.9, torch.Generator().manual_seed(3))(decoder, decoder.start(), PROMPT, config)
        for _ in range(2)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("strategy", [GreedySearch(), BeamSearch(2), BeamSearch(3, 2.0)])
def test_rows_do_not_matter_to_each_other(strategy):
    decoder, config = TableDecoder(), GenerationConfig(EOS, PAD, 0, 7)
    together = strategy(decoder, decoder.start(), PROMPT, config)
    for row in range(ROWS):
        one = TableDecoder(rows=1)
        one.table = decoder.table[row : row + 1]
        alone = strategy(one, one.start(), PROMPT[:1], config)
        assert without_padding(alone[0].tolist()) == without_padding(together[row].tolist())


@pytest.mark.parametrize("strategy", [GreedySearch(), NucleusSampling(1.0), BeamSearch(2), BeamSearch(3, 2.0)])
class TestEvery:
    def test_shape_of_sentences(self, strategy):
        for shortest, longest in ((0, 7), (4, 6), (6, 6), (0, 3)):
            decoder = TableDecoder()
            generated = strategy(decoder, decoder.start(), PROMPT, GenerationConfig(EOS, PAD, shortest, longest))
            assert torch.equal(generated[:, :2], PROMPT)
            assert generated.shape[1] <= longest
            for row in generated.tolist():
                end = row.index(EOS) if EOS in row else len(row)
                assert end >= shortest or end == longest
                assert set(row[end + 1 :]) <= {PAD}

    def test_it_stops_when_all_have_ended(self, strategy):
        decoder = TableDecoder()
        decoder.table[..., EOS] = 50
        strategy(decoder, decoder.start(), PROMPT, GenerationConfig(EOS, PAD, 0, 7))
        assert decoder.calls <= 3

    def test_a_prompt_that_fills_max_length_is_refused(self, strategy):
        decoder = TableDecoder()
        with pytest.raises(ValueError, match="a prompt of 2 tokens fills max_length=2"):
            strategy(decoder, decoder.start(), PROMPT, GenerationConfig(EOS, PAD, 0, 2))


def test_repetition_penalty():
    scores = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    config = GenerationConfig(EOS, PAD, 0, 7, repetition_penalty=2.0)
    assert config.process(scores, torch.tensor([[0, 1, 1]])).tolist() == [[1.0, -4.0, 1.0, -1.0]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: GenerationConfig(EOS, PAD, 8, 7), "min_length=8 must lie in 0 .. max_length=7"),
        (lambda: GenerationConfig(EOS, PAD, 0, 7, 0.0), "repetition_penalty=0.0 must be positive"),
        (lambda: NucleusSampling(0.0), "top_p=0.0"),
        (lambda: BeamSearch(0), "num_beams=0 must be at least 1"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
