"""Steering the cost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import small

import vltprune as vp
from vltprune.cost.savings import Calibration
from vltprune.training import Controller, target
from vltprune.training.loop import controller as controller_module
from vltprune.training.loop.controller import CostRotation, TowerControllers


@given(steps=st.integers(1, 1000), reduction=st.floats(0.01, 0.99), ramp=st.floats(0, 1))
def test_the_target_rises_to_the_reduction_and_stays(steps, reduction, ramp):
    path = [target(step, steps, reduction, ramp) for step in range(steps + 1)]
    assert path == sorted(path)
    assert path[-1] == pytest.approx(reduction)
    assert ramp == 0 or path[0] == 0
    assert target(math.ceil(ramp * steps), steps, reduction, ramp) == pytest.approx(reduction)


@pytest.mark.parametrize(("keep", "center"), [("threshold(temperature=1.0)", 3.0), ("ratio(ratio=0.9)", 0.3)])
def test_it_finds_a_target_and_follows_it(keep, center):
    """Against a made-up response: the share that is saved as a logistic function of the knob's place."""
    model = vp.prune(small("blip").model, "madtp", keep=keep)
    controller = Controller(model)
    knob = controller.control.knob
    sign = -1 if knob.larger_keeps_more else 1

    def saved():
        return 1 / (1 + math.exp(-sign * 12 * (knob.fraction(controller.control.value) - knob.fraction(center))))

    for wanted in (0.3, 0.8, 0.5):
        for _ in range(300):
            controller.step(saved(), wanted)
        assert saved() == pytest.approx(wanted, abs=0.01)
        assert controller.saved == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize(("keep", "sign"), [("threshold", 1), ("ratio(ratio=0.5)", -1)])
def test_one_step_moves_the_knob_by_a_tenth_of_the_error(keep, sign):
    """Of the knob's range, towards saving more where too little was saved; the mean is of what was measured."""
    controller = Controller(vp.prune(small("blip").model, "madtp", keep=keep), saved=0.6)
    knob = controller.control.knob
    before = knob.fraction(controller.value)
    for saved, wanted in ((0.2, 0.5), (0.9, 0.5)):
        mean = 0.9 * controller.saved + 0.1 * saved
        place = knob.fraction(controller.value) + sign * 0.1 * (wanted - saved)
        controller.step(saved, wanted)
        assert controller.saved == pytest.approx(mean)
        assert knob.fraction(controller.value) == pytest.approx(place)
        assert controller.control.value == controller.value
    assert knob.fraction(controller.value) == pytest.approx(before - sign * 0.01)


def test_it_begins_near_its_target_and_remembers_where_it_is():
    text = small("blip")
    model = vp.prune(text.model, "madtp", keep="ratio(ratio=1.0)")
    controller = Controller(model)
    inputs = text.draw(8)
    controller.initialize([inputs], 0.4)
    assert vp.measure(model, [inputs]).reduction == pytest.approx(controller.saved)
    assert controller.saved == pytest.approx(0.4, abs=0.1)

    state = controller.state_dict()
    controller.step(0.0, 0.9)
    assert controller.state_dict() != state
    controller.load_state_dict(state)
    assert controller.state_dict() == state


@pytest.mark.parametrize("wanted", [-0.005, 0.0, 0.13, 0.4, 0.62, 0.899])
@pytest.mark.parametrize("keep", ["ratio", "threshold(temperature=1.0)"])
def test_it_begins_at_the_nearest_of_25_values_in_few_measurements(monkeypatch, keep, wanted):
    """Against a made-up response that rises, or falls, all the way."""
    controller = Controller(vp.prune(small("blip").model, "madtp", keep=keep))
    knob = controller.control.knob
    tried = []

    def saved(place):
        return 0.9 - 0.91 * (place if knob.larger_keeps_more else 1 - place) ** 2

    def measure(model, batches, value, tower, meter):
        tried.append(value)
        return Calibration(knob.name, value, 1 - saved(knob.fraction(value)), 1.0)

    monkeypatch.setattr(controller_module, "measure", measure)
    controller.initialize([], wanted)
    nearest = min((place / 24 for place in range(25)), key=lambda place: abs(saved(place) - wanted))
    assert knob.fraction(controller.value) == pytest.approx(nearest)
    assert controller.saved == pytest.approx(saved(nearest))
    assert len(tried) == len(set(tried)) <= 7


@pytest.mark.parametrize(("wanted", "place"), [(0.0, 0.6), (0.95, 0.8)])
def test_beyond_its_reach_it_begins_where_the_knob_begins_to_matter(monkeypatch, wanted, place):
    model = vp.prune(small("blip").model, "madtp")
    controller = Controller(model)
    knob = controller.control.knob

    def measure(model, batches, value, tower, meter):
        saved = min(max(0.2 + 3.5 * (knob.fraction(value) - 0.6), 0.2), 0.9)
        return Calibration(knob.name, value, 1 - saved, 1.0)

    monkeypatch.setattr(controller_module, "measure", measure)
    controller.initialize([], wanted)
    assert knob.fraction(controller.value) == pytest.approx(place, abs=1 / 64 + 0.003)
    assert controller.control.value == controller.value


def test_each_tower_is_steered_by_its_own_saving():
    model = vp.prune(small("blip").model, "madtp", keep={"image": "ratio(ratio=0.9)", "text": "threshold"})
    rotation = CostRotation(model, ({"text": 0.3, "image": 0.5},))
    (both,) = rotation.controllers
    assert isinstance(both, TowerControllers)
    inputs = small("blip").draw(8)
    rotation.initialize([inputs], {"text": 0.2, "image": 0.4})
    cost = vp.count_macs(model, *inputs)
    assert cost.reductions["image"] == pytest.approx(both.towers["image"].saved) == pytest.approx(0.4, abs=0.1)
    assert cost.reductions["text"] == pytest.approx(both.towers["text"].saved) == pytest.approx(0.2, abs=0.1)

    state = rotation.state_dict()
    image, text = both.towers["image"], both.towers["text"]
    before = both.value
    both.step({"image": 0.4, "text": 0.0}, {"image": 0.4, "text": 0.3})
    assert (image.value, image.control.value) == (before["image"], before["image"])
    assert text.value == text.control.value != before["text"]
    assert {keeper.ratio for keeper in image.control.keepers} == {before["image"]}
    rotation.load_state_dict(state)
    assert rotation.state_dict() == state
    assert (image.control.value, text.control.value) == (before["image"], before["text"])
    image.control.set(0.123)
    rotation.apply(0)
    assert image.control.value == before["image"]


def test_a_tower_without_a_target_keeps_its_knob():
    model = vp.prune(small("blip").model, "madtp", keep="ratio(ratio=0.9)")
    rotation = CostRotation(model, ({"text": 0.5},))
    rotation.initialize([small("blip").draw(8)], {"text": 0.5})
    rotation.controllers[0].step({"text": 0.0}, {"text": 0.5})
    assert {keeper.ratio for keeper in Controller(model, tower="image").control.keepers} == {0.9}
    assert rotation.controllers[0].value["text"] < 0.9


def test_costs_rotate_and_each_is_measured_as_often():
    model = vp.prune(small("blip").model, "madtp", keep="ratio(ratio=1.0)")
    rotation = CostRotation(model, (0.8, 0.3, 0.5))
    assert [rotation.index(step) for step in range(8)] == [0, 1, 0, 2, 0, 1, 0, 2]
    steps = range(240)
    for place, many in enumerate((120, 60, 60)):
        assert sum(rotation.index(step) == place for step in steps) == many
        assert sum(rotation.is_measured(step, 5) for step in steps if rotation.index(step) == place) == many // 5

    rotation.controllers[1].step(0.0, 0.5)
    low, high = rotation.controllers[1].value, rotation.controllers[0].value
    assert low < high == 1.0
    for place, value in ((0, high), (1, low), (2, high)):
        rotation.apply(place)
        assert rotation.controllers[0].control.value == value
    state = rotation.state_dict()
    rotation.controllers[2].step(0.0, 0.5)
    rotation.load_state_dict(state)
    assert rotation.state_dict() == state
    assert rotation.controllers[0].control.value == high

    alone = CostRotation(model, (0.8,))
    assert [alone.index(step) for step in range(3)] == [0, 0, 0]
    assert [alone.is_measured(step, 2) for step in range(4)] == [True, False, True, False]
