"""The invariants, end to end, for every preset and for every registered part in a preset's place."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_models import BLIP, NAMES, OF_LANGUAGE, PRESETS, SCORERS, asked, small, soften
from strategies import arguments, seeds
from torch import Tensor
from torch.testing import assert_close

import vltprune as vp
from vltprune import Part, PruneConfig

BASE = PruneConfig(scorer="madtp", keep="ratio(ratio=0.6)", reducer="fuse", guide="codebook(anchors=6)")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PARTS = {"scorer": vp.scorers, "keep": vp.keepers, "selector": vp.selectors, "reducer": vp.reducers, "guide": vp.guides}
NEED_BOTH = set(vp.scorers.names()) - set(SCORERS)
EVERY = [f"{kind}={name}" for kind, registry in PARTS.items() for name in registry.names() if name not in NEED_BOTH]
# what needs a text and an image in one sequence, and one that does not
FUSED = [
    *(name for name in vp.presets.names() if name not in (*PRESETS, *OF_LANGUAGE)),
    *(f"scorer={name}" for name in NEED_BOTH),
]
# each preset on each model; each part on both kinds of towers, alone and beside another
ON_TOWERS = [(name, chosen) for name in NAMES for chosen in PRESETS if (name, chosen) != ("text", "trips")]
PAIRS = [*ON_TOWERS, *((name, chosen) for name in ("vit", "nlvr") for chosen in EVERY)]
PAIRS += [("vilt", chosen) for chosen in (*FUSED, "madtp", "tome")]
# arguments with which keepers prune whose defaults do not, or that have none
PRUNING = {
    "count": "count(count=4)",
    "counts": "counts(counts=(4, 4, 4, 4))",
    "learned": "learned(threshold=0.0)",
    "above": "above(threshold=0.05)",
    "entropy": "entropy(count=4.0)",
    "fitted_threshold": "fitted_threshold(threshold=0.05)",
}
# keepers of presets whose own ones prune nothing in small random towers: halting probabilities are small, and patches few
IN_SMALL = {"avit": "above(threshold=7.0)", "flowcut": "entropy(count=4.0)"}
# whose parts learn in soft training alone: from what stays with a probability, and from its cost
SOFT = {"keep=learned", "keep=rising_threshold", "ltp", "asvit", "dynamicvit"}
# each preset in both dtypes, and parts in turn in one of them
HALF = [(name, dtype) for name in (*PRESETS, *FUSED) for dtype in (torch.bfloat16, torch.float16)]
HALF += [(name, (torch.bfloat16, torch.float16)[i % 2]) for i, name in enumerate(EVERY) if name != "keep=all"]
few = settings(max_examples=max(1, settings.default.max_examples // 12))  # of each part on each model: many in all


def with_part(kind: str, part: str | Part) -> PruneConfig:
    """BASE with one part exchanged, and the guide and the tower that this part needs."""
    if part == "query_attention":
        return BASE.replace(scorer=part, guide="text_query", at={"image": None})
    return BASE.replace(**{kind: part})


def preset_of(name: str) -> PruneConfig:
    """A preset, with a keeper that prunes in small towers."""
    return vp.preset(name).replace(**({"keep": IN_SMALL[name]} if name in IN_SMALL else {}))


@st.composite
def configs(draw, chosen: str) -> PruneConfig:
    """A preset, or BASE with one part exchanged and that part's arguments drawn."""
    kind, _, name = chosen.partition("=")
    if not name:
        return preset_of(chosen)
    drawn = draw(arguments(PARTS[kind][name], vary=kind != "keep"))
    return with_part(kind, Part(name, drawn) if drawn else name)


def pruned(name: str, config: PruneConfig):
    """A small model pruned, its guide among its own tokens."""
    source = small(name)
    model = vp.prune(source.model, config)
    if model.pruning.guide is not None and model.pruning.guide.is_untrained:
        torch.manual_seed(0)
        model.pruning.guide.fit(3 * torch.randn(200, 32))
    return model


def tensor(out) -> Tensor:
    """The output itself; of transformers' classes the logits."""
    return getattr(out, "logits", out)


def features(out, inputs) -> Tensor:
    """[batch, *]: of a text tower, whose tokens are padded, the first."""
    out = tensor(out)
    return out[:, 0] if out.dim() == 3 else out


@torch.no_grad()
def run(model, inputs):
    with asked(model, *inputs), vp.collect() as traces:
        return features(model(*inputs), inputs), traces


@pytest.mark.parametrize(("name", "chosen"), PAIRS)
@given(data=st.data(), seed=seeds)
@few
def test_invariants(name, chosen, data, seed):
    """2 protected tokens survive, 3 order, 4 an instance alone, 5 permutation, 8 sizes, 9 counts never grow."""
    config = data.draw(configs(chosen))
    model = pruned(name, config)
    torch.manual_seed(seed)
    inputs = small(name).draw(4)
    out, traces = run(model, inputs)
    assert out.isfinite().all()
    for trace in traces:
        check_trace(trace)

    order = torch.randperm(4)
    moved, _ = run(model, small(name).take(inputs, order))
    assert_close(moved, out[order], **CLOSE)
    for i in data.draw(st.permutations(range(4)))[:2]:
        alone, alone_traces = run(model, small(name).take(inputs, slice(i, i + 1)))
        assert_close(alone, out[i : i + 1], **CLOSE)
        for trace, one in zip(traces, alone_traces, strict=True):
            each = trace.input_tokens.layout.batch // 4
            assert one.lengths == tuple(lengths[i * each : (i + 1) * each] for lengths in trace.lengths)


def check_trace(trace):
    before, entered = trace.input_tokens.layout.lengths, trace.input_tokens
    speaks = entered.summary.nonzero().flatten()
    for depth, step in enumerate(trace.layers):
        assert all(after <= n for after, n in zip(step.lengths, before, strict=True))
        for position in step.position.split(step.lengths):
            assert (position.diff() > 0).all()
        owners = trace.provenance(depth)
        assert step.protected[owners[speaks]].all()
        assert torch.equal(step.position[owners[speaks]], entered.position[speaks])
        rows = torch.arange(sum(before)).double()
        kept = rows
        for reduction in step.reductions:
            assert sum(reduction.before.lengths) == len(kept)
            rows, kept = reduction.values(rows), kept[reduction.index]
        assert len(kept) == sum(step.lengths)
        assert torch.equal(rows[step.protected], kept[step.protected])
        before = step.lengths
    holders = Counter(trace.provenance(len(trace.layers) - 1).tolist())
    holders.pop(-1, None)
    assert sorted(holders) == list(range(sum(before)))


@pytest.mark.parametrize(("name", "chosen"), [pair for pair in PAIRS if "=" not in pair[1]])
def test_presets_do_prune(name, chosen):
    """None of the above would mean anything if nothing were pruned, or everybody alike where counts are per instance."""
    config = preset_of(chosen)
    _, traces = run(pruned(name, config), small(name).draw(6))
    pruned_towers = [trace for trace in traces if trace.encoder.pruners]
    assert pruned_towers
    assert all(sum(trace.lengths[-1]) < trace.input_tokens.layout.total for trace in pruned_towers)
    if chosen == "madtp" and name != "text":
        assert len(set(traces[0].lengths[-1])) > 1


@pytest.mark.parametrize(("chosen", "dtype"), HALF)
def test_models_in_half_precision(chosen, dtype):
    """2, 3, 8, 9, in both towers; what an instance alone keeps may differ where half the digits make tokens tie."""
    kind, _, name = chosen.partition("=")
    part = PRUNING.get(name, name)
    config = with_part(kind, part) if name else preset_of(chosen)
    source = small("vilt" if chosen in FUSED else "nlvr")
    model = vp.prune(copy.deepcopy(source.model).to(dtype), config)
    inputs = source.draw(4)
    out, traces = run(model, tuple(one.to(dtype) if one.is_floating_point() else one for one in inputs))
    assert out.dtype == dtype and out.isfinite().all()
    assert any(sum(trace.lengths[-1]) < trace.input_tokens.layout.total for trace in traces)
    for trace in traces:
        check_trace(trace)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        *ON_TOWERS,
        *(
            (name, one)
            for name, one in itertools.product(NAMES, EVERY)
            if not one.startswith(("guide", "keep")) and (name, one) != ("text", "scorer=query_attention")
        ),
        *(("vilt", chosen) for chosen in (*FUSED, "madtp")),
    ],
)
def test_keeping_all_is_the_dense_model(name, chosen):
    """7, with every statistic computed on the way."""
    kind, _, part = chosen.partition("=")
    config = with_part(kind, part) if part else vp.preset(chosen)
    model = pruned(name, config.replace(keep="ratio(ratio=1.0)"))
    inputs = small(name).draw(3)
    out, traces = run(model, inputs)
    with torch.no_grad():
        dense = features(small(name).model(*inputs), inputs)
    assert_close(out, dense, **CLOSE)
    assert all(not step.reductions for trace in traces for step in trace.layers)


@pytest.mark.parametrize(
    ("name", "chosen"), [*itertools.product(("vit", "nlvr"), (*PRESETS, *EVERY)), *(("vilt", one) for one in FUSED)]
)
@given(data=st.data())
@settings(max_examples=2)
def test_gradients_reach_every_parameter(name, chosen, data):
    """12: every parameter of guide and parts, and every one of the host that gets a gradient when dense."""
    source, config = small(name), data.draw(configs(chosen))
    if chosen == "keep=learned":  # thresholds that no token is near have no gradient
        config = config.replace(keep=Part("learned", {"shift": config.keep.args["shift"] / 4}))
    if chosen == "keep=rising_threshold":
        config = config.replace(keep=Part("rising_threshold", {"final": 0.5 + config.keep.args["final"] / 16}))
    if chosen == "scorer=predictor":  # what the last block fuses does not reach the class token
        config = config.replace(at=(0, 1, 2))
    model, inputs = pruned(name, config), source.draw(6)

    def reached(module, loss):
        named = dict(module.named_parameters())
        if not named:
            return set()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)
        return {key for key, grad in zip(named, grads, strict=True) if grad is not None and grad.any()}

    soft = chosen in SOFT
    soften(model, 0.5 if soft else 0.0)
    with asked(model, *inputs), vp.collect() as traces:
        loss = tensor(model(*inputs)).square().sum()
    guided = [trace for trace in traces if any(step.guidance is not None for step in trace.layers)]
    aligned = [trace.aligned.square().sum() for trace in guided]
    assert guided or config.guide is None
    costs = [step.expected.sum() for trace in traces for step in trace.layers if step.expected is not None]
    own = {key for key, _ in parts(model).named_parameters()}
    assert reached(parts(model), loss + sum(aligned) + sum(costs)) == own
    if soft:
        soften(model, 0.0)
        with asked(model, *inputs):
            loss = tensor(model(*inputs)).square().sum()
    dense = reached(source.model, tensor(source.model(*inputs)).square().sum())
    if config.depths("image", 4) and chosen != "keep=count":
        assert dense - reached(source.model, loss) == set()


def parts(model) -> torch.nn.ModuleDict:
    """What pruning added to a model."""
    record = model.pruning
    added = {tower: encoder.pruners for tower, encoder in record.towers.items()}
    added |= {"guide": record.guide} if record.guide is not None else {}
    return torch.nn.ModuleDict(added)


@pytest.mark.parametrize("chosen", [*PRESETS, *EVERY])
@given(data=st.data())
@settings(max_examples=2)
def test_config_and_checkpoint_round_trips(tmp_path_factory, chosen, data):
    """13: config -> JSON -> config, and -> checkpoint -> the same outputs, bit by bit."""
    config = data.draw(configs(chosen))
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model, inputs, folder = pruned("nlvr", config), small("nlvr").draw(3), tmp_path_factory.mktemp("saved")
    out, traces = run(model, inputs)
    with pytest.warns(vp.UnknownHostWarning):
        vp.save(model, folder)
    again = vp.load(folder, host=type(small("nlvr").model)(**BLIP))
    assert again.pruning.config == config
    loaded, loaded_traces = run(again, inputs)
    assert torch.equal(loaded, out)
    assert [t.lengths for t in loaded_traces] == [t.lengths for t in traces]
