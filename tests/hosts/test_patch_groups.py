"""Image towers whose patches become visual tokens in groups, pruned inside: dropping equals masking in the dense tower."""

from __future__ import annotations

import contextlib
import sys
from functools import partial

import pytest
import torch
import transformers as hf
from small_vlms import IMAGE_ID, INSIDE, LLAMA, STEPS, TOWER, make, ready
from test_vlm import BATCH, same

import vltprune as vp
from vltprune.core import attention
from vltprune.hosts.linear_maps import measure_macs

MODELS = ("paligemma", "smolvlm", "idefics3", "gemma3", "internvl")
KEEP = "random_ratio(mean=0.5, half_width=0.4)"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def tower_of(model):
    base = model.base_model
    return base.vision_tower if hasattr(base, "vision_tower") else base.vision_model


def seen(trace, depth, before=False):
    """[images, patches] bool: those that a block of the pruned tower attended to, which may have lost some before it."""
    layout, host = trace.input_tokens.layout, trace.encoder.adapter
    there = torch.ones(layout.total, dtype=torch.bool)
    if depth or before:
        layer = trace.layers[depth if before else depth - 1]
        there = torch.zeros_like(there).index_fill(0, layout.starts[layer.layout.instance] + layer.position, True)
    line, prefix = 4 // host.side, host.prefix(trace.encoder.host)
    first, groups = there.view(-1, prefix + line**2).tensor_split([prefix], 1)
    patches = groups.unflatten(1, (line, line)).repeat_interleave(host.side, 1).repeat_interleave(host.side, 2)
    return torch.cat([first, patches.flatten(1)], 1)


@contextlib.contextmanager
def masking(case, trace, monkeypatch, before=False, seen=seen):
    """The blocks of the dense tower hide what the pruned tower had dropped before them, which `seen` says."""
    tower = tower_of(case.model)
    module = sys.modules[type(tower).__module__]
    eager = module.eager_attention_forward
    attentions = [child for child in tower.modules() if hasattr(child, "q_proj")]
    depths = {attn: depth for depth, attn in enumerate(attentions)}

    def hiding(attn, query, key, value, attention_mask=None, **named):
        there = seen(trace, depths[attn], before)[:, None, None]
        bias = torch.zeros(there.shape).masked_fill(~there, torch.finfo(torch.float32).min)
        if attention_mask is not None:
            bias = (bias + attention_mask).clamp(min=torch.finfo(torch.float32).min)
        return eager(attn, query, key, value, bias, **named)

    monkeypatch.setattr(module, "eager_attention_forward", hiding)
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation("sdpa")
        monkeypatch.setattr(module, "eager_attention_forward", eager)


def check_dropping_is_masking(case, pruned, inputs, monkeypatch, before=False):
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    hidden = {"attention_mask": case.visible(inputs, traces[0]), "position_ids": case.positions(inputs)}
    with masking(case, traces[0], monkeypatch, before):
        want = case.model.generate(**inputs | hidden, **STEPS)
    assert torch.equal(got.sequences, want.sequences)
    same(got.logits, want.logits)
    return traces[0]


@pytest.mark.parametrize("place", ["before", "attention", "block"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dropping_is_masking(name, place, monkeypatch):
    case = make(name)
    pruned = case.pruned("random", at=(0, 2), place=place, keep=KEEP)
    for inputs in (case.prompts((3, 4)), case.prompts(*BATCH)):
        trace = check_dropping_is_masking(case, pruned, inputs, monkeypatch, place == "before")
    assert len(set(trace.lengths[-1])) > 1
    assert trace.input_tokens.layout.total > sum(trace.lengths[0]) >= sum(trace.lengths[-1])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_keeping_all_in_blocks_is_the_dense_model(name):
    case = make(name)
    inputs = case.prompts(*BATCH)
    pruned = case.pruned("random", at=(0, 2), place="block", keep="ratio(ratio=1.0)")
    same(pruned(**inputs).logits, case.model(**inputs).logits)
    features, dense = (model.get_image_features(**case.draw([2, 1])) for model in (pruned, case.model))
    assert type(features.pooler_output) is type(dense.pooler_output)
    for one, other in zip(features.pooler_output, dense.pooler_output, strict=True):
        assert one.shape == other.shape


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@torch.no_grad()
def test_patches_of_padding_are_hidden(name, monkeypatch):
    case = make(name)
    inputs = case.prompts((3, 4), (2, 3, 5))
    there = torch.ones(2, 2, 32, 32, dtype=torch.bool)
    # the lower half of the lower groups of the first image of each prompt
    there[:, 0, 24:] = False
    inputs["pixel_attention_mask"] = there
    same(
        case.pruned("random", at=(0,), place="block", keep="ratio(ratio=1.0)")(**inputs).logits,
        case.model(**inputs).logits,
    )
    check_dropping_is_masking(case, case.pruned("random", at=(0, 2), place="block", keep=KEEP), inputs, monkeypatch)

    # images of another size, with padding at the right
    pixels, there = torch.randn(1, 2, 3, 48, 48), torch.ones(1, 2, 48, 48, dtype=torch.bool)
    there[0, 1, :, 24:] = False
    pruned = case.pruned("random", at=(0,), place="block", keep="ratio(ratio=1.0)")
    features, dense = (model.get_image_features(pixels, there).pooler_output for model in (pruned, case.model))
    same(features[0], dense[0])
    with pytest.raises(ValueError, match="must be squares with sides of a multiple of 16"):
        pruned.get_image_features(pixels[..., :32, :])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_macs_are_those_that_a_counter_sees(name, monkeypatch):
    # short instances are padded otherwise, which a counter sees
    monkeypatch.setattr(attention, "_SMALL", {})
    case = make(name)
    inputs = case.prompts((3, 4), (2, 3, 5))
    pruned = case.pruned("random", at=(0,), place="block", keep="ratio(ratio=0.4)")
    pixels = {key: value for key, value in inputs.items() if "pixel" in key}
    found = vp.count_macs(pruned, **inputs)
    dense, left = (measure_macs(partial(model.get_image_features, **pixels)) for model in (case.model, pruned))
    others = vp.visual_tokens(pruned, inputs)
    assert others.dense_macs["tower"] == pytest.approx(dense, rel=1e-9)
    assert others.macs["tower"] == pytest.approx(left, rel=1e-9)
    assert found.total < found.dense_total


@pytest.mark.parametrize(
    ("name", "preset", "parts"),
    [
        *(("smolvlm", preset, parts) for preset, parts in INSIDE),
        # the others share its code: a part that merges, and one that reads attention
        *((name, preset, parts) for name in MODELS if name != "smolvlm" for preset, parts in (INSIDE[0], INSIDE[3])),
    ],
)
@pytest.mark.filterwarnings("ignore:.*untrained noise")
@torch.no_grad()
def test_presets_run_inside(name, preset, parts):
    case = make(name)
    inputs = case.prompts((3, 4), (2, 3, 5))
    with vp.collect() as traces:
        logits = case.pruned(preset, keep="ratio(ratio=0.4)", **parts)(**inputs).logits
    assert logits.isfinite().all() and sum(traces[0].lengths[-1]) < traces[0].input_tokens.layout.total


@torch.no_grad()
def test_options_of_internvl():
    vision = {**TOWER, "image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True, "norm_type": "rms_norm"}
    config = hf.InternVLConfig(
        vision_config={**vision, "use_mean_pooling": False, "attention_bias": True},
        text_config={**LLAMA, "model_type": "qwen2"},
        image_token_id=IMAGE_ID,
    )
    model = ready(hf.InternVLForConditionalGeneration(config))
    keep_all = vp.prune(model, "random", at=(0, 2), place="block", keep="ratio(ratio=1.0)")
    # of another size too, whose positions are interpolated
    for pixels in (torch.randn(2, 3, 32, 32), torch.randn(1, 3, 48, 48)):
        same(keep_all.get_image_features(pixels).pooler_output, model.get_image_features(pixels).pooler_output)
    with pytest.raises(ValueError, match="must be squares with sides of a multiple of 16 pixels, got 40 x 40"):
        keep_all.get_image_features(torch.randn(1, 3, 40, 40))
    with pytest.raises(ValueError, match="reads the attention of a summary token"):
        vp.prune(model, "evit", at=(0,))
    model.config.vision_feature_layer = -2
    with pytest.raises(ValueError, match=r"vision_feature_layer=-2: .*place='output' with at=None"):
        vp.prune(model, "random", at=(0,), place="block")


@torch.no_grad()
def test_the_class_token_of_internvl_stays():
    case = make("internvl")
    pruned, inputs = case.pruned("random", at=(0,), place="block", keep="count(count=2)"), case.prompts((3, 4, 2))
    with vp.collect() as traces:
        pruned(**inputs)
    tokens = traces[0].output_tokens
    assert list(tokens.layout.lengths) == [3, 3] and tokens.position[tokens.layout.starts].tolist() == [0, 0]
    assert vp.visual_tokens(pruned, inputs).average == 4.0
