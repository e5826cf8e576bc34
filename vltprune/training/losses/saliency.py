"""Saliency distillation: scores learn which tokens the dense model's answers depend on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core import segments
from ...core.tokens import PackedTokens
from ...pruning.model import get_pruning
from ...pruning.prune import prune_towers
from ...pruning.tower import pruned_depths
from ...pruning.trace import PruneTrace

_EPS = 1e-12


def saliency_loss(
    student: Mapping[str, PruneTrace], teacher: Mapping[str, PruneTrace], outputs: Tensor, seed: int, before: int = 0
) -> Tensor:
    """Distance of the scores from how much the dense teacher's answers depend on the same tokens: mean of 1 - correlation.

    A token's saliency at a depth is the norm of the gradient of `curvature_probe` with respect to it. It says how much the
    answers would move if the token did. It takes no labels, and one backward pass through the teacher. Scores are compared by
    their correlation over an instance's tokens, which asks for no scale. Protected tokens are left out, and such as stand for
    several: the dense model has no such tokens.

    Args:
        student: traces of the pruned model, by tower, with gradients.
        teacher: traces of the teacher, a `saliency_teacher`, with gradients. Towers that it has no trace of are left out.
        outputs: [rows, classes] the teacher's logits, with gradients.
        seed: of the random signs, as of `curvature_probe`.
        before: rows of the processes before this one, as of `curvature_probe`.

    Returns:
        [] the mean over instances and depths, 0 .. 2; 0 where nothing is scored that could learn.
    """
    pairs = [
        (pruned.scored, dense.scored)
        for tower, trace in student.items()
        if tower in teacher
        for pruned, dense in zip(trace.layers, teacher[tower].layers, strict=True)
        if pruned.scored is not None and dense.scored is not None and pruned.scored[1].requires_grad
    ]
    if not pairs:  # nothing is scored, or nothing that could learn: noise
        return outputs.new_zeros(())
    answer = curvature_probe(outputs, seed, before)
    gradients = torch.autograd.grad(answer, [dense.x for _, (dense, _) in pairs], allow_unused=True)
    distances = [
        _distance(tokens, scores, _gradient_norms(gradient, dense, tokens))
        for ((tokens, scores), (dense, _)), gradient in zip(pairs, gradients, strict=True)
        if gradient is not None
    ]
    return torch.stack(distances).mean()


def saliency_teacher(dense: nn.Module, like: nn.Module) -> nn.Module:
    """Builds a teacher that records a dense model's tokens where a pruned model prunes.

    Its gradients are those of tokens. Linear maps get none, so that their inputs, the largest part of what a forward pass
    keeps, are not kept.

    Args:
        dense: the dense model, whose weights the teacher shares. Those of its linear maps are frozen.
        like: the pruned model, with the same towers.

    Returns:
        The teacher; it keeps all tokens, and gives the dense model's answers.
    """
    for module in dense.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(False)
    at = {name: pruned_depths(tower) for name, tower in get_pruning(like).towers.items()}
    return prune_towers(dense, "random", keep="ratio(ratio=1.0)", at=at)


def curvature_probe(logits: Tensor, seed: int, before: int = 0) -> Tensor:
    """A scalar whose squared gradient is, in the mean over seeds, the curvature of KL(softmax(logits) || ...), row by row.

    The curvature is diag(p) - p p^T; with random signs e, sum_c e_c sqrt(p_c) (z_c - sum_d p_d z_d) has it.

    Args:
        logits: [rows, classes].
        seed: of the random signs.
        before: how many rows the processes before this one have, so that all draw from one table of signs.

    Returns:
        [] the scalar, with gradients; the probabilities in it have none.
    """
    p = logits.detach().softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (before + len(logits), logits.shape[1]), generator=generator)[before:]
    signs = bits.to(logits) * 2 - 1
    centered = logits - (p * logits).sum(-1, keepdim=True)
    return (signs * p.sqrt() * centered).sum()


def _gradient_norms(gradient: Tensor, dense: PackedTokens, tokens: PackedTokens) -> Tensor:
    """[total] of `tokens`: the norm of the gradient of the dense model's token at each token's position."""
    return gradient.float().norm(dim=-1)[torch.searchsorted(dense.identity, tokens.identity)]


def _distance(tokens: PackedTokens, scores: Tensor, salient: Tensor) -> Tensor:
    """scores, salient [total] -> 1 - their correlation over the tokens of each instance; the mean over instances."""
    layout = tokens.layout
    compared = tokens.free if tokens.size is None else tokens.free & (tokens.size == 1)
    count = segments.sum(compared.to(scores.dtype), layout).clamp(min=1)

    def centered(values: Tensor) -> Tensor:
        values = values.masked_fill(~compared, 0.0)
        mean = layout.spread(segments.sum(values, layout) / count)
        return (values - mean).masked_fill(~compared, 0.0)

    pruned, teacher = centered(scores.float()), centered(salient)
    sizes = (segments.sum(pruned**2, layout) * segments.sum(teacher**2, layout)).clamp(min=_EPS**2).sqrt()
    return (1 - segments.sum(pruned * teacher, layout) / sizes).mean()
