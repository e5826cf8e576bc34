"""What holds of every host, over the models of every library."""

from __future__ import annotations

import cases_blip
import cases_open_clip
import cases_open_clip_hf
import cases_timm
import cases_transformers
import checks
import pytest

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

every = pytest.mark.parametrize(
    "name", [f"{library}: {name}" for library, cases in LIBRARIES.items() for name in cases.NAMES]
)
of_two_towers = pytest.mark.parametrize("name", TWO_TOWERS)


def make(name: str) -> checks.Case:
    library, _, case = name.partition(": ")
    return LIBRARIES[library].make(case)


@every
def test_keep_all_is_the_host(name):
    checks.keep_all_is_the_host(make(name))


@every
def test_the_dense_model_stays(name):
    checks.the_dense_model_stays(make(name))


@every
def test_batch_mates_do_not_matter(name):
    case = make(name)
    checks.batch_mates_do_not_matter(case, "madtp")
    checks.batch_mates_do_not_matter(case, "evit", instances=(0,))
    checks.batch_mates_do_not_matter(case, "random", instances=(2,))


@every
def test_gradients_reach(name):
    checks.gradients_reach(make(name))


@every
def test_reducing_early_changes_nothing(name):
    checks.reducing_early_changes_nothing(make(name))


@of_two_towers
def test_one_guide_serves_both_towers(name):
    case = make(name)
    pruned = case.pruned()
    image, text = (pruned.pruning.towers[tower] for tower in ("image", "text"))
    assert image.guide is text.guide is pruned.pruning.guide
    assert {image, text} <= set(pruned.children())
    own = {id(parameter) for parameter in pruned.pruning.guide.parameters()}
    assert {id(p) for p in pruned.parameters()} == {id(p) for p in case.model.parameters()} | own

    with vp.collect() as traces:
        pruned(*case.inputs)
    image, text = (trace.aligned for trace in traces)
    assert image.shape[1:] == text.shape[1:] == (12, 48)  # the wider tower's width
    vp.losses.alignment(image, text, images=len(image) // len(text)).backward()
    assert pruned.pruning.guide.anchors.grad.any()


@of_two_towers
def test_towers_and_depths_that_are_not_there(name):
    case = make(name)
    layers = 2 if name.startswith("open_clip") else 3
    with pytest.raises(ValueError, match=r"'audio'.*image, text"):
        case.pruned(at={"audio": None})
    with pytest.raises(ValueError, match=rf"text tower has depths 0 \.\. {layers - 1}"):
        case.pruned(at={"text": (layers,)})


@of_two_towers
def test_pruning_twice_is_refused(name):
    with pytest.raises(TypeError, match="pruned already"):
        vp.prune(make(name).pruned(), "random")
