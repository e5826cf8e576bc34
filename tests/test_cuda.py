"""The same on a GPU: what is kept, what comes out, what is learned. Needs one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_models import NAMES, small
from strategies import generator, packed
from torch.testing import assert_close

import vltprune as vp
from vltprune.core.kernels import column_stats, varlen

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


HALF = [torch.float16, torch.bfloat16]
BOTH = vp.Stat.RECEIVED | vp.Stat.COLUMN


def ragged(dtype, head_dim):
    """Tokens and qkv [total, 3, 3, head_dim] on the GPU, and the same on the CPU in single precision."""
    layout = vp.Layout((197, 1, 60, 130, 64))
    tokens = packed(layout, 2, 0.1, True, False, 1.0, generator(0))
    qkv = torch.randn(layout.total, 3, 3, head_dim, generator=generator(1)).to(dtype)
    columns = {name: getattr(tokens, name).to(DEVICE) for name in ("x", "position", "protected", "summary")}
    there = replace(tokens, layout=vp.Layout(layout.lengths, torch.device(DEVICE)), **columns)
    return there, qkv.clone().to(DEVICE).requires_grad_(), tokens, qkv.float().requires_grad_()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("dtype", HALF)
def test_ragged_attention_in_half_precision(dtype, head_dim, causal):
    there, half, here, exact = ragged(dtype, head_dim)
    outs = []
    for tokens, qkv in ((there, half), (here, exact)):
        outs.append(vp.attend(*qkv.unbind(1), tokens.layout, head_dim**-0.5, causal=causal))
        outs[-1].backward(torch.randn(outs[-1].shape, generator=generator(2)).to(outs[-1]))
    assert varlen.applies(*half.unbind(1), there.layout, there.layout, causal)
    assert_close(outs[0].float().cpu(), outs[1], rtol=0.02, atol=0.02)
    assert_close(half.grad.float().cpu(), exact.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_column_statistics(dtype, head_dim, causal):
    there, half, here, exact = ragged(dtype, head_dim)
    q, k, v = half.unbind(1)
    assert column_stats.applies(q, k, BOTH)
    out, stats = vp.attend_with_stats(q, k, v, there, head_dim**-0.5, BOTH, causal=causal)
    exact_out, exact_stats = vp.attend_with_stats(*exact.unbind(1), here, head_dim**-0.5, BOTH, causal=causal)
    assert_close(out.float().cpu(), exact_out, rtol=0.02, atol=0.02)
    for i, rows in enumerate(torch.arange(len(q)).split(here.layout.lengths)):
        alone = vp.attend_with_stats(
            q[rows], k[rows], v[rows], there.select_instances([i]), head_dim**-0.5, BOTH, causal=causal
        )[1]
        for stat in BOTH:
            assert_close(stats[stat][rows].cpu(), exact_stats[stat][rows], rtol=1e-4, atol=1e-5)
            assert_close(alone[stat], stats[stat][rows], rtol=1e-6, atol=1e-7)
