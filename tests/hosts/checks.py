"""What must hold of every host, whichever library it comes from. Each check takes a Case: a dense model and a batch for it.

a  keep-all is the host · b  the dense model stays as it is · c  an instance alone is the instance in the batch · d  counts
never grow, protected tokens stay, tokens keep their order · e  gradients reach what they reach in the dense model · f
merging may come before an affine projection · g  dropping a token is hiding it from all later blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import vltprune as vp

PRESETS = ("madtp", "evit", "random")


@dataclass(frozen=True)
class Case:
    """A dense model in eval mode, and what a check has to know of it.

    inputs     a batch of three
    protected  per tower, per instance: the original positions that may never go
    summary    whether every tower has a summary token
    dense      what the pruned model should return when it keeps all tokens; None: what `model` returns
    alone      the inputs of one instance by itself; None: its slice of `inputs`
    prunes     whether there is anything to prune
    ragged     whether the threshold leaves instances of different lengths
    idle       parameters that the dense forward does not use either, by a part of their name
    rows       what of an output has a row for each instance; None: all of it
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    protected: Mapping[str, Sequence[Sequence[int]]]
    summary: bool = True
    dense: Callable[..., Any] | None = None
    alone: Callable[[int], tuple[Tensor, ...]] | None = None
    prunes: bool = True
    ragged: bool = True
    idle: tuple[str, ...] = ()
    rows: Callable[[Any], Any] | None = None

    def config(self, preset: str = "madtp", **parts: Any) -> vp.PruneConfig:
        """A preset, with a small guide, and without the summary token where there is none."""
        config = vp.preset(preset)
        if preset == "madtp":
            config = config.replace(guide="codebook(anchors=12)")
        if not self.summary and preset != "random":
            config = config.replace(scorer="alignment" if preset == "madtp" else "self_attention")
        return config.replace(**parts)

    def pruned(self, preset: str = "madtp", **parts: Any) -> Any:
        return vp.prune(self.model, self.config(preset, **parts))

    def expected(self) -> Any:
        return (self.dense or self.model)(*self.inputs)

    def one(self, i: int) -> tuple[Tensor, ...]:
        return self.alone(i) if self.alone else tuple(x[i : i + 1] if isinstance(x, Tensor) else x for x in self.inputs)


def randomize(model: nn.Module) -> nn.Module:
    """The model in eval mode, all parameters moved away from where they were born: no option is without effect then."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() <= 1 else 0.2))
    return model.eval()


def keep_all_is_the_host(case: Case) -> None:
    """In training and in evaluation; with every statistic and a guide, and with neither. No reducer has anything to do."""
    guided = case.pruned(keep="ratio(ratio=1.0)")
    unguided = case.pruned("random", keep="ratio(ratio=1.0)")
    for training, models in ((True, (guided,)), (False, (guided, unguided))):
        case.model.train(training)
        with torch.set_grad_enabled(training):
            torch.manual_seed(1)
            expected = case.expected()
            for pruned in models:
                pruned.train(training)
                torch.manual_seed(1)
                with vp.collect() as traces:
                    same(pruned(*case.inputs), expected)
                assert {trace.tower for trace in traces} == set(case.protected)
                assert all(
                    lengths == trace.input_tokens.layout.lengths for trace in traces for lengths in trace.lengths
                )


@torch.no_grad()
def the_dense_model_stays(case: Case) -> None:
    model = case.model
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    before = [t.clone() for t in tensors(model(*case.inputs))]

    pruned = case.pruned()
    pruned(*case.inputs)

    assert pruned.pruning.host is model
    assert [(name, id(module), type(module)) for name, module in model.named_modules()] == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(*case.inputs)), before, strict=True))


@torch.no_grad()
def batch_mates_do_not_matter(case: Case, preset: str, instances: Sequence[int] = (0, 2)) -> None:
    """An instance alone is the instance in the batch, whose depths are sound."""
    pruned = case.pruned(preset)
    with vp.collect() as traces:
        out = pruned(*case.inputs)
    together = tensors(case.rows(out) if case.rows else out)
    _are_sound(case, traces)
    lengths = _lengths(traces)
    if preset == "madtp" and case.ragged:
        assert any(len(set(depth)) > 1 for tower in lengths.values() for depth in tower)
    for i in instances:
        alone, own = run(pruned, case.one(i), case.rows)
        for tower, depths in own.items():
            n = len(depths[0])
            assert list(depths) == [depth[i * n : (i + 1) * n] for depth in lengths[tower]]
        for row, single in zip(together, alone, strict=True):
            if row.dim():
                same_row(row[i], single[0])


def _are_sound(case: Case, traces: Sequence[vp.PruneTrace]) -> None:
    """Counts never grow, protected tokens stay, tokens keep their order."""
    assert {trace.tower for trace in traces} == set(case.protected)
    for trace in traces:
        lengths = trace.input_tokens.layout.lengths
        for step in trace.layers:
            assert all(after <= before for after, before in zip(step.lengths, lengths, strict=True))
            lengths = step.lengths
            positions, kept = step.position.split(lengths), step.protected.split(lengths)
            for position, protected, must in zip(positions, kept, case.protected[trace.tower], strict=True):
                assert (position.diff() > 0).all()
                assert position[protected].tolist() == list(must)
    assert case.prunes == any(sum(t.lengths[-1]) < t.input_tokens.layout.total for t in traces)


def gradients_reach(case: Case) -> None:
    case.model.train()
    every = {name for name, parameter in case.model.named_parameters() if parameter.requires_grad}
    dense = _reached(case.model, case.model, case.inputs)
    idle = {name for name in every if any(part in name for part in case.idle)}
    assert every - dense - idle == set()

    pruned = case.pruned().train()
    assert dense - _reached(pruned, case.model, case.inputs) == set()
    if case.prunes:
        guide, towers = pruned.pruning.guide, pruned.pruning.towers
        used = [guide.anchors, *(weight for tower in towers for weight in guide.maps[tower].parameters())]
        assert all(weight.grad is not None and weight.grad.any() for weight in used)


@torch.no_grad()
def reducing_early_changes_nothing(case: Case) -> None:
    """Merging before the output projection, where a host says that it is affine, is merging behind it."""
    pruned = case.pruned(reducer="fuse")
    early, lengths = run(pruned, case.inputs)
    with pytest.MonkeyPatch.context() as patch:
        for tower in pruned.pruning.towers.values():
            patch.setattr(tower.adapter, "projects_affinely", lambda block: False)
        with vp.collect() as traces:
            late = tensors(pruned(*case.inputs))
    assert not any(step.reduced_early for trace in traces for step in trace.layers)
    assert {trace.tower: trace.lengths for trace in traces} == {tower: own[1:] for tower, own in lengths.items()}
    same(early, late)


def recomputing_changes_nothing(case: Case, parts: Sequence[nn.Module], save_memory: Callable[[], Any]) -> None:
    """Gradient checkpointing, which `save_memory` turns on, runs each part (one a block) twice; nothing else differs."""
    pruned = case.pruned().train()
    calls = []
    for part in parts:
        part.register_forward_pre_hook(lambda *_: calls.append(1))

    def step():
        pruned.zero_grad()
        calls.clear()
        out, lengths = run(pruned, case.inputs)
        sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in out).backward()
        return len(calls), lengths, out, [p.grad.clone() for p in pruned.parameters() if p.grad is not None]

    plain_calls, plain_lengths, *plain = step()
    save_memory()
    saving_calls, saving_lengths, *saving = step()
    assert (plain_calls, saving_calls) == (len(parts), 2 * len(parts))
    assert plain_lengths == saving_lengths
    same(saving, plain)


@torch.no_grad()
def dropping_is_hiding(
    pruned: Any, inputs: tuple[Tensor, ...], x: Tensor, blocks: Sequence[Any], causal=False
) -> Tensor:
    """Tokens left where they stood, and hidden as keys from the block after the one that dropped them.

    x [batch, n, dim] is the dense input of the first block; blocks take (x, which keys a query sees [batch, n, n]). Returns
    the dense x after the last block.
    """
    with vp.collect() as traces:
        tokens, _ = pruned.encode(*inputs)
    entered = traces[0].input_tokens
    there = _places(entered.position, entered.layout.lengths, x)
    before = int(there.sum())
    for block, step in zip(blocks, traces[0].layers, strict=True):
        seen = there[:, None] | torch.eye(x.shape[1], dtype=torch.bool)  # itself: for dropped tokens too, against NaN
        x = block(x, seen.tril() if causal else seen)
        there = _places(step.position, step.lengths, x)
    assert there.sum() < before
    same(tokens.x, x[there])
    return x


@torch.no_grad()
def ragged(case: Case, **parts: Any) -> Any:
    """A pruned tower that drops tokens, from some instances more than from others."""
    for seed in range(20):
        pruned = case.pruned("random", keep=f"random_ratio(mean=0.5, seed={seed})", **parts)
        if not pruned.encode(*case.inputs)[0].layout.is_uniform:
            return pruned
    raise AssertionError("all instances keep equally many tokens, whatever the seed")


def _places(position: Tensor, lengths: tuple[int, ...], like: Tensor) -> Tensor:
    """[batch, n] bool: where the tokens of each instance stood."""
    there = torch.zeros(like.shape[:2], dtype=torch.bool)
    for row, own in zip(there, position.split(lengths), strict=True):
        row[own] = True
    return there


Lengths = dict[str, tuple[tuple[int, ...], ...]]


def run(
    pruned: Any, inputs: tuple[Tensor, ...], part: Callable[[Any], Any] | None = None
) -> tuple[list[Tensor], Lengths]:
    """Outputs, or a part of them, and per tower and depth the lengths; those of the input first."""
    with vp.collect() as traces:
        out = pruned(*inputs)
    return tensors(part(out) if part else out), _lengths(traces)


def _lengths(traces: Sequence[vp.PruneTrace]) -> Lengths:
    return {trace.tower: (trace.input_tokens.layout.lengths, *trace.lengths) for trace in traces}


def tensors(out: Any) -> list[Tensor]:
    """All tensors of an output, packed ones padded."""
    if isinstance(out, vp.PackedTokens):
        return [out.unpack()[0]]
    if isinstance(out, Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, dict) else out) for t in tensors(part)]


def same(actual: Any, expected: Any) -> None:
    """Equal within 1e-5 of the largest number."""
    for got, want in zip(tensors(actual), tensors(expected), strict=True):
        assert got.shape == want.shape
        scale = want.detach().abs().max()
        assert_close(got / scale, want / scale, rtol=0, atol=1e-5)


def same_row(row: Tensor, alone: Tensor) -> None:
    """Equal, and zero where only the batch has room."""
    if row.dim() > 1:
        assert not row[len(alone) :].any()
        row = row[: len(alone)]
    same(row, alone)


def _reached(model: nn.Module, host: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """The parameters of the host that a gradient reaches through the model, more than rounding does."""
    model.zero_grad()
    host.zero_grad()
    g = torch.Generator().manual_seed(2)
    sum((t * torch.randn(t.shape, generator=g)).sum() for t in tensors(model(*inputs))).backward()
    grads = {name: p.grad for name, p in host.named_parameters() if p.grad is not None and p.numel()}
    reach = {name: float(grad.abs().max()) for name, grad in grads.items()}
    return {name for name, size in reach.items() if size > 1e-6 * max(reach.values())}
