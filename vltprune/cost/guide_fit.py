"""fit_guide: places a guide's anchors among the tokens of a model by k-means, without training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sized

import torch
from torch import Tensor, nn

from ..core.tokens import PackedTokens
from ..layers import Ratio
from ..pruning.model import get_pruning
from ..pruning.pruner import Pruner, UntrainedGuideWarning
from ..pruning.trace import collect
from ..utils.modes import evaluating
from ..utils.progress import bar, counted
from .inputs import Batch, Inputs, model_inputs, run_batch


def fit_guide(
    model: nn.Module,
    batches: Iterable[Batch],
    seed: int = 0,
    points: int = 20_000,
    *,
    inputs: Inputs = None,
    progress: bool | None = None,
) -> None:
    """Places the anchors of a pruned model's guide among its own tokens, by k-means over those of all towers and depths.

    For use without training: the anchors of an untrained codebook are noise. Nothing is pruned meanwhile.

    Args:
        model: a pruned model with a guide.
        batches: a DataLoader or a list of batches, as `calibrate` takes them. They are run once.
        seed: the seed of the sampling of tokens and of k-means.
        points: how many tokens are held at most, as many of each tower. Later batches give more of them.
        inputs: which part of a batch the model takes, as in `calibrate`.
        progress: whether to show a progress bar on stderr; None shows it where stderr is a terminal.

    Raises:
        ValueError: for a model without a guide, no batches, or fewer tokens than anchors.
        TypeError: for a dense model, and for batches that the model does not take.
    """
    guide = get_pruning(model).guide
    if guide is None:
        raise ValueError("this model has no guide to fit: prune it with guide='codebook'")
    if guide.queried:
        raise ValueError(
            f"{type(guide).__name__} has no anchors to fit, because they are the text that vltprune.query gives: leave out "
            "fit_guide"
        )
    generator, points_per_tower = torch.Generator("cpu").manual_seed(seed), points // len(get_pruning(model).towers)
    sampled: dict[str, Tensor] = {}
    total = len(batches) if isinstance(batches, Sized) else None
    with (
        bar("placing the guide's anchors", total, disable=None if progress is None else not progress) as shown,
        evaluating(model),
        torch.no_grad(),
        collect(threads=False) as traces,
        _keeping_all(model),
    ):
        for batch in counted(model_inputs(batches, inputs), shown):
            run_batch(model, batch)
            for trace in traces:
                fresh = [_free(step.guidance.mapped) for step in trace.layers if step.guidance is not None]
                if not fresh:
                    continue  # this tower prunes nowhere
                tokens = torch.cat([sampled[trace.tower], *fresh] if trace.tower in sampled else fresh)
                order = torch.randperm(len(tokens), generator=generator, device="cpu")
                sampled[trace.tower] = tokens[order[:points_per_tower].to(tokens.device)]
            traces.clear()
    if not sampled:
        raise ValueError("fit_guide needs at least one batch of inputs")
    guide.fit(torch.cat(list(sampled.values())), seed)


@contextlib.contextmanager
def _keeping_all(model: nn.Module) -> Iterator[None]:
    """Within the `with` block every token stays; scores and guidance are computed still."""
    keepers = []
    for pruner in [
        m for tower in get_pruning(model).towers.values() for m in tower.pruners.modules() if isinstance(m, Pruner)
    ]:
        keepers.append((pruner, pruner.keeper))
        pruner.keeper = Ratio(pruner.scorer.spec, ratio=1.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedGuideWarning)  # of no matter where everything stays
            yield
    finally:
        for pruner, keeper in keepers:
            pruner.keeper = keeper


def _free(tokens: PackedTokens) -> Tensor:
    return tokens.x[tokens.free]
