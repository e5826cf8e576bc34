"""Image towers of Qwen-VL, pruned inside: dropping visual tokens equals masking their patches in the dense tower."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from small_vlms import IMAGE_ID, INSIDE, STEPS, make
from test_vlm import BATCH, same

import vltprune as vp
from vltprune.core import attention
from vltprune.hosts.linear_maps import measure_macs

MODELS = ("qwen2", "qwen2.5", "qwen3")
KEEP = "random_ratio(mean=0.5, half_width=0.4)"
GRIDS = torch.tensor([[1, 4, 6], [3, 8, 4], [1, 12, 8]])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def window_order(visual, grid):
    """The patches in the order in which a dense tower has them."""
    order = torch.arange(int(grid.prod(-1).sum()) // 4)
    if hasattr(visual, "window_size"):
        module = sys.modules[type(visual).__module__]
        order = module.get_vision_window_index(grid, 2, visual.window_size, visual.patch_size)[0]
    return (order[:, None] * 4 + torch.arange(4)).flatten()


def seen(trace, depth, before=False):
    """[patches] bool: those that a block of the pruned tower attended to, which may have lost some before it."""
    layout = trace.input_tokens.layout
    there = torch.ones(layout.total, dtype=torch.bool)
    if depth or before:
        layer = trace.layers[depth if before else depth - 1]
        there = torch.zeros_like(there).index_fill(0, layout.starts[layer.layout.instance] + layer.position, True)
    return there.repeat_interleave(4)


@contextlib.contextmanager
def masking(case, traces, monkeypatch, before=False):
    """The blocks of the dense tower hide what the pruned tower had dropped before them, in its calls one after the other."""
    visual, module = case.model.model.visual, sys.modules[type(case.model).__module__]
    eager, depths = module.eager_attention_forward, {block.attn: n for n, block in enumerate(visual.blocks)}
    calls = [
        [seen(trace, depth, before)[window_order(visual, trace.inputs[1])] for depth in range(len(depths))]
        for trace in traces
    ]
    state = {"call": -1, "depth": -1, "from": 0}

    def hiding(attn, query, key, value, attention_mask=None, **named):
        if depths[attn] != state["depth"]:
            state["call"] += int(depths[attn] == 0)
            state["depth"], state["from"] = depths[attn], 0
        there = calls[state["call"]][state["depth"]][state["from"] : state["from"] + key.shape[2]]
        state["from"] += key.shape[2]
        # not infinity: a window may have nothing left
        bias = torch.zeros(1, 1, 1, key.shape[2]).masked_fill(~there, torch.finfo(torch.float32).min)
        return eager(attn, query, key, value, bias, **named)

    monkeypatch.setattr(module, "eager_attention_forward", hiding)
    visual.set_attn_implementation("eager")
    try:
        yield
    finally:
        visual.set_attn_implementation("sdpa")
        monkeypatch.setattr(module, "eager_attention_forward", eager)


@pytest.mark.parametrize("place", ["before", "attention", "block"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dropping_is_masking(name, place, monkeypatch):
    case = make(name)
    pruned = case.pruned("random", at=(0, 1), place=place, keep=KEEP)
    for inputs in (case.prompts((3, 4)), case.prompts(*BATCH)):
        with vp.collect() as traces:
            got = pruned.generate(**inputs, **STEPS)
        hidden = {"attention_mask": case.visible(inputs, traces[0]), "position_ids": case.positions(inputs)}
        with masking(case, traces[:1], monkeypatch, place == "before"):
            want = case.model.generate(**inputs | hidden, **STEPS)
        assert torch.equal(got.sequences, want.sequences)
        same(got.logits, want.logits)
    assert len(set(traces[0].lengths[-1])) > 1 and sum(traces[0].lengths[0]) > sum(traces[0].lengths[1])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_images_and_videos_of_several_sizes(name, monkeypatch):
    case = make(name)
    visual, pixels = case.model.model.visual, torch.randn(24 + 96 + 96, 96)
    dense = visual(pixels, GRIDS)
    outputs = ("last_hidden_state", "pooler_output", *(["deepstack_features"] if name == "qwen3" else []))
    out = vp.prune(visual, "random", keep="ratio(ratio=1.0)")(pixels, GRIDS)
    if name != "qwen2.5":  # whose last hidden state is in the order of windows
        same(out.last_hidden_state, dense.last_hidden_state)
    for key in outputs[1:]:
        same(tuple(out[key]), tuple(dense[key]))

    pruned = vp.prune(visual, "random", at=(0,), place="block", keep=KEEP)
    with vp.collect() as traces:
        out = pruned(pixels, GRIDS)
    with masking(case, traces, monkeypatch):
        want = visual(pixels, GRIDS)
    tokens = traces[0].output_tokens
    row = traces[0].input_tokens.layout.starts[tokens.layout.instance] + tokens.position
    same(out.pooler_output, want.pooler_output[row])
    for level, whole in zip(out.get("deepstack_features", ()), want.get("deepstack_features", ()), strict=True):
        same(level, whole[row])
    # an image has what it has alone
    same(pruned(pixels[24:120], GRIDS[1:2]).pooler_output, out.pooler_output[tokens.layout.instance == 1])


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
@torch.no_grad()
def test_an_image_and_a_video_in_one_prompt(name, monkeypatch):
    case = make(name)
    frames = [*[111] * 6, *([9] if name == "qwen3" else []), *[111] * 6]
    ids = torch.tensor([[1, 2, *[IMAGE_ID] * 6, 3, *frames, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **case.draw([1])}
    inputs["mm_token_type_ids"] = (ids == IMAGE_ID).long() + 2 * (ids == 111).long()
    inputs |= {"pixel_values_videos": torch.randn(48, 96), "video_grid_thw": torch.tensor([[2, 4, 6]])}
    pruned = case.pruned("random", at=(0,), place="block", keep="count(count=4)")
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    video = torch.zeros(12, dtype=torch.int64).index_fill(0, traces[1].output_tokens.position, 1)
    mask = case.visible(inputs, traces[0]).masked_scatter(ids == 111, video)
    with masking(case, traces[:2], monkeypatch):
        want = case.model.generate(**inputs | {"attention_mask": mask, "position_ids": case.positions(inputs)}, **STEPS)
    same(got.logits, want.logits)
    features = pruned.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    assert [len(one) for one in features] == [4]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_macs_are_those_that_a_counter_sees(name, monkeypatch):
    # short instances are padded otherwise, which a counter sees
    monkeypatch.setattr(attention, "_SMALL", {})
    visual, pixels = make(name).model.model.visual, torch.randn(24 + 96 + 96, 96)
    pruned = vp.prune(visual, "random", at=(0,), keep="ratio(ratio=0.4)")
    found = vp.count_macs(pruned, pixels, GRIDS)
    assert found.dense_total == pytest.approx(measure_macs(visual, pixels, GRIDS), rel=1e-9)
    assert found.total == pytest.approx(measure_macs(pruned, pixels, GRIDS), rel=1e-9)


@torch.no_grad()
def test_counts_are_of_visual_tokens():
    case = make("qwen3")
    pruned = case.pruned("random", at=(0,), keep="count(count=2)")
    found = vp.visual_tokens(pruned, case.prompts((3, 4), (2, 3, 5)))
    # one image in the first prompt, two in the second
    assert found.layers == (3.0, 3.0) and found.dense == 9.0
    assert found.macs["tower"] < 0.6 * found.dense_macs["tower"]


@pytest.mark.parametrize(("preset", "parts"), INSIDE)
@pytest.mark.filterwarnings("ignore:.*untrained noise")
@torch.no_grad()
def test_presets_run_inside(preset, parts):
    case = make("qwen2.5")
    inputs = case.prompts((3, 4), (2, 3, 5))
    with vp.collect() as traces:
        logits = case.pruned(preset, keep="ratio(ratio=0.4)", **parts)(**inputs).logits
    assert logits.isfinite().all() and sum(traces[0].lengths[-1]) < 18


@pytest.mark.parametrize(
    ("preset", "parts", "message"),
    [
        ("evit", {}, "summary token"),
        ("flowcut", {}, "summary token"),
        ("random", {"scorer": "query_attention", "guide": "text_query"}, "several patches"),
    ],
)
def test_what_is_refused(preset, parts, message):
    with pytest.raises(ValueError, match=message):
        make("qwen2").pruned(preset, **parts)


@pytest.mark.parametrize(
    ("pixels", "grid", "message"),
    [
        (torch.randn(24, 96), torch.tensor([1, 4, 6]), "grid_thw must be"),
        (torch.randn(20, 96), torch.tensor([[1, 4, 6]]), "have 24 patches"),
        (torch.randn(15, 96), torch.tensor([[1, 3, 5]]), "multiples of 2"),
    ],
)
def test_bad_grids(pixels, grid, message):
    with pytest.raises(ValueError, match=message):
        vp.prune(make("qwen3").model.model.visual, "random")(pixels, grid)


def test_a_pooled_window_is_of_one_frame():
    visual = make("qwen2").model.model.visual
    with vp.collect() as traces, torch.no_grad():
        # three frames of 2 x 2 visual tokens each
        vp.prune(visual, "pooling", place="output", at=None)(torch.randn(48, 96), torch.tensor([[3, 4, 4]]))
    assert traces[0].output_tokens.position.tolist() == [0, 4, 8]


def test_recomputed_blocks_have_the_same_gradients():
    case = make.__wrapped__("qwen2.5")
    visual, pixels = case.model.model.visual, torch.randn(24 + 96 + 96, 96)
    pruned, gradients = vp.prune(visual, "random", at=(0,), keep=KEEP), []
    for recompute in (False, True):
        if recompute:
            visual.activation_checkpointing_enable()
        pruned.train().zero_grad()
        pruned(pixels, GRIDS).pooler_output.square().sum().backward()
        gradients.append(visual.blocks[0].attn.qkv.weight.grad.clone())
    same(*gradients)
