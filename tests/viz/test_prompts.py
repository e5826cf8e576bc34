"""Pictures of what a vision-language model read: each token's number of layers is right, and the picture shows it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import small_vlms
import torch
from PIL import Image

import vltprune as vp
from vltprune.data import SyntheticPairs
from vltprune.data.llava import statement_inputs
from vltprune.viz import draw_prompt, seen_images
from vltprune.viz.prompts import shaded
from vltprune.viz.visual_reads import layers_read

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


def reads_of(traces):
    """How many layers read each token of each image that is drawn once, and how many there are."""
    views, depth = layers_read(traces)
    return [view.read for (view,) in views], depth


def test_tokens_left_out_before_the_language_model_are_read_by_no_layer(dense):
    traces = traced(dense, keep="count(count=5)")
    reads, depth = reads_of(traces)
    assert depth == 1 and [len(read) for read in reads] == [64, 64]
    left = traces[0].output_tokens
    for image, read in enumerate(reads):
        patches = left.position[left.layout.instance == image] - 1
        assert np.flatnonzero(read).tolist() == patches[patches >= 0].tolist()
        assert read.sum() == 5


def test_tokens_that_leave_inside_it_are_read_by_the_layers_before(dense):
    reads, depth = reads_of(traced(dense, **BOTH))
    counts = np.bincount(np.concatenate(reads), minlength=depth + 1)
    assert counts.tolist() == [128 - 18, 0, 0, 11, 0, 0, 7]


@pytest.mark.parametrize("preset", ["fastv", "pyramiddrop", "vtw"])
def test_as_many_are_read_by_each_layer_as_enter_it(dense, preset):
    pruned, inputs = vp.prune(dense, preset), statement_inputs([PAIR.images], PAIR.sentences[0])
    with torch.no_grad(), vp.collect() as traces:
        pruned(**inputs)
    reads, depth = reads_of(traces)
    everything = np.concatenate(reads)
    entered = [int((everything > layer).sum()) for layer in range(depth)]
    assert entered == list(vp.visual_tokens(pruned, inputs).layers)


def test_generating_is_drawn_as_one_call(dense):
    reads, _ = reads_of(traced(dense, generate=True, **BOTH))
    np.testing.assert_array_equal(reads, reads_of(traced(dense, **BOTH))[0])


def test_joined_patches_are_one_token(dense):
    vlm = small_vlms.qwen3()
    pruned, inputs = vlm.pruned("divprune", keep="count(count=2)"), vlm.prompts((3, 1))
    with torch.no_grad(), vp.collect() as traces:
        pruned(**inputs)
    (read,), _ = reads_of(traces)
    assert read.shape == (2, 3) and read.sum() == 2


def test_several_calls_and_none_are_refused(dense):
    with pytest.raises(ValueError, match="collect the traces of one call"):
        layers_read(traced(dense, keep="count(count=5)") + traced(dense, **BOTH)[1:])
    with pytest.raises(ValueError, match="no trace of an image tower"):
        layers_read([])


INSIDE = [vp.Stage("random", "ratio(ratio=0.5)", "drop", at={"language": 1}, place="before")]
TOLD = {"keep": "random_ratio(mean=0.5, half_width=0.3)", "then": INSIDE}


@torch.no_grad()
def prompts_traced(name, beams=1, **parts):
    """Traces of a call on two prompts, of one image and of two, and what its inputs were."""
    torch.manual_seed(0)
    case = small_vlms.make(name)
    inputs = case.prompts((3, 4), (2, 3, 5))
    with vp.collect() as traces:
        case.pruned("random", **parts).generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=beams)
    return traces, inputs


@pytest.mark.parametrize("place", ["output", "block"])
@pytest.mark.parametrize("name", ["qwen2.5", "smolvlm", "gemma3", "internvl", "llava-next", "llava-onevision"])
def test_several_prompts_and_images_are_told_apart(name, place):
    at = None if place == "output" else (0,)
    traces, _ = prompts_traced(name, place=place, at=at, **TOLD)
    left = traces[0].output_tokens
    views, depth = layers_read(traces)
    assert depth == 2 and len(views) == (9 if (name[:6], place) == ("llava-", "block") else 3)
    # as many tokens as entered, each read as often
    everything = np.concatenate([view.read.ravel() for image in views for view in image])
    assert (everything > 0).sum() == int(left.free.sum())
    # the first prompt has a third of the images
    first = [view.read for image in views[: len(views) // 3] for view in image]
    for instance, reads in ((0, first), (slice(None), [everything])):
        stays = traces[-1].layers[-1]
        of_prompts = torch.arange(2)[instance]
        visual = (stays.modality == 1) & torch.isin(stays.layout.instance, of_prompts)
        assert sum(int((one == 2).sum()) for one in reads) == int(visual.sum()) > 0


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_tiles_of_one_image_are_put_together(name):
    traces, _ = prompts_traced(name, place="output", at=None, keep="count(count=20)")
    views, _ = layers_read(traces)
    assert [[(view.title, view.read.shape) for view in image] for image in views] == [
        [("tiles", (4, 8)), ("overview", (4, 4))]
    ] * 3
    left = traces[0].output_tokens
    for index, (tiles, overview) in enumerate(views):
        position = left.position[(left.layout.instance == index) & left.free]
        place = (position[position >= 16] - 16).tolist()
        # a line has eight tokens, and a newline that is not drawn
        assert np.argwhere(tiles.read).tolist() == [list(divmod(one, 9)) for one in place]
        assert np.flatnonzero(overview.read).tolist() == position[position < 16].tolist()


def test_tokens_of_tiles_are_read_in_the_order_of_lines():
    """An image of 16 x 64 has two lines of patches in the middle of its tiles, which stand line by line in the prompt."""
    case = small_vlms.make("llava-next")
    torch.manual_seed(1)
    sizes = {"image_sizes": torch.tensor([[16, 64]])}
    low = dataclasses.replace(case, rows=16 + 2 * 9, draw=lambda numbers: case.draw(numbers) | sizes)
    pruned = low.pruned("random", place="block", at=(0,), keep="count(count=9)", then=INSIDE)
    with vp.collect() as traces, torch.no_grad():
        pruned(**low.prompts((3, 4)))
    image, language = traces
    reads, _ = reads_of(traces)
    kept = np.zeros((3, 4, 4), bool)
    left = image.output_tokens
    kept[left.layout.instance[left.free], (left.position[left.free] - 1) // 4, (left.position[left.free] - 1) % 4] = (
        True
    )
    lines = np.concatenate([kept[1], kept[2]], 1)[1:3]
    order = [(0, *place) for place in np.argwhere(kept[0])]
    order += [(1 + column // 4, row + 1, column % 4) for row, column in np.argwhere(lines)]
    wanted = np.zeros((3, 4, 4), int)
    visual = language.input_tokens.identity[language.input_tokens.columns["modality"] == 1]
    for place, stays in zip(order, torch.isin(visual, language.layers[1].identity).tolist(), strict=True):
        wanted[tuple(place)] = 1 + stays
    np.testing.assert_array_equal([read.reshape(4, 4) for read in reads], wanted)


def test_beams_do_not_change_what_is_drawn():
    for name, place, at in (("smolvlm", "output", None), ("llava-next", "block", (0,))):
        once, twice = (layers_read(prompts_traced(name, beams, place=place, at=at, **TOLD)[0])[0] for beams in (1, 2))
        for one, other in zip(once, twice, strict=True):
            np.testing.assert_array_equal(one[0].read, other[0].read)


class Processor:
    """What is read of a processor."""

    class image_processor:
        image_mean, image_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def test_what_the_model_saw_is_drawn_of_each_prompt():
    traces, inputs = prompts_traced("smolvlm", place="output", at=None, keep="count(count=2)")
    tiles = seen_images(inputs, Processor())
    assert [tile.size for tile in tiles] == [(32, 32)] * 3  # and none of padding
    shown = np.asarray(tiles[0], float)[3, 5] / 255
    wanted = inputs["pixel_values"][0, 0, :, 3, 5] * torch.tensor([0.2, 0.3, 0.4]) + torch.tensor([0.5, 0.4, 0.3])
    np.testing.assert_allclose(shown, wanted.clamp(0, 1), atol=0.002)
    picture = draw_prompt([tiles[:1], tiles[1:]], traces, ["one", "two"], ["yes", "no"])
    assert picture.width > 2 * 288 and picture.height > 2 * 288
    with pytest.raises(ValueError, match=r"2 images are given, and the model saw 3: .*seen_images"):
        draw_prompt([tiles[:1], tiles[1:2]], traces, ["one", "two"])
    with pytest.raises(ValueError, match="2 prompts with 1 lists of images"):
        draw_prompt([tiles], traces, ["one", "two"])


@pytest.mark.parametrize("inputs", [{}, {"pixel_values": torch.zeros(24, 96)}])
def test_inputs_without_images(inputs):
    with pytest.raises(ValueError, match="draw over the images that you gave the processor"):
        seen_images(inputs, Processor())


def test_videos_are_refused():
    visual = small_vlms.make("qwen2").model.model.visual
    with vp.collect() as traces, torch.no_grad():
        vp.prune(visual, "random")(torch.randn(48, 96), torch.tensor([[3, 4, 4]]))
    with pytest.raises(ValueError, match="videos are not drawn"):
        layers_read([dataclasses.replace(traces[0], tower="image")])


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
    with pytest.raises(ValueError, match="1 images are given, and the model saw 2"):
        draw_prompt(images[:1], traces, "")
    with pytest.raises(ValueError, match="do not tile"):
        draw_prompt([image.resize((100, 60)) for image in images], traces, "")
