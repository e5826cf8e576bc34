"""ViLT of transformers: patches in the order of the image, positions without padding, two images, refusals."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from cases_transformers import make
from checks import randomize, same
from torch.nn.functional import pad
from transformers_parts import ENDS, MASK, words
from transformers_vilt import POSITIONS, SIZES, config, padded_images, vilt_case

import vltprune as vp
from vltprune.layers.grid import grid, window_ids


@pytest.mark.parametrize("preset", ["random", "pumer", "madtp"])
@torch.no_grad()
def test_no_draw_decides_what_is_pruned(preset):
    """transformers shuffles the patches of every image."""
    case = make("vilt: plain")
    pruned = case.pruned(preset)
    outs = []
    for seed in range(3):
        torch.manual_seed(seed)
        with vp.collect() as traces:
            out = pruned(*case.inputs)
        outs.append((out.last_hidden_state, out.pooler_output, traces[0].layers[-1].position))
    assert all(torch.equal(*both) for other in outs[1:] for both in zip(outs[0], other, strict=True))


@torch.no_grad()
def test_patches_that_are_drawn_are_those_of_the_host():
    """`max_image_length` limits them: under the same seed they are the same, and then a part of them stays."""
    torch.manual_seed(0)
    model = randomize(hf.ViltModel(config(max_image_length=7)))
    ids, (pixels, real) = words(), padded_images()
    inputs = (ids, MASK, None, pixels, real)
    pruned = vp.prune(model, "random", keep="ratio(1.0)")
    for seed in range(3):
        torch.manual_seed(seed)
        want, drawn = model(*inputs).pooler_output, torch.get_rng_state()
        torch.manual_seed(seed)
        with vp.collect() as traces:
            same(pruned(*inputs).pooler_output, want)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert traces[0].input_tokens.layout.lengths == tuple((MASK.sum(1) + 1 + 7).tolist())
    fewer = vp.prune(model, "pumer")
    torch.manual_seed(0)
    once = fewer(*inputs).pooler_output
    torch.manual_seed(0)
    assert torch.equal(fewer(*inputs).pooler_output, once)


@pytest.mark.parametrize("preset", ["random", "pumer"])
@torch.no_grad()
def test_padding_never_matters(preset):
    """More of it behind the texts and around the images, and other contents in it."""
    case = make("vilt: plain")
    ids, mask, _, pixels, real = case.inputs
    pruned, outs = case.pruned(preset), []
    wider = pad(pixels, (0, 16, 0, 8)), pad(real, (0, 16, 0, 8))
    noisy = torch.where(mask.bool(), ids, torch.randint(3, 50, ids.shape))
    for inputs in (case.inputs, (pad(noisy, (0, 3)), pad(mask, (0, 3)), None, *wider)):
        with vp.collect() as traces:
            outs.append((pruned(*inputs).pooler_output, traces[0]))
    (one, first), (other, second) = outs
    same(other, one)
    assert first.lengths == second.lengths
    assert torch.equal(first.layers[-1].position, second.layers[-1].position)
    assert torch.equal(first.input_tokens.columns["modality"] == 1, first.input_tokens.position >= POSITIONS)


@torch.no_grad()
def test_patches_know_their_row_and_column():
    """Those of the image, not of its padding; words are in no window with patches."""
    case = make("vilt: plain")
    with vp.collect() as traces:
        case.pruned("pooling", keep="ratio(0.25)", at=(0,), modality="image")(*case.inputs)
    tokens = traces[0].input_tokens
    row, column = grid(tokens)
    is_image, windows = tokens.columns["modality"] == 1, window_ids(tokens, 2)
    assert not set(windows[is_image].tolist()) & set(windows[~is_image].tolist())
    for i, (height, width) in enumerate(SIZES):
        own = (tokens.layout.instance == i) & tokens.free & is_image
        cells = [(r, c) for r in range(height // 8) for c in range(width // 8)]
        assert list(zip(row[own].tolist(), column[own].tolist(), strict=True)) == cells
    # a 4 x 4 image pools to 2 x 2, and its words stay
    assert traces[0].lengths[0][0] == ENDS[0] + 1 + 4


@torch.no_grad()
def test_two_images_are_two_calls_of_the_tower():
    case = make("vilt two images")
    pruned = case.pruned("pumer")
    with vp.collect() as traces:
        pruned(*case.inputs)
    assert [trace.tower for trace in traces] == ["fusion", "fusion"]
    cost, each = vp.count_macs(pruned, *case.inputs), [vp.CostMeter(pruned)([trace]) for trace in traces]
    assert cost.instances == 3
    assert cost.towers["fusion"].shape == (2 + 3, 2 * 3)
    assert float(cost.towers["fusion"].sum()) == sum(float(one.towers["fusion"].sum()) for one in each)
    assert cost.total == pytest.approx(sum(one.total for one in each) - 3 * cost.head)
    found = vp.calibrate(pruned, [case.inputs], 0.3, tolerance=0.1)
    assert found.reduction == pytest.approx(0.3, abs=0.05)


ROW = (words(), MASK, None, *padded_images())


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (ROW[:3], "a text and an image: give pixel_values"),
        ((ROW[0], MASK[:, :5], *ROW[2:]), r"attention_mask must be \[3, 12\]"),
        ((ROW[0], 1 - MASK, *ROW[2:]), "hides the first token of a text"),
        ((ROW[0][:2], MASK[:2], *ROW[2:]), "2 texts and 3 images"),
        ((*ROW[:4], ROW[4][:, :8]), r"pixel_mask must be \[3, 32, 40\]"),
        ((ROW[0] + 60, *ROW[1:]), r"token ids in 0 \.\. 59"),
        ((ROW[0].repeat(1, 2), None, *ROW[2:]), "24 tokens, the tower has 20 positions"),
        ((*ROW[:3], ROW[3] / 0, ROW[4]), "NaN or infinity"),
    ],
)
def test_wrong_inputs_are_refused(inputs, says):
    with pytest.raises(ValueError, match=says):
        make("vilt: plain").pruned("random")(*inputs)


@pytest.mark.parametrize("name", ["inputs_embeds", "image_embeds"])
def test_embeddings_in_place_of_inputs_are_refused(name):
    case = vilt_case("plain")
    with pytest.raises(TypeError, match=f"does not take {name}.*Supported: input_ids"):
        case.pruned("random")(*case.inputs, **{name: torch.randn(3, 4, 32)})


@pytest.mark.parametrize("at", [{"image": None}, {"text": (0,)}])
def test_the_tower_is_one(at):
    with pytest.raises(ValueError, match=r"names the tower .*; this model has fusion"):
        make("vilt: plain").pruned("random", at=at)


def test_models_that_read_each_token_are_refused():
    with pytest.raises(TypeError, match=r"wraps one that can be pruned, a ViltModel.*model\.vilt"):
        vp.prune(hf.ViltForMaskedLM(config()), "random")
