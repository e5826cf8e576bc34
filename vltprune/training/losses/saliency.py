"""Saliency distillation: scores learn which tokens the dense model's answers depend on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core import segments
from ...core.tokens import PackedTokens
from ...pruning.model import get_pruning
from ...pruning.prune import prune_towers
from ...pruning.trace import PruneTrace

_EPS = 1e-12


def saliency(
    own: Mapping[str, PruneTrace], theirs: Mapping[str, PruneTrace], outputs: Tensor, seed: int, before: int = 0
) -> Tensor:
    """How far the scores are from how much a dense twin's answers depend on the same tokens: mean of 1 - correlation.

    own: traces of the pruned model, by tower; theirs: of the twin, `watched`; outputs [rows, classes]: its logits; all with
    gradients. seed, before: as of `directions`. A token's saliency at a depth is the norm of the gradient of the answers with
    respect to it, of the answers' logits in random directions whose mean square is the second-order growth of the KL divergence
    that distillation punishes (`directions`): how much the answers would move if the token did. It takes no labels, and one
    backward pass through the twin. What the scores are compared by is their correlation over an instance's tokens, which asks
    for no scale. Protected tokens are left out, and such as stand for several: the dense model has no such tokens.
    """
    pairs = [
        (ours.scored, dense.scored)
        for tower, trace in own.items()
        for ours, dense in zip(trace.layers, theirs[tower].layers, strict=True)
        if ours.scored is not None and dense.scored is not None and ours.scored[1].requires_grad
    ]
    if not pairs:  # nothing is scored, or nothing that could learn: noise
        return outputs.new_zeros(())
    answer = directions(outputs, seed, before)
    gradients = torch.autograd.grad(answer, [dense.x for _, (dense, _) in pairs], allow_unused=True)
    apart = [
        _apart(tokens, scores, _salient(gradient, dense, tokens))
        for ((tokens, scores), (dense, _)), gradient in zip(pairs, gradients, strict=True)
        if gradient is not None
    ]
    return torch.stack(apart).mean()


def watched(dense: nn.Module, like: nn.Module) -> nn.Module:
    """A dense model whose tokens can be watched where a pruned one prunes: it keeps them all there."""
    at = {name: tuple(map(int, tower.pruners)) for name, tower in get_pruning(like).towers.items()}
    return prune_towers(dense, "random", keep="ratio(ratio=1.0)", at=at)


def directions(logits: Tensor, seed: int, before: int = 0) -> Tensor:
    """A scalar whose gradient, squared, is in the mean over draws the curvature of KL(softmax(logits) || ...), row by row.

    logits [rows, classes]; seed of the draw; before: how many of its rows are other processes'. The
    curvature is diag(p) - p p^T; with signs e, sum_c e_c sqrt(p_c) (z_c - sum_d p_d z_d) has it.
    """
    chance = logits.detach().softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (before + len(logits), logits.shape[1]), generator=generator)[before:]
    signs = drawn.to(logits) * 2 - 1
    centerd = logits - (chance * logits).sum(-1, keepdim=True)
    return (signs * chance.sqrt() * centerd).sum()


def _salient(gradient: Tensor, dense: PackedTokens, tokens: PackedTokens) -> Tensor:
    """[total] of `tokens`: the norm of the gradient of the dense model's token that stood where each does."""
    return gradient.float().norm(dim=-1)[torch.searchsorted(_key(dense), _key(tokens))]


def _key(tokens: PackedTokens) -> Tensor:
    """[total] int64, one for each place of each instance; ascending where nothing was reordered."""
    return tokens.layout.instance * 2**32 + tokens.position


def _apart(tokens: PackedTokens, scores: Tensor, salient: Tensor) -> Tensor:
    """scores, salient [total] -> 1 - their correlation over the tokens of each instance; the mean over instances."""
    layout = tokens.layout
    asked = tokens.free if tokens.size is None else tokens.free & (tokens.size == 1)
    there = segments.sum(asked.to(scores.dtype), layout).clamp(min=1)

    def centerd(values: Tensor) -> Tensor:
        values = values.masked_fill(~asked, 0.0)
        middle = (segments.sum(values, layout) / there)[layout.instance]
        return (values - middle).masked_fill(~asked, 0.0)

    ours, theirs = centerd(scores.float()), centerd(salient)
    sizes = (segments.sum(ours**2, layout) * segments.sum(theirs**2, layout)).clamp(min=_EPS**2).sqrt()
    return (1 - segments.sum(ours * theirs, layout) / sizes).mean()
