"""Which records a step sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vltprune.training.data.sampler import StepSampler


@given(
    records=st.integers(8, 40),
    each=st.integers(1, 4),
    world=st.integers(1, 3),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_processes_share_a_step_and_an_epoch_sees_nothing_twice(records, each, world, seed, epoch):
    batch = min(each * world, records // world * world)
    ranks = [StepSampler(records, batch, seed, rank, world) for rank in range(world)]
    alone, steps = StepSampler(records, batch, seed), ranks[0].steps_per_epoch
    seen = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        together = [index for sampler in ranks for index in sampler.indices(step)]
        assert together == alone.indices(step)
        seen += together
    assert len(set(seen)) == len(seen) == steps * batch


def test_steps_of_a_seed_stay_what_they_are():
    """Numbers that were measured before hold, and earlier runs can be resumed."""
    steps = list(StepSampler(10, 4, seed=3, steps=range(1, 4)))
    assert [key for keys in steps for key in keys] == [
        *((1, 1), (1, 4), (1, 7), (1, 5)),
        *((2, 4), (2, 1), (2, 2), (2, 8)),
        *((3, 5), (3, 0), (3, 7), (3, 9)),
    ]


def test_batches_that_cannot_be_dealt():
    with pytest.raises(ValueError, match="batch_size=9 is more than the 8 records"):
        StepSampler(8, 9)
    with pytest.raises(ValueError, match="batch_size=4 does not split evenly over 3 processes"):
        StepSampler(8, 4, world=3)
