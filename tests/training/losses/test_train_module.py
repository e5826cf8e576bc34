"""What a step of training adds up, part by part, against the formulas; and how fast each kind of parameter learns."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_models import small, soften

import vltprune as vp
from vltprune.pruning import losses
from vltprune.pruning.trace import collect
from vltprune.training.loop.optimizer import parameter_groups
from vltprune.training.losses.objectives import Loss
from vltprune.training.losses.saliency import saliency_loss, saliency_teacher
from vltprune.training.losses.train_module import DistillWeights, TrainModule


class Answers:
    """A stand-in for a task: cross-entropy of the model's answers to a batch that is given."""

    images_per_text = 2

    def __init__(self, inputs):
        self.inputs, self.labels = inputs, torch.arange(len(inputs[0])) % 2

    def __call__(self, model, records, images, step):
        outputs = model(*self.inputs)
        total = F.cross_entropy(outputs, self.labels, reduction="sum")
        return Loss(total, torch.tensor(len(self.labels)), outputs)

    def teacher_logits(self, model, records, images, step):
        return model(*self.inputs)


@pytest.fixture
def step():
    """A pruned model of two images a sentence, a dense teacher that differs from it, and three sentences."""
    nlvr = small("nlvr")
    torch.manual_seed(3)
    inputs, host = nlvr.draw(3), copy.deepcopy(nlvr.model)
    parts = {"guide": "codebook(anchors=5)", "at": {"image": (1,), "text": (1,)}}
    model = vp.prune(host, "madtp", keep="learned(threshold=-0.3)", **parts).train()
    teacher = copy.deepcopy(nlvr.model)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(1.1)
    teacher = vp.prune(teacher, "random", at=()).eval()
    return SimpleNamespace(model=model, teacher=teacher, objective=Answers(inputs), records=[None] * 3, inputs=inputs)


def metrics(step, **module):
    call = {name: module.pop(name) for name in ("target_reduction", "multiplier") if name in module}
    return TrainModule(step.model, step.objective, **module)(step.records, step.inputs[0], 0, **call)


def test_the_task_and_the_alignment_with_its_weight(step):
    found = metrics(step, align=0.3)
    with collect() as traces:
        outputs = step.model(*step.inputs)
    task = F.cross_entropy(outputs, step.objective.labels)
    align = losses.alignment(traces[0].aligned, traces[1].aligned, 2)
    torch.testing.assert_close(found["task"], task.detach())
    torch.testing.assert_close(found["align"], 0.3 * align.detach())
    torch.testing.assert_close(found["loss"], task + 0.3 * align)
    torch.testing.assert_close(metrics(step)["align"], 0.1 * align.detach())  # as MADTP has it


def test_logits_are_distilled_at_a_temperature_of_two(step):
    """T^2 KL of the teacher's softened answers from the model's, the mean over the batch (Hinton et al., arXiv 1503.02531)."""
    found = metrics(step, align=0.0, teacher=step.teacher, distill=DistillWeights(logits=0.7))
    ours, theirs = (model(*step.inputs).detach().double() / 2 for model in (step.model, step.teacher))
    p, q = theirs.softmax(-1), ours.softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    assert divergence > 1e-4
    assert found["distill"].item() == pytest.approx(0.7 * 4 * divergence.item(), rel=1e-4)


def test_saliency_is_distilled_from_softened_answers(step, monkeypatch):
    """The teacher's logits at the temperature of two. Of three classes: of two, a correlation sees no temperature."""

    def teacher_logits(model, records, images, number):
        return F.pad(10 * model(*step.inputs), (0, 1))

    monkeypatch.setattr(step.objective, "teacher_logits", teacher_logits, raising=False)
    teacher = saliency_teacher(step.teacher.pruning.host, step.model).eval()
    found = metrics(step, align=0.0, teacher=teacher, distill=DistillWeights(saliency=0.3))
    with collect() as ours:
        step.model(*step.inputs)
    at = {}
    for heat in (1, 2):
        with collect() as theirs:
            answers = teacher_logits(teacher, None, None, 0)
        own, other = ({trace.tower: trace for trace in traces} for traces in (ours, theirs))
        at[heat] = saliency_loss(own, other, answers / heat, seed=0).item()
    assert abs(at[1] - at[2]) > 0.1
    assert found["saliency"].item() == pytest.approx(0.3 * at[2], rel=1e-4)


def test_summaries_are_distilled_relative_to_their_norm(step):
    found = metrics(step, align=0.0, teacher=step.teacher, distill=DistillWeights(summaries=0.6))
    with collect() as ours:
        step.model(*step.inputs)
    with collect() as theirs:
        step.teacher(*step.inputs)
    wanted = 0.0
    for own, other in zip(ours, theirs, strict=True):
        apart = (own.embedding - other.embedding).square().mean()
        wanted += 0.6 * (apart / other.embedding.square().mean()).item()
    assert found["distill"].item() == pytest.approx(wanted, rel=1e-4)


def test_tokens_are_distilled_and_losses_of_what_is_kept_are_added_with_their_weights(step):
    weights = DistillWeights(tokens=0.6)
    found = metrics(step, align=0.0, teacher=step.teacher, distill=weights, trace_losses={"kept_share": 0.2})
    with collect() as ours:
        step.model(*step.inputs)
    with collect() as theirs:
        step.teacher(*step.inputs)
    wanted = sum(0.6 * losses.token_distillation(*pair).item() for pair in zip(ours, theirs, strict=True))
    assert found["distill"].item() == pytest.approx(wanted, rel=1e-4)
    assert found["kept_share"] == 0  # not in soft training
    soften(step.model, 0.5)
    with collect() as traces:
        step.model(*step.inputs)
    shares = [losses.kept_share(trace).item() for trace in traces]
    assert metrics(step, trace_losses={"kept_share": 0.2})["kept_share"].item() == pytest.approx(0.1 * sum(shares))


def test_a_teacher_learns_nothing(step):
    teacher = saliency_teacher(step.teacher.pruning.host, step.model).eval()
    metrics(step, teacher=teacher, distill=DistillWeights(0.7, 0.6, saliency=0.3))["loss"].backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    assert step.model.pruning.guide.anchors.grad.abs().sum() > 0


def test_a_budget_costs_its_multiplier_and_a_square(step):
    found = metrics(step, align=0.0, target_reduction=0.5, multiplier=0.4)
    violation = found["violation"].item()
    cost = vp.count_macs(step.model, *step.inputs)
    towers = dict.fromkeys(cost.towers, 3)  # an image and a text of each of the three records
    ours, dense = (
        sum(float(macs.sum()) / towers[tower] for tower, macs in one.items()) + cost.head
        for one in (cost.towers, cost.dense)
    )
    assert violation == pytest.approx(ours / dense - 0.5, abs=1e-5)
    assert found["budget"].item() == pytest.approx(0.4 * violation + 30 * violation**2, rel=1e-4)


def test_guides_learn_twenty_and_thresholds_fifty_times_as_fast(step):
    """As docs/compress.md says. Adam's first step is as long as the rate; only matrices that were trained before decay."""
    module = TrainModule(step.model, step.objective)
    groups = parameter_groups(module, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            times = 50 if ".keeper." in name else 20 if ".guide." in name else 1
            assert group["lr_multiple"] == times, name
            assert (group["weight_decay"] > 0) == (times == 1 and parameter.ndim > 1), name
    assert {group["lr_multiple"] for group in groups} == {1, 20, 50}
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
