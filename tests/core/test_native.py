"""The compiled kernels against plain torch: each function, and every preset with them and without."""

from __future__ import annotations

import shutil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_models import PRESETS, asked, small
from strategies import cases, generator, lengths, packed, seeds, shares
from torch.testing import assert_close

import vltprune as vp
from vltprune import Layout, Stat, attend, attend_with_stats
from vltprune.core import precision
from vltprune.core.kernels import native
from vltprune.layers.reducers.base import Fuse
from vltprune.layers.scorers.base import normalize

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
HEADS, HEAD_DIM = 3, 8
IMAGES = ("text", "trips")  # which prunes image towers
OF_MAP = Stat.RECEIVED | Stat.COLUMN | Stat.DIAGONAL | Stat.SUMMARY

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("ninja")), reason="kernels are compiled by a C++ compiler and ninja"
)


@pytest.fixture(scope="module", autouse=True)
def built():
    """The kernels, for the tests of this module: others run without them."""
    before = native._built
    vp.build_kernels()
    yield
    native._built = before


def both(compute):
    """What a function returns without the kernels and with them, without gradients."""
    with torch.inference_mode():
        with native.paused():
            plain = compute()
        return plain, compute()


@given(
    lengths | st.sampled_from([(1,), (70,), (129, 3, 64), (64, 65)]),
    seeds,
    shares,
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, None, 2.0]),
)
def test_attention_and_its_statistics(sizes, seed, protect, causal, is_biased, softcap):
    layout, g = Layout(sizes), generator(seed)
    q, k, v = torch.randn(layout.total, 3, HEADS, HEAD_DIM, generator=g).unbind(
        1
    )  # not contiguous, as of one projection
    bias = torch.rand(layout.total, generator=g).log() if is_biased else None
    tokens = packed(layout, HEADS * HEAD_DIM, protect, True, causal, 1.0, g)
    options = {"causal": causal, "key_bias": bias, "softcap": softcap}

    def run():
        out, stats = attend_with_stats(4 * q, k, v, tokens, 0.3, OF_MAP, **options)
        return attend(4 * q, k, v, layout, 0.3, **options), out, *(stats[stat] for stat in OF_MAP)

    for plain, compiled in zip(*both(run), strict=True):
        assert_close(compiled, plain, **CLOSE)


@given(st.integers(1, 4), st.integers(1, 60), seeds, st.sampled_from([0.0, 1e-6, 1e-5, 1.0]))
def test_ranks(batch, n, seed, spread):
    g = generator(seed)
    rows = torch.randint(-3, 4, (batch, n), generator=g) * (1 + spread * torch.rand(batch, n, generator=g))
    rows = rows.masked_fill(torch.rand(batch, n, generator=g) < 0.2, float("-inf"))
    plain, compiled = both(lambda: precision.rank(rows))
    assert torch.equal(plain[0], compiled[0])
    assert torch.equal(plain[1], compiled[1])


def test_ranks_put_what_is_not_a_number_first():
    rows = torch.tensor([[0.5, float("nan"), 2.0, float("-inf"), float("nan"), 2.0]])
    plain, compiled = both(lambda: precision.rank(rows)[1])
    assert plain.tolist() == compiled.tolist() == [[1, 4, 2, 5, 0, 3]]


@given(cases(), seeds, st.sampled_from([-1.0, 0.0, 1.0]), st.booleans())
def test_normalized_scores_and_fusion(case, seed, middle, is_normalized):
    tokens, g = case.tokens, generator(seed)
    scores = torch.randn(tokens.layout.total, generator=g) + middle
    keep = tokens.protected | (torch.rand(tokens.layout.total, generator=g) < 0.6)
    fuse = Fuse(case.spec, normalize=is_normalized)
    values = torch.randn(tokens.layout.total, 2, 5, generator=g)

    def run():
        plan = fuse(tokens, scores, vp.Selection(keep), case.stats)
        found = [normalize(scores, tokens), normalize(scores.abs(), tokens, are_shares=True)]
        if plan is None:
            return found
        reduced = plan.tokens(tokens)
        return [
            *found, plan.values(values), reduced.x, reduced.size, reduced.position, plan.index, plan.provenance(), plan.merged
        ]  # fmt: skip

    plain, compiled = both(run)
    assert len(plain) == len(compiled)
    for one, other in zip(plain, compiled, strict=True):
        assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", ["threshold", "threshold(power=3.0)", "threshold(temperature=0.1)", "random_ratio"])
@given(seed=seeds)
@settings(max_examples=5)
def test_counts_of_instances(keep, seed):
    model = vp.prune(small("vit").model, "madtp", keep=keep, guide="codebook(anchors=6)")
    images = torch.randn(3, 3, 32, 32, generator=generator(seed))

    def run():
        with vp.collect() as traces:
            model(images)
        return [layer.layout.lengths for layer in traces[0].layers]

    plain, compiled = both(run)
    assert plain == compiled


@pytest.mark.parametrize(
    ("name", "preset"),
    [(name, preset) for name in ("vit", "nlvr", "text") for preset in PRESETS if (name, preset) != IMAGES],
)
def test_every_preset_is_equal_with_the_kernels(name, preset):
    model, inputs = vp.prune(small(name).model, preset), small(name).draw(3)

    def run():
        with asked(model, *inputs):
            return model(*inputs)

    plain, compiled = both(run)
    for one, other in zip(_tensors(plain), _tensors(compiled), strict=True):
        assert_close(other, one, rtol=1e-4, atol=1e-5)


def _tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for one in values for tensor in _tensors(one)] if values is not None else []


def test_operands_need_not_be_contiguous_nor_the_bias_in_single_precision():
    layout, g = Layout((5, 3)), generator(0)
    q, k, v = torch.randn(8, 3, HEADS, HEAD_DIM, generator=g).unbind(1)
    bias = torch.rand(8, 2, generator=g, dtype=torch.float64)[:, 0]
    rows = torch.randn(9, 4, generator=g).t()
    tokens = packed(layout, HEADS * HEAD_DIM, 0.3, True, False, 1.0, g)
    scores, keep = torch.rand(8, 2, generator=g)[:, 1], (torch.rand(8, 2, generator=g) < 0.5)[:, 0] | tokens.protected
    fuse = Fuse(vp.BlockSpec("image", 1, 4, HEADS * HEAD_DIM, HEADS, has_summary=True))
    stats = vp.AttentionStats()

    def run():
        out = attend(q, k, v, layout, 0.3, key_bias=bias)
        plan = fuse(tokens, scores, vp.Selection(keep), stats)
        return out, *precision.rank(rows), normalize(scores, tokens), plan.values(rows.t().repeat(1, 2)[:8, ::2])

    for plain, compiled in zip(*both(run), strict=True):
        assert_close(compiled, plain, **CLOSE)


def test_kernels_take_plain_single_precision_without_gradients_alone():
    one = torch.randn(3)
    assert native.kernels(one) is None  # gradients are recorded
    with torch.inference_mode():
        assert native.kernels(one) is not None
        assert native.kernels(one.double()) is None
        assert native.kernels(one.to("meta")) is None
        assert native.kernels(one, torch.nn.Parameter(one)) is None


def test_a_compiler_that_fails_says_what_to_install(monkeypatch):
    from torch.utils import cpp_extension

    def fail(*args, **named):
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(cpp_extension, "load", fail)
    monkeypatch.setattr(native, "_built", None)
    with pytest.raises(RuntimeError, match=r"(?s)Ninja is required.*apt install g\+\+ ninja-build"):
        vp.build_kernels()
    assert native._built is None
