"""torch.jit.trace: counts that are the same for all inputs of a shape are traced rightly, and all others are refused."""

from __future__ import annotations

import functools

import open_clip
import pytest
import torch
import transformers
from small_models import BLIP, images, scrambled, sentences, soften
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import vltprune as vp
from vltprune import PackedTokens
from vltprune.core import precision
from vltprune.layers.scorers.base import normalize
from vltprune.models.blip import Blip

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
FIXED = {"ratio": "ratio(ratio=0.5)", "count": "count(count=3)", "remove": "remove(r=3)"}
EVERY = {**dict.fromkeys(vp.keepers.names()), **FIXED}


@functools.cache
def vit():
    """Of two blocks, for each module takes long to trace; always the same one."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return scrambled(VisionTransformer(**sizes))


def traced(model, *inputs):
    with torch.no_grad():
        model(*inputs)  # what a first call prepares, in transformers as well, is no part of the record
        return torch.jit.trace(model, inputs, check_trace=False)  # which is for these inputs, and tests ask of others


@pytest.mark.parametrize("reducer", vp.reducers.names())
@pytest.mark.parametrize("keep", [*FIXED.values(), "ratio(ratio=0.6, decay=0.7)"])
def test_fixed_counts_are_right_for_other_images(keep, reducer):
    model = vp.prune(vit(), "madtp", guide="codebook(anchors=5)", keep=keep, reducer=reducer).eval()
    record = traced(model, images(2))
    with torch.no_grad():
        for _ in range(3):
            others = images(2)
            assert_close(record(others), model(others))


def test_scores_that_need_no_equalizing_do_not_leave_it_out_of_the_record():
    tokens = PackedTokens.pack(torch.randn(2, 4, 8))
    even, odd = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]]), torch.tensor([[1 + 2e-7, 1, 2, 3], [-4.0, 2, 1, 0.5]])
    for function, of, others in (
        (precision.equalize, even, odd),
        (lambda scores: normalize(scores, tokens), even.flatten(), odd.flatten()),
    ):
        assert not torch.equal(function(others), others)
        assert_close(torch.jit.trace(function, (of,))(others), function(others), rtol=0, atol=0)


@pytest.mark.parametrize("keep", EVERY)
def test_counts_of_an_instances_own_are_refused(keep):
    model = vp.prune(vit(), "madtp", guide="codebook(anchors=5)", keep=EVERY[keep] or keep).eval()
    if vp.keepers[keep].fixed:
        traced(model, images(2))
        return
    with pytest.raises(ValueError, match=r"keep this example's counts.*keep='ratio\(\.\.\.\)' or keep='count"):
        traced(model, images(2))


def test_soft_training_is_refused():
    model = soften(vp.prune(vit(), "random", keep="learned"), 0.5)
    with pytest.raises(ValueError, match="soft training counts tokens by what they hold"):
        traced(model, images(2))
    soften(model, 0.0)


@pytest.mark.parametrize("rows", ["of many lengths", "all as long"])
def test_sentences_of_their_own_lengths_are_refused(rows):
    """Also where the example has none: others may."""
    ids, mask = sentences(2)
    mask = mask if rows == "of many lengths" else torch.ones_like(mask)
    blip = scrambled(Blip(**{**BLIP, "vision_depth": 2, "text_depth": 2, "merge_from": 1}))
    model = vp.prune(blip, "random", keep="ratio(ratio=0.5)").eval()
    with pytest.raises(ValueError, match=r"keep the lengths of this example.*trace the image tower alone"):
        traced(model, images(2), ids, mask)
    with pytest.raises(ValueError, match="keep the lengths"):
        traced(vp.prune(blip.text, "random", keep="ratio(ratio=0.5)").eval(), ids, mask)

    record, others = traced(model, images(2), ids), (images(2), torch.randint(1, 40, (2, 12)))
    with torch.no_grad():
        assert_close(record(*others), model(*others))  # without a mask, all are as long


@pytest.mark.parametrize("ends", [(5, 8), (11, 11)])
def test_texts_of_open_clip_are_refused_and_its_images_are_not(ends):
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
    model = vp.prune(scrambled(open_clip.CLIP(8, vision, text)), "evit", keep="ratio(ratio=0.5)")
    ids = torch.randint(1, 38, (2, 12))
    ids[torch.arange(2), list(ends)] = 39
    with pytest.raises(ValueError, match="keep the lengths of this example"):
        traced(model, images(2), ids)
    record, others = traced(model.visual, images(2)), images(2)
    with torch.no_grad():
        assert_close(record(others), model.visual(others))


def test_transformers_are_traced_without_a_mask_alone():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=40, max_position_embeddings=16)
    model = vp.prune(scrambled(transformers.BertModel(config)), "evit", keep="ratio(ratio=0.5)").eval()

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask=None):
            return self.model(ids, mask).pooler_output

    ids, others = torch.randint(1, 40, (2, 2, 12)).unbind()
    with pytest.raises(ValueError, match="keep the lengths"):
        traced(Pooled(), ids, torch.ones_like(ids))
    record = traced(Pooled(), ids)
    with torch.no_grad():
        assert_close(record(others), Pooled()(others))
