"""What decoders do behind pruned towers, counted, against torch's counter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from test_macs import counted

import vltprune as vp
from vltprune.cost.sample_cost import SampleCostMeter
from vltprune.evaluation.evaluator import Evaluator
from vltprune.models.generation import BeamSearch, GreedySearch

VOCABULARY = 40
SIZES = {"vocab_size": VOCABULARY, "bos_id": VOCABULARY - 1, "vision_depth": 2, "text_depth": 2}
RAGGED = vp.preset("random").replace(keep="random_ratio(mean=0.5, half_width=0.5)")


@pytest.fixture(autouse=True)
def _attended_alone(monkeypatch):
    """Short instances are attended to padded, which torch counts and an instance alone would not pay."""
    monkeypatch.setattr("vltprune.core.attention._SMALL", {})
    monkeypatch.setattr("vltprune.core.attention_stats._WHOLE", 0)


def pixels(batch=3):
    return torch.randn(batch, 3, 96, 96)


def words(rows, length):
    ends = torch.arange(rows) % 3 + length - 2
    mask = (torch.arange(length) < ends[:, None]).long()
    return torch.randint(3, VOCABULARY - 1, (rows, length)) * mask, mask


def assert_counts(dense, call, *configs):
    """call(model), dense and pruned, by torch and from the traces: equally many words must be said by both."""

    def again(model):
        torch.manual_seed(0)  # the same inputs, and the same tokens dropped
        return call(model)

    whole = counted(again, dense)
    for config in configs:
        pruned = vp.prune(dense, config)
        with torch.no_grad(), vp.collect() as traces:
            again(pruned)
        cost = vp.CostMeter(pruned)(traces)
        assert cost.padded_total == pytest.approx(whole, rel=5e-3), config
        assert cost.total == pytest.approx(counted(again, pruned), rel=5e-3), config
        assert 0 < cost.decoder <= cost.dense_decoder, config
    return cost


def silent(model):
    """It never ends a sentence by itself, so that all say equally much."""
    with torch.no_grad():
        model.decoder.bias[model.eos_id] = -100
    return model


CAPTIONS = {
    "given": lambda model: model(pixels(), *words(3, 9)),
    "two an image": lambda model: model(pixels(), *words(6, 9)),
    "greedy": lambda model: model.generate(pixels(), GreedySearch(), max_length=8),
    "beams": lambda model: model.generate(pixels(), BeamSearch(3), max_length=8),
}
ANSWERS = {
    "given": lambda model: model(pixels(), *words(3, 11), *words(3, 5)),
    "dealt out": lambda model: model(pixels(), *words(3, 11), *words(4, 5), torch.tensor([2, 0, 0, 1])),
    "ranked": lambda model: model.rank(pixels(), *words(3, 11), *words(8, 5), k=4),
    "beams": lambda model: model.generate(pixels(), *words(3, 11), BeamSearch(2), max_length=5),
}
CALLS = {("blip_caption_tiny", name): call for name, call in CAPTIONS.items()}
CALLS |= {("blip_vqa_tiny", name): call for name, call in ANSWERS.items()}


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[" ".join(call) for call in CALLS])
def test_decoders_of_our_own(name, call):
    sizes = SIZES | ({"enc_id": VOCABULARY - 2} if "vqa" in name else {"prompt": (4, 5)})
    dense = silent(vp.create_model(name, **sizes))
    assert_counts(dense, CALLS[name, call], "madtp", RAGGED)


VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = VISION | {
    "encoder_hidden_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "bos_token_id": VOCABULARY - 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONG = {"max_new_tokens": 4, "min_new_tokens": 4}


@pytest.mark.parametrize("how", [None, {}, {"num_beams": 2}, {"use_cache": False}])
@pytest.mark.parametrize("kind", ["BlipForConditionalGeneration", "BlipForQuestionAnswering"])
def test_decoders_of_transformers(kind, how):
    config = transformers.BlipConfig(vision_config=VISION | {"image_size": 96, "patch_size": 8}, text_config=WORDS)
    dense = getattr(transformers, kind)(config).eval()
    ids, mask = words(3, 9)
    inputs = {"pixel_values": pixels(), "input_ids": ids, "attention_mask": mask}

    def call(model):
        if how is None:
            answers = {"decoder_input_ids": words(3, 5)[0]} if "Answering" in kind else {}
            return model(**inputs, **answers)
        asked = inputs if "Answering" in kind else {"pixel_values": inputs["pixel_values"]}
        return model.generate(**{key: x.clone() for key, x in asked.items()}, **how, **LONG)

    cost = assert_counts(dense, call, RAGGED)
    assert cost.decoder < cost.dense_decoder


def test_what_is_said_again_is_paid_again():
    model = silent(vp.create_model("blip_caption_tiny_random", **SIZES))
    costs = []
    for longest in (8, 12, 16):
        with vp.collect() as traces:
            model.generate(pixels(), GreedySearch(), max_length=longest)
        costs.append(vp.CostMeter(model)(traces).decoder)
    assert costs[0] < costs[1] < costs[2]
    with torch.no_grad(), vp.collect() as traces:
        model.visual(pixels())
    assert vp.CostMeter(model)(traces).decoder == 0


def test_a_budget_counts_the_decoder():
    model = vp.create_model("blip_caption_tiny_random", **SIZES)
    inputs = pixels(), words(3, 9)[0]
    found = vp.calibrate(model, [inputs], 0.3)
    cost = vp.count_macs(model, *inputs)
    assert found.dense_macs == pytest.approx(cost.dense_total / 3)
    assert cost.reduction == pytest.approx(0.3, abs=0.02)


def test_a_record_pays_its_share_of_the_decoder():
    model = vp.create_model("blip_caption_tiny_random", **SIZES)
    with vp.collect() as traces:
        model.generate(pixels(), GreedySearch(), max_length=8)
    cost = vp.CostMeter(model)(traces)
    spent = SampleCostMeter(model)(traces, [1] * 3)
    assert sum(one.macs for one in spent) == pytest.approx(cost.total)
    assert sum(one.dense_macs for one in spent) == pytest.approx(cost.dense_total)


class Speech:
    """A task whose records say how much to generate."""

    def tokenize(self, records):
        return (), [1] * len(records)

    def predict(self, model, records, images, texts):
        model.generate(images[:, 0], GreedySearch(), max_length=records[0].longest)
        return [{} for _ in records]


def test_an_evaluator_counts_what_a_dense_model_generates():
    evaluator = Evaluator(Speech(), silent(vp.create_model("blip_caption_tiny", **SIZES)))
    short, long, again = (
        evaluator._predict([SimpleNamespace(index=0, longest=n, images=())], pixels(1)[None])[0] for n in (8, 12, 8)
    )
    assert short["macs"] == short["dense_macs"] == again["macs"] < long["macs"]
