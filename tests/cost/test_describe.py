"""Costs in print: tables, lines and percentages."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from small_models import small

import vltprune as vp
from vltprune.cost.describe import format_change, format_tower_saving, note_on_towers, percent
from vltprune.cost.savings import Calibration, Cost, TowerCalibration

tiny = st.sampled_from([0.0, 1e-9, -1e-9, 4e-4, -4e-4, 4.9e-4, -4.9e-4, 5e-4, -5e-4])
fractions = st.one_of(tiny, st.floats(-3, 1))


@given(fractions, st.integers(0, 3))
def test_percentages_of_zero_have_no_sign(fraction, digits):
    text = percent(fraction, digits)
    assert text.endswith(" %") and not re.match(r"-0\.?0* ", text)
    assert float(text[:-2]) == pytest.approx(100 * fraction, abs=0.51 * 10**-digits)


@given(fractions, fractions)
def test_nothing_that_is_printed_has_a_negative_zero(one, other):
    towers = {
        "image": TowerCalibration(1 - one, 1.0, knob="ratio", value=0.5),
        "text": TowerCalibration(1 - other, 1.0),
    }
    macs = {tower: torch.tensor([[one.macs]], dtype=torch.float64) for tower, one in towers.items()}
    dense = {tower: torch.ones(1, 1, dtype=torch.float64) for tower in towers}
    costs = [
        Calibration("ratio", 0.5, 2 - one - other, 2.0, towers=towers),
        Calibration(None, None, 2 - one - other, 2.0, towers=towers),
        Cost(macs, dense, 0.0, 1),
    ]
    texts = [*map(str, costs), *(cost.note for cost in costs[:2]), format_change(1 - one, 1.0)]
    texts.append(format_tower_saving("image", {"image": one, "text": other}))
    texts.append(note_on_towers({"image": 1 - one, "text": one}, {"image": 1 - other, "text": other}, 0.5))
    for text in texts:
        assert not re.search(r"-0(\.0*)?(?![\d.])", text), text


def test_a_cost_is_a_table():
    model, inputs = vp.prune(small("nlvr").model, "evit"), small("nlvr").draw(3)
    cost = vp.count_macs(model, *inputs)
    lines = str(cost).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert lines[0].split("  ")[0] == "MMACs, 3 instances" and lines[0].split()[3:] == [
        "dense",
        "pruned",
        "saved",
        "padding",
    ]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert list(rows) == ["image", "text", "head", "total"]
    for tower, reduction in cost.reductions.items():
        assert " ".join(rows[tower][2:4]) == percent(reduction)
    dense, pruned, saved, _, padding = rows["total"]
    assert float(dense) == pytest.approx(cost.dense_total / 1e6, abs=1e-3)
    assert float(pruned) == pytest.approx(cost.total / 1e6, abs=1e-3)
    assert float(saved) == pytest.approx(100 * cost.reduction, abs=0.05)
    assert float(padding) == pytest.approx(cost.padding_total / 1e6, abs=1e-3) and float(padding) > 0


def test_a_lone_tower_needs_no_total():
    cost = vp.count_macs(vp.prune(small("vit").model, "evit"), *small("vit").draw(1))
    assert [line.split()[0] for line in str(cost).splitlines()[2:]] == ["image"]
    assert str(cost).startswith("MMACs, 1 instance ")


def test_a_decoder_has_a_row():
    cost = Cost({"image": torch.tensor([[5e8]])}, {"image": torch.tensor([[1e9]])}, 0.0, 1, 1e8, 2e8)
    assert [line.split() for line in str(cost).splitlines()[3:]] == [
        ["decoder", "0.200", "0.100", "50.0", "%", "0.000"],
        ["total", "1.200", "0.600", "50.0", "%", "0.000"],
    ]


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (
            Calibration("ratio", 0.61234567, 5e8, 1e9),
            "50.0 % fewer MACs at ratio=0.6123 (0.500 of 1.000 GMACs per instance)",
        ),
        (Calibration("ratio", 0.5, 1.1e6, 1e6), "10.0 % MORE MACs at ratio=0.5 (1.100 of 1.000 MMACs per instance)"),
        (
            Calibration(
                None,
                None,
                5e8,
                1e9,
                towers={
                    "image": TowerCalibration(3e8, 6e8, knob="ratio", value=0.4),
                    "text": TowerCalibration(2e8, 4e8, knob="error", value=0.1),
                },
            ),
            "50.0 % fewer MACs (0.500 of 1.000 GMACs per instance): image 50.0 % fewer at ratio=0.4, "
            "text 50.0 % fewer at error=0.1",
        ),
    ],
)
def test_a_calibration_is_one_line(calibration, says):
    assert str(calibration) == says
