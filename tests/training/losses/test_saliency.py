"""What the dense model's answers depend on, and scores that learn it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import config
from small_models import NAMES, small
from torch.autograd.graph import saved_tensors_hooks

import vltprune as vp
from vltprune.core.tokens import PackedTokens
from vltprune.training import compress, compression
from vltprune.training.losses.saliency import curvature_probe, saliency_loss, saliency_teacher


def test_the_probe_has_the_curvature_of_the_divergence():
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    many = logits.detach().repeat(5000, 1).requires_grad_()  # each row has a draw of its own
    draws = [torch.autograd.grad(curvature_probe(many, seed), many)[0].unflatten(0, (-1, 2)) for seed in range(4)]
    assert not any(torch.equal(one, other) for one, other in combinations(draws, 2))
    found = torch.cat([torch.einsum("nrc,nrd->nrcd", one, one) for one in draws]).mean(0)
    chance = logits.detach().softmax(-1)
    curvature = torch.diag_embed(chance) - torch.einsum("rc,rd->rcd", chance, chance)
    torch.testing.assert_close(found, curvature, atol=0.01, rtol=0)


def test_the_probe_does_not_see_what_a_softmax_does_not():
    logits = torch.randn(4, 5, dtype=torch.float64)
    one, other = (curvature_probe(logits + shift, seed=1) for shift in (0.0, 7.0))
    torch.testing.assert_close(one, other)


def test_probes_of_rows_are_the_same_wherever_the_rows_are():
    logits = torch.randn(7, 5, dtype=torch.float64)
    apart = curvature_probe(logits[:3], 1) + curvature_probe(logits[3:], 1, before=3)
    torch.testing.assert_close(apart, curvature_probe(logits, 1))


class _Compared:
    """One tower's tokens at one depth, of which the answer depends on each by its own weight."""

    def __init__(self):
        torch.manual_seed(0)
        x = torch.randn(2, 9, 4).requires_grad_()
        protected = torch.arange(9).expand(2, 9) == 0
        self.tokens = PackedTokens.pack(x, protected=protected)
        self.matter = torch.rand(18) + 0.1
        self.direction = torch.tensor([3.0, 0.0, 4.0, 0.0])

    def apart(self, scores: torch.Tensor, tokens: PackedTokens) -> float:
        answer = (self.matter * (self.tokens.x @ self.direction)).sum()
        own, theirs = (_trace(tokens, scores.requires_grad_()), _trace(self.tokens, torch.zeros(18)))
        outputs = torch.stack([answer, torch.zeros(())])[None]
        return saliency_loss(own, theirs, outputs, seed=0).item()


def _trace(tokens: PackedTokens, scores: torch.Tensor) -> dict[str, Any]:
    return {"image": SimpleNamespace(layers=[SimpleNamespace(scored=None), SimpleNamespace(scored=(tokens, scores))])}


def test_scores_are_compared_with_what_answers_depend_on():
    seen = _Compared()
    whatever = seen.matter.masked_fill(seen.tokens.protected, 100.0)
    assert seen.apart(3 * whatever - 1, seen.tokens) == pytest.approx(0.0, abs=1e-5)
    assert seen.apart(-whatever, seen.tokens) == pytest.approx(2.0, abs=1e-5)
    assert seen.apart(torch.ones(18), seen.tokens) == pytest.approx(1.0, abs=1e-5)


def test_tokens_that_are_gone_or_merged_are_not_asked_about():
    seen = _Compared()
    index = torch.tensor([0, 2, 3, 7, 8, 9, 10, 12, 17])
    left = seen.tokens.take(index, vp.Layout((5, 4)))
    merged = torch.tensor([False, False, True, False, False, False, False, False, True])
    left = replace(left, size=torch.where(merged, 3, 1))
    scores = seen.matter[index].masked_fill(merged, -50.0)
    assert seen.apart(scores, left) == pytest.approx(0.0, abs=1e-5)


def test_a_model_that_is_pruned_nowhere_has_no_scores_to_teach():
    nowhere = {"image": SimpleNamespace(layers=[SimpleNamespace(scored=None)])}
    assert saliency_loss(nowhere, nowhere, torch.randn(2, 2), seed=0).item() == 0.0


def test_scores_without_parameters_are_not_distilled():
    seen = _Compared()
    own = _trace(seen.tokens, torch.rand(18))
    without_gradients = torch.randn(2, 2)
    assert saliency_loss(own, own, without_gradients, seed=0).item() == 0.0


def test_anchors_learn_what_matters(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "finish", lambda run, model, val: model)  # what comes behind the last step
    parts = {"guide": "codebook(anchors=4)", "scorer": "alignment", "keep": "ratio(ratio=0.7)"}
    settings = config("nlvr", tmp_path / "data", parts=parts, freeze=["*"], saliency=1.0, steps=20, lr=2e-3)
    compress(settings, tmp_path / "run")
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert all("distill" not in row for row in history)
    rows = [row["saliency"] for row in history]
    assert sum(rows[-5:]) / 5 < 0.9 * sum(rows[:5]) / 5


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_has_the_same_gradients_with_less_in_memory(name):
    """Those of tokens, whose linear maps keep no inputs for gradients of weights."""
    dense, inputs = copy.deepcopy(small(name).model), small(name).draw(3)
    student = vp.prune(small(name).model, "attention")
    teacher = saliency_teacher(dense, student)
    found = []
    for train_all in (False, True):
        if train_all:
            dense.requires_grad_()
        kept = {}
        with saved_tensors_hooks(lambda t, kept=kept: kept.setdefault(id(t), t), lambda t: t), vp.collect() as traces:
            out = teacher(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        scored = [layer.scored[0].x for trace in traces for layer in trace.layers if layer.scored is not None]
        gradients = torch.autograd.grad(curvature_probe(out.flatten(1), 0), scored, allow_unused=True)
        weights = {id(weight) for weight in dense.parameters()}
        found.append((gradients, sum(t.nbytes for key, t in kept.items() if key not in weights)))
    (ours, less), (exact, more) = found
    assert any(gradient is not None for gradient in ours)
    torch.testing.assert_close(ours, exact)
    assert less < more
