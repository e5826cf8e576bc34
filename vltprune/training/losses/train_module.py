"""The training module: the pruned model, its teacher and all losses of a step, as one module."""

from __future__ import annotations

from collections.abc import Sequence
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
from .decoding import Searched
from .objectives import Loss, Objective
from .saliency import saliency

_HEAT = 2.0  # the temperature that logits are taught at
_BUDGET = 30.0  # weight of the squared share that the expected cost is off


class Extra(Protocol):
    """A further loss, for what a data set knows beyond its labels."""

    def __call__(self, records: Sequence[Record], traces: dict[str, PruneTrace]) -> Tensor:
        """The traces of the batch, by tower -> a scalar."""
        ...


class Student(nn.Module):
    """A pruned model, its objective, and a dense teacher that is not trained.

    align: weight of L_align. taught: of what the teacher teaches: T^2 KL of its logits, and the squared error of each tower's
    summaries, relative to their size (MADTP++ has both, the error absolute, with a weight for each tower). saliency: weight
    of what it teaches the scores; the teacher then is one of `saliency.watched`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        align: float = 0.1,
        teacher: nn.Module | None = None,
        taught: tuple[float, float] = (0.0, 0.0),
        saliency: float = 0.0,
        extra: Extra | None = None,
    ):
        super().__init__()
        self.model, self.objective, self.align, self.taught = model, objective, align, taught
        self.saliency, self.extra = saliency, extra
        self.__dict__["teacher"] = teacher  # no child: it is neither trained nor kept in checkpoints
        self.cost_meter = SampleCostMeter(model)

    def forward(
        self,
        records: Sequence[Any],
        images: Tensor,
        step: int,
        measured: bool = False,
        saving: float | None = None,
        price: float = 0.0,
        searched: Searched | None = None,
    ) -> dict[str, Any]:
        """The loss of a batch, [] with gradients, and what it consists of, without.

        saving: the share of the dense MACs that the expected ones should be below (None: no loss on them), and price, what
        a share too much costs besides. Returns scalars, those that there are of loss, task, align, distill, budget, extra,
        and `over`, the share too much; measured: also macs, dense_macs, of an instance, and per tower kept, [1 + depths],
        and towers, [2], its MACs and dense MACs, as of `SampleCostMeter`.
        """
        with collect(threads=False) as traces:
            loss = self.objective(self.model, records, images, step)
        own, has_teacher = self._own(traces), self.__dict__["teacher"] is not None
        taught = self._taught(loss, own, records, images, step) if has_teacher else {}
        figures: dict[str, Any] = {}
        parts = {"task": loss.total / _mean_over_processes(loss.count)}
        if self.align and all(_is_guided(trace) for trace in own.values()):
            parts["align"] = self.align * self._alignment(own)
        parts |= taught
        counted = own if searched is None else {tower: searched.instead(trace) for tower, trace in own.items()}
        if saving is not None:
            over = self._share(counted, len(records)) - (1 - saving)
            parts["budget"] = price * over + _BUDGET * over**2
            figures["over"] = over.detach()
        if self.extra is not None:
            parts["extra"] = self.extra(records, own)
        figures |= {name: part.detach() for name, part in parts.items()}
        figures["loss"] = torch.stack(list(parts.values())).sum()
        return figures | (self._cost(counted, len(records)) if measured else {})

    def _own(self, traces: Sequence[PruneTrace]) -> dict[str, PruneTrace]:
        """The first trace of each tower of the model itself."""
        towers, own = get_pruning(self.model).towers, {}
        for trace in traces:
            if towers.get(trace.tower) is trace.encoder:
                own.setdefault(trace.tower, trace)
        return own

    def _alignment(self, own: dict[str, PruneTrace]) -> Tensor:
        image = own["image"]
        if "text" not in own:  # captions, that a decoder read
            return losses.alignment(image.aligned, image.caption_aligned)
        return losses.alignment(image.aligned, own["text"].aligned, self.objective.images)

    def _taught(
        self, loss: Loss, own: dict[str, PruneTrace], records: Sequence[Any], images: Tensor, step: int
    ) -> dict[str, Tensor]:
        """What the teacher teaches: distill, and saliency where the scores are taught."""
        with torch.set_grad_enabled(self.saliency > 0), collect(threads=False) as traces:
            outputs = self.objective.teach(self.__dict__["teacher"], records, images, step)
        theirs = {trace.tower: trace for trace in reversed(traces)}
        parts = {}
        if self.saliency and outputs is not None:
            parts["saliency"] = self.saliency * saliency(own, theirs, outputs / _HEAT, step, _rows_before(outputs))
        if any(self.taught):
            outputs = None if outputs is None else outputs.detach()
            parts["distill"] = self._distil(loss, own, theirs, outputs)
        return parts

    def _distil(
        self, loss: Loss, own: dict[str, PruneTrace], theirs: dict[str, PruneTrace], outputs: Tensor | None
    ) -> Tensor:
        of_logits, of_summaries = self.taught
        total = loss.total.new_zeros(())
        for tower, trace in own.items() if of_summaries else ():
            right = theirs[tower].embedding.detach()
            total = total + of_summaries * F.mse_loss(trace.embedding, right) / right.square().mean()
        if of_logits and outputs is not None and loss.outputs is not None:
            ours, target = ((part / _HEAT).log_softmax(-1) for part in (loss.outputs, outputs))
            divergence = F.kl_div(ours, target, reduction="batchmean", log_target=True)
            total = total + of_logits * _HEAT**2 * divergence
        return total

    def _share(self, own: dict[str, PruneTrace], batch: int) -> Tensor:
        """The expected MACs of an instance, an image and one text, as a share of the dense ones; with gradients."""
        cost = self.cost_meter.meter(list(own.values()))
        units = {tower: batch if tower == "image" else macs.shape[1] for tower, macs in cost.dense.items()}
        ours, dense = (
            torch.stack([macs.sum() / units[tower] for tower, macs in one.items()]).sum()
            + cost.head
            + decoder / cost.instances
            for one, decoder in ((cost.towers, cost.decoder), (cost.dense, cost.dense_decoder))
        )
        return ours / dense

    @torch.no_grad()
    def _cost(self, own: dict[str, PruneTrace], batch: int) -> dict[str, Any]:
        texts = own["text"].input_tokens.layout.batch // batch if "text" in own else 1
        spent = self.cost_meter(list(own.values()), [texts] * batch)
        device = next(self.model.parameters()).device

        def mean(rows: Sequence[Any]) -> Tensor:
            return precision.float_tensor(rows, device).mean(0)

        return {
            "macs": mean([one.macs for one in spent]),
            "dense_macs": mean([one.dense_macs for one in spent]),
            "kept": {tower: mean([one.kept[tower] for one in spent]) for tower in own},
            "towers": {tower: mean([one.towers[tower] for one in spent]) for tower in own},
        }


def _is_guided(trace: PruneTrace) -> bool:
    """Whether the tower has a guide, and prunes somewhere: alignment needs both towers' anchors."""
    return any(step.guidance is not None for step in trace.layers)


def _rows_before(outputs: Tensor) -> int:
    """How many rows the processes before this one have."""
    rows = gather_ranks(torch.tensor([len(outputs)], device=outputs.device))
    return int(rows[: dist.get_rank()].sum()) if len(rows) > 1 else 0


def _mean_over_processes(count: Tensor) -> Tensor:
    """A process's share of what all of them count, so that the mean of their gradients is that of all units together."""
    return gather_ranks(count[None]).float().mean()
