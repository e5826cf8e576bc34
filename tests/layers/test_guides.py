"""The codebook against its formulas, and how it is born, fitted and refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from strategies import DIM, HEADS, cases
from torch.testing import assert_close

from vltprune import BlockSpec, PackedTokens, guides
from vltprune.layers import Codebook

WIDE = {"image": BlockSpec("image", 0, 4, DIM, HEADS, True), "text": BlockSpec("text", 0, 4, DIM, HEADS, True)}
UNEVEN = {**WIDE, "text": BlockSpec("text", 0, 4, 5, 1, True)}


@given(cases())
def test_formulas(case):
    """A = q T^T; v = softmax over the unprotected tokens of (A / sqrt(d)), times q."""
    guide = Codebook(WIDE, anchors=4)
    guidance = guide(case.tokens, "image")
    assert_close(guidance.affinity, torch.einsum("nd,kd->nk", case.tokens.x, guide.anchors))
    for i in range(case.batch):
        rows = (case.tokens.layout.instance == i) & case.tokens.free
        q = case.tokens.x[rows]
        weight = (q @ guide.anchors.t() / DIM**0.5).softmax(0)
        assert_close(guidance.pooled[i], weight.t() @ q, rtol=1e-5, atol=1e-6)


@given(cases(), st.sampled_from(["softmax", "sparsemax"]), st.sampled_from([1e-4, 1.0, 1e6]))
def test_attention_is_a_distribution_over_unprotected_tokens(case, attend, temperature):
    """For every anchor, however hot or cold; where nothing is unprotected, nothing."""
    guidance = Codebook(WIDE, anchors=4, attend=attend)(case.tokens, "image")
    weight, sizes = guidance.attention(temperature), case.tokens.layout.lengths
    assert (weight[case.tokens.protected] == 0).all()
    for part, free in zip(weight.split(sizes), case.tokens.free.split(sizes), strict=True):
        assert (part >= 0).all()
        assert_close(part.sum(0), torch.full((4,), float(free.any())), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("specs", "args", "maps", "width"),
    [
        (WIDE, {}, ["image", "text"], DIM),
        (WIDE, {"project": False}, [], DIM),
        (WIDE, {"dim": 6}, ["image", "text"], 6),
        (UNEVEN, {}, ["image", "text"], DIM),
        (UNEVEN, {"dim": 3}, ["image", "text"], 3),
    ],
)
def test_each_tower_has_a_map_unless_it_is_left_out(specs, args, maps, width):
    guide = Codebook(specs, anchors=7, **args)
    assert sorted(guide.maps) == maps
    assert guide.anchors.shape == (7, width)
    for tower, spec in specs.items():
        assert guide.map(torch.zeros(2, spec.dim), tower).shape == (2, width)


@given(cases())
def test_maps_begin_as_the_identity(case):
    """Bit for bit what it would be without them."""
    mapped, plain = Codebook(WIDE, anchors=4), Codebook(WIDE, anchors=4, project=False)
    mapped.load_state_dict(plain.state_dict(), strict=False)
    ours, theirs = mapped(case.tokens, "text"), plain(case.tokens, "text")
    assert torch.equal(ours.affinity, theirs.affinity)
    assert torch.equal(ours.pooled, theirs.pooled)


@given(cases(), st.booleans())
def test_a_map_is_put_into_the_anchors(case, training):
    """The affinity is that of mapped tokens, and has their gradients."""
    guide = _noisy(Codebook(UNEVEN, anchors=4, dim=6)).double().train(training)
    tokens = case.tokens.with_x(case.tokens.x.double())
    guidance = guide(tokens, "image")
    expected = guide.map(tokens.x, "image") @ guide.anchors.t()
    assert_close(guidance.affinity, expected, rtol=0, atol=1e-12)
    for weight in (guide.anchors, guide.maps["image"].weight, guide.maps["image"].bias):
        ours, theirs = (
            torch.autograd.grad(one.sum(), weight, retain_graph=True)[0] for one in (guidance.affinity, expected)
        )
        assert_close(ours, theirs, rtol=0, atol=1e-11)


@torch.no_grad()
def test_evaluation_follows_the_weights():
    """However they change: by hand, behind autograd's back, by loading, by a step in training, by another type."""
    guide = _noisy(Codebook(UNEVEN, anchors=4, dim=6)).eval()
    tokens = PackedTokens.pack(torch.randn(2, 5, DIM))

    def right():
        expected = guide.map(tokens.x.to(guide.anchors.dtype), "image") @ guide.anchors.t()
        assert_close(guide(tokens.with_x(tokens.x.to(guide.anchors.dtype)), "image").affinity, expected)

    changes = [
        lambda: guide.anchors.mul_(2),
        lambda: guide.maps["image"].bias.add_(1),
        lambda: guide.load_state_dict(_noisy(Codebook(UNEVEN, anchors=4, dim=6)).state_dict()),
        lambda: guide.fit(torch.randn(50, 6)),
        lambda: (guide.train(), guide.maps["image"].weight.data.neg_(), guide.eval()),
        lambda: guide.anchors.data.mul_(0.1).add_(0.9 * torch.randn_like(guide.anchors)),  # an average of weights
        lambda: guide.maps["image"].weight.data.copy_(torch.randn(6, DIM)),
        lambda: guide.maps["image"].bias.untyped_storage().copy_(torch.randn(6).untyped_storage()),
        lambda: guide.double(),
    ]
    right()
    for change in changes:
        change()
        right()
        right()
    with torch.autocast("cpu", torch.bfloat16):
        guide.float().anchors.mul_(2)
        guide(tokens, "image")
    right()
    other = torch.randn_like(guide.anchors)
    called = torch.func.functional_call(guide, {"anchors": other}, (tokens, "image"))
    assert_close(called.affinity, guide.map(tokens.x, "image") @ other.t())
    right()


class _Adapted(torch.nn.Module):
    """A linear map and what somebody learned beside it; it has no attributes of the map."""

    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.delta(x)


def _hooked(layer):
    layer.register_forward_hook(lambda module, args, out: out + 1)
    return layer


def _doubled(layer):
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Twice())
    return layer


@pytest.mark.parametrize("change", [_Adapted, _hooked, _doubled, lambda layer: torch.nn.Identity()])
@torch.no_grad()
def test_a_map_that_is_more_than_its_weight_is_called(change):
    guide = _noisy(Codebook(UNEVEN, anchors=4, dim=DIM)).eval()
    guide.maps["image"] = change(guide.maps["image"])
    tokens = PackedTokens.pack(torch.randn(2, 5, DIM))
    guidance = guide(tokens, "image")
    assert_close(guidance.affinity, guide.map(tokens.x, "image") @ guide.anchors.t())
    assert_close(guidance.mapped.x, guide.map(tokens.x, "image"))


@torch.no_grad()
def _noisy(guide):
    for weight in guide.parameters():
        weight.copy_(torch.randn_like(weight))
    return guide


@pytest.mark.parametrize(
    ("specs", "args", "text"),
    [
        (WIDE, {"anchors": 0}, "anchors >= 1, got 0"),
        (WIDE, {"attend": "hardmax"}, "attend='softmax' or attend='sparsemax'"),
        (UNEVEN, {"project": False}, "use project=True"),
        (WIDE, {"dim": 6, "project": False}, "use project=True"),
    ],
)
def test_refusals(specs, args, text):
    with pytest.raises(ValueError, match=text):
        Codebook(specs, **args)


def test_fit_finds_what_is_there():
    """Five well-separated clusters, five anchors: one on each."""
    centers = 100 * torch.eye(5, DIM)
    points = (centers[torch.arange(500) % 5] + torch.randn(500, DIM))[torch.randperm(500)]
    guide, again = Codebook(WIDE, anchors=5), Codebook(WIDE, anchors=5)
    guide.fit(points, seed=1)
    again.fit(points, seed=1)
    assert torch.equal(guide.anchors, again.anchors)
    assert torch.cdist(guide.anchors, centers).amin(1).max() < 1.5
    assert sorted(torch.cdist(guide.anchors, centers).argmin(1).tolist()) == [0, 1, 2, 3, 4]


def test_fit_on_equal_points_and_on_too_few():
    guide = Codebook(WIDE, anchors=5)
    guide.fit(torch.ones(9, DIM))
    assert_close(guide.anchors.detach(), torch.ones(5, DIM))
    with pytest.raises(ValueError, match="5 anchors need at least as many calibration tokens, got 4"):
        guide.fit(torch.ones(4, DIM))


# those whose anchors are weights, and not a text
WITH_ANCHORS = [name for name in guides.names() if not guides[name].queried]


@pytest.mark.parametrize("name", WITH_ANCHORS)
def test_being_untrained_travels_with_the_weights(name):
    fitted, noise, loaded = (guides[name](WIDE) for _ in range(3))
    fitted.fit(torch.randn(500, DIM))
    loaded.load_state_dict(fitted.state_dict())
    assert not loaded.is_untrained
    loaded.load_state_dict(noise.state_dict())
    assert loaded.is_untrained


CASTS = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("name", WITH_ANCHORS)
def test_being_untrained_survives_a_cast(name, dtype):
    """And a change of a single number in any type is training."""
    guide = guides[name](WIDE)
    assert guide.to(dtype).is_untrained
    assert guide.float().is_untrained
    with torch.no_grad():
        next(guide.to(dtype).parameters()).view(-1)[0] += 0.25
    assert not guide.is_untrained
    fitted = guides[name](WIDE)
    fitted.fit(torch.randn(500, DIM))
    assert not fitted.to(dtype).is_untrained
