"""Errors about budgets advise what the model's config leaves to change."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_models import small
from small_vlms import make

import vltprune as vp
from vltprune.cost.advice import budget_advice
from vltprune.cost.budget_control import BudgetControl, keepers_with_knob
from vltprune.cost.describe import percent

KEEPERS = keepers_with_knob(guided=True)
TARGETS = {"too much": (0.9, 0.1, 0.6), "too little": (0.1, 0.3, 0.8), "between counts": (0.5, 0.1, 0.9)}
SOMEWHERE = {"image": (1, 2), "text": (1, 2)}


def model_with(keep, at=None, **parts):
    return vp.prune(small("nlvr").model, "madtp", keep=keep, guide="codebook(anchors=5)", at=at, **parts)


def advice(keep, target, at=None, tower=None):
    model = model_with(keep, at)
    return budget_advice(model, BudgetControl(model, tower), *TARGETS[target])


@pytest.mark.parametrize(("keep", "target"), [*itertools.product(KEEPERS, TARGETS)])
def test_nobody_is_advised_what_the_model_has(keep, target):
    text = advice(keep, target)
    assert f"keep={keep!r}" not in text
    assert "more depths" not in text  # all are pruned
    assert text[0].isupper()
    if keep in ("ratio", "distortion") and target != "between counts":
        assert "keep=" not in text  # both go as far as a keeper can


@pytest.mark.parametrize("keep", KEEPERS)
def test_depths_are_advised_where_there_are_some(keep):
    assert "prune at more depths (at=...)" in advice(keep, "too much", at=SOMEWHERE)
    assert "prune at fewer depths (at=...)" in advice(keep, "too little", at=SOMEWHERE)
    assert "depths" not in advice(keep, "too little", at={"image": (1,), "text": (1,)})
    assert "more depths" not in advice(keep, "too much", at={"image": None, "text": (1,)}, tower="image")
    assert "more depths" in advice(keep, "too much", at={"image": None, "text": (1,)}, tower="text")


def test_what_can_be_had_is_said():
    assert advice("threshold", "too much").startswith("Ask for less than 60.0 %, ")
    assert "use keep='ratio' or use keep='distortion'" in advice("threshold", "too much")
    assert advice("ratio", "too little").startswith("Ask for more than 30.0 %")
    assert advice("ratio", "between counts") == (
        "Ask for what is nearest, pass a larger tolerance= or use keep='distortion'"
    )
    assert (
        advice("distortion", "between counts")
        == "Give more batches, ask for what is nearest or pass a larger tolerance="
    )


def test_towers_with_keepers_of_their_own_are_told_apart():
    keep = {"image": "ratio", "text": "threshold"}
    assert "keep=" not in advice(keep, "too much", tower="image")
    assert "keep='ratio'" in advice(keep, "too much", tower="text")


def test_errors_of_a_search_carry_the_advice():
    model, inputs = model_with("ratio"), small("nlvr").draw(3)
    with pytest.raises(vp.BudgetError, match=r"out of reach of keep='ratio'.*\. Ask for less than \S+ %$"):
        vp.calibrate(model, [inputs], 0.9999)
    scattered = vp.prune(small("nlvr").model, "evit", at={"image": (3,), "text": None})
    with pytest.raises(vp.BudgetError, match=r"\. Ask for less than \S+ % or prune at more depths \(at=\.\.\.\)$"):
        vp.calibrate(scattered, [inputs], 0.9)


def test_a_keeper_without_a_knob_is_told_which_have_one():
    with pytest.raises(ValueError, match=r"no knob that a budget can set: use one of .*'ratio'.*'threshold'"):
        BudgetControl(model_with("count(count=3)"))
    unguided = vp.prune(small("nlvr").model, "evit", keep="count(count=3)")
    with pytest.raises(ValueError, match=r"use one of .*'distortion'") as caught:
        BudgetControl(unguided)
    assert "'threshold'" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no block is pruned, .* \(at=\.\.\.\)"):
        BudgetControl(vp.prune(small("nlvr").model, "evit", at=()))


def test_a_temperature_that_reaches_more_is_advised_where_few_instances_prune():
    """Scores above a low threshold are all, or all but one: then nothing goes at any power."""
    data = [small("text").draw(6)]
    low, high = (f"threshold(temperature={temperature})" for temperature in (1e-3, 100.0))
    models = {}
    for keep in (low, high):
        torch.manual_seed(0)
        models[keep] = vp.prune(small("text").model, "madtp", keep=keep, guide="codebook(anchors=5)")
        vp.fit_guide(models[keep], data)
    with pytest.raises(
        vp.BudgetError, match=r"raise the temperature, keep='threshold\(temperature=100\.0\)'"
    ) as caught:
        vp.calibrate(models[low], data, 0.6)
    assert vp.measure(models[high], data, 64.0).reduction > caught.value.nearest.reduction + 0.1


def test_behind_the_last_block_a_language_model_saves_and_a_lone_tower_does_not():
    llava = make("llava")
    with pytest.raises(vp.BudgetError) as caught:
        vp.calibrate(llava.pruned(keep="ratio"), [llava.prompts((3, 4))], 0.99)
    assert str(caught.value).endswith(
        f"Ask for less than {percent(caught.value.nearest.reduction)} or prune layers of the language model too (then=...)"
    )
    alone = vp.prune(small("vit").model, "random", place="output", at=None, keep="ratio")
    with pytest.raises(vp.BudgetError, match="Nothing is saved in a tower that is pruned behind its last block"):
        vp.calibrate(alone, [small("vit").draw(2)], 0.3)
