"""Against transformers' BLIP with the same random weights, read by our converter, in double precision: to rounding."""

from __future__ import annotations

import itertools

import pytest
import small
import torch
from torch.testing import assert_close

from vltprune.models.generation import BeamSearch, GreedySearch


def near(got, want):
    assert_close(got, want, rtol=0, atol=1e-10)


def images(batch):
    return small.images(batch, torch.float64)


def spoken(rows):
    """Sentences up to their end tokens: behind them, transformers' beam search writes the end token where pad is 0."""
    return [row[: row.index(small.EOS) + 1] if small.EOS in row else row for row in rows.tolist()]


@pytest.fixture(scope="module")
def captioners(tmp_path_factory):
    """Theirs and ours, which no test changes but for the smoothing of theirs."""
    torch.manual_seed(0)
    model = small.theirs("BlipForConditionalGeneration")
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[small.EOS] += 3  # else few sentences end
    return model, small.ours("caption", model, tmp_path_factory.mktemp("caption"))


class TestCaption:
    @torch.no_grad()
    def test_logits(self, captioners):
        model, own = captioners
        pixels, (ids, mask) = images(3), small.words(3)
        ids[:, 0] = small.BOS
        want = model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits
        got = own(pixels, ids, mask)
        near(got[mask.bool()], want[mask.bool()])

    @torch.no_grad()
    def test_loss(self, captioners):
        model, own = captioners
        pixels, (ids, mask) = images(3), small.words(3)
        ids[:, 0], model.text_decoder.label_smoothing = small.BOS, 0.1
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :4] = -100
        want = model(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels).loss
        near(own.loss(pixels, ids, mask), want)

    @pytest.mark.parametrize("rules", [{}, {"min_length": 9}, {"repetition_penalty": 1.7}, {"max_length": 6}])
    @pytest.mark.parametrize(("beams", "length_penalty"), [(1, None), *itertools.product([2, 3, 5], [0.0, 1.0, 2.0])])
    def test_sentences(self, captioners, beams, length_penalty, rules):
        model, own = captioners
        rules = {"min_length": 0, "max_length": 14, **rules}
        pixels, prompt = images(24), torch.tensor([[small.BOS, *small.PROMPT, small.EOS]]).repeat(24, 1)
        how = {"num_beams": beams, "do_sample": False, "early_stopping": False, **rules}
        how |= {"length_penalty": length_penalty} if beams > 1 else {}
        want = model.generate(pixel_values=pixels, input_ids=prompt, **how)
        got = own.generate(pixels, GreedySearch() if beams == 1 else BeamSearch(beams, length_penalty), **rules)
        assert spoken(got) == spoken(want)
        assert len({tuple(row) for row in spoken(got)}) > 2


class TestQuestions:
    """transformers' cross-attention drops its mask, and so its decoder looks at the padding of a question. It is given
    questions without padding, one by one; ours get them in a padded batch."""

    @pytest.fixture
    def pair(self, tmp_path):
        model = small.theirs("BlipForQuestionAnswering")
        for layer in model.text_decoder.bert.encoder.layer:  # transformers has one width for both memories
            for linear in (layer.crossattention.self.key, layer.crossattention.self.value):
                linear.weight = torch.nn.Parameter(torch.randn(32, 32) * 0.3)
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[small.EOS] += 3
        return model, small.ours("vqa", model, tmp_path)

    def inputs(self):
        (ids, mask), (answers, answer_mask) = small.words(3), small.words(3, 6)
        ids[:, 0], answers[:, 0] = small.ENC, small.BOS
        return images(3), ids, mask, answers, answer_mask

    def one_by_one(self, model, pixels, ids, mask, answers, answer_mask):
        """What transformers makes of each question and answer alone."""
        model.text_decoder.label_smoothing = 0.1
        ends, answer_ends = mask.sum(1).tolist(), answer_mask.sum(1).tolist()
        for i, (end, answer_end) in enumerate(zip(ends, answer_ends, strict=True)):
            question, answer = ids[i : i + 1, :end], answers[i : i + 1, :answer_end]
            states = model.text_encoder(question, encoder_hidden_states=model.vision_model(pixels[i : i + 1])[0])[0]
            yield model.text_decoder(answer, encoder_hidden_states=states, labels=answer)

    @torch.no_grad()
    def test_logits_and_loss(self, pair):
        model, own = pair
        inputs, weight = self.inputs(), torch.tensor([1.0, 0.4, 0.6])
        answer_mask = inputs[-1]
        want = list(self.one_by_one(model, *inputs))
        for got, length, one in zip(own(*inputs), answer_mask.sum(1).tolist(), want, strict=True):
            near(got[:length], one.logits[0])
        summed = torch.stack([one.loss for one in want]) * (answer_mask.sum(1) - 1)
        near(own.loss(*inputs, weight=weight), (summed * weight).sum() / 3)

    @torch.no_grad()
    def test_ranks(self, pair):
        """By the smoothed likelihood of transformers' decoder, over all answers."""
        model, own = pair
        pixels, ids, mask, _, _ = self.inputs()
        answers, answer_mask = small.words(7, 6)
        answers[:, 0] = small.BOS
        order, scores = own.rank(pixels, ids, mask, answers, answer_mask)
        for i in range(3):
            row = (pixels[i].expand(7, -1, -1, -1), ids[i].expand(7, -1), mask[i].expand(7, -1))
            losses = torch.stack([one.loss for one in self.one_by_one(model, *row, answers, answer_mask)])
            best, which = (-losses * (answer_mask.sum(1) - 1)).sort(descending=True)
            assert order[i].tolist() == which.tolist()
            near(scores[i], best)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_sentences(self, pair, beams):
        model, own = pair
        pixels, ids = images(24), torch.randint(3, 40, (24, 8))
        ids[:, 0] = small.ENC
        want = model.generate(
            input_ids=ids, pixel_values=pixels, num_beams=beams, do_sample=False, min_length=1, max_length=10
        )
        got = own.generate(pixels, ids, strategy=GreedySearch() if beams == 1 else BeamSearch(beams))
        assert spoken(got) == spoken(want)
        assert len({tuple(row) for row in spoken(got)}) > 2


class TestRetrieval:
    @pytest.fixture
    def pair(self, tmp_path):
        model = small.theirs("BlipForImageTextRetrieval")
        return model, small.ours("retrieval", model, tmp_path)

    @torch.no_grad()
    def test_match(self, pair):
        model, own = pair
        pixels, (ids, mask) = images(3), small.words(3)
        asked = ids.clone()
        asked[:, 0] = small.ENC
        near(own(pixels, ids, mask), model(asked, pixels, attention_mask=mask).itm_score)

    @torch.no_grad()
    def test_features(self, pair):
        model, own = pair
        pixels, (ids, mask) = images(3), small.words(3)
        want = model(ids, pixels, attention_mask=mask, use_itm_head=False)
        near(own.visual(pixels), want.last_hidden_state)
        near(own.text(ids, mask)[mask.bool()], want.question_embeds[mask.bool()])
        near(own.image_features(pixels) @ own.text_features(ids, mask).T, want.itm_score)
