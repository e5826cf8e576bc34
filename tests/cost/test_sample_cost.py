"""What each record cost, against the library's own count of it alone."""

from __future__ import annotations

import pytest
import torch
from small_models import small, soften

import vltprune as vp
from vltprune.cost.sample_cost import SampleCostMeter


def test_a_record_costs_what_it_costs_alone():
    model = vp.prune(small("nlvr").model, "evit")
    inputs = small("nlvr").draw(3)
    with torch.no_grad(), vp.collect() as traces:
        model(*inputs)
    spent = SampleCostMeter(model)(traces, [1, 1, 1])
    for i, one in enumerate(spent):
        alone = vp.count_macs(model, *small("nlvr").take(inputs, slice(i, i + 1)))
        assert one.macs == pytest.approx(alone.total, rel=1e-3)  # a merge is counted for all or none
        assert one.dense_macs == pytest.approx(alone.dense_total)
        pairs = [traces[0].input_tokens.layout.lengths, *traces[0].lengths]
        assert one.kept["image"] == tuple(sum(row[2 * i : 2 * i + 2]) / 2 for row in pairs)


def test_padding_is_counted_apart_from_the_cost_of_a_record():
    model, (images, ids, mask) = vp.prune(small("nlvr").model, "evit"), small("nlvr").draw(4)
    shortest = ids[:, : int(mask.sum(1).max())], mask[:, : int(mask.sum(1).max())]
    spent = []
    for texts in (shortest, (torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(mask, (0, 4)))):
        with torch.no_grad(), vp.collect() as traces:
            model(images, *texts)
        cost = vp.CostMeter(model)(traces)
        spent.append(SampleCostMeter(model)(traces, [1] * 4))
        assert sum(one.padding for one in spent[-1]) == pytest.approx(cost.padding_total)
        assert [one.tower_padding["text"] for one in spent[-1]] == pytest.approx([one.padding for one in spent[-1]])
        assert all(one.tower_padding["image"] == 0 for one in spent[-1])
    for short, long in zip(*spent, strict=True):
        assert (short.macs, short.dense_macs) == pytest.approx((long.macs, long.dense_macs))
        assert short.padding < long.padding


def test_what_a_decoder_spends_on_padding_is_shared_by_the_records():
    small_sizes = {f"{tower}_{name}": n for tower in ("vision", "text") for name, n in (("depth", 1), ("width", 32))}
    model = vp.prune(vp.create_model("blip_vqa_tiny", **small_sizes), "random")
    ids, mask = torch.randint(4, 57, (2, 9)), (torch.arange(9) < torch.tensor([3, 5])[:, None]).long()
    with torch.no_grad(), vp.collect() as traces:
        model(torch.randn(2, 3, 96, 96), ids, mask, torch.randint(4, 57, (2, 4)))
    cost = vp.CostMeter(model)(traces)
    assert cost.decoder_padding > 0
    spent = SampleCostMeter(model)(traces, [1, 1])
    assert sum(one.padding for one in spent) == pytest.approx(cost.padding_total)
    assert sum(one.macs for one in spent) == pytest.approx(cost.total)
    assert sum(one.dense_macs for one in spent) == pytest.approx(cost.dense_total)


def test_costs_of_soft_training_are_numbers_without_gradients():
    model, inputs = vp.prune(small("vit").model, "evit", keep="learned(threshold=-0.3)"), small("vit").draw(2)
    soften(model, 0.5)
    with vp.collect() as traces:
        model(*inputs)
    soften(model, 0.0)
    cost = vp.CostMeter(model)(traces)
    assert all(macs.requires_grad for macs in cost.towers.values())
    assert cost.reduction == pytest.approx(1 - cost.total / cost.dense_total)
    assert sum(cost.saving_by_tower.values()) == pytest.approx(1.0)
    assert all(0 < reduction < 1 for reduction in cost.reductions.values())
    spent = SampleCostMeter(model)(traces, [1, 1])
    assert sum(one.macs for one in spent) == pytest.approx(cost.total)
    assert not any(size.is_integer() for one in spent for size in one.kept["image"][2:])  # some tokens count in part


def test_a_records_towers_add_up_to_what_it_costs():
    model = vp.prune(small("nlvr").model, "evit")
    with torch.no_grad(), vp.collect() as traces:
        model(*small("nlvr").draw(2))
    head = vp.CostMeter(model)(traces).head
    for one in SampleCostMeter(model)(traces, [1, 1]):
        assert one.instances == {"image": 2, "text": 1}
        for place, whole in enumerate((one.macs, one.dense_macs)):
            parts = [one.instances[tower] * macs[place] for tower, macs in one.towers.items()]
            assert sum(parts) + head == pytest.approx(whole)


def test_a_dense_model_saves_nothing():
    cost_meter = SampleCostMeter(small("nlvr").model)
    with torch.no_grad(), vp.collect() as traces:
        cost_meter.model(*small("nlvr").draw(2))
    assert cost_meter.is_dense
    assert all(one.macs == one.dense_macs > 0 for one in cost_meter(traces, [1, 1]))


def test_several_texts_are_averaged():
    model = vp.prune(small("blip").model, "evit")
    (images,), (ids, mask) = small("blip").draw(2)[:1], small("text").draw(3)
    with torch.no_grad(), vp.collect() as traces:
        model.visual(images)
        model.text(ids, mask)
    first, second = SampleCostMeter(model)(traces, [1, 2])
    assert set(second.towers) == {"image", "text"}
    for number in (0, 1):  # pruned, and dense
        head = (second.macs, second.dense_macs)[number] - sum(macs[number] for macs in second.towers.values())
        assert head == pytest.approx(
            (first.macs, first.dense_macs)[number] - sum(m[number] for m in first.towers.values())
        )
    lengths = mask.sum(1).tolist()
    assert first.kept["text"][0] == lengths[0]
    assert second.kept["text"][0] == sum(lengths[1:]) / 2


def test_a_tower_called_twice_is_refused():
    model = vp.prune(small("vit").model, "evit")
    with torch.no_grad(), vp.collect() as traces:
        model(*small("vit").draw(1))
        model(*small("vit").draw(1))
    with pytest.raises(ValueError, match=r"several calls of one tower \(image, image\)"):
        SampleCostMeter(model)(traces, [1])
