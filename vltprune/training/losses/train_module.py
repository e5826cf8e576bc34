"""Training module: the pruned model, its teacher and all losses of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import precision
from ...cost.sample_cost import SampleCostMeter
from ...data import Record
from ...models.momentum import gather_ranks
from ...pruning import losses
from ...pruning.model import get_pruning
from ...pruning.trace import PruneTrace, collect
from ...utils.frozen import FrozenDict
from .decoding import DecodeWork
from .objectives import Loss, Objective
from .saliency import saliency_loss

_TEMPERATURE = 2.0  # that logits are distilled at
_VIOLATION_WEIGHT = 30.0  # of the squared constraint violation


class ExtraLoss(Protocol):
    """A further loss, for what a data set knows beyond its labels."""

    def __call__(self, records: Sequence[Record], traces: dict[str, PruneTrace]) -> Tensor:
        """The traces of the batch, by tower -> a scalar."""
        ...


@dataclass(frozen=True)
class DistillWeights:
    """Weights of what the teacher teaches.

    Args:
        logits: of T^2 KL of its logits (Hinton et al., arXiv 1503.02531), T = 2.
        summaries: of the squared error of each tower's summary, relative to its size. MADTP++ has both, the error absolute,
            with a weight for each tower.
        saliency: of the scores' distance from what its answers depend on; the teacher is a `saliency_teacher` then.
        tokens: of the squared error of each tower's kept tokens, as `losses.token_distillation`.
    """

    logits: float = 0.0
    summaries: float = 0.0
    saliency: float = 0.0
    tokens: float = 0.0


class TrainModule(nn.Module):
    """Pruned model, objective and a dense teacher, as one module whose forward gives the loss of a batch.

    Args:
        model: the pruned model.
        objective: of its task.
        align: weight of L_align.
        teacher: a dense model that is not trained.
        distill: weights of what it teaches.
        extra: a further loss.
        trace_losses: weights of losses of the pruned towers' traces, by name, as `CompressConfig.losses`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        align: float = 0.1,
        teacher: nn.Module | None = None,
        distill: DistillWeights = DistillWeights(),
        extra: ExtraLoss | None = None,
        trace_losses: Mapping[str, float] = FrozenDict(),
    ):
        super().__init__()
        self.model, self.objective, self.align, self.distill = model, objective, align, distill
        self.extra, self.trace_losses = extra, trace_losses
        self.__dict__["teacher"] = teacher  # no child: it is neither trained nor kept in checkpoints
        self.cost_meter = SampleCostMeter(model)

    def forward(
        self,
        records: Sequence[Any],
        images: Tensor,
        step: int,
        measure_cost: bool = False,
        target_reduction: float | None = None,
        multiplier: float = 0.0,
        decode_work: DecodeWork | None = None,
    ) -> dict[str, Any]:
        """The loss of a batch and its parts.

        Args:
            records: of the batch.
            images: [batch, images a record, 3, height, width].
            step: of the run; what is drawn at random depends on it.
            measure_cost: whether MACs are measured.
            target_reduction: share of the dense MACs that the expected ones should save (None: no loss on them).
            multiplier: Lagrange multiplier of the constraint violation.
            decode_work: of a decoder in evaluation; the cost counts it in place of the training pass.

        Returns:
            `loss`, [] with gradients, and without gradients scalars of those parts that there are: task, align, distill,
            saliency, budget, those of `trace_losses`, extra. With `target_reduction` also `violation`, the share of the dense
            MACs that is too much. With `measure_cost` also macs and dense_macs of an instance, and per tower kept, [1 + depths]
            tokens, and towers, [2] its MACs and dense MACs.
        """
        with collect(threads=False) as traces:
            loss = self.objective(self.model, records, images, step)
        student = self._first_traces(traces)
        metrics: dict[str, Any] = {}
        has_teacher = self.__dict__["teacher"] is not None
        distilled = self._distillation(loss, student, records, images, step) if has_teacher else {}
        parts = {"task": loss.total / _mean_over_processes(loss.count)}
        if self.align and all(_is_guided(trace) for trace in student.values()):
            parts["align"] = self.align * self._alignment(student)
        parts |= distilled
        costed = (
            student if decode_work is None else {name: decode_work.replace_in(trace) for name, trace in student.items()}
        )
        if target_reduction is not None:
            violation = self._expected_share(costed, len(records)) - (1 - target_reduction)
            parts["budget"] = multiplier * violation + _VIOLATION_WEIGHT * violation**2
            metrics["violation"] = violation.detach()
        parts |= self._trace_losses(student)
        if self.extra is not None:
            parts["extra"] = self.extra(records, student)
        metrics |= {name: part.detach() for name, part in parts.items()}
        metrics["loss"] = torch.stack(list(parts.values())).sum()
        return metrics | (self._cost(costed, len(records)) if measure_cost else {})

    def _first_traces(self, traces: Sequence[PruneTrace]) -> dict[str, PruneTrace]:
        """The first trace of each tower of the model itself."""
        towers, student = get_pruning(self.model).towers, {}
        for trace in traces:
            if towers.get(trace.tower) is trace.encoder:
                student.setdefault(trace.tower, trace)
        return student

    def _trace_losses(self, student: dict[str, PruneTrace]) -> dict[str, Tensor]:
        """The losses of traces, each the mean over the towers that are pruned, times its weight."""
        pruned = [trace for trace in student.values() if len(trace.encoder.pruners)]
        return {
            name: weight * torch.stack([losses.TRACE_LOSSES[name](trace) for trace in pruned]).mean()
            for name, weight in self.trace_losses.items()
            if pruned
        }

    def _alignment(self, student: dict[str, PruneTrace]) -> Tensor:
        image, text = student["image"], student.get("text", student.get("language"))
        if text is None:  # captions, that a decoder read
            return losses.alignment(image.aligned, image.caption_aligned)
        return losses.alignment(image.aligned, text.aligned, self.objective.images_per_text)

    def _distillation(
        self, loss: Loss, student: dict[str, PruneTrace], records: Sequence[Any], images: Tensor, step: int
    ) -> dict[str, Tensor]:
        """What the teacher teaches: distill, and saliency."""
        weights = self.distill
        with torch.set_grad_enabled(weights.saliency > 0), collect(threads=False) as traces:
            outputs = self.objective.teacher_logits(self.__dict__["teacher"], records, images, step)
        teacher = {trace.tower: trace for trace in reversed(traces)}
        parts = {}
        if weights.saliency and outputs is not None:
            softened = outputs / _TEMPERATURE
            parts["saliency"] = weights.saliency * saliency_loss(
                student, teacher, softened, step, _rows_before(outputs)
            )
        if weights.logits or weights.summaries or weights.tokens:
            parts["distill"] = self._distill(loss, student, teacher, None if outputs is None else outputs.detach())
        return parts

    def _distill(
        self, loss: Loss, student: dict[str, PruneTrace], teacher: dict[str, PruneTrace], outputs: Tensor | None
    ) -> Tensor:
        weights, total = self.distill, loss.total.new_zeros(())
        # a language model has no trace where its own code runs
        student = {tower: trace for tower, trace in student.items() if tower in teacher}
        for tower, trace in student.items() if weights.summaries else ():
            summary = teacher[tower].embedding.detach()
            total = total + weights.summaries * F.mse_loss(trace.embedding, summary) / summary.square().mean()
        for tower, trace in student.items() if weights.tokens else ():
            total = total + weights.tokens * losses.token_distillation(trace, teacher[tower])
        if weights.logits and outputs is not None and loss.outputs is not None:
            ours, target = ((logits / _TEMPERATURE).log_softmax(-1) for logits in (loss.outputs, outputs))
            divergence = F.kl_div(ours, target, reduction="batchmean", log_target=True)
            total = total + weights.logits * _TEMPERATURE**2 * divergence
        return total

    def _expected_share(self, student: dict[str, PruneTrace], batch: int) -> Tensor:
        """The expected MACs of an instance, an image and one text, as a share of the dense ones; with gradients."""
        cost = self.cost_meter.meter(list(student.values()))
        units = {tower: batch if tower == "image" else macs.shape[1] for tower, macs in cost.dense.items()}
        ours, dense = (
            torch.stack([macs.sum() / units[tower] for tower, macs in one.items()]).sum()
            + cost.head
            + decoder / cost.instances
            for one, decoder in ((cost.towers, cost.decoder), (cost.dense, cost.dense_decoder))
        )
        return ours / dense

    @torch.no_grad()
    def _cost(self, student: dict[str, PruneTrace], batch: int) -> dict[str, Any]:
        texts = student["text"].input_tokens.layout.batch // batch if "text" in student else 1
        costs = self.cost_meter(list(student.values()), [texts] * batch)
        device = next(self.model.parameters()).device

        def mean(rows: Sequence[Any]) -> Tensor:
            return precision.float_tensor(rows, device).mean(0)

        return {
            "macs": mean([one.macs for one in costs]),
            "dense_macs": mean([one.dense_macs for one in costs]),
            "kept": {tower: mean([one.kept[tower] for one in costs]) for tower in student},
            "towers": {tower: mean([one.towers[tower] for one in costs]) for tower in student},
        }


def _is_guided(trace: PruneTrace) -> bool:
    """Whether the tower has a guide with anchors of its own, and prunes somewhere: alignment needs both towers' anchors."""
    guide = trace.encoder.guide
    return guide is not None and not guide.queried and any(step.guidance is not None for step in trace.layers)


def _rows_before(outputs: Tensor) -> int:
    """How many rows the processes before this one have."""
    rows = gather_ranks(torch.tensor([len(outputs)], device=outputs.device))
    return int(rows[: dist.get_rank()].sum()) if len(rows) > 1 else 0


def _mean_over_processes(count: Tensor) -> Tensor:
    """A process's share of what all of them count, so that the mean of their gradients is that of all units together."""
    return gather_ranks(count[None]).float().mean()
