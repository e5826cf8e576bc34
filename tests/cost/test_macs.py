"""Counted MACs against torch's counter."""

from __future__ import annotations

from unittest import mock

import open_clip
import pytest
import timm
import torch
import transformers
from small_models import PRESETS, asked, images, small
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vltprune as vp
from vltprune.layers import Codebook, Threshold

DIM = 32  # of small("vit")
SHALLOW = {"vision_depth": 2, "text_depth": 3}  # of BLIPs, which NLVR2's merges in the last


@pytest.fixture(autouse=True)
def _every_product_is_seen(monkeypatch):
    """The counter misses the fused kernel of nn.MultiheadAttention, and counts padding where small maps are padded."""
    monkeypatch.setattr("vltprune.core.attention_stats._WHOLE", 0)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def counted(model, *inputs, **named):
    """MACs by torch, which asserts on views of parameters made without gradients.

    Less what putting maps into the guide's anchors takes: that is done once a call, however many instances it has. And less the
    sums of scores that MADTP's threshold takes as products: sums count as nothing.
    """
    counter, once, bind, distance = FlopCounterMode(display=False), [], Codebook.bind, Threshold._distance

    def noted(self, tower):
        once.append(len(self.anchors) * self.maps[tower].weight.numel())
        return bind(self, tower)

    def summed(self, scores, guidance, tokens):
        once.append(2 * tokens.layout.batch * tokens.layout.longest * guidance.affinity.shape[1])
        return distance(self, scores, guidance, tokens)

    patches = mock.patch.object(Codebook, "bind", noted), mock.patch.object(Threshold, "_distance", summed)
    with patches[0], patches[1], sdpa_kernel(SDPBackend.MATH), counter:
        model(*inputs, **named)
    return counter.get_total_flops() / 2 - sum(once)


def assert_counts(dense, pruned, *inputs, **named):
    cost = vp.count_macs(pruned, *inputs, **named)
    assert cost.padded_total == pytest.approx(counted(dense, *inputs, **named), rel=5e-3)
    assert cost.total == pytest.approx(counted(pruned, *inputs, **named), rel=5e-3)
    assert cost.total < cost.padded_total


def test_tokens_that_are_compared_with_each_other_cost_what_that_takes():
    dense = timm.create_model("vit_tiny_patch16_224", img_size=384, depth=4).eval()
    assert_counts(dense, vp.prune(dense, "madtp", scorer="distinct_madtp"), torch.randn(2, 3, 384, 384))


def test_statistics_cost_what_their_products_take(monkeypatch):
    """Steps of PageRank are products that torch counts. It does not see the dot products of single rows."""
    scorer, images = vp.scorers["self_attention"], torch.randn(2, 3, 256, 256)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=256, depth=4).eval()
    config = vp.preset("evit").replace(scorer="self_attention", keep="ratio(0.5)", at=(0, 1, 3))
    plain = vp.count_macs(vp.prune(dense, config), images).total
    monkeypatch.setattr(scorer, "needs", vp.Stat.RECEIVED | vp.Stat.COLUMN | vp.Stat.DIAGONAL | vp.Stat.PAGERANK)
    assert_counts(dense, vp.prune(dense, config), images)

    monkeypatch.setattr(scorer, "needs", vp.Stat.RECEIVED | vp.Stat.LAST | vp.Stat.SUMMARY_WIDE | vp.Stat.VALUE)
    entering = 2 * (257 + 130 + 67)  # the pruned blocks, of two instances
    assert vp.count_macs(vp.prune(dense, config), images).total - plain == 2 * 192 * entering


@pytest.mark.parametrize(
    ("scorer", "reducer"),
    [("self_attention", "drop"), ("key_norm", "drop"), ("key_norm", "fuse"), ("equal", "drop")],
)
def test_pruners_before_a_block_cost_what_they_read_of_it(scorer, reducer):
    dense = timm.create_model("vit_tiny_patch16_224", img_size=256, depth=4).eval()
    config = vp.preset("evit").replace(scorer=scorer, reducer=reducer, keep="ratio(0.5)", at=(1, 3), place="before")
    assert_counts(dense, vp.prune(dense, config), torch.randn(2, 3, 256, 256))


@pytest.mark.parametrize("exchanged", ["mlp", "mlp.fc2"])
def test_blocks_that_are_not_alike_are_counted_each(exchanged):
    dense = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
    other = timm.layers.Mlp(192, 384) if exchanged == "mlp" else nn.Sequential(nn.Linear(768, 500), nn.Linear(500, 192))
    dense.blocks[1].set_submodule(exchanged, other)
    pruned = vp.prune(dense, "evit", keep="ratio(ratio=0.5)", at=(0, 1, 3))
    assert_counts(dense, pruned, torch.randn(1, 3, 64, 64))
    first, second, third, fourth = vp.count_macs(pruned, torch.randn(1, 3, 64, 64)).dense["image"][1:5]
    assert first == third == fourth != second


def test_widths_of_vit_base_at_384():
    dense = timm.create_model("vit_base_patch16_384", depth=3).eval()
    images = torch.randn(1, 3, 384, 384)
    assert_counts(dense, vp.prune(dense, "madtp"), images)


@pytest.mark.parametrize("reducer", ["fuse", "drop"])
def test_widths_of_clip_vit_b_32(reducer):
    config = open_clip.get_model_config("ViT-B-32")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = 3
    dense = open_clip.CLIP(**config).eval()
    text = torch.zeros(2, 77, dtype=torch.int64)
    text[:, 0], text[0, 1:12], text[1, 1:30], text[0, 12], text[1, 30] = 49406, 320, 518, 49407, 49407
    assert_counts(dense, vp.prune(dense, "madtp", reducer=reducer), torch.randn(2, 3, 224, 224), text)


@pytest.mark.parametrize(("preset", "sentences"), [("madtp", 1), *((preset, 3) for preset in PRESETS)])
def test_blip_nlvr_tiny_with_padding_and_shared_images(preset, sentences, monkeypatch):
    # short instances are attended to padded, which torch counts and an instance alone would not pay
    monkeypatch.setattr("vltprune.core.attention._SMALL", {})
    dense = vp.create_model("blip_nlvr_tiny", **SHALLOW)
    ids = torch.randint(4, 57, (2 * sentences, 14))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    pruned, pixels = vp.prune(dense, preset), torch.randn(2, 2, 3, 96, 96)
    with asked(pruned, pixels):
        assert_counts(dense, pruned, pixels, ids, mask)


def test_blip_retrieval_has_nothing_behind_its_towers_that_is_not_counted(monkeypatch):
    monkeypatch.setattr("vltprune.core.attention._SMALL", {})
    dense = vp.create_model("blip_retrieval_tiny", **SHALLOW)
    ids, mask = torch.randint(4, 57, (2, 9)), torch.ones(2, 9)
    assert_counts(dense, vp.prune(dense, "madtp"), torch.randn(2, 3, 96, 96), ids, mask)


def test_a_text_with_and_without_its_image(monkeypatch):
    """One meter for both, whichever comes first."""
    monkeypatch.setattr("vltprune.core.attention._SMALL", {})
    dense = vp.create_model("blip_retrieval_tiny")
    pruned, images, ids = vp.prune(dense, "madtp"), torch.randn(2, 3, 96, 96), torch.randint(4, 57, (2, 9))
    calls = [lambda model: model(images, ids), lambda model: model.text_features(ids)]
    for order in (calls, calls[::-1]):
        meter = vp.CostMeter(pruned)
        for call in order:
            with torch.no_grad(), vp.collect() as traces:
                call(pruned)
            assert meter(traces).total == pytest.approx(counted(call, pruned), rel=5e-3)


def test_a_meter_measures_a_tower_once(monkeypatch):
    pruned = vp.prune(timm.create_model("vit_tiny_patch16_224", depth=2).eval(), "evit")
    meter, calls = vp.CostMeter(pruned), []
    with torch.no_grad(), vp.collect() as traces:
        pruned(torch.randn(1, 3, 224, 224))
    first = meter(traces)
    monkeypatch.setattr("torch.utils.flop_counter.FlopCounterMode", lambda **how: calls.append(how))
    assert meter(traces).total == first.total and not calls


def test_attention_pool_and_rotary_tower():
    tower = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=64, depth=3, num_heads=4, class_token=False, global_pool="map"
    )
    assert_counts(tower.eval(), vp.prune(tower, "random"), torch.randn(2, 3, 64, 64))
    eva = timm.models.eva.Eva(img_size=64, patch_size=8, embed_dim=64, depth=3, num_heads=4, use_rot_pos_emb=True)
    assert_counts(eva.eval(), vp.prune(eva, "madtp"), torch.randn(2, 3, 64, 64))


WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {**WIDTHS, "image_size": 64, "patch_size": 8}
SENTENCES = {**WIDTHS, "vocab_size": 60, "max_position_embeddings": 14, "eos_token_id": 59}
OWN_WORDS = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1)
HUGGING_FACE = {
    "bert": lambda hf: hf.BertModel(hf.BertConfig(**SENTENCES)),
    "distilbert": lambda hf: hf.DistilBertModel(hf.DistilBertConfig(dim=64, hidden_dim=128, n_heads=4, n_layers=3)),
    "mpnet": lambda hf: hf.MPNetModel(hf.MPNetConfig(**{**SENTENCES, "max_position_embeddings": 16})),
    "modernbert": lambda hf: hf.ModernBertModel(hf.ModernBertConfig(**SENTENCES, **OWN_WORDS, local_attention=4)),
    "classifier": lambda hf: hf.BertForSequenceClassification(hf.BertConfig(**SENTENCES, num_labels=20)),
    "vit": lambda hf: hf.ViTModel(hf.ViTConfig(**VISION)),
    "dinov3": lambda hf: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION)),
    "clip": lambda hf: hf.CLIPModel(hf.CLIPConfig(text_config=SENTENCES, vision_config=VISION)),
    "blip": lambda hf: hf.BlipForImageTextRetrieval(hf.BlipConfig(text_config=SENTENCES, vision_config=VISION)),
    "vilt": lambda hf: hf.ViltForQuestionAnswering(
        hf.ViltConfig(**SENTENCES, image_size=64, patch_size=8, num_labels=9)
    ),
    "siglip": lambda hf: hf.SiglipModel(hf.SiglipConfig(text_config=SENTENCES, vision_config=VISION)),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers(name, monkeypatch):
    monkeypatch.setattr("vltprune.core.attention._SMALL", {})
    dense = HUGGING_FACE[name](transformers).eval()
    ids = torch.randint(3, 50, (2, 14))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name != "siglip":
        ids[:, 5], text["attention_mask"][1, 6:] = 59, 0
    image = {"pixel_values": torch.randn(2, 3, 64, 64)}
    larger = {"pixel_values": torch.randn(2, 3, 96, 80), "interpolate_pos_encoding": True}
    alone = dict.fromkeys(("bert", "distilbert", "mpnet", "modernbert", "classifier"), text)
    alone |= {"vit": larger, "dinov3": image}
    inputs = alone.get(name, text | image)
    preset = {"siglip": "random", "vilt": "pumer"}.get(name, "madtp")
    if name == "vilt":  # of two sizes, the smaller one padded
        real = torch.ones(2, 64, 64, dtype=torch.int64)
        real[1, 40:], real[1, :, 24:] = 0, 0
        inputs |= {"pixel_mask": real}
    assert_counts(dense, vp.prune(dense, preset), **inputs)


def test_attention_from_the_text_costs_a_product_for_each_word_and_token():
    dense, inputs = small("vilt").model, small("vilt").draw(5)
    costs = [
        vp.count_macs(vp.prune(dense, "random", scorer=scorer, keep="above(threshold=-9.0)", at=(1, 3)), *inputs)
        for scorer in ("text_attention", "random")
    ]
    words, patches = inputs[1].sum(1), inputs[4][:, ::8, ::8].sum((1, 2)) + 1
    more = (costs[0].towers["fusion"] - costs[1].towers["fusion"])[2]
    assert more.tolist() == (DIM * words * (words + patches)).tolist()


@pytest.mark.parametrize(
    ("parts", "each", "pairs"),
    [
        ({}, 0, 0),
        ({"scorer": "mean_cls_attention"}, DIM, 0),  # the summary's query with each key
        ({"scorer": "madtp", "guide": "codebook(anchors=5)"}, 6 * DIM, 0),  # and each token with each anchor
        ({"scorer": "distinct"}, 0, DIM),  # each token with each
        ({"reducer": "fuse"}, 2 * DIM, 0),  # of the tokens, and of the heads' outputs that are projected
        ({"reducer": "fuse(normalize=False)"}, DIM, 0),  # of the tokens, when all have been projected
    ],
    ids=lambda one: str(one),
)
def test_a_block_that_prunes_costs_its_products(parts, each, pairs):
    """Written out: the linear layers, attention, and what scoring and merging add, of each token and of each pair."""
    config = vp.preset("random").replace(**{"keep": "ratio(ratio=0.5)", "at": (1,), **parts})
    cost = vp.count_macs(vp.prune(small("vit").model, config), images(1))
    entered, fuses = 17, "fuse" in parts.get("reducer", "")
    left = 1 + 8 + fuses  # the class token, half of the others, what the rest becomes
    projected = entered if "normalize=False" in parts.get("reducer", "") else left
    block = DIM**2 * (3 * entered + projected + 8 * left) + 2 * DIM * entered**2
    assert cost.towers["image"][2].tolist() == [block + each * entered + pairs * entered**2]


def test_an_instance_costs_the_same_alone():
    model = vp.create_model("blip_nlvr_tiny_madtp", **SHALLOW)
    images, ids = torch.randn(3, 2, 3, 96, 96), torch.randint(4, 57, (3, 12))
    together = vp.count_macs(model, images, ids)
    alone = [vp.count_macs(model, images[i : i + 1], ids[i : i + 1]).total for i in range(3)]
    assert together.total == pytest.approx(sum(alone), rel=1e-9)


def test_keeping_all_costs_the_dense_macs_and_the_scoring_where_it_is_not_known_before():
    dense = vp.create_model("blip_nlvr_tiny", **SHALLOW)
    inputs = torch.randn(1, 2, 3, 96, 96), torch.randint(4, 57, (1, 12))
    for preset in ("random", "madtp"):
        nothing = vp.count_macs(vp.prune(dense, preset, keep="ratio(ratio=1.0)"), *inputs)
        assert nothing.total == nothing.dense_total
    scored = vp.count_macs(vp.prune(dense, "madtp", keep="above(threshold=-9.0)"), *inputs)
    assert 1 < scored.total / scored.dense_total < 1.1


CLIP_TEXT = {"context_length": 24, "vocab_size": 60, "width": 32, "heads": 2, "layers": 3, "no_causal_mask": False}


def clip_words(lengths, padded):
    """Ids for open_clip: words, the end, which has the highest id, and padding up to `padded`."""
    ids = torch.zeros(len(lengths), padded, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, 50, (length,))
        row[length - 1] = 59
    return ids


def padded_texts(name):
    """A dense model, and a function from the number of places to inputs with the same words."""
    torch.manual_seed(0)
    if name == "open_clip":
        vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
        dense = vp.create_model("clip", embed_dim=16, vision_cfg=vision, text_cfg=CLIP_TEXT)
        ids, images = clip_words((5, 9, 3), 24), torch.randn(3, 3, 32, 32)
        return dense, lambda places: (images, ids)
    dense = vp.create_model(name, **SHALLOW)
    ids = torch.randint(4, 57, (3, 20))
    mask = (torch.arange(20) < torch.tensor([5, 9, 3])[:, None]).long()
    images = torch.randn(3, *((2,) if "nlvr" in name else ()), 3, 96, 96)
    answers = (torch.randint(4, 57, (3, 4)),) if "vqa" in name else ()
    return dense, lambda places: (images, ids[:, :places], mask[:, :places], *answers)


@pytest.mark.parametrize("name", ["blip_nlvr_tiny", "blip_retrieval_tiny", "blip_vqa_tiny"])
def test_what_is_saved_is_not_of_padding(name):
    """The same words with more padding behind them: the pruned and the dense model spend the same on the words."""
    dense, inputs = padded_texts(name)
    for config in ("evit", vp.preset("random").replace(keep="ratio(ratio=1.0)")):
        model = vp.prune(dense, config)
        short, long = (vp.count_macs(model, *inputs(places)) for places in (9, 20))
        assert short.total == pytest.approx(long.total)
        assert short.dense_total == pytest.approx(long.dense_total)
        assert short.reduction == pytest.approx(long.reduction)
        assert (
            0
            < short.padding_total
            < long.padding_total
            == pytest.approx(float(long.padding["text"].sum()) + long.decoder_padding)
        )
        assert float(long.padding["image"].sum()) == 0
        assert long.padded_total == long.dense_total + long.padding_total
        assert ("vqa" in name) == (long.decoder_padding > 0)
    assert long.reduction == pytest.approx(0.0)


def test_what_each_tower_saves_is_of_its_own_macs():
    dense, inputs = padded_texts("open_clip")
    text_alone = vp.prune(dense, "random", keep="ratio(ratio=0.4)", at={"text": None})
    cost = vp.count_macs(text_alone, *inputs(24))
    assert cost.reductions["image"] == 0
    assert 0.1 < cost.reductions["text"] < 0.9
    assert cost.saving_by_tower == pytest.approx({"image": 0.0, "text": 1.0})
    full = vp.count_macs(vp.prune(dense, "random", keep="ratio(ratio=1.0)"), *inputs(24))
    assert full.reductions == {"image": 0.0, "text": 0.0}
    assert full.saving_by_tower == {}
    assert full.padding_total > full.dense["text"].sum()  # three short sentences in 24 places


def test_counting_needs_a_pruned_model_and_a_call():
    dense = vp.create_model("blip_nlvr_tiny", **SHALLOW)
    with pytest.raises(TypeError, match="not pruned"):
        vp.count_macs(dense, torch.randn(1, 2, 3, 96, 96), torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="collect"):
        vp.CostMeter(vp.prune(dense, "madtp"))([])


def test_counting_leaves_the_mode_alone():
    model = vp.create_model("vit_tiny_patch16_224_madtp", depth=2).train()
    vp.count_macs(model, torch.randn(1, 3, 224, 224))
    assert model.training


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("preset", ["trips", "cdpruner"])
def test_a_text_costs_its_projection_once_and_its_comparison_with_each_token(preset, segments):
    """One meter for texts of several lengths."""
    dense, pixels = timm.create_model("vit_tiny_patch16_224", img_size=128, depth=4).eval(), torch.randn(2, 3, 128, 128)
    inside = {"place": "block", "at": (1, 2), "selector": "top"} if preset == "cdpruner" else {}
    guide = vp.preset(preset).part("guide")
    pruned = vp.prune(dense, preset, guide=vp.Part(guide.name, {**guide.args, "dim": 500}), **inside)
    meter, totals = vp.CostMeter(pruned), []
    for number in (segments, 2 * segments):
        with vp.query(torch.randn(2, number, 500)), vp.collect() as traces, torch.no_grad():
            pruned(pixels)
        totals.append(meter(traces).total)
        with vp.query(torch.randn(2, number, 500)):
            assert totals[-1] == pytest.approx(counted(pruned, pixels), rel=1e-6)
    assert totals[0] < totals[1]
