"""What the dense model's answers depend on, taught to the scores: a scorer learns what matters instead of guessing it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import segments
from ..pruner import PrunedEncoder, Pruner
from ..surgery import prune, pruning
from ..tokens import PackedTokens

_EPS = 1e-12

Site = tuple[str, int]  # a tower's name, and a depth


class Saliency:
    """Compares the scores of a model with how much a dense twin's answers depend on the same tokens.

    A token's saliency at a depth is the norm of the gradient of the answers with respect to it, of the answers' logits in
    random directions whose mean square is the second-order growth of the KL divergence that distillation punishes
    (`directions`): how much the answers would move if the token did. It takes no labels, and one backward pass through the
    dense model. What the scores are compared by is their correlation over an instance's tokens, which asks for no scale.
    Protected tokens are left out, and such as stand for several: the dense model has no such tokens.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module):
        """model: pruned; teacher: of `watched`, of its dense model. It looks at both within `with` blocks alone."""
        self.model, self.teacher = model, teacher
        self.scored: dict[Site, tuple[PackedTokens, Tensor]] = {}
        self.entered: dict[Site, PackedTokens] = {}
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> Saliency:
        for site, pruner in _pruners(self.model):
            self.hooks.append(pruner.scorer.register_forward_hook(self._take_scores(site)))
        for site, pruner in _pruners(self.teacher):
            self.hooks.append(pruner.register_forward_pre_hook(self._take_tokens(site)))
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.scored.clear()
        self.entered.clear()

    def __call__(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """outputs [rows, classes]: logits of the teacher, with gradients -> the mean of 1 - correlation, a scalar."""
        sites = [site for site in self.scored if site in self.entered]
        tokens = [self.entered[site] for site in sites]
        answer = directions(outputs, generator)
        gradients = torch.autograd.grad(answer, [one.x for one in tokens], allow_unused=True)
        apart = [
            _apart(*self.scored[site], _salient(gradient, one, self.scored[site][0]))
            for site, one, gradient in zip(sites, tokens, gradients, strict=True)
            if gradient is not None
        ]
        return torch.stack(apart).mean()

    def _take_scores(self, site: Site) -> Any:
        def take(scorer: nn.Module, inputs: tuple[Any, ...], scores: Tensor) -> None:
            if torch.is_grad_enabled():
                self.scored.setdefault(site, (inputs[0], scores))

        return take

    def _take_tokens(self, site: Site) -> Any:
        def take(pruner: nn.Module, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                self.entered.setdefault(site, inputs[0])

        return take


def watched(dense: nn.Module, like: nn.Module) -> nn.Module:
    """A dense model whose tokens can be watched where a pruned one prunes: it keeps them all there."""
    at = {name: tuple(map(int, tower.pruners)) for name, tower in pruning(like).towers.items()}
    return prune(dense, "random", keep="ratio(ratio=1.0)", at=at)


def directions(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient, squared, is in the mean over draws the curvature of KL(softmax(logits) || ...), row by row.

    logits [rows, classes]. The curvature is diag(p) - p p^T; with signs e, sum_c e_c sqrt(p_c) (z_c - sum_d p_d z_d) has it.
    """
    chance = logits.detach().softmax(-1)
    signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
    centred = logits - (chance * logits).sum(-1, keepdim=True)
    return (signs * chance.sqrt() * centred).sum()


def _pruners(model: nn.Module) -> Iterator[tuple[Site, Pruner]]:
    for name, tower in pruning(model).towers.items():
        assert isinstance(tower, PrunedEncoder)
        for depth, pruner in tower.pruners.items():
            assert isinstance(pruner, Pruner)
            yield (name, int(depth)), pruner


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

    def centred(values: Tensor) -> Tensor:
        values = values.masked_fill(~asked, 0.0)
        middle = (segments.sum(values, layout) / there)[layout.instance]
        return (values - middle).masked_fill(~asked, 0.0)

    ours, theirs = centred(scores.float()), centred(salient)
    sizes = (segments.sum(ours**2, layout) * segments.sum(theirs**2, layout)).clamp(min=_EPS**2).sqrt()
    return (1 - segments.sum(ours * theirs, layout) / sizes).mean()
