"""Does every sentence of the synthetic pairs have ids, and does every other sentence get a helpful refusal?"""

from __future__ import annotations

import pytest
import torch

from vltprune.data import SyntheticPairs
from vltprune.data.word_tokenizer import CLS, NLVR_WORDS, PAD, SEP, WordTokenizer


def test_every_word_is_said_and_every_said_word_known():
    pairs = SyntheticPairs("train", 120, sentences=24)
    said = {word for index in range(120) for sentence in pairs[index].sentences for word in sentence.split()}
    assert said == set(NLVR_WORDS)


def test_round_trip_and_padding():
    sentences = ["both images contain a red circle", "no image contains a star"]
    words = WordTokenizer()
    input_ids, mask = words.encode(sentences)
    assert input_ids.shape == mask.shape == (2, 8) and input_ids.dtype == torch.int64
    assert (input_ids[:, 0] == CLS).all() and input_ids[0, -1] == SEP and input_ids[1, -1] == PAD
    assert mask.sum(1).tolist() == [8, 7]
    assert words.decode(input_ids) == sentences
    assert (words.encode("No image contains a star. ")[0] == input_ids[1, :7]).all()


@pytest.mark.parametrize(
    ("sentences", "text"),
    [
        ("both images contain a rad circle", "'rad' .nearest: red"),
        ("a qqqq", "'qqqq' .nothing near it"),
        (["a red circle", " "], "empty sentence"),
        ([], "at least one sentence"),
        ("a " * 31, "33 positions.*max_positions=32"),
    ],
)
def test_refusals(sentences, text):
    with pytest.raises(ValueError, match=text):
        WordTokenizer().encode(sentences)


def test_a_vocabulary_repeats_no_word():
    with pytest.raises(ValueError, match="repeats"):
        WordTokenizer(["red", "red"])
