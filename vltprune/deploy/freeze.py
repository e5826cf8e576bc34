"""freeze: turns the counts that a pruned model keeps per instance into fixed counts per layer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import segments
from ..cost.calibration import measure
from ..cost.describe import format_change, percent
from ..cost.inputs import Batch, Inputs, model_inputs, run_batch
from ..cost.savings import Calibration
from ..pruning.config import PruneConfig
from ..pruning.current_config import current_config
from ..pruning.encoder import PrunedEncoder, Pruning
from ..pruning.model import PrunedModel, get_pruning
from ..pruning.part import Part
from ..pruning.prune import prune_towers
from ..pruning.pruner import Pruner
from ..pruning.stage import Stage
from ..pruning.tower import pruner_key
from ..utils.table import table
from ..utils.wrappers import unwrapped
from .finish import check_unfinished
from .outputs import OutputChange

_Key = tuple[str, str]  # tower, and the pruner's name in it


@dataclass(frozen=True)
class LayerCounts:
    """The count of one pruned layer, and what it was per instance before.

    Attributes:
        tower: the tower's name.
        depth: the index of the block.
        stage: the number of the config's stage.
        mean: the mean number of unprotected tokens that stayed, over the instances of all batches.
        least, most: the smallest and the largest number.
        count: the number that stays now, or all tokens where there are fewer.
        changed: the fraction of the instances that had another number.
    """

    tower: str
    depth: int
    stage: int
    mean: float
    least: int
    most: int
    count: int
    changed: float


@dataclass(frozen=True)
class FixedCounts:
    """What `freeze` returns: the model with fixed counts, and what changed. `print` shows it as a table.

    Attributes:
        model: the pruned model with fixed counts.
        layers: the layers whose counts were fixed; none where all counts were fixed before.
        before: MACs of the model with counts per instance, on the batches.
        after: MACs of the model with fixed counts, on the same batches.
        outputs: how far the outputs on these batches moved.
    """

    model: PrunedModel = field(repr=False)
    layers: tuple[LayerCounts, ...]
    before: Calibration
    after: Calibration
    outputs: OutputChange

    def __str__(self) -> str:
        if not self.layers:
            return "all counts were fixed before: nothing changed"
        stages = {layer.stage for layer in self.layers}
        rows = [["layer", "mean", "least", "most", "fixed", "changed for"]]
        for layer in self.layers:
            name = f"{layer.tower} {layer.depth}" + (f" stage {layer.stage}" if len(stages) > 1 else "")
            numbers = [f"{layer.mean:.1f}", *map(str, (layer.least, layer.most, layer.count))]
            rows.append([name, *numbers, percent(layer.changed)])
        costs = [format_change(one.macs, one.dense_macs) for one in (self.before, self.after)]
        towers = self.model.pruning.towers
        unread = [name for name, tower in towers.items() if len(tower.pruners) and name not in self.before.towers]
        left = "".join(f"\nno batch ran the {name} tower, which stays as it is" for name in unread)
        return f"{table(rows)}{left}\nMACs: {costs[1]} than dense; before, {costs[0]}\noutputs: {self.outputs}"


def freeze(
    model: nn.Module, batches: Iterable[Batch], quantile: float | None = None, *, inputs: Inputs = None
) -> FixedCounts:
    """Turns the counts that a pruned model keeps per instance into fixed counts per layer, for engines that need fixed shapes.

    Each layer of an adaptive keeper gets the keeper `counts`, with the number of tokens that it keeps on `batches`. All other
    parts stay, with their trained weights. Layers whose counts are fixed already stay as they are.

    Args:
        model: a pruned model, wrapped or not, calibrated to its cost. It is unchanged.
        batches: a DataLoader or a list of batches like those that the model will get, as `calibrate` takes them. They are held
            in memory and run twice.
        quantile: in [0, 1]; the count of a layer is this quantile over the instances, such as 0.9 to keep enough for nine of
            ten. None is the mean, rounded.
        inputs: which part of a batch the model takes, as in `calibrate`.

    Returns:
        The model with fixed counts, and what changed. The model shares the dense weights with `model`; guide and pruners are
        copies. An instance that has fewer unprotected tokens than a layer's count keeps all of them there.

    Raises:
        ValueError: for a quantile outside [0, 1], no batches, batches that run none of these layers, a selector that keeps
            fewer tokens than it is told, and pruners that no config describes.
        TypeError: for a dense model, for one of `finish`, and for batches that the model does not take.
    """
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile} must lie in 0 .. 1, or be None for the mean: it is taken over instances")
    model = unwrapped(model)
    check_unfinished(
        model, "freeze the model that it was made from, and finish the result, vltprune.finish(frozen.model)"
    )
    record = get_pruning(model)
    config = current_config(record.config, record.towers)
    for stage in config.stages:
        _check_selectors(stage, record.towers)
    held = list(model_inputs(batches, inputs))
    if not held:
        raise ValueError("freeze needs at least one batch of inputs")

    with _recording(record.towers) as counts:
        before, former = _measured(model, held)
    layers = tuple(_layer(key, kept, quantile) for key, kept in counts.items())
    frozen = prune_towers(record.host, _with_counts(config, layers, record.towers))
    _copy_parts(record, frozen.pruning)
    after, outputs = _measured(frozen, held)
    return FixedCounts(frozen, layers, before, after, OutputChange.between(former, outputs))


def _check_selectors(stage: Stage, towers: Mapping[str, PrunedEncoder]) -> None:
    """ValueError for a selector whose counts depend on what tokens hold."""
    pruners = (pruner for tower in towers.values() for pruner in tower.pruners.values())
    if any(isinstance(pruner, Pruner) and not pruner.selector.fixed for pruner in pruners):
        raise ValueError(
            f"selector={stage.describe('selector')!r} keeps fewer tokens than its keeper says, by what they hold, so that no "
            "count can be fixed: prune with selector='top', calibrate it, and freeze that model"
        )


@contextlib.contextmanager
def _recording(towers: Mapping[str, PrunedEncoder]) -> Iterator[dict[_Key, list[Tensor]]]:
    """Within the `with` block, gathers what adaptive keepers count: [instances] of each call, by pruner.

    At its end pruners that were not called are left out. ValueError where none was called.
    """
    counts: dict[_Key, list[Tensor]] = {}

    def record(key: _Key, keeper: nn.Module, arguments: tuple[Any, ...], kept: Tensor) -> None:
        tokens = arguments[1]
        counts[key].append(kept.minimum(segments.count(tokens.free, tokens.layout)).cpu())

    with contextlib.ExitStack() as stack:
        for name, tower in towers.items():
            for key, pruner in tower.pruners.items():
                if isinstance(pruner, Pruner) and not pruner.keeper.fixed:
                    counts[name, key] = []
                    stack.enter_context(pruner.keeper.register_forward_hook(partial(record, (name, key))))
        yield counts
    idle = [key for key, kept in counts.items() if not kept]
    if idle and len(idle) == len(counts):
        raise ValueError(f"none of the batches ran the {idle[0][0]} tower: give inputs that it reads")
    for key in idle:
        del counts[key]


def _measured(model: nn.Module, batches: Sequence[Batch]) -> tuple[Calibration, list[object]]:
    """The mean MACs of batches, and the model's output for each."""
    outputs: list[object] = []

    def call(model: nn.Module, batch: Batch) -> None:
        outputs.append(run_batch(model, batch))

    return measure(model, [partial(call, batch=batch) for batch in batches]), outputs


def _layer(key: _Key, kept: Sequence[Tensor], quantile: float | None) -> LayerCounts:
    """The count of a layer from the numbers that it kept, [instances] of each call."""
    numbers = torch.cat([*kept]).double()
    mean = float(numbers.mean())
    # an observed number, so that enough stays for that part of the instances
    count = math.floor(mean + 0.5) if quantile is None else int(numbers.quantile(quantile, interpolation="higher"))
    (tower, name), changed = key, float((numbers != count).double().mean())
    depth, _, stage = name.partition(":")
    return LayerCounts(tower, int(depth), int(stage or 0), mean, int(numbers.min()), int(numbers.max()), count, changed)


def _with_counts(
    config: PruneConfig, layers: Sequence[LayerCounts], towers: Mapping[str, PrunedEncoder]
) -> PruneConfig:
    """The config with the keeper `counts` in the stages and towers of these layers."""
    stages = []
    for number, stage in enumerate(config.stages):
        keep = {name: stage.part("keep", name) for name in towers if _prunes(towers[name], number)}
        for name in keep:
            counts = {layer.depth: layer.count for layer in layers if (layer.tower, layer.stage) == (name, number)}
            if counts:
                keep[name] = Part("counts", {"counts": _by_block(counts)})
        parts = list(keep.values())
        if parts:
            one_for_all = all(part == parts[0] for part in parts) and not isinstance(stage.keep, Mapping)
            stage = dataclasses.replace(stage, keep=parts[0] if one_for_all else keep)
        stages.append(stage)
    return config.with_stages(stages)


def _prunes(tower: PrunedEncoder, stage: int) -> bool:
    """Whether a stage prunes a tower."""
    return any(pruner_key(depth, stage) in tower.pruners for depth in range(len(tower.adapter.blocks(tower.host))))


def _by_block(counts: Mapping[int, int]) -> tuple[int, ...]:
    """A count for each block up to the last one; that of a block that is not pruned, which is not read, is its neighbor's."""
    known = sorted(counts)
    return tuple(
        counts[max((depth for depth in known if depth <= block), default=known[0])] for block in range(known[-1] + 1)
    )


def _copy_parts(old: Pruning, new: Pruning) -> None:
    """Copies the weights of the guide and of all parts but keepers that were exchanged."""
    if old.guide is not None and new.guide is not None:
        new.guide.load_state_dict(old.guide.state_dict())
    for name, tower in new.towers.items():
        for key, pruner in tower.pruners.items():
            former = old.towers[name].pruners[key]
            for part, module in pruner.named_children():
                source = getattr(former, part)
                if type(unwrapped(source)) is type(module):
                    module.load_state_dict(unwrapped(source).state_dict())
