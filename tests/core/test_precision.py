"""Types and devices: models in half and double, devices without double precision, default devices, scores that tie."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import assume, example, given, settings
from small_models import NAMES, SCORERS, asked, guide_for, scrambled, sentences, small, soften
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import vltprune as vp
from vltprune.core import precision
from vltprune.layers.keepers.base import keep_count
from vltprune.models.med import MedEncoder
from vltprune.pruning import losses
from vltprune.utils.modes import on_meta

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
KEEPERS = ["ratio(ratio=0.5)", "random_ratio", "threshold", "learned", "top_p(p=0.5)", "distortion", "count(count=3)"]

# each kind of tower, and each keeper at towers of both kinds, one of which looks at the other
TOWERS_AND_KEEPERS = [*((name, "threshold") for name in NAMES if name != "blip"), *(("blip", keep) for keep in KEEPERS)]

TYING = [*KEEPERS, "ratio(ratio=0.3)", "learned(threshold=0.0)", "distortion(error=0.0)", "top_p"]


def cast(inputs, dtype):
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


class _Refuses(TorchDispatchMode):
    """A device that has no float64, as Apple's MPS: whatever makes a tensor of it fails."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError("Cannot convert a tensor to float64: this device does not have it")
        return out


def parts(model):
    yield from (model.pruning.guide,) if model.pruning.guide is not None else ()
    yield from (tower.pruners for tower in model.pruning.towers.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_parts_are_born_in_the_host_s_type(name, dtype):
    dense, draw = copy.deepcopy(small(name).model).to(dtype), small(name).draw
    for keep in (keep for of, keep in TOWERS_AND_KEEPERS if of == name):
        model = vp.prune(dense, "madtp", keep=keep, guide="codebook(anchors=6)")
        tensors = [t for part in parts(model) for t in part.parameters()]
        assert {t.dtype for t in tensors} == {dtype}
        with vp.collect() as traces:
            out = model(*cast(draw(2), dtype))
        out = getattr(out, "x", out)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert all(step.scored is None for trace in traces for step in trace.layers)


# scores of which many are equal by definition: of copies, of pairs, of windows, and before any training
TIED = ("distinct", "equal", "pair_distance", "window_distance", "halting", "predictor")


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_single_whatever_the_model_is(scorer, dtype):
    """In half some hundred tokens would tie, or their sums overflow; gradients reach the weights all the same."""
    dense = scrambled(timm.create_model("test_vit")).train().to(dtype)
    model = vp.prune(dense, "madtp", scorer=scorer, keep="ratio(ratio=0.9)", guide=guide_for(scorer))
    pixels = torch.randn(2, 3, 160, 160, dtype=dtype)
    with asked(model, pixels), vp.collect() as traces:
        model(pixels).float().sum().backward()
    for step in traces[0].layers:
        tokens, scores = step.scored
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()
        for one, free in zip(
            scores.split(tokens.layout.lengths), tokens.free.split(tokens.layout.lengths), strict=True
        ):
            assert len(one[free].unique()) > 0.9 * free.sum() or scorer.startswith(TIED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@torch.no_grad()
def test_a_random_baseline_is_the_same_in_every_type(dtype):
    """And no crop: what it keeps is spread over the image."""
    dense = timm.create_model("test_vit")
    kept = []
    for model in (dense, copy.deepcopy(dense).to(dtype)):
        pruned, images = vp.prune(model, "random", keep="ratio(ratio=0.5)", at=(0,)), torch.randn(1, 3, 160, 160)
        with vp.collect() as traces:
            pruned(images.to(dtype if model is not dense else torch.float32))
        kept.append(traces[0].layers[0].position)
    assert torch.equal(*kept)
    half = len(kept[0]) // 2
    assert kept[0][-1] > 1.5 * len(kept[0])
    assert kept[0][half] > 1.5 * half


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alignment_in_half(dtype):
    """What anchors gather is of single precision, and large features do not overflow."""
    blip = small("blip")
    model = vp.prune(copy.deepcopy(blip.model).to(dtype), "madtp", guide="codebook(anchors=6)")
    with vp.collect() as traces:
        model(*cast(blip.draw(2), dtype))
    assert losses.alignment(traces[0].aligned, traces[1].aligned).isfinite()
    large = torch.full((2, 3, 600), 300.0, dtype=dtype)
    assert losses.alignment(large, large).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_does_not_reach_scores(name, dtype):
    model, inputs = vp.prune(small(name).model, "madtp", guide="codebook(anchors=6)"), small(name).draw(2)
    with torch.enable_grad(), torch.autocast("cpu", dtype), vp.collect() as traces:
        model(*inputs)
    assert {s.scored[1].dtype for trace in traces for s in trace.layers if s.scored} == {torch.float32}
    assert {s.guidance.affinity.dtype for trace in traces for s in trace.layers} == {torch.float32}


@pytest.mark.parametrize(("name", "keep"), TOWERS_AND_KEEPERS)
@torch.no_grad()
def test_a_device_without_double_precision(name, keep):
    inputs = small(name).draw(2)
    expected = vp.prune(small(name).model, "madtp", keep=keep, guide="codebook(anchors=6)").eval()
    with _Refuses():
        model = vp.prune(small(name).model, "madtp", keep=keep, guide="codebook(anchors=6)").eval()
        model.load_state_dict(expected.state_dict())
        assert model.pruning.guide.is_untrained
        with vp.collect() as traces:
            model(*inputs)
    with vp.collect() as others:
        expected(*inputs)
    assert [trace.lengths for trace in traces] == [trace.lengths for trace in others]


@pytest.mark.parametrize(("name", "keep"), TOWERS_AND_KEEPERS)
@torch.no_grad()
def test_the_default_device_is_not_asked(name, keep):
    """A part or a helper that forgot to say where would stand on the default device, here one that holds no numbers."""
    inputs = small(name).draw(2)
    with torch.device("meta"), vp.collect() as traces:
        model = vp.prune(small(name).model, "madtp", keep=keep, guide="codebook(anchors=6)")
        out = model(*inputs)
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    with vp.collect() as others:
        expected = model(*inputs)
    assert [trace.lengths for trace in traces] == [trace.lengths for trace in others]
    out, expected = (getattr(one, "x", one) for one in (out, expected))
    assert out.device.type == "cpu"
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", NAMES)
def test_costs_and_budgets_ask_for_no_more(name):
    """For no default device, and no float64: counting, fitting, calibrating, and a step of soft training with its cost."""
    inputs = small(name).draw(3)
    model = vp.prune(copy.deepcopy(small(name).model), "madtp", guide="codebook(anchors=6)")
    with torch.device("meta"), _Refuses():
        vp.fit_guide(model, [inputs])
        found = vp.calibrate(model, [inputs], 0.3, tolerance=0.2)
        assert found.reduction == pytest.approx(vp.count_macs(model, *inputs).reduction, rel=1e-4)
        soften(model, 0.5)
        with vp.collect() as traces:
            out = model(*inputs)
        cost = vp.CostMeter(model)(traces)
        (getattr(out, "x", out).square().sum() + sum(macs.sum() for macs in cost.towers.values()) / 1e9).backward()
    soften(model, 0.0)


@pytest.mark.parametrize("keep", KEEPERS)
@pytest.mark.parametrize("name", ["test_vit", "blip_nlvr_tiny"])
def test_a_model_without_numbers_yet(name, keep):
    """Built on the meta device, then filled from a state dict: nothing else holds numbers that would be lost."""
    real = vp.create_model(name, preset="madtp", keep=keep)
    with on_meta():
        model = vp.create_model(name, preset="madtp", keep=keep)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert [*model.state_dict()] == [*real.state_dict()]
    persistent = set(model.pruning.guide.state_dict())
    assert {name for name, _ in model.pruning.guide.named_buffers()} <= persistent
    for tower in model.pruning.towers.values():
        assert {name for name, _ in tower.pruners.named_buffers()} <= set(tower.pruners.state_dict())


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 2**32 - 1))
@example(values=[1.0], copies=3, seed=0)  # all of them
def test_scores_that_differ_by_rounding_are_settled(values, copies, seed):
    """Copies of a few scores, each moved by up to 5e-6 of itself: afterwards copies are equal, and others as they were."""
    g = torch.Generator().manual_seed(seed)
    exact = torch.tensor(values, dtype=torch.float64).repeat(copies)[None]
    near = (exact * (1 + 5e-6 * (2 * torch.rand(exact.shape, generator=g, dtype=torch.float64) - 1))).float()
    settled = precision.equalize(near)
    assert_close(settled, near, rtol=3e-5 * len(values), atol=0)
    for value in values:
        assert len(settled[exact == value].unique()) == 1
    assert torch.equal(precision.equalize(settled), settled)
    padded = torch.cat([near, near.new_full((1, 3), float("-inf"))], 1)
    assert torch.equal(precision.equalize(padded), torch.cat([settled, padded[:, -3:]], 1))


@pytest.mark.parametrize("mode", [torch.device("cpu"), _Refuses()], ids=["double", "no float64"])
def test_shares_of_tokens_are_rounded_up_from_what_they_are(mode):
    """As fractions are: 0.7 of 10 is 7, though neither type holds 0.7."""
    there = torch.arange(1, 400)
    with mode:
        for tenths in range(11):
            assert keep_count(there, tenths / 10).tolist() == [-(-n * tenths // 10) for n in range(1, 400)]


def test_settled_scores_have_their_gradients():
    scores = torch.tensor([[1.0, 1.0000005, 2.0, float("-inf")]], requires_grad=True)
    settled = precision.equalize(scores)
    assert settled[0, 0] == settled[0, 1]
    settled[:, :3].sum().backward()
    assert torch.equal(scores.grad, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))


@st.composite
def plain_batches(draw):
    """A tower without positions, and inputs of which most tokens are copies of a few: images, or sentences of any length."""
    name, seed, large = draw(st.sampled_from(["vit", "text"])), draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "vit":
            patch = 8 if large else 16  # 145 tokens, attended to by rows, or 37, all instances at once
            sizes = {"img_size": 96, "patch_size": patch, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
            model = scrambled(VisionTransformer(**sizes))
            model.pos_embed.data.zero_()
            kinds = torch.randn(4, 3, patch, patch)
            which = torch.randint(0, draw(st.integers(1, 4)), (3, 96 // patch, 96 // patch))
            return model, (kinds[which].permute(0, 3, 1, 4, 2, 5).reshape(3, 3, 96, 96),)
        sizes = {"vocab_size": 40, "max_positions": 16, "width": 32, "depth": 2, "heads": 2}
        model = scrambled(MedEncoder(**sizes))
        model.position.weight.data.zero_()
        ids, mask = sentences(3)
        return model, (ids % draw(st.integers(1, 4)) + 1, mask)


@pytest.mark.parametrize("scorer", SCORERS)
@given(batch=plain_batches(), keep=st.sampled_from(TYING), reducer=st.sampled_from(["fuse", "drop"]))
@settings(max_examples=settings.default.max_examples // 2)
@torch.no_grad()
def test_copies_of_a_token_tie_whoever_shares_the_batch(scorer, batch, keep, reducer):
    """Where nearly all tokens tie, an instance keeps the same of them by itself, in a batch, and in another order."""
    dense, inputs = batch
    guide = guide_for(scorer, "codebook(anchors=6)")
    assume(guide != "text_query" or inputs[0].dim() == 4)
    model = vp.prune(dense, "madtp", scorer=scorer, keep=keep, reducer=reducer, guide=guide).eval()

    def kept(*rows):
        chosen = [x[list(rows)] for x in inputs]
        with asked(model, chosen[0]), vp.collect() as traces:
            model(*chosen)
        steps = traces[0].layers
        return [[part.tolist() for part in step.position.split(step.lengths)] for step in steps]

    together = kept(0, 1, 2)
    for rows in ((0,), (1,), (2,), (1, 1, 0, 2)):
        assert kept(*rows) == [[depth[i] for i in rows] for depth in together]
