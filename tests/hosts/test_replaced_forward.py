"""Hooks and wrappers that were set on a module itself before pruning: refused, as copies would run the dense model."""

from __future__ import annotations

import copy
import functools
from types import MethodType

import pytest
import torch
from checks import same
from test_hosts import make

import vltprune as vp
from vltprune.hosts.graft import shallow_copy, with_submodule

accelerate = pytest.importorskip("accelerate")

HOSTS = (
    "timm: vit: plain",
    "open_clip: clip",
    "open_clip: custom clip",
    "transformers: bert: plain",
    "transformers: headed: ViTForImageClassification",
    "transformers: clip",
    "blip: nlvr",
    "blip: vqa",
)


def dispatched(model):
    """The model with the hooks that device_map="auto" sets over several devices."""
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def wrapped(forward):
    return functools.wraps(forward)(lambda *args, **named: forward(*args, **named))


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_hooks_of_accelerate(name):
    case = make(name)
    want = case.pruned("random")(*case.inputs)
    dense = dispatched(copy.deepcopy(case.model))
    with pytest.raises(TypeError, match=r"hooks of accelerate.*remove_hook_from_module\(model, recurse=True\), prune"):
        vp.prune(dense, case.config("random"))
    accelerate.hooks.remove_hook_from_module(dense, recurse=True)
    assert "forward" in vars(dense)  # accelerate leaves the class' forward there, bound to the dense model
    pruned = vp.prune(dense, case.config("random"))
    same(pruned(*case.inputs), want)
    same(dispatched(pruned)(*case.inputs), want)


@pytest.mark.parametrize("name", HOSTS)
def test_wrappers(name):
    case = make(name)
    dense = copy.deepcopy(case.model)
    dense.forward = wrapped(dense.forward)
    with pytest.raises(TypeError, match=r"forward of this \w+ was replaced.*`del module.forward`, prune"):
        vp.prune(dense, case.config("random"))
    del dense.forward
    for tower in vp.prune(dense, case.config("random")).pruning.towers.values():
        for module in (tower.host, tower.adapter.blocks(tower.host)[1]):
            module.forward = wrapped(module.forward)
            with pytest.raises(TypeError, match=rf"forward of this {type(module).__name__} was replaced"):
                vp.prune(dense, case.config("random"))
            del module.forward


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_models_that_were_compiled_in_place(name):
    case = make(name)
    dense = copy.deepcopy(case.model)
    with torch.compiler.set_stance("force_eager"):
        dense.compile()
        same(vp.prune(dense, case.config("random"))(*case.inputs), case.pruned("random")(*case.inputs))


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.second(self.first(x))


@torch.no_grad()
def test_copies_of_modules_run_what_they_hold():
    x, pair, new = torch.randn(4, 3), Pair(), torch.nn.Linear(3, 5)
    want = new(pair.first(x))
    with torch.compiler.set_stance("force_eager"):
        pair.compile()
        same(with_submodule(pair, "second", new)(x), want)
    calls = []

    class Counting(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **named):
            calls.append(module)
            return args, named

    accelerate.hooks.add_hook_to_module(pair, Counting())
    changed = with_submodule(pair, "second", new)
    same(changed(x), want)
    assert calls == [changed]
    accelerate.hooks.remove_hook_from_module(changed)
    same(changed(x), want)
    assert calls == [changed] and pair(x).shape == (4, 2) and calls[1:] == [pair]
    accelerate.hooks.remove_hook_from_module(pair)
    same(with_submodule(pair, "second", new)(x), want)
    pair.forward = MethodType(lambda self, x: -self.second(self.first(x)), pair)
    same(with_submodule(pair, "second", new)(x), -want)
    for other in (Pair().forward, wrapped(pair.forward)):
        pair.forward = other
        with pytest.raises(TypeError, match="forward of this Pair was replaced"):
            shallow_copy(pair)
    accelerate.hooks.add_hook_to_module(pair, Counting())
    with pytest.raises(TypeError, match="this Pair has hooks of accelerate"):
        shallow_copy(pair)
