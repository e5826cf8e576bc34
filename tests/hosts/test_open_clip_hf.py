"""Text towers of open_clip that are encoders of transformers: poolers over what is left, padding, refusals."""

from __future__ import annotations

import checks
import pytest
import torch
import transformers as hf
from cases_open_clip_hf import ENCODERS, make, text_tower
from checks import Case, randomize, same
from ranks import in_a_process
from transformers_parts import LENGTH, words
from without_transformers import prune_open_clip

import vltprune as vp


def left(case, pruned):
    """The tokens that are left, as the encoder gives them."""
    tokens, _ = pruned.encode(*case.inputs)
    final = getattr(case.model.transformer, "final_norm", torch.nn.Identity())  # ModernBERT's
    return tokens.with_x(final(tokens.x))


@pytest.mark.parametrize("name", [name for name in ENCODERS if ": mean" in name])
@torch.no_grad()
def test_means_weigh_merged_tokens_by_their_size(name):
    case = make(name)
    pruned = case.pruned()
    tokens = left(case, pruned)
    sizes, rows = tokens.size.split(tokens.layout.lengths), tokens.x.split(tokens.layout.lengths)
    assert any((size > 1).any() for size in sizes)
    for out, size, x in zip(checks.tensors(pruned(*case.inputs))[0], sizes, rows, strict=True):
        same(out, case.model.proj((x * size[:, None]).sum(0) / size.sum()))


@pytest.mark.parametrize("name", [name for name in ENCODERS if ": max" in name])
@torch.no_grad()
def test_maxima_are_over_what_is_left(name):
    case = make(name)
    pruned = checks.ragged(case)
    tokens = left(case, pruned)
    want = [case.model.proj(x.amax(0)) for x in tokens.x.split(tokens.layout.lengths)]
    same(checks.tensors(pruned(*case.inputs))[0], torch.stack(want))


@pytest.mark.parametrize("name", [name for name in ENCODERS if "tokens" in name])
@torch.no_grad()
def test_tokens_are_those_that_are_left(name):
    case = make(name)
    pruned = checks.ragged(case)
    tokens = left(case, pruned)
    skipped = int(": cls, tokens" in name)  # open_clip leaves the first out where ClsPooler reads it
    for row, x in zip(pruned(*case.inputs)[1], tokens.x.split(tokens.layout.lengths), strict=True):
        checks.same_row(row, x[skipped:])


@torch.no_grad()
def test_a_first_token_that_is_read_stays_whatever_the_encoder_reads():
    tower = text_tower("bert", "cls state")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    tower.transformer = hf.SiglipTextModel(hf.SiglipTextConfig(vocab_size=60, max_position_embeddings=LENGTH, **sizes))
    case = Case(randomize(tower), (words(),), {"text": [[0, LENGTH - 1]] * 3})
    checks.keep_all_is_the_host(case)
    checks.batch_mates_do_not_matter(case, "random")
    checks.batch_mates_do_not_matter(case, "madtp")


@pytest.mark.parametrize("name", ["bert: mean", "bert: cls, tokens", "roberta: mean"])
def test_padding_makes_no_difference(name):
    case = make(name)
    padding = case.model.config.pad_token_id
    longer = torch.cat([case.inputs[0], torch.full((3, 4), padding)], 1)
    pruned = case.pruned()
    short, long = (checks.tensors(pruned(ids))[0] for ids in (case.inputs[0], longer))
    assert torch.equal(short, long)


def test_padding_is_counted_apart_from_the_dense_cost():
    case = make("bert: mean")
    cost = vp.count_macs(case.pruned(keep="ratio(ratio=1.0)"), *case.inputs)
    with torch.no_grad():
        full = vp.count_macs(case.pruned(keep="ratio(ratio=1.0)"), case.inputs[0].clamp(min=3))
    assert cost.padded_total == full.dense_total > cost.dense_total
    assert full.padding_total == 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing():
    case = make("bert: mean, mlp")
    layers = [layer.intermediate for layer in case.model.transformer.encoder.layer]
    checks.recomputing_changes_nothing(case, layers, case.model.set_grad_checkpointing)


@torch.no_grad()
def test_causal_encoders_stay_causal():
    tower = text_tower("bert", "mean")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.CLIPTextConfig(vocab_size=60, max_position_embeddings=LENGTH, eos_token_id=59, **sizes)
    tower.transformer = hf.CLIPTextModel(config)
    ids = words()
    ids[:, -1] = 59
    case = Case(randomize(tower), (ids,), {"text": [[LENGTH - 1]] * 3})
    checks.keep_all_is_the_host(case)
    checks.batch_mates_do_not_matter(case, "random")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ids: ids - 100, r"0 \.\. 59"),
        (lambda ids: ids.repeat(1, 2), "has 24 tokens, the tower has 20"),
        (lambda ids: ids[0], r"\[batch, length\]"),
        (lambda ids: ids[:0], "not empty"),
        (lambda ids: ids.roll(1, 1), "sentence 0 begins with padding .id 0.: pad on the right"),
        (lambda ids: ids * 0, "sentence 0 begins with padding"),
    ],
)
def test_wrong_text_is_refused(change, says):
    case = make("bert: mean")
    with pytest.raises(ValueError, match=says):
        case.pruned()(change(case.inputs[0]))


class FirstHalf(torch.nn.Module):
    """A pooler that nobody knows."""


def refused(part):
    tower = text_tower("bert", "mean")
    if part == "pooler":
        tower.pooler = FirstHalf()
    elif part == "padding":
        tower.config.pad_token_id = None
    else:
        tower.transformer = hf.T5EncoderModel(hf.T5Config(vocab_size=60, d_model=32, d_kv=8, num_layers=1, num_heads=4))
    return tower


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("pooler", "its pooler, a FirstHalf.*MeanPooler, MaxPooler, ClsPooler, ClsLastHiddenStatePooler"),
        ("padding", "no pad_token_id"),
        ("encoder", r"a transformers\.models\.t5\..*T5EncoderModel: no host runs it.*BERT"),
    ],
)
def test_refused_by_name(part, says):
    with pytest.raises(TypeError, match=says):
        vp.prune(refused(part), "random")


def test_open_clip_needs_no_transformers():
    in_a_process(prune_open_clip)
