"""The processor of llava_tiny and its inputs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from vltprune.data import SyntheticPairs, normalize
from vltprune.data.llava import FALSE, IMAGE, PROMPT, TRUE, VOCABULARY, is_true, llava_processor, statement_inputs
from vltprune.data.word_tokenizer import WordTokenizer

PAIRS = SyntheticPairs("test", 3, sentences=2)
SHORT, LONG = "no image contains a star", "in the left image a large red circle is right of a square"


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


def test_a_prompt_is_two_images_and_the_ids_of_the_word_tokenizer(processor):
    pair = PAIRS[0]
    inputs = statement_inputs([pair.images] * 2, pair.sentences, processor)
    left, right = (VOCABULARY.index(side) for side in ("left", "right"))
    for row, mask, sentence in zip(inputs["input_ids"], inputs["attention_mask"], pair.sentences, strict=True):
        words = WordTokenizer().encode(sentence)[0][0].tolist()
        assert row[mask.bool()].tolist() == [left, *[IMAGE] * 64, right, *[IMAGE] * 64, *words]
    pixels = torch.from_numpy(np.concatenate([normalize(pair.images)] * 2))
    torch.testing.assert_close(inputs["pixel_values"], pixels)


def test_rows_are_padded_on_the_left(processor):
    inputs = statement_inputs([PAIRS[0].images, PAIRS[1].images], [SHORT, LONG], processor)
    short, long = inputs["attention_mask"]
    assert short[0] == 0 and short[-1] == 1 and long.all()
    alone = statement_inputs([PAIRS[0].images], SHORT, processor)
    assert torch.equal(alone["input_ids"][0], inputs["input_ids"][0][short.bool()])


def test_the_processor_takes_the_same_prompt_as_text(processor):
    images = list(PAIRS[0].images)
    ours = statement_inputs([PAIRS[0].images], SHORT + ".", processor)
    theirs = processor(images=images, text=PROMPT.format(SHORT.upper()), return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert processor.batch_decode(torch.tensor([[TRUE], [FALSE]])) == ["true", "false"]


@pytest.mark.parametrize(
    ("pairs", "statements", "message"),
    [
        ([PAIRS[0].images], "the left image contains a hexagon", "'hexagon'"),
        ([PAIRS[0].images], "a true circle", "'true'"),
        ([PAIRS[0].images], [SHORT, SHORT], "a pair of images a statement: got 1 and 2"),
        ([], [], "at least one"),
        ([PAIRS[0].images[:1]], SHORT, r"about two images, got pairs of \[1\]"),
        ([PAIRS[0].images], "a " * 40, "takes 42 positions"),
    ],
)
def test_what_makes_no_inputs_is_refused(processor, pairs, statements, message):
    with pytest.raises(ValueError, match=message):
        statement_inputs(pairs, statements, processor)


def test_the_answer_is_the_likelier_of_two_words():
    logits = torch.zeros(2, 3, len(VOCABULARY))
    logits[0, -1, TRUE] = logits[1, -1, FALSE] = 1.0
    assert is_true(logits).tolist() == [True, False]


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'vltprune\[hf\]'"):
        llava_processor()
