"""Losses of pruned training against loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import small, soften
from torch.testing import assert_close

import vltprune as vp
from vltprune import losses
from vltprune.pruning.losses import alignment


@pytest.mark.parametrize(("groups", "images", "sentences"), [(3, 1, 1), (3, 2, 1), (2, 1, 3), (2, 2, 3), (1, 1, 1)])
def test_alignment(groups, images, sentences):
    image, text = torch.randn(groups * images, 5, 7), torch.randn(groups * sentences, 5, 7)
    terms = []
    for s in range(len(text)):
        group = s // sentences
        seen = image[group * images : (group + 1) * images].mean(0)
        terms += [1 - F.cosine_similarity(seen[k], text[s, k], dim=0) for k in range(5)]
    assert_close(alignment(image, text, images), torch.stack(terms).mean())


def test_what_agrees_costs_nothing_and_nothing_is_finite():
    x = torch.randn(2, 3, 4)
    assert_close(alignment(x, 5 * x), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert_close(alignment(x, -x), torch.tensor(2.0))
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    loss = alignment(zero, x)
    loss.backward()
    assert loss.item() == 1
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize(("image", "text", "images"), [(3, 3, 2), (0, 2, 1), (2, 3, 1), (1, 1, 2)])
def test_batches_that_do_not_fit(image, text, images):
    with pytest.raises(ValueError, match=f"{text} sentences cannot be aligned with {image} images at {images} images"):
        alignment(torch.zeros(image, 2, 3), torch.zeros(text, 2, 3), images)


def traced(preset, soft_temperature=0.0, name="vit", batch=3, **parts):
    """The traces of a pruned small model, in training where it is soft, and its inputs."""
    torch.manual_seed(4)
    model = soften(vp.prune(small(name).model, preset, **parts), soft_temperature)
    inputs = small(name).draw(batch)
    with vp.collect() as traces:
        model(*inputs)
    return traces[0], inputs


def test_keep_ratio():
    """DynamicViT: ((kept share of the input's patches) - rho^s)^2, the mean over stages s and images."""
    trace, _ = traced("dynamicvit", 0.7, keep="sampled_ratio(ratio=0.6)")
    terms = []
    for stage, depth in enumerate((0, 1, 2), 1):
        for kept in trace.layers[depth].expected.tolist():
            terms.append(((kept - 1) / 16 - 0.6**stage) ** 2)
    loss = losses.keep_ratio(trace)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    weights = list(trace.encoder.pruners_at(0)[0].scorer.parameters())
    assert all(
        gradient.abs().sum() > 0 for gradient in torch.autograd.grad(loss, weights)
    )  # the scorer alone can learn it
    assert losses.keep_ratio(traced("dynamicvit")[0]).item() == 0
    with pytest.raises(ValueError, match=r"keep_ratio compares with a ratio, and Learned at depth 1 has none"):
        losses.keep_ratio(traced("asvit", 0.5)[0])


def test_kept_share():
    """LTP: the mean of the mask over tokens and layers."""
    trace, _ = traced("ltp", 0.7)
    shares = [(kept - 1) / 16 for layer in trace.layers for kept in layer.expected.tolist()]
    loss = losses.kept_share(trace)
    assert loss.item() == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    thresholds = [trace.encoder.pruners_at(depth)[0].keeper.learned for depth in range(4)]
    assert all(gradient < 0 for gradient in torch.autograd.grad(loss, thresholds))
    assert losses.kept_share(traced("ltp")[0]).item() == 0


def halting_of(trace, gain, center, batch=3, patches=16):
    """[batch][patch][layer]: halting probabilities of each patch in the layers that it reached."""
    found = [[[] for _ in range(patches)] for _ in range(batch)]
    for layer in trace.layers:
        tokens, _ = layer.scored
        for row in tokens.free.nonzero().flatten().tolist():
            h = torch.sigmoid(gain * tokens.x[row, 0] - center)
            found[tokens.layout.instance[row]][tokens.position[row] - 1].append(h)
    return found


def test_ponder_and_the_prior_of_halting():
    """A-ViT: N + r of each token, r = 1 less what it halted by before; KL of the mean halting from a Gaussian."""
    trace, _ = traced("avit", scorer="halting(gain=1.0, center=0.5)")
    found = halting_of(trace, 1.0, 0.5)
    times = [one for image in found for one in image]
    assert {len(one) for one in times} >= {2, 3}
    assert all(sum(one) >= 0.99 or len(one) == 4 for one in times)
    wanted = sum(len(one) + 1 - sum(one[:-1]) for one in times) / len(times)
    assert_close(losses.ponder(trace), wanted, rtol=1e-4, atol=1e-5)

    means = [sum(one[k] for one in times if len(one) > k) / len(times) for k in range(4)]
    target = [math.exp(-((k + 1 - 0.5 * 4) ** 2) / 2 / 1.5**2) for k in range(4)]
    found = [float(one.detach() / sum(means).detach()) for one in means]
    divergence = sum(p * math.log(p / (q / sum(target))) for p, q in zip(found, target, strict=True))
    prior = losses.halting_prior(trace, peak=0.5, deviation=1.5)
    assert prior.item() == pytest.approx(divergence, rel=1e-3)
    for loss in (losses.ponder(trace), prior):
        block = trace.encoder.adapter.blocks(trace.encoder.host)[0]
        gradient = torch.autograd.grad(loss, block.mlp.fc2.bias, retain_graph=True)[0]
        assert gradient[0].abs() > 0


def test_losses_of_halting_need_it():
    with pytest.raises(ValueError, match="the image tower is not pruned by scorer='halting'"):
        losses.ponder(traced("evit")[0])
    with torch.no_grad(), pytest.raises(ValueError, match="traced without gradients"):
        losses.halting_prior(traced("avit")[0])


@pytest.mark.parametrize("soft_temperature", [0.0, 0.6])
def test_token_distillation(soft_temperature):
    """DynamicViT: the squared error of kept patches from the dense model's, weighted by the mask, relative to their size."""
    student, inputs = traced("dynamicvit", soft_temperature)
    dense = vp.prune(small("vit").model, "random", at=())
    with torch.no_grad(), vp.collect() as traces:
        dense(*inputs)
    teacher = traces[0]
    with torch.no_grad():
        teacher.output_tokens.x.mul_(1.1)
    errors, sizes, tokens = 0.0, 0.0, student.output_tokens
    for row in range(tokens.layout.total):
        if tokens.protected[row]:
            continue
        there = teacher.output_tokens.x[int(tokens.layout.instance[row]) * 17 + int(tokens.position[row])]
        weight = 1.0 if tokens.keep_prob is None else tokens.keep_prob[row].item()
        errors += weight * ((tokens.x[row].detach() - there) ** 2).mean().item()
        sizes += weight * (there**2).mean().item()
    loss = losses.token_distillation(student, teacher)
    assert loss.item() == pytest.approx(errors / sizes, rel=1e-4)
    assert loss.requires_grad and errors > 0
