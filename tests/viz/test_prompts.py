"""Pictures of what a vision-language model read: each token's number of layers is right, and the picture shows it."""

from __future__ import annotations

import numpy as np
import pytest
import small_vlms
import torch
from PIL import Image

import vltprune as vp
from vltprune.data import SyntheticPairs
from vltprune.data.llava import statement_inputs
from vltprune.viz import draw_prompt
from vltprune.viz.prompts import layers_read, shaded

PAIR = SyntheticPairs("test", 1)[0]
BOTH = {"keep": "count(count=9)", "then": [vp.Stage("last_attention", "count(count=7)", "drop", at={"language": 2})]}


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return vp.create_model("llava_tiny")


@torch.no_grad()
def traced(dense, prompts=1, generate=False, **parts):
    pruned = vp.prune(dense, "divprune", **parts)
    inputs = statement_inputs([PAIR.images] * prompts, [PAIR.sentences[0]] * prompts)
    with vp.collect() as traces:
        if generate:
            pruned.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
        else:
            pruned(**inputs)
    return traces


def test_tokens_left_out_before_the_language_model_are_read_by_no_layer(dense):
    traces = traced(dense, keep="count(count=5)")
    reads, depth = layers_read(traces)
    assert depth == 1 and [len(read) for read in reads] == [64, 64]
    left = traces[0].output_tokens
    for image, read in enumerate(reads):
        patches = left.position[left.layout.instance == image] - 1
        assert np.flatnonzero(read).tolist() == patches[patches >= 0].tolist()
        assert read.sum() == 5


def test_tokens_that_leave_inside_it_are_read_by_the_layers_before(dense):
    reads, depth = layers_read(traced(dense, **BOTH))
    counts = np.bincount(np.concatenate(reads), minlength=depth + 1)
    assert counts.tolist() == [128 - 18, 0, 0, 11, 0, 0, 7]


@pytest.mark.parametrize("preset", ["fastv", "pyramiddrop", "vtw"])
def test_as_many_are_read_by_each_layer_as_enter_it(dense, preset):
    pruned, inputs = vp.prune(dense, preset), statement_inputs([PAIR.images], PAIR.sentences[0])
    with torch.no_grad(), vp.collect() as traces:
        pruned(**inputs)
    reads, depth = layers_read(traces)
    everything = np.concatenate(reads)
    entered = [int((everything > layer).sum()) for layer in range(depth)]
    assert entered == list(vp.visual_tokens(pruned, inputs).layers)


def test_generating_is_drawn_as_one_call(dense):
    reads, _ = layers_read(traced(dense, generate=True, **BOTH))
    np.testing.assert_array_equal(reads, layers_read(traced(dense, **BOTH))[0])


def test_joined_patches_are_one_token(dense):
    vlm = small_vlms.qwen3()
    pruned, inputs = vlm.pruned("divprune", keep="count(count=2)"), vlm.prompts((3, 1))
    with torch.no_grad(), vp.collect() as traces:
        pruned(**inputs)
    (read,), _ = layers_read(traces)
    assert len(read) == vlm.rows and read.sum() == 2


def test_several_prompts_and_none_are_refused(dense):
    with pytest.raises(ValueError, match="draw one prompt at a time"):
        layers_read(traced(dense, prompts=2, **BOTH))
    with pytest.raises(ValueError, match="no trace of an image tower"):
        layers_read([])


def test_shades_say_how_many_layers_read_a_token():
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    pixels = np.asarray(shaded(image, np.array([0, 1, 2, 4]), 4)).astype(int)
    unread, early, late, whole = pixels[5, 5], pixels[5, 30], pixels[30, 5], pixels[30, 30]
    assert whole.tolist() == [200, 100, 50] and unread.max() < 25
    assert early[2] > early[0] + 20 and (late[1:] > early[1:] + 20).all()  # teal, and lighter


def test_the_picture_has_images_prompt_answer_and_legend(dense):
    traces = traced(dense, **BOTH)
    images = [Image.new("RGB", size, "white") for size in ((32, 32), (64, 64))]
    bare = draw_prompt(images, traces, "")
    assert bare.width > 2 * 288 and bare.height > 288
    asked = draw_prompt(images, traces, "what is this? " * 30, "a very long story")
    assert asked.width == bare.width and asked.height >= bare.height + 4 * 20
    with pytest.raises(ValueError, match="1 images are given, and the traces are of 2"):
        draw_prompt(images[:1], traces, "")
    with pytest.raises(ValueError, match="do not tile"):
        draw_prompt([image.resize((100, 60)) for image in images], traces, "")
