"""How models are compared on synthetic pairs: whose answers, tokens, costs and seconds the numbers are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vltprune as vp
from vltprune.data import SyntheticPairs
from vltprune.demo.measure import ModelResult, evaluate_models, generate_batches, speedup, time_models


def test_pairs_are_drawn_in_order_and_each_once():
    ticks = []
    batches = generate_batches("val", 5, seed=1, batch_size=2, tick=ticks.append)
    assert [len(batch.labels) for batch in batches] == ticks == [2, 2, 1]
    pairs = [SyntheticPairs("val", 5, 1)[i] for i in range(5)]
    assert [sentence for batch in batches for sentence in batch.sentences] == [pair.sentences[0] for pair in pairs]
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), [pair.images for pair in pairs])
    assert np.concatenate([batch.labels for batch in batches]).tolist() == [int(pair.labels[0]) for pair in pairs]
    assert batches[1].select(1).sentences == batches[1].sentences[1:]


@torch.no_grad()
def test_answers_are_the_chance_of_true_and_a_dense_model_keeps_and_costs_all():
    sizes = {"vision_depth": 2, "text_depth": 1, "vision_width": 32, "text_width": 32, "merge_from": 0}
    dense = vp.create_model("blip_nlvr_tiny", **sizes)
    models, batches = (
        {"dense": dense, "pruned": vp.prune(dense, "random", at=(0,))},
        generate_batches("val", 2, batch_size=2),
    )
    found = evaluate_models(models, batches)
    for name, model in models.items():
        assert found[name].probability == pytest.approx(
            model(*batches[0].inputs_for(model)).softmax(-1)[:, 1].numpy(), abs=1e-6
        )
        assert found[name].labels.tolist() == batches[0].labels.tolist()
    pruned = found["pruned"]
    assert pruned.macs < pruned.dense_macs == found["dense"].macs
    assert found["dense"].padding == pruned.padding
    entered = {tower: sizes[0] for tower, sizes in pruned.kept.items()}
    assert all(set(found["dense"].kept[tower]) == {size} for tower, size in entered.items())
    assert min(pruned.kept["image"]) < entered["image"] == 145


def test_a_share_kept_is_of_what_entered_and_the_mean_over_blocks():
    outcome = ModelResult(
        np.array([0.9, 0.5, 0.2, 0.7]), np.array([1, 1, 0, 0]), ("count",) * 4, kept={"image": (10, 8, 4)}
    )
    assert outcome.kept_ratio == pytest.approx(0.6)
    assert outcome.correct.tolist() == [True, False, True, False]


def test_models_are_timed_in_rotation_and_the_first_round_is_discarded():
    asked = []

    class Runs(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, images, ids, mask):
            asked.append((self.name, len(images)))

    ticks, models = [], {name: Runs(name) for name in "ab"}
    seconds = time_models(models, generate_batches("val", 3, batch_size=2), ticks.append)
    assert asked == [("a", 2), ("b", 2), ("b", 2), ("a", 2), ("a", 1), ("b", 1)]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2} and ticks == [1] * 4
    assert speedup([1.0, 3.0, 4.0], [2.0, 9.0, 4.0]) == 2.0
