"""SampleCostMeter: MACs and kept tokens of each record, from the traces of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core import precision
from ..pruning.model import PrunedModel, find_pruning
from ..pruning.prune import prune_towers
from ..pruning.trace import PruneTrace
from ..utils.wrappers import unwrapped
from .macs import CostMeter


@dataclass(frozen=True)
class SampleCost:
    """MACs of one record: its images, and one of its texts (their mean, where it has several).

    Attributes:
        macs: MACs of the model.
        dense_macs: MACs of the dense model on the tokens that are there, without padding.
        towers: per tower, MACs and dense MACs of one image or text.
        instances: per tower, how many of the record's images or texts `macs` are of.
        kept: per tower, tokens that entered, then tokens leaving each block: means over the record's images or texts.
        padding: MACs that the dense model spends on padding besides.
        tower_padding: per tower, the same of one image or text.
    """

    macs: float
    dense_macs: float
    towers: Mapping[str, tuple[float, float]]
    instances: Mapping[str, int]
    kept: Mapping[str, tuple[float, ...]]
    padding: float
    tower_padding: Mapping[str, float]


class SampleCostMeter:
    """Counts the MACs of each record of a batch.

    Args:
        model: a dense or pruned model.

    Attributes:
        model: what to run for its traces: the model itself, or a dense one pruned so that it keeps all tokens.
        is_dense: whether the given model is dense.
        meter: the CostMeter of `model`.
    """

    def __init__(self, model: nn.Module):
        self.is_dense = find_pruning(model) is None
        self.model = keep_all(model) if self.is_dense else model
        self.meter = CostMeter(self.model)

    def __call__(self, traces: Sequence[PruneTrace], texts: Sequence[int]) -> list[SampleCost]:
        """The costs of a batch, one a record.

        Args:
            traces: of the calls that answered the batch, one a tower.
            texts: how many texts each record has.

        Returns:
            One SampleCost per record, in order.

        Raises:
            ValueError: for several traces of one tower.
        """
        names = [trace.tower for trace in traces]
        if len(set(names)) != len(names):
            raise ValueError(
                f"a batch was answered by several calls of one tower ({', '.join(names)}): measure each call alone"
            )
        cost = self.meter(traces)
        dense = self._per_record(cost.dense, texts)
        pruned = dense if self.is_dense else self._per_record(cost.towers, texts)
        padding = self._per_record(cost.padding, texts)
        behind = cost.head + cost.dense_decoder / cost.instances
        behind_pruned = behind if self.is_dense else cost.head + cost.decoder_total / cost.instances
        kept = {trace.tower: self._tokens_per_record(trace, texts) for trace in traces}
        counts = {tower: macs.shape[-1] // len(texts) if tower == "image" else 1 for tower, macs in cost.dense.items()}

        def total(towers: Mapping[str, Tensor], record: int) -> float:
            return sum(counts[tower] * float(macs[record]) for tower, macs in towers.items())

        return [
            SampleCost(
                total(pruned, i) + behind_pruned,
                total(dense, i) + behind,
                {tower: (float(pruned[tower][i]), float(macs[i])) for tower, macs in dense.items()},
                counts,
                {tower: tuple(lengths[i].tolist()) for tower, lengths in kept.items()},
                total(padding, i) + cost.decoder_padding / cost.instances,
                {tower: float(macs[i]) for tower, macs in padding.items()},
            )
            for i in range(len(texts))
        ]

    def _per_record(self, towers: Mapping[str, Tensor], texts: Sequence[int]) -> dict[str, Tensor]:
        """Per tower [records]: MACs of one of its instances, the mean over a record's."""
        return {
            tower: _means(macs.detach().sum(0).cpu(), _sizes(tower, macs.shape[-1], texts))
            for tower, macs in towers.items()
        }

    def _tokens_per_record(self, trace: PruneTrace, texts: Sequence[int]) -> Tensor:
        """[records, 1 + depths]"""
        hard = [precision.float_tensor(step.lengths, torch.device("cpu")) for step in trace.layers]
        behind = [
            one if s.expected is None else s.expected.detach().cpu() for s, one in zip(trace.layers, hard, strict=True)
        ]
        lengths = torch.stack([trace.input_tokens.expected.detach().cpu().to(behind[0].dtype), *behind])
        return _means(lengths, _sizes(trace.tower, lengths.shape[-1], texts)).T


def keep_all(model: nn.Module) -> PrunedModel:
    """A dense model pruned so that it keeps all tokens, as CostMeter needs it."""
    return prune_towers(unwrapped(model), "random", keep="ratio(ratio=1.0)")


def _sizes(tower: str, instances: int, texts: Sequence[int]) -> list[int]:
    """How many of a tower's instances belong to each record."""
    return [instances // len(texts)] * len(texts) if tower == "image" else list(texts)


def _means(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """[..., instances] -> [..., records]"""
    return torch.stack([part.mean(-1) for part in values.split(list(sizes), -1)], -1)
