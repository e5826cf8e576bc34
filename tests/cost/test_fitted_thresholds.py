"""Thresholds that calibration fits to data: by loops over batches, block by block, and the costs that they reach."""

from __future__ import annotations

import pytest
import torch
from small_models import small
from torch.testing import assert_close

import vltprune as vp
from vltprune.cost.budget_control import BudgetControl
from vltprune.cost.calibration import fit_keepers
from vltprune.layers import BlockSpec

SPEC = BlockSpec("image", 0, 4, 8, 2, has_summary=True)


def threshold_of(scores: list[float], ratio: float) -> float:
    """Halfway between the first score that stays, where a ratio of all does, and the highest one below."""
    ranked = sorted(scores)
    goes = len(ranked) - -int(-(ratio * len(ranked) - 1e-9) // 1)
    first = ranked[min(goes, len(ranked) - 1)]
    below = [score for score in ranked if score < first]
    return (first + below[-1]) / 2 if below else first


def packed(lengths, seed):
    """Tokens of ragged instances, each with a protected first one, and scores with ties."""
    g, layout = torch.Generator().manual_seed(seed), vp.Layout(tuple(lengths))
    first = layout.slot == 0
    scores = torch.randint(9, (layout.total,), generator=g) / 8
    return vp.PackedTokens(torch.zeros(layout.total, 8), layout, layout.slot, first, first), scores


@pytest.mark.parametrize("lengths", [(6,), (4, 9, 2), (3,) * 8, (1, 5)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_threshold_is_a_quantile_of_the_batch_and_its_running_mean_serves_evaluation(lengths, ratio):
    keeper = vp.keepers["fitted_threshold"](SPEC, threshold=0.4, ratio=ratio).train()
    tokens, scores = packed(lengths, 3)
    assert torch.equal(keeper(scores, tokens, None), keeper.eval()(scores, tokens, None))
    assert_close(float(keeper.threshold), 0.4)
    keeper.train().batch_weight = 0.1
    running = 0.4
    for seed in (1, 2):
        tokens, scores = packed(lengths, seed)
        free = scores[tokens.free].tolist()
        wanted = threshold_of(free, ratio)
        counts = keeper(scores, tokens, None)
        if ratio == 1:
            assert counts.tolist() == [n - 1 for n in lengths]
            continue
        running += 0.1 * (wanted - running)
        each = scores.split(lengths)
        assert counts.tolist() == [sum(float(s) > wanted + 1e-6 for s in one[1:]) for one in each]
        assert_close(float(keeper.threshold), running, rtol=1e-5, atol=1e-6)
    counts = keeper.eval()(scores, tokens, None).tolist()
    assert ratio == 1 or counts == [sum(float(s) > running for s in one[1:]) for one in scores.split(lengths)]


@torch.no_grad()
@pytest.mark.parametrize("preset", ["dymu", "algm"])
def test_calibration_fits_each_block_to_the_mean_of_batches(preset):
    """Block by block: what entered, at thresholds of the batch's own; evaluation takes their mean over batches."""
    batches = [small("vit").draw(4), small("vit").draw(3)]
    model = vp.prune(small("vit").model, preset)
    control, seen = BudgetControl(model), {}
    control.set(0.7)
    for keeper in control.keepers:
        keeper.register_forward_pre_hook(lambda part, given: seen.setdefault(part, []).append(given[:2]))
    fit_keepers(model, control, batches)
    assert len(seen) == len(control.keepers) > 1
    for keeper, calls in seen.items():
        wanted = [threshold_of(scores[tokens.free].tolist(), 0.7) for scores, tokens in calls]
        assert len(wanted) == 2 and wanted[0] != wanted[1]
        assert_close(float(keeper.threshold), sum(wanted) / 2, rtol=1e-5, atol=1e-6)
        assert not keeper.training and keeper.batch_weight == 0
    assert len({round(float(keeper.threshold), 6) for keeper in control.keepers}) == len(control.keepers)


@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.55])
@pytest.mark.parametrize("preset", ["dymu", "algm"])
def test_costs_from_little_to_much_are_reached(preset, reduction):
    batches = [small("vit").draw(8), small("vit").draw(8)]
    model = vp.prune(small("vit").model, preset, reduction=reduction, data=batches, tolerance=0.05)
    found = vp.measure(model, batches)
    assert found.reduction == pytest.approx(reduction, abs=0.05)
    if preset == "algm" and reduction >= 0.3:  # both of its stages prune
        with vp.collect() as traces, torch.no_grad():
            model(*batches[0])
        lengths = [sum(lengths) for lengths in traces[0].lengths]
        assert 8 * 17 > lengths[0] > lengths[-1]
    again = vp.prune(small("vit").model, model.pruning.config)
    again.load_state_dict(model.state_dict())
    assert vp.measure(again, batches).macs == found.macs


def test_thresholds_are_as_they_were_where_a_cost_is_out_of_reach():
    batches = [small("vit").draw(4)]
    model = vp.prune(small("vit").model, "algm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(vp.BudgetError, match="out of reach"):
        vp.calibrate(model, batches, 0.99)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
