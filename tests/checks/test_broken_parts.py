"""Parts that break one invariant each: `check_part` names it. Were it to pass them, it would be worth nothing."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

import vltprune as vp
from vltprune import Stat
from vltprune.checks.kinds import KINDS, invariants_of
from vltprune.core import segments
from vltprune.layers import Codebook, Drop, Fuse, Ratio, Top


class Scorer(vp.TokenScorer):
    """A sound scorer, for others to break."""

    def forward(self, tokens, stats, guidance):
        return tokens.x.float().sum(-1)


class SeesItsBatch(Scorer):
    def forward(self, tokens, stats, guidance):
        return super().forward(tokens, stats, guidance) / tokens.layout.batch


class SeesItsIndex(Scorer):
    def forward(self, tokens, stats, guidance):
        return super().forward(tokens, stats, guidance) + tokens.layout.instance


class BlowsUp(Scorer):
    def forward(self, tokens, stats, guidance):
        return 1 / segments.sum(tokens.x.abs().sum(-1) * tokens.free, tokens.layout)[tokens.layout.instance]


class ReadsSlots(Scorer):
    def forward(self, tokens, stats, guidance):
        return tokens.layout.slot.float()


class ReadsUndeclared(Scorer):
    def forward(self, tokens, stats, guidance):
        return stats[Stat.RECEIVED]


class ReadsGuidance(Scorer):
    def forward(self, tokens, stats, guidance):
        return guidance.affinity.amax(-1)


class ReadsTheSummary(Scorer):
    def forward(self, tokens, stats, guidance):
        summary = tokens.first_where(tokens.summary)[tokens.layout.instance]
        return (tokens.x.float() * summary.float()).sum(-1)


class NeedsTwoTokens(Scorer):
    def forward(self, tokens, stats, guidance):
        if min(tokens.layout.lengths) < 2:
            raise ValueError("no second token")
        return super().forward(tokens, stats, guidance)


class OneAnInstance(Scorer):
    def forward(self, tokens, stats, guidance):
        return segments.sum(tokens.x, tokens.layout)


class InHalf(Scorer):
    def forward(self, tokens, stats, guidance):
        return tokens.x.sum(-1)


class Noisy(Scorer):
    def forward(self, tokens, stats, guidance):
        return torch.rand(tokens.layout.total)


class Idle(Scorer):
    def __init__(self, spec):
        super().__init__(spec)
        self.used, self.unused = nn.Linear(spec.dim, 1), nn.Linear(spec.dim, 1)

    def forward(self, tokens, stats, guidance):
        return self.used(tokens.x)[:, 0].float() + self.unused(tokens.x.detach())[:, 0].float().detach()


class TakesAFunction(Scorer):
    def __init__(self, spec, function=None):
        super().__init__(spec)
        self.function = function


class Neediest(Ratio):
    def forward(self, scores, tokens, guidance):
        return super().forward(scores, tokens, guidance).amax().expand(tokens.layout.batch)


class CountsOfTheFirst(Ratio):
    def forward(self, scores, tokens, guidance):
        counts = super().forward(scores, tokens, guidance)
        return counts.minimum(counts[0])


class KeepsMoreThanThereAre(Ratio):
    def forward(self, scores, tokens, guidance):
        return super().forward(scores, tokens, guidance) + 1


class KeepsFractions(Ratio):
    def forward(self, scores, tokens, guidance):
        return self.ratio * segments.count(tokens.free, tokens.layout)


class KeepsNegativeCounts(Ratio):
    def forward(self, scores, tokens, guidance):
        return super().forward(scores, tokens, guidance) - 1


class TurnsTheWrongWay(Ratio):
    def forward(self, scores, tokens, guidance):
        return segments.count(tokens.free, tokens.layout) - super().forward(scores, tokens, guidance)


class HidesItsKnob(Ratio):
    def __init__(self, spec, ratio: float = 0.5):
        super().__init__(spec, ratio)
        self.kept = ratio

    def forward(self, scores, tokens, guidance):
        return (self.kept * segments.count(tokens.free, tokens.layout)).long()


class LearnsNothing(Ratio):
    def __init__(self, spec, ratio: float = 0.5):
        super().__init__(spec, ratio)
        self.threshold = nn.Parameter(torch.tensor(0.0))


class DropsProtected(Top):
    def forward(self, tokens, scores, counts, stats):
        unprotected = dataclasses.replace(tokens, protected=torch.zeros_like(tokens.protected))
        return super().forward(unprotected, scores, counts, stats)


class KeepsOneMore(Top):
    def forward(self, tokens, scores, counts, stats):
        return super().forward(tokens, scores, counts + 1, stats)


class KeepsNone(Top):
    def forward(self, tokens, scores, counts, stats):
        return super().forward(tokens, scores, torch.where(counts < 9, 0, counts), stats)


class MatchesItself(Top):
    def forward(self, tokens, scores, counts, stats):
        selection = super().forward(tokens, scores, counts, stats)
        return dataclasses.replace(selection, match=torch.arange(len(selection.keep)))


class ReturnsAMask(Top):
    def forward(self, tokens, scores, counts, stats):
        return super().forward(tokens, scores, counts, stats).keep


class KeepsTheWrongOnes(Drop):
    def forward(self, tokens, scores, selection, stats):
        keep = tokens.protected | ~selection.keep
        return super().forward(tokens, scores, dataclasses.replace(selection, keep=keep), stats)


class LosesProtected(Drop):
    def forward(self, tokens, scores, selection, stats):
        keep = selection.keep & ~tokens.protected
        return super().forward(tokens, scores, dataclasses.replace(selection, keep=keep), stats)


class NeverKeepsAll(Drop):
    def forward(self, tokens, scores, selection, stats):
        lowest = (scores > scores.min()) | tokens.protected
        keep = torch.where(selection.keep.all(), lowest, selection.keep)
        return super().forward(tokens, scores, dataclasses.replace(selection, keep=keep), stats)


class _Altered(Drop):
    """Drop whose plan is of another class."""

    def forward(self, tokens, scores, selection, stats):
        plan = super().forward(tokens, scores, selection, stats)
        return plan and self.plan(plan.before, plan.layout, plan.index)


class Shifted(vp.Reduction):
    def tokens(self, tokens):
        out = super().tokens(tokens)
        return out.with_x(torch.where(out.protected[:, None], out.x * 1.01, out.x))


class ChangesProtected(_Altered):
    plan = Shifted


class Detached(vp.Reduction):
    def values(self, values):
        return super().values(values.detach()) + 0 * values.sum()


class CutsGradients(_Altered):
    plan = Detached


class Reorders(Drop):
    def forward(self, tokens, scores, selection, stats):
        plan = super().forward(tokens, scores, selection, stats)
        return plan and dataclasses.replace(plan, index=plan.index.flip(0))


class ForgetsSizes(vp.Reduction):
    def tokens(self, tokens):
        return dataclasses.replace(super().tokens(tokens), size=None)


class SizesDoNotSum(Fuse):
    def forward(self, tokens, scores, selection, stats):
        plan = super().forward(tokens, scores, selection, stats)
        return plan and ForgetsSizes(**{one.name: getattr(plan, one.name) for one in dataclasses.fields(plan)})


class SumsAsAverages(Fuse):
    def forward(self, tokens, scores, selection, stats):
        plan = super().forward(tokens, scores, selection, stats)
        return plan and dataclasses.replace(plan, sums=dataclasses.replace(plan.sums, shares=2 * plan.sums.shares))


class ReturnsTokens(Drop):
    def forward(self, tokens, scores, selection, stats):
        plan = super().forward(tokens, scores, selection, stats)
        return plan and plan.tokens(tokens)


class PoolsProtected(Codebook):
    def forward(self, tokens, tower):
        unprotected = dataclasses.replace(tokens, protected=torch.zeros_like(tokens.protected))
        return super().forward(unprotected, tower)


class AffinityToTheBatch(Codebook):
    def forward(self, tokens, tower):
        guidance = super().forward(tokens, tower)
        return dataclasses.replace(guidance, affinity=guidance.affinity - guidance.affinity.mean(0))


class AffinityOverflows(Codebook):
    def forward(self, tokens, tower):
        guidance = super().forward(tokens, tower)
        return dataclasses.replace(guidance, affinity=guidance.affinity * 1e38 * 1e38)


class AffinityAcrossAnchors(Codebook):
    def forward(self, tokens, tower):
        guidance = super().forward(tokens, tower)
        return dataclasses.replace(guidance, affinity=guidance.affinity[:, 0])


class KnowsSlots(Codebook):
    def forward(self, tokens, tower):
        guidance = super().forward(tokens, tower)
        return dataclasses.replace(guidance, affinity=guidance.affinity + tokens.layout.slot[:, None])


class AlwaysTrained(Codebook):
    is_untrained = False


BROKEN = {
    "declared inputs": (ReadsUndeclared, ReadsGuidance),
    "no summary token": (ReadsTheSummary,),
    "runs": (NeedsTwoTokens,),
    "one score a token": (OneAnInstance,),
    "finite scores": (BlowsUp,),
    "token order": (ReadsSlots, KnowsSlots),
    "alone as in the batch": (SeesItsBatch, Neediest, CountsOfTheFirst, AffinityToTheBatch),
    "batch order": (SeesItsIndex, CountsOfTheFirst),
    "training and evaluation": (Noisy,),
    "half precision": (InHalf,),
    "gradients": (Idle, LearnsNothing),
    "counts": (KeepsMoreThanThereAre, KeepsFractions, KeepsNegativeCounts),
    "knob": (TurnsTheWrongWay, HidesItsKnob),
    "a plan": (ReturnsTokens,),
    "keep all": (NeverKeepsAll,),
    "a selection": (ReturnsAMask,),
    "counts respected": (KeepsOneMore, KeepsNone),
    "matches": (MatchesItself,),
    "selection respected": (KeepsTheWrongOnes,),
    "protected tokens": (DropsProtected, LosesProtected, ChangesProtected, PoolsProtected),
    "order": (Reorders,),
    "sizes sum": (SizesDoNotSum,),
    "weights": (SumsAsAverages,),
    "gradients of tokens": (CutsGradients,),
    "one affinity a token": (AffinityAcrossAnchors,),
    "finite affinity": (AffinityOverflows,),
    "trained or not": (AlwaysTrained,),
}


@pytest.mark.parametrize(
    ("name", "part"), [pytest.param(n, part, id=part.__name__) for n, parts in BROKEN.items() for part in parts]
)
def test_the_invariant_that_is_broken_is_named(name, part):
    report = vp.check_part(part)
    assert name in report.broken
    assert not report.passed
    (result,) = [one for one in report.results if one.invariant.name == name]
    # the batch that it names breaks it alone
    again = vp.check_part(part, examples=1, first_seed=result.failure.settings.seed)
    assert name in again.broken


def test_a_function_among_arguments_has_no_form_in_json():
    assert vp.check_part(TakesAFunction, function=abs).broken == ["arguments"]
    assert vp.check_part(TakesAFunction).passed


def test_every_invariant_has_a_part_that_breaks_it():
    invariants = {one.name for kind in KINDS.values() for one in invariants_of(kind)}
    assert invariants == {*BROKEN, "arguments"}


def test_a_report_says_what_where_and_what_to_change():
    text = str(vp.check_part(KeepsMoreThanThereAre, ratio=1.0))
    assert text.startswith("keeper KeepsMoreThanThereAre(ratio=1.0)\n")
    assert re.search(r"^counts +25 +broken$", text, re.MULTILINE)
    assert "\ncounts\n  expected  at most 0 of the 0 unprotected tokens of instance 0\n  found     1 ([1])\n" in text
    assert re.search(r"^  on        x \[\d, 8\] of instances of [\d, ]+ tokens, .* seed \d+$", text, re.MULTILINE)
    assert "\n  change    return int64 counts [batch] from 0 to the number of unprotected tokens" in text


def test_an_error_of_a_part_is_told_with_its_line():
    text = str(vp.check_part(NeedsTwoTokens))
    assert re.search(
        r"^  found     ValueError: no second token \(.*test_broken_parts.py, line \d+\)$", text, re.MULTILINE
    )
