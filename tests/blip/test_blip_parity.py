"""Against transformers' BLIP with the same random weights, read by our converter, in double precision: to rounding."""

from __future__ import annotations

import itertools

import pytest
import small
import torch
from torch.testing import assert_close

from vltprune.models.generation import Beam, Greedy


def near(got, want):
    assert_close(got, want, rtol=0, atol=1e-10)


def images(batch):
    return small.images(batch, torch.float64)


def spoken(rows):
    """Sentences up to their end tokens: behind them, transformers' beam search writes the end token where pad is 0."""
    return [row[: row.index(small.EOS) + 1] if small.EOS in row else row for row in rows.tolist()]


class TestCaption:
    @pytest.fixture
    def pair(self, tmp_path):
        model = small.theirs("BlipForConditionalGeneration")
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[small.EOS] += 3  # else few sentences end
        return model, small.ours("caption", model, tmp_path)

    @torch.no_grad()
    def test_logits(self, pair):
        model, own = pair
        pictures, (ids, mask) = images(3), small.words(3)
        ids[:, 0] = small.BOS
        want = model(pixel_values=pictures, input_ids=ids, attention_mask=mask).logits
        got = own(pictures, ids, mask)
        near(got[mask.bool()], want[mask.bool()])

    @torch.no_grad()
    def test_loss(self, pair):
        model, own = pair
        pictures, (ids, mask) = images(3), small.words(3)
        ids[:, 0], model.text_decoder.label_smoothing = small.BOS, 0.1
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :4] = -100
        want = model(pixel_values=pictures, input_ids=ids, attention_mask=mask, labels=labels).loss
        near(own.loss(pictures, ids, mask), want)

    @pytest.mark.parametrize("rules", [{}, {"min_length": 9}, {"repetition_penalty": 1.7}, {"max_length": 6}])
    @pytest.mark.parametrize(("beams", "length_penalty"), [(1, None), *itertools.product([2, 3, 5], [0.0, 1.0, 2.0])])
    def test_sentences(self, pair, beams, length_penalty, rules):
        model, own = pair
        rules = {"min_length": 0, "max_length": 14, **rules}
        pictures, prompt = images(24), torch.tensor([[small.BOS, *small.PROMPT, small.EOS]]).repeat(24, 1)
        how = {"num_beams": beams, "do_sample": False, "early_stopping": False, **rules}
        how |= {"length_penalty": length_penalty} if beams > 1 else {}
        want = model.generate(pixel_values=pictures, input_ids=prompt, **how)
        got = own.generate(pictures, Greedy() if beams == 1 else Beam(beams, length_penalty), **rules)
        assert spoken(got) == spoken(want)
        assert len({tuple(row) for row in spoken(got)}) > 2
