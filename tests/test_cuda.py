"""The same on a GPU: what is kept, what comes out, what is learned. Needs one."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import NAMES, small

import vltprune as vp

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

PARTS = [
    {},
    {"reducer": "drop"},
    {"guide": "codebook(anchors=5, attend='sparsemax')"},
    {"keep": "ratio(ratio=0.6)", "reducer": "fuse(normalize=False)"},
    {"keep": "learned(threshold=0.0)"},
    {"keep": "distortion(error=0.3)"},
]


def pruned(name, **parts):
    """The same model here and there, and inputs of both."""
    here = vp.prune(small(name).model, "madtp", **{"guide": "codebook(anchors=5)", **parts})
    inputs = small(name).draw(5)
    return [(here, inputs), (copy.deepcopy(here).to(DEVICE), tuple(one.to(DEVICE) for one in inputs))]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_counts_are_those_of_the_cpu(name, parts):
    found = []
    for model, inputs in pruned(name, **parts):
        with vp.collect() as traces:
            out = model(*inputs)
        model.zero_grad()
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        gradients = {key: p.grad.cpu() for key, p in model.named_parameters() if p.grad is not None}
        found.append((out, [trace.lengths for trace in traces], gradients))
    (ours, counts, mine), (theirs, their_counts, yours) = found
    assert counts == their_counts
    assert sum(counts[0][-1]) < sum(counts[0][0])
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4, check_device=False)
    assert mine.keys() == yours.keys()
    for key, gradient in mine.items():
        torch.testing.assert_close(yours[key], gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().amax() + 1))


@pytest.mark.parametrize("name", NAMES)
def test_calibration_is_that_of_the_cpu(name):
    found = [vp.calibrate(model, [inputs], 0.3, 0.02) for model, inputs in pruned(name, keep="ratio")]
    assert found[0] == found[1]
