"""What holds of every host, over the models of every library."""

from __future__ import annotations

import cases_blip
import cases_open_clip
import cases_open_clip_hf
import cases_timm
import cases_transformers
import checks
import pytest
import torch

import vltprune as vp

LIBRARIES = {
    "timm": cases_timm,
    "open_clip": cases_open_clip,
    "open_clip_hf": cases_open_clip_hf,
    "transformers": cases_transformers,
    "blip": cases_blip,
}
TWO_TOWERS = ("open_clip: clip", "open_clip: custom clip", "blip: blip", "blip: nlvr")
TWO_TOWERS += ("open_clip_hf: clip", "open_clip_hf: clip, dict")
TWO_TOWERS += ("blip: vqa", "blip: retrieval")
TWO_TOWERS += ("transformers: clip", "transformers: siglip", "transformers: siglip2")
TWO_TOWERS += ("transformers: blip retrieval", "transformers: blip answers")

NAMES = [f"{library}: {name}" for library, cases in LIBRARIES.items() for name in cases.NAMES]


def make(name: str) -> checks.Case:
    """A case by its library and name, always the same one."""
    torch.manual_seed(0)
    library, _, case = name.partition(": ")
    return LIBRARIES[library].make(case)


@pytest.fixture(scope="module", params=NAMES)
def made(request) -> checks.Case:
    """Made once for all of its checks, which run one after the other."""
    return make(request.param)


@pytest.fixture
def case(made) -> checks.Case:
    """As it was made, whatever an earlier check left behind."""
    made.model.eval().zero_grad()
    return made


def test_keep_all_is_the_host(case):
    checks.keep_all_is_the_host(case)


def test_the_dense_model_stays(case):
    checks.the_dense_model_stays(case)


def test_batch_mates_do_not_matter(case):
    checks.batch_mates_do_not_matter(case, "madtp")
    checks.batch_mates_do_not_matter(case, "evit", instances=(0,))
    checks.batch_mates_do_not_matter(case, "random", instances=(2,))


def test_gradients_reach(case):
    checks.gradients_reach(case)


def test_reducing_early_changes_nothing(case):
    checks.reducing_early_changes_nothing(case)


@pytest.fixture(scope="module", params=TWO_TOWERS)
def pair(request) -> checks.Case:
    """Of two towers. No check changes its mode."""
    return make(request.param)


def test_one_guide_serves_both_towers(pair):
    pruned = pair.pruned()
    image, text = (pruned.pruning.towers[tower] for tower in ("image", "text"))
    assert image.guide is text.guide is pruned.pruning.guide
    assert {image, text} <= set(pruned.children())
    own = {id(parameter) for parameter in pruned.pruning.guide.parameters()}
    assert {id(p) for p in pruned.parameters()} == {id(p) for p in pair.model.parameters()} | own

    with vp.collect() as traces:
        pruned(*pair.inputs)
    image, text = (trace.aligned for trace in traces)
    assert image.shape[1:] == text.shape[1:] == (12, 48)  # the wider tower's width
    vp.losses.alignment(image, text, images=len(image) // len(text)).backward()
    assert pruned.pruning.guide.anchors.grad.any()


def test_towers_and_depths_that_are_not_there(pair):
    with pytest.raises(ValueError, match=r"'audio'.*image, text"):
        pair.pruned(at={"audio": None})
    with pytest.raises(ValueError, match=r"text tower has depths 0 \.\. 1"):
        pair.pruned(at={"text": (2,)})


def test_pruning_twice_is_refused(pair):
    with pytest.raises(TypeError, match="pruned already"):
        vp.prune(pair.pruned(), "random")
