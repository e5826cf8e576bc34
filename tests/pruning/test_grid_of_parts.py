"""The grid of parts: every two parts of different kinds meet on every kind of tower, and run or are refused with a reason."""

from __future__ import annotations

import inspect
import itertools
import typing

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_models import asked, sentences, small

import vltprune as vp

KINDS = {
    "guide": ("none", *vp.guides.names()),
    "scorer": tuple(vp.scorers.names()),
    "keep": tuple(vp.keepers.names()),
    "selector": tuple(vp.selectors.names()),
    "reducer": tuple(vp.reducers.names()),
}
TOWERS = ("vit", "causal", "bert", "blip", "vilt")
REGISTRIES = {
    "guide": vp.guides,
    "scorer": vp.scorers,
    "keep": vp.keepers,
    "selector": vp.selectors,
    "reducer": vp.reducers,
}
# what a config or a build may say of parts that do not go together
REASONS = (
    "reads the alignment guide, and guide=None",
    "reads the attention of a summary token",
    "reads the attention of text tokens",
    "reads the attention of a text query",
    "compares images with a text, and this model has only a text tower",
)


def covering():
    """Rows of parts, one of each kind, such that every two parts of different kinds are together in a row at least.

    Greedy: each row takes, kind after kind, the part with the most pairs that are still to come.
    """
    open_pairs = {
        frozenset({(a, one), (b, other)})
        for a, b in itertools.combinations(KINDS, 2)
        for one in KINDS[a]
        for other in KINDS[b]
    }
    while open_pairs:
        seed = min(open_pairs, key=sorted)
        row = dict(sorted(seed))
        for kind, names in KINDS.items():
            if kind not in row:
                row[kind] = max(
                    names,
                    key=lambda name, kind=kind: sum(
                        frozenset({(kind, name), pair}) in open_pairs for pair in row.items()
                    ),
                )
        open_pairs -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        yield row


ROWS = list(covering())


def towers():
    """A ViT, a causal text tower, a BERT, BLIP's pair of towers and ViLT: names, models and what draws their inputs."""
    import open_clip
    import transformers

    torch.manual_seed(0)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
        )
    ).eval()
    causal = open_clip.transformer.TextTransformer(
        context_length=12, vocab_size=40, width=32, heads=2, layers=3, output_dim=16
    ).eval()
    return {
        "vit": (small("vit").model, small("vit").draw),
        "causal": (causal, lambda n: (torch.randint(1, 40, (n, 12)),)),
        "bert": (bert, sentences),
        "blip": (small("blip").model, small("blip").draw),
        "vilt": (small("vilt").model.vilt, small("vilt").draw),
    }


@pytest.fixture(scope="module")
def models():
    return towers()


def config_of(row):
    """The parts of a row by name; those whose arguments are required get some."""
    parts = {kind: vp.Part(name, required(REGISTRIES[kind][name])) for kind, name in row.items() if name != "none"}
    return {"guide": None, **parts}


def required(maker):
    """The arguments that a part has no defaults for."""
    values = {int: 3, float: 0.5}
    hints = typing.get_type_hints(maker.__init__)
    needed = [p.name for p in inspect.signature(maker).parameters.values() if p.default is p.empty]
    return {name: values[hints[name]] for name in needed if name not in ("spec", "specs")}


def refusal_or_run(model, inputs, row):
    """The reason why a row is refused when the model is built; None where it runs, with what must hold then."""
    try:
        pruned = vp.prune(model, vp.PruneConfig(**config_of(row), at=(0, -1)))
    except ValueError as error:
        return str(error)
    if pruned.pruning.guide is not None and pruned.pruning.guide.is_untrained:
        torch.manual_seed(0)
        pruned.pruning.guide.fit(torch.randn(200, 32))
    with torch.no_grad(), asked(pruned, *inputs), vp.collect() as traces:
        out = pruned(*inputs)
    out = out.last_hidden_state if hasattr(out, "last_hidden_state") else out
    assert out.isfinite().all(), row
    for trace in traces:
        assert all(n >= 1 for lengths in trace.lengths for n in lengths), row
    return None


@pytest.mark.parametrize("tower", TOWERS)
def test_every_two_parts_run_together_or_are_refused(models, tower):
    model, draw = models[tower]
    inputs = draw(2)
    reasons = [refusal_or_run(model, inputs, row) for row in ROWS]
    for row, reason in zip(ROWS, reasons, strict=True):
        assert reason is None or any(known in reason for known in REASONS), (row, reason)
    assert reasons.count(None) > len(ROWS) // 4


@pytest.mark.parametrize("tower", TOWERS)
@given(row=st.fixed_dictionaries({kind: st.sampled_from(names) for kind, names in KINDS.items()}))
@settings(max_examples=max(1, settings.default.max_examples // 12))
def test_any_parts_run_together_or_are_refused(models, tower, row):
    """The whole grid, of which exploring draws other rows each time."""
    model, draw = models[tower]
    reason = refusal_or_run(model, draw(2), row)
    assert reason is None or any(known in reason for known in REASONS), reason


def test_every_two_parts_are_in_a_row():
    pairs = {frozenset(pair) for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    for a, b in itertools.combinations(KINDS, 2):
        for one, other in itertools.product(KINDS[a], KINDS[b]):
            assert frozenset({(a, one), (b, other)}) in pairs
