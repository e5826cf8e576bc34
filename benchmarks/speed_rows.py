"""The rows of the table of speed: a dense model, and models that spend fewer MACs, each by its name."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import rivals
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vltprune as vp

Inputs = tuple[Tensor, ...]


class Skipped(Exception):
    """A row that cannot be measured here, with the reason."""


@dataclass(frozen=True)
class Subject:
    """A dense model in evaluation mode, and the batch that it is timed on.

    Attributes:
        name: the model's name.
        model: the dense model.
        inputs: its positional inputs.
    """

    name: str
    model: nn.Module
    inputs: Inputs


@dataclass(frozen=True)
class Row:
    """A model to time.

    Attributes:
        name: the row's name.
        model: the model.
        dense_macs: what the dense model spends on the batch, padding included.
        macs: what this one spends.
        lengths: tokens of each instance behind the last block; empty where all have the same.
    """

    name: str
    model: nn.Module
    dense_macs: float
    macs: float
    lengths: tuple[int, ...] = ()

    @property
    def mac_speedup(self) -> float:
        return self.dense_macs / self.macs

    @property
    def spread(self) -> float:
        """The standard deviation of tokens behind the last block, relative to their mean."""
        return statistics.pstdev(self.lengths) / statistics.fmean(self.lengths) if self.lengths else 0.0


def subject(name: str, batch: int, device: str = "cpu", **options: Any) -> Subject:
    """Builds a dense model with random weights and draws a batch for it.

    Args:
        name: "bert" for the BERT base of transformers, on texts of 32 to 128 tokens; otherwise as `vltprune.create_model`
            takes it. CLIP gets texts of 8 to 77 tokens, BLIP NLVR two images and a sentence of 18 tokens
            without a mask.
        batch: instances.
        device: where both lie.
        **options: of the backbone, such as `img_size`.

    Returns:
        The Subject.
    """
    model, inputs = _bert(batch) if name == "bert" else _by_name(name, batch, options)
    return Subject(name, model.eval().to(device), tuple(one.to(device) for one in inputs))


def _bert(batch: int) -> tuple[nn.Module, Inputs]:
    import transformers

    lengths = torch.randint(32, 129, (batch, 1))
    lengths[0] = 128
    ids = torch.randint(1000, 30000, (batch, 128))
    return transformers.BertModel(transformers.BertConfig()), (ids, (torch.arange(128) < lengths).long())


def _by_name(name: str, batch: int, options: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    model = vp.create_model(name, **options)
    if name.startswith("blip_nlvr"):
        images = torch.randn(batch, 2, 3, *model.visual.patch_embed.img_size)
        return model, (images, torch.randint(1, len(model.text.word.weight), (batch, 18)))
    if isinstance(getattr(model, "visual", None), nn.Module):
        length, end = model.context_length, model.vocab_size - 1
        texts = torch.randint(1, end, (batch, length))
        ends = torch.randint(7, length, (batch, 1))
        # behind the end of a text there is padding, 0
        texts = texts.masked_fill(torch.arange(length) > ends, 0).scatter(1, ends, end)
        return model, (torch.randn(batch, 3, *_pair(model.visual.image_size)), texts)
    return model, (torch.randn(batch, 3, *model.patch_embed.img_size),)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def build(name: str, dense: Subject, reduction: float = 0.5, spread: float = 0.25) -> Row:
    """Builds a row at a cost.

    Args:
        name: a key of ROWS, or the name of a preset, which is taken as it is.
        dense: the dense model and its batch.
        reduction: the fraction of the dense MACs to save.
        spread: half the width of the interval from which `madtp` draws each instance's ratio.

    Returns:
        The row, with the MACs that it spends on the batch.

    Raises:
        Skipped: where the model has no such row.
    """
    if name in ROWS:
        return ROWS[name](dense, reduction, spread)
    if name in vp.presets.names():
        return _pruned(name, dense, reduction, name)
    raise Skipped(f"no row is called {name!r}: write one of {', '.join(ROWS)}, or a preset")


def _keep_all(dense: Subject, reduction: float, spread: float) -> Row:
    return _counted("keep-all", dense, vp.prune(dense.model, "madtp", keep="ratio(ratio=1.0)"))


def _no_block(dense: Subject, reduction: float, spread: float) -> Row:
    return _counted("no-block", dense, vp.prune(dense.model, "evit", at={}))


def _evit(dense: Subject, reduction: float, spread: float) -> Row:
    # EViT's scores at all blocks, so that any cost can be reached
    config = vp.PruneConfig(scorer="mean_cls_attention", keep="ratio(ratio=0.7)", reducer="drop")
    return _pruned("evit", dense, reduction, config)


def _madtp(dense: Subject, reduction: float, spread: float) -> Row:
    # an untrained guide has no spread of its own, so that counts are drawn
    return _pruned("madtp", dense, reduction, "madtp", keep=f"random_ratio(half_width={spread})")


def _madtp_threshold(dense: Subject, reduction: float, spread: float) -> Row:
    return _pruned("madtp-threshold", dense, reduction, "madtp")


def _madtp_frozen(dense: Subject, reduction: float, spread: float) -> Row:
    adaptive = _madtp(dense, reduction, spread).model
    return _counted("madtp-frozen", dense, vp.freeze(adaptive, [dense.inputs]).model)


def _limit(dense: Subject, reduction: float, spread: float) -> Row:
    return _rival("limit", dense, reduction, rivals.Sliced)


def _tome(dense: Subject, reduction: float, spread: float) -> Row:
    return _rival("tome", dense, reduction, rivals.MinimalToMe)


ROWS: Mapping[str, Callable[[Subject, float, float], Row]] = {
    "no-block": _no_block,
    "keep-all": _keep_all,
    "limit": _limit,
    "tome": _tome,
    "evit": _evit,
    "madtp": _madtp,
    "madtp-threshold": _madtp_threshold,
    "madtp-frozen": _madtp_frozen,
}


def _pruned(name: str, dense: Subject, reduction: float, preset: vp.PruneConfig | str, **parts: Any) -> Row:
    model = vp.prune(dense.model, preset, **parts)
    # where counts depend on lengths alone, equal instances cost the same, and one is enough
    equal = len(dense.inputs) == 1 and all(pruner.keeper.fixed for pruner in model.pruners.values())
    batches = [tuple(one[:1] if equal else one for one in dense.inputs)]
    guide = model.pruning.guide
    if guide is not None and guide.is_untrained:
        vp.fit_guide(model, batches, progress=False)
    try:
        vp.calibrate(model, batches, reduction, tolerance=0.05, progress=False)
    except vp.BudgetError as error:
        # the counts of few images jump over a cost; what is realized is judged at the cost that is reached
        if abs(error.nearest.reduction - reduction) > 0.1:
            raise Skipped(str(error)) from None
        vp.measure(model, batches, error.nearest.value)
    return _counted(name, dense, model)


def _counted(name: str, dense: Subject, model: nn.Module) -> Row:
    with torch.inference_mode(), vp.collect() as traces:
        model(*dense.inputs)
    cost = vp.CostMeter(model)(traces)
    return Row(name, model, cost.padded_total, cost.total, tuple(traces[0].lengths[-1]))


def _rival(name: str, dense: Subject, reduction: float, kind: type[rivals.Sliced] | type[rivals.MinimalToMe]) -> Row:
    vit = dense.model
    if type(vit) is not VisionTransformer:
        raise Skipped(f"{name} is written for VisionTransformer of timm alone")
    counts = rivals.schedule(vit, reduction)
    batch = len(dense.inputs[0])
    whole = rivals.macs(vit, rivals.counts_at(vit, 1.0))
    return Row(name, kind(vit, counts), batch * whole, batch * rivals.macs(vit, counts))
