"""Visualization of kept tokens: the state of every token is right, and the images show it."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vltprune as vp
from vltprune.viz.kept_tokens import TokenState, grid, instance_states, layer_strip, overlay, stack_strips, token_states


def traced(reducer: str, keep: str = "ratio(ratio=0.6)", batch: int = 3):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=0).eval()
    pruned = vp.prune(model, "evit", reducer=reducer, keep=keep, at=None)
    with torch.no_grad(), vp.collect() as traces:
        pruned(torch.randn(batch, 3, 64, 64))
    return traces[0]


@pytest.mark.parametrize("reducer", ["drop", "fuse"])
def test_kept_tokens_are_those_that_are_left(reducer):
    trace = traced(reducer)
    everything = token_states(trace)
    assert everything.shape == (3, 3 * 17)
    for depth, step in enumerate(trace.layers):
        kept = everything[depth] == TokenState.KEPT
        left = set(zip(np.repeat(range(3), step.lengths).tolist(), step.position.tolist(), strict=True))
        layout = trace.input_tokens.layout
        here = {(i, s) for i, s in zip(layout.instance[kept].tolist(), layout.slot[kept].tolist(), strict=True)}
        assert here <= left
        merged = len(left - here)  # one an instance at each depth, as long as it is not merged or dropped again
        assert merged == 0 if reducer == "drop" else 3 <= merged <= 3 * (depth + 1)


def test_dropped_is_not_merged():
    assert set(token_states(traced("drop")).unique().tolist()) == {TokenState.DROPPED, TokenState.KEPT}
    assert set(token_states(traced("fuse")).unique().tolist()) == {TokenState.MERGED, TokenState.KEPT}


def test_states_only_get_worse():
    everything = token_states(traced("fuse")).int()
    assert (everything.diff(dim=0) <= 0).all()


def test_states_of_one_instance_are_its_patches():
    trace = traced("drop", "ratio(ratio=0.5)")
    for instance in range(3):
        own = instance_states(trace, instance)
        assert own.shape == (3, 16)
        assert [(row == TokenState.KEPT).sum() for row in own] == [8, 4, 2]


@pytest.mark.parametrize(
    ("patches", "width", "height", "wanted"),
    [(196, 224, 224, (14, 14)), (1, 16, 16, (1, 1)), (32, 128, 64, (4, 8)), (32, 64, 128, (8, 4)), (6, 96, 64, (2, 3))],
)
def test_grid(patches, width, height, wanted):
    assert grid(patches, width, height) == wanted


def test_grid_refuses_what_does_not_tile():
    with pytest.raises(ValueError, match="7 patches do not tile an image of 64 x 64"):
        grid(7, 64, 64)


def test_overlay_shows_each_state():
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    pixels = np.asarray(
        overlay(image, np.array([TokenState.KEPT, TokenState.MERGED, TokenState.DROPPED, TokenState.KEPT]))
    )
    kept, merged, dropped = pixels[5, 5].astype(int), pixels[5, 25].astype(int), pixels[25, 5].astype(int)
    assert kept.tolist() == pixels[30, 30].tolist() == [200, 100, 50]
    assert merged[2] > merged[0] + 20  # teal
    assert dropped.max() < 25


def test_strip_has_an_image_a_block_and_keeps_proportions():
    trace = traced("drop")
    strip = layer_strip(Image.new("L", (300, 300)), trace, 0, side=50)
    assert strip.width == 4 * (50 + 6) + 6
    wrapped = layer_strip(Image.new("RGB", (64, 64)), trace, 0, side=50, across=2)
    assert wrapped.width < strip.width
    assert wrapped.height == 2 * strip.height


def test_stacked_strips_have_space_for_titles_and_legend():
    strip = Image.new("RGB", (900, 30))
    assert stack_strips([strip, strip], legend=False).size == (900, 60)
    assert stack_strips([strip, strip], ["a title"]).height > 90
    assert stack_strips([Image.new("RGB", (9, 9))], ["a title much wider than the image"]).width > 100
