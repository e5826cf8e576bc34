"""Losses of pruned training besides the task's own: alignment of towers, and what trained methods ask of what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from einops import reduce, repeat
from torch import Tensor

from ..core import precision, segments
from ..core.tokens import PackedTokens
from ..layers import Halting, Ratio
from .trace import PruneStep, PruneTrace

_EPS = 1e-10


def alignment(image: Tensor, text: Tensor, images: int = 1) -> Tensor:
    """MADTP's alignment loss (arXiv 2403.02991, section 3.2): 1 - cosine of the anchors' pooled tokens of two towers.

    Args:
        image: [groups * images, anchors, dim], `PruneTrace.aligned` of the image tower. A group is one or more consecutive
            images that k consecutive sentences describe.
        text: [groups * k, anchors, dim], `PruneTrace.aligned` of the text tower, or of the language model.
        images: the number of images of a group, which are averaged first. NLVR2 has 2.

    Returns:
        The mean over sentences and anchors, a scalar.

    Raises:
        ValueError: for batches that do not fit together.
    """
    groups = len(image) // images
    if len(image) % images or groups == 0 or len(text) % groups:
        raise ValueError(
            f"{len(text)} sentences cannot be aligned with {len(image)} images at {images} images a sentence"
        )
    image = reduce(image, "(groups images) anchors dim -> groups anchors dim", "mean", images=images)
    image = repeat(image, "groups anchors dim -> (groups k) anchors dim", k=len(text) // groups)
    return (1 - (_unit(image) * _unit(text)).sum(-1)).mean()


def _unit(x: Tensor) -> Tensor:
    x = precision.single(x)  # half overflows in the sum of squares, and has no 1e-10
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + _EPS)


def keep_ratio(trace: PruneTrace) -> Tensor:
    """DynamicViT's ratio loss (arXiv 2106.02034, section 3.3): the squared distance of kept shares from their target ratios.

    At each pruner the share is that of the expected number of unprotected tokens in those of the input, and the target is the
    product of the keepers' ratios so far. The mean over pruners and instances is taken.

    Args:
        trace: a tower in soft training, pruned by keepers with a ratio, such as `sampled_ratio`.

    Returns:
        The mean, a scalar. 0 outside soft training.

    Raises:
        ValueError: for a keeper without a ratio.
    """
    target, losses = 1.0, []
    for depth, layer in enumerate(trace.layers):
        for pruner, step in zip(trace.encoder.pruners_at(depth), layer.steps, strict=True):
            if not isinstance(pruner.keeper, Ratio):
                raise ValueError(
                    f"the loss keep_ratio compares with a ratio, and {type(pruner.keeper).__name__} at depth {depth} has "
                    "none: prune with keep='sampled_ratio(ratio=0.7)', or leave the loss out"
                )
            target *= pruner.keeper.block_ratio
            if step.expected is not None:
                losses.append((_kept_share(trace, step.expected) - target).square().mean())
    return torch.stack(losses).mean() if losses else trace.input_tokens.x.new_zeros(())


def kept_share(trace: PruneTrace) -> Tensor:
    """LTP's regularization (arXiv 2107.00910): the mean over layers of the share of tokens that a soft mask keeps.

    Args:
        trace: a tower in soft training.

    Returns:
        The mean over pruners and instances of the share of unprotected tokens, a scalar. 0 outside soft training.
    """
    steps: list[PruneStep] = [step for layer in trace.layers for step in layer.steps]
    shares = [_kept_share(trace, step.expected).mean() for step in steps if step.expected is not None]
    return torch.stack(shares).mean() if shares else trace.input_tokens.x.new_zeros(())


def ponder(trace: PruneTrace) -> Tensor:
    """A-ViT's ponder loss (arXiv 2112.07658): how long tokens stay, N + r, with gradients to the remainder r.

    N is the number of layers that a token passes, the one where it halts included. r is 1 less the halting probabilities of the
    layers before that one. Tokens that never halt do so at the last layer that scores them.

    Args:
        trace: a tower that is pruned by the scorer `halting`, traced with gradients.

    Returns:
        The mean over the unprotected tokens of the input, a scalar.

    Raises:
        ValueError: for another scorer, and for a trace without gradients.
    """
    layers = list(_halting_layers(trace))
    tokens, total = trace.input_tokens, trace.input_tokens.x.new_zeros((), dtype=torch.float32)
    for i, layer in enumerate(layers):
        halts = layer.leaves if i + 1 < len(layers) else layer.tokens.free
        total = total + layer.tokens.free.sum() + (layer.before + layer.eps)[halts].sum()
    return total / tokens.free.sum().clamp(min=1)


def halting_prior(trace: PruneTrace, peak: float = 2 / 3, deviation: float = 1.0) -> Tensor:
    """A-ViT's distributional prior (arXiv 2112.07658): KL of where tokens halt from a Gaussian over the layers.

    Where they halt is the mean halting probability at each layer, divided by the sum over layers. Tokens that left have 0.

    Args:
        trace: a tower that is pruned by the scorer `halting`, traced with gradients.
        peak: the mean of the Gaussian, as a share of the depth in (0, 1].
        deviation: its standard deviation, in layers.

    Returns:
        The divergence, a scalar.

    Raises:
        ValueError: for another scorer, and for a trace without gradients.
    """
    layers = list(_halting_layers(trace))
    means = torch.stack([layer.halting[layer.tokens.free].sum() for layer in layers]) / trace.input_tokens.free.sum()
    center = peak * len(trace.layers)
    densities = [math.exp(-(((layer.depth + 1 - center) / deviation) ** 2) / 2) for layer in layers]
    wanted = means.new_tensor(densities).clamp(min=_EPS)
    found = (means / means.sum().clamp(min=_EPS)).clamp(min=_EPS)
    return (found * (found / (wanted / wanted.sum())).log()).sum()


def token_distillation(student: PruneTrace, teacher: PruneTrace) -> Tensor:
    """DynamicViT's token distillation (arXiv 2106.02034, section 3.3): the squared error of the tokens that are kept.

    The tokens that left the last block are compared with the dense model's at the same positions. Protected and merged tokens
    are left out. **Departs**: it is relative to the mean square of the teacher's tokens, which here are not normalized.

    Args:
        student: the trace of a pruned tower.
        teacher: the trace of the dense tower on the same inputs.

    Returns:
        The mean weighted by the tokens' probability to stay, a scalar.
    """
    assert student.output_tokens is not None and teacher.output_tokens is not None
    ours, dense = student.output_tokens, teacher.output_tokens
    wanted = precision.single(dense.x.detach()[torch.searchsorted(dense.identity, ours.identity)])
    weight = torch.ones_like(wanted[:, 0]) if ours.keep_prob is None else ours.keep_prob
    weight = weight.masked_fill(ours.protected if ours.size is None else ours.protected | (ours.size != 1), 0.0)
    error = (precision.single(ours.x) - wanted).square().mean(-1)
    size = (weight.detach() * wanted.square().mean(-1)).sum()
    return (weight * error).sum() / size.clamp(min=_EPS)


# those of a single trace by name, as CompressConfig.losses names them
TRACE_LOSSES: Mapping[str, Callable[[PruneTrace], Tensor]] = {
    "keep_ratio": keep_ratio,
    "kept_share": kept_share,
    "ponder": ponder,
    "halting_prior": halting_prior,
}


@dataclass(frozen=True)
class _HaltingLayer:
    """A layer that scored tokens by halting: those that entered it, [total] of each.

    before: what was left of 1 - eps. halting: the probability at this layer. leaves: whether the token left here.
    """

    depth: int
    tokens: PackedTokens
    before: Tensor
    halting: Tensor
    leaves: Tensor
    eps: float


def _halting_layers(trace: PruneTrace) -> Iterator[_HaltingLayer]:
    found = False
    for depth, layer in enumerate(trace.layers):
        pruners = trace.encoder.pruners_at(depth)
        if not pruners or not isinstance(scorer := pruners[0].scorer, Halting):
            continue
        if layer.scored is None:
            raise ValueError(f"the {trace.tower} tower was traced without gradients, which this loss needs")
        found, (tokens, _) = True, layer.scored
        stays = torch.isin(tokens.identity, layer.identity)
        before, halting = scorer.remaining(tokens), scorer.halting(tokens)
        yield _HaltingLayer(depth, tokens, before, halting, tokens.free & ~stays, scorer.eps)
    if not found:
        raise ValueError(
            f"the {trace.tower} tower is not pruned by scorer='halting', whose probabilities this loss is of: use preset 'avit'"
        )


def _kept_share(trace: PruneTrace, expected: Tensor) -> Tensor:
    """[batch]: the share of the input's unprotected tokens in an expected number of tokens, protected ones included."""
    tokens = trace.input_tokens
    protected = segments.count(tokens.protected, tokens.layout)
    return (expected - protected) / (tokens.layout.sizes - protected).clamp(min=1)
