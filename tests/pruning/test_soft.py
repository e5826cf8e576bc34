"""Soft training: tokens that are there in part, and what becomes of them as the decision hardens."""

from __future__ import annotations

from functools import reduce
from operator import or_

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import BLIP, images, scrambled, sentences, soften

import vltprune as vp
from vltprune.core.attention import attend
from vltprune.core.attention_stats import attend_with_stats
from vltprune.core.modality import with_modality
from vltprune.core.statistics import Stat
from vltprune.models.blip import BlipNlvr
from vltprune.models.caption import BlipCaption

KEEPERS = [
    "learned(threshold=-0.3)",
    "rising_threshold(final=1.2)",
    "threshold(temperature=20.0)",
    "threshold(temperature=20.0, power=0.7)",
    "threshold(temperature=20.0, decay=0.5)",
]


def pruned(keep, reducer="drop", **parts):
    model = vp.prune(
        scrambled(BlipNlvr(**BLIP)), "madtp", keep=keep, reducer=reducer, guide="codebook(anchors=5)", **parts
    )
    return model.train()


def run(model, batch=3):
    torch.manual_seed(1)
    ids, mask = sentences(batch)
    with vp.collect() as traces:
        out = model(images(batch, 2), ids, mask)
    return out, traces


@pytest.mark.parametrize("keep", KEEPERS)
def test_a_hard_sigmoid_decides_as_evaluation_does(keep):
    model = pruned(keep)
    soft, traces = run(soften(model, 1e-7))
    hard, plain = run(model.eval())
    assert [trace.lengths for trace in traces] == [trace.lengths for trace in plain]
    assert min(plain[0].lengths[-1]) < plain[0].input_tokens.layout.longest  # something was pruned
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", KEEPERS)
@pytest.mark.parametrize("reducer", ["drop", "fuse"])
def test_the_loss_reaches_thresholds_scores_and_anchors(keep, reducer):
    model = soften(pruned(keep, reducer), 0.5)
    run(model)[0].square().sum().backward()
    guide = model.pruning.guide
    assert guide.anchors.grad.abs().sum() > 0
    for tower, last in (("image", 4), ("text", 3)):  # what the text's last block leaves, nothing looks at any more
        for depth in range(last):
            for parameter in model.pruning.towers[tower].pruners_at(depth)[0].keeper.parameters():
                assert parameter.grad.abs() > 0, (tower, depth)


def test_an_instance_alone_is_as_in_its_batch():
    model = soften(pruned("learned(threshold=-0.3)", "fuse"), 0.4)
    torch.manual_seed(2)
    pixels, (ids, mask) = images(4, 2), sentences(4)
    together = model(pixels, ids, mask)
    for i in range(4):
        torch.testing.assert_close(
            model(pixels[i : i + 1], ids[i : i + 1], mask[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-4
        )


@given(data=st.data())
def test_what_is_there_in_no_part_is_as_if_gone(data):
    lengths = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    layout = vp.Layout(tuple(lengths))
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=layout.total, max_size=layout.total)))
    first = layout.slot == 0
    gone &= ~first
    tokens = vp.PackedTokens(torch.randn(layout.total, 8), layout, layout.slot, first, first)
    # a text of two words, and an image behind it
    tokens = with_modality(tokens, layout.slot > 1)
    q, k, v = torch.randn(3, layout.total, 2, 4)
    faded = tokens.with_keep_prob(torch.where(gone, 1e-30, 1.0))
    kept = tokens.select(~gone)

    # the last token may be gone itself, and there is no text beside
    every = reduce(or_, Stat) & ~Stat.LAST & ~Stat.FROM_TEXT & ~Stat.FROM_RATERS
    text = torch.randn(layout.batch, 2, 4)
    out, stats = attend_with_stats(q, k, v, faded, 0.5, every, key_bias=faded.bias, text=text)
    fewer, right = attend_with_stats(q[~gone], k[~gone], v[~gone], kept, 0.5, every, text=text)
    torch.testing.assert_close(out[~gone], fewer)
    for stat in right.values:
        torch.testing.assert_close(stats[stat][~gone], right[stat])
    torch.testing.assert_close(attend(q, k, v, layout, 0.5, key_bias=faded.bias)[~gone], fewer)
    torch.testing.assert_close(faded.expected, kept.layout.sizes.double())


def test_a_decoder_sees_in_part_what_is_there_in_part():
    sizes = {name: value for name, value in BLIP.items() if name != "merge_from"}
    model = scrambled(BlipCaption(**sizes, prompt=(5,), bos_id=38, eos_id=3))
    ids, mask = sentences(2)
    packed = vp.PackedTokens.pack(model.visual(images(2)))
    gone = (packed.layout.slot % 3 == 1) & (packed.layout.instance == 0)
    faded = packed.with_keep_prob(torch.where(gone, 1e-30, 1.0))
    logits = [model.decoder(ids, model.decoder.start(memory), mask)[0] for memory in (faded, packed.select(~gone))]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def test_expected_macs_have_gradients_and_end_at_the_counted_ones():
    model = soften(pruned("learned(threshold=-0.3)"), 0.3)
    traces = run(model)[1]
    cost = vp.CostMeter(model)(traces)
    sum(macs.sum() for macs in cost.towers.values()).backward()
    thresholds = [p.grad for name, p in model.named_parameters() if name.endswith("keeper.threshold")]
    assert thresholds and all(gradient < 0 for gradient in thresholds)  # higher thresholds cost less

    hard, plain = (vp.CostMeter(m)(run(m)[1]).total for m in (soften(model, 1e-7), soften(model, 0.0)))
    assert hard == pytest.approx(plain, rel=1e-4)


def test_keepers_without_a_threshold_say_so():
    with pytest.raises(ValueError, match="Ratio has no threshold to learn softly: use keep='threshold', 'learned',"):
        run(soften(pruned("ratio(ratio=0.5)"), 0.3))


class _Learns(vp.TokenScorer):
    """Scores that are weights."""

    def __init__(self, spec, scores):
        super().__init__(spec)
        self.scores = torch.nn.Parameter(scores)

    def forward(self, tokens, stats, guidance):
        return self.scores


def test_a_cost_has_gradients_to_thresholds_and_none_to_scores():
    """Scores should say what matters, and not what is cheap; the loss has gradients to both."""
    spec = vp.BlockSpec("image", 0, 1, 4, 1, has_summary=True)
    scorer, keeper = _Learns(spec, torch.randn(6)), vp.keepers["learned"](spec)
    pruner = vp.Pruner(scorer, keeper, vp.selectors["top"](spec), vp.reducers["drop"](spec)).train()
    pruner.soft_temperature = 0.5
    first = torch.arange(6) == 0
    decision = pruner(
        vp.PackedTokens.pack(torch.randn(1, 6, 4), protected=first, summary=first), vp.AttentionStats(), None
    )
    torch.testing.assert_close(decision.keep_prob, decision.counted_prob, rtol=0, atol=0)
    weights = [scorer.scores, keeper.threshold]
    of_cost = torch.autograd.grad(decision.counted_prob[1:].sum(), weights, retain_graph=True, allow_unused=True)
    of_loss = torch.autograd.grad(decision.keep_prob[1:].square().sum(), weights)
    assert of_cost[0] is None and of_cost[1] < 0
    assert all(gradient.abs().sum() > 0 for gradient in of_loss)


def test_a_sampled_ratio_keeps_what_was_drawn_and_trains_scores_by_the_cost():
    """The tokens that stay are those of the sample, whatever their order by score; noise is drawn once for loss and cost."""
    spec = vp.BlockSpec("image", 0, 1, 4, 1, has_summary=True)
    scorer, keeper = _Learns(spec, torch.linspace(0.3, 0.7, 400)), vp.keepers["sampled_ratio"](spec, hard=False)
    pruner = vp.Pruner(scorer, keeper, vp.selectors["top"](spec), vp.reducers["drop"](spec)).train()
    pruner.soft_temperature = 0.2
    first = torch.arange(400) == 0
    tokens = vp.PackedTokens.pack(torch.randn(1, 400, 4), protected=first, summary=first)
    decision = pruner(tokens, vp.AttentionStats(), None)
    kept = decision.apply(tokens)
    assert torch.equal(decision.keep_prob, decision.counted_prob)
    assert sorted(kept.position.tolist()) == (decision.keep_prob > pruner.min_keep_prob).nonzero().flatten().tolist()
    best = decision.scores.argsort(descending=True)[: len(kept.position)]
    assert set(best.tolist()) != set(kept.position.tolist())
    (gradient,) = torch.autograd.grad(kept.expected.sum(), [scorer.scores])
    assert (gradient[1:] >= 0).all() and gradient.sum() > 0


def test_what_is_there_by_less_than_two_in_a_hundred_goes():
    """A token leaves where its probability to stay, the sigmoid of its margin over the temperature, is below."""
    shares = torch.tensor([0.5, 0.019, 0.021, 0.9, 0.0001, 0.05])

    class Told(vp.KeepRatioPredictor):
        def forward(self, scores, tokens, guidance):
            raise AssertionError("soft training asks for margins")

        def margin(self, scores, tokens, guidance):
            return 0.5 * shares.logit()

    spec = vp.BlockSpec("image", 0, 1, 4, 1, has_summary=True)
    parts = vp.scorers["random"](spec), Told(spec), vp.selectors["top"](spec), vp.reducers["drop"](spec)
    pruner = vp.Pruner(*parts).train()
    pruner.soft_temperature = 0.5
    first = torch.arange(6) == 0
    tokens = vp.PackedTokens.pack(torch.randn(1, 6, 4), protected=first, summary=first)
    decision = pruner(tokens, vp.AttentionStats(), None)
    torch.testing.assert_close(decision.keep_prob[1:], shares[1:])
    assert int(decision.plan.layout.lengths[0]) == 1 + 3
